"""The reference page's statements about ``AMQPBackend.Consumer``, one by one.

RabbitMQ does not support all of them; the tests show what happens instead.
"""

from __future__ import annotations

import pickle
from typing import Any, List, Tuple

import kombu
import pytest
from kombu.exceptions import ContentDisallowed

from celery_amqp_results import AMQPBackend
from tests.broker.conftest import Entities, bodies, cut, drain, version_of

Consumer = AMQPBackend.Consumer
Producer = AMQPBackend.Producer


class Inbound:
    """A connection with a channel and queues, and the messages that its consumer received."""

    def __init__(self, entities: Entities, queues: int = 1) -> None:
        self.entities = entities
        self.connection = entities.connection()
        self.channel = self.connection.channel()
        self.queues = [entities.declared_queue(self.channel) for _ in range(queues)]
        self.queue = self.queues[0]
        self.bodies: List[Any] = []
        self.messages: List[Any] = []

    def take(self, body: Any, message: Any) -> None:
        """Record a message: the callback of the consumers."""
        self.bodies.append(body)
        self.messages.append(message)

    def consumer(self, **options: Any) -> kombu.Consumer:
        """Return a consumer of the first queue that has not started to consume."""
        options = {"queues": [self.queue], "callbacks": [self.take], **options}
        return Consumer(self.channel, **options)

    def send(self, *bodies: Any, queue: Any = None, **options: Any) -> None:
        """Put messages into a queue, the first one by default."""
        producer = Producer(self.channel)
        for body in bodies:
            producer.publish(body, routing_key=(queue or self.queue).name, **options)

    def consume_and_drain(self, consumer: kombu.Consumer) -> None:
        """Consume until an error is raised, possibly already by consume()."""
        consumer.consume()
        drain(self.connection, lambda: False)

    def drain(self, count: int) -> None:
        """Return when *count* messages have arrived in total."""
        drain(self.connection, lambda: len(self.bodies) >= count)
        assert len(self.bodies) == count


@pytest.fixture
def inbound(entities: Entities) -> Inbound:
    return Inbound(entities)


@pytest.fixture
def two_queues(entities: Entities) -> Inbound:
    return Inbound(entities, 2)


def test_it_is_a_kombu_consumer() -> None:
    assert issubclass(Consumer, kombu.Consumer)


# -- starting and ending -------------------------------------------------------------------------


def test_consume_starts_the_delivery(inbound: Inbound) -> None:
    consumer = inbound.consumer()
    inbound.send("a", {"b": [1, None]})
    inbound.entities.until_ready(inbound.queue, 2)
    consumer.consume()
    inbound.drain(2)
    assert inbound.bodies == ["a", {"b": [1, None]}]


def test_add_queue_does_not_start_consuming(two_queues: Inbound) -> None:
    consumer = two_queues.consumer()
    consumer.consume()
    added = consumer.add_queue(two_queues.queues[1])
    assert added.name == two_queues.queues[1].name
    two_queues.send(1, queue=two_queues.queues[1])
    assert not consumer.consuming_from(added)
    two_queues.entities.until_ready(two_queues.queues[1], 1)
    # Consuming again includes it, and does not disturb the other queue.
    consumer.consume()
    two_queues.drain(1)
    two_queues.send(2)
    two_queues.drain(2)


def test_add_queue_declares_the_queue(inbound: Inbound) -> None:
    queue = inbound.entities.queue()
    inbound.consumer(auto_declare=False).add_queue(queue)
    assert not inbound.entities.has_queue(queue)
    inbound.consumer().add_queue(queue)
    assert inbound.entities.has_queue(queue)


def test_consuming_again_does_not_cancel_a_removed_queue(two_queues: Inbound) -> None:
    consumer = two_queues.consumer(queues=two_queues.queues)
    consumer.consume()
    consumer.queues = [two_queues.queues[1]]
    consumer.consume()
    two_queues.send(1)
    two_queues.drain(1)


