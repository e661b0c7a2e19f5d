"""Waiting for tasks whose parents fail, and the last call of ``on_interval``."""

from __future__ import annotations

import asyncio
from typing import Any, Callable, Dict, List

import pytest
from celery import Celery, states
from celery.exceptions import ChordError, TaskRevokedError, TimeoutError
from celery.result import AsyncResult, GroupResult

from celery_amqp_results import aio, errors
from tests.broker.helpers import LONG, Waiting, new_id, until_watched
from tests.conftest import Apps, eventually
from tools import rabbitmq
from tools.proxy import Proxy

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


@pytest.mark.parametrize("asked", [{"follow_parents": False}, {"propagate": False}])
def test_parents_that_celery_does_not_ask_for_are_not_read(
    app: Celery, asked: Dict[str, bool]
) -> None:
    members = [app.AsyncResult(new_id()) for _ in range(100)]
    body = app.AsyncResult(new_id(), parent=GroupResult(new_id(), members, app=app))
    with pytest.raises(TimeoutError):
        body.get(timeout=1.0, interval=0.05, **asked)
    metrics = app.backend.metrics()
    assert metrics.remembered + metrics.looked_up < 100


class CountedParent(AsyncResult):
    """A result that counts how often Celery has asked for it."""

    asked = 0

    def maybe_throw(self, *args: Any, **kwargs: Any) -> Any:
        self.asked += 1
        return super().maybe_throw(*args, **kwargs)


def test_a_wait_for_a_task_with_a_parent_survives_an_outage(
    make_app: Apps, node: rabbitmq.Node
) -> None:
    with Proxy(node.amqp_port) as proxy:
        # Given a process that waits for the second task of a chain, and looks up nothing for long
        app = make_app(
            broker_url=proxy.url(node.url()),
            result_backend_transport_options={"shards": 8, "retry_policy": {"max_retries": 0}},
        )
        parent = CountedParent(new_id(), app=app)
        result = app.AsyncResult(new_id(), parent=parent)
        waiting = Waiting(lambda: result.get(timeout=LONG, interval=0.05))
        until_watched(app, result.id, eventually)
        # When the broker is away, and Celery goes on to ask for the parent
        proxy.refuse()
        before = parent.asked
        eventually(lambda: parent.asked > before + 5 or not waiting.thread.is_alive())
        other = make_app()
        other.backend.store_result(parent.id, 1, states.SUCCESS)
        other.backend.store_result(result.id, 2, states.SUCCESS)
        proxy.resume()
        # Then the wait ends as that for any other task
        assert waiting.result() == 2


def test_a_failed_look_up_of_parents_does_not_replace_the_error_of_a_task(
    app: Celery, make_app: Apps, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> None:
        raise errors.LookupTimeout("no answer")

    body = chord_of(app)
    waiting = Waiting(lambda: body.get(timeout=LONG))
    until_watched(app, body.id, eventually)
    monkeypatch.setattr(app.backend.layout, "poll", fail)
    make_app().backend.store_result(body.id, ChordError("Dependency raised"), states.FAILURE)
    with pytest.raises(ChordError):
        waiting.result()
    assert "no answer" in caplog.text


def test_the_failure_of_a_header_that_comes_after_that_of_its_body_is_raised(
    app: Celery, make_app: Apps
) -> None:
    body, other = chord_of(app), make_app()
    (member,) = body.parent.results

    def store_header(meta: Dict[str, Any]) -> None:
        other.backend.store_result(member.id, KeyError("header"), states.FAILURE)

    waiting = Waiting(lambda: body.get(timeout=LONG, interval=NEVER, on_message=store_header))
    until_watched(app, body.id, eventually)
    other.backend.store_result(body.id, ChordError("Dependency raised"), states.FAILURE)
    with pytest.raises(KeyError, match="header"):
        waiting.result()


def test_a_parent_with_an_unreadable_value_does_not_end_a_wait(make_app: Apps) -> None:
    app = make_app()
    pickling = make_app(result_serializer="pickle", result_accept_content=["pickle", "json"])
    first = app.AsyncResult(new_id())
    parent = app.AsyncResult(new_id(), parent=first)
    result = app.AsyncResult(new_id(), parent=parent)
    waiting = Waiting(lambda: result.get(timeout=LONG, interval=NEVER))
    until_watched(app, result.id, eventually)
    app.backend.store_result(first.id, "first", states.SUCCESS)
    eventually(lambda: first._cache)
    pickling.backend.store_result(parent.id, {1, 2}, states.SUCCESS)
    app.backend.store_result(result.id, "last", states.SUCCESS)
    assert waiting.result() == "last"
    assert first.get(timeout=0) == "first"


def test_parents_are_read_within_the_timeout_of_the_wait(
    make_app: Apps, node: rabbitmq.Node
) -> None:
    with Proxy(node.amqp_port) as proxy:
        app = make_app(
            broker_url=proxy.url(node.url()),
            result_backend_transport_options={"shards": 8, "lookup_timeout": 20 * LONG},
        )
        body = chord_of(app)
        waiting = Waiting(lambda: body.get(timeout=LONG / 4, on_message=lambda _: proxy.stall()))
        until_watched(app, body.id, eventually)
        make_app().backend.store_result(body.id, ChordError("Dependency raised"), states.FAILURE)
        with pytest.raises(ChordError):
            waiting.result()
        proxy.resume()


def test_waiting_for_a_large_chord_asks_for_its_header_in_one_pass(make_app: Apps) -> None:
    # Given a chord of 300 tasks, sent by a process that waits for results, of which none has ended
    app = make_app(result_backend_transport_options={"shards": 8})
    first = new_id()
    waiting = Waiting(lambda: app.AsyncResult(first).get(timeout=LONG))
    until_watched(app, first, eventually)
    app.backend.store_result(first, 1, states.SUCCESS)
    assert waiting.result() == 1

    def sends_are_followed() -> bool:
        task_id, before = new_id(), app.backend.metrics().shards_read
        app.backend.on_task_call(None, task_id)
        return bool(app.AsyncResult(task_id).state and app.backend.metrics().shards_read == before)

    eventually(sends_are_followed)
    read = app.backend.metrics().shards_read
    members = [app.AsyncResult(new_id()) for _ in range(300)]
    for member in members:
        app.backend.on_task_call(None, member.id)
    body = app.AsyncResult(new_id(), parent=GroupResult(new_id(), members, app=app))
    # When it is waited for, over many intervals
    with pytest.raises(TimeoutError):
        body.get(timeout=3.0, interval=0.25)
    # Then Celery's own question before the wait cost a barrier for each member at most, the
    # intervals cost none, and hardly any shard was read.
    metrics = app.backend.metrics()
    assert metrics.shards_read - read <= 2 * 8
    assert metrics.barriers <= 300 + 50


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
