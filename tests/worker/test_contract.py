"""The backend with real prefork workers, seen by the sender and by other processes."""

from __future__ import annotations

import contextlib
import os
import uuid
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional

import pytest
from celery import Celery, chain, group, states
from celery.exceptions import (
    SoftTimeLimitExceeded,
    TaskRevokedError,
    TimeLimitExceeded,
    TimeoutError,
    WorkerLostError,
)
from celery.result import AsyncResult, GroupResult

from celery_amqp_results import errors
from tests import subprocess_jobs, subprocesses
from tests.conftest import Apps
from tests.worker.conftest import Worker, launch_worker
from tools import rabbitmq

LONG = 60.0


class Contract(NamedTuple):
    """An app, and a worker for its tasks."""

    app: Celery
    worker: Worker
    make_app: Apps

    def send(self, name: str, *args: Any, **options: Any) -> AsyncResult:
        return self.app.send_task(f"tests.worker.tasks.{name}", args, **options)

    def s(self, name: str, *args: Any) -> Any:
        return self.app.signature(f"tests.worker.tasks.{name}", args=args)


@pytest.fixture(scope="module")
def contract(
    _session_node: Optional[rabbitmq.Node], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Contract]:
    """One worker of four processes, for all tests of the module."""
    url = os.environ["AMQP_URL"] if _session_node is None else _session_node.url()
    apps = Apps(url)
    with contextlib.ExitStack() as stack:
        stack.callback(apps.close)
        app = apps()
        worker = launch_worker(
            app,
            tmp_path_factory.mktemp("worker"),
            concurrency=4,
            env={"TEST_CONF": '{"result_extended": true}'},
        )
        stack.callback(worker.stop)
        yield Contract(app, worker, apps)


# -- outcomes of a task --------------------------------------------------------------------------


def test_a_task_returns_its_value_to_the_sender_and_to_others(contract: Contract) -> None:
    result = contract.send("add", 2, 3)
    assert result.get(timeout=LONG) == 5
    assert subprocesses.run(contract.app, subprocess_jobs.values, ids=[result.id], times=2) == [
        5,
        5,
    ]
    assert result.get(timeout=LONG) == 5


def test_a_task_that_fails_raises_with_its_traceback(contract: Contract) -> None:
    result = contract.send("fail", "gone")
    with pytest.raises(KeyError, match="gone"):
        result.get(timeout=LONG)
    assert result.state == states.FAILURE
    assert "tasks.py" in result.traceback
    assert "tasks.py" in contract.app.AsyncResult(result.id).traceback


def test_intermediate_states_are_pushed_in_order(contract: Contract) -> None:
    seen: List[Any] = []
    result = contract.send("steps", 20)
    value = result.get(timeout=LONG, on_message=lambda m: seen.append((m["status"], m["result"])))
    assert value == 20
    _check_end([state for state, _ in seen], ["STARTED", *["PROGRESS"] * 20, "SUCCESS"])
    _check_end([meta["current"] for state, meta in seen if state == "PROGRESS"], list(range(20)))
    assert all(set(meta) == {"pid", "hostname"} for state, meta in seen if state == "STARTED")


def _check_end(seen: List[Any], all_of_them: List[Any]) -> None:
    """Check that *seen* is a suffix of all states.

    Before the first wait only the last state of a task is known. On a busy machine a worker may be
    faster than the sender.
    """
    assert seen == all_of_them[len(all_of_them) - len(seen) :]


def test_a_retried_task_shows_each_retry_and_then_succeeds(contract: Contract) -> None:
    # Celery sends the retry before it stores RETRY: without a countdown the final state may
    # overtake the last RETRY.
    seen: List[str] = []
    result = contract.send("retried", 2, 0.3)
    assert result.get(timeout=LONG, on_message=lambda m: seen.append(m["status"])) == 2
    _check_end(seen, ["RETRY", "RETRY", "SUCCESS"])


def test_a_replaced_task_returns_the_result_of_its_replacement(contract: Contract) -> None:
    result = contract.send("replaced", 4, 5)
    assert result.get(timeout=LONG) == 9
    assert subprocesses.run(contract.app, subprocess_jobs.values, ids=[result.id]) == [9]


def test_a_task_replaced_by_a_group_returns_the_group_s_results(contract: Contract) -> None:
    assert contract.send("replaced_by_group", 4).get(timeout=LONG) == [0, 2, 4, 6]


def test_a_task_that_ignores_its_result_stores_none(contract: Contract) -> None:
    results = [contract.send(n, ignore_result=True) for n in ("ignored", "ignored_failure")]
    # A task sent later to the same worker finishes after this one has at least begun.
    assert contract.send("add", 1, 1).get(timeout=LONG) == 2
    for result in results:
        assert result.get(timeout=LONG) is None
        assert contract.app.AsyncResult(result.id).state == states.PENDING
        assert not contract.app.backend.task_result_exists(result.id)


