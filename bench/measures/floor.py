"""The floor under a chord of 10: what RabbitMQ takes for its tasks and results alone.

A chord of 10 is eleven tasks. With any durable design on RabbitMQ, their messages are published,
delivered and acknowledged, and eleven states are kept and confirmed. py-amqp by itself does the
same here, with messages of the same size and no code of ours, at the pace of its confirms and at
that of the chord storm. The kinds of work are added one after the other, so the difference between
two columns is what a kind costs.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
import uuid
from collections import deque
from concurrent import futures
from typing import Any, Callable, Deque, Dict, Iterator, List, Mapping, Optional, Tuple

import amqp
import kombu

from bench import internals, peers
from bench.figures import LESS, MORE, OURS, Row
from bench.measures import round_trip
from bench.measures.store import bare_state, declare_shards
from bench.measures.storm import PATIENCE, storm
from bench.place import Place

#: Tasks of a chord of 10 with its body.
TASKS = 11

#: Processes of the storm's worker, and what each prefetches.
CONSUMERS = 2
PREFETCH = 4

#: What is done by py-amqp, from the least to the most.
ONLY_TASKS = "tasks"
STATES = "tasks and states"
COPIES = "tasks, states and live copies"
PLANS = "tasks, states, live copies and a plan"
KINDS = (ONLY_TASKS, STATES, COPIES, PLANS)


def measure(place: Place) -> Iterator[Row]:
    """Yield the broker's processor time for chords of 10, and for their floor."""
    count = 50 if place.quick else 200
    round_trip.warm(place)
    workers = place.workers("amqp", "redis")
    measures = {name: storm(place, worker.app, 10, count) for name, worker in workers.items()}
    # So that the paced rounds have a pace.
    pace = measures["amqp"]()["per second"] if "amqp" in measures else 40.0
    with contextlib.ExitStack() as stack:
        for kind in KINDS:
            for rate in (None, pace):
                name = f"bare: {kind}" + ("" if rate is None else ", paced")
                bare = stack.enter_context(contextlib.closing(Bare(place, kind)))
                measures[name] = bare.measuring(count, rate)
        found = place.alternate(measures, rounds=3)
    title = "each chord of 10, or its messages by py-amqp alone"
    yield Row("floor", f"chords a second, {title}", "/s", MORE, found["per second"], absolute=True)
    title = f"processor time of RabbitMQ and Redis, {title}"
    yield Row("floor.broker", title, "ms", LESS, found["broker"], absolute=True)


