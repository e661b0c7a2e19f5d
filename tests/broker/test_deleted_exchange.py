"""An operator deletes the exchange while processes use it."""

from __future__ import annotations

import amqp
from celery import Celery, states

from tests.broker.helpers import new_id
from tests.conftest import Apps


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
