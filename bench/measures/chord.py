"""Single chords: from ``apply_async()`` to the result of the body."""

from __future__ import annotations

import time
from typing import Any, Callable, Dict, Iterator, Mapping

from celery import chord

from bench import peers
from bench.figures import LESS, Row
from bench.measures import round_trip
from bench.place import Place

#: Measured with all sizes and this many rounds. The rounds of a chord differ more than others.
PEERS = ("amqp", "redis")
ROUNDS = 25

#: Measured with the usual rounds, and chords up to this size.
OTHERS = ("amqp, transient", "amqp, per-task", "redis, lasting", "celery-amqp-backend")
LARGEST_OF_OTHERS = 100
LARGEST_PER_TASK = 10


def measure(place: Place) -> Iterator[Row]:
    """Yield milliseconds for chords of several sizes."""
    workers = place.workers(*PEERS, *OTHERS)
    round_trip.warm(place)
    for size in (10, 100) if place.quick else (10, 100, 1000):
        measures = {name: _chord(worker.app, size) for name, worker in workers.items()}
        rounds = place.rounds if place.quick else ROUNDS
        found = place.alternate({n: m for n, m in measures.items() if n in PEERS}, rounds)["ms"]
        others = {n: m for n, m in measures.items() if n in OTHERS and _small(n, size)}
        found.update(place.alternate(others).get("ms", {}))
        yield Row("chord", f"chord of {size:,} no-op tasks", "ms", LESS, found, size)


def _small(name: str, size: int) -> bool:
    """Return whether the peer *name* is measured with chords of *size*."""
    per_task = peers.named(name).queue_per_task
    return size <= (LARGEST_PER_TASK if per_task else LARGEST_OF_OTHERS)


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