def test_cancel_by_queue_cancels_one_queue(two_queues: Inbound) -> None:
    consumer = two_queues.consumer(queues=two_queues.queues)
    consumer.consume()
    first, second = two_queues.queues
    consumer.cancel_by_queue(first.name)
    assert [queue.name for queue in consumer.queues] == [second.name]
    consumer.consume()
    two_queues.send(1, queue=first)
    two_queues.send(2, queue=second)
    two_queues.drain(1)
    assert two_queues.bodies == [2]
    # It accepts a queue object too, and a queue that is not being consumed.
    consumer.cancel_by_queue(second)
    consumer.cancel_by_queue(second)
    two_queues.send(3, queue=second)
    for queue in (first, second):
        two_queues.entities.until_ready(queue, 1)


@pytest.mark.parametrize("name", ["cancel", "close"])
def test_cancel_and_close_cancel_all_queues(two_queues: Inbound, name: str) -> None:
    consumer = two_queues.consumer(queues=two_queues.queues)
    consumer.consume()
    for queue in two_queues.queues:
        two_queues.send("before", queue=queue)
    two_queues.drain(2)
    getattr(consumer, name)()
    # No more messages are sent ...
    for queue in two_queues.queues:
        two_queues.send("after", queue=queue)
        two_queues.entities.until_ready(queue, 1)
        assert not consumer.consuming_from(queue)
    # ... and delivered messages still belong to the consumer.
    for message in two_queues.messages:
        message.ack()
    two_queues.channel.close()
    channel = two_queues.entities.channel()
    assert [bodies(queue.bind(channel)) for queue in two_queues.queues] == [["after"], ["after"]]


def test_consuming_from_accepts_a_name_or_a_queue(two_queues: Inbound) -> None:
    consumer = two_queues.consumer()
    first, second = two_queues.queues
    assert not consumer.consuming_from(first)
    consumer.consume()
    for queue in (first, first.name):
        assert consumer.consuming_from(queue) is True
    for queue in (second, second.name):
        assert consumer.consuming_from(queue) is False


# -- acknowledgements ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "argument", "stays"),
    [
        ({}, None, True),
        ({"no_ack": False}, None, True),
        ({"no_ack": True}, None, False),
        ({"no_ack": True}, False, True),
        ({}, True, False),
    ],
)
def test_no_ack_leaves_nothing_to_acknowledge(
    inbound: Inbound, options: Any, argument: Any, stays: bool
) -> None:
    assert Consumer.no_ack is None
    inbound.send("a")
    consumer = inbound.consumer(**options)
    consumer.consume(no_ack=argument)
    inbound.drain(1)
    inbound.channel.close()
    # Unacknowledged messages are back in the queue once the channel is closed.
    queue = inbound.queue.bind(inbound.entities.channel())
    assert bodies(queue) == (["a"] if stays else [])


def test_recover_with_requeue_redelivers_unacknowledged_messages(inbound: Inbound) -> None:
    inbound.send(1, 2)
    consumer = inbound.consumer()
    consumer.consume()
    inbound.drain(2)
    inbound.messages[0].ack()
    consumer.recover(requeue=True)
    inbound.drain(3)
    assert inbound.bodies == [1, 2, 2]
    assert [m.delivery_info["redelivered"] for m in inbound.messages] == [False, False, True]


def test_recover_with_requeue_may_deliver_to_another_consumer(inbound: Inbound) -> None:
    inbound.send(1)
    consumer = inbound.consumer()
    consumer.consume()
    inbound.drain(1)
    other = Inbound(inbound.entities)
    taking = other.consumer(queues=[inbound.queue.bind(other.channel)])
    taking.consume()
    consumer.cancel()
    consumer.recover(requeue=True)
    other.drain(1)
    assert other.bodies == inbound.bodies == [1]


def test_recover_without_requeue_is_an_error_before_anything_is_sent(inbound: Inbound) -> None:
    # RabbitMQ closes the connection for it.
    inbound.send(1)
    consumer = inbound.consumer()
    consumer.consume()
    inbound.drain(1)
    for recover in (consumer.recover, lambda: consumer.recover(requeue=False)):
        with pytest.raises(NotImplementedError, match=r"recover\(requeue=True\)"):
            recover()
    # The channel still works, and the suggested alternative works too.
    consumer.recover(requeue=True)
    inbound.drain(2)
    assert inbound.bodies == [1, 1]


