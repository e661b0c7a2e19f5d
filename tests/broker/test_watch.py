"""Watching: states as they happen, of given tasks or of all tasks."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
from celery import Celery, states
from celery.exceptions import TimeoutError
from celery.result import EagerResult, GroupResult, ResultSet

from celery_amqp_results import errors
from tests.broker.helpers import LONG, Waiting, new_id, until_stored, until_watched
from tests.conftest import Apps, raw_connection
from tools import rabbitmq

both_layouts = pytest.mark.parametrize("layout", ["shared", "per-task"])


def options(layout: str) -> Dict[str, Any]:
    return {"layout": layout, **({"shards": 8} if layout == "shared" else {})}


def seen(metas: Iterator[Dict[str, Any]]) -> List[Tuple[str, Any]]:
    return [(meta["status"], meta["result"]) for meta in metas]


def report(app: Celery, task_id: str, steps: int) -> None:
    """Report *steps* of progress for a task, and finish it."""
    store = app.backend.store_result
    store(task_id, None, states.STARTED)
    for step in range(steps):
        store(task_id, {"current": step}, "PROGRESS")
    store(task_id, steps, states.SUCCESS)


def until_tapped(app: Celery, eventually: Callable[..., Any], count: int = 1) -> None:
    """Return when *count* watchers of everything are bound."""
    taps = app.backend.layout._taps
    eventually(lambda: sum(tap._link is not None for tap in list(taps)) >= count)


# -- given tasks ---------------------------------------------------------------------------------


@both_layouts
def test_a_finished_task_yields_only_its_final_state(make_app: Apps, layout: str) -> None:
    worker, app = (make_app(result_backend_transport_options=options(layout)) for _ in range(2))
    task_id = new_id()
    report(worker, task_id, 3)
    (meta,) = app.backend.watch(task_id)
    assert meta == app.backend.get_task_meta(task_id)
    assert (meta["task_id"], meta["status"], meta["result"]) == (task_id, "SUCCESS", 3)


@both_layouts
def test_the_current_state_comes_first_then_each_new_state(make_app: Apps, layout: str) -> None:
    # Given a task that has reported progress twice.
    worker, app = (make_app(result_backend_transport_options=options(layout)) for _ in range(2))
    task_id = new_id()
    worker.backend.store_result(task_id, None, states.STARTED)
    worker.backend.store_result(task_id, {"current": 1}, "PROGRESS")
    until_stored(worker)
    # When it is watched, and continues.
    watch = app.backend.watch(task_id, timeout=LONG)
    assert next(watch)["result"] == {"current": 1}
    found = []
    for step in range(2, 5):
        worker.backend.store_result(task_id, {"current": step}, "PROGRESS")
        found.append(next(watch)["result"]["current"])
    worker.backend.store_result(task_id, KeyError("k"), states.FAILURE, traceback="tb")
    # Then every new state arrives, and the watch ends with the task.
    assert found == [2, 3, 4]
    (end,) = watch
    assert (end["status"], end["traceback"]) == ("FAILURE", "tb")
    assert isinstance(end["result"], KeyError)


@both_layouts
def test_a_watcher_from_the_beginning_misses_and_repeats_no_state(
    make_app: Apps, layout: str
) -> None:
    worker, app = (make_app(result_backend_transport_options=options(layout)) for _ in range(2))
    task_id, begun = new_id(), threading.Event()
    watch = app.backend.watch(task_id, timeout=LONG)

    def watching() -> List[Tuple[str, Any]]:
        first = next(watch)
        begun.set()
        return seen(itertools.chain([first], watch))

    waiting = Waiting(watching)
    # Given that the watcher has seen the first state, it sees every later one.
    worker.backend.store_result(task_id, None, states.STARTED)
    assert begun.wait(LONG)
    if layout == "shared":
        until_watched(app, task_id, lambda condition: condition())
    for step in range(100):
        worker.backend.store_result(task_id, {"current": step}, "PROGRESS")
    worker.backend.store_result(task_id, 100, states.SUCCESS)
    found = waiting.result()
    assert found[0] == ("STARTED", None)
    assert found[-1] == ("SUCCESS", 100)
    steps = [result["current"] for state, result in found[1:-1]]
    assert steps == sorted(set(steps))


def test_a_watcher_bound_before_the_first_state_sees_every_state(
    app: Celery, make_app: Apps, eventually: Callable[..., Any]
) -> None:
    worker, task_id = make_app(), new_id()
    waiting = Waiting(lambda: seen(app.backend.watch(task_id, timeout=LONG)))
    until_watched(app, task_id, eventually)
    report(worker, task_id, 100)
    steps = [("PROGRESS", {"current": step}) for step in range(100)]
    assert waiting.result() == [("STARTED", None), *steps, ("SUCCESS", 100)]


def test_superseded_states_are_not_reported(
    app: Celery, make_app: Apps, eventually: Callable[..., Any]
) -> None:
    # Given two watched tasks, so that the watch continues after one has finished.
    worker, task_id, other = make_app(), new_id(), new_id()
    waiting = Waiting(lambda: seen(app.backend.watch([task_id, other], timeout=LONG)))
    until_watched(app, task_id, eventually)
    until_watched(app, other, eventually)
    store = worker.backend.store_result
    # When one is asked to abort, reports progress, finishes, and then starts again.
    store(task_id, None, "ABORTED")
    store(task_id, {"current": 1}, "PROGRESS")
    store(task_id, "end", states.SUCCESS)
    store(task_id, None, states.STARTED)
    store(task_id, None, states.REVOKED)
    store(other, "other", states.SUCCESS)
    assert waiting.result() == [("ABORTED", None), ("SUCCESS", "end"), ("SUCCESS", "other")]


def test_states_pushed_during_a_read_do_not_follow_the_later_ones_that_were_read(
    make_app: Apps,
) -> None:
    # Given a watcher whose second look-up, after binding, finds what was published meanwhile.
    worker, app = (make_app(result_backend_transport_options=options("per-task")) for _ in "12")
    task_id, looks = new_id(), itertools.count()
    lookups = app.backend.layout.lookups
    glance = lookups.glance

    def glance_late(*args: Any, **kwargs: Any) -> Any:
        if next(looks) == 1:
            for step in range(5):
                worker.backend.store_result(task_id, {"current": step}, "PROGRESS")
        return glance(*args, **kwargs)

    lookups.glance = glance_late
    # Then the first states, which are pushed, do not follow the last one, which was read.
    watch = app.backend.watch(task_id, timeout=LONG)
    first = next(watch)
    worker.backend.store_result(task_id, {"current": 5}, "PROGRESS")
    second = next(watch)
    worker.backend.store_result(task_id, 6, states.SUCCESS)
    found = [("PROGRESS", first["result"]), ("PROGRESS", second["result"]), *seen(watch)]
    assert found == [
        ("PROGRESS", {"current": 4}),
        ("PROGRESS", {"current": 5}),
        ("SUCCESS", 6),
    ]


def test_groups_and_lists_are_watched_as_their_tasks(app: Celery, make_app: Apps) -> None:
    ids = [new_id() for _ in range(5)]
    results = [app.AsyncResult(task_id) for task_id in ids]
    inner = GroupResult(new_id(), results[1:3], app=app)
    target = [ids[0], GroupResult(new_id(), [inner, results[3]], app=app), ResultSet(results[3:])]
    for number, task_id in enumerate(ids):
        make_app().backend.store_result(task_id, number, states.SUCCESS)
    found = list(app.backend.watch(target, timeout=LONG))
    assert sorted(meta["result"] for meta in found) == [0, 1, 2, 3, 4]


def test_finished_and_ignored_results_cause_no_request(app: Celery) -> None:
    # Given a fetched result, a result of a task that ran eagerly, and an ignored one.
    got, ignored = app.AsyncResult(new_id()), app.AsyncResult(new_id())
    app.backend.store_result(got.id, 1, states.SUCCESS)
    assert got.get(timeout=LONG) == 1
    got.backend.forget(got.id)
    ignored.ignored = True
    eager = EagerResult(new_id(), 2, states.SUCCESS)
    found = list(app.backend.watch([got, ignored, eager], timeout=LONG))
    assert [(meta["task_id"], meta["result"]) for meta in found] == [(got.id, 1), (eager.id, 2)]
    assert list(app.backend.watch([], timeout=LONG)) == []


def test_only_the_requested_states_are_reported(app: Celery, make_app: Apps) -> None:
    task_id = new_id()
    report(make_app(), task_id, 2)
    assert seen(app.backend.watch(task_id, states="FAILURE", timeout=LONG)) == []
    assert seen(app.backend.watch(task_id, states=["SUCCESS"], timeout=LONG)) == [("SUCCESS", 2)]


@pytest.mark.parametrize("timeout", [0, -1, 0.3])
@both_layouts
def test_a_watch_times_out(make_app: Apps, timeout: float, layout: str) -> None:
    app = make_app(result_backend_transport_options=options(layout))
    done, running = new_id(), new_id()
    app.backend.store_result(done, 1, states.SUCCESS)
    app.backend.store_result(running, None, states.STARTED)
    until_stored(app)
    found: List[str] = []
    begun = time.monotonic()
    watch = app.backend.watch([done, running], timeout=timeout)
    with pytest.raises(TimeoutError, match="1 of 2 tasks"):
        found.extend(meta["status"] for meta in watch)
    assert max(0, timeout) <= time.monotonic() - begun < LONG
    assert sorted(found) == ["STARTED", "SUCCESS"]


def test_unwatchable_arguments_are_refused_immediately(app: Celery) -> None:
    with pytest.raises(TypeError, match="17 cannot be watched"):
        app.backend.watch(["an id", 17])
    with pytest.raises(ValueError, match="states is empty"):
        app.backend.watch("an id", states=[])
    with pytest.raises(TypeError, match="17"):
        app.backend.watch("an id", states=[17])


def test_closing_a_watch_leaves_no_waiter(app: Celery) -> None:
    task_id = new_id()
    app.backend.store_result(task_id, None, states.STARTED)
    until_stored(app)
    watch = app.backend.watch(task_id)
    assert next(watch)["status"] == "STARTED"
    inbox = app.backend.layout.inbox
    assert task_id in inbox._waiters
    watch.close()
    assert task_id not in inbox._waiters
    # Dropping the watch has the same effect.
    watch = app.backend.watch(task_id)
    next(watch)
    del watch
    assert task_id not in inbox._waiters


def test_nothing_is_opened_before_the_first_state_is_requested(app: Celery) -> None:
    app.backend.watch(new_id())
    app.backend.watch()
    assert app.backend.layout.inbox._keeper.thread is None


def test_closing_the_backend_ends_a_watch(app: Celery, eventually: Callable[..., Any]) -> None:
    task_id = new_id()
    given = Waiting(lambda: list(app.backend.watch(task_id)))
    everything = Waiting(lambda: list(app.backend.watch()))
    until_watched(app, task_id, eventually)
    until_tapped(app, eventually)
    app.backend.close()
    for waiting in (given, everything):
        with pytest.raises(errors.BackendUnavailable, match="closed"):
            waiting.result()


def test_a_watch_continues_after_a_broker_outage(
    app: Celery, make_app: Apps, node: rabbitmq.Node, eventually: Callable[..., Any]
) -> None:
    # Given two watchers, one of a task and one of everything.
    worker, task_id = make_app(), new_id()
    worker.backend.store_result(task_id, None, states.STARTED)
    until_stored(worker)
    given: List[Tuple[str, Any]] = []
    watching = Waiting(lambda: given.extend(seen(app.backend.watch(task_id, timeout=4 * LONG))))
    everything: List[Any] = []

    def watch_everything() -> None:
        for meta in app.backend.watch():
            everything.append(meta["result"])
            if meta["result"] == "after":
                return

    tapping = Waiting(watch_everything)
    until_watched(app, task_id, eventually)
    until_tapped(app, eventually)
    # When the broker closes all connections, and the task finishes meanwhile.
    node.ctl("close_all_connections", "test")
    worker.backend.store_result(task_id, "end", states.SUCCESS)
    # Then the task's watcher gets it from the store, and the other continues with new states.
    watching.thread.join(LONG)
    assert given[-1] == ("SUCCESS", "end")
    eventually(lambda: _tell(worker, "after") and not tapping.thread.is_alive(), LONG)
    tapping.result()
    assert everything[-1] == "after"


def _tell(app: Celery, result: Any) -> bool:
    app.backend.store_result(new_id(), result, states.SUCCESS)
    return True


# -- everything ----------------------------------------------------------------------------------


def test_watching_everything_yields_each_state_from_now_on(
    app: Celery, make_app: Apps, eventually: Callable[..., Any]
) -> None:
    # Given a watcher of everything, and one of failures.
    worker, before = make_app(), new_id()
    report(worker, before, 1)
    ids = [new_id() for _ in range(3)]
    watch = app.backend.watch()
    waiting = Waiting(lambda: list(itertools.islice(watch, 3 * 5 + 2)))
    failures = app.backend.watch(states=["FAILURE"])
    failing = Waiting(lambda: next(failures))
    until_tapped(app, eventually, 2)
    # When tasks report states, one of them the same state twice, and one fails.
    for task_id in ids:
        report(worker, task_id, 3)
        worker.backend.store_result(task_id, None, states.STARTED)
    worker.backend.save_group("a group", GroupResult("a group", [], app=worker))
    failed = new_id()
    worker.backend.store_result(failed, ValueError("bad"), states.FAILURE)
    worker.backend.store_result("end", None, states.SUCCESS)
    # Then each watcher has seen the states it asked for, once each, and states of tasks only.
    found = waiting.result()
    for task_id in ids:
        assert [m["status"] for m in found if m["task_id"] == task_id] == [
            "STARTED",
            *["PROGRESS"] * 3,
            "SUCCESS",
        ]
    assert [meta["task_id"] for meta in found[-2:]] == [failed, "end"]
    meta = failing.result()
    assert (meta["task_id"], repr(meta["result"])) == (failed, "ValueError('bad')")
    watch.close()
    failures.close()


def test_watching_everything_ends_at_its_timeout_and_cleans_up(
    app: Celery, node: rabbitmq.Node, eventually: Callable[..., Any]
) -> None:
    assert list(app.backend.watch(timeout=0)) == []
    begun = time.monotonic()
    assert list(app.backend.watch(timeout=0.3)) == []
    assert 0.3 <= time.monotonic() - begun < LONG
    bindings = f"{app.conf.result_exchange}.states"
    eventually(lambda: bindings not in node.ctl("-q", "list_bindings", "source_name"))


def test_watching_everything_skips_undecodable_states(
    app: Celery,
    make_app: Apps,
    amqp_url: str,
    eventually: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    waiting = Waiting(lambda: next(app.backend.watch()))
    until_tapped(app, eventually)
    # When a state that this app may not read is published, and a message that is no state.
    pickled = make_app(result_serializer="pickle", accept_content=["pickle"])
    pickled.backend.store_result("pickled", 1, states.SUCCESS)
    with raw_connection(amqp_url) as connection:
        import amqp

        exchange = f"{app.conf.result_exchange}.states"
        channel = connection.channel()
        channel.basic_publish_confirm(amqp.Message("rubbish"), exchange, "0.-.-.-.SUCCESS")
    app.backend.store_result("plain", 2, states.SUCCESS)
    # Then the log reports that to the watcher's process.
    assert waiting.result()["task_id"] == "plain"
    assert "left out the SUCCESS of pickled" in caplog.text
    assert "foreign or damaged" in caplog.text
    # A watcher of that task gets the error.
    from kombu.exceptions import ContentDisallowed

    with pytest.raises(ContentDisallowed):
        list(app.backend.watch("pickled", timeout=LONG))


def test_the_layout_per_task_cannot_watch_everything(make_app: Apps) -> None:
    app = make_app(result_backend_transport_options={"layout": "per-task"})
    with pytest.raises(errors.Unsupported, match="per-task"):
        app.backend.watch()


def test_a_watch_used_after_a_fork_raises_an_error(app: Celery) -> None:
    task_id = new_id()
    app.backend.store_result(task_id, None, states.STARTED)
    until_stored(app)
    watch = app.backend.watch(task_id)
    next(watch)
    pid = os.fork()
    if not pid:
        try:
            next(watch)
        except RuntimeError as exc:
            os._exit(0 if "before a fork" in str(exc) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    # The parent is not affected.
    app.backend.store_result(task_id, 1, states.SUCCESS)
    assert [meta["result"] for meta in watch] == [1]


# -- gevent --------------------------------------------------------------------------------------

#: Runs in a process of its own, since it patches everything.
GREENLETS = """
from gevent import monkey
monkey.patch_all()
import sys, uuid, gevent
from celery import Celery

