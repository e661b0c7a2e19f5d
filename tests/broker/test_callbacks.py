"""``AsyncResult.then``: callbacks run even if no thread waits for the result."""

from __future__ import annotations

import logging
import threading
from typing import Any, Callable, List

import pytest
from celery import Celery, states
from celery.result import GroupResult

from celery_amqp_results.waiting import callbacks
from tests.broker.helpers import LONG, Waiting, fail_once, new_id
from tests.conftest import Apps


class Calls:
    """A callback that collects the results it is called with."""

    def __init__(self) -> None:
        self.results: List[Any] = []
        self.threads: List[threading.Thread] = []
        self._called = threading.Event()

    def __call__(self, result: Any) -> None:
        self.results.append(result)
        self.threads.append(threading.current_thread())
        self._called.set()

    def wait(self) -> Any:
        """Return the first result, waiting until there is one."""
        assert self._called.wait(LONG), "the callback was not called"
        return self.results[0]


def test_a_callback_runs_when_the_task_finishes_without_a_waiter(
    app: Celery, make_app: Apps
) -> None:
    result, called = app.AsyncResult(new_id()), Calls()
    result.then(called)
    make_app().backend.store_result(result.id, 42, states.SUCCESS)
    assert called.wait() is result
    assert result.result == 42
    assert called.results == [result]


def test_a_callback_of_a_finished_task_runs(app: Celery) -> None:
    task_id, called = new_id(), Calls()
    app.backend.store_result(task_id, 1, states.SUCCESS)
    app.AsyncResult(task_id).then(called)
    assert called.wait().result == 1


def test_a_callback_of_a_fetched_result_runs_immediately(app: Celery) -> None:
    task_id, called = new_id(), Calls()
    app.backend.store_result(task_id, 1, states.SUCCESS)
    result = app.AsyncResult(task_id)
    result.get(timeout=LONG)
    result.then(called)
    assert called.results == [result]


def test_a_callback_runs_for_a_failure(app: Celery) -> None:
    result, called = app.AsyncResult(new_id()), Calls()
    result.then(called)
    app.backend.store_result(result.id, KeyError("k"), states.FAILURE)
    assert called.wait().failed()
    assert isinstance(result.result, KeyError)


def test_intermediate_states_call_no_callback(app: Celery) -> None:
    result, called = app.AsyncResult(new_id()), Calls()
    result.then(called)
    app.backend.store_result(result.id, None, states.STARTED)
    app.backend.store_result(result.id, {"current": 1}, "PROGRESS")
    app.backend.store_result(result.id, 1, states.SUCCESS)
    called.wait()
    assert [r.state for r in called.results] == [states.SUCCESS]


