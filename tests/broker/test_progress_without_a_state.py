"""``update_state(meta=...)`` without the name of a state, which Celery's other backends take."""

from __future__ import annotations

import asyncio
from typing import Any, Callable

import pytest
from celery import Celery, states

from celery_amqp_results import aio
from celery_amqp_results.cli.describing import describe
from tests.broker.helpers import LONG, Waiting, new_id, until_stored
from tests.conftest import Apps

PROGRESS = {"done": 3}


@pytest.fixture(params=["shared", "per-task"])
def app(request: pytest.FixtureRequest, make_app: Apps) -> Celery:
    return make_app(f"amqp://?layout={request.param}")


@pytest.mark.parametrize("state", [None, ""])
def test_progress_without_a_state_is_read_with_its_meta(
    app: Celery, make_app: Apps, state: Any
) -> None:
    task_id = new_id()
    app.backend.store_result(task_id, {"pid": 1}, states.STARTED)
    app.backend.store_result(task_id, PROGRESS, state)
    until_stored(app)
    reader = make_app(app.conf.result_backend)
    result = reader.AsyncResult(task_id)
    assert result.state == state
    assert result.info == PROGRESS
    assert not result.ready()
    assert reader.backend.task_result_exists(task_id)
    assert describe(task_id, reader.backend.get_task_meta(task_id))["result"] == PROGRESS
    app.backend.store_result(task_id, 1, states.SUCCESS)
    assert reader.AsyncResult(task_id).get(timeout=LONG) == 1


@pytest.mark.parametrize("state", [None, ""])
def test_progress_without_a_state_is_pushed(
    app: Celery, make_app: Apps, eventually: Callable[..., Any], state: Any
) -> None:
    task_id, reader = new_id(), make_app(app.conf.result_backend)
    app.backend.store_result(task_id, {"pid": 1}, states.STARTED)
    seen: list[Any] = []
    result = reader.AsyncResult(task_id)
    waiting = Waiting(lambda: result.get(timeout=LONG, on_message=seen.append))
    eventually(lambda: seen)
    app.backend.store_result(task_id, PROGRESS, state)
    eventually(lambda: len(seen) > 1)
    assert seen[1]["status"] == state
    assert seen[1]["result"] == PROGRESS
    app.backend.store_result(task_id, 1, states.SUCCESS)
    assert waiting.result() == 1


def test_coroutines_are_given_progress_without_a_state(app: Celery) -> None:
    task_id = new_id()
    app.backend.store_result(task_id, PROGRESS, None)
    until_stored(app)

    async def main() -> None:
        meta = await aio.get_meta(task_id, app=app)
        assert (meta["status"], meta["result"]) == (None, PROGRESS)
        async with aio.watch(task_id, app=app) as metas:
            assert (await metas.__anext__())["result"] == PROGRESS

    asyncio.run(main())


def test_a_state_that_is_no_text_is_kept_as_it_is(app: Celery, make_app: Apps) -> None:
    task_id = new_id()
    app.backend.store_result(task_id, PROGRESS, 7)
    until_stored(app)
    result = make_app(app.conf.result_backend).AsyncResult(task_id)
    assert result.state == 7
    assert result.info == PROGRESS


def test_a_task_reports_progress_without_a_state(app: Celery) -> None:
    @app.task(name=f"report-{new_id()}", bind=True, shared=False)
    def report(self: Any) -> None:
        """Never runs."""

    task_id = new_id()
    report.update_state(task_id=task_id, meta=PROGRESS)
    until_stored(app)
    assert app.AsyncResult(task_id).info == PROGRESS
