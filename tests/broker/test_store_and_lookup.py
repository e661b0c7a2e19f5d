"""Storing states and looking them up, in the same process and in others."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any, Dict, List

import amqp
import pytest
from celery import Celery, states
from celery.result import AsyncResult

from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.store.checkout import PREFETCH
from tests import subprocess_jobs, subprocesses
from tests.broker.helpers import LONG, new_id, until_stored
from tests.conftest import Apps


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -1.5,
        "",
        "text with ünïcödé",
        [1, [2, [3]]],
        {"a": {"b": None}},
        "x" * 100_000,
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_result_reads_back_as_it_was_stored(app: Celery, value: Any) -> None:
    task_id = new_id()
    app.backend.store_result(task_id, value, states.SUCCESS)
    result = app.AsyncResult(task_id)
    assert result.state == states.SUCCESS
    assert result.result == value
    assert result.successful()
    assert result.get(timeout=LONG) == value


def test_store_result_returns_its_argument(app: Celery) -> None:
    assert app.backend.store_result(new_id(), 5, states.SUCCESS) == 5


def test_an_unknown_task_is_pending(app: Celery) -> None:
    meta = app.backend.get_task_meta(new_id())
    assert meta["status"] == states.PENDING
    assert meta["result"] is None


@pytest.mark.parametrize("state", ["STARTED", "RETRY", "PROGRESS", "RECEIVED", "MY-OWN.state #1"])
def test_every_intermediate_state_can_be_stored_and_read(app: Celery, state: str) -> None:
    task_id = new_id()
    value: Any = ValueError("again") if state == states.RETRY else {"step": 1}
    app.backend.store_result(task_id, value, state)
    until_stored(app)
    result = app.AsyncResult(task_id)
    assert result.state == state
    assert not result.ready()
    if state == states.RETRY:
        assert isinstance(result.result, ValueError)
    else:
        assert result.result == {"step": 1}


def test_a_failure_reads_back_as_its_exception_with_its_traceback(app: Celery) -> None:
    task_id = new_id()
    app.backend.store_result(task_id, KeyError("gone"), states.FAILURE, traceback="Traceback ...")
    result = app.AsyncResult(task_id)
    assert result.failed()
    assert isinstance(result.result, KeyError)
    assert result.result.args == ("gone",)
    assert result.traceback == "Traceback ..."
    assert app.backend.get_traceback(task_id) == "Traceback ..."
    with pytest.raises(KeyError, match="gone"):
        result.get(timeout=LONG)


def test_the_accessors_agree_with_the_meta(app: Celery) -> None:
    task_id = new_id()
    app.backend.store_result(task_id, "value", states.SUCCESS)
    backend = app.backend
    assert backend.get_state(task_id) == backend.get_status(task_id) == states.SUCCESS
    assert backend.get_result(task_id) == "value"
    assert backend.get_traceback(task_id) is None
    assert backend.get_children(task_id) is None
    assert backend.get_task_meta(task_id)["task_id"] == task_id


def test_revoked_can_be_stored_without_a_request(app: Celery) -> None:
    task_id = new_id()
    app.backend.mark_as_revoked(task_id, reason="no longer wanted")
    assert app.AsyncResult(task_id).state == states.REVOKED


def test_a_failure_can_be_stored_with_a_nearly_empty_request(app: Celery) -> None:
    # The worker's main process does this for a task that it does not know.
    from celery.utils.objects import Bunch

    task_id = new_id()
    request = Bunch(name="unknown", chord=None, root_id=None, correlation_id=task_id, errbacks=None)
    app.backend.mark_as_failure(task_id, LookupError("unknown task"), request=request)
    assert isinstance(app.AsyncResult(task_id).result, LookupError)


@pytest.mark.parametrize("late", ["STARTED", "PROGRESS", "RETRY", "FAILURE", "REVOKED"])
def test_no_state_replaces_success(app: Celery, make_app: Apps, late: str) -> None:
    task_id = new_id()
    app.backend.store_result(task_id, 1, states.SUCCESS)
    value = ValueError("late") if late in states.EXCEPTION_STATES else None
    app.backend.store_result(task_id, value, late)
    reader = make_app()
    assert reader.AsyncResult(task_id).state == states.SUCCESS
    assert reader.AsyncResult(task_id).result == 1
    assert app.AsyncResult(task_id).state == states.SUCCESS


def test_success_replaces_failure_but_a_late_started_does_not(app: Celery, make_app: Apps) -> None:
    # Given a task whose worker was considered lost, and which ran again.
    task_id = new_id()
    app.backend.store_result(task_id, ValueError("lost"), states.FAILURE)
    app.backend.store_result(task_id, None, states.STARTED)
    assert make_app().AsyncResult(task_id).state == states.FAILURE
    app.backend.store_result(task_id, 2, states.SUCCESS)
    assert make_app().AsyncResult(task_id).get(timeout=LONG) == 2


def test_revokes_by_many_workers_count_as_one(app: Celery, make_app: Apps) -> None:
    task_id = new_id()
    for worker in [app, make_app(), make_app()]:
        worker.backend.mark_as_revoked(task_id, reason="revoked")
    assert make_app().AsyncResult(task_id).state == states.REVOKED


def test_an_aborted_task_stays_aborted_until_its_final_state(app: Celery, make_app: Apps) -> None:
    task_id = new_id()
    app.backend.store_result(task_id, None, "ABORTED")
    app.backend.store_result(task_id, {"current": 1}, "PROGRESS")
    until_stored(app)
    assert make_app().AsyncResult(task_id).state == "ABORTED"
    app.backend.store_result(task_id, "ended", states.SUCCESS)
    assert make_app().AsyncResult(task_id).state == states.SUCCESS


def test_a_result_can_be_looked_up_any_number_of_times(app: Celery, make_app: Apps) -> None:
    task_id = new_id()
    app.backend.store_result(task_id, 7, states.SUCCESS)
    readers = [app, make_app(), make_app()]
    for _ in range(30):
        for reader in readers:
            assert reader.AsyncResult(task_id).state == states.SUCCESS
            assert reader.AsyncResult(task_id).get(timeout=LONG) == 7


def test_several_processes_read_the_same_results_concurrently(app: Celery) -> None:
    ids = [new_id() for _ in range(20)]
    for number, task_id in enumerate(ids):
        app.backend.store_result(task_id, number, states.SUCCESS)
    mine = subprocess_jobs.metas(app, ids, 3)
    for theirs in subprocesses.run_many(app, subprocess_jobs.metas, [{"ids": ids, "times": 3}] * 4):
        assert theirs == mine


def test_a_result_survives_the_process_that_stored_it(app: Celery) -> None:
    task_id = new_id()
    subprocesses.run(app, subprocess_jobs.store, results=[(task_id, "kept", states.SUCCESS)])
    assert app.AsyncResult(task_id).get(timeout=LONG) == "kept"


def test_exists_distinguishes_stored_from_unknown_tasks(app: Celery, make_app: Apps) -> None:
    started, done, unknown = new_id(), new_id(), new_id()
    app.backend.store_result(started, None, states.STARTED)
    app.backend.store_result(done, None, states.SUCCESS)
    until_stored(app)
    for reader in (app, make_app()):
        backend = reader.backend
        for _ in range(3):
            assert backend.task_result_exists(started)
            assert backend.task_result_exists(done)
            assert not backend.task_result_exists(unknown)
    if hasattr(AsyncResult, "exists"):
        assert app.AsyncResult(done).exists()
        assert not app.AsyncResult(unknown).exists()


def test_forget_deletes_a_result_for_all_processes(app: Celery, make_app: Apps) -> None:
    # Given two results that this process and another have read.
    gone, kept = new_id(), new_id()
    reader = make_app()
    for task_id in (gone, kept):
        app.backend.store_result(task_id, None, states.STARTED)
        app.backend.store_result(task_id, 1, states.SUCCESS)
        assert reader.AsyncResult(task_id).get(timeout=LONG) == 1
    # When one is forgotten.
    app.AsyncResult(gone).forget()
    # Then no process finds it by any method, and the other is unchanged.
    for asker in (app, reader, make_app()):
        assert asker.AsyncResult(gone).state == states.PENDING
        assert asker.AsyncResult(gone).result is None
        assert not asker.backend.task_result_exists(gone)
        assert asker.AsyncResult(kept).result == 1
    assert subprocesses.run(app, subprocess_jobs.states, ids=[gone, kept]) == ["PENDING", "SUCCESS"]


def test_another_process_may_forget(app: Celery) -> None:
    task_id = new_id()
    app.backend.store_result(task_id, 1, states.SUCCESS)
    assert app.AsyncResult(task_id).state == states.SUCCESS
    subprocesses.run(app, subprocess_jobs.forget, ids=[task_id])
    assert app.AsyncResult(task_id).state == states.PENDING


def test_forgetting_an_unknown_or_forgotten_task_is_no_error(app: Celery) -> None:
    task_id = new_id()
    app.AsyncResult(task_id).forget()
    app.backend.store_result(task_id, 1, states.SUCCESS)
    app.AsyncResult(task_id).forget()
    app.AsyncResult(task_id).forget()
    assert app.AsyncResult(task_id).state == states.PENDING


def test_a_forgotten_id_can_be_used_again(app: Celery) -> None:
    task_id = new_id()
    app.backend.store_result(task_id, "first", states.SUCCESS)
    app.AsyncResult(task_id).forget()
    app.backend.store_result(task_id, "second", states.SUCCESS)
    assert app.AsyncResult(task_id).get(timeout=LONG) == "second"


def test_process_cleanup_and_cleanup_change_nothing(app: Celery) -> None:
    # Celery calls process_cleanup after every task.
    task_id = new_id()
    for number in range(3):
        app.backend.store_result(task_id, {"step": number}, "PROGRESS")
        app.backend.process_cleanup()
    app.backend.store_result(task_id, 1, states.SUCCESS)
    app.backend.process_cleanup()
    app.backend.cleanup()
    assert app.AsyncResult(task_id).result == 1


def test_polling_shows_each_change_and_never_goes_back(app: Celery, make_app: Apps) -> None:
    # Given a process that polls a task that it has not sent.
    task_id, reader = new_id(), make_app()
    for _ in range(3):
        assert reader.AsyncResult(task_id).state == states.PENDING
    seen: List[str] = []
    done = threading.Event()

    def poll() -> None:
        while not done.is_set():
            state = reader.AsyncResult(task_id).state
            if not seen or seen[-1] != state:
                seen.append(state)
            if state == states.SUCCESS:
                return

    thread = threading.Thread(target=poll)
    thread.start()
    # When the task runs through its states.
    for state in (states.STARTED, "PROGRESS", states.SUCCESS):
        app.backend.store_result(task_id, None, state)
    thread.join(LONG)
    done.set()
    # Then the polling process reaches the final state, and never goes back.
    order = ["PENDING", "STARTED", "PROGRESS", "SUCCESS"]
    assert seen[-1] == states.SUCCESS
    assert [order.index(s) for s in seen] == sorted(order.index(s) for s in seen)


def test_a_poll_that_overlaps_the_end_of_a_wait_keeps_no_old_state(
    app: Celery, make_app: Apps
) -> None:
    # Given a running task, a thread that waits for it, and threads that poll it at the same time,
    # so that look-ups and pushes overlap in every way.
    reader = make_app()
    for _ in range(20):
        task_id = new_id()
        app.backend.store_result(task_id, None, states.STARTED)
        values: List[Any] = []
        polled: List[str] = []

        def wait(task_id: str = task_id, values: List[Any] = values) -> None:
            values.append(reader.AsyncResult(task_id).get(timeout=LONG))

        def poll(task_id: str = task_id, polled: List[str] = polled) -> None:
            while True:
                polled.append(reader.AsyncResult(task_id).state)
                if polled[-1] == states.SUCCESS or len(polled) > 50_000:
                    return

        threads = [threading.Thread(target=f) for f in (wait, poll, poll)]
        for thread in threads:
            thread.start()
        app.backend.store_result(task_id, 1, states.SUCCESS)
        for thread in threads:
            thread.join(LONG)
            assert not thread.is_alive()
        # Then every thread has seen the final state, and none is stuck at an earlier one.
        assert values == [1]
        assert polled[-1] == states.SUCCESS
        assert reader.AsyncResult(task_id).state == states.SUCCESS


class PausedLookUp:
    """A look-up that is paused after it has read the store."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, app: Celery) -> None:
        self.reached = threading.Event()
        self.go_on = threading.Event()
        store = app.backend.layout.store
        read = store.read
        self.armed = False

        def paused(*args: Any, **kwargs: Any) -> Any:
            found = read(*args, **kwargs)
            if self.armed and threading.current_thread() is self.thread:
                self.armed = False
                self.reached.set()
                assert self.go_on.wait(LONG)
            return found

        monkeypatch.setattr(store, "read", paused)

    def run(self, function: Any) -> None:
        self.armed = True
        self.thread = threading.Thread(target=function)
        self.thread.start()
        assert self.reached.wait(LONG)

    def finish(self) -> None:
        self.go_on.set()
        self.thread.join(LONG)
        assert not self.thread.is_alive()


