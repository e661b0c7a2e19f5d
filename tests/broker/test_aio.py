"""Waiting for tasks in coroutines: values, errors, timeouts, cancellation, and many at once."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import subprocess
import sys
import threading
import time
from typing import Any, Awaitable, Callable, Dict, Iterator, List, Set, TypeVar, cast

import celery.exceptions
import pytest
from celery import Celery, states
from celery._state import _set_task_join_will_block
from celery.result import AsyncResult, EagerResult, GroupResult, ResultSet
from kombu.exceptions import ContentDisallowed

from celery_amqp_results import aio, errors
from celery_amqp_results.aio import bridge, driver
from tests.broker.helpers import LONG, fail_once, new_id
from tests.conftest import PATIENCE, Apps
from tools import rabbitmq

_T = TypeVar("_T")


def run(scenario: Callable[[], Awaitable[_T]]) -> _T:
    """Run a coroutine function on an event loop of its own, and fail if it hangs."""

    async def bounded() -> _T:
        return await asyncio.wait_for(scenario(), 4 * LONG)

    return asyncio.run(bounded())


async def until(condition: Callable[[], Any]) -> None:
    """Return when *condition* is true; fail after *LONG* seconds."""
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline, condition
        await asyncio.sleep(0.01)


async def until_covered(app: Celery, *ids: str) -> None:
    """Return when this process receives the states of *ids*."""
    inbox = app.backend.layout.inbox
    await until(lambda: all(inbox.covers(task_id) for task_id in ids))


def store(app: Celery, task_id: str, result: Any, state: str = states.SUCCESS) -> None:
    app.backend.store_result(task_id, result, state)


@pytest.fixture
def worker(make_app: Apps) -> Celery:
    """An app that plays the worker."""
    return make_app()


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    for bridges in list(bridge._bridges.values()):
        for each in bridges.values():
            assert not each._subscribers
            assert not each._taps


# -- one task --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["shared", "per-task"])
def test_a_result_is_awaited_whether_stored_before_or_after(make_app: Apps, layout: str) -> None:
    options = {"layout": layout, **({"shards": 8} if layout == "shared" else {})}
    worker, app = (make_app(result_backend_transport_options=options) for _ in range(2))
    there, later, by_id = new_id(), new_id(), new_id()
    store(worker, there, 1)

    async def scenario() -> List[Any]:
        first = await aio.get(app.AsyncResult(there), timeout=LONG)
        waiting = asyncio.gather(
            aio.get(app.AsyncResult(later), timeout=LONG), aio.get(by_id, app=app, timeout=LONG)
        )
        await asyncio.sleep(0.1)
        for task_id in (later, by_id):
            await asyncio.to_thread(store, worker, task_id, 2)
        return [first, *(await waiting)]

    assert run(scenario) == [1, 2, 2]


def test_a_failure_is_raised_or_returned(app: Celery, worker: Celery) -> None:
    failed, revoked = new_id(), new_id()
    store(worker, failed, KeyError("k"), states.FAILURE)
    worker.backend.mark_as_revoked(revoked, "terminated")

    async def scenario() -> None:
        for target in (failed, app.AsyncResult(failed)):
            with pytest.raises(KeyError, match="k"):
                await aio.get(target, app=app)
            returned = await aio.get(target, propagate=False, app=app)
            assert isinstance(returned, KeyError)
            with pytest.raises(KeyError):
                await aio.get(target, timeout=0, app=app)
        with pytest.raises(celery.exceptions.TaskRevokedError):
            await aio.get(revoked, app=app)

    run(scenario)


def test_awaiting_updates_the_result_object_and_calls_its_callbacks(
    app: Celery, worker: Celery
) -> None:
    async def scenario() -> None:
        result = app.AsyncResult(new_id())
        called: List[Any] = []
        result.on_ready.then(called.append)
        store(worker, result.id, 1)
        assert await aio.get(result, timeout=LONG) == 1
        assert called == [result]
        # From here on, no request goes to the broker.
        worker.backend.forget(result.id)
        assert await aio.get(result, timeout=0) == 1
        assert (result.state, await aio.state(result)) == ("SUCCESS", "SUCCESS")

    run(scenario)


def test_results_that_need_no_waiting(app: Celery) -> None:
    async def scenario() -> None:
        ignored = app.AsyncResult(new_id())
        ignored.ignored = True
        assert await aio.get(ignored) is None
        assert await aio.get(EagerResult("e", 1, states.SUCCESS)) == 1
        with pytest.raises(KeyError):
            await aio.get(EagerResult("e", KeyError(), states.FAILURE))
        assert await aio.get(ResultSet([], app=app)) == []
        assert await aio.gather() == []
        nothing: List[AsyncResult] = []
        assert [each async for each in aio.as_completed(nothing)] == []

    run(scenario)


@pytest.mark.parametrize("timeout", [0, -1, 0.2])
def test_a_timeout_raises_an_error_of_both_celery_and_asyncio(
    app: Celery, worker: Celery, timeout: float
) -> None:
    async def scenario() -> None:
        task_id = new_id()
        for kind in (asyncio.TimeoutError, celery.exceptions.TimeoutError):
            begun = time.monotonic()
            with pytest.raises(kind, match=f"not ready after {timeout:g} seconds"):
                await aio.get(task_id, timeout=timeout, app=app)
            assert max(0, timeout) <= time.monotonic() - begun
        # The task is not affected.
        store(worker, task_id, 5)
        assert await aio.get(task_id, timeout=LONG, app=app) == 5

    run(scenario)


def test_cancellation_works_in_every_way_that_asyncio_offers(app: Celery, worker: Celery) -> None:
    async def scenario() -> None:
        task_id = new_id()
        inbox = app.backend.layout.inbox
        waiting = asyncio.ensure_future(aio.get(task_id, app=app))
        await until_covered(app, task_id)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await until(lambda: task_id not in inbox._waiters)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(aio.get(task_id, app=app), 0.1)
        if sys.version_info >= (3, 11):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await aio.get(task_id, app=app)
        # When one of two waiters is cancelled, the other keeps waiting.
        goes, stays = (asyncio.ensure_future(aio.get(task_id, app=app)) for _ in range(2))
        await until_covered(app, task_id)
        goes.cancel()
        store(worker, task_id, 1)
        assert await stays == 1
        await until(lambda: task_id not in inbox._waiters)

    run(scenario)


def test_invalid_arguments_are_refused(app: Celery) -> None:
    async def scenario() -> None:
        with pytest.raises(TypeError, match="17 cannot be waited for"):
            await aio.get(cast(Any, 17), app=app)
        with pytest.raises(TypeError, match="gather"):
            await aio.get(cast(Any, [new_id()]), app=app)
        other = Celery("other", broker="memory://", backend="cache+memory://", set_as_current=False)
        with pytest.raises(TypeError, match="app="):
            await aio.get(new_id(), app=other)
        with pytest.raises(TypeError, match="several"):
            await aio.gather(
                app.AsyncResult(new_id()),
                Celery("third", broker="memory://", backend="amqp://").AsyncResult(new_id()),
            )
        with pytest.raises(TypeError, match="a group"):
            await aio.state(ResultSet([], app=app))

    run(scenario)


def test_waiting_inside_a_task_is_refused_unless_allowed_explicitly(app: Celery) -> None:
    task_id = new_id()
    store(app, task_id, 1)

    async def scenario() -> None:
        with pytest.raises(RuntimeError, match="Never call result"):
            await aio.get(task_id, app=app)
        with pytest.raises(RuntimeError, match="Never call result"):
            await aio.gather(task_id, app=app)
        assert await aio.get(task_id, app=app, disable_sync_subtasks=False) == 1

    _set_task_join_will_block(True)
    try:
        run(scenario)
    finally:
        _set_task_join_will_block(False)


def test_a_chain_raises_the_error_of_the_task_that_stopped_it(app: Celery, worker: Celery) -> None:
    async def scenario() -> None:
        first = app.AsyncResult(new_id())
        group = GroupResult(new_id(), [app.AsyncResult(new_id())], parent=first, app=app)
        last = app.AsyncResult(new_id(), parent=group)
        waiting = asyncio.ensure_future(aio.get(last, timeout=LONG))
        await until_covered(app, last.id, first.id, group.results[0].id)
        store(worker, first.id, 1)
        store(worker, group.results[0].id, ValueError("cut"), states.FAILURE)
        with pytest.raises(ValueError, match="cut"):
            await waiting
        # Immediately where the error is known already, and never with propagate=False.
        with pytest.raises(ValueError, match="cut"):
            await aio.get(last, timeout=LONG)
        with pytest.raises(errors.WaitTimeout, match="the task is not ready"):
            await aio.get(last, timeout=0, follow_parents=False)

    run(scenario)


# -- several ---------------------------------------------------------------------------------------


def test_a_group_returns_a_list_in_order(app: Celery, worker: Celery) -> None:
    async def scenario() -> None:
        results = [app.AsyncResult(new_id()) for _ in range(4)]
        inner = GroupResult(new_id(), results[1:3], app=app)
        group = GroupResult(new_id(), [results[0], inner, results[3]], app=app)
        waiting = asyncio.ensure_future(aio.get(group, timeout=LONG))
        both = asyncio.ensure_future(aio.gather(group, results[0].id, timeout=LONG, app=app))
        await until_covered(app, *(result.id for result in results))
        for number in (3, 1, 0, 2):
            store(worker, results[number].id, number)
        assert await waiting == [0, [1, 2], 3]
        assert await both == [[0, [1, 2], 3], 0]
        assert group.ready()

    run(scenario)


def test_the_first_failure_of_a_group_ends_the_wait(app: Celery, worker: Celery) -> None:
    async def scenario() -> None:
        ids = [new_id() for _ in range(3)]
        group = GroupResult(new_id(), [app.AsyncResult(i) for i in ids], app=app)
        store(worker, ids[1], KeyError("first"), states.FAILURE)
        with pytest.raises(KeyError, match="first"):
            await aio.get(group, timeout=LONG)
        with pytest.raises(KeyError, match="first"):
            await aio.gather(*ids, timeout=LONG, app=app)
        # A busy broker may not have reported in time that one has finished.
        with pytest.raises(errors.WaitTimeout, match=r"[23] of 3 tasks"):
            await aio.gather(*ids, timeout=0.1, return_exceptions=True, app=app)
        store(worker, ids[0], 0)
        store(worker, ids[2], 2)
        values = await aio.gather(*ids, timeout=LONG, return_exceptions=True, app=app)
        assert (values[0], repr(values[1]), values[2]) == (0, "KeyError('first')", 2)

    run(scenario)


def test_as_completed_yields_each_result_as_it_finishes(app: Celery, worker: Celery) -> None:
    async def scenario() -> None:
        ids = [new_id() for _ in range(4)]
        results = [app.AsyncResult(i) for i in ids]
        group = GroupResult(new_id(), [*results[:2], ResultSet(results[2:])], app=app)
        store(worker, ids[2], 2)
        found = []
        async for task_id, value in aio.as_completed(group, timeout=LONG):
            found.append((ids.index(task_id), value))
            left = [n for n in (3, 0, 1) if n not in [number for number, _ in found]]
            if left:
                store(worker, ids[left[0]], left[0])
        assert found == [(2, 2), (3, 3), (0, 0), (1, 1)]
        # Known results are not requested again.
        again = [task_id async for task_id, _ in aio.as_completed(group, timeout=0)]
        assert sorted(again) == sorted(ids)

    run(scenario)


def test_as_completed_takes_results_from_a_generator(app: Celery, worker: Celery) -> None:
    async def scenario() -> None:
        ids = [new_id() for _ in range(2)]
        for number, task_id in enumerate(ids):
            store(worker, task_id, number)
        results = (app.AsyncResult(task_id) for task_id in ids)
        found = [each async for each in aio.as_completed(results, timeout=LONG)]
        assert sorted(found) == sorted(zip(ids, range(2)))

    run(scenario)


def test_as_completed_continues_after_a_failure_on_request(app: Celery, worker: Celery) -> None:
    async def scenario() -> None:
        bad, good, missing = new_id(), new_id(), new_id()
        store(worker, bad, KeyError("bad"), states.FAILURE)
        completed = aio.as_completed([bad, good], timeout=LONG, app=app)
        with pytest.raises(KeyError, match="bad"):
            await completed.__anext__()
        store(worker, good, 1)
        assert [each async for each in completed] == [(good, 1)]
        found = {
            task_id: repr(value)
            async for task_id, value in aio.as_completed(
                [bad, good], propagate=False, timeout=LONG, app=app
            )
        }
        assert found == {bad: "KeyError('bad')", good: "1"}
        # A busy broker may not have reported in time that one has finished.
        with pytest.raises(errors.WaitTimeout, match=r"[12] of 2 tasks"):
            async for _ in aio.as_completed([good, missing], timeout=0.1, app=app):
                pass

    run(scenario)


# -- asking once -----------------------------------------------------------------------------------


def test_states_and_metas_of_many_tasks_are_read_in_one_request(
    app: Celery, worker: Celery
) -> None:
    ids = [new_id() for _ in range(300)]
    for task_id in ids[:3]:
        store(worker, task_id, {"current": 1}, "PROGRESS")
    store(worker, ids[3], 3)
    store(worker, ids[4], "x" * 200_000)
    reads: List[int] = []
    real = app.backend.layout.store.read

    def counted(asked: Any, *args: Any, **kwargs: Any) -> Any:
        reads.append(len(asked))
        return real(asked, *args, **kwargs)

    app.backend.layout.store.read = counted

    async def scenario() -> None:
        found = await asyncio.gather(*(aio.state(task_id, app=app) for task_id in ids))
        assert found[:5] == ["PROGRESS"] * 3 + ["SUCCESS"] * 2
        assert set(found[5:]) == {"PENDING"}
        assert await aio.get_meta(ids[3], app=app) == app.backend.get_task_meta(ids[3])
        assert (await aio.get_meta(app.AsyncResult(ids[4])))["result"] == "x" * 200_000
        assert await aio.get_meta(ids[9], app=app) == {
            "task_id": ids[9],
            "status": "PENDING",
            "result": None,
        }

    run(scenario)
    assert reads[0] == len(ids)


def test_forget_deletes_the_results(app: Celery, worker: Celery) -> None:
    async def scenario() -> None:
        first = app.AsyncResult(new_id())
        last = app.AsyncResult(new_id(), parent=first)
        group = GroupResult(new_id(), [app.AsyncResult(new_id()), last], app=app)
        ids = [first.id, last.id, group.results[0].id]
        for task_id in ids:
            store(worker, task_id, 1)
        assert await aio.get(group, timeout=LONG) == [1, 1]
        await aio.forget(group)
        assert [await aio.state(task_id, app=app) for task_id in ids] == ["PENDING"] * 3
        assert last.state == "PENDING"
        by_id = new_id()
        store(worker, by_id, 1)
        await aio.forget(by_id, app=app)
        await aio.forget(EagerResult("e", 1, states.SUCCESS))
        assert await aio.state(by_id, app=app) == "PENDING"

    run(scenario)


# -- many, loops, processes ------------------------------------------------------------------------


def test_ten_thousand_coroutines_wait_on_one_thread(app: Celery, make_app: Apps) -> None:
    # Given four coroutines for each task. (Storing takes most of the test's time.)
    worker = make_app(result_backend_transport_options={"shards": 8, "confirm": False})
    ids = [new_id() for _ in range(2_500)]

    async def scenario() -> None:
        before = threading.active_count()
        for task_id in ids:
            app.backend.on_task_call(None, task_id)
        waiting = [
            asyncio.ensure_future(aio.get(task_id, timeout=4 * LONG, app=app))
            for task_id in ids
            for _ in range(4)
        ]
        await until_covered(app, *ids)
        # The follower, the inbox, keep-alive connections, and those for look-ups.
        assert threading.active_count() <= before + 4 + driver.MAX_THREADS

        def store_all() -> None:
            for number, task_id in enumerate(ids):
                store(worker, task_id, number)

        storing = asyncio.get_running_loop().run_in_executor(None, store_all)
        found = await asyncio.gather(*waiting)
        assert found == [number for number in range(len(ids)) for _ in range(4)]
        await storing

    run(scenario)


def test_no_blocking_call_runs_on_the_event_loop(app: Celery, worker: Celery) -> None:
    layout = app.backend.layout
    threads: Dict[str, Set[int]] = {}

    def spy(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            threads.setdefault(name, set()).add(threading.get_ident())
            return real(*args, **kwargs)

        setattr(owner, name, called)

    spy(layout.store, "read")
    spy(layout.store, "remove")
    spy(layout.inbox, "cover")
    spy(layout.connector, "open_once")
    others = new_id(), new_id()
    store(worker, others[0], 1)

    async def scenario() -> None:
        assert await aio.get(others[0], app=app, timeout=LONG) == 1
        assert await aio.state(others[0], app=app) == "SUCCESS"
        with pytest.raises(errors.WaitTimeout):
            await aio.get(others[1], app=app, timeout=0.5)
        await aio.forget(others[0], app=app)
        async for _ in aio.watch(timeout=0.5, app=app):
            pass

    run(scenario)
    assert set(threads) == {"read", "remove", "cover", "open_once"}
    assert threading.get_ident() not in set().union(*threads.values())


def test_a_slow_look_up_does_not_delay_other_waiters(
    make_app: Apps, worker: Celery, raw: Any
) -> None:
    # Given a shard that another consumer holds, and a task whose result is in it.
    options = {"shards": 8, "lookup_timeout": 8 * LONG}
    app = make_app(result_backend_transport_options=options)
    held, mine = new_id(), new_id()
    store(worker, held, 1)
    topology = app.backend.layout.inbox._declarations.topology
    channel = raw.channel()
    channel.basic_qos(0, 1, False)
    shard = topology.shard_queue(topology.shard(held)).name
    channel.basic_consume(shard, callback=lambda message: None)
    while topology.shard(mine) == topology.shard(held):
        mine = new_id()
    app.backend.on_task_call(None, mine)

    async def scenario() -> None:
        waiting = asyncio.ensure_future(aio.get(held, timeout=8 * LONG, app=app))
        # Then a waiter for another task gets its result as soon as it is stored.
        other = asyncio.ensure_future(aio.get(mine, timeout=8 * LONG, app=app))
        await until_covered(app, mine)
        store(worker, mine, 2)
        assert await other == 2
        assert not waiting.done()
        # And the blocked waiter gets its own when the shard is released.
        raw.close()
        assert await waiting == 1

    run(scenario)


def test_several_event_loops_wait_concurrently_and_in_sequence(app: Celery, worker: Celery) -> None:
    ids = [new_id() for _ in range(4)]
    found: Dict[int, Any] = {}

    def wait(number: int) -> None:
        # All loops wait for the same tasks.
        found[number] = run(lambda: aio.gather(*ids, timeout=LONG, app=app))

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for number, task_id in enumerate(ids):
        store(worker, task_id, number)
    for thread in threads:
        thread.join(4 * LONG)
    wait(3)
    assert found == {number: [0, 1, 2, 3] for number in range(4)}


def test_a_closed_loop_leaves_no_thread_behind(
    app: Celery, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., Any]
) -> None:
    monkeypatch.setattr(driver, "LINGER", 0.2)
    before = set(threading.enumerate())
    names = {"celery-results-aio-follow", "celery-results-aio-tap"}

    def running() -> Set[str]:
        return names & {each.name for each in threading.enumerate() if each not in before}

    loop = asyncio.new_event_loop()
    waiting = loop.create_task(aio.get(new_id(), app=app))
    watch = aio.watch(app=app)
    watching = loop.create_task(watch.__anext__())
    loop.run_until_complete(asyncio.sleep(0.1))
    assert running() == names
    # A loop that is closed while coroutines wait. (It warns when these are dropped.)
    tasks: List[Any] = [waiting, watching]
    for task in tasks:
        task._log_destroy_pending = False
    loop.close()
    eventually(lambda: not running())
    bridge._bridges.pop(loop)


def test_closing_the_backend_fails_waiters_and_later_waits_reconnect(
    app: Celery, worker: Celery
) -> None:
    async def scenario() -> None:
        task_id = new_id()
        waiting = [asyncio.ensure_future(aio.get(task_id, app=app)) for _ in range(2)]
        watching = asyncio.ensure_future(aio.watch(task_id, app=app).__anext__())
        everything = asyncio.ensure_future(aio.watch(app=app).__anext__())
        await until_covered(app, task_id)
        await until(lambda: any(t._link for t in list(app.backend.layout._taps)))
        await asyncio.get_running_loop().run_in_executor(None, app.backend.close)
        for each in (*waiting, watching, everything):
            with pytest.raises(errors.BackendUnavailable, match="closed"):
                await each
        store(worker, task_id, 1)
        assert await aio.get(task_id, app=app, timeout=LONG) == 1

    run(scenario)


def test_an_unreachable_broker_raises_an_error_instead_of_hanging(make_app: Apps) -> None:
    app = make_app(
        "amqp://guest:guest@127.0.0.1:1//",
        result_backend_transport_options={"retry_policy": {"max_retries": 1}},
    )

    async def scenario() -> None:
        with pytest.raises(errors.BackendUnavailable, match="cannot be reached"):
            await aio.get(new_id(), app=app)
        with pytest.raises(errors.BackendUnavailable, match="cannot be reached"):
            await aio.state(new_id(), app=app)
        with pytest.raises(errors.BackendUnavailable, match="cannot be reached"):
            await aio.watch(app=app).__anext__()

    run(scenario)


def test_waiters_survive_lost_connections(app: Celery, worker: Celery, node: rabbitmq.Node) -> None:
    async def scenario() -> None:
        ids = [new_id() for _ in range(3)]
        waiting = asyncio.ensure_future(aio.gather(*ids, timeout=4 * LONG, app=app))
        await until_covered(app, *ids)
        await asyncio.get_running_loop().run_in_executor(None, lose, node)
        store(worker, ids[0], 0)
        store(worker, ids[1], 1)
        await until(lambda: app.backend.layout.inbox.connections >= 2)
        store(worker, ids[2], 2)
        assert await waiting == [0, 1, 2]

    run(scenario)


def lose(node: rabbitmq.Node) -> None:
    """Make the broker close all connections."""
    node.ctl("close_all_connections", "test")


def test_a_forked_child_waits_on_a_loop_of_its_own(app: Celery, worker: Celery) -> None:
    before, after = new_id(), new_id()

    async def scenario() -> None:
        waiting = asyncio.ensure_future(aio.get(after, app=app, timeout=4 * LONG))
        await until_covered(app, after)
        store(worker, before, 1)
        assert await aio.get(before, app=app, timeout=LONG) == 1
        pid = os.fork()
        if not pid:
            status = 1
            try:
                # The parent's loop is not running here.
                status = 0 if asyncio.run(aio.get(before, app=app, timeout=LONG)) == 1 else 2
            finally:
                os._exit(status)
        _, status = await asyncio.get_running_loop().run_in_executor(None, os.waitpid, pid, 0)
        assert os.WEXITSTATUS(status) == 0
        store(worker, after, 2)
        assert await waiting == 2

    run(scenario)


def test_a_thread_that_cannot_be_started_fails_only_the_waiters_of_that_moment(
    app: Celery, worker: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_once(monkeypatch, driver)
    task_id = new_id()
    store(worker, task_id, 1)

    async def scenario() -> None:
        waiting = [aio.get(task_id, app=app, timeout=LONG) for _ in range(2)]
        for failure in await asyncio.gather(*waiting, return_exceptions=True):
            assert "can't start new thread" in str(failure)
        assert await aio.get(task_id, app=app, timeout=LONG) == 1

    run(scenario)


def test_a_wait_that_begins_as_the_idle_thread_ends_is_not_lost(
    app: Celery, worker: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "LINGER", 0.05)
    follow = driver.Driver._follow
    idle, resumed = threading.Event(), threading.Event()
    ending: List[threading.Thread] = []

    def followed(self: driver.Driver, follower: Any) -> None:
        if ending:
            ending[0].join(LONG)
        follow(self, follower)
        if not ending:
            ending.append(threading.current_thread())
            idle.set()
            assert resumed.wait(LONG)

    monkeypatch.setattr(driver.Driver, "_follow", followed)
    first, second = new_id(), new_id()
    store(worker, first, 1)

    async def scenario() -> None:
        assert await aio.get(first, app=app, timeout=LONG) == 1
        await until(idle.is_set)
        waiting = asyncio.ensure_future(aio.get(second, app=app, timeout=LONG))
        (of_loop,) = bridge._bridges[asyncio.get_running_loop()].values()
        await until(lambda: of_loop._driver.running)
        resumed.set()
        await asyncio.to_thread(store, worker, second, 2)
        assert await waiting == 2

    run(scenario)


@pytest.mark.parametrize("layout", ["shared", "per-task"])
def test_an_undecodable_result_fails_only_its_own_waiter(make_app: Apps, layout: str) -> None:
    options = {"layout": layout, **({"shards": 8} if layout == "shared" else {})}
    app = make_app(result_backend_transport_options=options)
    pickled = make_app(
        result_backend_transport_options=options,
        result_serializer="pickle",
        accept_content=["pickle"],
    )
    bad, good = new_id(), new_id()

    async def scenario() -> None:
        waiting = asyncio.ensure_future(aio.get(good, app=app, timeout=LONG))
        failing = asyncio.ensure_future(aio.get(bad, app=app, timeout=LONG))
        await asyncio.sleep(0.1)
        store(pickled, bad, 1)
        with pytest.raises(ContentDisallowed):
            await failing
        store(app, good, 2)
        assert await waiting == 2

    run(scenario)


# -- gevent and eventlet ---------------------------------------------------------------------------

#: Runs in a process of its own, since it patches everything.
GREEN = """
import sys
if sys.argv[3] == "gevent":
    from gevent import monkey, sleep, spawn
    monkey.patch_all()
