"""Forks and threads: after use, on both sides of the fork, at any moment."""

from __future__ import annotations

import gc
import logging
import os
import pickle
import threading
import time
from typing import Any, Callable, List, Tuple

import pytest
from celery import Celery, states

from celery_amqp_results.toolkit import threads
from tests.broker.helpers import LONG, Waiting, new_id, until_watched
from tests.conftest import Apps

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here"),
    # Python 3.12 and later warn of a fork in a process with threads, which is the point here.
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


def bare(function: Callable[[], Any]) -> Callable[[], Any]:
    """Run *function* in a child made by ``os.fork``; return a function that returns its answer."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reading)
            try:
                value: Any = function()
            except BaseException as exc:
                value = exc
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(pickle.dumps(value))
            status = 0
        finally:
            os._exit(status)
    os.close(writing)

    def answer() -> Any:
        with os.fdopen(reading, "rb") as pipe:
            data = pipe.read()
        os.waitpid(pid, 0)
        value = pickle.loads(data)
        if isinstance(value, BaseException):
            raise value
        return value

    return answer


def billiards(function: Callable[[], Any]) -> Callable[[], Any]:
    """Run *function* in a child of billiard, as Celery's workers do."""
    import billiard

    context = billiard.get_context("fork")
    theirs, ours = context.Pipe()

    def run() -> None:
        try:
            theirs.send(function())
        except BaseException as exc:
            theirs.send(exc)

    process = context.Process(target=run)
    process.start()
    theirs.close()

    def answer() -> Any:
        assert ours.poll(LONG), "the child does not answer"
        value = ours.recv()
        process.join(LONG)
        ours.close()
        if isinstance(value, BaseException):
            raise value
        return value

    return answer


