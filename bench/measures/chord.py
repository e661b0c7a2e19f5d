"""Chords: from ``apply_async()`` to the result of the body."""

from __future__ import annotations

import time
from typing import Any, Callable, Dict, Iterator, Mapping

from celery import chord

from bench import peers
from bench.figures import LESS, Row
from bench.measures import round_trip
from bench.place import Place

#: What refuses chords.
WITHOUT_CHORDS = ("rpc",)

#: A chord of a layout with a queue for each task is no larger than this.
LARGEST_PER_TASK = 100

#: How many times more rounds there are of the smallest, which is soon over.
MORE_ROUNDS = 5


def measure(place: Place) -> Iterator[Row]:
    """Yield milliseconds for chords of several sizes."""
    workers = place.workers(*(name for name in peers.WITH_WORKER if name not in WITHOUT_CHORDS))
    round_trip.warm(place)
    smallest, *larger = (10, 100) if place.quick else (10, 100, 1000)
    for size in (smallest, *larger):
        polled = {
            name: _chord(worker.app, size)
            for name, worker in workers.items()
            if peers.named(name).queue_per_task
        }
        pushed = {
            name: _chord(worker.app, size) for name, worker in workers.items() if name not in polled
        }
        found = place.alternate(pushed, place.rounds * (MORE_ROUNDS if size == smallest else 1))[
            "ms"
        ]
        # These take a second each, which no noise changes.
        if size <= (smallest if place.quick else LARGEST_PER_TASK):
            found.update(place.alternate(polled, warm_up=False).get("ms", {}))
        yield Row("chord", f"chord of {size:,} no-op tasks", "ms", LESS, found, size)


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
