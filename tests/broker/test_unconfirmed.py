"""Results that are stored without waiting for their confirms, many at a time."""

from __future__ import annotations

import uuid
from typing import Any

import amqp
import pytest

from celery_amqp_results import errors
from celery_amqp_results.amqp.confirms import ConfirmChannel, Outgoing
from celery_amqp_results.amqp.declarations import declare_exchange
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.store import publisher
from tests.conftest import Apps


@pytest.fixture
def few_unconfirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "MAX_UNCONFIRMED", 20)
    monkeypatch.setattr(publisher, "COLLECT_EVERY", 7)


@pytest.mark.usefixtures("few_unconfirmed")
def test_all_are_kept_and_few_are_unconfirmed(make_app: Apps) -> None:
    # Given a backend that does not wait for each confirm
    options = {"confirm": False, "shards": 8}
    app = make_app(result_backend_transport_options=options)
    ids = [str(uuid.uuid4()) for _ in range(300)]
    channels = app.backend.layout.publisher._idle
    # When it stores more than may be unconfirmed
    for number, task_id in enumerate(ids):
        app.backend.store_result(task_id, number, "SUCCESS")
        # Then no more are ever unconfirmed
        assert len(channels[0].unconfirmed) <= 20
    # And it knows of all shards that they are there, long before it waits for all confirms
    declarations = app.backend.layout.publisher._declarations
    assert all(declarations.has_shard(shard) for shard in range(8))
    # And everything is there
    app.backend.close()
    reader = make_app(result_backend_transport_options={"shards": 8})
    found = reader.backend.layout.poll(ids)
    decoded = [reader.backend._decode_state(found[task_id])["result"] for task_id in ids]
    assert decoded == list(range(300))


@pytest.mark.usefixtures("few_unconfirmed")
def test_what_comes_back_among_the_confirms_is_published_again(
    make_app: Apps, raw: amqp.Connection, caplog: Any
) -> None:
    # Given shards that the backend has declared, and that somebody has deleted since
    app = make_app(result_backend_transport_options={"confirm": False, "shards": 8})
    first = [str(uuid.uuid4()) for _ in range(100)]
    for task_id in first:
        app.backend.store_result(task_id, 1, "SUCCESS")
    app.backend.layout.publisher.publish(())
    topology = app.backend._topology
    channel = raw.channel()
    for shard in range(8):
        channel.queue_delete(topology.shard_queue_name(shard))
    # When more is stored, so that confirms and returned messages come in turn
    second = [str(uuid.uuid4()) for _ in range(100)]
    for task_id in second:
        app.backend.store_result(task_id, 2, "SUCCESS")
    app.backend.close()
    # Then all of that is kept
    reader = make_app(result_backend_transport_options={"shards": 8})
    assert None not in reader.backend.layout.poll(second).values()
    assert "a shard queue is not there" in caplog.text


def test_what_comes_back_is_not_taken_for_what_was_published_before(make_app: Apps) -> None:
    # Given states in a shard that the broker has not confirmed
    app = make_app(shards=1)
    app.backend.store_result(str(uuid.uuid4()), 0, "SUCCESS")
    queue = app.backend._topology.shard_queue_name(0)
    link = app.backend.layout.publisher._connector.open(0.0)
    channel = ConfirmChannel(link)
    names = [f"{when} {number}" for when in ("before", "after") for number in range(5)]
    states = [
        # Among them several with the same body
        StateMessage(name, "STARTED", number % 3, b"{}", "application/json", "utf-8")
        for number, name in enumerate(names)
    ]
    messages = [Outgoing(queue, s.properties(True), s.body, 0, s.id) for s in states]
    with link.corked():
        for message in messages[:5]:
            channel.publish(message)
        # When somebody deletes it, and more is published
        channel.channel.queue_delete(queue, nowait=True)
        for message in messages[5:]:
            channel.publish(message)
    channel.wait(list(channel.unconfirmed))
    link.close()
    # Then it is known what was not kept
    assert [message.what for message in channel.returned] == names[5:]


def test_what_nobody_waits_for_and_the_broker_refuses_is_no_error_of_somebody_else(
    make_app: Apps, raw: amqp.Connection, caplog: Any
) -> None:
    # Given two shards, one of which takes a single message
    options = {"shards": 2, "declare": False, "retry_policy": {"max_retries": 0}}
    app = make_app(result_backend_transport_options=options)
    topology = app.backend._topology
    channel = raw.channel()
    declare_exchange(channel, topology)
    full = {"x-max-length": 1, "x-overflow": "reject-publish"}
    for shard, more in enumerate(({}, full)):
        spec = topology.shard_queue(shard)
        arguments = {**spec.arguments, **more}
        channel.queue_declare(spec.name, durable=True, auto_delete=False, arguments=arguments)
    by_shard: Any = {0: [], 1: []}
    while min(map(len, by_shard.values())) < 9:
        task_id = str(uuid.uuid4())
        by_shard[topology.shard(task_id)].append(task_id)
    # When more is published to that one without waiting
    for task_id in by_shard[1]:
        app.backend.store_result(task_id, {}, "PROGRESS")
    # Then what is stored in the other is stored
    app.backend.store_result(by_shard[0][0], 1, "SUCCESS")
    assert app.AsyncResult(by_shard[0][0]).state == "SUCCESS"
    assert "lost, since the broker refused it 6 times" in caplog.text
    # And what is stored in that one is an error
    with pytest.raises(errors.NotConfirmed, match="nack"):
        app.backend.store_result(by_shard[1][0], 1, "SUCCESS")
    # Nor is it an error of somebody else that the queue is gone and nobody is to declare it
    queue = topology.shard_queue_name(1)
    channel.queue_delete(queue)
    app.backend.store_result(by_shard[1][1], {}, "PROGRESS")
    app.backend.store_result(by_shard[0][1], 2, "SUCCESS")
    assert app.AsyncResult(by_shard[0][1]).state == "SUCCESS"
    assert f"the broker has no queue {queue}" in caplog.text
    with pytest.raises(errors.DeclarationRefused, match=queue):
        app.backend.store_result(by_shard[1][1], 1, "SUCCESS")


def test_what_the_broker_refuses_for_a_while_is_kept_when_a_later_result_is(
    make_app: Apps, raw: amqp.Connection
) -> None:
    # Given a shard that takes a single message, and has it
    options = {"shards": 1, "declare": False}
    app = make_app(result_backend_transport_options=options)
    topology, channel = app.backend._topology, raw.channel()
    spec = topology.shard_queue(0)
    arguments = {**spec.arguments, "x-max-length": 1, "x-overflow": "reject-publish"}
    declare_exchange(channel, topology)
    channel.queue_declare(spec.name, durable=True, auto_delete=False, arguments=arguments)
    first, second = (str(uuid.uuid4()) for _ in range(2))
    app.backend.store_result(str(uuid.uuid4()), 0, "SUCCESS")
    # When it refuses a state that nobody waits for
    app.backend.store_result(first, {}, "PROGRESS")
    confirms = app.backend.layout.publisher._idle[0]
    confirms.wait(list(confirms.unconfirmed))
    assert confirms.nacked
    # And takes messages again
    channel.queue_delete(spec.name)
    channel.queue_declare(spec.name, durable=True, auto_delete=False, arguments=spec.arguments)
    # Then that is kept when the next result is
    app.backend.store_result(second, 1, "SUCCESS")
    reader = make_app(shards=1)
    assert reader.AsyncResult(first).state == "PROGRESS"
    assert reader.AsyncResult(second).state == "SUCCESS"
