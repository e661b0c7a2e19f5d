"""The reference page's statements about ``AMQPBackend.Producer``, one by one."""

from __future__ import annotations

import json
import socket
from typing import Any, Dict, List, Tuple

import kombu
import pytest
from amqp import exceptions as amqp_errors
from kombu.exceptions import OperationalError

from celery_amqp_results import AMQPBackend
from tests.broker.conftest import Entities, bodies, cut, drain, messages

Producer = AMQPBackend.Producer
Consumer = AMQPBackend.Consumer


class Outbound:
    """A connection with a producer, and a queue that it publishes to by default."""

    def __init__(self, entities: Entities) -> None:
        self.entities = entities
        self.connection = entities.connection()
        self.exchange = entities.exchange("fanout")
        self.queue = entities.declared_queue(entities.channel(), self.exchange)

    def producer(self, **options: Any) -> kombu.Producer:
        """Return a producer that publishes to the exchange of the queue."""
        return Producer(self.connection, **{"exchange": self.exchange, **options})

    def published(self, body: Any, **options: Any) -> Any:
        """Publish a message and return it as it arrives."""
        self.producer().publish(body, **options)
        return self.received()

    def received(self) -> Any:
        """Return the one message in the queue."""
        (message,) = self.wait_for(1)
        return message

    def wait_for(self, count: int) -> List[Any]:
        """Take exactly *count* messages out of the queue."""
        self.entities.until_ready(self.queue, count)
        found = messages(self.queue)
        assert len(found) == count
        return found


@pytest.fixture
def outbound(entities: Entities) -> Outbound:
    return Outbound(entities)


def test_it_is_a_kombu_producer() -> None:
    assert issubclass(Producer, kombu.Producer)


# -- where messages go ---------------------------------------------------------------------------


def test_exchange_and_routing_key_are_the_defaults(entities: Entities) -> None:
    assert (Producer.exchange, Producer.routing_key) == (None, "")
    channel = entities.channel()
    exchange = entities.exchange("topic")
    queue = entities.declared_queue(channel, exchange, "#")
    producer = Producer(channel, exchange, "by.default")
    assert producer.exchange == exchange
    assert producer.routing_key == "by.default"
    producer.publish(1)
    producer.publish(2, routing_key="given")
    producer.publish(3, routing_key="")
    keys = [(m.decode(), m.delivery_info["routing_key"]) for m in messages(queue)]
    assert keys == [(1, "by.default"), (2, "given"), (3, "")]


def test_without_an_exchange_the_key_is_the_name_of_a_queue(entities: Entities) -> None:
    channel = entities.channel()
    queue = entities.declared_queue(channel)
    Producer(channel).publish("x", routing_key=queue.name)
    assert bodies(queue) == ["x"]


def test_the_exchange_may_be_given_by_name(entities: Entities) -> None:
    channel = entities.channel()
    exchange = entities.exchange("fanout")(channel)
    queue = entities.declared_queue(channel, exchange)
    # A name does not say which type the exchange has, so it cannot be declared.
    Producer(channel, exchange.name).publish("x")
    assert bodies(queue) == ["x"]


@pytest.mark.parametrize("by_name", [False, True])
def test_publish_accepts_another_exchange(entities: Entities, by_name: bool) -> None:
    channel = entities.channel()
    exchange, other = entities.exchange("fanout"), entities.exchange("fanout")
    queues = [entities.declared_queue(channel, e) for e in (exchange, other)]
    Producer(channel, exchange).publish("x", exchange=other.name if by_name else other)
    assert [bodies(queue) for queue in queues] == [[], ["x"]]


def test_another_exchange_must_have_been_declared(entities: Entities) -> None:
    connection = entities.connection()
    producer = Producer(connection)
    producer.publish("x", exchange=entities.exchange())
    with pytest.raises(amqp_errors.NotFound):
        drain(connection, lambda: False)


# -- declarations --------------------------------------------------------------------------------


def test_the_exchange_is_declared_at_instantiation(entities: Entities) -> None:
    assert Producer.auto_declare is True
    by_channel, by_connection = entities.exchange(), entities.exchange()
    Producer(entities.channel(), by_channel)
    Producer(entities.connection(), by_connection)
    assert entities.has_exchange(by_channel)
    assert entities.has_exchange(by_connection)


def test_without_auto_declare_declare_does_it(entities: Entities) -> None:
    connection = entities.connection()
    exchange = entities.exchange("topic")
    producer = Producer(connection, exchange, auto_declare=False)
    assert producer.auto_declare is False
    producer.publish("x", exchange="amq.fanout")
    assert not entities.has_exchange(exchange)
    producer.declare()
    assert entities.has_exchange(exchange)


def test_declare_of_the_default_exchange_does_nothing(entities: Entities) -> None:
    Producer(entities.connection()).declare()


