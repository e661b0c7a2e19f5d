"""Coroutines and results whose bodies have queues of their own."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any, Callable, List

import pytest
from celery import Celery, states
from celery.result import GroupResult

from celery_amqp_results import aio, errors
from celery_amqp_results.aio import driver, targets
from tests.broker.helpers import LONG, held, new_id
from tests.conftest import Apps


@pytest.fixture(params=[None, "zlib"])
def app(request: pytest.FixtureRequest, make_app: Apps) -> Celery:
    # zlib would make the text small enough.
    return make_app("amqp://?inline_limit=1024", result_compression=request.param)


def incompressible() -> str:
    return "".join(new_id() for _ in range(200))


@pytest.fixture
def threads(app: Celery, monkeypatch: pytest.MonkeyPatch) -> List[threading.Thread]:
    """The threads on which bodies are fetched."""
    used: List[threading.Thread] = []
    layout = app.backend.layout
    fetch = layout.fetch

    def fetching(*args: Any) -> Any:
        used.append(threading.current_thread())
        return fetch(*args)

    monkeypatch.setattr(layout, "fetch", fetching)
    return used


def store(app: Celery) -> Any:
    task_id, value = new_id(), incompressible()
    app.backend.store_result(task_id, value, states.SUCCESS)
    return task_id, value


def test_coroutines_read_large_results_without_blocking_the_event_loop(
    app: Celery, threads: List[threading.Thread]
) -> None:
    task_id, value = store(app)
    other, failed = store(app)[0], new_id()
    app.backend.store_result(failed, KeyError(incompressible()), states.FAILURE)

    async def main() -> None:
        assert await aio.get(task_id, timeout=LONG, app=app) == value
        assert await aio.get(app.AsyncResult(task_id), timeout=LONG) == value
        assert await aio.get(task_id, timeout=0, app=app) == value
        assert (await aio.get_meta(task_id, app=app))["result"] == value
        assert await aio.state(task_id, app=app) == states.SUCCESS
        group = GroupResult(new_id(), [app.AsyncResult(i) for i in (task_id, other)], app=app)
        assert (await aio.get(group, timeout=LONG))[0] == value
        with pytest.raises(KeyError):
            await aio.get(failed, timeout=LONG, app=app)
        metas = [meta async for meta in aio.watch(task_id, app=app, timeout=LONG)]
        assert [meta["result"] for meta in metas] == [value]
        ended = [pair async for pair in aio.as_completed(task_id, app=app, timeout=LONG)]
        assert ended == [(task_id, value)]

    asyncio.run(main())
    assert threads
    assert threading.main_thread() not in threads


def test_a_coroutine_watching_everything_is_given_large_results(
    app: Celery, threads: List[threading.Thread]
) -> None:
    stored: List[Any] = []

    async def main() -> None:
        async with aio.watch(app=app, states=states.SUCCESS) as metas:
            asking = asyncio.ensure_future(metas.__anext__())
            while not asking.done():
                # Until the watch stands.
                stored.append(await asyncio.get_running_loop().run_in_executor(None, store, app))
                await asyncio.wait([asking], timeout=0.2)
            meta = asking.result()
            assert (meta["task_id"], meta["result"]) in stored

    asyncio.run(main())
    assert threading.main_thread() not in threads


def test_a_large_result_whose_body_is_gone_is_expired_for_coroutines_too(app: Celery) -> None:
    task_id, _ = store(app)
    state = app.backend.layout.poll((task_id,))[task_id]
    assert state is not None
    with app.connection_for_write() as connection:
        connection.default_channel.queue_delete(state.body_queue)

    async def main() -> None:
        assert await aio.state(task_id, app=app) == states.PENDING
        with pytest.raises(errors.ResultExpired):
            await aio.get(task_id, timeout=LONG, app=app)

    asyncio.run(main())


def test_a_slow_fetch_holds_up_nobody_else(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, quick = store(app)[0], new_id()
    app.backend.store_result(quick, 1, states.SUCCESS)
    fetching, go_on = threading.Event(), threading.Event()
    layout = app.backend.layout
    fetch = layout.fetch

    def wait_and_fetch(*args: Any) -> Any:
        fetching.set()
        assert go_on.wait(LONG)
        return fetch(*args)

    monkeypatch.setattr(layout, "fetch", wait_and_fetch)
    reader = threading.Thread(target=lambda: app.AsyncResult(slow).get(timeout=LONG))
    reader.start()
    assert fetching.wait(LONG)
    assert app.AsyncResult(quick).get(timeout=LONG) == 1
    go_on.set()
    reader.join(LONG)
    assert not reader.is_alive()


async def collected(items: Any) -> List[Any]:
    return [item async for item in items]


@pytest.mark.parametrize(
    "wait",
    [
        lambda result: aio.get(result, timeout=1),
        lambda result: aio.gather(result, timeout=1),
        lambda result: collected(aio.as_completed(result, timeout=1)),
        lambda result: collected(aio.watch(result, timeout=1)),
    ],
    ids=["get", "gather", "as_completed", "watch"],
)
def test_the_timeout_of_a_coroutine_limits_the_read_of_a_large_result(
    make_app: Apps, amqp_url: str, wait: Callable[[Any], Any]
) -> None:
    app = make_app("amqp://?inline_limit=1024&lookup_timeout=60")
    task_id, _ = store(app)
    state = app.backend.layout.poll((task_id,))[task_id]
    assert state is not None

    async def main() -> None:
        with pytest.raises(aio.WaitTimeout):
            await wait(app.AsyncResult(task_id))

    with held(amqp_url, str(state.body_queue)):
        started = time.monotonic()
        asyncio.run(main())
        assert time.monotonic() - started < 30


def test_a_coroutine_is_timed_out_while_all_threads_are_busy(app: Celery) -> None:
    task_id, _ = store(app)
    state = app.backend.layout.poll((task_id,))[task_id]
    assert state is not None
    go_on = threading.Event()
    busy = [driver.threads().submit(go_on.wait, LONG) for _ in range(driver.MAX_THREADS)]

    async def main() -> None:
        with pytest.raises(aio.WaitTimeout):
            await targets.decoded_state(app.backend, state, time.monotonic() + 0.1)

    try:
        asyncio.run(main())
        assert not any(each.done() for each in busy)
    finally:
        go_on.set()
