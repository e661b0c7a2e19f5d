"""Results that are stored without waiting for confirms, many at a time."""

from __future__ import annotations

import threading
import uuid
from typing import Any

import amqp
import pytest
from celery import Celery

from celery_amqp_results import errors
from celery_amqp_results.amqp.confirm_log import Outgoing, Publication, Status
from celery_amqp_results.amqp.confirms import ConfirmChannel
from celery_amqp_results.amqp.declarations import declare_exchange
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.store import publisher, strays, unwaited
from tests import subprocesses
from tests.broker.helpers import few_channels, flush
from tests.conftest import PATIENCE, Apps, eventually
from tools import rabbitmq
from tools.proxy import Proxy


@pytest.fixture
def few_unconfirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unwaited, "MAX_UNCONFIRMED", 20)
    monkeypatch.setattr(unwaited, "COLLECT_EVERY", 7)


@pytest.mark.usefixtures("few_unconfirmed")
def test_all_results_are_kept_and_the_number_of_unconfirmed_ones_is_limited(make_app: Apps) -> None:
    # Given a backend that does not wait for each confirm
    options = {"confirm": False, "shards": 8}
    app = make_app(result_backend_transport_options=options)
    ids = [str(uuid.uuid4()) for _ in range(300)]
    # When it stores more than the limit of unconfirmed results
    for number, task_id in enumerate(ids):
        app.backend.store_result(task_id, number, "SUCCESS")
        # Then the limit is never exceeded
        with app.backend.layout.publisher._channel.present() as channel:
            assert len(channel.log) <= 21
    # And every result is stored
    app.backend.close()
    reader = make_app(result_backend_transport_options={"shards": 8})
    found = reader.backend.layout.poll(ids)
    decoded = [reader.backend.reader.decode(found[task_id])["result"] for task_id in ids]
    assert decoded == list(range(300))


@pytest.mark.usefixtures("few_unconfirmed")
def test_returned_messages_between_confirms_are_published_again(
    make_app: Apps, raw: amqp.Connection
) -> None:
    # Given shards that the backend has declared, and an operator has deleted
    app = make_app(result_backend_transport_options={"confirm": False, "shards": 8})
    first = [str(uuid.uuid4()) for _ in range(100)]
    for task_id in first:
        app.backend.store_result(task_id, 1, "SUCCESS")
    flush(app)
    topology = app.backend.config.topology
    channel = raw.channel()
    for shard in range(8):
        channel.queue_delete(topology.shard_queue_name(shard))
    # When more results are stored, so that confirms and returned messages alternate
    second = [str(uuid.uuid4()) for _ in range(100)]
    for task_id in second:
        app.backend.store_result(task_id, 2, "SUCCESS")
    app.backend.close()
    # Then all of them are kept
    reader = make_app(result_backend_transport_options={"shards": 8})
    assert None not in reader.backend.layout.poll(second).values()


def test_results_stored_without_confirms_survive_a_connection_that_loses_them(
    make_app: Apps, node: rabbitmq.Node
) -> None:
    ids = [str(uuid.uuid4()) for _ in range(60)]
    with Proxy(node.amqp_port) as proxy:
        options = {"confirm": False, "shards": 4}
        app = make_app(proxy.url(node.url()), result_backend_transport_options=options)
        app.backend.store_result(str(uuid.uuid4()), 0, "SUCCESS")
        flush(app)
        # Given a network that takes everything and passes nothing on
        proxy.swallow()
        for number, task_id in enumerate(ids):
            app.backend.store_result(task_id, number, "SUCCESS")
        # When the connection is cut
        proxy.reset()
        proxy.resume()
        # Then what was lost is published again
        flush(app)
        with app.backend.layout.publisher._channel.present() as channel:
            assert list(channel.log) == []
    reader = make_app(shards=4)
    assert [reader.AsyncResult(task_id).get(timeout=0) for task_id in ids] == list(range(60))


@pytest.mark.parametrize("number", [2, 8])
def test_results_are_stored_without_confirms_where_channels_are_few(
    number: int, make_app: Apps, node: rabbitmq.Node
) -> None:
    task_ids = [str(uuid.uuid4()) for _ in range(20)]
    with few_channels(node, number):
        app = make_app(result_backend_transport_options={"confirm": False, "shards": 64})
        for task_id in task_ids:
            app.backend.store_result(task_id, 1, "SUCCESS")
        flush(app)
    # With two channels, one is kept for requests that the broker may refuse
    with app.backend.layout.publisher._channel.present() as channel:
        assert (channel._plain is None) == (number == 2)
    assert {app.AsyncResult(task_id).state for task_id in task_ids} == {"SUCCESS"}


