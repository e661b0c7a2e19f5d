"""The floor under the measure *fleet*: what RabbitMQ takes for its messages alone.

For each task of the fleet a state is kept and confirmed, a live copy goes to each web process, and
some polls pass a barrier: a message through the exclusive queue of the process. py-amqp by itself
does the same here, at the same rate and with no code of ours. The kinds of work are added one after
the other. The fleet itself runs beside them.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import uuid
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional

import amqp
import kombu

from bench import internals, peers
from bench.figures import LESS, OURS, Row, percentile
from bench.measures import fleet
from bench.measures.store import bare_state, declare_shards
from bench.place import Place

#: What is done by py-amqp, with the number of barriers for each task. Polls before the result is
#: stored need a barrier each; those after it mostly do not.
KINDS = {
    "bare: kept": 0,
    "bare: kept, copied": 0,
    "bare: kept, copied, one barrier": 1,
    "bare: kept, copied, two barriers": 2,
}
KEPT = next(iter(KINDS))

PATIENCE = 60.0


def measure(place: Place) -> Iterator[Row]:
    """Yield the broker's processor time for each task, and what a barrier takes."""
    inboxes, rate = (place.fleet or fleet.QUICK)[0]
    with contextlib.ExitStack() as stack:
        measures: Dict[str, Callable[[], Mapping[str, float]]] = {}
        for name in place.chosen("amqp", "redis"):
            running = stack.enter_context(fleet.Fleet.running(place, name, inboxes))
            running.round(rate, fleet.WARM_UP if name == OURS else fleet.SHORT_WARM_UP)
            measures[name] = functools.partial(running.round, rate)
        for kind in KINDS:
            bare = stack.enter_context(contextlib.closing(Bare(place, kind, inboxes)))
            measures[kind] = bare.measuring(int(rate * fleet.SECONDS), rate)
        found = place.alternate(measures, warm_up=False)
    where = f"{inboxes} processes, {rate} tasks a second"
    for name, title, unit in (
        ("broker", "processor time of RabbitMQ and Redis, each task", "µs"),
        ("p50", "a poll, or a barrier by py-amqp, median", "ms"),
        ("p99", "a poll, or a barrier by py-amqp, 99th percentile", "ms"),
    ):
        title = f"{title}, {where}"
        yield Row(f"pollfloor.{name}", title, unit, LESS, found[name], absolute=True)


class Bare:
    """py-amqp by itself: one that stores, and inboxes that copies and barriers go through.

    Parameters:
        place: where the measure runs.
        kind: of :data:`KINDS`.
        inboxes: how many.
        peer: the variant of this backend whose shards keep the states.
    """

    def __init__(self, place: Place, kind: str, inboxes: int, peer: str = OURS) -> None:
        self._place = place
        self._kind = kind
        self._app = place.app(peer)
        declare_shards(self._app)
        peers.close(self._app)
        self._exchange = f"bench-{uuid.uuid4().hex}"
        self._link = _connection(place)
        self._channel = self._link.channel()
        self._channel.confirm_select()
        self._channel.exchange_declare(self._exchange, "topic", auto_delete=False)
        self._inboxes = [
            Inbox(_connection(place), _connection(place), self._exchange) for _ in range(inboxes)
        ]

    def close(self) -> None:
        """Delete what was declared, and close the connections."""
        for inbox in self._inboxes:
            inbox.close()
        self._channel.exchange_delete(self._exchange)
        self._link.close()

    def measuring(self, count: int, rate: Optional[float]) -> Callable[[], Mapping[str, float]]:
        """Return what measures the messages of *count* tasks, at most *rate* a second."""

        def work() -> Dict[str, float]:
            taken: List[float] = []
            broker, started = self._place.broker_seconds(), time.perf_counter()
            for number in range(count):
                if rate is not None:
                    due = started + number / rate
                    time.sleep(max(0.0, due - time.perf_counter()))
                self._keep()
                inbox = self._inboxes[number % len(self._inboxes)]
                taken += [inbox.barrier() for _ in range(KINDS[self._kind])]
            broker = (self._place.broker_seconds() - broker) / count * 1e6
            if not taken:
                return {"broker": broker}
            return {
                "broker": broker,
                "p50": percentile(taken, 50) * 1e3,
                "p99": percentile(taken, 99) * 1e3,
            }

        return work

    def copies(self) -> int:
        """Return how many copies the inboxes have received."""
        return sum(inbox.copies for inbox in self._inboxes)

    def _keep(self) -> None:
        task_id = str(uuid.uuid4())
        state = bare_state(task_id)
        if self._kind != KEPT:
            # In the same moment, like the backend.
            copy = amqp.Message(state.body, type="state", application_headers=state.headers)
            self._channel.basic_publish(copy, self._exchange, f"state.{task_id}")
        queue = internals.shard_queue(self._app, task_id)
        self._channel.basic_publish_confirm(state, routing_key=queue, mandatory=True)


class Inbox:
    """An exclusive queue that copies and its own barriers come to, read by a thread.

    It publishes on a connection of its own: py-amqp reads from a connection before it publishes.
    """

    def __init__(self, link: Any, publishing: Any, exchange: str) -> None:
        self._link = link
        self._publishing = publishing
        self._sender = publishing.channel()
        self._exchange = exchange
        self._key = f"barrier.{uuid.uuid4()}"
        self._back = threading.Event()
        self._closing = False
        self._came_back = 0.0
        #: Copies that have come.
        self.copies = 0
        self._channel = link.channel()
        queue = self._channel.queue_declare("", exclusive=True).queue
        for key in ("state.#", self._key):
            self._channel.queue_bind(queue, exchange, key)
        self._channel.basic_consume(queue, no_ack=True, callback=self._take)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def barrier(self) -> float:
        """Pass a barrier, and return the seconds until it was back."""
        self._back.clear()
        started = time.perf_counter()
        message = amqp.Message(b"", type="barrier", delivery_mode=1)
        self._sender.basic_publish(message, self._exchange, self._key)
        if not self._back.wait(PATIENCE):
            raise RuntimeError("a barrier has not come back")
        return self._came_back - started

    def close(self) -> None:
        """Close the connections."""
        self._closing = True
        self._thread.join(PATIENCE)
        self._link.close()
        self._publishing.close()

    def _take(self, message: Any) -> None:
        if message.properties.get("type") != "barrier":
            self.copies += 1
            return
        self._came_back = time.perf_counter()
        self._back.set()

    def _read(self) -> None:
        while not self._closing:
            with contextlib.suppress(TimeoutError):
                self._link.drain_events(timeout=0.2)


def _connection(place: Place) -> Any:
    connection = kombu.Connection(place.node.url()).connection
    connection.connect()
    return connection
