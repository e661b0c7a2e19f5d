"""Ids given as ``uuid.UUID``, as Django and FastAPI take them from URLs."""

from __future__ import annotations

import asyncio
import json
import threading
import uuid
from typing import Any, Iterator

import pytest
from celery import Celery, states
from celery.contrib.abortable import AbortableAsyncResult
from celery.result import GroupResult
from kombu import serialization

from celery_amqp_results import aio
from celery_amqp_results.cli.describing import describe
from tests.broker.helpers import LONG, Waiting, until_stored
from tests.conftest import Apps


@pytest.fixture(params=["shared", "per-task"])
def app(request: pytest.FixtureRequest, make_app: Apps) -> Celery:
    return make_app(f"amqp://?layout={request.param}")


def test_a_result_is_stored_and_read_by_a_uuid(app: Celery, make_app: Apps) -> None:
    task_id = uuid.uuid4()
    app.backend.store_result(task_id, 42, states.SUCCESS)
    for given in (task_id, str(task_id), str(task_id).encode()):
        result = make_app(app.conf.result_backend).AsyncResult(given)
        assert result.state == states.SUCCESS
        assert result.ready()
        assert result.result == 42
        assert result.get(timeout=LONG) == 42
        assert app.backend.wait_for(given, timeout=LONG) == 42
        assert app.backend.get_state(given) == states.SUCCESS
        assert app.backend.task_result_exists(given)


def test_a_failure_is_known_by_a_uuid(app: Celery) -> None:
    task_id = uuid.uuid4()
    app.backend.mark_as_failure(task_id, KeyError("gone"))
    assert app.AsyncResult(task_id).state == states.FAILURE
    assert app.backend.is_cached(task_id)


def test_a_uuid_can_be_revoked_aborted_and_updated(app: Celery) -> None:
    revoked, aborted, updated = uuid.uuid4(), uuid.uuid4(), uuid.uuid4()
    app.backend.mark_as_revoked(revoked, "no")
    assert app.AsyncResult(str(revoked)).state == states.REVOKED
    AbortableAsyncResult(aborted, app=app).abort()
    assert AbortableAsyncResult(str(aborted), app=app).is_aborted()

    @app.task(name=f"update-{uuid.uuid4()}", shared=False)
    def update() -> None:
        """Never runs."""

    update.update_state(task_id=updated, state="PROGRESS", meta={"done": 1})
    until_stored(app)
    assert app.AsyncResult(str(updated)).info == {"done": 1}


def test_forgetting_a_uuid_forgets_what_is_cached_as_well(app: Celery) -> None:
    task_id = uuid.uuid4()
    app.backend.store_result(task_id, 42, states.SUCCESS)
    assert app.AsyncResult(str(task_id)).state == states.SUCCESS
    app.AsyncResult(task_id).forget()
    assert app.AsyncResult(str(task_id)).state == states.PENDING


def test_a_group_is_saved_and_restored_by_a_uuid(app: Celery, make_app: Apps) -> None:
    group_id, members = uuid.uuid4(), [uuid.uuid4(), uuid.uuid4()]
    for number, member in enumerate(members):
        app.backend.store_result(member, number, states.SUCCESS)
    GroupResult(group_id, [app.AsyncResult(member) for member in members], app=app).save()
    other = make_app(app.conf.result_backend)
    for given in (group_id, str(group_id)):
        restored = GroupResult.restore(given, app=other)
        assert [member.id for member in restored.results] == list(map(str, members))
        assert restored.get(timeout=LONG) == [0, 1]
        assert restored.completed_count() == 2
    restored.delete()
    assert GroupResult.restore(group_id, app=other) is None


def test_a_group_of_uuids_is_waited_for_in_every_way(app: Celery) -> None:
    members = [uuid.uuid4(), uuid.uuid4()]
    for number, member in enumerate(members):
        app.backend.store_result(member, number, states.SUCCESS)

    def group() -> GroupResult:
        nested = GroupResult(uuid.uuid4(), [app.AsyncResult(members[1])], app=app)
        return GroupResult(uuid.uuid4(), [app.AsyncResult(members[0]), nested], app=app)

    assert group().get(timeout=LONG) == [0, [1]]
    assert group().join(timeout=LONG) == [0, [1]]
    found = dict(app.backend.get_many(members, timeout=LONG))
    assert found.keys() == set(map(str, members))
    assert {meta["task_id"] for meta in app.backend.watch(members, timeout=LONG)} == found.keys()
    assert {meta["task_id"] for meta in app.backend.watch(group(), timeout=LONG)} == found.keys()


def test_a_group_of_uuids_tells_how_far_it_is(app: Celery) -> None:
    done, failed, pending = uuid.uuid4(), uuid.uuid4(), uuid.uuid4()
    app.backend.store_result(done, 1, states.SUCCESS)
    app.backend.mark_as_failure(failed, KeyError("second"))

    def group(*members: uuid.UUID) -> GroupResult:
        return app.GroupResult(uuid.uuid4(), [app.AsyncResult(member) for member in members])

    assert group(done).ready()
    assert group(done).successful()
    assert group(done, failed).failed()
    assert group(done, pending).waiting()
    assert group(done, pending).completed_count() == 1
    for ask in (group(done, failed).maybe_throw, group(done, failed).maybe_reraise):
        with pytest.raises(KeyError, match="second"):
            ask()


