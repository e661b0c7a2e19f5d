"""Storing: ``store_result`` in one process, with no client waiting."""

from __future__ import annotations

import time
import uuid
from typing import Any, Callable, Dict, Iterator, Mapping

import amqp
import kombu

from bench import internals, peers
from bench.figures import LESS, MORE, OURS, Row
from bench.place import Place

#: A backend that declares a queue for each task stores fewer results by this factor.
FEWER = 20
#: A backend that waits for no confirms stores more results by this factor.
MORE_OF_THEM = 5


def measure(place: Place) -> Iterator[Row]:
    """Yield results a second, and the processor time of each.

    Without confirms, the clock runs until the broker has read everything. Otherwise the figures
    would only show how much fits into the buffers of a socket.
    """
    count = 400 if place.quick else 2000
    queue = f"bench-{uuid.uuid4().hex[:8]}"
    names = [name for name in peers.PEERS if name != "ignored"]
    apps = {
        name: place.app(name, queue if name == "rpc" else None)
        for name in place.chosen(*names, "amqp, tuned broker")
    }
    measures: Dict[str, Callable[[], Mapping[str, float]]] = {
        name: _storing(place, name, app, _count(name, count)) for name, app in apps.items()
    }
    connection = kombu.Connection(place.node.url()).connection
    try:
        bare = _Bare(connection, place, queue)
        measures["bare py-amqp, confirmed"] = bare.publishing(True, count)
        measures["bare py-amqp"] = bare.publishing(False, count * MORE_OF_THEM)
        found = place.alternate(measures)
    finally:
        connection.close()
        for app in apps.values():
            peers.close(app)
    yield Row("store", "results stored in one process", "/s", MORE, found["per second"])
    yield Row(
        "store.broker",
        "processor time of RabbitMQ and Redis, each result stored",
        "µs",
        LESS,
        found["broker"],
    )
    yield Row(
        "store.cpu", "processor time of the client, each result stored", "µs", LESS, found["cpu"]
    )


def _count(name: str, count: int) -> int:
    if peers.named(name).queue_per_task:
        return count // FEWER
    return count * MORE_OF_THEM if name in ("rpc", "amqp, confirm=False") else count


def timed(place: Place, count: int, work: Callable[[], Any], name: str = OURS) -> Dict[str, float]:
    """Return how many of *count* are done in a second, and the processor time of each in µs."""
    broker, cpu, started = place.broker_seconds(name), time.process_time(), time.perf_counter()
    work()
    return {
        "per second": count / (time.perf_counter() - started),
        "cpu": (time.process_time() - cpu) / count * 1e6,
        "broker": (place.broker_seconds(name) - broker) / count * 1e6,
    }


def _storing(place: Place, name: str, app: Any, count: int) -> Callable[[], Mapping[str, float]]:
    backend = app.backend
    # The queue of replies of rpc://, which has the name of its queue of tasks.
    reply_to = app.conf.task_default_queue

    def wait_for_broker() -> None:
        if name == "rpc":
            # The pool gives back the channel that was used last.
            with app.amqp.producer_pool.acquire(block=True) as producer:
                producer.channel.queue_declare(reply_to, passive=True)
        elif name == "amqp, confirm=False":
            backend.close()

    def measured() -> Mapping[str, float]:
        # A worker has its requests already.
        requests = [peers.context(str(uuid.uuid4()), reply_to) for _ in range(count)]

        def work() -> None:
            for request in requests:
                backend.store_result(request.id, 42, "SUCCESS", request=request)
            wait_for_broker()

        return timed(place, count, work, name)

    return measured


def bare_state(task_id: str) -> Any:
    """Return a message for py-amqp by itself, with the properties and the size of a state."""
    body = (
        b'{"status": "SUCCESS", "result": 42, "traceback": null, "children": [], "date_done": '
        b'"2026-01-01T00:00:00.000000+00:00", "task_id": "00000000-0000-4000-8000-000000000000"}'
    )
    return amqp.Message(
        body,
        type="state",
        content_type="application/json",
        content_encoding="utf-8",
        delivery_mode=2,
        application_headers={"published": 1, "state": "SUCCESS"},
        correlation_id=task_id,
        expiration="86400000",
    )


class _Bare:
    """py-amqp by itself, with the same queues, properties and body, and without live copies."""

    def __init__(self, connection: Any, place: Place, queue: str) -> None:
        self._app = place.app("amqp")
        declare_shards(self._app)
        peers.close(self._app)
        self._place = place
        self._channel = connection.channel()
        self._queue = queue
        self._channel.queue_declare(queue, durable=True, auto_delete=False)
        self._confirming = connection.channel()
        self._confirming.confirm_select()

    def publishing(self, confirmed: bool, count: int) -> Callable[[], Mapping[str, float]]:
        """Return what measures publishing."""
        publish = (
            self._confirming.basic_publish_confirm if confirmed else self._channel._basic_publish
        )
        app = self._app

        def measured() -> Mapping[str, float]:
            ids = [str(uuid.uuid4()) for _ in range(count)]

            def work() -> None:
                for task_id in ids:
                    publish(
                        bare_state(task_id),
                        exchange="",
                        routing_key=internals.shard_queue(app, task_id),
                        mandatory=True,
                    )
                self._channel.queue_declare(self._queue, passive=True)

            return timed(self._place, count, work)

        return measured


def declare_shards(app: Any) -> None:
    """Have every shard of *app* declared."""
    # A result stored in each shard declares all of them.
    ids = (str(uuid.uuid4()) for _ in range(20 * internals.shards(app)))
    for task_id in internals.one_id_a_shard(app, ids):
        app.backend.store_result(task_id, 42, "SUCCESS", request=peers.context(task_id))
