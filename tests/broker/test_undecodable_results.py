"""Final states that a reader cannot decode, behind states that it can."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Callable, List

import pytest
from celery import Celery, states
from celery.result import GroupResult
from kombu import serialization

from celery_amqp_results import aio, errors
from tests.broker.helpers import LONG, Waiting, new_id
from tests.conftest import Apps

#: What a reader of the serializer below cannot decode.
BAD = "cannot be decoded"


def _loads(text: Any) -> Any:
    if BAD in (text if isinstance(text, str) else bytes(text).decode()):
        raise ValueError(f"{BAD} here")
    return json.loads(text)


@pytest.fixture(autouse=True)
def _picky() -> Any:
    serialization.register("picky", json.dumps, _loads, "application/x-picky", "utf-8")
    yield
    serialization.unregister("picky")


@pytest.fixture(params=["shared", "per-task"])
def app(request: pytest.FixtureRequest, make_app: Apps) -> Celery:
    return make_app(
        f"amqp://?layout={request.param}", result_serializer="picky", accept_content=["picky"]
    )


def _reader(make_app: Apps, app: Celery) -> Celery:
    """Another process's app, as far as the broker can tell."""
    return make_app(app.conf.result_backend, result_serializer="picky", accept_content=["picky"])


def _started_and_ended(app: Celery, result: Any = BAD, state: str = states.SUCCESS) -> str:
    task_id = new_id()
    app.backend.store_result(task_id, {"pid": 1}, states.STARTED)
    app.backend.store_result(task_id, result, state)
    return task_id


def _state(app: Celery, task_id: str) -> Any:
    return app.AsyncResult(task_id).state


def _get(app: Celery, task_id: str) -> Any:
    return app.AsyncResult(task_id).get(timeout=LONG)


def _get_at_once(app: Celery, task_id: str) -> Any:
    return app.AsyncResult(task_id).get(timeout=0)


def _group(app: Celery, task_id: str) -> Any:
    return GroupResult(new_id(), [app.AsyncResult(task_id)], app=app).get(timeout=LONG)


def _join(app: Celery, task_id: str) -> Any:
    return GroupResult(new_id(), [app.AsyncResult(task_id)], app=app).join(timeout=LONG)


def _completed_count(app: Celery, task_id: str) -> Any:
    return GroupResult(new_id(), [app.AsyncResult(task_id)], app=app).completed_count()


def _get_many(app: Celery, task_id: str) -> Any:
    return list(app.backend.get_many([task_id], timeout=LONG))


def _watch(app: Celery, task_id: str) -> Any:
    return list(app.backend.watch(task_id, states=states.SUCCESS, timeout=LONG))


def _aio_get(app: Celery, task_id: str) -> Any:
    async def main() -> Any:
        return await aio.get(task_id, timeout=LONG, app=app)

    return asyncio.run(main())


def _aio_state(app: Celery, task_id: str) -> Any:
    async def main() -> Any:
        return await aio.state(task_id, app=app)

    return asyncio.run(main())


READS: List[Callable[[Celery, str], Any]] = [
    _state,
    _get,
    _get_at_once,
    _group,
    _join,
    _completed_count,
    _get_many,
    _watch,
    _aio_get,
    _aio_state,
]


@pytest.mark.parametrize("read", READS)
def test_a_final_state_that_cannot_be_decoded_is_an_error_and_not_the_state_before(
    app: Celery, make_app: Apps, read: Callable[[Celery, str], Any]
) -> None:
    task_id = _started_and_ended(app)
    with pytest.raises(errors.ForeignMessage, match=BAD):
        read(_reader(make_app, app), task_id)


def test_a_waiting_client_is_pushed_a_final_state_that_cannot_be_decoded(
    app: Celery, make_app: Apps, eventually: Callable[..., Any]
) -> None:
    task_id, reader = new_id(), _reader(make_app, app)
    app.backend.store_result(task_id, {"pid": 1}, states.STARTED)
    seen: List[Any] = []
    waiting = Waiting(lambda: reader.AsyncResult(task_id).get(timeout=LONG, on_message=seen.append))
    eventually(lambda: seen)
    app.backend.store_result(task_id, BAD, states.SUCCESS)
    with pytest.raises(errors.ForeignMessage, match=BAD):
        waiting.result()


def test_a_final_state_that_can_be_decoded_counts_more_than_one_that_cannot(
    app: Celery, make_app: Apps
) -> None:
    first = _started_and_ended(app)
    app.backend.store_result(first, "second run", states.SUCCESS)
    second = _started_and_ended(app)
    app.backend.store_result(second, KeyError("second run"), states.FAILURE)
    reader = _reader(make_app, app)
    assert reader.AsyncResult(first).get(timeout=LONG) == "second run"
    assert reader.AsyncResult(second).state == states.FAILURE


LARGE = "x" * 200_000


@pytest.mark.parametrize("read", [_get, _get_at_once, _group, _aio_get])
def test_a_large_final_state_that_cannot_be_decoded_hides_no_other(
    make_app: Apps, read: Callable[[Celery, str], Any]
) -> None:
    app = make_app(result_serializer="picky", accept_content=["picky"])
    task_id = _started_and_ended(app, BAD + LARGE)
    app.backend.store_result(task_id, BAD + LARGE, states.SUCCESS)
    reader = _reader(make_app, app)
    with pytest.raises(errors.ForeignMessage, match=BAD):
        read(reader, task_id)
    # When the task ran once more, and that result can be decoded
    app.backend.store_result(task_id, "third run", states.SUCCESS)
    assert read(_reader(make_app, app), task_id) in ("third run", ["third run"])


def test_of_several_final_states_that_cannot_be_decoded_one_is_an_error(
    app: Celery, make_app: Apps
) -> None:
    task_id = _started_and_ended(app)
    app.backend.store_result(task_id, BAD, states.SUCCESS)
    with pytest.raises(errors.ForeignMessage, match=BAD):
        _reader(make_app, app).AsyncResult(task_id).get(timeout=LONG)


def test_the_members_that_can_be_decoded_are_got_although_another_cannot(
    app: Celery, make_app: Apps
) -> None:
    good, bad = new_id(), _started_and_ended(app)
    app.backend.store_result(good, 1, states.SUCCESS)
    reader = _reader(make_app, app)
    assert reader.AsyncResult(good).get(timeout=LONG) == 1
    with pytest.raises(errors.ForeignMessage, match=BAD):
        list(reader.backend.get_many([good, bad], timeout=LONG))
