"""Waiting for one task: timeouts, intermediate states, and many waiters."""

from __future__ import annotations

import asyncio
import gc
import pickle
import threading
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

import pytest
from celery import Celery, states
from celery.exceptions import TimeoutError
from celery.result import GroupResult

from celery_amqp_results import aio
from celery_amqp_results.feed import views
from celery_amqp_results.waiting import follower as waiting_module
from celery_amqp_results.waiting import rechecks
from tests import subprocess_jobs, subprocesses
from tests.broker.helpers import LONG, Waiting, new_id, open_inbox, until_watched
from tests.conftest import Apps, eventually


def test_a_stored_result_is_returned_immediately(app: Celery, make_app: Apps) -> None:
    task_id = new_id()
    app.backend.store_result(task_id, 1, states.SUCCESS)
    assert make_app().AsyncResult(task_id).get() == 1


def test_a_later_result_is_pushed(app: Celery, make_app: Apps) -> None:
    task_id, worker = new_id(), make_app()
    waiting = Waiting(app.AsyncResult(task_id).get)
    until_watched(app, task_id, eventually)
    received = app.backend.layout.inbox.received
    worker.backend.store_result(task_id, "pushed", states.SUCCESS)
    assert waiting.result() == "pushed"
    assert app.backend.layout.inbox.received == received + 1


def test_timeout_none_waits_without_a_limit(app: Celery) -> None:
    task_id = new_id()
    waiting = Waiting(lambda: app.AsyncResult(task_id).get(timeout=None))
    until_watched(app, task_id, eventually)
    # Longer than the interval between look-ups during a wait.
    waiting.thread.join(1.2)
    assert waiting.thread.is_alive()
    app.backend.store_result(task_id, 1, states.SUCCESS)
    assert waiting.result() == 1


@pytest.mark.parametrize("timeout", [0, 0.0, -1, 0.01, 0.3, 1])
def test_a_wait_without_a_result_times_out(app: Celery, timeout: float) -> None:
    result = app.AsyncResult(new_id())
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        result.get(timeout=timeout)
    passed = time.monotonic() - begun
    assert max(0, timeout) <= passed < LONG


def test_a_timeout_of_nan_is_refused(app: Celery) -> None:
    # With it no deadline would ever be over.
    nan, result = float("nan"), app.AsyncResult(new_id())

    async def wait() -> None:
        await aio.get(result, timeout=nan)

    async def watch() -> None:
        async for _ in aio.watch(result, timeout=nan):
            pass

    waits: List[Callable[[], Any]] = [
        lambda: result.get(timeout=nan),
        lambda: GroupResult(new_id(), [result], app=app).get(timeout=nan),
        lambda: list(app.backend.get_many([result.id], timeout=nan)),
        lambda: list(app.backend.watch(result, timeout=nan)),
        lambda: list(app.backend.watch(timeout=nan)),
        lambda: asyncio.run(wait()),
        lambda: asyncio.run(watch()),
    ]
    for each in waits:
        with pytest.raises(ValueError, match="nan is no timeout"):
            each()


def test_timeout_zero_returns_a_stored_result(app: Celery, make_app: Apps) -> None:
    done, failed, running = new_id(), new_id(), new_id()
    app.backend.store_result(done, 1, states.SUCCESS)
    app.backend.store_result(failed, KeyError("k"), states.FAILURE)
    app.backend.store_result(running, None, states.STARTED)
    for reader in (app, make_app()):
        assert reader.AsyncResult(done).get(timeout=0) == 1
        with pytest.raises(KeyError):
            reader.AsyncResult(failed).get(timeout=0)
        with pytest.raises(TimeoutError):
            reader.AsyncResult(running).get(timeout=0)


def test_the_timeout_covers_the_whole_wait_however_many_states_arrive(app: Celery) -> None:
    # Given a task that reports progress all the time, and never finishes.
    task_id, done = new_id(), threading.Event()

    def report() -> None:
        step = 0
        while not done.wait(0.05):
            step += 1
            app.backend.store_result(task_id, {"current": step}, "PROGRESS")

    thread = threading.Thread(target=report)
    thread.start()
    seen: List[Any] = []
    try:
        # A busy broker may take longer to deliver the first state.
        for timeout in (1, LONG / 2):
            begun = time.monotonic()
            with pytest.raises(TimeoutError):
                app.AsyncResult(task_id).get(timeout=timeout, on_message=seen.append)
            assert timeout <= time.monotonic() - begun < LONG
            if seen:
                break
    finally:
        done.set()
        thread.join()
    assert seen


def test_a_timeout_does_not_affect_the_task(app: Celery) -> None:
    task_id = new_id()
    result = app.AsyncResult(task_id)
    with pytest.raises(TimeoutError):
        result.get(timeout=0.1)
    app.backend.store_result(task_id, 5, states.SUCCESS)
    assert result.get(timeout=LONG) == 5


