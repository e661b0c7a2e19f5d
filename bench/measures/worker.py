"""A prefork worker that does tasks that wait in a queue, beside one that ignores results."""

from __future__ import annotations

import contextlib
import time
from typing import Callable, Dict, Iterator, Mapping

from bench import peers
from bench.figures import LESS, MORE, Row
from bench.measures import round_trip
from bench.place import Place
from bench.programs import Worker
from bench.ticks import Ticks, ticking

#: Seconds until all tasks must be done.
PATIENCE = 300.0

#: Measured with two and with eight children.
PEERS = (
    "amqp",
    "amqp, confirm=False",
    "amqp, transient",
    "amqp, tuned broker",
    "redis",
    "redis, lasting",
    "ignored",
)

#: Children of the larger worker.
CHILDREN = 8


def measure(place: Place) -> Iterator[Row]:
    """Yield tasks a second of two workers, and the processor time of each task."""
    count = 400 if place.quick else 1500
    round_trip.warm(place, "amqp, confirm=False", "amqp, tuned broker")
    workers = place.workers("rpc", "celery-amqp-backend", "amqp, per-task", *PEERS)
    yield from _rows(place, "worker", "a prefork worker of two processes", workers, count)
    if place.quick:
        return
    place.end_workers()
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(place.worker(name, CHILDREN)) for name in place.chosen(*PEERS)
        }
        title = f"a prefork worker of {CHILDREN} processes"
        yield from _rows(place, f"worker{CHILDREN}", title, workers, count)


def _rows(
    place: Place, key: str, title: str, workers: Mapping[str, Worker], count: int
) -> Iterator[Row]:
    with ticking() as ticks:
        measures: Dict[str, Callable[[], Mapping[str, float]]] = {}
        for name, worker in workers.items():
            fewer = 10 if peers.named(name).queue_per_task else 1
            measures[name] = draining(place, worker, count // fewer, ticks)
        found = place.alternate(measures, warm_up=not place.quick)
    yield Row(key, f"waiting tasks done by {title}", "/s", MORE, found["per second"])
    yield Row(f"{key}.cpu", f"processor time of {title}, each task", "µs", LESS, found["cpu"])
    about = f"processor time of RabbitMQ and Redis, each task of {title}"
    yield Row(f"{key}.broker", about, "µs", LESS, found["broker"])


def draining(
    place: Place, worker: Worker, count: int, ticks: Ticks
) -> Callable[[], Mapping[str, float]]:
    """Return a function that has *worker* do *count* tasks and returns its figures."""

    def work() -> Dict[str, float]:
        _fill(place, worker, count, ticks)
        until = ticks.total() + count
        cpu, broker = worker.cpu_seconds(), place.broker_seconds(worker.name)
        started = time.perf_counter()
        worker.app.control.add_consumer(worker.queue, destination=[worker.hostname])
        while ticks.total() < until:
            if time.perf_counter() - started > PATIENCE:
                raise RuntimeError(f"the worker for {worker.name} did not do {count} tasks")
            time.sleep(0.002)
        seconds = time.perf_counter() - started
        # The last results are on their way to the broker.
        time.sleep(0.05)
        return {
            "per second": count / seconds,
            "cpu": (worker.cpu_seconds() - cpu) / count * 1e6,
            "broker": (place.broker_seconds(worker.name) - broker) / count * 1e6,
        }

    return work


def _fill(place: Place, worker: Worker, count: int, ticks: Ticks) -> None:
    """Stop the worker's consumer, and put *count* tasks into its queue."""
    worker.app.control.cancel_consumer(
        worker.queue, destination=[worker.hostname], reply=True, timeout=9
    )
    # The inbox of an app that has waited would receive the results of all tasks that this process
    # sends; hence another app sends them.
    peers.close_backend(worker.app)
    sender = place.app(worker.name, worker.queue)
    for _ in range(count):
        sender.tasks["bench.tick"].apply_async((ticks.path,))
    peers.close(sender)
