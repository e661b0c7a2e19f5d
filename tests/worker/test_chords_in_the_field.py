"""Chords in set-ups that were found to fail: many threads, quiet workers, short-lived processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, List

import pytest
from celery import Celery, chain, chord, group
from celery.exceptions import TimeoutError

from tests import subprocesses
from tests.conftest import PATIENCE, Apps, eventually
from tests.worker.chord_tasks import register
from tests.worker.conftest import ROOT, environment_of, worker_in_process
from tests.worker.test_chords import canvas_of, lines

TIMEOUT = 60

MODULE = "tests.worker.chord_tasks"


@pytest.fixture
def app(make_app: Apps) -> Celery:
    app = make_app()
    app.set_current()
    return app


@pytest.fixture
def t(app: Celery) -> SimpleNamespace:
    return register(app)


def send_from_threads(app: Celery, count: int) -> List[Any]:
    """Send a chord from each of *count* threads that start together; return the results."""
    tasks = register(app)
    barrier = threading.Barrier(count)
    values: List[Any] = []

    def send(number: int) -> None:
        barrier.wait(PATIENCE)
        header = [tasks.add.s(number, number) for _ in range(5)]
        values.append(chord(header, app=app)(tasks.total.s()).get(timeout=TIMEOUT))

    threads = [threading.Thread(target=send, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * TIMEOUT)
    return sorted(values)


def test_threads_of_a_fresh_process_send_chords_at_once(
    app: Celery, start_worker: Callable[..., Any]
) -> None:
    start_worker(app, module=MODULE)
    for _ in range(3):
        values = subprocesses.run(app, send_from_threads, count=8)
        assert values == [10 * number for number in range(8)]


def test_a_started_task_of_a_fresh_worker_can_replace_itself_by_a_chord(
    app: Celery, t: SimpleNamespace, start_worker: Callable[..., Any]
) -> None:
    # The leader looks up the body of the first plan of a queue, which has the id of the task.
    start_worker(app, module=MODULE)
    assert t.started_and_replaced.delay(1).get(timeout=TIMEOUT) == 5


@pytest.mark.parametrize(
    ("pool", "options", "args"),
    [
        ("prefork", ("--quiet",), ()),
        ("prefork", (), ("--max-tasks-per-child", "1")),
        ("prefork", (), ("--autoscale", "3,1")),
        ("solo", ("--quiet",), ()),
    ],
    ids=["quiet", "short-lived children", "autoscale", "solo and quiet"],
)
def test_chords_of_a_worker_that_is_started_with(
    app: Celery,
    t: SimpleNamespace,
    start_worker: Callable[..., Any],
    pool: str,
    options: Any,
    args: Any,
) -> None:
    start_worker(app, module=MODULE, pool=pool, options=options, args=args)
    for number in range(3):
        result = chord([t.add.s(number, n) for n in range(4)], t.total.s()).delay()
        assert result.get(timeout=TIMEOUT) == 4 * number + 6


def test_chords_of_workers_that_celery_multi_has_started(
    app: Celery, t: SimpleNamespace, tmp_path: Path
) -> None:
    def multi(*args: str) -> None:
        subprocess.run(
            [sys.executable, "-m", "celery", "multi", *args, "-A", MODULE,
             f"--pidfile={tmp_path}/%n.pid", f"--logfile={tmp_path}/%n%I.log"],
            cwd=ROOT, env={**os.environ, **environment_of(app)}, check=True, timeout=TIMEOUT,
        )  # fmt: skip

    multi("start", "2", "--concurrency=1")
    try:
        for number in range(3):
            result = chord([t.add.s(number, n) for n in range(4)], t.total.s()).delay()
            assert result.get(timeout=2 * TIMEOUT) == 4 * number + 6
    finally:
        multi("stopwait", "2")


def test_chords_of_a_worker_in_the_process_of_a_test(app: Celery, t: SimpleNamespace) -> None:
    with worker_in_process(app):
        assert chord([t.add.s(1, n) for n in range(4)], t.total.s()).delay().get(TIMEOUT) == 10


def test_a_process_whose_worker_has_ended_leaves_chords_to_other_workers(
    app: Celery, t: SimpleNamespace, make_app: Apps, start_worker: Callable[..., Any]
) -> None:
    # Given a process in which a worker was running
    with worker_in_process(app):
        assert t.add.delay(1, 2).get(timeout=TIMEOUT) == 3
    # When it sends a chord of another app
    other = make_app()
    start_worker(other, module=MODULE)
    assert send_from_threads(other, 1) == [0]
    # Then it does not lead it
    assert not other.backend.layout.chords.service.running


def test_chords_over_memory_are_ended_by_celery_itself() -> None:
    app = Celery("memory", broker="memory://", backend="amqp://", set_as_current=True)
    app.conf.result_chord_retry_interval = 0.1
    t = register(app)
    with worker_in_process(app):
        assert chord([t.add.s(1, n) for n in range(4)], t.total.s()).delay().get(TIMEOUT) == 10


@canvas_of(5, 7)
def test_the_errback_of_an_outer_chord_is_called_once_when_an_inner_header_fails(
    app: Celery, t: SimpleNamespace, start_worker: Callable[..., Any], tmp_path: Path
) -> None:
    start_worker(app, module=MODULE)
    log = tmp_path / "errors"
    inner = chord([t.fail.s("deep"), t.same.s(1)], t.same.s())
    body = t.same.s().on_error(t.on_error.s(str(log)))
    result = chord([inner, t.same.s(2)], body).delay()
    eventually(result.ready)
    assert result.state == "FAILURE"
    # A chord that is sent later runs later: a second call would be there by then
    assert chord([t.same.s(1)], t.same.s()).delay().get(timeout=TIMEOUT) == [1]
    assert len(lines(log)) == 1


@pytest.mark.parametrize("shape", ["chord", "body is a group", "upgraded", "chain"])
@canvas_of(5, 7)
def test_waiting_for_a_chord_that_failed_raises_the_error_of_its_header(
    app: Celery, t: SimpleNamespace, start_worker: Callable[..., Any], shape: str
) -> None:
    start_worker(app, module=MODULE)
    whole = {
        "chord": lambda: chord([t.fail.s("no")], t.same.s()),
        "body is a group": lambda: chord([t.fail.s("no"), t.same.s(1)], group([t.same.s()])),
        "upgraded": lambda: group([t.fail.s("no"), t.same.s(1)]) | t.same.s(),
        "chain": lambda: chain(t.add.s(1, 1), group([t.fail_with.s(), t.same.s()]), t.same.s()),
    }[shape]()
    with pytest.raises(KeyError):
        whole.delay().get(timeout=TIMEOUT)


def test_a_task_added_as_a_group_is_waited_for(
    app: Celery, t: SimpleNamespace, start_worker: Callable[..., Any]
) -> None:
    start_worker(app, module=MODULE)
    result = chord([t.adds_a_group.s(3), t.same.s(2)], t.same.s()).delay()
    assert result.get(timeout=TIMEOUT) == [3, 1000, 1001, 1002, 2]


def test_waiting_for_a_chord_keeps_its_deadline_while_the_leader_is_frozen(
    app: Celery, t: SimpleNamespace, start_worker: Callable[..., Any]
) -> None:
    worker = start_worker(app, module=MODULE, pool="solo")
    assert chord([t.same.s(1)], t.same.s()).delay().get(timeout=TIMEOUT) == [1]
    worker.process.send_signal(signal.SIGSTOP)
    try:
        result = chord([t.same.s(1), t.same.s(2)], t.same.s()).delay()
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            result.get(timeout=2)
        assert time.monotonic() - started < 20
    finally:
        worker.process.send_signal(signal.SIGCONT)
    assert result.get(timeout=TIMEOUT) == [1, 2]
