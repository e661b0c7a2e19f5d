"""Chords during worker crashes, redelivered tasks and broker restarts."""

from __future__ import annotations

import functools
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator, List

import pytest
from celery import Celery, chord, group
from celery.result import AsyncResult

from celery_amqp_results.protocol.names import PLAN_QUEUES
from tests.broker.helpers import Waiting
from tests.conftest import LOAD, Apps, eventually
from tests.worker.chord_tasks import register
from tests.worker.conftest import Worker, launch_worker
from tests.worker.test_chords import lines
from tools import rabbitmq

#: The number of repetitions of each test.
LOOPS = int(os.environ.get("CHORD_FAULT_LOOPS", "3" if LOAD else "1"))

#: How often a leader is killed at each point.
KILLS = int(os.environ.get("CHORD_KILLS", "50" if LOAD else str(LOOPS)))

#: Chords that are open when all workers are killed.
OPEN = 200 if LOAD else 60

#: Tasks of a large body. RabbitMQ 4 refuses messages of more than 16 MiB: each task of the header
#: contains the body.
LARGE_BODY = int(os.environ.get("CHORD_BODY", "40000" if LOAD else "200"))

#: How often all workers are restarted, one after the other.
ROUNDS = 10

TIMEOUT = 60

POINTS = ["before", "between", "after"]


def completed(result: AsyncResult, wanted: int) -> bool:
    """Return whether *wanted* tasks of a chord's header have ended."""
    return bool(result.parent.completed_count() >= wanted)


def open_plans(app: Celery, node: rabbitmq.Node) -> int:
    """Return how many plans are in the plan queues, those held by leaders included."""
    topology = app.backend.config.topology
    names = {topology.plan_queue(number).name for number in range(PLAN_QUEUES)}
    listed = node.ctl("-q", "list_queues", "name", "messages").splitlines()
    lengths = dict(line.split("\t") for line in listed)
    return sum(int(lengths.get(name, 0)) for name in names)


