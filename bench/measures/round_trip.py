"""Round trip: one task after the other, from ``delay()`` to ``get()``."""

from __future__ import annotations

import time
from typing import Any, Callable, Dict, Iterator, List, Mapping

from celery import group

from bench import peers
from bench.figures import LESS, Row, percentile
from bench.place import Place

#: Number of tasks that run before anything is measured: a shard is declared when it is first used,
#: which takes milliseconds once in a broker's life.
FIRST = 1500


def measure(place: Place) -> Iterator[Row]:
    """Yield the median and the 99th percentile of milliseconds."""
    count = 100 if place.quick else 300
    workers = place.workers(*peers.WITH_WORKER)
    warm(place)
    found = place.alternate(
        {
            name: _one_by_one(worker.app, count // 4 if peers.named(name).queue_per_task else count)
            for name, worker in workers.items()
        }
    )
    title = "delay() to get(), one task after the other"
    yield Row("roundtrip", f"{title}, median", "ms", LESS, found["median"])
    yield Row("roundtrip.p99", f"{title}, 99th percentile", "ms", LESS, found["p99"])
    yield Row(
        "roundtrip.cpu", "processor time of the client, each round trip", "µs", LESS, found["cpu"]
    )


def warm(place: Place, *extra: str) -> None:
    """Have every shard declared by the workers of this backend, and of the variants *extra*."""
    for name, worker in place.workers("amqp", "amqp, transient", *extra).items():
        if name in place.warm:
            continue
        place.warm.add(name)
        tasks = group(worker.app.signature("bench.noop") for _ in range(FIRST))
        tasks.apply_async().get(timeout=300)


def _one_by_one(app: Any, count: int) -> Callable[[], Mapping[str, float]]:
    def work() -> Dict[str, float]:
        taken: List[float] = []
        cpu = time.process_time()
        for _ in range(count):
            started = time.perf_counter()
            app.tasks["bench.noop"].delay().get(timeout=60)
            taken.append((time.perf_counter() - started) * 1e3)
        return {
            "median": percentile(taken, 50),
            "p99": percentile(taken, 99),
            "cpu": (time.process_time() - cpu) / count * 1e6,
        }

    return work