app = Celery("greenlets", broker=sys.argv[1], backend="amqp://")
app.conf.update(result_exchange=sys.argv[2], result_backend_transport_options={"shards": 8})
task_id = str(uuid.uuid4())
seen = []

def watch(target):
    for meta in app.backend.watch(target, timeout=60):
        seen.append((target, meta["status"], meta["result"]))
        if meta["status"] == "SUCCESS":
            return

watching = [gevent.spawn(watch, task_id), gevent.spawn(watch, None)]
inbox, taps = app.backend.layout.inbox, app.backend.layout._taps
# Others run while the two wait, and this is one of them.
with gevent.Timeout(60):
    while not (inbox.covers(task_id) and any(tap._link for tap in list(taps))):
        gevent.sleep(0.01)
    for step in range(3):
        app.backend.store_result(task_id, step, "PROGRESS")
    app.backend.store_result(task_id, 3, "SUCCESS")
    gevent.joinall(watching, raise_error=True)
expected = [("PROGRESS", 0), ("PROGRESS", 1), ("PROGRESS", 2), ("SUCCESS", 3)]
for target in (task_id, None):
    assert [each[1:] for each in seen if each[0] == target] == expected, seen
app.backend.close()
"""


def test_greenlets_can_watch_while_others_run(app: Celery, amqp_url: str) -> None:
    pytest.importorskip("gevent")
    done = subprocess.run(
        [sys.executable, "-c", GREENLETS, amqp_url, app.conf.result_exchange],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