def test_a_chord_part_waits_for_the_confirms_of_earlier_states(make_app: Apps) -> None:
    app = make_app(result_backend_transport_options={"confirm": False, "shards": 4})
    publish = app.backend.layout.publisher.publish
    message = Outgoing(app.backend.config.topology.shard_queue_name(0), {}, b"{}", 0)
    # Given a shard that is there, and a message to it without a confirm
    publish([message])
    publish([message], confirm=False)
    with app.backend.layout.publisher._channel.present() as channel:
        assert channel.log.unasked
    # When another one is confirmed
    publish([message])
    # Then nothing is outstanding
    with app.backend.layout.publisher._channel.present() as channel:
        assert list(channel.log) == []


def end_with_an_unconfirmed_state(app: Celery, storing: bool) -> None:
    """Store a state before each line that the parent writes, and end.

    With *storing*, a daemon thread waits meanwhile until the broker has its result.
    """
    publisher.FLUSH_SECONDS = 1.0
    backend = app.backend
    for state in ("SUCCESS", "PROGRESS"):
        backend.store_result(str(uuid.uuid4()), {}, state)
        subprocesses.say(state)
        subprocesses.hear()
    if storing:
        args: Any = (str(uuid.uuid4()), {}, "SUCCESS")
        threading.Thread(target=backend.store_result, args=args, daemon=True).start()
        # It connects by now.
        eventually(backend.layout.publisher._channel._io.locked)


@pytest.mark.parametrize("storing", [False, True])
def test_a_process_ends_while_the_broker_is_away_even_if_it_retries_for_ever(
    storing: bool, make_app: Apps, node: rabbitmq.Node
) -> None:
    with Proxy(node.amqp_port) as proxy:
        # Given a process that retries without end
        options = {"shards": 1, "retry_policy": {"max_retries": None}}
        app = make_app(proxy.url(node.url()), result_backend_transport_options=options)
        with subprocesses.start(app, end_with_an_unconfirmed_state, storing=storing) as process:
            assert process.readline() == "SUCCESS"
            # And a state that the broker has not confirmed
            proxy.stall()
            process.write_line("go on")
            assert process.readline() == "PROGRESS"
            # When the broker goes away for good
            proxy.refuse()
            process.write_line("go on")
            # Then the process ends
            process.answer(timeout=PATIENCE)


def test_a_returned_message_is_not_confused_with_an_earlier_one(make_app: Apps) -> None:
    # Given states in a shard that the broker has not confirmed
    app = make_app(shards=1)
    app.backend.store_result(str(uuid.uuid4()), 0, "SUCCESS")
    queue = app.backend.config.topology.shard_queue_name(0)
    link = app.backend.layout.publisher._connector.open(0.0)
    channel = ConfirmChannel(link)
    names = [f"{when} {number}" for when in ("before", "after") for number in range(5)]
    states = [
        # Some of them have the same body
        StateMessage(name, "STARTED", number % 3, b"{}", "application/json", "utf-8")
        for number, name in enumerate(names)
    ]
    messages = [Publication(Outgoing(queue, s.properties(True), s.body, 0, s.id)) for s in states]
    with link.corked():
        for message in messages[:5]:
            channel.publish(message)
        # When the shard is deleted, and more states are published
        channel.channel.queue_delete(queue, nowait=True)
        for message in messages[5:]:
            channel.publish(message)
    channel.wait(messages)
    link.close()
    # Then the publisher knows which messages were not stored
    returned = [p.message.what for p in messages if p.status is Status.RETURNED]
    assert returned == names[5:]