else:
    import warnings
    warnings.simplefilter("ignore")
    import eventlet
    eventlet.monkey_patch()
    from eventlet import sleep, spawn
import asyncio, uuid
from celery import Celery
from celery_amqp_results import aio

app = Celery("green", broker=sys.argv[1], backend="amqp://")
app.conf.update(result_exchange=sys.argv[2], result_backend_transport_options={"shards": 8})
ids = [str(uuid.uuid4()) for _ in range(20)]
turns = 0
refused = []

def count():
    global turns
    while True:
        turns += 1
        sleep(0.01)

async def watch():
    return [meta["status"] async for meta in aio.watch(ids[0], app=app, timeout=60)]

def store():
    app.backend.store_result(ids[0], 1, "PROGRESS")
    # On its way it may be overtaken by the end, which counts more.
    while app.backend.get_state(ids[0]) != "PROGRESS":
        sleep(0.01)
    for task_id in ids:
        app.backend.store_result(task_id, task_id, "SUCCESS")

def second():
    coroutine = asyncio.sleep(0)
    try:
        asyncio.run(coroutine)
    except RuntimeError:
        refused.append(True)
    finally:
        coroutine.close()

async def main():
    waiting = [asyncio.create_task(aio.get(i, app=app, timeout=60)) for i in ids]
    watching = asyncio.create_task(watch())
    inbox = app.backend.layout.inbox
    while not all(inbox.covers(i) for i in ids):
        await asyncio.sleep(0.01)
    before = turns
    spawn(second)
    await asyncio.to_thread(store)
    assert await asyncio.gather(*waiting) == ids
    statuses = await watching
    assert statuses[-1] == "SUCCESS" and set(statuses) <= {"PROGRESS", "SUCCESS"}, statuses
    # Other greenlets have run meanwhile.
    while turns == before or not refused:
        await asyncio.sleep(0.01)

