"""Results while ``broker_transport_options`` changes how py-amqp behaves."""

from __future__ import annotations

import os
import socket
from typing import Any, Dict

import pytest

from celery_amqp_results.store.lookup import HEARTBEAT
from tests.broker.helpers import new_id, open_inbox
from tests.conftest import Apps

OPTIONS: Dict[str, Dict[str, Any]] = {
    "confirms": {"confirm_publish": True},
    "retries": {
        "max_retries": 2,
        "interval_start": 0.1,
        "interval_step": 0.1,
        "interval_max": 0.5,
    },
    "properties": {"client_properties": {"app": "shop"}},
    "login": {"login_method": "PLAIN"},
    "timeouts": {"read_timeout": 1, "write_timeout": 1, "connect_timeout": 30},
    "heartbeat": {"heartbeat": 600},
    "socket": {"socket_settings": {socket.TCP_KEEPIDLE: 30}},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("layout", ["shared", "per-task"])
def test_every_transport_option_leaves_results_as_they_are(
    name: str, layout: str, make_app: Apps
) -> None:
    # Given apps with an option that Celery's documentation recommends, or that py-amqp knows
    options = {"layout": layout, **({"shards": 4} if layout == "shared" else {})}
    writer, reader = (
        make_app(
            broker_transport_options=dict(OPTIONS[name]), result_backend_transport_options=options
        )
        for _ in range(2)
    )
    ids = [new_id() for _ in range(20)]
    large = "x" * 300_000
    # When results are stored, small ones and a large one
    for number, task_id in enumerate(ids):
        writer.backend.store_result(task_id, number or large, "SUCCESS")
    # Then another process looks them up, waits for them, and forgets them
    assert reader.AsyncResult(ids[0]).get(timeout=60) == large
    assert [reader.AsyncResult(task_id).state for task_id in ids] == ["SUCCESS"] * 20
    assert [reader.AsyncResult(task_id).get(timeout=60) for task_id in ids[1:]] == list(
        range(1, 20)
    )
    reader.AsyncResult(ids[1]).forget()
    assert writer.AsyncResult(ids[1]).state == "PENDING"


def test_marks_are_published_on_a_connection_that_confirms(make_app: Apps) -> None:
    app = make_app(
        broker_transport_options={"confirm_publish": True},
        result_backend_transport_options={"shards": 4, "track_sent": True},
    )
    result = app.send_task("some.task")
    assert app.backend.fate(result.id).status in ("sent", "unknown")
    app.backend.store_result(result.id, 1, "SUCCESS")
    assert app.backend.fate(result.id).status == "stored"
    with app.connection_for_write() as connection:
        connection.channel().queue_delete(app.conf.task_default_queue)


@pytest.mark.parametrize("option", ["heartbeat", "connect_timeout"])
def test_what_the_backend_needs_is_not_changed_by_an_option(option: str, make_app: Apps) -> None:
    # A frozen reader must lose its shard soon, whatever heartbeat tasks are sent with.
    app = make_app(broker_transport_options={option: 600})
    app.backend.get_state(new_id())
    with app.backend.layout._pool.link() as link:
        assert link.amqp.heartbeat == HEARTBEAT
        if option == "connect_timeout":
            assert link.amqp.connect_timeout <= 600


def test_the_broker_shows_app_process_and_purpose_of_each_connection(
    make_app: Apps, node: Any
) -> None:
    app = make_app(broker_transport_options={"client_properties": {"connection_name": "shop"}})
    app.backend.store_result(new_id(), 1, "SUCCESS")
    app.backend.get_state(new_id())
    open_inbox(app)
    shown = node.ctl("list_connections", "client_properties")
    for purpose in ("publish", "lookups", "inbox"):
        assert f"shop: {app.main} {os.getpid()}@{socket.gethostname()} ({purpose})" in shown
