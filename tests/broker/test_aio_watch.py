"""Watching from coroutines: states as they happen, of given tasks or of all tasks."""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import Any, List, Tuple

import pytest
from celery import Celery, states
from celery.result import EagerResult, GroupResult
from kombu.exceptions import ContentDisallowed

from celery_amqp_results import aio, errors
from celery_amqp_results.aio import bridge, streams
from tests.broker.helpers import LONG, new_id, until_stored
from tests.broker.test_aio import lose, run, store, until, until_covered, worker
from tests.conftest import Apps
from tools import rabbitmq

__all__ = ("worker",)


def brief(meta: Any) -> Tuple[str, Any]:
    return meta["status"], meta["result"]


def report(app: Celery, task_id: str, steps: int) -> None:
    store(app, task_id, None, states.STARTED)
    for step in range(steps):
        store(app, task_id, {"current": step}, "PROGRESS")
    store(app, task_id, steps)


async def until_tapped(app: Celery, count: int = 1) -> None:
    taps = app.backend.layout._taps
    await until(lambda: sum(tap._link is not None for tap in list(taps)) >= count)


@pytest.mark.parametrize("layout", ["shared", "per-task"])
def test_the_current_state_comes_first_then_each_new_state(make_app: Apps, layout: str) -> None:
    options = {"layout": layout, **({"shards": 8} if layout == "shared" else {})}
    worker, app = (make_app(result_backend_transport_options=options) for _ in range(2))
    task_id = new_id()
    store(worker, task_id, None, states.STARTED)
    store(worker, task_id, {"current": 1}, "PROGRESS")
    until_stored(worker)

    async def scenario() -> None:
        found = []
        async for meta in aio.watch(task_id, timeout=LONG, app=app):
            found.append(brief(meta))
            assert meta["task_id"] == task_id
            if meta["status"] == "PROGRESS":
                step = meta["result"]["current"]
                last = step == 4
                await asyncio.to_thread(
                    store,
                    worker,
                    task_id,
                    ValueError("end") if last else {"current": step + 1},
                    states.FAILURE if last else "PROGRESS",
                )
        assert found[:-1] == [("PROGRESS", {"current": step}) for step in range(1, 5)]
        assert (found[-1][0], repr(found[-1][1])) == ("FAILURE", "ValueError('end')")

    run(scenario)


def test_a_second_watcher_of_a_task_also_gets_its_current_state(
    app: Celery, worker: Celery
) -> None:
    async def scenario() -> None:
        task_id = new_id()
        early = aio.watch(task_id, timeout=LONG, app=app)
        first = asyncio.ensure_future(early.__anext__())
        await until_covered(app, task_id)
        for step in range(3):
            store(worker, task_id, {"current": step}, "PROGRESS")
        assert brief(await first) == ("PROGRESS", {"current": 0})
        seen = [brief(await early.__anext__()) for _ in range(2)]
        assert seen[-1] == ("PROGRESS", {"current": 2})
        late = aio.watch(task_id, timeout=LONG, app=app)
        assert brief(await late.__anext__()) == ("PROGRESS", {"current": 2})
        store(worker, task_id, 3)
        for watch in (early, late):
            assert [brief(meta) async for meta in watch] == [("SUCCESS", 3)]

    run(scenario)


def test_groups_and_finished_tasks_can_be_watched(app: Celery, worker: Celery) -> None:
    async def scenario() -> None:
        results = [app.AsyncResult(new_id()) for _ in range(3)]
        group = GroupResult(new_id(), results[:2], app=app)
        eager = EagerResult(new_id(), "eager", states.SUCCESS)
        for result in results:
            report(worker, result.id, 2)
        assert await aio.get(results[0], timeout=LONG) == 2
        target = [group, results[2].id, eager]
        found = [meta async for meta in aio.watch(target, timeout=LONG, app=app)]
        assert sorted(meta["task_id"] for meta in found) == sorted(
            [eager.id, *(result.id for result in results)]
        )
        assert {meta["status"] for meta in found} == {"SUCCESS"}
        wanted = aio.watch(target, states=["FAILURE"], timeout=LONG, app=app)
        assert [meta async for meta in wanted] == []
        assert [meta async for meta in aio.watch([], timeout=0)] == []

    run(scenario)


