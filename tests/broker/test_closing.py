"""Closing a backend whose connections the broker has closed before."""

from __future__ import annotations

import logging
import threading

import pytest
from celery import states

from tests.broker.helpers import new_id
from tests.conftest import Apps
from tools import rabbitmq


def test_nothing_is_said_to_be_unconfirmed_where_everything_was_confirmed(
    make_app: Apps, node: rabbitmq.Node, caplog: pytest.LogCaptureFixture
) -> None:
    # Given several connections on which everything was confirmed, and that the broker has closed
    app = make_app()
    together = threading.Barrier(4)

    def store() -> None:
        together.wait(60)
        for _ in range(20):
            app.backend.store_result(new_id(), 1, states.SUCCESS)

    threads = [threading.Thread(target=store) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    node.ctl("close_all_connections", "maintenance")
    # When the backend is closed
    with caplog.at_level(logging.WARNING, "celery_amqp_results"):
        app.backend.close()
    # Then no warning is logged
    assert "not confirmed" not in caplog.text