spawn(count)
asyncio.run(main())
app.backend.close()
"""


@pytest.mark.parametrize("kind", ["gevent", "eventlet"])
def test_an_event_loop_runs_beside_greenlets(app: Celery, amqp_url: str, kind: str) -> None:
    # Importing eventlet here would patch nothing, but eventlet warns.
    if importlib.util.find_spec(kind) is None:
        pytest.skip(f"{kind} is not installed")
    done = subprocess.run(
        [sys.executable, "-c", GREEN, amqp_url, app.conf.result_exchange, kind],
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr


AT_EXIT = """
import asyncio, atexit, sys
from celery import Celery
from celery_amqp_results import aio

app = Celery("exit", broker=sys.argv[1], backend="amqp://")
app.conf.result_exchange = sys.argv[2]

async def ask():
    try:
        await asyncio.wait_for(aio.get_meta("some-id", app=app), float(sys.argv[3]))
    except Exception as exc:
        print(type(exc).__name__, exc, flush=True)

# Registered first, so called after the interpreter has stopped its threads.
atexit.register(lambda: asyncio.run(ask()))
"""


def test_asking_when_the_interpreter_ends_raises_an_error(app: Celery, amqp_url: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT, amqp_url, app.conf.result_exchange, str(PATIENCE / 2)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.stdout.startswith("RuntimeError"), done
