"""Declarations on the broker: a constant number of queues, and only those that are needed."""

from __future__ import annotations

import logging
import sys
from typing import Any, Callable, Dict, List, Tuple

import amqp
import pytest
from celery import Celery, chord, group, states
from celery.exceptions import ImproperlyConfigured, TimeoutError
from celery.result import GroupResult

from tests import subprocess_jobs, subprocesses
from tests.broker.helpers import LONG, Waiting, new_id, until_stored, until_watched
from tests.conftest import Apps
from tools import rabbitmq


def rows(node: rabbitmq.Node, app: Celery, what: str, *columns: str) -> List[List[str]]:
    """Return those lines of ``rabbitmqctl list_...`` that belong to *app*."""
    output = node.ctl(f"list_{what}", "--no-table-headers", *columns)
    prefix = str(app.conf.result_exchange)
    return [line.split("\t") for line in output.splitlines() if prefix in line]


def exchange_exists(connection: amqp.Connection, app: Celery) -> bool:
    channel = connection.channel()
    try:
        channel.exchange_declare(f"{app.conf.result_exchange}.states", "topic", passive=True)
    except amqp.exceptions.NotFound:
        return False
    return True


def queue_exists(connection: amqp.Connection, name: str) -> bool:
    channel = connection.channel()
    try:
        channel.queue_declare(name, passive=True)
    except amqp.exceptions.NotFound:
        return False
    return True


def test_the_number_of_queues_and_bindings_does_not_grow_with_tasks(
    app: Celery, make_app: Apps, node: rabbitmq.Node
) -> None:
    # Given one task for each of the shards, and an inbox that is bound to all of them.
    worker = make_app()
    shard = app.backend.config.topology.shard
    first = [next(i for i in iter(new_id, None) if shard(i) == n) for n in range(8)]
    for task_id in first:
        worker.backend.store_result(task_id, 1, states.SUCCESS)
    assert len(dict(app.backend.get_many(first, timeout=LONG))) == 8
    pending = [next(i for i in iter(new_id, None) if shard(i) == n) for n in range(8)]
    with pytest.raises(TimeoutError):
        list(app.backend.get_many(pending, timeout=1))

    def held() -> Dict[str, int]:
        return {
            "queues": node.queue_count(),
            "bindings": len(rows(node, app, "bindings", "source_name", "routing_key")),
            "exchanges": len(rows(node, app, "exchanges", "name")),
        }

    before = held()
    # When 1,000 tasks change state, and are waited for, polled and saved as groups.
    ids = [new_id() for _ in range(1000)]
    waiting = Waiting(lambda: dict(app.backend.get_many(ids, timeout=LONG)))
    for task_id in ids:
        worker.backend.store_result(task_id, None, states.STARTED)
        worker.backend.store_result(task_id, 1, states.SUCCESS)
    assert len(waiting.result()) == 1000
    for task_id in ids[:50]:
        assert app.AsyncResult(task_id).state == states.SUCCESS
        assert app.AsyncResult(new_id()).state == states.PENDING
        GroupResult(new_id(), [app.AsyncResult(task_id)], app=app).save()
    # Then the broker has as many queues and bindings as before.
    assert held() == before
    # One queue for each shard.
    assert len(rows(node, app, "queues", "name")) == 8


def test_a_queue_is_declared_only_for_a_shard_that_is_used(
    app: Celery, raw: amqp.Connection
) -> None:
    app.backend.store_result(new_id(), 1, states.SUCCESS)
    prefix = app.conf.result_exchange
    assert sum(queue_exists(raw, f"{prefix}.shard.{n}") for n in range(8)) == 1


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_shard_queues_are_durable_and_have_a_single_active_consumer(
    make_app: Apps, node: rabbitmq.Node, queue_type: str
) -> None:
    app = make_app(
        result_backend_transport_options={"shards": 1, "queue_type": queue_type},
        result_persistent=False,
    )
    task_id = new_id()
    app.backend.store_result(task_id, 1, states.SUCCESS)
    (row,) = rows(node, app, "queues", "name", "type", "durable", "auto_delete", "arguments")
    assert row[1] in (queue_type, f"rabbit_{queue_type}_queue")
    assert row[2:4] == ["true", "false"]
    assert "x-single-active-consumer" in row[4]
    # A quorum queue delivers a message as often as it is read.
    for _ in range(30):
        assert app.AsyncResult(task_id).state == states.SUCCESS