def test_a_cancelled_or_timed_out_request_loses_no_state(app: Celery, worker: Celery) -> None:
    # A server does this when it sends a heartbeat while nothing happens.
    async def scenario() -> None:
        task_id, found = new_id(), []
        watch = aio.watch(task_id, timeout=4 * LONG, app=app)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(watch.__anext__(), 0.02)
        await until_covered(app, task_id)
        expected = [("PROGRESS", {"current": step}) for step in range(100)]
        for name, result in [*expected, ("SUCCESS", "end")]:
            store(worker, task_id, result, name)
        while True:
            try:
                # Short enough for most requests to time out, some just as a state arrives.
                found.append(brief(await asyncio.wait_for(watch.__anext__(), 0.0002)))
            except asyncio.TimeoutError:
                continue
            except StopAsyncIteration:
                break
        assert found == [*expected, ("SUCCESS", "end")]

    run(scenario)


def test_every_way_to_end_a_watch_releases_its_resources(app: Celery, worker: Celery) -> None:
    async def scenario() -> None:
        task_id = new_id()
        store(worker, task_id, None, states.STARTED)
        until_stored(worker)
        inbox = app.backend.layout.inbox
        its_bridge = bridge.bridge_of(app.backend)

        async def gone() -> None:
            await until(lambda: not its_bridge._subscribers and task_id not in inbox._waiters)

        # Leaving the loop,
        async for meta in aio.watch(task_id, app=app):
            assert meta["status"] == "STARTED"
            break
        gc.collect()
        await gone()
        # a block that ends,
        async with aio.watch(task_id, app=app) as watch:
            await watch.__anext__()
            assert its_bridge._subscribers
        assert not its_bridge._subscribers
        with pytest.raises(StopAsyncIteration):
            await watch.__anext__()
        await watch.aclose()
        # dropping the watch on another thread,
        watch = aio.watch(task_id, app=app)
        await watch.__anext__()
        kept = [watch]
        del watch
        thread = threading.Thread(target=kept.clear)
        thread.start()
        thread.join()
        await gone()
        # closing it while another coroutine waits for its next state,
        watch = aio.watch(task_id, app=app)
        await watch.__anext__()
        asking = asyncio.ensure_future(watch.__anext__())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="another coroutine"):
            await watch.__anext__()
        await watch.aclose()
        with pytest.raises(StopAsyncIteration):
            await asking
        # and the timeout.
        with pytest.raises(errors.WaitTimeout, match="the task is not ready"):
            async for _ in aio.watch(task_id, timeout=0.1, app=app):
                pass
        for timeout in (0, -1):
            watch = aio.watch(task_id, timeout=timeout, app=app)
            assert (await watch.__anext__())["status"] == "STARTED"
            with pytest.raises(errors.WaitTimeout):
                await watch.__anext__()
        await gone()

    run(scenario)


def test_a_watch_belongs_to_one_loop(app: Celery) -> None:
    task_id = new_id()
    store(app, task_id, None, states.STARTED)
    until_stored(app)
    watch = aio.watch(task_id, app=app)
    run(watch.__anext__)
    with pytest.raises(RuntimeError, match="another event loop"):
        run(watch.__anext__)
    run(watch.aclose)


