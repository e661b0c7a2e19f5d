"""The layout ``per-task`` and writers that publish straight to the queue of a task.

celery-node and gocelery declare that queue and publish to the default exchange, so that nothing
comes by the result exchange.
"""

from __future__ import annotations

import asyncio
import functools
import json
from typing import Any, Callable, List

import amqp
import pytest
from celery import Celery, states
from celery.result import GroupResult

from celery_amqp_results import aio
from tests.broker.helpers import LONG, Waiting, new_id
from tests.conftest import Apps

#: Less than the time after which everything is read again in any case.
SOON = 12.0


@pytest.fixture
def app(make_app: Apps) -> Celery:
    return make_app("amqp://?layout=per-task")


@pytest.fixture
def write(raw: amqp.Connection) -> Callable[..., None]:
    """Publishes a state as programs in other languages do."""
    channel = raw.channel()

    def write(task_id: str, result: Any, state: str = states.SUCCESS) -> None:
        name = task_id.replace("-", "")
        channel.queue_declare(
            name, durable=True, auto_delete=True, arguments={"x-expires": 86_400_000}
        )
        meta = {
            "task_id": task_id,
            "status": state,
            "result": result,
            "traceback": None,
            "children": [],
        }
        message = amqp.Message(
            json.dumps(meta), content_type="application/json", content_encoding="utf-8"
        )
        channel.basic_publish(message, "", name)

    return write


def bound(app: Celery) -> bool:
    """Return whether a waiter has all its bindings in place."""
    followers = list(app.backend.layout._followers)
    return bool(followers) and not any(f.bindings.unbound(f.pending) for f in followers)


def _get(app: Celery, task_id: str) -> Any:
    return app.AsyncResult(task_id).get(timeout=SOON)


def _group(app: Celery, task_id: str) -> Any:
    (value,) = GroupResult(new_id(), [app.AsyncResult(task_id)], app=app).get(timeout=SOON)
    return value


def _get_many(app: Celery, task_id: str) -> Any:
    ((_, meta),) = app.backend.get_many([task_id], timeout=SOON)
    return meta["result"]


def _watch(app: Celery, task_id: str) -> Any:
    return list(app.backend.watch(task_id, timeout=SOON))[-1]["result"]


def _aio(app: Celery, task_id: str) -> Any:
    async def main() -> Any:
        return await aio.get(task_id, timeout=SOON, app=app)

    return asyncio.run(main())


WAITS: List[Callable[[Celery, str], Any]] = [_get, _group, _get_many, _watch, _aio]


@pytest.mark.parametrize("wait", WAITS)
def test_a_result_that_is_published_to_the_queue_of_its_task_ends_the_wait(
    app: Celery,
    write: Callable[..., None],
    eventually: Callable[..., Any],
    wait: Callable[[Celery, str], Any],
) -> None:
    task_id = new_id()
    waiting = Waiting(lambda: wait(app, task_id))
    eventually(lambda: bound(app))
    write(task_id, 42)
    assert waiting.result() == 42


def wait_and_note(client: Celery, task_id: str, noted: List[str]) -> Any:
    """Wait for a task, and note its states."""
    return client.AsyncResult(task_id).get(
        timeout=SOON, on_message=lambda meta: noted.append(meta["status"])
    )


def test_states_on_the_way_are_seen_by_several_waiting_clients(
    app: Celery, make_app: Apps, write: Callable[..., None], eventually: Callable[..., Any]
) -> None:
    task_id = new_id()
    seen: List[List[str]] = [[], []]
    clients = [app, make_app("amqp://?layout=per-task")]
    waiting = [
        Waiting(functools.partial(wait_and_note, client, task_id, noted))
        for client, noted in zip(clients, seen)
    ]
    eventually(lambda: all(map(bound, clients)))
    write(task_id, {}, states.STARTED)
    eventually(lambda: all(seen))
    write(task_id, 42)
    assert [each.result() for each in waiting] == [42, 42]
    assert seen == [[states.STARTED, states.SUCCESS]] * 2


def test_many_results_of_both_kinds_of_writers_are_got(
    app: Celery, make_app: Apps, write: Callable[..., None], eventually: Callable[..., Any]
) -> None:
    ids = [new_id() for _ in range(200)]
    group = GroupResult(new_id(), [app.AsyncResult(i) for i in ids], app=app)
    waiting = Waiting(lambda: group.get(timeout=LONG))
    eventually(lambda: bound(app))
    worker = make_app("amqp://?layout=per-task")
    for number, task_id in enumerate(ids):
        if number % 2:
            write(task_id, number)
        else:
            worker.backend.store_result(task_id, number, states.SUCCESS)
    # Storing takes a slow broker some seconds, which do not count.
    eventually(lambda: not waiting.thread.is_alive(), SOON)
    assert waiting.result() == list(range(200))
