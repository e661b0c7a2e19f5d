"""What RabbitMQ takes to confirm one message after the other, by kind of message and queue.

That is the floor under everything that is stored one by one: py-amqp by itself publishes messages
of the size of a result, each confirmed before the next, to as many queues as there are shards.
"""

from __future__ import annotations

import time
import uuid
from typing import Any, Callable, Dict, Iterator, List, Mapping, Tuple

import amqp
import kombu

from bench import processes
from bench.figures import LESS, Figures, Row
from bench.place import Place

#: Like the default for shards. A quorum queue costs more to declare, and nothing depends on it.
QUEUES = 256
QUORUM_QUEUES = 64

BODY = b"x" * 180

PERSISTENT, TRANSIENT = 2, 1


def measure(place: Place) -> Iterator[Row]:
    """Yield microseconds, and the broker's processor time, for each confirmed message."""
    count = 500 if place.quick else 2000
    kinds: Dict[str, Tuple[int, int, Dict[str, Any]]] = {
        "persistent": (QUEUES, PERSISTENT, {}),
        "transient": (QUEUES, TRANSIENT, {}),
        "persistent, quorum queue": (QUORUM_QUEUES, PERSISTENT, {"x-queue-type": "quorum"}),
    }
    if place.node.version.startswith("3."):
        # From RabbitMQ 4.0 on all classic queues are of this version.
        kinds["persistent, version 2"] = (QUEUES, PERSISTENT, {"x-queue-version": 2})
    connection = kombu.Connection(place.node.url()).connection
    try:
        channel = connection.channel()
        channel.confirm_select()
        declared = {name: _declare(channel, *kind[::2]) for name, kind in kinds.items()}
        found = place.alternate(
            {
                name: _publishing(place, channel, declared[name], kinds[name][1], count)
                for name in kinds
            }
        )
        for queues in declared.values():
            for queue in queues:
                channel.queue_delete(queue)
    finally:
        connection.close()
    yield _row("confirm", "one confirmed message, py-amqp by itself", found["clock"])
    yield _row("confirm.broker", "processor time of RabbitMQ for it", found["broker"])


def _row(key: str, title: str, figures: Figures) -> Row:
    return Row(key, title, "µs", LESS, figures, absolute=True)


def _declare(channel: Any, count: int, arguments: Dict[str, Any]) -> List[str]:
    queues = [f"bench-{uuid.uuid4().hex}" for _ in range(count)]
    for queue in queues:
        channel.queue_declare(queue, durable=True, auto_delete=False, arguments=arguments)
    return queues


def _publishing(
    place: Place, channel: Any, queues: List[str], mode: int, count: int
) -> Callable[[], Mapping[str, float]]:
    def work() -> Dict[str, float]:
        cpu = processes.cpu_seconds(place.node.pid)
        started = time.perf_counter()
        for number in range(count):
            message = amqp.Message(BODY, delivery_mode=mode, expiration="86400000")
            channel.basic_publish_confirm(message, routing_key=queues[number % len(queues)])
        seconds = time.perf_counter() - started
        cpu = processes.cpu_seconds(place.node.pid) - cpu
        return {"clock": seconds / count * 1e6, "broker": cpu / count * 1e6}

    return work