def test_a_program_that_only_sends_opens_no_result_connection_and_declares_nothing(
    app: Celery, raw: amqp.Connection
) -> None:
    answer = subprocesses.run(app, subprocess_jobs.only_send, times=20)
    if sys.platform.startswith("linux"):
        assert answer["connections"] == 1
    assert not [name for name in answer["threads"] if "celery-results" in name]
    assert not exchange_exists(raw, app)


def test_sending_groups_and_keeping_their_results_opens_no_result_connection(
    app: Celery, raw: amqp.Connection, eventually: Callable[..., Any]
) -> None:
    task = app.signature("tests.nothing")
    sent = [group([task.clone() for _ in range(5)]).apply_async() for _ in range(3)]
    sent.append((task | group([task.clone(), task.clone()])).apply_async())
    pending = app.backend.waits.pending
    eventually(lambda: pending is None or not pending._results)
    assert app.backend.layout.inbox._keeper.thread is None
    assert not exchange_exists(raw, app)
    assert len(sent) == 4


def test_looking_up_an_unknown_task_declares_nothing(app: Celery, raw: amqp.Connection) -> None:
    assert app.AsyncResult(new_id()).state == states.PENDING
    assert not exchange_exists(raw, app)
    prefix = app.conf.result_exchange
    assert not any(queue_exists(raw, f"{prefix}.shard.{n}") for n in range(8))


def test_the_inbox_disappears_with_its_process(
    app: Celery, node: rabbitmq.Node, eventually: Callable[..., Any]
) -> None:
    before = node.queue_count()
    with subprocesses.start(app, subprocess_jobs.wait_and_say, task_id=new_id()) as process:
        assert process.readline() == "waiting"
        assert node.queue_count() > before
        process.kill()
    eventually(lambda: node.queue_count() == before, 30)


def test_a_different_number_of_shards_is_refused_with_a_clear_error(make_app: Apps) -> None:
    task_id = new_id()
    make_app(shards=8).backend.store_result(task_id, 1, states.SUCCESS)
    app = make_app(shards=16)
    calls: Tuple[Callable[[], Any], ...] = (
        lambda: app.backend.store_result(task_id, 2, states.SUCCESS),
        lambda: app.backend.store_result(task_id, None, states.STARTED),
        lambda: app.AsyncResult(new_id()).get(timeout=LONG),
    )
    for ask in calls:
        with pytest.raises(ImproperlyConfigured, match="'shards'") as caught:
            ask()
        assert "16" in str(caught.value)
        assert "shards-8" in str(caught.value)
    assert make_app(shards=8).AsyncResult(task_id).get(timeout=LONG) == 1


def test_polling_with_a_different_number_of_shards_is_refused_instead_of_pending(
    make_app: Apps,
) -> None:
    writer, reader = make_app(shards=8), make_app(shards=16)
    task_id = new_id()
    while writer.backend.config.topology.shard(task_id) == reader.backend.config.topology.shard(
        task_id
    ):
        task_id = new_id()
    writer.backend.store_result(task_id, 1, states.SUCCESS)
    with pytest.raises(ImproperlyConfigured, match="'shards'"):
        reader.backend.get_task_meta(task_id)


def test_a_different_queue_type_is_refused_with_a_clear_error(make_app: Apps) -> None:
    classic = make_app(result_backend_transport_options={"shards": 1})
    quorum = make_app(result_backend_transport_options={"shards": 1, "queue_type": "quorum"})
    task_id = new_id()
    classic.backend.store_result(task_id, 1, states.SUCCESS)
    with pytest.raises(ImproperlyConfigured, match="'queue_type'"):
        quorum.backend.store_result(new_id(), 1, states.SUCCESS)
    assert classic.AsyncResult(task_id).get(timeout=LONG) == 1


