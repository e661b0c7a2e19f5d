"""The reference page of Celery 4.3's ``celery.backends.amqp``, name by name, in both layouts."""

from __future__ import annotations

import importlib
import inspect
import operator
import pickle
import socket
import time
import uuid
from typing import Any, Dict, Iterator, List

import kombu
import pytest
from celery import Celery, states
from celery.app.task import Context
from celery.exceptions import TimeoutError
from celery.result import GroupResult

from celery_amqp_results import AMQPBackend
from tests.conftest import PATIENCE, Apps, connect, raw_connection

#: Seconds after which a wait counts as hanging.
LONG = PATIENCE

#: Parameters as documented, with their defaults.
DOCUMENTED: Dict[str, Dict[str, Any]] = {
    "as_uri": {"include_password": True},
    "consume": {"task_id": ..., "timeout": None, "no_ack": True, "on_interval": None},
    "delete_group": {"group_id": ...},
    "destination_for": {"task_id": ..., "request": ...},
    "drain_events": {
        "connection": ...,
        "consumer": ...,
        "timeout": None,
        "on_interval": None,
        "now": time.monotonic,
        "wait": None,
    },
    "get_many": {
        "task_ids": ...,
        "timeout": None,
        "no_ack": True,
        "on_message": None,
        "on_interval": None,
        "now": time.monotonic,
        "getfields": operator.itemgetter("status", "task_id"),
        "READY_STATES": states.READY_STATES,
        "PROPAGATE_STATES": states.PROPAGATE_STATES,
    },
    "get_task_meta": {"task_id": ..., "backlog_limit": 1000},
    "on_reply_declare": {"task_id": ...},
    "poll": {"task_id": ..., "backlog_limit": 1000},
    "reload_group_result": {"task_id": ...},
    "reload_task_result": {"task_id": ...},
    "restore_group": {"group_id": ..., "cache": True},
    "revive": {"channel": ...},
    "rkey": {"task_id": ...},
    "save_group": {"group_id": ..., "result": ...},
    "store_result": {
        "task_id": ...,
        "result": ...,
        "state": ...,
        "traceback": None,
        "request": None,
    },
    "wait_for": {
        "task_id": ...,
        "timeout": None,
        "cache": True,
        "no_ack": True,
        "on_interval": None,
        "READY_STATES": states.READY_STATES,
        "PROPAGATE_STATES": states.PROPAGATE_STATES,
    },
    "__init__": {
        "app": ...,
        "connection": None,
        "exchange": None,
        "exchange_type": None,
        "persistent": None,
        "serializer": None,
        "auto_delete": True,
    },
    "Consumer.__init__": {
        "channel": ...,
        "queues": None,
        "no_ack": None,
        "auto_declare": None,
        "callbacks": None,
        "on_decode_error": None,
        "on_message": None,
        "accept": None,
        "prefetch_count": None,
        "tag_prefix": None,
    },
    "Consumer.add_queue": {"queue": ...},
    "Consumer.cancel_by_queue": {"queue": ...},
    "Consumer.consume": {"no_ack": None},
    "Consumer.consuming_from": {"queue": ...},
    "Consumer.flow": {"active": ...},
    "Consumer.qos": {"prefetch_size": 0, "prefetch_count": 0, "apply_global": False},
    "Consumer.receive": {"body": ..., "message": ...},
    "Consumer.recover": {"requeue": False},
    "Consumer.register_callback": {"callback": ...},
    "Consumer.revive": {"channel": ...},
    "Exchange.__init__": {"name": "", "type": "", "channel": None},
    "Exchange.Message": {"body": ..., "delivery_mode": None, "properties": None},
    "Exchange.bind_to": {
        "exchange": "",
        "routing_key": "",
        "arguments": None,
        "nowait": False,
        "channel": None,
    },
    "Exchange.binding": {"routing_key": "", "arguments": None, "unbind_arguments": None},
    "Exchange.declare": {"nowait": False, "passive": None, "channel": None},
    "Exchange.delete": {"if_unused": False, "nowait": False},
    "Exchange.publish": {
        "message": ...,
        "routing_key": None,
        "mandatory": False,
        "immediate": False,
        "exchange": None,
    },
    "Exchange.unbind_from": {
        "source": "",
        "routing_key": "",
        "nowait": False,
        "arguments": None,
        "channel": None,
    },
    "Producer.__init__": {
        "channel": ...,
        "exchange": None,
        "routing_key": None,
        "serializer": None,
        "auto_declare": None,
        "compression": None,
        "on_return": None,
    },
    "Producer.maybe_declare": {"entity": ..., "retry": False},
    "Producer.publish": {
        "body": ...,
        "routing_key": None,
        "delivery_mode": None,
        "mandatory": False,
        "immediate": False,
        "priority": 0,
        "content_type": None,
        "content_encoding": None,
        "serializer": None,
        "headers": None,
        "compression": None,
        "exchange": None,
        "retry": False,
        "retry_policy": None,
        "declare": None,
        "expiration": None,
    },
    "Producer.revive": {"channel": ...},
}

