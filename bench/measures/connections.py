"""Connections to RabbitMQ: how many a process opens, and how fast its threads store.

Connections are counted from outside, as established sockets to the port of RabbitMQ. The largest
number seen counts.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from typing import Callable, Dict, Iterator, List, Mapping, Sequence

from bench import processes
from bench.figures import LESS, MORE, Figures, Row
from bench.place import Place
from bench.programs import Assistant, Worker
from bench.ticks import Ticks, ticking

#: Seconds between two looks at the sockets.
LOOK = 0.05

#: Seconds until a worker must have done its tasks.
PATIENCE = 60.0

PEERS = ("amqp", "redis", "rpc")


def measure(place: Place) -> Iterator[Row]:
    """Yield numbers of connections, and rates of threads and greenlets that store at once."""
    yield from _workers(place)
    sizes = (1, 8) if place.quick else (1, 8, 64)
    yield from _storing(place, "threads", "bench.assistant", sizes)
    yield from _storing(place, "greenlets", "bench.green_assistant", sizes[1:])


def _workers(place: Place) -> Iterator[Row]:
    for key, title, pool, concurrency in (
        ("threads", "a worker with 20 threads", "threads", 20),
        ("greenlets", "a worker with 64 greenlets", "gevent", 64),
        ("child", "a child of a prefork worker", "prefork", 2),
    ):
        found: Figures = {}
        for name in place.chosen(*PEERS):
            with ticking() as ticks, place.worker(name, concurrency, pool) as worker:
                pids = processes.family(worker.pid)
                if pool == "prefork":
                    pids = [pid for pid in pids if pid != worker.pid]
                found[name] = [float(_busy_worker(place, worker, pids, ticks))]
        title = f"connections of {title} to RabbitMQ"
        yield Row(f"connections.{key}", title, "connections", LESS, found, absolute=True)


def _busy_worker(place: Place, worker: Worker, pids: Sequence[int], ticks: Ticks) -> int:
    """Give the worker tasks; return the most connections that one of *pids* has had."""
    # A gevent worker of Celery 5.7 does about ten tasks a second, whatever its backend.
    count = 200 if place.quick else 400
    with watching(pids, place.port) as peak:
        for _ in range(count):
            worker.app.tasks["bench.tick"].apply_async((ticks.path,))
        deadline = time.monotonic() + PATIENCE
        while ticks.total() < count:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the worker for {worker.name} did not do {count} tasks")
            time.sleep(0.01)
    return max(peak)


def _storing(place: Place, key: str, module: str, sizes: Sequence[int]) -> Iterator[Row]:
    count = 400 if place.quick else 2000
    names = place.chosen("amqp", "redis", "redis, lasting")
    for size in sizes:
        with contextlib.ExitStack() as stack:
            # Fresh processes: connections of an earlier size would be counted too.
            assistants = {
                name: stack.enter_context(
                    place.assistant(name, f"bench-{uuid.uuid4().hex[:8]}", module)
                )
                for name in names
            }
            found = place.alternate(
                {name: _together(place, one, size, count) for name, one in assistants.items()},
                rounds=3,
            )
        title = f"{size} {key} of one process that store results at once"
        if size == 1:
            title = "one thread that stores results"
        row = f"storing.{key}"
        yield Row(row, title, "/s", MORE, found["per second"], size)
        title = f"processor time of RabbitMQ and Redis, each result, {title}"
        yield Row(f"{row}.broker", title, "µs", LESS, found["broker"], size)
        title = f"connections to RabbitMQ, {size} {key} that store"
        figures = {name: v for name, v in found["connections"].items() if name == "amqp"}
        yield Row(f"{row}.connections", title, "connections", LESS, figures, size, absolute=True)


def _together(
    place: Place, assistant: Assistant, threads: int, count: int
) -> Callable[[], Mapping[str, float]]:
    def work() -> Dict[str, float]:
        broker = place.broker_seconds()
        with watching([assistant.pid], place.port) as peak:
            ids = [str(uuid.uuid4()) for _ in range(count)]
            answer = assistant.ask("store_together", ids=ids, threads=threads)
        return {
            "per second": count / answer["seconds"],
            "broker": (place.broker_seconds() - broker) / count * 1e6,
            "connections": max(peak),
        }

    return work


@contextlib.contextmanager
def watching(pids: Sequence[int], port: int) -> Iterator[List[int]]:
    """Count connections of each of *pids* to *port* during a ``with`` block."""
    peak = [0] * len(pids)
    over = threading.Event()

    def look() -> None:
        while True:
            now = [processes.connections(pid, port) for pid in pids]
            peak[:] = map(max, peak, now)
            if over.wait(LOOK):
                return

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()
