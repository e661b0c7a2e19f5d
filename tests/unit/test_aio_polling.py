"""Coroutines that ask for tasks in one turn of the event loop, and an error of one of them."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any, Collection, Dict, List, Optional

import pytest
from celery import Celery, states
from kombu.exceptions import ContentDisallowed

from celery_amqp_results import aio, errors
from celery_amqp_results.aio import bridge
from celery_amqp_results.protocol.message import StateMessage
from tests.unit import fakes

KNOWN = {"a": fakes.state("a"), "b": fakes.state("b")}


class FakeLayout:
    """Knows two tasks; a look-up of certain ids fails."""

    def __init__(self, failures: Dict[str, Exception]) -> None:
        self._failures = failures
        self.polled: List[List[str]] = []

    def poll(self, ids: Collection[str]) -> Dict[str, Optional[StateMessage]]:
        self.polled.append(list(ids))
        for task_id in ids:
            if task_id in self._failures:
                raise self._failures[task_id]
        return {task_id: KNOWN.get(task_id) for task_id in ids}


def test_all_requests_are_looked_up_together() -> None:
    layout: Any = FakeLayout({})
    answers = bridge._poll_together(layout, [("a",), ("b", "c"), ("a",)])
    assert answers == [{"a": KNOWN["a"]}, {"b": KNOWN["b"], "c": None}, {"a": KNOWN["a"]}]
    assert layout.polled == [["a", "b", "c"]]


def test_an_error_of_one_task_is_the_answer_to_its_own_request_alone() -> None:
    foreign, limit = errors.ForeignMessage("no state"), errors.BacklogLimitExceeded("too many")
    layout: Any = FakeLayout({"foreign": foreign, "full": limit})
    requests = [("a",), ("foreign", "b"), ("b",), ("full",)]
    answers = bridge._poll_together(layout, requests)
    assert answers == [{"a": KNOWN["a"]}, foreign, {"b": KNOWN["b"]}, limit]


@pytest.mark.parametrize(
    "failure",
    [
        errors.BackendUnavailable("no broker"),
        errors.LookupTimeout("no answer"),
        errors.DeclarationRefused("a queue differs"),
    ],
)
def test_an_error_of_the_broker_is_the_answer_to_all_and_no_request_is_repeated(
    failure: Exception,
) -> None:
    layout: Any = FakeLayout({"a": failure})
    assert bridge._poll_together(layout, [("a",), ("b",)]) == [failure, failure]
    assert layout.polled == [["a", "b"]]


def test_one_request_that_fails_is_not_repeated() -> None:
    foreign = errors.ForeignMessage("no state")
    layout: Any = FakeLayout({"a": foreign})
    assert bridge._poll_together(layout, [("a", "b")]) == [foreign]
    assert layout.polled == [["a", "b"]]


def test_an_unreadable_result_in_the_layout_per_task_fails_only_who_asks_for_it() -> None:
    name = f"test-{uuid.uuid4().hex[:12]}"

    def app_with(**conf: Any) -> Celery:
        app = Celery("asking", broker="memory://", backend="amqp://", set_as_current=False)
        app.conf.update(result_exchange=name, **conf)
        return app

    app = app_with()
    pickled = app_with(result_serializer="pickle", accept_content=["pickle"])
    bad, good = fakes.new_id(), fakes.new_id()
    pickled.backend.store_result(bad, 1, states.SUCCESS)
    app.backend.store_result(good, 2, states.SUCCESS)

    async def scenario() -> List[Any]:
        asking = (
            aio.get_meta(bad, app=app),
            aio.state(good, app=app),
            aio.get(good, timeout=0, app=app),
        )
        return list(await asyncio.gather(*asking, return_exceptions=True))

    failure, *found = asyncio.run(scenario())
    assert isinstance(failure, ContentDisallowed)
    assert found == [states.SUCCESS, 2]
    for each in (app, pickled):
        each.backend.close()
        each.close()