def test_a_refused_state_without_a_waiter_fails_no_other_store(
    make_app: Apps, raw: amqp.Connection, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strays, "REFUSAL_PAUSES", (0.0, 0.2))
    # Given two shards, one of which accepts a single message
    options = {"shards": 2, "declare": False, "retry_policy": {"max_retries": 0}}
    app = make_app(result_backend_transport_options=options)
    topology = app.backend.config.topology
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
    # When more states are published to that one without waiting
    for task_id in by_shard[1]:
        app.backend.store_result(task_id, {}, "PROGRESS")
    # Then results for the other shard are stored
    app.backend.store_result(by_shard[0][0], 1, "SUCCESS")
    assert app.AsyncResult(by_shard[0][0]).state == "SUCCESS"
    eventually(lambda: "the broker refused it 3 times" in caplog.text)
    # And a result for the full shard raises an error
    with pytest.raises(errors.NotConfirmed, match="nack"):
        app.backend.store_result(by_shard[1][0], 1, "SUCCESS")
    # Nor does it fail another result that the queue is deleted and may not be declared
    queue = topology.shard_queue_name(1)
    channel.queue_delete(queue)
    app.backend.store_result(by_shard[1][1], {}, "PROGRESS")
    app.backend.store_result(by_shard[0][1], 2, "SUCCESS")
    assert app.AsyncResult(by_shard[0][1]).state == "SUCCESS"
    eventually(lambda: f"the broker has no queue {queue}" in caplog.text)
    with pytest.raises(errors.DeclarationRefused, match=queue):
        app.backend.store_result(by_shard[1][1], 1, "SUCCESS")


def test_a_temporarily_refused_state_is_stored_with_a_later_result(
    make_app: Apps, raw: amqp.Connection
) -> None:
    # Given a shard that accepts a single message, and is full
    options = {"shards": 1, "declare": False}
    app = make_app(result_backend_transport_options=options)
    topology, channel = app.backend.config.topology, raw.channel()
    spec = topology.shard_queue(0)
    arguments = {**spec.arguments, "x-max-length": 1, "x-overflow": "reject-publish"}
    declare_exchange(channel, topology)
    channel.queue_declare(spec.name, durable=True, auto_delete=False, arguments=arguments)
    first, second = (str(uuid.uuid4()) for _ in range(2))
    app.backend.store_result(str(uuid.uuid4()), 0, "SUCCESS")
    # When it refuses a state whose confirm is not awaited
    app.backend.store_result(first, {}, "PROGRESS")
    with app.backend.layout.publisher._channel.present() as confirms:
        confirms.wait(confirms.log)
        assert confirms.log.strays
    # And accepts messages again
    channel.queue_delete(spec.name)
    channel.queue_declare(spec.name, durable=True, auto_delete=False, arguments=spec.arguments)
    # Then that state is stored together with the next result
    app.backend.store_result(second, 1, "SUCCESS")
    flush(app)
    reader = make_app(shards=1)
    assert reader.AsyncResult(first).state == "PROGRESS"
    assert reader.AsyncResult(second).state == "SUCCESS"


def test_a_new_process_declares_no_shard_that_is_there(
    make_app: Apps, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a shard, and a process that does not know it
    task_id = str(uuid.uuid4())
    make_app(shards=64).backend.store_result(task_id, 1, "STARTED")
    other = make_app(shards=64).backend
    stored = other.layout.stored_state
    eventually(lambda: stored(task_id) is not None)

    def check_room(declarations: Any, asking: Any, count: int) -> None:
        assert not count, "a declaration was about to be checked"

    monkeypatch.setattr("celery_amqp_results.amqp.declarations.Declarations.check_room", check_room)
    # When it stores a state without waiting for the confirm
    other.store_result(task_id, 2, "PROGRESS")
    # Then it asks for the queue and declares nothing
    eventually(lambda: stored(task_id).state == "PROGRESS")


def test_states_wait_for_the_next_connection_when_the_declaration_of_their_shard_fails(
    make_app: Apps,
) -> None:
    backend = make_app(shards=64).backend
    backend.store_result(str(uuid.uuid4()), 1, "SUCCESS")
    kept = backend.layout.publisher._unwaited
    lost = []
    for number in range(3):
        message = Outgoing("a queue that is gone", {}, b"{}", number, "a state")
        lost.append(Publication(message))
        lost[-1].waited, lost[-1].status = False, Status.RETURNED

    def send_again() -> None:
        with kept.channel.open(0.0) as channel:
            channel.log.strays = list(lost)
            channel.asking = lambda: (_ for _ in ()).throw(ConnectionResetError("reset"))
            kept.send(channel)

    with pytest.raises(OSError, match="reset"):
        send_again()
    assert len(kept.strays) == 3
    kept.strays.take_due(float("inf"))