def test_an_unserializable_result_is_a_failure_with_the_reason(contract: Contract) -> None:
    result = contract.send("unserializable")
    with pytest.raises(Exception, match=r"(?i)serializ"):
        result.get(timeout=LONG)
    assert result.state == states.FAILURE


def test_children_are_listed(contract: Contract) -> None:
    result = contract.send("spawn_children", 3)
    ids = result.get(timeout=LONG)
    assert [child.id for child in result.children] == ids
    assert [child.get(timeout=LONG) for child in result.children] == [0, 2, 4]
    again = contract.app.AsyncResult(result.id)
    assert [child.id for child in again.children] == ids


def test_result_extended_describes_the_task(contract: Contract) -> None:
    result = contract.send("add", 1, 2)
    result.get(timeout=LONG)
    (meta,) = subprocesses.run(contract.app, subprocess_jobs.metas, ids=[result.id])
    assert (meta["name"], meta["args"], meta["kwargs"]) == ("tests.worker.tasks.add", [1, 2], {})
    assert meta["worker"].startswith("w-")
    assert meta["retries"] == 0
    assert meta["queue"] == contract.app.conf.task_default_queue


# -- chains and groups ---------------------------------------------------------------------------


def test_the_sender_of_a_chain_is_notified_although_a_worker_sends_its_last_task(
    contract: Contract,
) -> None:
    # Given an open inbox, so that only a push reports the final state.
    assert contract.send("add", 0, 0).get(timeout=LONG) == 0
    result = chain(contract.s("add", 1, 1), contract.s("add", 2), contract.s("add", 3))()
    assert result.get(timeout=LONG) == 7
    assert result.parent.get(timeout=LONG) == 4
    assert result.parent.parent.get(timeout=LONG) == 2


def test_waiting_for_a_chain_raises_the_failure_of_its_first_task(
    contract: Contract,
) -> None:
    result = chain(contract.s("fail", "first"), contract.s("add", 2), contract.s("add", 3))()
    with pytest.raises(KeyError, match="first"):
        result.get(timeout=LONG, interval=0.1)


def test_a_group_of_a_thousand_is_joined_and_read_by_another_process(contract: Contract) -> None:
    result = group(contract.s("add", n, n) for n in range(1000)).apply_async()
    result.save()
    expected = [2 * n for n in range(1000)]
    assert result.get(timeout=LONG) == expected
    ids, values = subprocesses.run(
        contract.app, subprocess_jobs.restore_and_join, group_id=result.id
    )
    assert ids == [node.id for node in result]
    assert values == expected


def test_a_group_with_a_failed_member_raises(contract: Contract) -> None:
    result = group(contract.s("add", 1, 1), contract.s("fail", "member")).apply_async()
    with pytest.raises(KeyError, match="member"):
        result.get(timeout=LONG)
    two, error = result.get(timeout=LONG, propagate=False)
    assert two == 2
    assert isinstance(error, KeyError)


# -- states that the worker's main process stores ------------------------------------------------


def test_a_task_past_its_time_limit_is_a_failure(contract: Contract) -> None:
    with pytest.raises(TimeLimitExceeded):
        contract.send("too_long").get(timeout=LONG)


def test_a_task_past_its_soft_time_limit_is_a_failure(contract: Contract) -> None:
    with pytest.raises(SoftTimeLimitExceeded):
        contract.send("softly_too_long").get(timeout=LONG)


def test_a_task_whose_process_was_killed_is_a_failure(contract: Contract) -> None:
    result = contract.send("die")
    with pytest.raises(WorkerLostError):
        result.get(timeout=LONG)
    assert subprocesses.run(contract.app, subprocess_jobs.states, ids=[result.id]) == ["FAILURE"]


def test_an_unknown_task_is_a_failure(contract: Contract) -> None:
    result = contract.app.send_task("tests.worker.tasks.no_such_task")
    with pytest.raises(Exception, match="no_such_task"):
        result.get(timeout=LONG)
    assert result.state == states.FAILURE


def test_a_revoked_queued_task_is_revoked_for_all_processes(contract: Contract) -> None:
    result = contract.send("add", 1, 1, countdown=1)
    contract.app.control.revoke(result.id)
    with pytest.raises(TaskRevokedError):
        result.get(timeout=LONG)
    assert subprocesses.run(contract.app, subprocess_jobs.states, ids=[result.id]) == ["REVOKED"]


def test_a_terminated_running_task_is_revoked_for_all_processes(
    contract: Contract, eventually: Callable[..., Any]
) -> None:
    result = contract.send("started_for", 60)
    eventually(lambda: result.state == states.STARTED)
    contract.app.control.revoke(result.id, terminate=True, signal="KILL")
    with pytest.raises(TaskRevokedError):
        result.get(timeout=LONG)
    assert subprocesses.run(contract.app, subprocess_jobs.states, ids=[result.id]) == ["REVOKED"]


# -- tasks that use the backend ------------------------------------------------------------------


