"""The layout ``per-task`` with real prefork workers over RabbitMQ.

``tests/broker/test_per_task.py`` covers the messages themselves.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import pytest
from celery import Celery, chain, chord, group, states
from celery.exceptions import ChordError, TaskRevokedError, WorkerLostError
from celery.result import AsyncResult, GroupResult

from celery_amqp_results import errors
from tests import subprocess_jobs, subprocesses
from tests.broker.helpers import Waiting
from tests.conftest import PATIENCE, PATIENT_OPTIONS, Apps, raw_connection
from tests.worker.chord_tasks import register
from tests.worker.conftest import Worker, launch_worker
from tools import rabbitmq

OPTIONS = {"layout": "per-task", **PATIENT_OPTIONS}

#: Queues of header tasks are polled, not consumed, so they stay until they expire: soon.
EXPIRES = 600

STEPS = 20


class World(NamedTuple):
    """An app with the layout ``per-task``, and a worker for its tasks."""

    app: Celery
    worker: Worker
    #: The tasks of chords.
    t: SimpleNamespace

    def send(self, name: str, *args: Any, **options: Any) -> AsyncResult:
        return self.app.send_task(f"tests.worker.tasks.{name}", args, **options)

    def s(self, name: str, *args: Any) -> Any:
        return self.app.signature(f"tests.worker.tasks.{name}", args=args)


@pytest.fixture(scope="module")
def world(
    _session_node: Optional[rabbitmq.Node], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """One worker of four processes, for all tests of the module."""
    apps = Apps(os.environ["AMQP_URL"] if _session_node is None else _session_node.url())
    conf: Dict[str, Any] = {
        "result_backend_transport_options": OPTIONS,
        "result_expires": EXPIRES,
        # How often Celery's task looks whether the header of a chord is done, in seconds.
        "result_chord_retry_interval": 0.2,
    }
    with contextlib.ExitStack() as stack:
        stack.callback(apps.close)
        app = apps(**conf)
        worker = launch_worker(
            app,
            tmp_path_factory.mktemp("worker"),
            module="tests.worker.per_task_tasks",
            concurrency=4,
            env={"TEST_CONF": json.dumps(conf)},
        )
        stack.callback(worker.stop)
        app.set_current()
        yield World(app, worker, register(app))


def lines(path: Path) -> List[str]:
    return path.read_text().splitlines() if path.exists() else []


def queue_exists(world: World, name: str) -> bool:
    from amqp.exceptions import NotFound

    with raw_connection(world.app.conf.broker_url) as connection:
        try:
            connection.channel().queue_declare(name, passive=True)
        except NotFound:
            return False
    return True


# -- results of tasks ----------------------------------------------------------------------------


def test_the_sender_and_others_can_read_a_value_repeatedly(world: World) -> None:
    result = world.send("add", 2, 3)
    assert result.get(timeout=PATIENCE) == 5
    assert subprocesses.run(world.app, subprocess_jobs.values, ids=[result.id], times=3) == [
        5,
        5,
        5,
    ]
    assert (
        subprocesses.run(world.app, subprocess_jobs.states, ids=[result.id] * 3)
        == [states.SUCCESS] * 3
    )
    assert world.app.AsyncResult(result.id).get(timeout=PATIENCE) == 5
    # The worker has published it to a per-task queue.
    assert queue_exists(world, result.id.replace("-", ""))


def test_the_sender_and_others_can_read_a_failure(world: World) -> None:
    result = world.send("fail", "gone")
    with pytest.raises(KeyError, match="gone"):
        result.get(timeout=PATIENCE)
    assert "tasks.py" in result.traceback
    (meta,) = subprocesses.run(world.app, subprocess_jobs.metas, ids=[result.id])
    assert meta["status"] == states.FAILURE
    assert isinstance(meta["result"], KeyError)
    assert "tasks.py" in meta["traceback"]


def test_several_processes_wait_for_one_task_and_all_get_its_result(world: World) -> None:
    task_id = "waited-for-by-four"
    with contextlib.ExitStack() as stack:
        waiters = [
            stack.enter_context(
                subprocesses.start(world.app, subprocess_jobs.wait_and_say, task_id=task_id)
            )
            for _ in range(3)
        ]
        for waiter in waiters:
            assert waiter.readline() == "waiting"
        result = world.send("add", 1, 2, task_id=task_id)
        assert result.get(timeout=PATIENCE) == 3
        assert [waiter.answer() for waiter in waiters] == [3] * 3


def test_intermediate_states_are_pushed_in_order_to_the_sender_and_to_others(
    world: World, eventually: Callable[..., Any]
) -> None:
    task_id = "steps-seen-by-two"
    backend = world.app.backend
    knocks = itertools.count()
    seen: List[Any] = []

    def wait() -> Any:
        return world.app.AsyncResult(task_id).get(
            timeout=PATIENCE, on_message=lambda m: seen.append((m["status"], m["result"]))
        )

    with subprocesses.start(
        world.app, subprocess_jobs.states_until_ready, task_id=task_id
    ) as other:
        waiting, heard = Waiting(wait), Waiting(other.readline)

        def both_wait() -> bool:
            # The first state may be found by the look-up. Once the second one has arrived, the
            # binding exists through which all later states arrive.
            backend.store_result(task_id, next(knocks), "KNOCK")
            return len(seen) >= 2 and not heard.thread.is_alive()

        eventually(both_wait)
        assert heard.result() == "waiting"
        world.send("steps", STEPS, task_id=task_id)
        assert waiting.result() == STEPS
        seen_elsewhere = other.answer()
    for found in (seen, seen_elsewhere):
        story = [(name, what) for name, what in found if name != "KNOCK"]
        assert [name for name, _ in story] == ["STARTED", *["PROGRESS"] * STEPS, "SUCCESS"]
        assert [meta["current"] for name, meta in story if name == "PROGRESS"] == list(range(STEPS))
        assert set(story[0][1]) == {"pid", "hostname"}


def test_polling_processes_see_consistent_states(world: World) -> None:
    ids = [f"polled-{number}" for number in range(3)]
    with contextlib.ExitStack() as stack:
        pollers = [
            stack.enter_context(
                subprocesses.start(world.app, subprocess_jobs.poll_until_final, ids=ids)
            )
            for _ in range(3)
        ]
        for poller in pollers:
            assert poller.readline() == "polling"
        for task_id in ids:
            world.send("steps", STEPS, task_id=task_id)
        answers = [poller.answer() for poller in pollers]
    # No process has seen PENDING after any other state, nor another state after the final one.
    # Intermediate states may once go a step back, while another process holds the latest one.
    order: List[Any] = ["PENDING", "STARTED", *(("PROGRESS", n) for n in range(STEPS)), "SUCCESS"]
    for answer in answers:
        for task_id in ids:
            story = [order.index(state) for state in answer["seen"][task_id]]
            assert story[-1] == len(order) - 1, answer["seen"][task_id]
            assert story.count(len(order) - 1) == 1, answer["seen"][task_id]
            assert 0 not in story[1:], answer["seen"][task_id]
            assert answer["final"][task_id]["result"] == STEPS


def test_states_stored_by_the_worker_s_main_process(world: World) -> None:
    killed = world.send("die")
    with pytest.raises(WorkerLostError):
        killed.get(timeout=PATIENCE)
    revoked = world.send("add", 1, 1, countdown=1)
    world.app.control.revoke(revoked.id)
    with pytest.raises(TaskRevokedError):
        revoked.get(timeout=PATIENCE)
    ids = [killed.id, revoked.id]
    assert subprocesses.run(world.app, subprocess_jobs.states, ids=ids) == [
        states.FAILURE,
        states.REVOKED,
    ]


def test_a_retried_and_a_replaced_task(world: World) -> None:
    seen: List[str] = []
    # With a countdown: otherwise the final state may overtake the last RETRY.
    retried = world.send("retried", 2, 0.3)
    assert retried.get(timeout=PATIENCE, on_message=lambda m: seen.append(m["status"])) == 2
    # The worker may be faster than the sender, which only then starts to wait.
    assert seen == ["RETRY", "RETRY", "SUCCESS"][-len(seen) :]
    assert world.send("replaced", 4, 5).get(timeout=PATIENCE) == 9


def test_a_task_waits_for_tasks_of_another_sender(world: World) -> None:
    waited_for = world.send("started_for", 0.3)
    waits = [world.send("wait_for", waited_for.id) for _ in range(2)]
    assert [wait.get(timeout=PATIENCE) for wait in waits] == ["done"] * 2


def test_another_process_can_forget_a_result(world: World) -> None:
    result = world.send("add", 1, 1)
    assert result.get(timeout=PATIENCE) == 2
    subprocesses.run(world.app, subprocess_jobs.forget, ids=[result.id])
    assert world.app.AsyncResult(result.id).state == states.PENDING
    assert not queue_exists(world, result.id.replace("-", ""))


# -- groups and chains ---------------------------------------------------------------------------


def test_a_group_is_joined_by_the_sender_and_by_another_process(world: World) -> None:
    result = group(world.s("add", n, n) for n in range(50)).apply_async()
    result.save()
    expected = [2 * n for n in range(50)]
    assert result.get(timeout=PATIENCE) == expected
    ids, values = subprocesses.run(world.app, subprocess_jobs.restore_and_join, group_id=result.id)
    assert ids == [node.id for node in result]
    assert values == expected
    assert result.completed_count() == 50
    result.delete()
    assert GroupResult.restore(result.id, app=world.app) is None


def test_a_group_with_a_failed_member_raises(world: World) -> None:
    result = group(world.s("add", 1, 1), world.s("fail", "member")).apply_async()
    with pytest.raises(KeyError, match="member"):
        result.get(timeout=PATIENCE)
    two, error = result.get(timeout=PATIENCE, propagate=False)
    assert (two, type(error)) == (2, KeyError)


def test_the_sender_of_a_chain_can_wait_although_a_worker_sends_its_last_task(world: World) -> None:
    result = chain(world.s("add", 1, 1), world.s("add", 2), world.s("add", 3))()
    assert result.get(timeout=PATIENCE) == 7
    assert result.parent.get(timeout=PATIENCE) == 4
    failing = chain(world.s("fail", "first"), world.s("add", 2))()
    with pytest.raises(KeyError, match="first"):
        failing.get(timeout=PATIENCE, interval=0.1)


# -- chords: Celery's polling task ---------------------------------------------------------------

SHAPES: List[Tuple[str, Callable[[Any], Any], Any]] = [
    ("one", lambda t: chord([t.add.s(1, 1)], t.same.s()), [2]),
    ("none", lambda t: chord([], t.same.s()), []),
    ("fifty", lambda t: chord([t.same.s(i) for i in range(50)], t.same.s()), list(range(50))),
    ("generator", lambda t: chord((t.same.s(i) for i in range(9)), t.same.s()), list(range(9))),
    ("task | group | task", lambda t: t.add.s(1, 1) | group([t.add.s(1), t.add.s(2)])
     | t.total.s(), 7),
    ("chain of chords", lambda t: chain(
        group([t.add.s(1, 1), t.add.s(2, 2)]), t.total.s(), group([t.add.s(1), t.add.s(2)]),
        t.total.s()), 15),
    ("chord in a header", lambda t: chord(
        [chord([t.add.s(1, 1), t.add.s(2, 2)], t.total.s()), t.same.s(3)], t.same.s()), [6, 3]),
    ("chord in a group", lambda t: group([chord([t.add.s(1, 1)], t.total.s()), t.same.s(7)]),
     [2, 7]),
    ("body is a chord", lambda t: chord(
        [t.add.s(1, 1), t.add.s(2, 2)], chord([t.total.s(), t.same.s()], t.same.s())),
     [6, [2, 4]]),
    ("body is a group", lambda t: chord(
        [t.add.s(1, 1), t.add.s(2, 2)], group([t.total.s(), t.same.s()])), [6, [2, 4]]),
    ("retries", lambda t: chord([t.retried.s(1, 2), t.same.s(2)], t.same.s()), [1, 2]),
    ("replaced by a chord", lambda t: chord([t.replaced_by_chord.s(1), t.same.s(2)], t.same.s()),
     [5, 2]),
]  # fmt: skip


def test_chords_of_many_shapes(world: World) -> None:
    # Concurrently: each takes a second or more, while its header is polled.
    sent = [(name, make(world.t).delay(), expected) for name, make, expected in SHAPES]
    for name, result, expected in sent:
        assert result.get(timeout=PATIENCE) == expected, name


def test_another_process_can_wait_for_a_chord_and_its_body_runs_once(
    world: World, tmp_path: Path
) -> None:
    log = tmp_path / "notes"
    t = world.t
    header = [t.slow.s(number, 0.1) for number in range(4)]
    result = chord(header, t.record.s(str(log))).delay()
    assert subprocesses.run(world.app, subprocess_jobs.values, ids=[result.id]) == [[0, 1, 2, 3]]
    assert result.get(timeout=PATIENCE) == [0, 1, 2, 3]
    # A later chord runs later: by then, a second run of the first body would have happened.
    assert chord([t.same.s(1)], t.same.s()).delay().get(timeout=PATIENCE) == [1]
    assert lines(log) == [result.id]


def test_a_failed_part_fails_the_chord(
    world: World, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    t = world.t
    ran, told = tmp_path / "ran", tmp_path / "told"
    body = t.record.s(str(ran)).on_error(t.on_error.s(str(told)))
    result = chord([t.same.s(1), t.fail.s("no"), t.same.s(2)], body).delay()
    eventually(result.ready)
    assert result.state == states.FAILURE
    assert isinstance(result.result, ChordError)
    assert str(result.result) == f"Dependency {result.parent[1].id} raised KeyError('no')"
    (meta,) = subprocesses.run(world.app, subprocess_jobs.metas, ids=[result.id])
    assert meta["status"] == states.FAILURE
    assert isinstance(meta["result"], ChordError)
    eventually(lambda: lines(told) == [f"{result.id} ChordError"])
    assert lines(ran) == []


def test_a_failing_body_and_a_killed_header_task(
    world: World, eventually: Callable[..., Any]
) -> None:
    t = world.t
    failing = chord([t.same.s(1)], t.fail_with.s()).delay()
    killed = chord([t.killed.s(), t.same.s(2)], t.same.s()).delay()
    with pytest.raises(KeyError, match="body"):
        failing.get(timeout=PATIENCE)
    eventually(killed.ready)
    assert killed.state == states.FAILURE
    assert "WorkerLostError" in str(killed.result)


def test_the_worker_has_logged_no_backend_error(world: World) -> None:
    # Runs after all tests of the module, so it covers what they made the worker log.
    output = world.worker.output()
    assert [name for name in errors.__all__ if f"{name}(" in output] == []
    assert "cannot be" not in output
