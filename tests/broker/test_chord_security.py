"""Attacks on chords by users who may read the plan queues, or publish to them.

Attacks on results are in ``test_security.py``.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping

import amqp
import pytest
from celery import Celery, states
from celery.app.task import Context

from celery_amqp_results.chords import firing
from celery_amqp_results.chords.service import Service
from celery_amqp_results.protocol.message import PLAN
from celery_amqp_results.protocol.names import PLAN_QUEUES, Route, plan_number
from tests import subprocesses
from tests.broker.helpers import LONG, new_id
from tests.broker.signing import SIGNING, make_keys, sign_with, signs
from tests.broker.test_chords_led import Sent, lead, send
from tests.broker.test_documented_permissions import documented_roles, user_with
from tests.broker.test_hostile_messages import publish_to, state_body, state_properties
from tests.broker.test_security import refuse_to_hand_out
from tests.conftest import Apps, eventually, raw_connection
from tools import rabbitmq


@pytest.fixture(params=["classic", "quorum"])
def app(request: pytest.FixtureRequest, make_app: Apps) -> Celery:
    return make_app(result_backend_transport_options={"shards": 1, "queue_type": request.param})


@pytest.fixture
def sent(app: Celery, monkeypatch: pytest.MonkeyPatch) -> Sent:
    return Sent(app, monkeypatch)


def plan_queue(app: Celery, group_id: str) -> str:
    return str(app.backend.config.topology.plan_queue(plan_number(group_id)).name)


def end(app: Celery, member: str, group_id: str, body: Any) -> None:
    """Store the result of a header's only task."""
    request = Context(id=member, group=group_id, chord=dict(body), ignore_result=False)
    app.backend.mark_as_done(member, "genuine", request)


class Consumer:
    """A consumer of a plan queue, on a connection of its own."""

    def __init__(self, connection: amqp.Connection, queue: str, **arguments: Any) -> None:
        self.connection = connection
        self.channel = connection.channel()
        self.received: List[amqp.Message] = []
        # Returns when the broker has the consumer.
        self.channel.basic_consume(queue, callback=self.received.append, arguments=arguments)

    def receive(self) -> amqp.Message:
        while not self.received:
            self.connection.drain_events(timeout=LONG)
        return self.received.pop()


@contextlib.contextmanager
def thief(node: rabbitmq.Node, queue: str, **arguments: Any) -> Iterator[Consumer]:
    """Yield a consumer of a user who may only read *queue*."""
    patterns = {"configure": "^$", "write": "^$", "read": f"^{queue}$"}
    with user_with(node, patterns) as url, raw_connection(url) as connection:
        yield Consumer(connection, queue, **arguments)


# -- who may read the plan queues ----------------------------------------------------------------


def test_a_chord_waits_while_another_user_holds_its_plan(
    app: Celery, node: rabbitmq.Node, sent: Sent
) -> None:
    group_id, member = new_id(), new_id()
    # Given a user who consumes the plan queue before any leader does
    body = send(app, group_id, [member])
    with thief(node, plan_queue(app, group_id)) as stolen:
        assert stolen.receive().properties["type"] == PLAN
        # When the chord's task ends
        leading = lead(app)
        end(app, member, group_id, body)
        # Then the leader knows nothing of the chord
        other = next(i for i in iter(new_id, "") if plan_queue(app, i) != plan_queue(app, group_id))
        end(app, "other", other, send(app, other, ["other"]))
        assert sent.once() == ["genuine"]
        assert leading.progress(group_id) is None
        eventually(lambda: leading.open == 0)
    # And fires it when that user has gone
    eventually(lambda: len(sent.results) == 2)


def test_a_chord_whose_plan_another_user_has_acknowledged_never_fires(
    app: Celery, node: rabbitmq.Node, sent: Sent, raw: amqp.Connection
) -> None:
    group_id, member = new_id(), new_id()
    body = send(app, group_id, [member])
    queue = plan_queue(app, group_id)
    with thief(node, queue) as stolen:
        stolen.channel.basic_ack(stolen.receive().delivery_tag)
    leading = lead(app)
    end(app, member, group_id, body)
    # The next chord of that queue fires
    second = next(i for i in iter(new_id, "") if plan_queue(app, i) == queue)
    end(app, "other", second, send(app, second, ["other"]))
    assert sent.once() == ["genuine"]
    assert leading.progress(group_id) is None
    channel = raw.channel()
    eventually(lambda: channel.queue_declare(queue, passive=True).message_count == 0)


def test_a_leader_keeps_its_plans_from_other_consumers(
    app: Celery, node: rabbitmq.Node, sent: Sent
) -> None:
    group_id, member = new_id(), new_id()
    later = next(i for i in iter(new_id, "") if plan_queue(app, i) == plan_queue(app, group_id))
    leading = lead(app)
    body = send(app, group_id, [member])
    eventually(lambda: leading.open == 1)
    queue = plan_queue(app, group_id)
    # When another user consumes with a higher priority, and purges the queue
    with thief(node, queue, **{"x-priority": 100}) as stolen:
        stolen.channel.queue_purge(queue)
        # Then the open chord fires all the same
        end(app, member, group_id, body)
        assert sent.once() == ["genuine"]
        # And later ones as well, but in quorum queues RabbitMQ 4 gives them to the higher priority
        end(app, "other", later, send(app, later, ["other"]))
        if app.backend.options.queue_type == "quorum" and not node.version.startswith("3."):
            assert stolen.receive().properties["type"] == PLAN
        else:
            eventually(lambda: len(sent.results) == 2)
    # And the leader fires them when that user has gone
    eventually(lambda: len(sent.results) == 2)