def delete_shard(connection: amqp.Connection, app: Celery, task_id: str) -> str:
    name = str(
        app.backend.config.topology.shard_queue(app.backend.config.topology.shard(task_id)).name
    )
    connection.channel().queue_delete(name)
    return name


def test_a_deleted_shard_queue_is_declared_again_by_the_next_result(
    app: Celery, make_app: Apps, raw: amqp.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    task_id, reader = new_id(), make_app()
    app.backend.store_result(task_id, "lost", states.SUCCESS)
    assert reader.AsyncResult(task_id).state == states.SUCCESS
    name = delete_shard(raw, app, task_id)
    # The results in it are lost. Reading them is no error.
    assert reader.AsyncResult(task_id).state == states.PENDING
    with caplog.at_level(logging.CRITICAL):
        app.backend.store_result(task_id, "again", states.SUCCESS)
    assert queue_exists(raw, name)
    assert reader.AsyncResult(task_id).get(timeout=LONG) == "again"
    assert make_app().AsyncResult(task_id).get(timeout=LONG) == "again"


def test_a_shard_queue_deleted_under_an_intermediate_state_is_declared_again(
    app: Celery, make_app: Apps, raw: amqp.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    task_id = new_id()
    app.backend.store_result(task_id, None, states.STARTED)
    until_stored(app)
    delete_shard(raw, app, task_id)
    with caplog.at_level(logging.CRITICAL):
        app.backend.store_result(task_id, {"current": 1}, "PROGRESS")
        app.backend.store_result(task_id, 1, states.SUCCESS)
    assert make_app().AsyncResult(task_id).get(timeout=LONG) == 1


def id_beside(app: Celery, task_id: str) -> str:
    """Return another id in the shard of *task_id*."""
    shard = app.backend.config.topology.shard
    while True:
        other = new_id()
        if shard(other) == shard(task_id):
            return other


def test_a_result_stored_after_its_shard_was_deleted_is_kept_despite_a_waiter(
    app: Celery, make_app: Apps, raw: amqp.Connection, eventually: Callable[..., Any]
) -> None:
    # Given a waiter, so that every copy that is published reaches a queue.
    first, waiter = new_id(), make_app()
    app.backend.store_result(first, 1, states.SUCCESS)
    for number in range(10):
        second = id_beside(app, first)
        waiting = Waiting(lambda: waiter.AsyncResult(second).get(timeout=LONG))  # noqa: B023
        until_watched(waiter, second, eventually)
        # When an operator deletes the shard, and the very next result goes to it.
        delete_shard(raw, app, first)
        app.backend.store_result(second, number, states.SUCCESS)
        # Then the result is pushed, and is stored for other readers too.
        assert waiting.result() == number
        assert make_app().AsyncResult(second).result == number


def test_a_waiter_that_binds_while_a_state_is_returned_gets_it_pushed(
    app: Celery,
    raw: amqp.Connection,
    eventually: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task_id, channel = new_id(), raw.channel()
    app.backend.store_result(task_id, {}, "PROGRESS")
    until_stored(app)
    queue = channel.queue_declare("", exclusive=True).queue
    declarations = app.backend.layout.publisher._declarations
    check_limit = declarations.check_limit

    def begin() -> None:
        # The returned state is in no shard now, and its copy was published before this binding.
        channel.queue_bind(queue, declarations.topology.exchange, "#")
        check_limit()

    monkeypatch.setattr(declarations, "check_limit", begin)
    # When a state is published for a missing shard, and a waiter binds meanwhile
    delete_shard(raw, app, task_id)
    app.backend.store_result(task_id, 1, states.SUCCESS)
    # Then it is pushed, since a reader that checked the shard in between found nothing
    eventually(lambda: channel.queue_declare(queue, passive=True).message_count == 1)


def test_sending_a_chord_opens_no_inbox(app: Celery) -> None:
    task = app.signature("tests.nothing")
    chord([task.clone(), task.clone()])(task.clone())
    assert app.backend.layout.inbox._keeper.thread is None