@pytest.mark.parametrize("sequence", [list, tuple])
def test_publish_declares_the_given_entities(entities: Entities, sequence: Any) -> None:
    channel = entities.channel()
    exchange, source = entities.exchange("fanout"), entities.exchange("direct")
    queue = entities.queue(exchange)
    declare = sequence([queue, source])
    Producer(channel, exchange).publish("x", declare=declare)
    assert bodies(queue(channel)) == ["x"]
    assert entities.has_exchange(source)
    # The caller's sequence is not changed.
    assert len(declare) == 2


def test_maybe_declare_declares_once_per_connection(entities: Entities) -> None:
    connection = entities.connection()
    producer = Producer(connection)
    exchange = entities.exchange()
    assert producer.maybe_declare(None) is None
    assert producer.maybe_declare(exchange) is True
    entities.channel().exchange_delete(exchange.name)
    assert producer.maybe_declare(exchange) is False
    assert not entities.has_exchange(exchange)
    # Another connection is another session.
    assert Producer(entities.connection()).maybe_declare(exchange) is True
    assert entities.has_exchange(exchange)


@pytest.mark.parametrize("bound", [False, True])
def test_maybe_declare_with_retry_connects_again(entities: Entities, bound: bool) -> None:
    connection = entities.connection()
    producer = Producer(connection)
    exchange = entities.exchange()
    if bound:
        exchange = exchange(producer.channel)
    producer.channel.exchange_declare("amq.direct", "direct", passive=True)
    cut(connection)
    producer.maybe_declare(exchange, retry=True, max_retries=3, interval_start=0)
    assert entities.has_exchange(exchange)


def test_maybe_declare_with_retry_learns_a_server_named_queue(entities: Entities) -> None:
    producer = Producer(entities.connection())
    queue = AMQPBackend.Queue(exclusive=True)
    assert producer.maybe_declare(queue, retry=True, max_retries=1) is True
    assert queue.name.startswith("amq.gen-")


# -- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body", [{"a": [1, 2.5, None, True], "ä": "€"}, "text", 5, None, [], "", {}]
)
def test_the_body_arrives(outbound: Outbound, body: Any) -> None:
    assert outbound.published(body).decode() == body


def test_the_default_serializer_is_json(outbound: Outbound) -> None:
    assert Producer.serializer is None
    message = outbound.published({"a": 1})
    assert (message.content_type, message.content_encoding) == ("application/json", "utf-8")
    assert json.loads(message.body) == {"a": 1}


def test_serializer_of_the_producer_and_of_a_message(outbound: Outbound) -> None:
    producer = outbound.producer(serializer="pickle")
    assert producer.serializer == "pickle"
    producer.publish((1, 2))
    producer.publish((1, 2), serializer="json")
    first, second = outbound.wait_for(2)
    assert first.content_type == "application/x-python-serialize"
    assert second.content_type == "application/json"
    first.accept = {"application/x-python-serialize"}
    assert (first.decode(), second.decode()) == ((1, 2), [1, 2])


def test_content_type_and_encoding_are_detected(outbound: Outbound) -> None:
    # With raw, the body is not touched.
    message = outbound.published("ä".encode("latin-1"), serializer="raw")
    assert (message.content_type, message.content_encoding) == ("application/data", "binary")
    assert message.body == b"\xe4"


@pytest.mark.parametrize(
    ("body", "given", "encoding", "raw"),
    [
        ("ä", None, "utf-8", "ä".encode()),
        ("ä", "latin-1", "latin-1", b"\xe4"),
        (b"\x00", None, "binary", b"\x00"),
        (b"{}", "utf-8", "utf-8", b"{}"),
    ],
)
def test_with_a_content_type_nothing_is_serialized(
    outbound: Outbound, body: Any, given: Any, encoding: str, raw: bytes
) -> None:
    message = outbound.published(body, content_type="text/x-mine", content_encoding=given)
    assert (message.content_type, message.content_encoding) == ("text/x-mine", encoding)
    body = message.body
    assert (body if isinstance(body, bytes) else body.encode(encoding)) == raw


@pytest.mark.parametrize("mode", [None, 1, "transient", 2, "persistent"])
def test_delivery_mode_is_a_number_or_a_name(outbound: Outbound, mode: Any) -> None:
    number = outbound.published("x", delivery_mode=mode).properties["delivery_mode"]
    assert number == (1 if mode in (1, "transient") else 2)


def test_priority_is_zero_by_default(outbound: Outbound) -> None:
    assert outbound.published("x").properties["priority"] == 0


