"""The models of RabbitMQ that the simulation and the state machines use, beside RabbitMQ itself.

The same random operations run on the models and on a broker. Both must give the same observations:
what each inbox receives, in which order, and what each reader of a shard is delivered.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
import uuid
from typing import Any, Callable, Dict, List, Tuple

import amqp
import pytest
from celery import Celery

from celery_amqp_results.amqp.declarations import declare_exchange, declare_queue
from celery_amqp_results.feed.bindings import ALL
from celery_amqp_results.protocol.names import BROADCAST, Route, Topology, barrier_key
from celery_amqp_results.store.checkout import PREFETCH, Checkout, Limits
from tests.broker.helpers import LONG
from tests.conftest import Apps
from tests.simulation.exchange import Exchange
from tests.unit import broker_model

SHARDS = 2
PROCESSES = 3
READERS = 3
OPERATIONS = 60
SEEDS = range(40 if os.environ.get("LOAD") else 3)

#: Text of a message, and whether it was delivered before.
Seen = Tuple[str, bool]


def word(process: int) -> str:
    """Return the client word of a process."""
    return f"{process:016x}"


class Model:
    """The operations, on the models."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._exchange = Exchange()
        clock = broker_model.Clock()
        self._queues = {
            topology.shard_queue_name(shard): broker_model.Queue(clock) for shard in range(SHARDS)
        }

    def publish(self, task_id: str, owner: int, text: str) -> None:
        shard = self._topology.shard(task_id)
        self._queues[self._topology.shard_queue_name(shard)].publish({}, text.encode())
        self._exchange.publish(text, shard, owner)

    def publish_expired(self, task_id: str, text: str) -> None:
        queue = self._queues[self._topology.shard_queue_name(self._topology.shard(task_id))]
        queue.publish({"expiration": "0"}, text.encode())

    def broadcast(self, task_id: str, text: str) -> None:
        self._exchange.broadcast(text)

    def open(self, process: int) -> None:
        self._exchange.open(process)

    def lose(self, process: int) -> None:
        self._exchange.lose(process)

    def bind(self, process: int, key: int) -> None:
        self._exchange.bind(process, key)

    def unbind(self, process: int, key: int) -> None:
        self._exchange.unbind(process, key)

    def inbox(self, process: int) -> List[str]:
        """Return what has come to an inbox before a barrier."""
        messages = self._exchange.inboxes[process].messages
        self._exchange.pass_through(process, "barrier")
        found = []
        while (message := messages.popleft()) != "barrier":
            found.append(message)
        return found

    def link(self) -> Any:
        """Return the connection of a new reader."""
        link = broker_model.Link(next(iter(self._queues.values())), lambda: None)
        vars(link)["find"] = self._queues.__getitem__
        return link

    def close(self) -> None:
        """Do nothing."""