def test_on_message_gets_every_state_in_order(app: Celery, make_app: Apps) -> None:
    # Given a waiter.
    task_id, worker = new_id(), make_app()
    seen: List[Tuple[str, Any]] = []
    waiting = Waiting(
        lambda: app.AsyncResult(task_id).get(
            on_message=lambda meta: seen.append((meta["status"], meta["result"]))
        )
    )
    until_watched(app, task_id, eventually)
    # When the worker reports 200 steps as fast as it can.
    worker.backend.store_result(task_id, None, states.STARTED)
    for step in range(200):
        worker.backend.store_result(task_id, {"current": step}, "PROGRESS")
    worker.backend.store_result(task_id, "end", states.SUCCESS)
    assert waiting.result() == "end"
    assert seen == [
        ("STARTED", None),
        *(("PROGRESS", {"current": step}) for step in range(200)),
        ("SUCCESS", "end"),
    ]


def test_on_message_gets_the_states_from_before_the_wait_as_well(
    app: Celery, make_app: Apps
) -> None:
    task_id = new_id()
    app.backend.store_result(task_id, None, states.STARTED)
    app.backend.store_result(task_id, {"current": 1}, "PROGRESS")
    app.backend.store_result(task_id, "end", states.SUCCESS)
    seen: List[str] = []
    result = make_app().AsyncResult(task_id)
    assert result.get(timeout=LONG, on_message=lambda meta: seen.append(meta["status"])) == "end"
    assert seen == ["STARTED", "PROGRESS", "SUCCESS"]


def test_on_message_gets_the_failure_before_it_is_raised(app: Celery) -> None:
    task_id = new_id()
    app.backend.store_result(task_id, ValueError("bad"), states.FAILURE, traceback="tb")
    seen: List[Dict[str, Any]] = []
    with pytest.raises(ValueError, match="bad"):
        app.AsyncResult(task_id).get(timeout=LONG, on_message=seen.append)
    assert [(m["status"], m["traceback"]) for m in seen] == [("FAILURE", "tb")]


def test_an_exception_in_on_message_ends_the_wait(app: Celery) -> None:
    task_id = new_id()
    app.backend.store_result(task_id, None, states.STARTED)

    def refuse(meta: Any) -> None:
        raise RuntimeError("seen enough")

    with pytest.raises(RuntimeError, match="seen enough"):
        app.AsyncResult(task_id).get(timeout=LONG, on_message=refuse)
    app.backend.store_result(task_id, 1, states.SUCCESS)
    assert app.AsyncResult(task_id).get(timeout=LONG) == 1


def test_on_interval_is_called_repeatedly(app: Celery) -> None:
    # AsyncResult.get wraps the function in a promise that calls it once, whatever the backend.
    task_id = new_id()
    calls: List[int] = []

    def count() -> None:
        calls.append(1)
        if len(calls) == 5:
            app.backend.store_result(task_id, "end", states.SUCCESS)

    value = app.backend.wait_for(task_id, timeout=LONG, interval=0.05, on_interval=count)
    assert value == "end"
    assert len(calls) >= 5


def test_on_interval_of_get_is_called_and_can_end_the_wait(app: Celery) -> None:
    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        app.AsyncResult(new_id()).get(timeout=LONG, interval=0.05, on_interval=stop)


def test_a_failed_parent_ends_the_wait_for_its_child(app: Celery) -> None:
    parent = app.AsyncResult(new_id())
    child = app.AsyncResult(new_id(), parent=parent)
    waiting = Waiting(lambda: child.get(timeout=LONG, interval=0.05))
    until_watched(app, child.id, eventually)
    app.backend.store_result(parent.id, KeyError("parent"), states.FAILURE)
    with pytest.raises(KeyError, match="parent"):
        waiting.result()


def test_propagate_false_returns_the_exception(app: Celery) -> None:
    task_id = new_id()
    app.backend.store_result(task_id, KeyError("k"), states.FAILURE)
    value = app.AsyncResult(task_id).get(timeout=LONG, propagate=False)
    assert isinstance(value, KeyError)
    assert value.args == ("k",)


def test_a_revoked_task_raises_for_its_waiter(app: Celery) -> None:
    from celery.exceptions import TaskRevokedError

    task_id = new_id()
    waiting = Waiting(lambda: app.AsyncResult(task_id).get(timeout=LONG))
    until_watched(app, task_id, eventually)
    app.backend.mark_as_revoked(task_id, reason="enough")
    with pytest.raises(TaskRevokedError, match="enough"):
        waiting.result()