def test_another_process_counts_revokes_and_forgets_a_group(contract: Contract) -> None:
    done = [contract.s("add", 1, number) for number in range(3)]
    # Long enough for the other process to start on a busy machine.
    later = [contract.s("add", 1, 1).set(countdown=12) for _ in range(2)]
    sent = group([*done, *later], app=contract.app).apply_async()
    sent.save()
    counts, values = subprocesses.run(
        contract.app, subprocess_jobs.count_and_revoke, group_id=sent.id
    )
    assert counts == [3, 5]
    assert values == [1, 2, 3, "TaskRevokedError", "TaskRevokedError"]
    # The sender sees the same.
    with pytest.raises(TaskRevokedError):
        sent.get(timeout=LONG)
    assert subprocesses.run(contract.app, subprocess_jobs.forget_group, group_id=sent.id) == [
        states.PENDING
    ] * len(sent)
    assert GroupResult.restore(sent.id, app=contract.app) is None


def test_a_task_reads_its_own_state(contract: Contract) -> None:
    assert contract.send("state_of_itself").get(timeout=LONG) == "PROGRESS"


def test_a_task_waits_for_tasks_of_another_sender(contract: Contract) -> None:
    retried = contract.send("retried_then_waited_for")
    waits = [contract.send("wait_for", retried.id) for _ in range(2)]
    assert [w.get(timeout=LONG) for w in waits] == ["second try"] * 2


# -- many processes ------------------------------------------------------------------------------


def test_another_process_can_forget_a_result(contract: Contract) -> None:
    result = contract.send("add", 1, 1)
    assert result.get(timeout=LONG) == 2
    subprocesses.run(contract.app, subprocess_jobs.forget, ids=[result.id])
    assert contract.app.AsyncResult(result.id).state == states.PENDING
    assert subprocesses.run(contract.app, subprocess_jobs.states, ids=[result.id]) == ["PENDING"]


def test_processes_that_sent_no_task_read_results_concurrently(
    contract: Contract,
) -> None:
    sent = [contract.send("add", n, 1) for n in range(20)]
    ids = [result.id for result in sent]
    expected = [n + 1 for n in range(20)] * 3
    jobs = [{"ids": ids, "times": 3}] * 4
    assert subprocesses.run_many(contract.app, subprocess_jobs.values, jobs) == [expected] * 4
    assert [result.get(timeout=LONG) for result in sent] == expected[:20]


def test_sixteen_polling_processes_see_consistent_states(
    contract: Contract,
) -> None:
    ids = [str(uuid.uuid4()) for _ in range(6)]
    with contextlib.ExitStack() as stack:
        # Given sixteen processes that poll tasks before they are sent.
        pollers = [
            stack.enter_context(
                subprocesses.start(contract.app, subprocess_jobs.poll_until_final, ids=ids)
            )
            for _ in range(16)
        ]
        for poller in pollers:
            assert poller.readline() == "polling"
        # When the worker runs the tasks.
        for task_id in ids:
            contract.send("steps", 100, task_id=task_id)
        answers: List[Dict[str, Any]] = [poller.answer() for poller in pollers]
    # Then no process has seen a state go backwards, nor PENDING after any other state.
    order: List[Any] = ["PENDING", "STARTED", *(("PROGRESS", n) for n in range(100)), "SUCCESS"]
    for answer in answers:
        for task_id in ids:
            seen = [order.index(state) for state in answer["seen"][task_id]]
            assert seen == sorted(set(seen)), (task_id, answer["seen"][task_id])
    # And all have seen the same final state.
    assert [answer["final"] for answer in answers] == [answers[0]["final"]] * 16
    assert {meta["result"] for meta in answers[0]["final"].values()} == {100}


def test_a_result_can_be_read_after_its_sender_has_exited(contract: Contract) -> None:
    # A program sends a task and exits; another one reads the result.
    (task_id,) = subprocesses.run(
        contract.app, subprocess_jobs.send_and_end, name="tests.worker.tasks.add"
    )
    assert contract.app.AsyncResult(task_id).get(timeout=LONG) == 3


def test_timeout_zero_raises_while_the_task_runs(contract: Contract) -> None:
    result = contract.send("started_for", 1)
    with pytest.raises(TimeoutError):
        result.get(timeout=0)
    assert result.get(timeout=LONG) == "done"


def test_the_worker_has_logged_no_backend_error(contract: Contract) -> None:
    # Runs after nearly all tests of the module, so it covers what they made the worker log.
    output = contract.worker.output()
    assert [name for name in errors.__all__ if name in output] == []
    assert " is lost" not in output


def test_a_stopped_worker_has_stored_all_its_results(
    start_worker: Callable[..., Worker], make_app: Apps
) -> None:
    app = make_app()
    worker = start_worker(app)
    results = [app.send_task("tests.worker.tasks.steps", (3,)) for _ in range(10)]
    values = [result.get(timeout=LONG) for result in results]
    worker.stop()
    assert values == [3] * 10
    assert subprocesses.run(app, subprocess_jobs.values, ids=[r.id for r in results]) == values
    assert "Traceback" not in worker.output()
