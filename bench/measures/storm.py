"""Chord storm: many chords sent at once, to a worker of two processes.

The clock runs from the first ``apply_async()`` to the result of the last body.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Callable, Dict, Iterator, List, Mapping

from celery import chord

from bench.figures import LESS, MORE, Figures, Row
from bench.measures import round_trip
from bench.place import Place

#: How many chords are sent at once, by their size.
FULL = {10: 200, 100: 50}
QUICK = {10: 50}

#: Seconds until all chords must be done.
PATIENCE = 300.0

#: Seconds between two looks at the number of queues.
LOOK = 0.1


def measure(place: Place) -> Iterator[Row]:
    """Yield chords a second, processor time of the broker, and the peak number of queues."""
    round_trip.warm(place, "amqp, quorum")
    workers = place.workers("amqp", "amqp, quorum", "redis")
    for size, count in (QUICK if place.quick else FULL).items():
        storms = {name: storm(place, worker.app, size, count) for name, worker in workers.items()}
        found = place.alternate(storms, rounds=3 if size == min(FULL) else 2)
        title = f"{count} chords of {size} at once"
        yield Row("storm", f"chords a second, {title}", "/s", MORE, found["per second"], size)
        title = f"processor time of RabbitMQ and Redis, each chord, {title}"
        yield Row("storm.broker", title, "ms", LESS, found["broker"], size)
        if size > min(FULL):
            continue
        # Counting costs the broker time, hence a round of its own.
        queues: Figures = {
            name: [float(_added_queues(place, storm))] for name, storm in storms.items()
        }
        title = f"queues added at the peak, {count} chords of {size} at once"
        yield Row("storm.queues", title, "queues", LESS, queues, size, absolute=True)


def storm(place: Place, app: Any, size: int, count: int) -> Callable[[], Mapping[str, float]]:
    """Return what measures *count* chords of *size*, sent at once."""

    def work() -> Dict[str, float]:
        broker, started = place.broker_seconds(), time.perf_counter()
        sent = [
            chord(
                [app.signature("bench.noop") for _ in range(size)], app.signature("bench.count")
            ).apply_async()
            for _ in range(count)
        ]
        counted = [result.get(timeout=PATIENCE) for result in sent]
        seconds = time.perf_counter() - started
        if counted != [size] * count:
            raise RuntimeError(f"{count} chords of {size} had results of other sizes: {counted}")
        return {
            "per second": count / seconds,
            "broker": (place.broker_seconds() - broker) / count * 1e3,
        }

    return work


def _added_queues(place: Place, storm: Callable[[], Mapping[str, float]]) -> int:
    """Run *storm* and return how many queues the broker had more than before, at the peak."""
    before = place.node.queue_count()
    peaks: List[int] = []
    looking = threading.Thread(target=lambda: peaks.append(_peak(place)))
    looking.start()
    storm()
    looking.join()
    return max(0, peaks[0] - before)


def _peak(place: Place) -> int:
    # One expression for many looks: starting an evaluation takes longer than a storm may last.
    looks = f"[begin timer:sleep({LOOK * 1e3:.0f}), rabbit_amqqueue:count() end"
    return int(place.node.eval(f"lists:max({looks} || _ <- lists:seq(1, 60)])"))
