"""Results that are kept for months, which some limits of 32 bits would cut short."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from celery import states
from celery.app.task import Context
from celery.result import GroupResult

from celery_amqp_results.protocol import expiry, page
from tests.broker.helpers import LONG, new_id
from tests.conftest import Apps

TWO_MONTHS = datetime.timedelta(days=60)
MILLISECONDS = 60 * 24 * 3600 * 1000


@pytest.mark.parametrize("layout", ["shared", "per-task"])
@pytest.mark.parametrize("expires", [TWO_MONTHS, str(60 * 24 * 3600), 10**12])
def test_what_is_kept_for_months_is_stored_and_read(
    make_app: Apps, layout: str, expires: Any
) -> None:
    app = make_app(f"amqp://?layout={layout}&inline_limit=1024", result_expires=expires)
    ids = [new_id() for _ in range(3)]
    for task_id in ids:
        app.backend.store_result(task_id, "x" * 5000, states.SUCCESS)
    GroupResult(ids[0], [app.AsyncResult(i) for i in ids], app=app).save()
    reader = make_app(app.conf.result_backend, result_expires=expires)
    assert GroupResult.restore(ids[0], app=reader).get(timeout=LONG) == ["x" * 5000] * 3


def test_a_chord_may_be_kept_for_months(make_app: Apps) -> None:
    app = make_app(result_chord_expires=str(60 * 24 * 3600))
    assert app.backend.config.expirations.chord == MILLISECONDS


@pytest.mark.parametrize("given", [TWO_MONTHS, str(60 * 24 * 3600), 60 * 24 * 3600])
def test_a_task_may_keep_its_result_for_months(make_app: Apps, given: Any) -> None:
    app, task_id = make_app(result_expires=60), new_id()
    app.backend.store_result(
        task_id, 1, states.SUCCESS, request=Context(id=task_id, headers={expiry.NAME: given})
    )
    state = make_app().backend.layout.poll((task_id,))[task_id]
    assert state is not None
    assert state.expiration == MILLISECONDS


def test_a_page_is_kept_as_long_as_what_is_in_it(make_app: Apps) -> None:
    app = make_app(shards=1, result_expires=TWO_MONTHS)
    task_id = new_id()
    app.backend.store_result(task_id, 1, states.SUCCESS)
    state = app.backend.layout.poll((task_id,))[task_id]
    assert state is not None
    kept = page.expiration([state], state.published)
    assert kept == MILLISECONDS