# -- flow ----------------------------------------------------------------------------------------


def test_flow_can_be_enabled(inbound: Inbound) -> None:
    consumer = inbound.consumer()
    consumer.consume()
    consumer.flow(True)
    inbound.send(1)
    inbound.drain(1)


def test_flow_stops_the_delivery_and_goes_on(two_queues: Inbound) -> None:
    # Given a consumer that has received messages, and another one on the channel
    one, two = two_queues.queues
    consumer = two_queues.consumer(queues=[one, two])
    consumer.consume()
    third = two_queues.entities.declared_queue(two_queues.channel)
    two_queues.consumer(queues=[third]).consume()
    two_queues.send("a", queue=one)
    two_queues.send("b", queue=two)
    two_queues.drain(2)
    # When it stops the flow, twice
    consumer.flow(False)
    consumer.flow(False)
    for queue in (one, two):
        two_queues.send("late", queue=queue)
        two_queues.entities.until_ready(queue, 1)
        assert not consumer.consuming_from(queue)
    # Then it receives no more, while the other one does
    two_queues.send("other", queue=third)
    two_queues.drain(3)
    assert two_queues.bodies[2] == "other"
    # ... its delivered messages still belong to it
    for message in two_queues.messages[:2]:
        message.ack()
    # ... and the flow can go on, again and again
    consumer.flow(True)
    two_queues.drain(5)
    consumer.flow(False)
    consumer.flow(True)
    two_queues.send("end", queue=two)
    two_queues.drain(6)
    assert two_queues.bodies[3:] == ["late", "late", "end"]
    two_queues.channel.close()
    channel = two_queues.entities.channel()
    assert [sorted(bodies(queue.bind(channel))) for queue in (one, two)] == [
        ["late"],
        ["end", "late"],
    ]


def test_a_callback_may_stop_the_flow_while_more_is_on_the_way(inbound: Inbound) -> None:
    consumer = inbound.consumer()
    consumer.register_callback(lambda body, message: consumer.flow(False))
    inbound.send(*range(50))
    inbound.entities.until_ready(inbound.queue, 50)
    consumer.consume()
    drain(inbound.connection, lambda: inbound.bodies)
    # Messages that were already sent arrived in their order, and none twice.
    came = len(inbound.bodies)
    assert inbound.bodies == list(range(came))
    inbound.entities.until_ready(inbound.queue, 50 - came)
    while len(inbound.bodies) < 50:
        before = len(inbound.bodies)
        consumer.flow(True)
        drain(inbound.connection, lambda before=before: len(inbound.bodies) > before)  # type: ignore[misc]
    assert inbound.bodies == list(range(50))


def test_resuming_the_flow_restores_each_consumer(two_queues: Inbound) -> None:
    # Given one queue with acknowledgements and one without, and a third that is not consumed from
    # before the flow is stopped
    one, two = two_queues.queues
    three = two_queues.entities.declared_queue(two_queues.channel)
    consumer = two_queues.consumer(queues=[one])
    consumer.consume(no_ack=True)
    consumer.add_queue(two)
    consumer.consume(no_ack=False)
    consumer.flow(False)
    consumer.add_queue(three)
    consumer.consume()
    for queue in (one, two, three):
        two_queues.send("x", queue=queue)
        two_queues.entities.until_ready(queue, 1)
    assert two_queues.bodies == []
    # When one is cancelled, and the flow is resumed
    consumer.cancel_by_queue(three)
    consumer.flow(True)
    two_queues.drain(2)
    # Then the others are consumed from as before
    two_queues.channel.close()
    channel = two_queues.entities.channel()
    assert [bodies(queue.bind(channel)) for queue in (one, two, three)] == [[], ["x"], ["x"]]


