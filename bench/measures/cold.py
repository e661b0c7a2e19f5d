"""New worker processes: one for each task, and those of a worker that has just started.

The first worker of an installation finds no shards, and declares each one when a result needs it.
"""

from __future__ import annotations

import contextlib
import functools
import uuid
from typing import Callable, Dict, Iterator, Mapping

from bench import peers
from bench.figures import LESS, MORE, OURS, Row
from bench.measures.store import declare_shards
from bench.measures.worker import draining
from bench.place import Place
from bench.ticks import Ticks, ticking

PEERS = ("amqp", "amqp, confirm=False", "redis", "redis, lasting", "ignored")


def measure(place: Place) -> Iterator[Row]:
    """Yield tasks a second with ``worker_max_tasks_per_child=1``, and of new workers."""
    with contextlib.ExitStack() as stack:
        ticks = stack.enter_context(ticking())
        workers = {
            name: stack.enter_context(place.worker(name, 2, arguments=["--max-tasks-per-child=1"]))
            for name in place.chosen(*PEERS)
        }
        count = 20 if place.quick else 60
        found = place.alternate(
            {name: draining(place, worker, count, ticks) for name, worker in workers.items()},
            rounds=3,
        )
    title = "a worker with worker_max_tasks_per_child=1"
    yield Row("cold.child", f"tasks of {title}", "/s", MORE, found["per second"])
    yield Row("cold.child.cpu", f"processor time of {title}, each task", "µs", LESS, found["cpu"])
    yield Row(
        "cold.child.broker",
        f"processor time of RabbitMQ and Redis, each task of {title}",
        "µs",
        LESS,
        found["broker"],
    )
    names = place.chosen(*PEERS)
    used = {name: _used_queue(place, name) for name in names}
    with ticking() as ticks:
        first = {name: functools.partial(_new, place, name, ticks, "") for name in names}
        again = {name: functools.partial(_new, place, name, ticks, used[name]) for name in names}
        for key, title, measures in (
            ("worker", "the first 200 tasks of a new worker", again),
            ("installation", "the first 200 tasks of a new installation", first),
        ):
            found = place.alternate(measures, rounds=3, warm_up=False)
            yield Row(f"cold.{key}", title, "/s", MORE, found["per second"])


def _used_queue(place: Place, name: str) -> str:
    """Return a queue of tasks whose results have been stored before, so all shards exist."""
    queue = f"bench-{uuid.uuid4().hex[:8]}"
    if name.startswith(OURS):
        app = place.app(name, queue)
        declare_shards(app)
        peers.close(app)
    return queue


def _new(place: Place, name: str, ticks: Ticks, queue: str) -> Mapping[str, float]:
    with place.worker(name, 2, queue=queue) as worker:
        work: Callable[[], Mapping[str, float]] = draining(place, worker, 200, ticks)
        found: Dict[str, float] = dict(work())
    return found