class Broker:
    """The operations, on RabbitMQ."""

    def __init__(self, app: Celery) -> None:
        self._topology = topology = app.backend.config.topology
        self._connector = app.backend.layout.connector
        self._inboxes: Dict[int, Tuple[amqp.Connection, amqp.Channel, str, str]] = {}
        self._links: List[Any] = []
        self._publishing = self.link().channel()
        declare_exchange(self._publishing, topology)
        for shard in range(SHARDS):
            declare_queue(self._publishing, topology.shard_queue(shard))
        self._publishing.confirm_select()

    def publish(self, task_id: str, owner: int, text: str) -> None:
        topology = self._topology
        key = topology.routing_key(task_id, "SUCCESS", Route(word(owner)))
        queue = topology.shard_queue_name(topology.shard(task_id))
        self._publishing.basic_publish_confirm(
            amqp.Message(text.encode(), delivery_mode=2), "", queue
        )
        self._push(text, key)

    def publish_expired(self, task_id: str, text: str) -> None:
        queue = self._topology.shard_queue_name(self._topology.shard(task_id))
        message = amqp.Message(text.encode(), delivery_mode=2, expiration="0")
        self._publishing.basic_publish_confirm(message, "", queue)

    def broadcast(self, task_id: str, text: str) -> None:
        key = self._topology.routing_key(task_id, "FORGOTTEN", Route(BROADCAST))
        self._push(text, key)

    def _push(self, text: str, key: str) -> None:
        # RabbitMQ 4.3 refuses a message for an inbox that disappears at this moment. The other
        # inboxes receive it.
        with contextlib.suppress(amqp.exceptions.MessageNacked):
            self._publishing.basic_publish_confirm(
                amqp.Message(text.encode()), self._topology.exchange, key
            )

    def open(self, process: int) -> None:
        connection = self._connector.open_once(0.0).amqp
        channel = connection.channel()
        # It stays when its consumer is cancelled.
        queue = channel.queue_declare("", exclusive=True, auto_delete=False).queue
        barrier = barrier_key()
        bindings = map(self._topology.client_binding, (word(process), BROADCAST))
        for key in (*bindings, barrier):
            channel.queue_bind(queue, self._topology.exchange, key)
        self._inboxes[process] = connection, channel, queue, barrier

    def lose(self, process: int) -> None:
        if process in self._inboxes:
            self._inboxes.pop(process)[0].close()

    def bind(self, process: int, key: int) -> None:
        _, channel, queue, _ = self._inboxes[process]
        channel.queue_bind(queue, self._topology.exchange, self._pattern(key))

    def unbind(self, process: int, key: int) -> None:
        _, channel, queue, _ = self._inboxes[process]
        channel.queue_unbind(queue, self._topology.exchange, self._pattern(key))

    def _pattern(self, key: int) -> str:
        topology: Topology = self._topology
        return topology.every_binding() if key == ALL else topology.shard_binding(key)

    def inbox(self, process: int) -> List[str]:
        """Return what has come to an inbox before a barrier."""
        connection, channel, queue, barrier = self._inboxes[process]
        found: List[str] = []
        tag = channel.basic_consume(
            queue, no_ack=True, callback=lambda message: found.append(_text(message))
        )
        channel.basic_publish(amqp.Message("barrier"), self._topology.exchange, barrier)
        while "barrier" not in found:
            connection.drain_events(timeout=LONG)
        channel.basic_cancel(tag)
        assert found.pop() == "barrier"
        return found

    def link(self) -> Any:
        """Return the connection of a new reader."""
        link = self._connector.open_once(0.0)
        self._links.append(link)
        return link

    def close(self) -> None:
        """Close all connections."""
        for process in list(self._inboxes):
            self.lose(process)
        for link in self._links:
            link.close()


def _text(message: amqp.Message) -> str:
    return message.body.decode() if isinstance(message.body, bytes) else str(message.body)


class Reader:
    """A reader of a shard, which waits in line or holds the shard."""

    def __init__(self, broker: Any, queue: str) -> None:
        self.seen: List[Seen] = []
        self._tags: List[int] = []
        self._link = broker.link()
        self._checkout = Checkout(self._link, queue, self._on_message, Limits(PREFETCH, {}))

    def _on_message(self, message: amqp.Message) -> None:
        self.seen.append((_text(message), bool(message.delivery_info["redelivered"])))
        self._tags.append(message.delivery_info["delivery_tag"])

    def stand_in_line(self) -> None:
        """Wait until the broker has the consumer and the fence."""
        self._checkout.channel.queue_declare(self._checkout.queue, passive=True)

    def read(self) -> List[Seen]:
        """Read everything up to the fence, as the first in line."""
        assert self._checkout.wait(time.monotonic() + LONG)
        return self.seen

    def peek(self) -> List[Seen]:
        """Return what has come, as one that waits in line: nothing."""
        while self._link.drain(0.0):
            pass
        return self.seen

    def acknowledge(self, positions: List[int]) -> None:
        """Remove messages from the shard."""
        self._checkout.acknowledge([self._tags[at] for at in positions])

    def close(self) -> None:
        """Let the next one in line read."""
        self._checkout.close(wait=True)