@pytest.mark.parametrize("reader_is", ["a wait", "a poll"])
def test_a_slow_look_up_does_not_restore_a_superseded_state(
    app: Celery, make_app: Apps, monkeypatch: pytest.MonkeyPatch, reader_is: str
) -> None:
    # Given a look-up that has read STARTED, and then is paused.
    task_id, reader = new_id(), make_app()
    app.backend.store_result(task_id, None, states.STARTED)
    until_stored(app)
    assert reader.AsyncResult(task_id).state == states.STARTED
    paused = PausedLookUp(monkeypatch, reader)
    paused.run(lambda: reader.AsyncResult(task_id).state)
    # When the task finishes, and another thread of this process sees that.
    app.backend.store_result(task_id, 1, states.SUCCESS)
    if reader_is == "a wait":
        assert reader.AsyncResult(task_id).get(timeout=LONG) == 1
    else:
        assert reader.AsyncResult(task_id).state == states.SUCCESS
        assert reader.AsyncResult(task_id).state == states.SUCCESS
    paused.finish()
    # Then the slow look-up's state does not become the current one.
    for _ in range(3):
        assert reader.AsyncResult(task_id).state == states.SUCCESS


def test_many_results_are_read_in_one_request(app: Celery, make_app: Apps) -> None:
    ids = [new_id() for _ in range(500)]
    for number, task_id in enumerate(ids):
        app.backend.store_result(task_id, number, states.SUCCESS)
    found: Dict[str, Any] = dict(make_app().backend.get_many(ids, timeout=LONG))
    assert {i: found[i]["result"] for i in ids} == {i: n for n, i in enumerate(ids)}


