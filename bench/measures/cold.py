"""New worker processes: one for each task, and those of a worker that has just started."""

from __future__ import annotations

import contextlib
import functools
from typing import Callable, Dict, Iterator, Mapping

from bench.figures import LESS, MORE, Row
from bench.measures.worker import draining
from bench.place import Place
from bench.ticks import Ticks, ticking

PEERS = ("amqp", "amqp, confirm=False", "redis", "redis, lasting", "ignored")


def measure(place: Place) -> Iterator[Row]:
    """Yield tasks a second of workers with ``worker_max_tasks_per_child=1`` and of new workers."""
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
    with ticking() as ticks:
        found = place.alternate(
            {name: functools.partial(_new, place, name, ticks) for name in place.chosen(*PEERS)},
            rounds=3,
            warm_up=False,
        )
    yield Row("cold.worker", "the first 200 tasks of a new worker", "/s", MORE, found["per second"])


def _new(place: Place, name: str, ticks: Ticks) -> Mapping[str, float]:
    with place.worker(name, 2) as worker:
        work: Callable[[], Mapping[str, float]] = draining(place, worker, 200, ticks)
        found: Dict[str, float] = dict(work())
    return found
