"""Chords during worker crashes, redelivered tasks and broker restarts."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator, List

import pytest
from celery import Celery, chord

from celery_amqp_results import backend as backend_module
from tests.conftest import Apps, eventually
from tests.worker.chord_tasks import register
from tests.worker.conftest import Worker, launch_worker
from tests.worker.test_chords import exists, lines
from tools import rabbitmq

#: The number of repetitions of each test.
LOOPS = int(os.environ.get("CHORD_FAULT_LOOPS", "3"))

TIMEOUT = 60

POINTS = ["published", "before", "between", "after"]


class Fleet:
    """Workers, with a replacement for each one that is killed."""

    def __init__(self, app: Celery, tmp_path: Path, size: int, **kwargs: Any) -> None:
        self._start = lambda: launch_worker(
            app, tmp_path, module="tests.faults.chord_app", **kwargs
        )
        self._size = size
        self.workers: List[Worker] = []
        self.refill()

    def replace_the_killed(self) -> None:
        """Wait until a worker has died, and start another one."""
        eventually(lambda: any(worker.process.poll() is not None for worker in self.workers))
        self.refill()

    def refill(self) -> None:
        """Start workers until all are running."""
        self.workers = [worker for worker in self.workers if worker.process.poll() is None]
        while len(self.workers) < self._size:
            self.workers.append(self._start())

    def stop(self) -> None:
        for worker in self.workers:
            worker.kill()


@pytest.fixture
def fleet(make_app: Apps, tmp_path: Path) -> Iterator[Callable[..., Fleet]]:
    fleets: List[Fleet] = []

    def start(app: Celery, size: int, **kwargs: Any) -> Fleet:
        fleets.append(Fleet(app, tmp_path, size, **kwargs))
        return fleets[-1]

    yield start
    for started in fleets:
        started.stop()


@pytest.fixture
def app(make_app: Apps) -> Celery:
    app = make_app()
    app.set_current()
    return app


@pytest.fixture
def t(app: Celery) -> SimpleNamespace:
    return register(app)


def mortal(t: SimpleNamespace, tmp_path: Path, point: str, number: int) -> Any:
    return t.mortal.s(
        path=str(tmp_path / f"ran-{number}"),
        point=point,
        once=str(tmp_path / f"killed-{number}"),
    )


def assert_over(app: Celery, group_id: str, raw: Any) -> None:
    queue = app.backend._topology.chord_queue(group_id).name
    eventually(lambda: not exists(raw, queue))


@pytest.mark.parametrize("point", POINTS)
def test_a_chord_survives_the_worker_that_fires_it(
    app: Celery, t: SimpleNamespace, fleet: Any, tmp_path: Path, raw: Any, point: str
) -> None:
    """The task is redelivered to another worker, and so is the part."""
    workers = fleet(app, 2, pool="solo")
    for number in range(LOOPS):
        result = chord([t.late.s(i) for i in range(6)], mortal(t, tmp_path, point, number)).delay()
        assert result.get(timeout=TIMEOUT) == list(range(6))
        eventually((tmp_path / f"killed-{number}").exists)
        assert_over(app, result.parent.id, raw)
        # The redelivered task has finished before the next chord begins.
        workers.replace_the_killed()
        assert chord([t.late.s(1)], t.same.s()).delay().get(timeout=TIMEOUT) == [1]
        ran = lines(tmp_path / f"ran-{number}")
        assert set(ran) == {result.id}
        # A crash between sending the body and deleting the queue may send the body twice.
        assert len(ran) <= (2 if point == "between" else 1)


@pytest.mark.parametrize("point", POINTS)
def test_a_chord_survives_the_child_process_that_fires_it(
    app: Celery, t: SimpleNamespace, fleet: Any, tmp_path: Path, raw: Any, point: str
) -> None:
    """Nothing is redelivered or awaited: the main process of the worker takes over."""
    fleet(app, 1, pool="prefork", concurrency=2)
    for number in range(LOOPS):
        header = [t.same.s(i) for i in range(6)]
        result = chord(header, mortal(t, tmp_path, point, number)).delay()
        eventually((tmp_path / f"killed-{number}").exists)
        eventually(lambda number=number: lines(tmp_path / f"ran-{number}"))
        assert_over(app, result.parent.id, raw)
        assert result.get(timeout=TIMEOUT) == list(range(6))
        assert set(lines(tmp_path / f"ran-{number}")) == {result.id}


@pytest.mark.parametrize("point", ["published", "before", "between"])
def test_a_chord_survives_its_worker_without_redelivery(
    app: Celery,
    t: SimpleNamespace,
    fleet: Any,
    tmp_path: Path,
    raw: Any,
    point: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process that waits for the body takes over."""
    monkeypatch.setattr(backend_module, "FIRST_CHORD_CHECK", 0.2)
    workers = fleet(app, 1, pool="solo")
    for number in range(LOOPS):
        result = chord([t.same.s(i) for i in range(3)], mortal(t, tmp_path, point, number)).delay()
        eventually((tmp_path / f"killed-{number}").exists)
        workers.replace_the_killed()
        assert result.get(timeout=TIMEOUT) == list(range(3))
        assert_over(app, result.parent.id, raw)
        assert set(lines(tmp_path / f"ran-{number}")) == {result.id}


def test_a_redelivered_header_task_counts_once(
    app: Celery, t: SimpleNamespace, fleet: Any, tmp_path: Path, raw: Any
) -> None:
    """Workers are killed during a chord, each with a finished task that it has not acknowledged.

    The chord must not fire before its slow task has returned, however often the others return.
    """
    workers = fleet(app, 3, pool="solo")
    for number in range(LOOPS):
        log = tmp_path / f"ran-{number}"
        header = [t.late_and_slow.s(i, 0.3) for i in range(8)]
        result = chord(header, t.record.s(str(log))).delay()
        eventually(lambda result=result: result.parent.completed_count() >= 1)
        workers.workers[0].kill()
        workers.replace_the_killed()
        assert result.get(timeout=TIMEOUT) == list(range(8))
        assert_over(app, result.parent.id, raw)
        assert lines(log) == [result.id]


def test_a_large_chord_survives_a_broker_restart(
    app: Celery, t: SimpleNamespace, fleet: Any, tmp_path: Path, node: rabbitmq.Node
) -> None:
    workers = fleet(app, 1, pool="prefork", concurrency=2)
    for number in range(LOOPS):
        log = tmp_path / f"ran-{number}"
        header = (t.late_and_slow.s(i, 0.005) for i in range(1000))
        result = chord(header, t.record.s(str(log))).delay()
        eventually(lambda result=result: result.parent.completed_count() >= 100, TIMEOUT)
        node.restart()
        assert result.get(timeout=3 * TIMEOUT) == list(range(1000))
        workers.refill()
        assert set(lines(log)) == {result.id}