def test_a_higher_priority_comes_first(entities: Entities) -> None:
    channel = entities.channel()
    queue = entities.declared_queue(channel, max_priority=9)
    producer = Producer(channel)
    for priority in (0, 9, 4):
        producer.publish(priority, routing_key=queue.name, priority=priority)
    entities.until_ready(queue, 3)
    assert bodies(queue) == [9, 4, 0]


def test_headers_arrive(outbound: Outbound) -> None:
    headers = {"text": "ä", "number": 1, "flag": True, "none": None, "list": [1], "dict": {"a": 1}}
    assert outbound.published("x", headers=headers).headers == headers


def test_compression_of_the_producer_and_of_a_message(outbound: Outbound) -> None:
    assert Producer.compression is None
    body = "long " * 1000
    sizes: List[int] = []
    channel = outbound.entities.channel()
    channel.auto_decode = False
    for options, argument in (({}, None), ({}, "gzip"), ({"compression": "zlib"}, None)):
        headers: Dict[str, Any] = {"mine": 1}
        producer = outbound.producer(**options)
        assert producer.compression == options.get("compression")
        producer.publish(body, compression=argument, headers=headers)
        outbound.entities.until_ready(outbound.queue, 1)
        raw = channel.basic_get(outbound.queue.name, no_ack=True)
        sizes.append(len(raw.body))
        assert channel.message_to_python(raw).decode() == body
        # The caller's dict is not changed, and serves for the next message.
        assert headers == {"mine": 1}
    assert sizes[0] == 5000
    assert max(sizes[1:]) < 500


def test_expiration_is_a_ttl_in_seconds(outbound: Outbound) -> None:
    producer = outbound.producer()
    assert outbound.published("x", expiration=12.5).properties["expiration"] == "12500"
    assert "expiration" not in outbound.published("x").properties
    producer.publish("soon", expiration=0.2)
    # The broker drops the message by itself.
    outbound.entities.until_ready(outbound.queue, 1)
    outbound.entities.until_ready(outbound.queue, 0)


def test_expiration_zero_delivers_only_to_a_ready_consumer(outbound: Outbound) -> None:
    # The error about 'immediate' recommends this instead.
    producer = outbound.producer()
    producer.publish("dropped", expiration=0)
    got: List[Any] = []
    connection = outbound.entities.connection()
    channel = connection.channel()
    consumer = Consumer(channel, [outbound.queue.bind(channel)], no_ack=True)
    consumer.register_callback(lambda body, message: got.append(body))
    consumer.consume()
    producer.publish("taken", expiration=0)
    drain(connection, lambda: got)
    assert got == ["taken"]


def test_other_properties_arrive(outbound: Outbound) -> None:
    given = {
        "correlation_id": "c",
        "reply_to": "r",
        "message_id": "m",
        "type": "t",
        "app_id": "a",
        "user_id": "guest",
    }
    properties = outbound.published("x", **given).properties
    assert {name: properties[name] for name in given} == given


# -- mandatory and immediate ---------------------------------------------------------------------


@pytest.mark.parametrize("by_channel", [False, True])
def test_on_return_gets_unroutable_mandatory_messages(entities: Entities, by_channel: bool) -> None:
    assert Producer.on_return is None
    connection = entities.connection()
    exchange = entities.exchange("direct")
    queue = entities.declared_queue(entities.channel(), exchange, "taken")
    returned: List[Tuple[Any, ...]] = []
    producer = Producer(
        connection.channel() if by_channel else connection,
        exchange,
        on_return=lambda *arguments: returned.append(arguments),
    )
    producer.publish("taken", routing_key="taken", mandatory=True)
    producer.publish("dropped", routing_key="nowhere")
    producer.publish({"a": 1}, routing_key="nowhere", mandatory=True, correlation_id="c")
    assert returned == []
    # The producer needs to drain events to use this.
    drain(connection, lambda: returned)
    ((exception, source, key, message),) = returned
    assert isinstance(exception, connection.channel_errors)
    assert (exception.reply_code, exception.reply_text) == (312, "NO_ROUTE")
    assert (source, key) == (exchange.name, "nowhere")
    assert message.properties["correlation_id"] == "c"
    assert json.loads(message.body) == {"a": 1}
    assert bodies(queue) == ["taken"]


def test_without_on_return_draining_raises_an_error_for_returned_messages(
    entities: Entities,
) -> None:
    connection = entities.connection()
    Producer(connection, entities.exchange()).publish("x", mandatory=True)
    with pytest.raises(connection.channel_errors, match="NO_ROUTE"):
        drain(connection, lambda: False)


def test_with_confirms_publish_itself_reports_an_unroutable_message(entities: Entities) -> None:
    connection = entities.connection(transport_options={"confirm_publish": True})
    returned: List[Any] = []
    producer = Producer(
        connection, entities.exchange(), on_return=lambda *arguments: returned.append(arguments)
    )
    producer.publish("x", mandatory=True)
    assert len(returned) == 1


