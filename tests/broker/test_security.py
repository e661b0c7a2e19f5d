"""Attacks by users who may publish on the virtual host, and the measures against them.

Hostile content is covered by ``test_hostile_messages.py``, the permissions of each role by
``test_documented_permissions.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, Dict, Iterator

import amqp
import pytest
from celery import Celery, states

from celery_amqp_results import errors
from celery_amqp_results.feed import views
from celery_amqp_results.store.publisher import Outgoing
from tests import subprocesses
from tests.broker.helpers import LONG, new_id
from tests.broker.signing import SIGNING, make_keys, sign_with, signs
from tests.broker.test_documented_permissions import documented, user_with
from tests.broker.test_hostile_messages import publish_to, state_body, state_properties
from tests.conftest import Apps, eventually, raw_connection
from tools import rabbitmq

#: Microseconds: older than any result that the tests store, so that a forged SUCCESS is the first.
LONG_AGO = 1_000_000


def shard_of(app: Celery, task_id: str) -> str:
    topology = app.backend.config.topology
    return str(topology.shard_queue_name(topology.shard(task_id)))


def exchange_of(app: Celery) -> str:
    return str(app.backend.config.topology.exchange)


def forge(url: str, app: Celery, task_id: str) -> None:
    """Publish a forged result to its shard, as an attacker who knows the wire format."""
    with raw_connection(url) as connection:
        forged = ("forged", state_properties(task_id), state_body(task_id))
        assert publish_to(connection, shard_of(app, task_id), [forged]) == 1


@contextlib.contextmanager
def refused(url: str) -> Iterator[amqp.Channel]:
    """Yield a channel of a user, whose use the broker must refuse in the block."""
    with raw_connection(url) as connection, pytest.raises(amqp.AccessRefused):
        yield connection.channel()


def refuse_to_hand_out(url: str, queue: str) -> None:
    """Check that the broker lets a user neither read, nor hold, nor empty, nor delete *queue*."""
    with refused(url) as channel:
        channel.basic_get(queue)
    with refused(url) as channel:
        channel.basic_consume(queue)
    with refused(url) as channel:
        channel.queue_purge(queue)
    with refused(url) as channel:
        channel.queue_delete(queue)


@pytest.fixture
def app(make_app: Apps) -> Celery:
    """An app with one shard, which is declared."""
    app = make_app(shards=1)
    app.backend.store_result(new_id(), 1, states.SUCCESS)
    return app


# -- what write permission allows ----------------------------------------------------------------


def test_a_user_who_may_write_to_the_default_exchange_can_forge_unsigned_results(
    app: Celery, node: rabbitmq.Node
) -> None:
    # Given a task with a result, and one without
    done, unknown = new_id(), new_id()
    app.backend.store_result(done, "genuine", states.FAILURE)
    with user_with(node, {"configure": "^$", "write": r"^amq\.default$", "read": "^$"}) as url:
        for task_id in (done, unknown):
            forge(url, app, task_id)
    # Then readers believe the forged results, so such users must be trusted, or results signed
    assert app.AsyncResult(unknown).get(timeout=LONG) == "forged"
    assert app.AsyncResult(done).get(timeout=LONG) == "forged"


def test_a_flood_of_forged_states_does_not_hide_results(app: Celery, raw: amqp.Connection) -> None:
    task_id = new_id()
    app.backend.store_result(task_id, "genuine", states.SUCCESS)
    others = (new_id() for _ in range(3000))
    flood = (("flood", state_properties(other), state_body(other)) for other in others)
    assert publish_to(raw, shard_of(app, task_id), flood) == 3000
    assert app.AsyncResult(task_id).get(timeout=LONG) == "genuine"
    app.backend.forget(task_id)
    assert app.AsyncResult(task_id).state == states.PENDING


# -- what missing permissions prevent ------------------------------------------------------------


def test_a_user_who_may_only_write_can_neither_read_nor_hold_nor_delete_results(
    app: Celery, node: rabbitmq.Node
) -> None:
    task_id = new_id()
    app.backend.store_result(task_id, "secret", states.SUCCESS)
    shard = shard_of(app, task_id)
    exchange = exchange_of(app)
    with user_with(node, {"configure": "^$", "write": r"^amq\.default$", "read": "^$"}) as url:
        refuse_to_hand_out(url, shard)
        with refused(url) as channel:
            channel.exchange_delete(exchange)
        with refused(url) as channel:
            channel.basic_publish_confirm(amqp.Message(b"x"), exchange, "a.b.c")
    assert app.AsyncResult(task_id).get(timeout=LONG) == "secret"


def test_a_listener_needs_no_permission_to_write_states_or_to_read_shards(
    app: Celery, node: rabbitmq.Node
) -> None:
    exchange = exchange_of(app)
    listener = {"configure": r"^listener\..*", "write": r"^listener\..*"}
    with user_with(node, {**listener, "read": rf"^({exchange}|listener\..*)$"}) as url:
        task_id = new_id()
        with raw_connection(url) as connection:
            channel = connection.channel()
            queue = f"listener.{new_id()}"
            channel.queue_declare(queue, exclusive=True, auto_delete=False)
            channel.queue_bind(queue, exchange, "#")
            app.backend.store_result(task_id, 1, states.SUCCESS)
            message = eventually(lambda: channel.basic_get(queue, no_ack=True))
            assert message.delivery_info["exchange"] == exchange
        with refused(url) as channel:
            channel.basic_get(shard_of(app, task_id))
        with refused(url) as channel:
            channel.basic_publish_confirm(amqp.Message(b"x"), "", shard_of(app, task_id))


def test_topic_permissions_limit_the_states_that_a_listener_can_bind(
    app: Celery, node: rabbitmq.Node
) -> None:
    exchange = exchange_of(app)
    listener = {"configure": r"^listener\..*", "write": r"^listener\..*"}
    with user_with(node, {**listener, "read": rf"^({exchange}|listener\..*)$"}) as url:
        user = url.partition("//")[2].partition(":")[0]
        node.ctl("set_topic_permissions", "-p", "/", user, exchange, "^$", r"\.FAILURE$")
        queue = f"listener.{new_id()}"
        with raw_connection(url) as connection:
            channel = connection.channel()
            channel.queue_declare(queue, exclusive=True, auto_delete=False)
            channel.queue_bind(queue, exchange, "#.FAILURE")
            app.backend.store_result(new_id(), 1, states.SUCCESS)
            app.backend.store_result(new_id(), ValueError("x"), states.FAILURE)
            message = eventually(lambda: channel.basic_get(queue, no_ack=True))
            assert message.delivery_info["routing_key"].endswith(".FAILURE")
            assert channel.basic_get(queue, no_ack=True) is None
        with refused(url) as channel:
            channel.queue_declare(queue, exclusive=True, auto_delete=False)
            channel.queue_bind(queue, exchange, "#")


def test_topic_permissions_prevent_forged_live_copies(app: Celery, node: rabbitmq.Node) -> None:
    exchange = exchange_of(app)
    with user_with(node, {"configure": "^$", "write": f"^{exchange}$", "read": "^$"}) as url:
        user = url.partition("//")[2].partition(":")[0]
        node.ctl("set_topic_permissions", "-p", "/", user, exchange, "^$", "^$")
        with refused(url) as channel:
            channel.basic_publish_confirm(amqp.Message(b"x"), exchange, "0.c.-.g.t.SUCCESS")
        # The durable copies go through the default exchange, where topic permissions do not apply.
        with refused(url) as channel:
            channel.basic_publish_confirm(amqp.Message(b"x"), "", shard_of(app, "t"))


@pytest.mark.parametrize("topics", ["^$", r"^barrier\."], ids=["none", "barriers"])
def test_a_reader_that_may_publish_no_state_answers_from_memory_if_it_may_publish_barriers(
    make_app: Apps, node: rabbitmq.Node, monkeypatch: pytest.MonkeyPatch, topics: str
) -> None:
    monkeypatch.setattr(views, "STEADY", 0.0)
    writer, task_id = make_app(shards=1), new_id()
    writer.backend.store_result(new_id(), 1, states.SUCCESS)
    exchange = exchange_of(writer)
    with user_with(node, documented(make_app.prefix)) as url:
        user = url.partition("//")[2].partition(":")[0]
        node.ctl("set_topic_permissions", "-p", "/", user, exchange, topics, ".*")
        reader = make_app(url, shards=1)
        # Given a view of the shard
        eventually(
            lambda: reader.AsyncResult(task_id).state and reader.backend.metrics().views,
        )
        writer.backend.store_result(task_id, 1, states.SUCCESS)
        for _ in range(5):
            assert reader.AsyncResult(task_id).state == states.SUCCESS
        # Then a reader whose barriers are refused asks the store
        assert (reader.backend.metrics().remembered > 0) == (topics != "^$")
        reader.backend.close()


# -- what signing prevents -----------------------------------------------------------------------


def attack_signed_results(app: Celery, folder: str) -> Dict[str, Any]:
    """Store signed results, replay and forge them; return what readers get.

    Setting up security changes kombu for the whole process, so this runs in a process of its own.
    """

    def read(task_id: str) -> str:
        try:
            return str(app.AsyncResult(task_id).get(timeout=60, propagate=False))
        except errors.ForeignMessage as exc:
            return type(exc).__name__

    def stored(task_id: str) -> Any:
        ((state,),) = app.backend.layout.store.read([task_id]).values()
        return state

    def publish(state: Any) -> None:
        topology = app.backend.config.topology
        shard = topology.shard(state.id)
        queue = topology.shard_queue_name(shard)
        outgoing = Outgoing(queue, state.properties(True), state.body, shard)
        app.backend.layout.publisher.publish([outgoing])

    sign_with(app, folder, "stranger")
    forged = new_id()
    app.backend.store_result(forged, "forged", states.SUCCESS)
    unknown_signer = stored(forged)
    sign_with(app, folder, "known")
    genuine, forgotten = new_id(), new_id()
    for task_id in (genuine, forgotten):
        app.backend.store_result(task_id, "genuine", states.SUCCESS)
    signed, before = stored(genuine), stored(forgotten)
    other, renamed = new_id(), new_id()
    publish(dataclasses.replace(signed, id=other))
    publish(dataclasses.replace(signed, id=renamed, state=states.FAILURE))
    # An earlier SUCCESS would be the first one, if it were genuine.
    publish(dataclasses.replace(unknown_signer, id=genuine, published=LONG_AGO))
    app.backend.forget(forgotten)
    gone = app.AsyncResult(forgotten).state
    publish(before)
    return {
        "replayed as another task": read(other),
        "replayed as another state": read(renamed),
        "genuine beside a forged one": read(genuine),
        "forgotten": gone,
        "replayed after it was forgotten": read(forgotten),
    }


@signs
def test_a_signed_result_cannot_be_used_for_another_task_or_state(
    make_app: Apps, tmp_path: Path
) -> None:
    pytest.importorskip("cryptography")
    make_keys(tmp_path)
    app = make_app(shards=1, **SIGNING)
    assert subprocesses.run(app, attack_signed_results, folder=str(tmp_path)) == {
        "replayed as another task": "ForeignMessage",
        "replayed as another state": "ForeignMessage",
        "genuine beside a forged one": "genuine",
        "forgotten": states.PENDING,
        # A signature has no memory: who can publish can bring an old result of a task back.
        "replayed after it was forgotten": "genuine",
    }