def test_unread_states_are_bounded_and_the_final_state_is_kept(
    app: Celery, worker: Celery, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(streams, "MAX_BUFFERED", 10)

    async def scenario() -> None:
        ended, running = new_id(), new_id()
        watch = aio.watch([ended, running], timeout=LONG, app=app)
        first = asyncio.ensure_future(watch.__anext__())
        await until_covered(app, ended, running)
        store(worker, running, None, states.STARTED)
        await first
        store(worker, ended, "end")
        for step in range(50):
            store(worker, running, {"current": step}, "PROGRESS")
        feed = watch._feed
        assert feed is not None
        await until(lambda: feed.left_out)
        store(worker, running, 50)
        found = [brief(meta) async for meta in watch]
        assert ("SUCCESS", "end") in found
        assert found[-1] == ("SUCCESS", 50)
        # At most ten are buffered; some more may arrive while they are read.
        assert len(found) < 40
        steps = [result["current"] for state, result in found if state == "PROGRESS"]
        assert steps == sorted(set(steps))

    run(scenario)
    assert "the oldest are left out" in caplog.text


def test_watchers_of_everything_share_one_connection(
    app: Celery, worker: Celery, node: rabbitmq.Node
) -> None:
    async def scenario() -> None:
        ids = [new_id() for _ in range(3)]
        everything: List[List[Any]] = [[], []]
        failures: List[Any] = []

        async def watch(found: List[Any], **kwargs: Any) -> None:
            async for meta in aio.watch(app=app, **kwargs):
                found.append((meta["task_id"], meta["status"]))
                if meta["task_id"] == "end":
                    return

        watching = [asyncio.ensure_future(watch(found)) for found in everything]
        failing = asyncio.ensure_future(watch(failures, states="FAILURE"))
        await until_tapped(app, 2)
        # The two watchers of the same states share one connection.
        assert len(bridge.bridge_of(app.backend)._taps) == 2
        for task_id in ids:
            report(worker, task_id, 2)
            store(worker, task_id, None, states.STARTED)
        # Then the connections are lost; states published afterwards are seen again.
        await until(lambda: all(len(found) == 12 for found in everything))
        taps = list(app.backend.layout._taps)
        before = [tap._link for tap in taps]
        await asyncio.get_running_loop().run_in_executor(None, lose, node)
        await until(lambda: all(tap._link not in (None, *before) for tap in taps))
        store(worker, "end", ValueError("end"), states.FAILURE)
        await asyncio.gather(*watching, failing)
        expected = [
            (task_id, state)
            for task_id in ids
            for state in ("STARTED", "PROGRESS", "PROGRESS", "SUCCESS")
        ]
        assert everything == [[*expected, ("end", "FAILURE")]] * 2
        assert failures == [("end", "FAILURE")]

    run(scenario)


def test_watching_everything_skips_unreadable_states_and_cleans_up(
    app: Celery, make_app: Apps, caplog: pytest.LogCaptureFixture
) -> None:
    pickled = make_app(result_serializer="pickle", accept_content=["pickle"])

    async def scenario() -> None:
        assert [meta async for meta in aio.watch(timeout=0.2, app=app)] == []
        taps = app.backend.layout._taps
        await until(lambda: not any(tap._link for tap in list(taps)))
        watch = aio.watch(app=app)
        first = asyncio.ensure_future(watch.__anext__())
        await until_tapped(app)
        store(pickled, "pickled", 1)
        store(app, "plain", 2)
        assert (await first)["task_id"] == "plain"
        await watch.aclose()
        assert not bridge.bridge_of(app.backend)._taps
        with pytest.raises(ContentDisallowed):
            async for _ in aio.watch("pickled", timeout=LONG, app=app):
                pass

    run(scenario)
    assert "left out the SUCCESS of pickled" in caplog.text


def test_unwatchable_arguments_are_refused_immediately(app: Celery, make_app: Apps) -> None:
    with pytest.raises(TypeError, match="17 cannot be watched"):
        aio.watch([17], app=app)
    with pytest.raises(ValueError, match="states is empty"):
        aio.watch("an id", states=(), app=app)
    per_task = make_app(result_backend_transport_options={"layout": "per-task"})
    with pytest.raises(errors.Unsupported, match="per-task"):
        aio.watch(app=per_task)
