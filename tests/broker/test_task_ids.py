"""Custom task ids of any shape."""

from __future__ import annotations

import uuid
from functools import partial
from typing import Any, Callable, List

import pytest
from celery import Celery, states
from celery.result import GroupResult

from tests import subprocess_jobs, subprocesses
from tests.broker.helpers import LONG, Waiting, new_id, until_watched
from tests.conftest import Apps

SHAPES = {
    "a dot": ".",
    "dots": "a.b..c.",
    "hash": "#",
    "star": "*.*",
    "words of a binding": "0.#.*.-",
    "dash": "-",
    "space": " ",
    "spaces and tabs": " a \t b ",
    "newline": "a\nb",
    "null": "a\0b",
    "slashes": "a/b\\c?d=e&f",
    "percent": "%41%",
    "tilde": "~abc",
    "quotes": "\"'`",
    "unicode": "täsk-ид-任务-🐇",
    "one letter": "x",
    "72": "y" * 72,
    "73": "y" * 73,
    "255": "z" * 255,
    "256": "z" * 256,
    "1000": "w" * 1000,
    "1000 of four bytes": "🐇" * 1000,
    "lone surrogate": "a\ud800b",
    "state": "SUCCESS",
    "uuid": str(uuid.uuid4()),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_an_id_of_any_shape_can_be_stored_awaited_and_forgotten(
    app: Celery, make_app: Apps, shape: str
) -> None:
    # Given a similar id that must not be confused with it.
    task_id, other = SHAPES[shape], SHAPES[shape] + "x"
    app.backend.store_result(other, "other", states.SUCCESS)
    reader = make_app()
    assert reader.AsyncResult(task_id).state == states.PENDING
    # When a result is stored.
    app.backend.store_result(task_id, "mine", states.SUCCESS)
    # Then it is found, waited for, and forgotten.
    assert reader.AsyncResult(task_id).state == states.SUCCESS
    meta = make_app().backend.get_task_meta(task_id)
    assert meta["result"] == "mine"
    assert meta["task_id"] == task_id
    assert make_app().AsyncResult(task_id).get(timeout=LONG) == "mine"
    reader.AsyncResult(task_id).forget()
    assert make_app().AsyncResult(task_id).state == states.PENDING
    assert reader.AsyncResult(other).get(timeout=LONG) == "other"


def test_ids_of_all_shapes_are_pushed_side_by_side(
    app: Celery, make_app: Apps, eventually: Callable[..., Any]
) -> None:
    ids, worker = list(SHAPES.values()), make_app()
    group = GroupResult(new_id(), [app.AsyncResult(i) for i in ids], app=app)
    waiting = Waiting(lambda: group.get(timeout=LONG))
    for task_id in ids:
        until_watched(app, task_id, eventually)
    for task_id in ids:
        worker.backend.store_result(task_id, task_id, states.SUCCESS)
    assert waiting.result() == ids


def test_a_group_may_have_an_id_of_any_shape(app: Celery, make_app: Apps) -> None:
    members = [app.AsyncResult(new_id())]
    for group_id in SHAPES.values():
        GroupResult(group_id, members, app=app).save()
    reader = make_app()
    for group_id in SHAPES.values():
        assert GroupResult.restore(group_id, app=reader)[0].id == members[0].id


def test_another_process_finds_ids_of_all_shapes(app: Celery) -> None:
    ids = list(SHAPES.values())
    for task_id in ids:
        app.backend.store_result(task_id, 1, states.SUCCESS)
    assert subprocesses.run(app, subprocess_jobs.states, ids=ids) == ["SUCCESS"] * len(ids)


def test_ids_given_as_bytes_are_the_same_ids(app: Celery) -> None:
    task_id = new_id()
    app.backend.store_result(task_id.encode(), 1, states.SUCCESS)
    assert app.backend.get_task_meta(task_id)["result"] == 1
    assert app.backend.get_task_meta(task_id.encode())["result"] == 1
    assert app.backend.wait_for(task_id.encode(), timeout=LONG) == 1


def test_an_id_that_is_too_long_for_a_queue_of_its_own_is_refused_with_its_length(
    make_app: Apps,
) -> None:
    app = make_app(result_backend_transport_options={"layout": "per-task"})
    # The id itself is in each message, with its dashes.
    for task_id in ("x" * 300, "-".join(["\N{RABBIT FACE}" * 12] * 6)):
        size, result = len(task_id.encode()), app.AsyncResult(task_id)
        calls: List[Callable[[], Any]] = [
            partial(app.backend.store_result, task_id, 1, states.SUCCESS),
            partial(app.backend.get_task_meta, task_id),
            partial(result.get, timeout=0),
            partial(result.get, timeout=LONG),
            result.forget,
        ]
        for call in calls:
            with pytest.raises(ValueError, match=f"has {size} bytes"):
                call()