def test_a_stopped_flow_stays_stopped_on_another_channel(inbound: Inbound) -> None:
    consumer = inbound.consumer()
    consumer.consume()
    consumer.flow(False)
    cut(inbound.connection)
    inbound.connection.collect()
    inbound.channel = inbound.connection.channel()
    consumer.revive(inbound.channel)
    inbound.queue = inbound.queue.bind(inbound.channel)
    inbound.send(1)
    inbound.entities.until_ready(inbound.queue, 1)
    consumer.flow(True)
    inbound.drain(1)
    # A cancelled queue does not start again.
    consumer.flow(False)
    consumer.cancel()
    consumer.flow(True)
    inbound.send(2)
    inbound.entities.until_ready(inbound.queue, 1)


def test_stopping_the_flow_is_refused_where_it_would_delete_the_queue(inbound: Inbound) -> None:
    going = inbound.entities.declared_queue(inbound.channel, auto_delete=True)
    consumer = inbound.consumer(queues=[inbound.queue, going])
    consumer.consume()
    with pytest.raises(NotImplementedError, match=f"{going.name}.*Nothing was stopped.*prefetch"):
        consumer.flow(False)
    for queue in (inbound.queue, going):
        inbound.send("x", queue=queue)
    inbound.drain(2)


def test_qos_limits_what_is_sent_in_advance(inbound: Inbound) -> None:
    inbound.send(1, 2, 3, 4, 5)
    consumer = inbound.consumer()
    consumer.qos(prefetch_count=2)
    consumer.consume()
    inbound.drain(2)
    inbound.entities.until_ready(inbound.queue, 3)
    # Each acknowledged message makes room for the next.
    inbound.messages[0].ack()
    inbound.drain(3)
    inbound.entities.until_ready(inbound.queue, 2)


def test_qos_of_zero_is_no_limit(inbound: Inbound) -> None:
    inbound.send(*range(50))
    consumer = inbound.consumer(prefetch_count=1)
    consumer.qos()
    consumer.consume()
    inbound.drain(50)


def test_qos_is_ignored_with_no_ack(inbound: Inbound) -> None:
    inbound.send(*range(10))
    consumer = inbound.consumer(no_ack=True)
    consumer.qos(prefetch_count=2)
    consumer.consume()
    inbound.drain(10)


def test_qos_by_bytes_is_an_error_before_anything_is_sent(inbound: Inbound) -> None:
    # RabbitMQ closes the connection for it.
    consumer = inbound.consumer()
    with pytest.raises(NotImplementedError, match=r"prefetch_size=1000.*prefetch_count"):
        consumer.qos(prefetch_size=1000)
    consumer.qos(prefetch_size=0, prefetch_count=1)
    inbound.send(1, 2)
    consumer.consume()
    inbound.drain(1)
    inbound.entities.until_ready(inbound.queue, 1)


@pytest.mark.parametrize("apply_global", [False, True])
def test_qos_is_for_each_consumer_or_for_the_channel(
    two_queues: Inbound, apply_global: bool
) -> None:
    for queue in two_queues.queues:
        two_queues.send(1, 2, 3, queue=queue)
    consumer = two_queues.consumer(queues=two_queues.queues)
    consumer.qos(prefetch_count=2, apply_global=apply_global)
    consumer.consume()
    # RabbitMQ then has one limit for all consumers of the channel, not of the connection. Since
    # 4.3 it has no such limit, and applies the value to each consumer.
    shared = apply_global and version_of(two_queues.connection) < (4, 3)
    two_queues.drain(2 if shared else 4)
    # Messages that are not delivered can be purged.
    assert consumer.purge() == (4 if shared else 2)


def test_prefetch_count_is_the_first_limit(inbound: Inbound) -> None:
    assert Consumer.prefetch_count is None
    inbound.send(1, 2, 3, 4, 5)
    consumer = inbound.consumer(prefetch_count=3)
    assert consumer.prefetch_count == 3
    consumer.consume()
    inbound.drain(3)
    inbound.entities.until_ready(inbound.queue, 2)


