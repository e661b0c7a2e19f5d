"""Waiting for tasks whose parents fail, and the last call of ``on_interval``."""

from __future__ import annotations

import asyncio
from typing import Any, Callable, List

import pytest
from celery import Celery, states
from celery.exceptions import ChordError, TaskRevokedError, TimeoutError
from celery.result import AsyncResult, GroupResult

from celery_amqp_results import aio
from tests.broker.helpers import LONG, Waiting, new_id, until_watched
from tests.conftest import Apps, eventually

#: Longer than any test takes: what happens earlier does not happen because of the interval.
NEVER = 600.0


def chord_of(app: Celery) -> AsyncResult:
    """The result of a body whose header has one task."""
    header = GroupResult(new_id(), [app.AsyncResult(new_id())], app=app)
    return app.AsyncResult(new_id(), parent=header)


def fail_chord(app: Celery, body: AsyncResult) -> None:
    (member,) = body.parent.results
    app.backend.store_result(member.id, KeyError("header"), states.FAILURE)
    app.backend.store_result(body.id, ChordError("Dependency raised"), states.FAILURE)


def test_waiting_for_a_failed_chord_raises_the_exception_of_its_header(
    app: Celery, make_app: Apps
) -> None:
    body = chord_of(app)
    waiting = Waiting(lambda: body.get(timeout=LONG, interval=NEVER))
    until_watched(app, body.id, eventually)
    fail_chord(make_app(), body)
    with pytest.raises(KeyError, match="header"):
        waiting.result()


def test_a_failed_chord_raises_its_own_error_where_parents_are_not_followed(app: Celery) -> None:
    body = chord_of(app)
    fail_chord(app, body)
    with pytest.raises(ChordError):
        body.get(timeout=LONG, follow_parents=False)
    assert isinstance(body.get(timeout=LONG, propagate=False), ChordError)


def test_waiting_for_a_large_chord_asks_for_its_header_in_one_pass(make_app: Apps) -> None:
    # Given a chord of 300 tasks, sent by a process that waits for results, of which none has ended
    app = make_app(result_backend_transport_options={"shards": 8})
    with pytest.raises(TimeoutError):
        app.AsyncResult(new_id()).get(timeout=0.5)
    members = [app.AsyncResult(new_id()) for _ in range(300)]
    for member in members:
        app.backend.on_task_call(None, member.id)
    body = app.AsyncResult(new_id(), parent=GroupResult(new_id(), members, app=app))
    # When it is waited for, over many intervals
    with pytest.raises(TimeoutError):
        body.get(timeout=3.0, interval=0.25)
    # Then Celery's own question before the wait cost a barrier for each member at most, each
    # interval cost one for all of them, and hardly any shard was read.
    metrics = app.backend.metrics()
    assert metrics.shards_read <= 2 * 8
    assert metrics.barriers <= 300 + 30


@pytest.mark.parametrize("timeout", [0, LONG])
def test_a_coroutine_that_waits_for_a_failed_chord_gets_the_exception_of_its_header(
    app: Celery, make_app: Apps, timeout: float
) -> None:
    body = chord_of(app)
    fail_chord(make_app(), body)

    async def main() -> None:
        with pytest.raises(KeyError, match="header"):
            await aio.get(body, timeout=timeout)
        body._cache = None
        with pytest.raises(ChordError):
            await aio.get(body, timeout=timeout, follow_parents=False)

    asyncio.run(main())


def _get(result: AsyncResult, **kwargs: Any) -> Any:
    return result.get(**kwargs)


def _wait_for(result: AsyncResult, **kwargs: Any) -> Any:
    return result.backend.wait_for(result.id, **kwargs)


def _join(result: AsyncResult, **kwargs: Any) -> Any:
    return GroupResult(new_id(), [result], app=result.app).join(**kwargs)


def _join_native(result: AsyncResult, **kwargs: Any) -> Any:
    return GroupResult(new_id(), [result], app=result.app).join_native(**kwargs)


def _get_many(result: AsyncResult, **kwargs: Any) -> Any:
    return list(result.backend.get_many([result.id], **kwargs))


WAITS: List[Callable[..., Any]] = [_get, _wait_for, _join, _join_native, _get_many]


@pytest.mark.parametrize("wait", WAITS)
def test_on_interval_is_called_once_more_after_the_final_state(
    app: Celery, make_app: Apps, wait: Callable[..., Any]
) -> None:
    result, calls = app.AsyncResult(new_id()), []
    waiting = Waiting(
        lambda: wait(result, timeout=LONG, interval=NEVER, on_interval=lambda: calls.append(1))
    )
    until_watched(app, result.id, eventually)
    assert not calls
    make_app().backend.store_result(result.id, 1, states.SUCCESS)
    waiting.result()
    assert calls


@pytest.mark.parametrize("wait", WAITS)
def test_the_error_of_the_last_on_interval_ends_the_wait(
    app: Celery, wait: Callable[..., Any]
) -> None:
    def stop() -> None:
        raise InterruptedError("stop")

    result = app.AsyncResult(new_id())
    app.backend.store_result(result.id, 1, states.SUCCESS)
    with pytest.raises(InterruptedError, match="stop"):
        wait(result, timeout=LONG, interval=NEVER, on_interval=stop)


def group_after(app: Celery, parent: Any) -> GroupResult:
    return GroupResult(
        new_id(), [app.AsyncResult(new_id()), app.AsyncResult(new_id())], parent=parent, app=app
    )


def test_a_group_behind_a_failed_task_raises_that_failure(app: Celery, make_app: Apps) -> None:
    first = app.AsyncResult(new_id())
    group = group_after(app, app.AsyncResult(new_id(), parent=first))
    waiting = Waiting(lambda: group.get(timeout=LONG, interval=NEVER))
    until_watched(app, group.parent.id, eventually)
    make_app().backend.store_result(first.id, 1, states.SUCCESS)
    make_app().backend.store_result(group.parent.id, KeyError("second"), states.FAILURE)
    with pytest.raises(KeyError, match="second"):
        waiting.result()


def test_a_group_behind_a_revoked_task_raises_that(app: Celery) -> None:
    group = group_after(app, app.AsyncResult(new_id()))
    app.backend.mark_as_revoked(group.parent.id, "gone")
    for timeout in (0, LONG):
        with pytest.raises(TaskRevokedError):
            group_after(app, app.AsyncResult(group.parent.id)).get(timeout=timeout)


def test_a_group_waits_for_its_members_alone_while_its_parents_have_not_failed(
    app: Celery,
) -> None:
    group = group_after(app, app.AsyncResult(new_id()))
    with pytest.raises(TimeoutError, match="2 of 2"):
        group.get(timeout=0.2)
    for number, member in enumerate(group.results):
        app.backend.store_result(member.id, number, states.SUCCESS)
    assert group.get(timeout=LONG) == [0, 1]
    assert group.get(timeout=0) == [0, 1]


def test_a_coroutine_waiting_for_a_group_behind_a_failed_task_gets_that_failure(
    app: Celery,
) -> None:
    group = group_after(app, app.AsyncResult(new_id()))
    app.backend.store_result(group.parent.id, KeyError("first"), states.FAILURE)

    async def main() -> None:
        for timeout in (0, LONG):
            with pytest.raises(KeyError, match="first"):
                await aio.get(group, timeout=timeout)
        with pytest.raises(aio.WaitTimeout):
            await aio.get(group, timeout=0, follow_parents=False)

    asyncio.run(main())