def test_on_return_is_kept_when_the_producer_is_revived(entities: Entities) -> None:
    connection = entities.connection()
    returned: List[Any] = []
    producer = Producer(connection, on_return=lambda *arguments: returned.append(arguments))
    producer.publish("x", routing_key="lost", exchange="amq.direct")
    cut(connection)
    producer.publish(
        "x",
        routing_key="nowhere",
        exchange="amq.direct",
        mandatory=True,
        retry=True,
        retry_policy={"max_retries": 3},
    )
    drain(connection, lambda: returned)
    assert returned[0][2] == "nowhere"


def test_immediate_is_an_error_before_anything_is_sent(entities: Entities) -> None:
    connection = entities.connection()
    exchange = entities.exchange("fanout")
    queue = entities.declared_queue(entities.channel(), exchange)
    producer = Producer(connection, exchange)
    other = entities.queue()
    with pytest.raises(NotImplementedError, match="'immediate'"):
        producer.publish("1", immediate=True, declare=[other])
    assert not entities.has_queue(other)
    # The connection still works; RabbitMQ would have closed it.
    producer.publish("2")
    entities.until_ready(queue, 1)
    assert bodies(queue) == ["2"]


# -- retries, revival and the end ----------------------------------------------------------------


def test_without_retry_a_lost_connection_is_an_error(outbound: Outbound) -> None:
    producer = outbound.producer()
    producer.publish("before")
    cut(outbound.connection)
    with pytest.raises(outbound.connection.connection_errors):
        producer.publish("lost")
    assert [m.decode() for m in outbound.wait_for(1)] == ["before"]


def test_retry_publishes_and_declares_on_a_new_connection(outbound: Outbound) -> None:
    producer = outbound.producer()
    producer.publish("before")
    cut(outbound.connection)
    errors: List[Exception] = []
    other = outbound.entities.queue(outbound.exchange)
    producer.publish(
        "after",
        retry=True,
        retry_policy={"max_retries": 3, "errback": lambda exc, interval: errors.append(exc)},
        declare=[other],
    )
    assert [m.decode() for m in outbound.wait_for(2)] == ["before", "after"]
    assert isinstance(errors[0], outbound.connection.connection_errors)
    assert outbound.entities.has_queue(other)


def test_retry_policy_limits_attempts_and_delays(outbound: Outbound) -> None:
    producer = outbound.producer()
    producer.publish("before")
    # Given a broker that is gone for good
    cut(outbound.connection)
    with socket.socket() as closed:
        # Bound, but not listening: every connection is refused.
        closed.bind(("127.0.0.1", 0))
        outbound.connection.hostname, outbound.connection.port = closed.getsockname()
        intervals: List[float] = []
        policy = {
            "max_retries": 3,
            "interval_start": 0,
            "interval_step": 0.01,
            "interval_max": 0.02,
            "errback": lambda exc, interval: intervals.append(interval),
        }
        with pytest.raises(OperationalError):
            producer.publish("lost", retry=True, retry_policy=policy)
    # The first attempt is on the lost connection, the others on new ones.
    assert intervals[0] == 0
    assert 2 <= len(intervals) <= 5
    assert sorted(intervals) == intervals
    assert 0 < intervals[-1] <= 0.02


def test_revive_resumes_after_the_connection_is_lost(outbound: Outbound) -> None:
    producer = outbound.producer()
    producer.publish("before")
    cut(outbound.connection)
    with pytest.raises(outbound.connection.connection_errors):
        producer.publish("lost")
    outbound.connection.collect()
    channel = outbound.connection.channel()
    producer.revive(channel)
    assert producer.channel is channel
    producer.publish("after")
    producer.declare()
    assert [m.decode() for m in outbound.wait_for(2)] == ["before", "after"]


@pytest.mark.parametrize("name", ["release", "close"])
def test_release_and_close_leave_the_connection_to_its_owner(outbound: Outbound, name: str) -> None:
    producer = outbound.producer()
    producer.publish("before")
    getattr(producer, name)()
    assert outbound.connection.connected
    with outbound.producer() as another:
        another.publish("after")
    assert outbound.connection.connected
    assert [m.decode() for m in outbound.wait_for(2)] == ["before", "after"]


def test_channel_and_connection_are_those_given(entities: Entities) -> None:
    connection = entities.connection()
    channel = connection.channel()
    assert Producer(channel).channel is channel
    assert Producer(channel).connection is connection
    by_connection = Producer(connection)
    assert by_connection.connection is connection
    assert by_connection.channel is connection.default_channel
    # One without a channel gets it later.
    later = Producer(None, entities.exchange("fanout"))
    assert later.connection is None
    later.revive(channel)
    later.publish("x")
    assert later.channel is channel