def test_a_task_behind_a_pending_uuid_is_waited_for(app: Celery, make_app: Apps) -> None:
    task_id = uuid.uuid4()
    result = app.AsyncResult(task_id, parent=app.AsyncResult(uuid.uuid4()))
    asked = threading.Event()
    waiting = Waiting(
        lambda: result.get(timeout=LONG, interval=0.05, on_interval=lambda _: asked.set())
    )
    assert asked.wait(LONG) or waiting.result()
    make_app(app.conf.result_backend).backend.store_result(task_id, 42, states.SUCCESS)
    assert waiting.result() == 42


def test_coroutines_take_a_uuid(app: Celery) -> None:
    task_id = uuid.uuid4()
    app.backend.store_result(task_id, 42, states.SUCCESS)

    async def main() -> None:
        for target in (task_id, app.AsyncResult(task_id)):
            assert await aio.get(target, timeout=LONG, app=app) == 42
            assert await aio.state(target, app=app) == states.SUCCESS
            assert (await aio.get_meta(target, app=app))["task_id"] == str(task_id)
            assert [i async for i, _ in aio.as_completed(target, app=app)] == [str(task_id)]
            metas = [meta async for meta in aio.watch(target, app=app, timeout=LONG)]
            assert [meta["task_id"] for meta in metas] == [str(task_id)]
        assert await aio.gather(task_id, str(task_id), app=app) == [42, 42]
        await aio.forget(task_id, app=app)
        assert await aio.state(task_id, app=app) == states.PENDING

    asyncio.run(main())


def test_a_callback_is_called_for_a_uuid(app: Celery, eventually: Any) -> None:
    task_id, called = uuid.uuid4(), []
    result = app.AsyncResult(task_id)
    result.then(lambda done: called.append(done.get(timeout=LONG)))
    app.backend.store_result(str(task_id), 42, states.SUCCESS)
    eventually(lambda: called == [42])


def test_the_documented_methods_take_a_uuid(app: Celery) -> None:
    task_id = uuid.uuid4()
    app.backend.store_result(task_id, 42, states.SUCCESS)
    backend, text = app.backend, str(task_id)
    assert backend.rkey(task_id) == backend.rkey(text)
    assert backend.destination_for(task_id, None)[1] == text
    assert backend.on_reply_declare(task_id)[0].name == backend.on_reply_declare(text)[0].name
    assert backend.consume(task_id, timeout=LONG)["result"] == 42
    assert backend.poll(task_id)["result"] == 42
    backend.reload_task_result(task_id)


@pytest.mark.parametrize("wrong", [5, None, object()])
def test_an_id_that_is_neither_text_nor_a_uuid_is_refused(app: Celery, wrong: Any) -> None:
    with pytest.raises(TypeError, match="is not the id of a task"):
        app.backend.get_task_meta(wrong)
    with pytest.raises(TypeError, match="is not the id of a task"):
        app.backend.store_result(wrong, 1, states.SUCCESS)


def test_fate_and_marks_take_a_uuid(make_app: Apps) -> None:
    app, task_id = make_app("amqp://?track_sent=true"), uuid.uuid4()
    app.backend.store_result(task_id, 42, states.SUCCESS)
    assert app.backend.fate(task_id).status == "stored"
    app.backend.forget(task_id)
    assert app.backend.fate(task_id).status == "forgotten"


# -- serializers that make UUIDs of texts --------------------------------------------------------


def _revive(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _revive(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_revive(item) for item in value]
    try:
        return uuid.UUID(value)
    except (TypeError, ValueError, AttributeError):
        return value


@pytest.fixture
def _reviving() -> Iterator[None]:
    serialization.register(
        "reviving",
        lambda value: json.dumps(value, default=str),
        lambda text: _revive(json.loads(text)),
        "application/x-reviving",
        "utf-8",
    )
    yield
    serialization.unregister("reviving")


@pytest.mark.usefixtures("_reviving")
@pytest.mark.parametrize("layout", ["shared", "per-task"])
def test_results_are_read_by_a_serializer_that_revives_uuids(make_app: Apps, layout: str) -> None:
    app = make_app(
        f"amqp://?layout={layout}", result_serializer="reviving", accept_content=["reviving"]
    )
    task_id, value, group_id = str(uuid.uuid4()), uuid.uuid4(), str(uuid.uuid4())
    app.backend.store_result(task_id, value, states.SUCCESS)
    assert app.AsyncResult(task_id).get(timeout=LONG) == value
    assert app.backend.get_task_meta(task_id, cache=False)["task_id"] == task_id
    GroupResult(group_id, [app.AsyncResult(task_id)], app=app).save()
    (member,) = GroupResult.restore(group_id, app=app).results
    assert member.id == task_id
    assert member.get(timeout=LONG) == value
    assert describe(task_id, app.backend.get_task_meta(task_id))["id"] == task_id