@pytest.fixture(params=[bare, billiards], ids=["os.fork", "billiard"])
def fork(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Runs a function in a forked child; returns a function that returns the child's answer."""
    return request.param  # type: ignore[no-any-return]


def use(app: Celery, name: str) -> Tuple[str, Any]:
    """Store, look up, wait, and receive a pushed result."""
    task_id, later = new_id(), new_id()
    app.backend.store_result(task_id, name, states.SUCCESS)
    assert app.AsyncResult(task_id).state == states.SUCCESS
    assert app.AsyncResult(task_id).get(timeout=LONG) == name
    timer = threading.Timer(0.05, app.backend.store_result, (later, name, states.SUCCESS))
    timer.start()
    assert app.AsyncResult(later).get(timeout=LONG) == name
    timer.join()
    return task_id, name


def test_a_child_forked_after_use_works_and_so_does_its_parent(
    app: Celery, fork: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    # Given a backend whose connections are all open.
    mine, _ = use(app, "parent")
    with caplog.at_level(logging.WARNING, logger="celery_amqp_results"):
        # When a child uses it while the parent goes on.
        answer = fork(lambda: (app.AsyncResult(mine).get(timeout=LONG), use(app, "child")))
        again, _ = use(app, "parent again")
        found, (theirs, name) = answer()
    # Then each reads what the other stored, and the parent's connections are unchanged.
    assert found == "parent"
    assert app.AsyncResult(theirs).get(timeout=LONG) == name == "child"
    assert app.AsyncResult(again).get(timeout=LONG) == "parent again"
    assert not caplog.records


def test_the_parent_s_connections_survive_a_child_that_collects_garbage_and_exits(
    make_app: Apps, fork: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app()
    use(app, "parent")
    inbox = app.backend.layout.inbox
    epoch = inbox.connections
    child_app = [make_app.made.pop()]

    def drop_everything() -> bool:
        nonlocal app, inbox
        del inbox
        app = None
        child_app.clear()
        gc.collect()
        return True

    with caplog.at_level(logging.WARNING, logger="celery_amqp_results"):
        assert fork(drop_everything)()
        make_app.made.append(child_app[0])
        use(app, "parent again")
    assert inbox.connections == epoch
    assert not caplog.records


def test_a_wait_continues_while_children_are_forked_and_exit(
    app: Celery, make_app: Apps, fork: Callable[..., Any], eventually: Callable[..., Any]
) -> None:
    task_id = new_id()
    waiting = Waiting(lambda: app.AsyncResult(task_id).get(timeout=LONG))
    until_watched(app, task_id, eventually)
    for number in range(3):
        answer = fork(lambda n=number: use(app, f"child {n}"))
        assert answer()[1] == f"child {number}"
    app.backend.store_result(task_id, "still here", states.SUCCESS)
    assert waiting.result() == "still here"


def test_a_child_waits_for_a_result_that_its_parent_stores(
    app: Celery, fork: Callable[..., Any]
) -> None:
    use(app, "parent")
    task_id = new_id()
    answer = fork(lambda: app.AsyncResult(task_id).get(timeout=LONG))
    app.backend.store_result(task_id, "for the child", states.SUCCESS)
    assert answer() == "for the child"


def test_a_child_forked_while_threads_are_busy_does_not_hang(
    app: Celery, fork: Callable[..., Any], eventually: Callable[..., Any]
) -> None:
    # Given threads that store, poll and wait all the time, so that any lock may be held. (The locks
    # that Celery and kombu hold while they start or open connections are not ours, so the
    # connections are opened before.)
    done = threading.Event()
    errors: List[BaseException] = []
    rounds: List[int] = []

    def busy() -> None:
        try:
            while not done.is_set():
                rounds.append(1)
                task_id = new_id()
                app.backend.store_result(task_id, 1, states.SUCCESS)
                assert app.AsyncResult(task_id).state == states.SUCCESS
                app.AsyncResult(task_id).then(lambda result: None)
                assert app.AsyncResult(task_id).get(timeout=LONG) == 1
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=busy) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        eventually(lambda: len(rounds) >= 60 or errors, LONG)
        for number in range(5):
            answer = fork(lambda n=number: use(app, f"child {n}"))
            assert answer()[1] == f"child {number}"
    finally:
        done.set()
        for thread in threads:
            thread.join(LONG)
    assert errors == []


def test_a_child_of_a_child_works(app: Celery) -> None:
    use(app, "parent")
    assert bare(lambda: bare(lambda: use(app, "grandchild"))()[1])() == "grandchild"


def test_a_child_has_its_own_client_word(app: Celery) -> None:
    # Its tasks carry another sender: with the parent's client word it would miss their states.
    use(app, "parent")
    mine = app.backend.layout.inbox._keeper._client
    assert bare(lambda: app.backend.layout.inbox._keeper._client)() != mine


def test_threads_store_and_read_through_one_backend(app: Celery) -> None:
    found: List[Any] = []

    def work(number: int) -> None:
        for step in range(20):
            task_id = new_id()
            app.backend.store_result(task_id, None, states.STARTED)
            app.backend.store_result(task_id, (number, step), states.SUCCESS)
            found.append(app.AsyncResult(task_id).get(timeout=LONG) == [number, step])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert found == [True] * 320


def test_results_that_threads_store_at_once_in_an_undeclared_shard_are_all_kept(
    app: Celery, make_app: Apps, eventually: Callable[..., Any]
) -> None:
    # Given shards that are not declared yet, and an inbox bound to all of them: a copy published
    # before its shard exists reaches the inbox, and the state is returned to its publisher.
    ids = [new_id() for _ in range(64)]
    watcher = make_app()
    watching = Waiting(lambda: dict(watcher.backend.get_many(ids, timeout=LONG)))
    until_watched(watcher, ids[-1], eventually)
    start = threading.Barrier(8)

    def store(mine: List[str]) -> None:
        start.wait(LONG)
        for task_id in mine:
            app.backend.store_result(task_id, 1, states.SUCCESS)

    threads = [threading.Thread(target=store, args=(ids[n::8],)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert len(watching.result()) == 64
    reader = make_app()
    assert [reader.AsyncResult(i).state for i in ids] == [states.SUCCESS] * 64


def test_threads_that_use_a_new_backend_at_once_open_one_inbox(app: Celery) -> None:
    ids = [new_id() for _ in range(20)]
    start = threading.Barrier(21)

    def wait(task_id: str) -> Any:
        start.wait(LONG)
        return app.AsyncResult(task_id).get(timeout=LONG)

    waits = [Waiting(lambda i=i: wait(i)) for i in ids]  # type: ignore[misc]
    start.wait(LONG)
    for task_id in ids:
        app.backend.store_result(task_id, task_id, states.SUCCESS)
    assert [waiting.result() for waiting in waits] == ids
    inboxes = [t for t in threading.enumerate() if t.name == "celery-results-inbox"]
    assert len([t for t in inboxes if t is app.backend.layout.inbox._keeper.thread]) == 1


def test_closing_ends_all_threads(
    app: Celery, make_app: Apps, eventually: Callable[..., Any]
) -> None:
    other = make_app()
    before = {t for t in threading.enumerate() if t.name.startswith("celery-results")}
    use(app, "x")
    result = app.AsyncResult(new_id())
    result.then(lambda r: None)
    app.backend.close()

    def ended() -> bool:
        now = {t for t in threading.enumerate() if t.name.startswith("celery-results")}
        return now <= before

    eventually(ended)
    assert other.AsyncResult(new_id()).state == states.PENDING


def test_a_garbage_collected_app_leaves_no_thread(
    make_app: Apps, eventually: Callable[..., Any]
) -> None:
    def names() -> int:
        return sum(t.name.startswith("celery-results") for t in threading.enumerate())

    before = names()
    app = make_app()
    use(app, "x")
    assert names() > before
    make_app.made.remove(app)
    del app
    deadline = time.monotonic() + LONG
    while names() > before and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    assert names() <= before


def test_results_are_stored_and_read_where_the_system_allows_no_further_thread(
    make_app: Apps, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    app = make_app(shards=2)
    task_id = new_id()
    with monkeypatch.context() as patch:

        def fail(*args: Any) -> None:
            raise RuntimeError("can't start new thread")

        patch.setattr(threads, "start_thread", fail)
        # When the helper threads of storing and reading cannot be started
        app.backend.store_result(task_id, 1, "STARTED")
        app.backend.store_result(task_id, 2, states.SUCCESS)
        # Then both go on without them
        assert app.backend.layout.poll([task_id, new_id()])[task_id].state == states.SUCCESS
    for name in ("confirms", "lookups"):
        assert f"celery-results-{name} was not started" in caplog.text
    # And they start when it is possible again
    app.backend.store_result(new_id(), 3, "STARTED")
    app.backend.layout.stored_state(task_id)
    layout = app.backend.layout
    assert layout.publisher._unwaited._keeper is not None
    assert layout._pool._keeper is not None


def test_a_child_forked_while_connections_are_counted_does_not_hang(
    app: Celery, fork: Callable[..., Any]
) -> None:
    # Given a thread that counts connections at the moment of the fork
    app.backend.store_result(new_id(), 1, states.SUCCESS)
    slots = app.backend.layout.connector.slots
    counting, forked = threading.Event(), threading.Event()

    def count() -> None:
        with slots._changed:
            counting.set()
            forked.wait(LONG)

    thread = threading.Thread(target=count)
    thread.start()
    counting.wait(LONG)

    def work() -> Any:
        # The connections of the parent are forgotten here, and others are opened.
        gc.collect()
        app.backend.store_result(new_id(), 1, states.SUCCESS)
        gc.collect()
        return "stored"

    answer = fork(work)
    forked.set()
    thread.join(LONG)
    # Then the child stores a result
    assert answer() == "stored"