def test_get_raises_the_error_of_a_failed_task_every_time(app: Celery) -> None:
    task_id = new_id()
    app.backend.store_result(task_id, KeyError("k"), states.FAILURE)
    result = app.AsyncResult(task_id)
    for _ in range(2):
        with pytest.raises(KeyError):
            result.get(timeout=LONG)


def test_the_callback_of_get_is_called_with_id_and_value(app: Celery) -> None:
    task_id = new_id()
    app.backend.store_result(task_id, 3, states.SUCCESS)
    calls: List[Tuple[str, Any]] = []
    app.AsyncResult(task_id).get(timeout=LONG, callback=lambda *args: calls.append(args))
    assert calls == [(task_id, 3)]


def test_many_threads_wait_for_one_task_through_one_result_object(app: Celery) -> None:
    result = app.AsyncResult(new_id())
    waits = [Waiting(lambda: result.get(timeout=LONG)) for _ in range(10)]
    until_watched(app, result.id, eventually, 10)
    app.backend.store_result(result.id, "all", states.SUCCESS)
    assert [waiting.result() for waiting in waits] == ["all"] * 10


def test_many_threads_wait_for_one_task_through_separate_result_objects(app: Celery) -> None:
    task_id = new_id()
    waits = [Waiting(lambda: app.AsyncResult(task_id).get(timeout=LONG)) for _ in range(10)]
    until_watched(app, task_id, eventually, 10)
    app.backend.store_result(task_id, "all", states.SUCCESS)
    assert [waiting.result() for waiting in waits] == ["all"] * 10


def test_waits_that_end_differently_do_not_disturb_each_other(app: Celery) -> None:
    # Given one wait that times out soon, one that its own callback interrupts, and one that
    # continues.
    task_id = new_id()
    patient = Waiting(lambda: app.AsyncResult(task_id).get(timeout=LONG))
    hasty = Waiting(lambda: app.AsyncResult(task_id).get(timeout=0.2))
    refuse: Dict[Any, Any] = {}
    rude = Waiting(lambda: app.AsyncResult(task_id).get(on_message=refuse.__getitem__))
    until_watched(app, task_id, eventually)
    with pytest.raises(TimeoutError):
        hasty.result()
    app.backend.store_result(task_id, None, states.STARTED)
    with pytest.raises(TypeError):
        rude.result()
    app.backend.store_result(task_id, 1, states.SUCCESS)
    assert patient.result() == 1


def test_a_result_can_be_fetched_after_another_process_fetched_it(app: Celery) -> None:
    task_id = new_id()
    app.backend.store_result(task_id, "for all", states.SUCCESS)
    assert subprocesses.run(app, subprocess_jobs.values, ids=[task_id], times=2) == ["for all"] * 2
    assert app.AsyncResult(task_id).get(timeout=LONG) == "for all"
    assert subprocesses.run(app, subprocess_jobs.values, ids=[task_id]) == ["for all"]


def test_several_processes_wait_for_a_task_that_none_of_them_sent(app: Celery) -> None:
    task_id = new_id()
    waiter = subprocesses.start(app, subprocess_jobs.wait_and_say, task_id=task_id)
    another = subprocesses.start(app, subprocess_jobs.wait_and_say, task_id=task_id)
    with waiter as one, another as two:
        assert one.readline() == two.readline() == "waiting"
        app.backend.store_result(task_id, None, states.STARTED)
        app.backend.store_result(task_id, [1, 2], states.SUCCESS)
        assert one.answer() == two.answer() == [1, 2]


def test_a_process_killed_during_a_wait_loses_no_result(app: Celery) -> None:
    task_id = new_id()
    with subprocesses.start(app, subprocess_jobs.wait_and_say, task_id=task_id) as process:
        assert process.readline() == "waiting"
        process.kill()
    app.backend.store_result(task_id, "kept", states.SUCCESS)
    assert subprocesses.run(app, subprocess_jobs.values, ids=[task_id]) == ["kept"]


def test_garbage_collection_of_thousands_of_results_disturbs_no_wait(app: Celery) -> None:
    # Given threads that wait, while results of unknown tasks are created and dropped, some in
    # reference cycles that the collector may find at any moment.
    ids = [new_id() for _ in range(20)]
    waits = [Waiting(lambda i=i: app.AsyncResult(i).get(timeout=LONG)) for i in ids]  # type: ignore[misc]
    for task_id in ids:
        until_watched(app, task_id, eventually)
    stop = threading.Event()

    def create_garbage() -> None:
        while not stop.is_set():
            for _ in range(200):
                result = app.AsyncResult(new_id())
                result.then(print)
                result.myself = result
                app.backend.remove_pending_result(result)
                cycle = app.AsyncResult(new_id())
                cycle.myself = cycle
            gc.collect()

    litterers = [threading.Thread(target=create_garbage) for _ in range(2)]
    for thread in litterers:
        thread.start()
    for number, task_id in enumerate(ids):
        app.backend.store_result(task_id, number, states.SUCCESS)
    assert [waiting.result() for waiting in waits] == list(range(20))
    stop.set()
    for thread in litterers:
        thread.join(LONG)
        assert not thread.is_alive()
    # Then no trace of the dropped ones is left.
    eventually(lambda: not app.backend.waits.pending._results)


