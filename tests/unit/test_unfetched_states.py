"""Watching large results whose bodies cannot be fetched for the moment."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import Any, List, Optional

import amqp
import pytest
from celery import Celery, states

from celery_amqp_results import aio, errors
from celery_amqp_results.aio import streams
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.toolkit.retry import time_left
from celery_amqp_results.waiting.progress import Update
from celery_amqp_results.waiting.watch import watch_everything

LARGE = StateMessage(
    "large", states.SUCCESS, 1, b"", "application/json", "utf-8", body_queue="large.queue"
)
SMALL = StateMessage(
    "small", states.SUCCESS, 2, b'{"status": "SUCCESS", "result": 2}', "application/json", "utf-8"
)
MOMENTARY = [
    errors.LookupTimeout("the broker does not answer"),
    errors.BackendUnavailable("the broker is restarting"),
]


def refusal() -> errors.BackendUnavailable:
    refused = errors.BackendUnavailable("the broker refuses us")
    refused.__cause__ = amqp.AccessRefused("no permission")
    return refused


@pytest.fixture
def app() -> Celery:
    return Celery("watching", broker="amqp://", backend="amqp://", set_as_current=False)


@pytest.fixture
def failures(app: Celery, monkeypatch: pytest.MonkeyPatch) -> List[Exception]:
    """The errors of the next fetches; after them a body is there."""
    found: List[Exception] = []

    def fetch(state: StateMessage, deadline: Optional[float] = None) -> StateMessage:
        if found:
            raise found.pop(0)
        body = b'{"status": "SUCCESS", "result": 1}'
        return dataclasses.replace(state, body=body, body_queue=None)

    monkeypatch.setattr(app.backend.layout, "fetch", fetch)
    return found


class FakeTap:
    """A tap that brings two states, and ends when the backend is closed."""

    def __init__(self) -> None:
        self._steps = [[LARGE, SMALL]]

    def __enter__(self) -> FakeTap:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def step(self, deadline: object, pause: float) -> List[StateMessage]:
        if not self._steps:
            raise errors.BackendUnavailable("the result backend was closed while watching")
        return self._steps.pop()


def arrived(iterator: Any, *messages: StateMessage) -> Any:
    """Return an iterator that needs no broker, since these states have arrived already."""
    iterator._feed = streams._Feed(iterator._ids, iterator._wanted)
    for message in messages:
        iterator._feed.take(Update(message.id, [message], message))
    return iterator


@pytest.mark.parametrize("failure", MOMENTARY)
def test_a_watch_of_everything_goes_on_after_a_body_that_cannot_be_fetched(
    app: Celery,
    failures: List[Exception],
    failure: Exception,
    caplog: pytest.LogCaptureFixture,
) -> None:
    failures.append(failure)
    tap: Any = FakeTap()
    watch = watch_everything(tap, app.backend.reader.decode, None)
    assert next(watch)["task_id"] == "small"
    with pytest.raises(errors.BackendUnavailable, match="closed"):
        next(watch)
    assert f"left out the SUCCESS of large: {failure}" in caplog.text


@pytest.mark.parametrize("failure", MOMENTARY)
def test_a_coroutine_that_watches_everything_goes_on_as_well(
    app: Celery,
    failures: List[Exception],
    failure: Exception,
    caplog: pytest.LogCaptureFixture,
) -> None:
    failures.append(failure)

    async def scenario() -> None:
        watch = arrived(aio.watch(app=app), LARGE, SMALL)
        assert (await watch.__anext__())["task_id"] == "small"

    asyncio.run(scenario())
    assert f"left out the SUCCESS of large: {failure}" in caplog.text


def test_a_watch_of_everything_just_ends_if_its_timeout_ends_during_a_fetch(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(state: StateMessage, deadline: Optional[float]) -> StateMessage:
        time.sleep(time_left(deadline, 60))
        raise errors.LookupTimeout("the broker does not answer")

    monkeypatch.setattr(app.backend.layout, "fetch", fetch)
    tap: Any = FakeTap()
    assert list(watch_everything(tap, app.backend.reader.decode, 0.1)) == []

    async def scenario() -> None:
        watch = arrived(aio.watch(app=app, timeout=0.1), LARGE, SMALL)
        assert [meta async for meta in watch] == []

    asyncio.run(scenario())


def test_a_refusal_ends_a_watch_of_everything(app: Celery, failures: List[Exception]) -> None:
    failures.append(refusal())
    tap: Any = FakeTap()
    with pytest.raises(errors.BackendUnavailable, match="refuses us"):
        next(watch_everything(tap, app.backend.reader.decode, None))
    failures.append(refusal())

    async def scenario() -> None:
        watch = arrived(aio.watch(app=app), LARGE, SMALL)
        with pytest.raises(errors.BackendUnavailable, match="refuses us"):
            await watch.__anext__()
        with pytest.raises(StopAsyncIteration):
            await watch.__anext__()

    asyncio.run(scenario())


@pytest.mark.parametrize("failure", MOMENTARY)
def test_an_iterator_over_given_tasks_tries_again_at_the_next_call(
    app: Celery, failures: List[Exception], failure: Exception
) -> None:
    async def scenario() -> None:
        failures.append(failure)
        watch = arrived(aio.watch(["large", "small"], app=app), LARGE, SMALL)
        with pytest.raises(type(failure)):
            await watch.__anext__()
        assert [meta["task_id"] async for meta in watch] == ["large", "small"]
        failures.append(failure)
        completed = arrived(aio.as_completed(["large", "small"], app=app), LARGE, SMALL)
        with pytest.raises(type(failure)):
            await completed.__anext__()
        assert [pair async for pair in completed] == [("large", 1), ("small", 2)]

    asyncio.run(scenario())


def test_a_refusal_ends_an_iterator_over_given_tasks(
    app: Celery, failures: List[Exception]
) -> None:
    failures.append(refusal())

    async def scenario() -> None:
        completed = arrived(aio.as_completed(["large"], app=app), LARGE)
        with pytest.raises(errors.BackendUnavailable, match="refuses us"):
            await completed.__anext__()
        with pytest.raises(StopAsyncIteration):
            await completed.__anext__()

    asyncio.run(scenario())