class Run:
    """One sequence of operations, which a seed chooses, on both."""

    def __init__(self, seed: int, topology: Topology, both: Tuple[Any, Any]) -> None:
        self._random = random.Random(seed)
        self._topology = topology
        self._both = both
        self._open: List[int] = []
        self._bound: List[Tuple[int, int]] = []
        #: The readers of each shard, in line: each a pair.
        self._lines: Dict[int, List[Tuple[Reader, Reader]]] = {s: [] for s in range(SHARDS)}
        self._count = 0
        self.log: List[str] = []

    def run(self) -> None:
        """Do random operations, and compare what is observed."""
        operations: List[Tuple[int, Callable[[], None]]] = [
            (8, self._publish), (1, self._publish_expired), (1, self._broadcast),
            (2, self._connect), (1, self._lose), (2, self._bind), (1, self._unbind),
            (4, self._compare_inbox), (3, self._begin), (3, self._compare_reader), (2, self._end),
        ]  # fmt: skip
        weights = [weight for weight, _ in operations]
        for _ in range(OPERATIONS):
            ((_, operation),) = self._random.choices(operations, weights)
            operation()
        for process in self._open:
            self._compare("inbox", process)
        for shard, line in self._lines.items():
            while line:
                self._finish(shard)
            self._lines[shard].append(self._reader(shard))
            self._finish(shard)

    def _each(self, name: str, *arguments: Any) -> None:
        self.log.append(f"{name}{arguments}")
        for broker in self._both:
            getattr(broker, name)(*arguments)

    def _compare(self, name: str, *arguments: Any) -> None:
        model, real = (getattr(broker, name)(*arguments) for broker in self._both)
        assert model == real, self.log

    def _text(self) -> str:
        self._count += 1
        return f"message {self._count}"

    def _task(self) -> str:
        return str(uuid.UUID(int=self._random.getrandbits(128), version=4))

    def _publish(self) -> None:
        self._each("publish", self._task(), self._random.randrange(PROCESSES), self._text())

    def _publish_expired(self) -> None:
        task_id = self._task()
        # A consumer that has room would still be delivered it.
        if not self._lines[self._topology.shard(task_id)]:
            self._each("publish_expired", task_id, self._text())

    def _broadcast(self) -> None:
        self._each("broadcast", self._task(), self._text())

    def _connect(self) -> None:
        closed = [process for process in range(PROCESSES) if process not in self._open]
        if closed:
            self._open.append(self._random.choice(closed))
            self._each("open", self._open[-1])

    def _lose(self) -> None:
        if self._open:
            process = self._open.pop(self._random.randrange(len(self._open)))
            self._bound = [each for each in self._bound if each[0] != process]
            self._each("lose", process)

    def _bind(self) -> None:
        if self._open:
            process, key = self._random.choice(self._open), self._random.choice((ALL, 0, 1))
            self._bound.append((process, key))
            self._each("bind", process, key)

    def _unbind(self) -> None:
        if self._bound:
            process, key = self._random.choice(self._bound)
            self._bound = [each for each in self._bound if each != (process, key)]
            self._each("unbind", process, key)

    def _compare_inbox(self) -> None:
        if self._open:
            self._compare("inbox", self._random.choice(self._open))

    def _reader(self, shard: int) -> Tuple[Reader, Reader]:
        queue = self._topology.shard_queue_name(shard)
        self.log.append(f"read shard {shard}")
        model, real = (Reader(broker, queue) for broker in self._both)
        real.stand_in_line()
        return model, real

    def _begin(self) -> None:
        shard = self._random.randrange(SHARDS)
        if len(self._lines[shard]) < READERS:
            self._lines[shard].append(self._reader(shard))
            self._compare_line(shard)

    def _compare_reader(self) -> None:
        self._compare_line(self._random.randrange(SHARDS))

    def _compare_line(self, shard: int) -> None:
        for place, (model, real) in enumerate(self._lines[shard]):
            if place:
                assert model.peek() == real.peek() == [], self.log
            else:
                assert model.read() == real.read(), self.log

    def _end(self) -> None:
        shard = self._random.randrange(SHARDS)
        if self._lines[shard]:
            self._finish(shard)

    def _finish(self, shard: int) -> None:
        """Have the first reader in line remove some messages, and leave."""
        self._compare_line(shard)
        model, real = self._lines[shard].pop(0)
        count = len(model.seen)
        positions = sorted(
            self._random.sample(range(count), self._random.randrange(count + 1) // 2)
        )
        self.log.append(f"shard {shard}: remove {positions}")
        for reader in (model, real):
            reader.acknowledge(positions)
            reader.close()


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_models_and_the_broker_give_the_same_observations(
    make_app: Apps, queue_type: str, seed: int
) -> None:
    options = {"shards": SHARDS, "queue_type": queue_type}
    # Every reader has a connection of its own.
    app = make_app(result_backend_transport_options=options, broker_pool_limit=None)
    topology = app.backend.config.topology
    broker = Broker(app)
    try:
        Run(seed, topology, (Model(topology), broker)).run()
    finally:
        broker.close()
