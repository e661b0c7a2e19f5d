"""The meta of a state equals the one of Celery's base class."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from celery import Celery
from celery.app.task import Context
from celery.backends.base import Backend
from celery.result import AsyncResult

from celery_amqp_results.backend import AMQPBackend

REQUEST = {"id": "a", "hostname": "here", "task": "t", "args": [1], "kwargs": {}, "retries": 2}


def make_backend(**conf: Any) -> AMQPBackend:
    app = Celery("meta", broker="amqp://", backend="amqp://", set_as_current=False)
    app.conf.update(conf)
    return app.backend  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "conf", [{}, {"result_extended": True}, {"timezone": "Asia/Tokyo"}], ids=str
)
@pytest.mark.parametrize("state", ["SUCCESS", "FAILURE", "REVOKED", "STARTED", "PROGRESS"])
@pytest.mark.parametrize(
    "about",
    [None, {}, {"group": "g", "parent_id": "p"}, {"group": "", "parent_id": None}, "children"],
    ids=str,
)
def test_the_meta_equals_celery_s(conf: Any, state: str, about: Any) -> None:
    # Given a request of a task, or none
    backend = make_backend(**conf)
    if about == "children":
        about = {"children": [AsyncResult("c", app=backend.app)]}
    request = None if about is None else Context(**REQUEST, **about)
    # When both make a meta of it
    theirs = Backend._get_result_meta(backend, [1], state, "a trace", request)
    ours = backend._get_result_meta([1], state, "a trace", request)
    # Then only the time may differ
    dates = [meta.pop("date_done") for meta in (ours, theirs)]
    assert ours == theirs
    assert list(ours) == list(theirs)
    if dates[1] is None:
        assert dates[0] is None
        return
    mine, celerys = (datetime.datetime.fromisoformat(date) for date in dates)
    assert mine.utcoffset() == celerys.utcoffset()
    assert abs(mine - celerys) < datetime.timedelta(minutes=5)