class Fleet:
    """Workers, with a replacement for each one that is killed."""

    def __init__(self, app: Celery, tmp_path: Path, size: int, **kwargs: Any) -> None:
        self._start = functools.partial(
            launch_worker, app, tmp_path, module="tests.faults.chord_app", **kwargs
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

    def stop_the_oldest(self) -> None:
        """Stop the worker that was started first, as an operator does."""
        worker = self.workers.pop(0)
        worker.process.send_signal(signal.SIGTERM)
        worker.process.wait(2 * TIMEOUT)

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


@pytest.fixture(params=["classic", "quorum"] if LOAD else ["classic"])
def app(request: pytest.FixtureRequest, make_app: Apps) -> Celery:
    app = make_app(result_backend_transport_options={"queue_type": request.param, "shards": 16})
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


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("pool", ["solo", "prefork"])
def test_a_chord_survives_its_leader(
    app: Celery,
    node: rabbitmq.Node,
    t: SimpleNamespace,
    fleet: Any,
    tmp_path: Path,
    pool: str,
    point: str,
) -> None:
    workers = fleet(app, 2, pool=pool, concurrency=1)
    for number in range(KILLS):
        result = chord([t.late.s(i) for i in range(6)], mortal(t, tmp_path, point, number)).delay()
        eventually((tmp_path / f"killed-{number}").exists)
        assert result.get(timeout=TIMEOUT) == list(range(6))
        workers.replace_the_killed()
        assert chord([t.late.s(1)], t.same.s()).delay().get(timeout=TIMEOUT) == [1]
        ran = lines(tmp_path / f"ran-{number}")
        assert set(ran) == {result.id}
        # Until the broker has read the acknowledgement, no leader can say whether it was sent. One
        # more run is Celery's, which delivers the task of a killed worker again.
        assert len(ran) <= (1 if point == "before" else 3)
    # The result of the last body may be there before its plan is acknowledged.
    eventually(lambda: open_plans(app, node) == 0)


def test_a_chord_survives_a_leader_without_another_worker(
    app: Celery, t: SimpleNamespace, fleet: Any, tmp_path: Path
) -> None:
    """All parts are stored: the next worker fires it when it starts."""
    workers = fleet(app, 1, pool="solo")
    for number in range(LOOPS):
        body = mortal(t, tmp_path, "before", number)
        result = chord([t.same.s(i) for i in range(3)], body).delay()
        eventually((tmp_path / f"killed-{number}").exists)
        workers.replace_the_killed()
        assert result.get(timeout=TIMEOUT) == list(range(3))
        assert lines(tmp_path / f"ran-{number}") == [result.id]


def test_open_chords_survive_a_restart_of_all_workers(
    app: Celery, node: rabbitmq.Node, t: SimpleNamespace, fleet: Any, tmp_path: Path
) -> None:
    workers = fleet(app, 2, pool="prefork", concurrency=1)
    log = tmp_path / "ran"
    results = [
        chord([t.late.s(i) for i in range(4)], t.late_record.s(str(log))).delay()
        for _ in range(OPEN)
    ]
    eventually(lambda: len(lines(log)) >= 5)
    for worker in workers.workers:
        worker.kill()
    workers.refill()
    for result in results:
        assert result.get(timeout=2 * TIMEOUT) == list(range(4))
    assert set(lines(log)) == {result.id for result in results}
    # The result of the last body may be there before its plan is acknowledged.
    eventually(lambda: open_plans(app, node) == 0)


@pytest.mark.skipif(not LOAD, reason="takes minutes: make test-faults")
def test_a_rolling_restart_under_load_loses_and_doubles_nothing(
    app: Celery, node: rabbitmq.Node, t: SimpleNamespace, fleet: Any, tmp_path: Path
) -> None:
    workers = fleet(app, 2, pool="prefork", concurrency=1)
    headers, bodies = tmp_path / "headers", tmp_path / "bodies"
    sent: List[AsyncResult] = []
    over = threading.Event()

    def send() -> None:
        while not over.is_set():
            header = [t.record_delivery.s(number, str(headers)) for number in range(4)]
            sent.append(chord(header, t.record_delivery.s(str(bodies))).delay())
            # As fast as the workers run them, and some are open all the time.
            if len(sent) > 20:
                sent[-20].get(timeout=2 * TIMEOUT)

    sending = Waiting(send)
    try:
        # When each worker is stopped in turn, as an operator stops it, and another one started
        for _ in range(2 * ROUNDS):
            done = len(lines(bodies))
            eventually(lambda: len(lines(bodies)) > done + 10, 2 * TIMEOUT)  # noqa: B023
            workers.stop_the_oldest()
            workers.refill()
    finally:
        over.set()
    sending.result()
    # Then each chord has its results
    for result in sent:
        assert result.get(timeout=2 * TIMEOUT) == list(range(4))
    print(f"{len(sent)} chords, {2 * ROUNDS} workers restarted")
    # And each task was sent once. Celery may run a task again whose acknowledgement a worker that
    # stops has not sent: the broker delivers the same message again then.
    members = [member for result in sent for member in result.parent.results]
    for path, expected in ((bodies, sent), (headers, members)):
        ran = [line.split() for line in lines(path)]
        first = [task_id for task_id, again in ran if again == "False"]
        print(f"{path.name}: {len(ran)} runs of {len(expected)} tasks")
        assert len(first) == len(set(first))
        assert {task_id for task_id, _ in ran} == {result.id for result in expected}
    eventually(lambda: open_plans(app, node) == 0)


def test_a_frozen_leader_loses_its_chords_and_fires_none_when_it_is_thawed(
    app: Celery, t: SimpleNamespace, fleet: Any, tmp_path: Path
) -> None:
    # Given a leader, which runs no tasks of the chord, and a worker that started later
    others = f"{app.conf.task_default_queue}-others"
    workers = fleet(app, 1, pool="solo", args=("-Q", others))
    first = chord([t.same.s(1).set(queue=others)], t.same.s().set(queue=others)).delay()
    assert first.get(timeout=TIMEOUT) == [1]
    (frozen,) = workers.workers
    fleet(app, 1, pool="solo")
    log = tmp_path / "ran"
    frozen.process.send_signal(signal.SIGSTOP)
    try:
        # When it is frozen, the other one runs and fires a chord
        result = chord([t.late.s(i) for i in range(4)], t.record.s(str(log))).delay()
        assert result.get(timeout=2 * TIMEOUT) == list(range(4))
    finally:
        frozen.process.send_signal(signal.SIGCONT)
    # Then the body has run once, when the thawed one goes on
    assert chord([t.late.s(1)] * 20, t.same.s()).delay().get(timeout=TIMEOUT) == [1] * 20
    assert lines(log) == [result.id]


def test_a_body_that_takes_longer_to_send_than_heartbeats_allow_is_sent_once(
    app: Celery, t: SimpleNamespace, fleet: Any, tmp_path: Path
) -> None:
    fleet(app, 2, pool="prefork", concurrency=1, env={"SLOW_PUBLISH": "0.3"})
    logs = [str(tmp_path / f"ran-{number}") for number in range(100)]
    body = group(t.record.s(path) for path in logs)
    result = chord([t.same.s(1), t.same.s(2)], body).delay()
    assert result.get(timeout=3 * TIMEOUT) == [[1, 2]] * len(logs)
    assert [len(lines(Path(path))) for path in logs] == [1] * len(logs)


def test_a_redelivered_header_task_counts_once(
    app: Celery, t: SimpleNamespace, fleet: Any, tmp_path: Path
) -> None:
    """Workers are killed during a chord, each with a finished task that it has not acknowledged.

    The chord must not fire before its slow task has returned, however often the others return.
    """
    workers = fleet(app, 3, pool="solo")
    for number in range(LOOPS):
        log = tmp_path / f"ran-{number}"
        header = [t.late_and_slow.s(i, 0.3) for i in range(8)]
        result = chord(header, t.record.s(str(log))).delay()
        eventually(functools.partial(completed, result, 1))
        workers.workers[0].kill()
        workers.replace_the_killed()
        assert result.get(timeout=TIMEOUT) == list(range(8))
        assert lines(log) == [result.id]


def test_a_large_chord_survives_a_broker_restart(
    app: Celery, t: SimpleNamespace, fleet: Any, tmp_path: Path, node: rabbitmq.Node
) -> None:
    size = 1000 if LOAD else 300
    workers = fleet(app, 1, pool="prefork", concurrency=2)
    for number in range(LOOPS):
        log = tmp_path / f"ran-{number}"
        header = (t.late_and_slow.s(i, 0.005) for i in range(size))
        result = chord(header, t.record.s(str(log))).delay()
        eventually(functools.partial(completed, result, 100), TIMEOUT)
        node.restart()
        assert result.get(timeout=3 * TIMEOUT) == list(range(size))
        workers.refill()
        assert set(lines(log)) == {result.id}


def test_a_large_chord_survives_that_the_broker_is_killed(
    app: Celery, t: SimpleNamespace, fleet: Any, tmp_path: Path, node: rabbitmq.Node
) -> None:
    size = 1000 if LOAD else 200
    # Without it, tasks that Celery has sent and that no worker has taken are lost with the broker.
    app.conf.broker_transport_options = {"confirm_publish": True}
    workers = fleet(app, 2, pool="prefork", concurrency=1)
    log = tmp_path / "ran"
    header = (t.late_and_slow.s(i, 0.005) for i in range(size))
    result = chord(header, t.record.s(str(log))).delay()
    eventually(lambda: result.parent.completed_count() >= size // 10, TIMEOUT)
    node.kill()
    node.start()
    assert result.get(timeout=3 * TIMEOUT) == list(range(size))
    workers.refill()
    # Celery may run a task twice that was delivered when the broker was killed.
    assert set(lines(log)) == {result.id}


def test_a_large_body_is_sent_once(
    app: Celery, t: SimpleNamespace, fleet: Any, tmp_path: Path
) -> None:
    fleet(app, 2, pool="prefork", concurrency=1)
    log = tmp_path / "ran"
    body = group(t.record.s(str(log)) for _ in range(LARGE_BODY))
    result = chord([t.same.s(1), t.same.s(2)], body).delay()
    patience = TIMEOUT + LARGE_BODY / 20
    # A line is an id and its end. Reading all of them at each look would take the machine's time.
    size = LARGE_BODY * (len(str(result.id)) + 1)
    eventually(lambda: log.exists() and log.stat().st_size >= size, patience)
    assert sorted(lines(log)) == sorted(task.id for task in result.results)


def test_a_plan_is_held_for_longer_than_the_broker_allows(
    tmp_path: Path, fleet: Any, node: rabbitmq.Node
) -> None:
    """The broker closes the channel of the leader, and delivers the plan again."""
    with rabbitmq.Node(node.distribution) as impatient:
        for name, milliseconds in (("consumer_timeout", 2000), ("channel_tick_interval", 1000)):
            impatient.eval(f"application:set_env(rabbit, {name}, {milliseconds})")
        app = Apps(impatient.url())()
        app.set_current()
        t = register(app)
        fleet(app, 1, pool="prefork", concurrency=2, args=("--prefetch-multiplier", "1"))
        log = tmp_path / "ran"
        result = chord([t.slow.s(1, 0), t.slow.s(2, 12)], t.record.s(str(log))).delay()
        assert result.get(timeout=2 * TIMEOUT) == [1, 2]
        assert lines(log) == [result.id]