def test_purge_deletes_ready_messages(two_queues: Inbound) -> None:
    consumer = two_queues.consumer(queues=two_queues.queues, prefetch_count=1)
    first, second = two_queues.queues
    two_queues.send(1, 2, 3, queue=first)
    two_queues.send(4, queue=second)
    # One message is delivered to a consumer, so purging does not touch it.
    holder = two_queues.consumer(prefetch_count=1)
    holder.consume()
    two_queues.drain(1)
    assert consumer.purge() == 3
    for queue in (first, second):
        two_queues.entities.until_ready(queue, 0)
    two_queues.messages[0].requeue()
    two_queues.drain(2)
    assert two_queues.bodies == [1, 1]


# -- declarations --------------------------------------------------------------------------------


def test_queues_are_declared_at_instantiation(entities: Entities) -> None:
    assert Consumer.auto_declare is True
    exchange = entities.exchange("topic")
    queue = entities.queue(exchange, "a.*")
    channel = entities.channel()
    Consumer(channel, [queue])
    exchange(channel).publish("x", "a.b")
    assert bodies(queue(channel)) == ["x"]


def test_declare_declares_queues_exchanges_and_bindings(entities: Entities) -> None:
    exchange = entities.exchange("topic")
    queue = entities.queue(exchange, "a.*")
    channel = entities.channel()
    consumer = Consumer(channel, [queue], auto_declare=False)
    assert consumer.auto_declare is False
    assert not entities.has_queue(queue)
    assert not entities.has_exchange(exchange)
    consumer.declare()
    exchange(channel).publish("x", "a.b")
    assert bodies(queue(channel)) == ["x"]


def test_queues_channel_and_connection(two_queues: Inbound) -> None:
    consumer = two_queues.consumer(queues=two_queues.queues)
    assert [queue.name for queue in consumer.queues] == [q.name for q in two_queues.queues]
    assert consumer.channel is two_queues.channel
    assert consumer.connection is two_queues.connection
    # A single queue need not be in a list, and a connection is accepted for a channel.
    consumer = Consumer(two_queues.connection, two_queues.queue)
    assert [queue.name for queue in consumer.queues] == [two_queues.queue.name]
    assert consumer.channel is two_queues.connection.default_channel
    assert Consumer.channel is None
    assert Consumer(None).queues == []


def test_tag_prefix_begins_the_consumer_tags(two_queues: Inbound) -> None:
    consumer = two_queues.consumer(queues=two_queues.queues, tag_prefix="mine-")
    consumer.consume()
    for queue in two_queues.queues:
        two_queues.send("x", queue=queue)
    two_queues.drain(2)
    tags = [message.delivery_info["consumer_tag"] for message in two_queues.messages]
    assert all(tag.startswith("mine-") for tag in tags)
    assert len(set(tags)) == 2


def test_revive_resumes_after_the_connection_is_lost(inbound: Inbound) -> None:
    # Given a consumer with a limit of one that holds a message
    consumer = inbound.consumer(prefetch_count=1)
    inbound.send(1, 2)
    consumer.consume()
    inbound.drain(1)
    # When the connection is lost and there is another
    cut(inbound.connection)
    with pytest.raises(inbound.connection.connection_errors):
        drain(inbound.connection, lambda: False)
    inbound.connection.collect()
    channel = inbound.connection.channel()
    consumer.revive(channel)
    # Then it gets that message again, and its limit still applies
    assert consumer.channel is channel
    inbound.drain(2)
    assert inbound.bodies == [1, 1]
    inbound.entities.until_ready(inbound.queue.bind(channel), 1)
    inbound.messages[1].ack()
    inbound.drain(3)
    assert inbound.bodies[2] == 2


# -- callbacks -------------------------------------------------------------------------------------


def test_receive_calls_all_callbacks_in_their_order(inbound: Inbound) -> None:
    calls: List[Tuple[str, Any, Any]] = []
    consumer = inbound.consumer(callbacks=[lambda body, m: calls.append(("first", body, m))])
    consumer.register_callback(lambda body, m: calls.append(("second", body, m)))
    consumer.receive("body", "message")
    assert calls == [("first", "body", "message"), ("second", "body", "message")]
    calls.clear()
    inbound.send({"a": 1})
    consumer.consume()
    drain(inbound.connection, lambda: len(calls) == 2)
    assert [(name, body) for name, body, _ in calls] == [
        ("first", {"a": 1}),
        ("second", {"a": 1}),
    ]
    assert calls[0][2] is calls[1][2]
    assert isinstance(calls[0][2], kombu.Message)


