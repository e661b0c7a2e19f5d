"""Chords: from ``apply_async()`` to the result of the body."""

from __future__ import annotations

import time
from typing import Any, Callable, Dict, Iterator, Mapping

from celery import chord

from bench import peers
from bench.figures import LESS, Row
from bench.measures import round_trip
from bench.place import Place

#: A chord of a layout with a queue for each task is no larger than this.
LARGEST_PER_TASK = 100


def measure(place: Place) -> Iterator[Row]:
    """Yield milliseconds for chords of several sizes."""
    workers = place.workers(
        "amqp", "amqp, transient", "amqp, per-task", "redis", "celery-amqp-backend"
    )
    round_trip.warm(place)
    for size in (10, 100) if place.quick else (10, 100, 1000):
        measures = {
            name: _chord(worker.app, size)
            for name, worker in workers.items()
            if not peers.PEERS[name].queue_per_task or size <= LARGEST_PER_TASK
        }
        found = place.alternate(measures)
        yield Row("chord", f"chord of {size:,} no-op tasks", "ms", LESS, found["ms"], size)


def _chord(app: Any, size: int) -> Callable[[], Mapping[str, float]]:
    def work() -> Dict[str, float]:
        header = [app.signature("bench.noop") for _ in range(size)]
        started = time.perf_counter()
        counted = chord(header, app.signature("bench.count")).apply_async().get(timeout=300)
        seconds = time.perf_counter() - started
        if counted != size:
            raise RuntimeError(f"a chord of {size} had {counted} results")
        return {"ms": seconds * 1e3}

    return work