#: Attributes of the classes as documented.
ATTRIBUTES: Dict[str, Dict[str, Any]] = {
    "Consumer": {
        "accept": None,
        "auto_declare": True,
        "callbacks": None,
        "channel": None,
        "no_ack": None,
        "on_decode_error": None,
        "on_message": None,
        "prefetch_count": None,
    },
    "Exchange": {
        "PERSISTENT_DELIVERY_MODE": 2,
        "TRANSIENT_DELIVERY_MODE": 1,
        "auto_delete": False,
        "delivery_mode": None,
        "durable": True,
        "name": "",
        "no_declare": False,
        "passive": False,
        "type": "direct",
    },
    "Producer": {
        "auto_declare": True,
        "compression": None,
        "exchange": None,
        "on_return": None,
        "routing_key": "",
        "serializer": None,
    },
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_parameters_and_defaults_are_the_documented_ones(name: str) -> None:
    signature = inspect.signature(operator.attrgetter(name)(AMQPBackend))
    found = [p for p in signature.parameters.values() if p.name != "self"]
    expected = DOCUMENTED[name]
    # In the documented order; parameters that Celery 5 adds come after.
    assert [p.name for p in found[: len(expected)]] == list(expected)
    for parameter in found[: len(expected)]:
        default = expected[parameter.name]
        if default is ...:
            assert parameter.default is inspect.Parameter.empty
        elif isinstance(default, operator.itemgetter):
            assert repr(parameter.default) == repr(default)
        else:
            assert parameter.default == default


def test_the_old_module_has_the_documented_names() -> None:
    old = importlib.import_module("celery.backends.amqp")
    assert old.AMQPBackend is AMQPBackend
    assert old.BacklogLimitExceeded is AMQPBackend.BacklogLimitExceeded
    assert issubclass(old.BacklogLimitExceeded, Exception)


def test_documented_attributes_have_their_values() -> None:
    assert issubclass(AMQPBackend.Exchange, kombu.Exchange)
    assert issubclass(AMQPBackend.Producer, kombu.Producer)
    assert issubclass(AMQPBackend.Consumer, kombu.Consumer)
    assert AMQPBackend.Queue.__name__ == "NoCacheQueue"
    assert issubclass(AMQPBackend.Queue, kombu.Queue)
    assert AMQPBackend.Queue("name").can_cache_declaration is False
    assert AMQPBackend.persistent is True
    assert AMQPBackend.supports_autoexpire is True
    assert AMQPBackend.supports_native_join is True
    assert AMQPBackend.retry_policy == {
        "interval_max": 1,
        "interval_start": 0,
        "interval_step": 1,
        "max_retries": 20,
    }


@pytest.mark.parametrize("owner", ATTRIBUTES)
def test_documented_entity_attributes_have_their_values(owner: str) -> None:
    entity = getattr(AMQPBackend, owner)
    expected = ATTRIBUTES[owner]
    assert {name: getattr(entity, name) for name in expected} == expected


@pytest.fixture(params=["shared", "per-task"])
def app(request: pytest.FixtureRequest, make_app: Apps) -> Celery:
    """An app with one of the layouts."""
    options: Dict[str, Any] = {"layout": request.param}
    if request.param == "shared":
        options["shards"] = 8
    return make_app(result_backend_transport_options=options, result_cache_max=100)


@pytest.fixture
def task_ids(make_app: Apps) -> Iterator[List[str]]:
    """Ids of tasks and groups, whose queues are deleted after the test."""
    ids = [str(uuid.uuid4()) for _ in range(4)]
    yield ids
    with raw_connection(make_app.url) as connection:
        channel = connection.channel()
        for task_id in ids:
            channel.queue_delete(task_id.replace("-", ""))


def test_store_result_poll_and_get_task_meta(app: Celery, task_ids: List[str]) -> None:
    backend = app.backend
    assert backend.store_result(task_ids[0], 1, states.SUCCESS) == 1
    for meta in (
        backend.poll(task_ids[0]),
        backend.poll(task_ids[0], 5),
        backend.get_task_meta(task_ids[0], backlog_limit=5),
        backend.get_task_meta(task_ids[0], False),
        backend.get_task_meta(task_ids[0], cache=False),
    ):
        assert (meta["status"], meta["result"]) == (states.SUCCESS, 1)
    assert backend.poll(task_ids[1], 5) == {"status": states.PENDING, "result": None}


def test_consume_waits_and_leaves_the_result(app: Celery, task_ids: List[str]) -> None:
    backend = app.backend
    with pytest.raises(TimeoutError):
        backend.consume(task_ids[0], timeout=0.1)
    backend.store_result(task_ids[0], 1, states.SUCCESS)
    for _ in range(2):
        meta = backend.consume(task_ids[0], timeout=LONG)
        assert (meta["task_id"], meta["status"], meta["result"]) == (task_ids[0], "SUCCESS", 1)


def test_a_success_after_a_consumed_failure_is_seen(app: Celery, task_ids: List[str]) -> None:
    app.backend.store_result(task_ids[0], ValueError("first run"), states.FAILURE)
    assert app.backend.consume(task_ids[0], timeout=LONG)["status"] == states.FAILURE
    app.backend.store_result(task_ids[0], 2, states.SUCCESS)
    assert app.AsyncResult(task_ids[0]).state == states.SUCCESS


def test_consume_calls_on_interval(app: Celery, task_ids: List[str]) -> None:
    called: List[int] = []
    # A busy broker may take longer than that to connect.
    for timeout in (1.3, LONG / 2):
        with pytest.raises(TimeoutError):
            app.backend.consume(task_ids[0], timeout, on_interval=lambda: called.append(1))
        if called:
            break
    assert called


def test_wait_for_returns_the_result_or_raises(app: Celery, task_ids: List[str]) -> None:
    backend = app.backend
    backend.store_result(task_ids[0], 1, states.SUCCESS)
    backend.store_result(task_ids[1], KeyError("gone"), states.FAILURE)
    assert backend.wait_for(task_ids[0], timeout=LONG) == 1
    with pytest.raises(KeyError, match="gone"):
        backend.wait_for(task_ids[1], timeout=LONG)
    with pytest.raises(TimeoutError):
        backend.wait_for(task_ids[2], timeout=0.1)


def test_get_many_yields_each(app: Celery, task_ids: List[str]) -> None:
    for number, task_id in enumerate(task_ids):
        app.backend.store_result(task_id, number, states.SUCCESS)
    found = {i: m["result"] for i, m in app.backend.get_many(task_ids, LONG, True, None, None)}
    assert found == {task_id: number for number, task_id in enumerate(task_ids)}


def test_groups_are_saved_restored_reloaded_and_deleted(app: Celery, task_ids: List[str]) -> None:
    backend = app.backend
    group = GroupResult(task_ids[0], [app.AsyncResult(i) for i in task_ids[1:]], app=app)
    assert backend.save_group(task_ids[0], group) is group
    assert backend.restore_group(task_ids[0]) == group
    assert backend.restore_group(task_ids[0], cache=False) == group
    backend.reload_group_result(task_ids[0])
    backend.delete_group(task_ids[0])
    assert backend.restore_group(task_ids[0], cache=False) is None


def test_reload_task_result_replaces_what_is_in_the_cache(app: Celery, task_ids: List[str]) -> None:
    backend = app.backend
    backend.store_result(task_ids[0], 1, states.SUCCESS)
    assert backend.get_task_meta(task_ids[0])["result"] == 1
    backend.forget(task_ids[0])
    backend.store_result(task_ids[0], 2, states.SUCCESS)
    backend.reload_task_result(task_ids[0])
    assert backend.get_task_meta(task_ids[0])["result"] == 2


def test_destination_for_and_rkey(app: Celery) -> None:
    backend = app.backend
    request = Context({"correlation_id": "another"})
    assert backend.destination_for("a-b", None) == (backend.rkey("a-b"), "a-b")
    assert backend.destination_for("a-b", request) == (backend.rkey("a-b"), "another")
    if backend.layout_name == "per-task":
        assert backend.rkey("a-b") == "ab"


def test_a_custom_queue_bound_by_rkey_gets_the_states(
    app: Celery, task_ids: List[str], make_app: Apps
) -> None:
    backend = app.backend
    with connect(make_app.url) as connection:
        queue = backend.Queue(
            "", backend.exchange, backend.rkey(task_ids[0]), exclusive=True, durable=False
        )
        with backend.Consumer(connection, queue, no_ack=True) as consumer:
            with pytest.raises(socket.timeout):
                backend.drain_events(connection, consumer, timeout=0.1)
            called: List[int] = []
            backend.store_result(task_ids[0], None, states.STARTED)
            backend.store_result(task_ids[1], 2, states.SUCCESS)
            backend.store_result(task_ids[0], 1, states.SUCCESS)
            found = backend.drain_events(
                connection, consumer, LONG, on_interval=lambda: called.append(1)
            )
    assert {i: meta["result"] for i, meta in found.items()} == {task_ids[0]: 1}
    assert called


def test_on_reply_declare_returns_the_queue_that_keeps_the_result(
    app: Celery, task_ids: List[str], make_app: Apps
) -> None:
    # A program may declare that queue itself, or declare it again: the arguments agree.
    app.backend.store_result(task_ids[0], 1, states.SUCCESS)
    (queue,) = app.backend.on_reply_declare(task_ids[0])
    with connect(make_app.url) as connection:
        bound = queue(connection.default_channel)
        bound.declare()
        assert bound.queue_declare(passive=True).message_count == 1


def test_revive_takes_a_channel(app: Celery, make_app: Apps) -> None:
    with connect(make_app.url) as connection:
        assert app.backend.revive(connection.default_channel) is None


def test_as_uri_hides_the_password(make_app: Apps) -> None:
    app = make_app("amqp://me:secret@host//")
    assert "secret" in app.backend.as_uri()
    assert "secret" not in app.backend.as_uri(include_password=False)


def test_the_documented_parameters_survive_pickling(app: Celery) -> None:
    backend = AMQPBackend(
        app, None, f"{app.conf.result_exchange}.x", "topic", False, "pickle", False, url="amqp://"
    )
    app.set_current()
    again = pickle.loads(pickle.dumps(backend))
    for each in (backend, again):
        assert each.config.wire.exchange == f"{app.conf.result_exchange}.x"
        assert each.config.wire.exchange_type == "topic"
        assert (each.persistent, each.delivery_mode) == (False, 1)
        assert (each.serializer, each.auto_delete) == ("pickle", False)
        each.close()
