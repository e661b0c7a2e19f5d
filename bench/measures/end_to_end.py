"""End to end: a prefork worker at work, beside the same worker with results ignored."""

from __future__ import annotations

import time
from typing import Any, Callable, Dict, Iterator, Mapping

from celery import group

from bench import peers, processes
from bench.figures import LESS, MORE, Row
from bench.measures import round_trip
from bench.place import Place
from bench.programs import Worker
from bench.ticks import Ticks, ticking

#: Seconds until all tasks have to be done.
PATIENCE = 300.0


def measure(place: Place) -> Iterator[Row]:
    """Yield tasks per second of a worker, its processor time for each, and those of a group."""
    count = 400 if place.quick else 3000
    workers = place.workers(*peers.WITH_WORKER, "ignored")
    round_trip.warm(place)

    def size(name: str) -> int:
        return count // 10 if peers.named(name).queue_per_task else count

    found = place.alternate(
        {
            name: _group(worker.app, size(name))
            for name, worker in workers.items()
            if name != "ignored"
        }
    )
    yield Row(
        "endtoend",
        f"tasks of a group of {count:,}, from apply_async() to the last result",
        "/s",
        MORE,
        found["per second"],
    )
    with ticking() as ticks:
        found = place.alternate(
            {name: _draining(place, worker, size(name), ticks) for name, worker in workers.items()},
            warm_up=not place.quick,
        )
    yield Row(
        "worker",
        "tasks that wait in a queue, done by a prefork worker of two processes",
        "/s",
        MORE,
        found["per second"],
    )
    yield Row("worker.cpu", "processor time of that worker, each task", "µs", LESS, found["cpu"])
    yield Row(
        "worker.broker",
        "processor time of RabbitMQ, each of these tasks",
        "µs",
        LESS,
        found["broker"],
    )


def _draining(
    place: Place, worker: Worker, count: int, ticks: Ticks
) -> Callable[[], Mapping[str, float]]:
    control = worker.app.control

    def work() -> Dict[str, float]:
        control.cancel_consumer(worker.queue, destination=[worker.hostname], reply=True, timeout=9)
        # By another app, which nobody waits with. And the inbox of the one that somebody has waited
        # with would be given the results of all tasks that this process sends.
        peers.close_backend(worker.app)
        sender = place.app(worker.name, worker.queue)
        for _ in range(count):
            sender.tasks["bench.tick"].apply_async((ticks.path,))
        until = ticks.total() + count
        cpu, broker = worker.cpu_seconds(), processes.cpu_seconds(place.node.pid)
        started = time.perf_counter()
        control.add_consumer(worker.queue, destination=[worker.hostname])
        while ticks.total() < until:
            if time.perf_counter() - started > PATIENCE:
                raise RuntimeError(f"the worker for {worker.name} did not do {count} tasks")
            time.sleep(0.002)
        seconds = time.perf_counter() - started
        # The last results are on their way to the broker.
        time.sleep(0.05)
        peers.close(sender)
        return {
            "per second": count / seconds,
            "cpu": (worker.cpu_seconds() - cpu) / count * 1e6,
            "broker": (processes.cpu_seconds(place.node.pid) - broker) / count * 1e6,
        }

    return work


def _group(app: Any, count: int) -> Callable[[], Mapping[str, float]]:
    def work() -> Dict[str, float]:
        tasks = group(app.signature("bench.noop") for _ in range(count))
        started = time.perf_counter()
        tasks.apply_async().get(timeout=PATIENCE)
        return {"per second": count / (time.perf_counter() - started)}

    return work