def test_on_error_gets_the_exception_of_the_callback(
    app: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(result: Any) -> None:
        raise ValueError("refused")

    result, failed = app.AsyncResult(new_id()), Calls()
    with caplog.at_level(logging.CRITICAL):
        result.then(refuse, on_error=failed)
        app.backend.store_result(result.id, 1, states.SUCCESS)
        assert str(failed.wait()) == "refused"


def test_on_error_gets_the_exception_of_the_task_when_get_raises_it(app: Celery) -> None:
    # No callback has run before: get() then throws into the promise.
    task_id, failed = new_id(), Calls()
    app.backend.store_result(task_id, KeyError("k"), states.FAILURE)
    result = app.AsyncResult(task_id)
    with pytest.raises(KeyError):
        result.get(timeout=LONG)
    result.then(Calls(), on_error=failed)
    assert isinstance(failed.wait(), KeyError)


def test_a_raising_callback_does_not_affect_other_results(
    app: Celery, caplog: pytest.LogCaptureFixture, eventually: Callable[..., Any]
) -> None:
    def refuse(result: Any) -> None:
        raise ValueError("refused")

    bad, good, called = app.AsyncResult(new_id()), app.AsyncResult(new_id()), Calls()
    bad.then(refuse)
    good.then(called)
    with caplog.at_level(logging.ERROR, logger="celery_amqp_results"):
        app.backend.store_result(bad.id, 1, states.SUCCESS)
        eventually(lambda: bad.id in caplog.text)
        app.backend.store_result(good.id, 2, states.SUCCESS)
        assert called.wait() is good
    assert "refused" in caplog.text


def test_several_callbacks_of_one_result_are_called_in_order(app: Celery) -> None:
    result, order, last = app.AsyncResult(new_id()), [], Calls()
    for number in range(3):
        result.then(lambda _, n=number: order.append(n))
    result.then(last)
    app.backend.store_result(result.id, 1, states.SUCCESS)
    last.wait()
    assert order == [0, 1, 2]


def test_each_result_object_of_a_task_has_its_own_callbacks(app: Celery) -> None:
    task_id = new_id()
    results = [app.AsyncResult(task_id) for _ in range(3)]
    calls = [Calls() for _ in results]
    for result, called in zip(results, calls):
        result.then(called)
    app.backend.store_result(task_id, 1, states.SUCCESS)
    for result, called in zip(results, calls):
        assert called.wait() is result


def test_a_callback_runs_once_even_if_a_thread_also_waits(
    app: Celery, eventually: Callable[..., Any]
) -> None:
    result, called, after = app.AsyncResult(new_id()), Calls(), Calls()
    result.then(called)
    waits = [Waiting(lambda: result.get(timeout=LONG)) for _ in range(3)]
    eventually(lambda: len(app.backend.layout.inbox._waiters.by_task.get(result.id, ())) == 4)
    app.backend.store_result(result.id, 1, states.SUCCESS)
    assert [waiting.result() for waiting in waits] == [1, 1, 1]
    called.wait()
    # Callbacks run in order, so once this later one has run, all earlier ones have.
    later = app.AsyncResult(new_id())
    later.then(after)
    app.backend.store_result(later.id, 1, states.SUCCESS)
    after.wait()
    assert len(called.results) == 1


def test_a_callback_may_wait_for_another_task(app: Celery) -> None:
    first, second, got = app.AsyncResult(new_id()), new_id(), Calls()
    first.then(lambda result: got(app.AsyncResult(second).get(timeout=LONG)))
    app.backend.store_result(first.id, 1, states.SUCCESS)
    app.backend.store_result(second, "other", states.SUCCESS)
    assert got.wait() == "other"


def test_a_callback_may_add_callbacks(app: Celery) -> None:
    ids = [new_id() for _ in range(10)]
    last = Calls()

    def follow(number: int) -> None:
        result = app.AsyncResult(ids[number])
        result.then(last if number == 9 else lambda _: follow(number + 1))

    follow(0)
    for task_id in ids:
        app.backend.store_result(task_id, 1, states.SUCCESS)
    assert last.wait().id == ids[9]


def test_a_thousand_callbacks_run_and_leave_no_state(
    app: Celery, eventually: Callable[..., Any]
) -> None:
    called = Calls()
    results = [app.AsyncResult(new_id()) for _ in range(1000)]
    for result in results:
        result.then(called)
    for result in results:
        app.backend.store_result(result.id, result.id, states.SUCCESS)
    eventually(lambda: len(called.results) == 1000)
    assert {r.result for r in called.results} == {r.id for r in results}
    assert not app.backend.waits.pending._results


def test_a_removed_pending_result_calls_no_callback(
    app: Celery, eventually: Callable[..., Any]
) -> None:
    result, called = app.AsyncResult(new_id()), Calls()
    result.then(called)
    app.backend.remove_pending_result(result)
    eventually(lambda: not app.backend.waits.pending._results)
    app.backend.store_result(result.id, 1, states.SUCCESS)
    other, after = app.AsyncResult(new_id()), Calls()
    other.then(after)
    app.backend.store_result(other.id, 1, states.SUCCESS)
    after.wait()
    assert called.results == []


def test_callbacks_run_after_their_idle_thread_has_ended(
    app: Celery, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., Any]
) -> None:
    monkeypatch.setattr("celery_amqp_results.waiting.callbacks.LINGER", 0.05)
    for _ in range(3):
        result, called = app.AsyncResult(new_id()), Calls()
        result.then(called)
        app.backend.store_result(result.id, 1, states.SUCCESS)
        called.wait()
        thread = called.threads[0]
        eventually(lambda thread=thread: not thread.is_alive())


def test_callbacks_are_called_after_a_thread_could_not_be_started(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_once(monkeypatch, callbacks)
    result, called = app.AsyncResult(new_id()), Calls()
    with pytest.raises(RuntimeError, match="can't start new thread"):
        result.then(called)
    result.then(called)
    app.backend.store_result(result.id, 1, states.SUCCESS)
    assert called.wait() is result


def test_a_result_set_does_not_start_following_its_members(
    app: Celery, eventually: Callable[..., Any]
) -> None:
    # A result set adds itself as a callback of its members. That alone is no request for them.
    members = [app.AsyncResult(new_id()) for _ in range(100)]
    group = GroupResult(new_id(), members, app=app)
    eventually(lambda: not app.backend.waits.pending._results)
    assert app.backend.layout.inbox._keeper.thread is None
    # A member with a callback of its own is followed.
    called = Calls()
    members[5].then(called)
    app.backend.store_result(members[5].id, 1, states.SUCCESS)
    assert called.wait() is members[5]
    assert len(group) == 100


def test_a_pending_result_without_a_callback_is_dropped(
    app: Celery, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., Any]
) -> None:
    monkeypatch.setattr("celery_amqp_results.waiting.callbacks.GRACE", 0.05)
    app.backend.add_pending_result(app.AsyncResult(new_id()), weak=False)
    eventually(lambda: not app.backend.waits.pending._results)


def test_no_thread_starts_without_a_callback(app: Celery) -> None:
    task_id = new_id()
    app.backend.store_result(task_id, 1, states.SUCCESS)
    assert app.AsyncResult(task_id).get(timeout=LONG) == 1
    assert app.backend.waits.pending._follower is None