def test_a_pickled_result_can_be_waited_for_in_another_process(app: Celery) -> None:
    result = app.AsyncResult(new_id())
    pickled = pickle.dumps(result)
    app.backend.store_result(result.id, "travelled", states.SUCCESS)
    assert subprocesses.run(app, subprocess_jobs.get_pickled, pickled=pickled) == "travelled"


def test_a_backend_survives_pickling_with_its_url(make_app: Apps, amqp_url: str) -> None:
    app = make_app(backend=amqp_url.replace("amqp://", "amqp://", 1) + "?shards=4", shards=4)
    app.set_current()
    try:
        again = pickle.loads(pickle.dumps(app.backend))
        try:
            assert again.as_uri() == app.backend.as_uri()
            assert again.options == app.backend.options
            task_id = new_id()
            again.store_result(task_id, 1, states.SUCCESS)
        finally:
            again.close()
        assert app.AsyncResult(task_id).get(timeout=LONG) == 1
    finally:
        Celery(set_as_current=True)


def test_closing_the_backend_fails_its_waiters_and_it_can_reopen(app: Celery) -> None:
    from kombu.exceptions import OperationalError

    task_id = new_id()
    waiting = Waiting(lambda: app.AsyncResult(task_id).get(timeout=LONG))
    until_watched(app, task_id, eventually)
    app.backend.close()
    with pytest.raises(OperationalError, match="closed"):
        waiting.result()
    app.backend.store_result(task_id, 1, states.SUCCESS)
    assert app.AsyncResult(task_id).get(timeout=LONG) == 1


def test_polling_an_own_task_needs_no_request_once_the_inbox_is_open(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given an inbox that has been open for a while, and a task sent by this process.
    monkeypatch.setattr(views, "STEADY", 0.0)
    open_inbox(app)
    result = app.send_task("tests.nothing")
    reads: List[Any] = []
    store = app.backend.layout.store
    read = store.read

    def counted(ids: Any, *args: Any, **kwargs: Any) -> Any:
        reads.append(ids)
        return read(ids, *args, **kwargs)

    monkeypatch.setattr(store, "read", counted)
    # Then it is known to be pending.
    assert [result.state for _ in range(5)] == [states.PENDING] * 5
    assert reads == []


@pytest.mark.parametrize("task_id", ["daily-2026-11-22", None])
def test_a_task_sent_again_keeps_its_stored_result(app: Celery, task_id: Optional[str]) -> None:
    # Given an open inbox, and a finished task that is sent again with the same id.
    open_inbox(app)
    if task_id is None:
        task_id = app.send_task("tests.nothing").id
    app.backend.store_result(task_id, "before", states.SUCCESS)
    assert app.AsyncResult(task_id).get(timeout=LONG) == "before"
    app.send_task("tests.nothing", task_id=task_id)
    # Then the sender sees the same state as other processes.
    assert app.AsyncResult(task_id).state == states.SUCCESS
    assert subprocesses.run(app, subprocess_jobs.states, ids=[task_id]) == ["SUCCESS"]


def test_an_inbox_that_receives_nothing_is_replaced(
    app: Celery, make_app: Apps, raw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rechecks, "FIRST_RECHECK", 0.5)
    monkeypatch.setattr(waiting_module, "LATE", 0.0)
    task_id, inbox = new_id(), app.backend.layout.inbox
    waiting = Waiting(lambda: app.AsyncResult(task_id).get(timeout=LONG))
    until_watched(app, task_id, eventually)
    # The inbox was silent between two look-ups.
    eventually(lambda: app.backend.metrics().looked_up >= 3)
    # Deleting the exchange deletes its bindings; another process declares it without the inbox's.
    channel = raw.channel()
    channel.exchange_delete(app.backend.config.topology.exchange)
    make_app().backend.store_result(task_id, 1, states.SUCCESS)
    assert waiting.result() == 1
    eventually(lambda: inbox.connections > 1)
    # Later results are pushed.
    later = new_id()
    waiting = Waiting(lambda: app.AsyncResult(later).get(timeout=LONG))
    until_watched(app, later, eventually)
    received = inbox.received
    make_app().backend.store_result(later, 2, states.SUCCESS)
    assert waiting.result() == 2
    assert inbox.received > received
