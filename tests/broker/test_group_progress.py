"""The progress of a group is read in one pass."""

from __future__ import annotations

import pickle
import uuid
from typing import Any, List

import pytest
from celery import Celery, canvas, states
from celery.result import GroupResult

from tests.broker.helpers import new_id
from tests.conftest import Apps


def saved_group(app: Celery, stored: int, pending: int = 0) -> str:
    """Save a group with *stored* members that have a state and *pending* ones that do not."""
    ids = [new_id() for _ in range(stored + pending)]
    for number, task_id in enumerate(ids[:stored]):
        app.backend.store_result(task_id, number, states.SUCCESS)
    results = [app.AsyncResult(task_id) for task_id in ids]
    group = app.GroupResult(str(uuid.uuid4()), results)
    group.save()
    return str(group.id)


@pytest.fixture
def asked(make_app: Apps, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A second app, and the batches of ids that its layout reads."""
    app = make_app()
    batches: List[int] = []
    poll = app.backend.layout.poll

    def counted(ids: Any) -> Any:
        batches.append(len(ids))
        return poll(ids)

    monkeypatch.setattr(app.backend.layout, "poll", counted)
    return app, batches


def test_each_question_about_a_group_is_one_read(app: Celery, asked: Any) -> None:
    reader, batches = asked
    group = GroupResult.restore(saved_group(app, 20, pending=5), app=reader)
    assert group.completed_count() == 20
    assert batches == [25]
    # Finished members are known, and not read again.
    assert not group.ready()
    assert group.waiting()
    assert not group.failed()
    assert not group.successful()
    assert batches == [25, 5, 5, 5, 5]


def test_a_callback_that_asks_again_is_told_what_is_so_then(app: Celery, make_app: Apps) -> None:
    group = GroupResult.restore(saved_group(app, 1, pending=1), app=make_app())
    first, second = group.results
    seen: List[str] = []

    def callback(*_: Any) -> None:
        app.backend.store_result(second.id, 7, states.SUCCESS)
        seen.append(second.state)
        seen.append(second.state)

    first.then(callback)
    group.ready()
    assert first.ready()
    assert seen[-1] == states.SUCCESS


def test_a_group_in_a_group_is_read_with_it(app: Celery, asked: Any) -> None:
    reader, batches = asked
    inner = GroupResult.restore(saved_group(app, 3), app=app)
    outer = app.GroupResult(new_id(), [inner, app.AsyncResult(new_id())])
    outer.save()
    restored = GroupResult.restore(outer.id, app=reader)
    assert not restored.ready()
    assert batches == [4]
    assert restored.results[0].completed_count() == 3


def test_a_group_that_was_just_sent_is_read_in_one_pass(app: Celery, asked: Any) -> None:
    reader, batches = asked

    @reader.task
    def noop(number: int) -> None:
        """Is never run."""

    group = canvas.group(noop.s(number) for number in range(20)).apply_async()
    try:
        for number, member in enumerate(group.results[:5]):
            app.backend.store_result(member.id, number, states.SUCCESS)
        assert group.completed_count() == 5
        assert batches == [20]
        assert not group.ready()
        group.maybe_throw()
        assert batches == [20, 15, 15]
        assert pickle.loads(pickle.dumps(group)) == group
    finally:
        reader.control.purge()


def test_a_set_of_results_is_read_in_one_pass(app: Celery, asked: Any) -> None:
    reader, batches = asked
    results = [reader.AsyncResult(new_id()) for _ in range(10)]
    app.backend.store_result(results[0].id, 1, states.SUCCESS)
    found = reader.ResultSet(results)
    assert found.completed_count() == 1
    assert batches == [10]
    assert pickle.loads(pickle.dumps(found.results)) == results


def test_an_app_with_two_backends_reads_groups_once(make_app: Apps) -> None:
    app = make_app()
    kind = type(app.backend)
    before = app.GroupResult
    assert kind(app=app, url="amqp://").app.GroupResult is before


def test_each_question_is_answered_anew(app: Celery, asked: Any) -> None:
    reader, _ = asked
    group = GroupResult.restore(saved_group(app, 0, pending=2), app=reader)
    for number in range(2):
        assert group.completed_count() == number
        app.backend.store_result(group.results[number].id, None, states.SUCCESS)
    assert group.successful()


def test_a_restored_group_is_a_group_like_others(app: Celery, asked: Any) -> None:
    reader, _ = asked
    group = GroupResult.restore(saved_group(app, 3), app=reader)
    assert isinstance(group, GroupResult)
    assert type(group).__name__ == "GroupResult"
    assert group == app.GroupResult(group.id, list(group.results))
    assert group.get(timeout=60) == [0, 1, 2]
    copy = pickle.loads(pickle.dumps(group.as_tuple()))
    assert copy == group.as_tuple()
