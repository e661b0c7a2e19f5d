"""End to end: a group, from sending it to the result of its last task."""

from __future__ import annotations

import time
from typing import Any, Callable, Dict, Iterator, Mapping

from celery import group

from bench import peers
from bench.figures import MORE, Row
from bench.measures import round_trip
from bench.place import Place

#: Seconds until all tasks must be done.
PATIENCE = 300.0


def measure(place: Place) -> Iterator[Row]:
    """Yield tasks a second of a group, done by a prefork worker of two processes."""
    count = 400 if place.quick else 1000
    workers = place.workers(*peers.WITH_WORKER)
    round_trip.warm(place)
    measures: Dict[str, Callable[[], Mapping[str, float]]] = {}
    for name, worker in workers.items():
        fewer = 10 if peers.named(name).queue_per_task else 1
        measures[name] = _group(worker.app, count // fewer)
    yield Row(
        "endtoend",
        f"tasks of a group of {count:,}, from apply_async() to the last result",
        "/s",
        MORE,
        place.alternate(measures)["per second"],
    )


def _group(app: Any, count: int) -> Callable[[], Mapping[str, float]]:
    def work() -> Dict[str, float]:
        tasks = group(app.signature("bench.noop") for _ in range(count))
        started = time.perf_counter()
        tasks.apply_async().get(timeout=PATIENCE)
        return {"per second": count / (time.perf_counter() - started)}

    return work