def test_receive_without_callbacks_is_an_error(inbound: Inbound) -> None:
    assert Consumer.callbacks is None
    consumer = inbound.consumer(callbacks=None)
    with pytest.raises(NotImplementedError):
        consumer.receive("body", "message")
    inbound.send(1)
    with pytest.raises(NotImplementedError):
        inbound.consume_and_drain(consumer)


def test_on_message_is_called_instead_of_receive(inbound: Inbound) -> None:
    assert Consumer.on_message is None
    got: List[Any] = []
    consumer = inbound.consumer(on_message=got.append)
    inbound.send({"a": 1})
    inbound.send({"b": 2}, compression="gzip")
    # The body is never decoded, so the bad content type does no harm.
    inbound.send(b"{", content_type="application/json", content_encoding="utf-8")
    consumer.consume()
    drain(inbound.connection, lambda: len(got) == 3)
    assert [bytes(m.body) if isinstance(m.body, bytes) else m.body.encode() for m in got] == [
        b'{"a": 1}',
        b'{"b": 2}',
        b"{",
    ]
    assert inbound.bodies == []


def test_on_decode_error_gets_undecodable_messages(inbound: Inbound) -> None:
    assert Consumer.on_decode_error is None
    errors: List[Tuple[Any, Exception]] = []

    def on_decode_error(message: Any, error: Exception) -> None:
        errors.append((message, error))
        message.reject()

    consumer = inbound.consumer(on_decode_error=on_decode_error)
    inbound.send(b"{", content_type="application/json", content_encoding="utf-8")
    inbound.send(b"x", headers={"compression": "gzip"}, content_type="text/plain")
    inbound.send("good")
    consumer.consume()
    inbound.drain(1)
    assert inbound.bodies == ["good"]
    assert [type(message) is not None and str(error) != "" for message, error in errors] == [
        True
    ] * 2


def test_without_on_decode_error_the_error_is_raised(inbound: Inbound) -> None:
    inbound.send(b"{", content_type="application/json", content_encoding="utf-8")
    with pytest.raises(kombu.exceptions.DecodeError):
        inbound.consume_and_drain(inbound.consumer())


def test_content_disallowed_is_an_attribute() -> None:
    assert Consumer.ContentDisallowed is ContentDisallowed
    assert Consumer.accept is None


@pytest.mark.parametrize(
    ("accept", "content_type", "body"),
    [
        # By default, formats that can run code while they are decoded are refused.
        (None, "application/x-python-serialize", pickle.dumps(1)),
        (["text/plain"], "application/json", b"1"),
        (["json"], "text/plain", b"x"),
    ],
)
def test_content_that_is_not_accepted_is_disallowed(
    inbound: Inbound, accept: Any, content_type: str, body: bytes
) -> None:
    encoding = "binary" if "python" in content_type else "utf-8"
    inbound.send(body, content_type=content_type, content_encoding=encoding)
    with pytest.raises(Consumer.ContentDisallowed):
        inbound.consume_and_drain(inbound.consumer(accept=accept))
    assert inbound.bodies == []


def test_on_decode_error_gets_disallowed_content(inbound: Inbound) -> None:
    errors: List[Exception] = []
    consumer = inbound.consumer(accept=["json"], on_decode_error=lambda m, e: errors.append(e))
    inbound.send(pickle.dumps(1), content_type="application/x-python-serialize")
    consumer.consume()
    drain(inbound.connection, lambda: errors)
    assert isinstance(errors[0], ContentDisallowed)


def test_accept_takes_serializer_names_or_content_types(inbound: Inbound) -> None:
    consumer = inbound.consumer(accept=["pickle", "text/plain"])
    inbound.send((1, 2), serializer="pickle")
    inbound.send("text", content_type="text/plain", content_encoding="utf-8")
    consumer.consume()
    inbound.drain(2)
    assert inbound.bodies == [(1, 2), "text"]
