"""An operator deletes the exchange while processes use it."""

from __future__ import annotations

from typing import Tuple

import amqp
import pytest
from celery import Celery, states

from celery_amqp_results.feed import session, views
from tests.broker.helpers import LONG, Waiting, new_id, open_inbox, until_stored
from tests.conftest import Apps, eventually


def delete_exchange(raw: amqp.Connection, app: Celery) -> None:
    raw.channel().exchange_delete(app.backend.config.topology.exchange)


def test_a_process_that_has_stored_before_declares_the_exchange_again(
    make_app: Apps, raw: amqp.Connection
) -> None:
    # Given a process that has declared the exchange
    app, reader = make_app(), make_app()
    app.backend.store_result(new_id(), 1, states.SUCCESS)
    # When it is deleted, more than once
    for number in range(2):
        delete_exchange(raw, app)
        task_id = new_id()
        app.backend.store_result(task_id, number, states.SUCCESS)
        # Then the next result is stored
        assert reader.AsyncResult(task_id).result == number


def test_states_that_are_not_final_are_stored_without_the_exchange(
    make_app: Apps, raw: amqp.Connection
) -> None:
    app, reader = make_app(), make_app()
    app.backend.store_result(new_id(), 1, states.SUCCESS)
    delete_exchange(raw, app)
    task_id = new_id()
    app.backend.store_result(task_id, None, states.STARTED)
    app.backend.store_result(new_id(), None, states.SUCCESS)
    assert reader.AsyncResult(task_id).state == states.STARTED


# -- readers that answer from memory -------------------------------------------------------------


@pytest.fixture
def pair(make_app: Apps, monkeypatch: pytest.MonkeyPatch) -> Tuple[Celery, Celery]:
    """Return an app that stores, and one that knows the only shard completely.

    The views are not compared with the store while a test runs.
    """
    monkeypatch.setattr(views, "STEADY", 0.0)
    monkeypatch.setattr(views, "FIRST_CHECK", 1000.0)
    writer, reader = make_app(shards=1), make_app(shards=1)
    until_remembered(reader)
    return writer, reader


def until_remembered(reader: Celery) -> None:
    """Return when *reader* answers from memory."""
    before = reader.backend.metrics().remembered

    def asked() -> bool:
        reader.AsyncResult(new_id()).state  # noqa: B018 - asks
        return bool(reader.backend.metrics().remembered > before)

    eventually(asked)


def test_a_reader_with_a_live_view_answers_the_stored_state_after_the_exchange_was_deleted(
    pair: Tuple[Celery, Celery], raw: amqp.Connection
) -> None:
    writer, reader = pair
    # When the exchange is deleted, more than once, and declared again by the process that stores
    for number in range(2):
        delete_exchange(raw, writer)
        task_id = new_id()
        writer.backend.store_result(task_id, number, states.SUCCESS)
        # Then the next read finds what is stored
        assert reader.AsyncResult(task_id).state == states.SUCCESS
        # And later reads are answered from memory again
        until_remembered(reader)
        assert reader.AsyncResult(task_id).result == number


def test_a_reader_with_a_live_view_answers_the_stored_state_while_there_is_no_exchange(
    pair: Tuple[Celery, Celery], raw: amqp.Connection
) -> None:
    writer, reader = pair
    task_id = new_id()
    writer.backend.store_result(task_id, 0, "PROGRESS")
    until_stored(writer)
    delete_exchange(raw, writer)
    writer.backend.store_result(task_id, 1, states.STARTED)
    eventually(lambda: reader.AsyncResult(task_id).state == states.STARTED)
    until_remembered(reader)


def test_the_sender_of_a_task_answers_its_state_after_the_exchange_was_deleted(
    pair: Tuple[Celery, Celery], make_app: Apps, raw: amqp.Connection
) -> None:
    writer, _ = pair
    sender = make_app(shards=1)
    open_inbox(sender)
    result = sender.send_task("tests.nothing")
    assert result.state == states.PENDING
    assert sender.backend.metrics().remembered == 1
    delete_exchange(raw, writer)
    writer.backend.store_result(result.id, 1, states.SUCCESS)
    assert result.state == states.SUCCESS


def test_a_wait_goes_on_when_a_read_notices_that_the_exchange_was_deleted(
    pair: Tuple[Celery, Celery], raw: amqp.Connection
) -> None:
    writer, reader = pair
    task_id = new_id()
    waiting = Waiting(lambda: reader.AsyncResult(task_id).get(timeout=LONG))
    delete_exchange(raw, writer)
    assert reader.AsyncResult(task_id).state == states.PENDING
    writer.backend.store_result(task_id, 1, states.SUCCESS)
    assert waiting.result() == 1


def test_a_listener_for_everything_does_not_hide_that_the_bindings_are_gone(
    pair: Tuple[Celery, Celery], raw: amqp.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader = pair
    inbox = reader.backend.layout.inbox
    delete_exchange(raw, writer)
    task_id = new_id()
    writer.backend.store_result(task_id, 1, states.SUCCESS)
    # Given a queue that receives every message, so that the broker returns none
    channel = raw.channel()
    queue = channel.queue_declare("", exclusive=True).queue
    channel.queue_bind(queue, writer.backend.config.topology.exchange, "#")
    assert reader.AsyncResult(task_id).state == states.SUCCESS
    assert inbox.connections == 1
    # Then a barrier that has been away for long has the connection replaced
    monkeypatch.setattr(session, "LOST_SECONDS", 0.0)
    until_remembered(reader)
    assert inbox.connections == 2
    assert reader.AsyncResult(task_id).state == states.SUCCESS