def test_a_shard_with_more_messages_than_a_channel_may_hold_is_read_and_packed(
    make_app: Apps,
) -> None:
    # Given a classic queue with more loose results than a prefetch count can express, never read
    writer = make_app(shards=1, lookup_timeout=60)
    first, last = new_id(), new_id()
    writer.backend.store_result(first, "first", states.SUCCESS)
    queue = writer.backend.config.topology.shard_queue(0).name
    loose = StateMessage(new_id(), states.SUCCESS, 1, b"{}", "application/json", "utf-8")
    with writer.connection_for_write() as connection:
        channel = connection.channel()
        for number in range(PREFETCH + 1000):
            state = dataclasses.replace(loose, id=f"{loose.id}-{number}")
            message = amqp.Message(state.body, **state.properties(persistent=False))
            channel.basic_publish(message, "", queue)
        # The broker answers this once it has processed everything sent before.
        channel.queue_declare(queue, passive=True)
    writer.backend.store_result(last, "last", states.SUCCESS)
    # When a process looks up one of them
    reader = make_app(shards=1, lookup_timeout=60)
    assert reader.AsyncResult(last).result == "last"
    # Then the messages that were read are packed for the next reader
    assert reader.backend.metrics().packed > 1000
    another = make_app(shards=1, lookup_timeout=60)
    assert another.AsyncResult(first).result == "first"
    before = reader.backend.metrics().messages_read
    assert another.backend.metrics().messages_read < before
