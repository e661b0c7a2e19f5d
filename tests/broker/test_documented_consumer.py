"""What the reference page says of ``AMQPBackend.Consumer``, statement by statement.

Some of it RabbitMQ does not do; what happens instead is shown as well.
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
    """A connection with a channel and queues, and what a consumer was given there."""

    def __init__(self, entities: Entities, queues: int = 1) -> None:
        self.entities = entities
        self.connection = entities.connection()
        self.channel = self.connection.channel()
        self.queues = [entities.declared_queue(self.channel) for _ in range(queues)]
        self.queue = self.queues[0]
        self.bodies: List[Any] = []
        self.messages: List[Any] = []

    def take(self, body: Any, message: Any) -> None:
        """The callback of consumers."""
        self.bodies.append(body)
        self.messages.append(message)

    def consumer(self, **options: Any) -> kombu.Consumer:
        """Return a consumer of the first queue that does not consume yet."""
        options = {"queues": [self.queue], "callbacks": [self.take], **options}
        return Consumer(self.channel, **options)

    def send(self, *bodies: Any, queue: Any = None, **options: Any) -> None:
        """Put messages into a queue, the first one by default."""
        producer = Producer(self.channel)
        for body in bodies:
            producer.publish(body, routing_key=(queue or self.queue).name, **options)

    def consume_and_drain(self, consumer: kombu.Consumer) -> None:
        """Consume until there is an error, which consuming may meet already."""
        consumer.consume()
        drain(self.connection, lambda: False)

    def drain(self, count: int) -> None:
        """Return when so many messages have come in all."""
        drain(self.connection, lambda: len(self.bodies) >= count)
        assert len(self.bodies) == count


@pytest.fixture
def inbound(entities: Entities) -> Inbound:
    return Inbound(entities)


@pytest.fixture
def two_queues(entities: Entities) -> Inbound:
    return Inbound(entities, 2)


def test_it_is_kombus() -> None:
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
    # Consuming again takes it in, and does no harm to the other.
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


def test_consume_again_does_not_cancel_what_was_removed(two_queues: Inbound) -> None:
    consumer = two_queues.consumer(queues=two_queues.queues)
    consumer.consume()
    consumer.queues = [two_queues.queues[1]]
    consumer.consume()
    two_queues.send(1)
    two_queues.drain(1)


def test_cancel_by_queue_ends_one(two_queues: Inbound) -> None:
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
    # It takes the queue itself as well, and one that is not consumed from.
    consumer.cancel_by_queue(second)
    consumer.cancel_by_queue(second)
    two_queues.send(3, queue=second)
    for queue in (first, second):
        two_queues.entities.until_ready(queue, 1)


@pytest.mark.parametrize("name", ["cancel", "close"])
def test_cancel_and_close_end_all(two_queues: Inbound, name: str) -> None:
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
    # ... and what was delivered is still the consumer's.
    for message in two_queues.messages:
        message.ack()
    two_queues.channel.close()
    channel = two_queues.entities.channel()
    assert [bodies(queue.bind(channel)) for queue in two_queues.queues] == [["after"], ["after"]]


def test_consuming_from_takes_a_name_or_a_queue(two_queues: Inbound) -> None:
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
    # What was not acknowledged is back in the queue once the channel is closed.
    queue = inbound.queue.bind(inbound.entities.channel())
    assert bodies(queue) == (["a"] if stays else [])


def test_recover_with_requeue_redelivers_what_is_not_acknowledged(inbound: Inbound) -> None:
    inbound.send(1, 2)
    consumer = inbound.consumer()
    consumer.consume()
    inbound.drain(2)
    inbound.messages[0].ack()
    consumer.recover(requeue=True)
    inbound.drain(3)
    assert inbound.bodies == [1, 2, 2]
    assert [m.delivery_info["redelivered"] for m in inbound.messages] == [False, False, True]


def test_recover_with_requeue_may_deliver_to_somebody_else(inbound: Inbound) -> None:
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
    # The channel is as good as before, and what is suggested works.
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
    # Given a consumer that has been given messages, and another one on the channel
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
    # Then it is given no more, while the other one is
    two_queues.send("other", queue=third)
    two_queues.drain(3)
    assert two_queues.bodies[2] == "other"
    # ... what it was given is still its own
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
    # What was on the way came in their order, and nothing twice.
    came = len(inbound.bodies)
    assert inbound.bodies == list(range(came))
    inbound.entities.until_ready(inbound.queue, 50 - came)
    while len(inbound.bodies) < 50:
        before = len(inbound.bodies)
        consumer.flow(True)
        drain(inbound.connection, lambda before=before: len(inbound.bodies) > before)  # type: ignore[misc]
    assert inbound.bodies == list(range(50))


def test_the_flow_goes_on_as_it_was(two_queues: Inbound) -> None:
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
    # When one is cancelled, and the flow goes on
    consumer.cancel_by_queue(three)
    consumer.flow(True)
    two_queues.drain(2)
    # Then each is consumed from as before
    two_queues.channel.close()
    channel = two_queues.entities.channel()
    assert [bodies(queue.bind(channel)) for queue in (one, two, three)] == [[], ["x"], ["x"]]


def test_a_flow_that_was_stopped_stays_so_on_another_channel(inbound: Inbound) -> None:
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
    # What is cancelled does not begin again.
    consumer.flow(False)
    consumer.cancel()
    consumer.flow(True)
    inbound.send(2)
    inbound.entities.until_ready(inbound.queue, 1)


def test_the_flow_is_not_stopped_where_the_queue_would_go_with_it(inbound: Inbound) -> None:
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
    # Each one that is finished makes place for the next.
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
    # RabbitMQ has one limit for all consumers of the channel then, and not of the connection; from
    # 4.3 on it knows no such limit, and takes it for that of each consumer.
    shared = apply_global and version_of(two_queues.connection) < (4, 3)
    two_queues.drain(2 if shared else 4)
    # Whatever is not with the consumer can be purged.
    assert consumer.purge() == (4 if shared else 2)


def test_prefetch_count_is_the_first_limit(inbound: Inbound) -> None:
    assert Consumer.prefetch_count is None
    inbound.send(1, 2, 3, 4, 5)
    consumer = inbound.consumer(prefetch_count=3)
    assert consumer.prefetch_count == 3
    consumer.consume()
    inbound.drain(3)
    inbound.entities.until_ready(inbound.queue, 2)


def test_purge_deletes_what_is_ready(two_queues: Inbound) -> None:
    consumer = two_queues.consumer(queues=two_queues.queues, prefetch_count=1)
    first, second = two_queues.queues
    two_queues.send(1, 2, 3, queue=first)
    two_queues.send(4, queue=second)
    # One is with a consumer, and so is not touched.
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
    # One queue need not be in a list, and a connection will do for a channel.
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


def test_revive_goes_on_after_the_connection_is_lost(inbound: Inbound) -> None:
    # Given a consumer with a limit of one, that holds a message
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
    # Then it is given that message again, and has its limit again
    assert consumer.channel is channel
    inbound.drain(2)
    assert inbound.bodies == [1, 1]
    inbound.entities.until_ready(inbound.queue.bind(channel), 1)
    inbound.messages[1].ack()
    inbound.drain(3)
    assert inbound.bodies[2] == 2


# -- what is called ------------------------------------------------------------------------------


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


def test_on_message_is_called_in_the_place_of_receive(inbound: Inbound) -> None:
    assert Consumer.on_message is None
    got: List[Any] = []
    consumer = inbound.consumer(on_message=got.append)
    inbound.send({"a": 1})
    inbound.send({"b": 2}, compression="gzip")
    # Not decoded, so that nobody minds.
    inbound.send(b"{", content_type="application/json", content_encoding="utf-8")
    consumer.consume()
    drain(inbound.connection, lambda: len(got) == 3)
    assert [bytes(m.body) if isinstance(m.body, bytes) else m.body.encode() for m in got] == [
        b'{"a": 1}',
        b'{"b": 2}',
        b"{",
    ]
    assert inbound.bodies == []


def test_on_decode_error_gets_what_cannot_be_decoded(inbound: Inbound) -> None:
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


def test_without_on_decode_error_it_is_raised(inbound: Inbound) -> None:
    inbound.send(b"{", content_type="application/json", content_encoding="utf-8")
    with pytest.raises(kombu.exceptions.DecodeError):
        inbound.consume_and_drain(inbound.consumer())


def test_content_disallowed_is_an_attribute() -> None:
    assert Consumer.ContentDisallowed is ContentDisallowed
    assert Consumer.accept is None


@pytest.mark.parametrize(
    ("accept", "content_type", "body"),
    [
        # By default, what can run code while it is read is not accepted.
        (None, "application/x-python-serialize", pickle.dumps(1)),
        (["text/plain"], "application/json", b"1"),
        (["json"], "text/plain", b"x"),
    ],
)
def test_what_is_not_accepted_is_disallowed(
    inbound: Inbound, accept: Any, content_type: str, body: bytes
) -> None:
    encoding = "binary" if "python" in content_type else "utf-8"
    inbound.send(body, content_type=content_type, content_encoding=encoding)
    with pytest.raises(Consumer.ContentDisallowed):
        inbound.consume_and_drain(inbound.consumer(accept=accept))
    assert inbound.bodies == []


def test_on_decode_error_gets_what_is_disallowed(inbound: Inbound) -> None:
    errors: List[Exception] = []
    consumer = inbound.consumer(accept=["json"], on_decode_error=lambda m, e: errors.append(e))
    inbound.send(pickle.dumps(1), content_type="application/x-python-serialize")
    consumer.consume()
    drain(inbound.connection, lambda: errors)
    assert isinstance(errors[0], ContentDisallowed)


def test_what_is_accepted_is_named_by_serializer_or_type(inbound: Inbound) -> None:
    consumer = inbound.consumer(accept=["pickle", "text/plain"])
    inbound.send((1, 2), serializer="pickle")
    inbound.send("text", content_type="text/plain", content_encoding="utf-8")
    consumer.consume()
    inbound.drain(2)
    assert inbound.bodies == [(1, 2), "text"]