def test_a_documented_reader_can_neither_take_nor_delete_plans(
    app: Celery, make_app: Apps, node: rabbitmq.Node
) -> None:
    group_id = new_id()
    send(app, group_id, [new_id()])
    queue = plan_queue(app, group_id)
    patterns = dict(
        zip(("configure", "write", "read"), documented_roles(make_app.prefix)["reader"])
    )
    with user_with(node, patterns) as url:
        refuse_to_hand_out(url, queue)


# -- who may publish -----------------------------------------------------------------------------


def forged_plan(group_id: str, member: str, body: Any) -> Any:
    """Return a plan of an attacker who knows the wire format."""
    content = {"mark": new_id(), "results": [member], "began": 1, "again": True, "body": dict(body)}
    properties = state_properties(group_id, type=PLAN, headers={"state": "CHORD"})
    return ("forged", properties, json.dumps(content).encode())


def test_a_user_who_may_write_to_the_default_exchange_can_have_a_task_sent(
    app: Celery, node: rabbitmq.Node, sent: Sent, raw: amqp.Connection
) -> None:
    lead_and_declare(app, raw)
    app.backend.store_result(new_id(), 1, states.SUCCESS)
    group_id, member = new_id(), new_id()
    patterns = {"configure": "^$", "write": r"^amq\.default$", "read": "^$"}
    with user_with(node, patterns) as url, raw_connection(url) as connection:
        shard = app.backend.config.topology.shard_queue_name(0)
        publish_to(connection, shard, [("forged", state_properties(member), state_body(member))])
        plan = forged_plan(group_id, member, app.signature("tests.anything"))
        assert publish_to(connection, plan_queue(app, group_id), [plan]) == 1
    assert sent.once() == ["forged"]


def lead_and_declare(app: Celery, raw: amqp.Connection) -> Service:
    """Lead chords; return when all plan queues are declared."""
    leading = lead(app)
    last = app.backend.config.topology.plan_queue(PLAN_QUEUES - 1).name

    def declared() -> bool:
        try:
            return bool(raw.channel().queue_declare(last, passive=True).consumer_count)
        except amqp.NotFound:
            return False

    eventually(declared)
    return leading


def attack_signed_chords(app: Celery, folder: str) -> Dict[str, Any]:
    """Forge a plan, and the result of a header's task; return what the leader makes of them.

    Setting up security changes kombu for the whole process, so this runs in a process of its own.
    """
    fired: List[Any] = []

    def note(
        self: firing.BodySender, signature: Any, results: List[Any], options: Mapping[str, Any]
    ) -> None:
        fired.append(results)

    firing.BodySender.send = note  # type: ignore[method-assign]
    sign_with(app, folder, "known")
    with raw_connection(app.conf.broker_url) as connection:
        leading = lead_and_declare(app, connection)
        # An unsigned plan
        group_id, member = new_id(), new_id()
        plan = forged_plan(group_id, member, app.signature("tests.anything"))
        publish_to(connection, plan_queue(app, group_id), [plan])
        eventually(lambda: leading.rejected == 1)
        # An unsigned result of a header's task, before the genuine one
        group_id, member = new_id(), new_id()
        body = send(app, group_id, [member])
        eventually(lambda: leading.open == 1)
        topology = app.backend.config.topology
        route = Route(group_id=group_id, in_chord=True)
        message = amqp.Message(state_body(member), **state_properties(member))
        key = topology.routing_key(member, states.SUCCESS, route)
        publish_to_binding(connection, message, topology.exchange, key)
        end(app, member, group_id, body)
        eventually(lambda: leading.open == 0)
        state = app.AsyncResult(body.id).state
    return {"fired": fired, "body": state, "open": leading.open}


def publish_to_binding(
    connection: amqp.Connection, message: amqp.Message, exchange: str, key: str
) -> None:
    """Publish *message* as soon as a queue is bound for it."""
    channel = connection.channel()
    channel.confirm_select()
    returned: List[Any] = []
    channel.events["basic_return"].add(lambda *came_back: returned.append(came_back))

    def taken() -> bool:
        returned.clear()
        channel.basic_publish_confirm(message, exchange, key, mandatory=True)
        return not returned

    eventually(taken)


@signs
def test_unsigned_plans_and_results_fire_no_signed_chord(make_app: Apps, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    make_keys(tmp_path)
    app = make_app(shards=1, **SIGNING)
    assert subprocesses.run(app, attack_signed_chords, folder=str(tmp_path)) == {
        "fired": [],
        # Whoever may publish states can make a chord fail.
        "body": states.FAILURE,
        "open": 0,
    }