class Bare:
    """py-amqp by itself: a sender, consumers that keep states, and a reader of live copies.

    Parameters:
        place: where the measure runs.
        kind: of :data:`KINDS`.
        peer: the variant of this backend whose shards keep the states.
    """

    def __init__(self, place: Place, kind: str, peer: str = OURS) -> None:
        self._place = place
        self._kind = kind
        self._app = place.app(peer)
        declare_shards(self._app)
        peers.close(self._app)
        self._links = [_connection(place) for _ in range(CONSUMERS + 2)]
        self._sender = self._links[0].channel()
        self._sender.confirm_select()
        # Celery's tasks are not confirmed.
        self._tasks = self._links[0].channel()
        self._queue, self._plans, self._copies = (f"bench-{uuid.uuid4().hex}" for _ in range(3))
        for queue in (self._queue, self._plans):
            self._sender.queue_declare(queue, durable=True, auto_delete=False)
        self._sender.queue_declare(self._copies, exclusive=False, auto_delete=False)
        self._body, self._headers = _task(self._app)

    def close(self) -> None:
        """Delete the queues, and close the connections."""
        for queue in (self._queue, self._plans, self._copies):
            self._sender.queue_delete(queue)
        for link in self._links:
            link.close()

    def measuring(self, count: int, rate: Optional[float]) -> Callable[[], Mapping[str, float]]:
        """Return what measures the messages of *count* chords, at most *rate* a second."""

        def work() -> Dict[str, float]:
            broker, started = self._place.broker_seconds(), time.perf_counter()
            with futures.ThreadPoolExecutor() as threads:
                jobs = [threads.submit(job) for job in self._jobs(count, rate)]
                for _ in range(count):
                    self._send()
                for job in jobs:
                    job.result(PATIENCE)
            seconds = time.perf_counter() - started
            return {
                "per second": count / seconds,
                "broker": (self._place.broker_seconds() - broker) / count * 1e3,
            }

        return work

    def left(self) -> int:
        """Return how many messages but states are left, of which there should be none."""
        return sum(
            self._sender.queue_declare(queue, passive=True).message_count
            for queue in (self._queue, self._plans, self._copies)
        )

    def _send(self) -> None:
        for _ in range(TASKS):
            message = amqp.Message(
                self._body,
                content_type="application/json",
                content_encoding="utf-8",
                delivery_mode=2,
                correlation_id=str(uuid.uuid4()),
                application_headers=self._headers,
            )
            self._tasks.basic_publish(message, routing_key=self._queue)
        if self._kind == PLANS:
            plan = amqp.Message(self._body * TASKS, delivery_mode=2)
            self._sender.basic_publish_confirm(plan, routing_key=self._plans)

    def _jobs(self, count: int, rate: Optional[float]) -> Iterator[Callable[[], None]]:
        """Yield what threads must do, each with a connection of its own."""
        share, rest = divmod(count * TASKS, CONSUMERS)
        for number in range(CONSUMERS):
            size = share + (rest if number == 0 else 0)
            yield functools.partial(self._work, self._links[1 + number], size, rate)
        if self._kind in (COPIES, PLANS):
            plans = count if self._kind == PLANS else 0
            yield functools.partial(self._read, self._links[-1], count * TASKS, plans)

    def _work(self, link: Any, count: int, rate: Optional[float]) -> None:
        """Take *count* tasks, keep a state of each, and acknowledge it."""
        arrived: Deque[Any] = deque()
        channel = link.channel()
        states = link.channel()
        states.confirm_select()
        channel.basic_qos(0, PREFETCH, False)
        channel.basic_consume(self._queue, callback=arrived.append)
        started = time.perf_counter()
        for number in range(count):
            _drain_until(link, lambda: arrived)
            if rate is not None:
                due = started + number * CONSUMERS / (rate * TASKS)
                time.sleep(max(0.0, due - time.perf_counter()))
            message = arrived.popleft()
            if self._kind != ONLY_TASKS:
                self._keep(states, str(uuid.uuid4()))
            channel.basic_ack(message.delivery_tag)
        # Tasks beyond its share go back to the queue, for the other consumer.
        channel.close()
        states.close()

    def _keep(self, channel: Any, task_id: str) -> None:
        state = bare_state(task_id)
        if self._kind in (COPIES, PLANS):
            # In the same moment, like the backend: the copy is not waited for.
            copy = amqp.Message(state.body, type="state", application_headers=state.headers)
            channel.basic_publish(copy, routing_key=self._copies)
        queue = internals.shard_queue(self._app, task_id)
        channel.basic_publish_confirm(state, routing_key=queue, mandatory=True)

    def _read(self, link: Any, copies: int, plans: int) -> None:
        copied: List[Any] = []
        planned: List[Any] = []
        channel = link.channel()
        channel.basic_consume(self._copies, no_ack=True, callback=copied.append)
        channel.basic_consume(self._plans, callback=planned.append)
        _drain_until(link, lambda: len(copied) >= copies and len(planned) >= plans)
        for message in planned:
            channel.basic_ack(message.delivery_tag)
        channel.close()


def _connection(place: Place) -> Any:
    connection = kombu.Connection(place.node.url()).connection
    connection.connect()
    return connection


def _task(app: Any) -> Tuple[bytes, Dict[str, Any]]:
    """Return the body and the headers of a task message of Celery."""
    message = app.amqp.as_task_v2(str(uuid.uuid4()), "bench.noop", (), {})
    headers = {name: value for name, value in message.headers.items() if value is not None}
    return json.dumps(message.body).encode(), headers


def _drain_until(link: Any, done: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done():
        link.drain_events(timeout=max(0.0, deadline - time.monotonic()))
