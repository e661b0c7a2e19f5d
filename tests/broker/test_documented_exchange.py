"""The reference page's statements about ``AMQPBackend.Exchange``, one by one."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Tuple

import kombu
import pytest
from amqp import exceptions as amqp_errors
from kombu.exceptions import NotBoundError

from celery_amqp_results import AMQPBackend
from tests.broker.conftest import Entities, bodies, drain, messages

Exchange = AMQPBackend.Exchange
Producer = AMQPBackend.Producer


def published(exchange: kombu.Exchange, keys: List[str]) -> None:
    """Publish each key as a message with that key."""
    for key in keys:
        exchange.publish(key, key)


# -- the four types ------------------------------------------------------------------------------


def test_it_is_a_kombu_exchange() -> None:
    assert issubclass(Exchange, kombu.Exchange)


def test_direct_routes_by_the_exact_key(entities: Entities) -> None:
    channel = entities.channel()
    exchange = entities.exchange("direct")(channel)
    one = entities.declared_queue(channel, exchange, "one")
    two = entities.declared_queue(channel, exchange, "two.*")
    published(exchange, ["one", "two", "two.x", "two.*", "one.", "", "ONE"])
    assert bodies(one) == ["one"]
    assert bodies(two) == ["two.*"]


def test_direct_is_the_default_type(entities: Entities) -> None:
    channel = entities.channel()
    exchange = entities.exchange()(channel)
    assert exchange.type == Exchange.type == "direct"
    exchange.declare()
    # The broker has that type too: it would refuse a declaration with another.
    channel.exchange_declare(exchange.name, "direct", durable=True, auto_delete=False)


def test_topic_star_is_one_word(entities: Entities) -> None:
    channel = entities.channel()
    exchange = entities.exchange("topic")(channel)
    queue = entities.declared_queue(channel, exchange, "*.stock")
    published(exchange, ["usd.stock", "stock", "usd.nyse.stock", "eur.stock", "usd.stock.db"])
    assert bodies(queue) == ["usd.stock", "eur.stock"]


def test_topic_hash_is_any_number_of_words(entities: Entities) -> None:
    channel = entities.channel()
    exchange = entities.exchange("topic")(channel)
    queue = entities.declared_queue(channel, exchange, "*.stock.#")
    published(exchange, ["usd.stock", "eur.stock.db", "eur.stock.db.x", "stock.nasdaq", "stock"])
    assert bodies(queue) == ["usd.stock", "eur.stock.db", "eur.stock.db.x"]


def test_fanout_routes_to_all_queues_regardless_of_the_key(entities: Entities) -> None:
    channel = entities.channel()
    exchange = entities.exchange("fanout")(channel)
    queues = [entities.declared_queue(channel, exchange, key) for key in ("", "a", "b")]
    other = entities.declared_queue(channel)
    published(exchange, ["a", "c"])
    assert [bodies(queue) for queue in queues] == [["a", "c"]] * 3
    assert bodies(other) == []


HEADERS = [
    {"format": "pdf", "type": "report"},
    {"format": "pdf", "type": "log"},
    {"format": "zip", "type": "log"},
    {"format": "pdf"},
    {"format": "pdf", "type": "report", "more": 1},
    {},
]


@pytest.mark.parametrize(("match", "taken"), [("all", [0, 4]), ("any", [0, 1, 3, 4])])
def test_headers_match_all_or_any(entities: Entities, match: str, taken: List[int]) -> None:
    channel = entities.channel()
    exchange = entities.exchange("headers")(channel)
    arguments = {"x-match": match, "format": "pdf", "type": "report"}
    queue = entities.declared_queue(channel, exchange, binding_arguments=arguments)
    for number, headers in enumerate(HEADERS):
        exchange.publish(exchange.Message(str(number), headers=headers))
    assert bodies(queue) == [str(number) for number in taken]


def test_an_empty_name_is_the_default_exchange(entities: Entities) -> None:
    channel = entities.channel()
    queue = entities.declared_queue(channel)
    exchange = Exchange()(channel)
    assert exchange.name == Exchange.name == ""
    # It always exists, and must not be declared.
    exchange.declare()
    exchange.publish("to the queue of that name", queue.name)
    assert bodies(queue) == ["to the queue of that name"]


# -- declarations --------------------------------------------------------------------------------


def test_declare_creates_the_exchange(entities: Entities) -> None:
    exchange = entities.exchange()(entities.channel())
    assert not entities.has_exchange(exchange)
    exchange.declare()
    assert entities.has_exchange(exchange)


def test_declare_with_nowait_does_not_wait_for_an_answer(entities: Entities) -> None:
    channel = entities.channel()
    exchange = entities.exchange()(channel)
    assert exchange.declare(nowait=True) is None
    # The next request on the channel finds it.
    exchange.declare(passive=True)


def test_declare_takes_another_channel(entities: Entities) -> None:
    exchange = entities.exchange()
    exchange.declare(channel=entities.channel())
    assert entities.has_exchange(exchange)


@pytest.mark.parametrize("by_attribute", [True, False])
def test_passive_asserts_that_the_exchange_exists(entities: Entities, by_attribute: bool) -> None:
    exchange = entities.exchange(passive=by_attribute)
    assert Exchange.passive is False
    asked = {} if by_attribute else {"passive": True}
    with pytest.raises(amqp_errors.NotFound):
        exchange(entities.channel()).declare(**asked)
    assert not entities.has_exchange(exchange)
    exchange(entities.channel()).declare(passive=False)
    exchange(entities.channel()).declare(**asked)


def test_no_declare_declares_nothing(entities: Entities) -> None:
    channel = entities.channel()
    exchange = entities.exchange(no_declare=True)(channel)
    assert Exchange.no_declare is False
    assert exchange.declare() is None
    assert not entities.has_exchange(exchange)


@pytest.mark.parametrize(("option", "default"), [("durable", True), ("auto_delete", False)])
def test_the_broker_gets_the_declared_arguments(
    entities: Entities, option: str, default: bool
) -> None:
    assert getattr(Exchange, option) is default
    options: Dict[str, Any] = {option: not default}
    exchange = entities.exchange(**options)
    exchange(entities.channel()).declare()
    # The broker refuses a declaration that differs from the existing one.
    exchange(entities.channel()).declare()
    other = Exchange(exchange.name)
    assert getattr(other, option) is default
    with pytest.raises(amqp_errors.PreconditionFailed, match=option):
        other(entities.channel()).declare()


def test_auto_delete_deletes_with_the_last_queue(
    entities: Entities, eventually: Callable[..., Any]
) -> None:
    channel = entities.channel()
    exchange = entities.exchange(auto_delete=True)(channel)
    queues = [entities.declared_queue(channel, exchange) for _ in range(2)]
    queues[0].delete()
    assert entities.has_exchange(exchange)
    queues[1].unbind_from(exchange)
    eventually(lambda: not entities.has_exchange(exchange))


def test_without_auto_delete_the_exchange_stays(entities: Entities) -> None:
    channel = entities.channel()
    exchange = entities.exchange()(channel)
    entities.declared_queue(channel, exchange).delete()
    exchange.declare(passive=True)


def test_arguments_go_with_the_declaration(entities: Entities) -> None:
    channel = entities.channel()
    other = entities.exchange("fanout")(channel)
    queue = entities.declared_queue(channel, other)
    exchange = entities.exchange(arguments={"alternate-exchange": other.name})(channel)
    exchange.declare()
    exchange.publish("no queue takes it", "nowhere")
    assert bodies(queue) == ["no queue takes it"]


def test_a_declaration_is_cached_unless_the_exchange_is_auto_delete(entities: Entities) -> None:
    connection = entities.connection()
    producer = Producer(connection)
    lasting, passing = entities.exchange(), entities.exchange(auto_delete=True)
    assert lasting.can_cache_declaration is True
    assert passing.can_cache_declaration is False
    for exchange in (lasting, passing):
        producer.maybe_declare(exchange)
        # Behind the producer's back.
        entities.channel().exchange_delete(exchange.name)
        producer.maybe_declare(exchange)
    assert not entities.has_exchange(lasting)
    assert entities.has_exchange(passing)


def test_channel_is_the_bound_channel(entities: Entities) -> None:
    channel = entities.channel()
    exchange = entities.exchange()
    with pytest.raises(NotBoundError):
        exchange.declare()
    assert exchange(channel).channel is channel
    assert Exchange(exchange.name, channel=channel).channel is channel
    assert not exchange.is_bound


def test_attrs_are_copied(entities: Entities) -> None:
    names = {name for name, _ in Exchange.attrs}
    assert names == {
        "name", "type", "arguments", "durable", "passive", "auto_delete", "delivery_mode",
        "no_declare",
    }  # fmt: skip
    exchange = entities.exchange(
        "topic", durable=False, auto_delete=True, delivery_mode="transient", no_declare=True,
        passive=True, arguments={"x": 1},
    )  # fmt: skip
    copied = exchange(entities.channel())
    assert copied.as_dict() == exchange.as_dict()
    assert set(copied.as_dict()) == names
    assert copied == exchange


def test_delete_deletes_the_exchange(entities: Entities) -> None:
    channel = entities.channel()
    exchange = entities.exchange()(channel)
    entities.declared_queue(channel, exchange)
    exchange.delete()
    assert not entities.has_exchange(exchange)


def test_delete_with_nowait(entities: Entities) -> None:
    exchange = entities.exchange()(entities.channel())
    exchange.declare()
    exchange.delete(nowait=True)
    with pytest.raises(amqp_errors.NotFound):
        exchange.declare(passive=True)


def test_delete_if_unused_leaves_one_with_bindings(entities: Entities) -> None:
    exchange = entities.exchange()
    queue = entities.declared_queue(entities.channel(), exchange)
    with pytest.raises(amqp_errors.PreconditionFailed):
        exchange(entities.channel()).delete(if_unused=True)
    assert entities.has_exchange(exchange)
    queue.unbind_from(exchange)
    exchange(entities.channel()).delete(if_unused=True)
    assert not entities.has_exchange(exchange)


# -- bindings between exchanges ------------------------------------------------------------------


@pytest.mark.parametrize("nowait", [False, True])
def test_exchanges_are_bound_and_unbound(entities: Entities, nowait: bool) -> None:
    channel = entities.channel()
    source = entities.exchange("topic")(channel)
    target = entities.exchange("fanout")(channel)
    source.declare()
    queue = entities.declared_queue(channel, target)
    target.bind_to(source, "a.#", nowait=nowait)
    published(source, ["a.1", "b.1"])
    assert bodies(queue) == ["a.1"]
    target.unbind_from(source, "a.#", nowait=nowait)
    published(source, ["a.2"])
    assert bodies(queue) == []


def test_exchanges_are_bound_by_name_with_arguments_on_another_channel(
    entities: Entities,
) -> None:
    channel = entities.channel()
    source = entities.exchange("headers")(channel)
    target = entities.exchange("fanout")
    source.declare()
    queue = entities.declared_queue(channel, target)
    arguments = {"x-match": "all", "kind": "a"}
    target.bind_to(source.name, arguments=arguments, channel=channel)
    source.publish(source.Message("1", headers={"kind": "a"}))
    source.publish(source.Message("2", headers={"kind": "b"}))
    assert bodies(queue) == ["1"]
    # Another binding stays.
    target.unbind_from(source.name, arguments={"x-match": "all"}, channel=channel)
    source.publish(source.Message("3", headers={"kind": "a"}))
    assert bodies(queue) == ["3"]
    target.unbind_from(source.name, arguments=arguments, channel=channel)
    source.publish(source.Message("4", headers={"kind": "a"}))
    assert bodies(queue) == []


def test_binding_is_for_the_bindings_of_a_queue(entities: Entities) -> None:
    channel = entities.channel()
    exchange = entities.exchange("topic")
    bindings = [exchange.binding("a.*"), exchange.binding("b.*")]
    queue = entities.declared_queue(channel, bindings=bindings)
    bound = exchange(channel)
    published(bound, ["a.1", "b.1", "c.1"])
    assert bodies(queue) == ["a.1", "b.1"]
    bindings[0].unbind(queue)
    published(bound, ["a.2", "b.2"])
    assert bodies(queue) == ["b.2"]


def test_binding_has_arguments_to_bind_and_to_unbind_with(entities: Entities) -> None:
    channel = entities.channel()
    exchange = entities.exchange("headers")
    match = {"x-match": "all", "kind": "a"}
    binding = exchange.binding(arguments=match, unbind_arguments=match)
    queue = entities.declared_queue(channel, bindings=[binding])
    bound = exchange(channel)
    bound.publish(bound.Message("1", headers={"kind": "a"}))
    assert bodies(queue) == ["1"]
    binding.unbind(queue)
    bound.publish(bound.Message("2", headers={"kind": "a"}))
    assert bodies(queue) == []


# -- messages ------------------------------------------------------------------------------------


def test_the_delivery_modes_are_one_and_two() -> None:
    assert (Exchange.TRANSIENT_DELIVERY_MODE, Exchange.PERSISTENT_DELIVERY_MODE) == (1, 2)


@pytest.mark.parametrize(
    ("mode", "number"), [(None, 2), (1, 1), ("transient", 1), (2, 2), ("persistent", 2)]
)
def test_delivery_mode_applies_to_messages(entities: Entities, mode: Any, number: int) -> None:
    channel = entities.channel()
    exchange = entities.exchange("fanout", delivery_mode=mode)(channel)
    queue = entities.declared_queue(channel, exchange)
    exchange.publish("by exchange")
    Producer(channel, exchange).publish("by producer")
    assert [m.properties["delivery_mode"] for m in messages(queue)] == [number, number]


def test_message_accepts_another_delivery_mode(entities: Entities) -> None:
    channel = entities.channel()
    exchange = entities.exchange("fanout")(channel)
    queue = entities.declared_queue(channel, exchange)
    for mode in ("transient", 1, None):
        exchange.publish(exchange.Message("x", delivery_mode=mode))
    assert [m.properties["delivery_mode"] for m in messages(queue)] == [1, 1, 2]


def test_message_accepts_all_documented_arguments(entities: Entities) -> None:
    channel = entities.channel()
    exchange = entities.exchange("fanout")(channel)
    queue = entities.declared_queue(channel, exchange)
    exchange.publish(
        exchange.Message(
            b"\x00\xff",
            priority=3,
            content_type="application/x-mine",
            content_encoding="binary",
            headers={"a": 1},
            properties={"correlation_id": "c", "type": "t"},
        )
    )
    (message,) = messages(queue)
    assert message.body == b"\x00\xff"
    assert message.content_type == "application/x-mine"
    assert message.content_encoding == "binary"
    assert message.headers == {"a": 1}
    assert message.properties["priority"] == 3
    assert message.properties["correlation_id"] == "c"
    assert message.properties["type"] == "t"
    assert message.properties["delivery_mode"] == 2


@pytest.mark.parametrize("body", ["text, ä", b"\x00\xff bytes"])
def test_publish_accepts_text_and_bytes(entities: Entities, body: Any) -> None:
    channel = entities.channel()
    exchange = entities.exchange("fanout")(channel)
    queue = entities.declared_queue(channel, exchange)
    exchange.publish(body)
    assert bodies(queue) == [body]


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_publish_accepts_a_received_message(entities: Entities, compression: Any) -> None:
    channel = entities.channel()
    queues = [entities.declared_queue(channel) for _ in range(2)]
    Producer(channel).publish(
        {"a": "ä" * 100},
        routing_key=queues[0].name,
        headers={"h": 1},
        correlation_id="c",
        priority=4,
        delivery_mode=1,
        compression=compression,
    )
    (message,) = messages(queues[0])
    Exchange()(channel).publish(message, queues[1].name)
    (forwarded,) = messages(queues[1])
    assert forwarded.decode() == {"a": "ä" * 100}
    assert forwarded.headers == {"h": 1}
    for name in ("correlation_id", "priority", "delivery_mode"):
        assert forwarded.properties[name] == message.properties[name]


def test_publish_accepts_another_exchange(entities: Entities) -> None:
    channel = entities.channel()
    exchange, other = (entities.exchange("fanout")(channel) for _ in range(2))
    queues = [entities.declared_queue(channel, e) for e in (exchange, other)]
    exchange.publish("x", exchange=other.name)
    assert [bodies(queue) for queue in queues] == [[], ["x"]]


def test_publish_with_mandatory_returns_unroutable_messages(entities: Entities) -> None:
    connection = entities.connection()
    channel = connection.channel()
    exchange = entities.exchange()(channel)
    queue = entities.declared_queue(channel, exchange, "taken")
    returned: List[Tuple[Any, ...]] = []
    channel.events["basic_return"].add(lambda *arguments: returned.append(arguments))
    exchange.publish("1", "taken", mandatory=True)
    exchange.publish("2", "nowhere", mandatory=True)
    drain(connection, lambda: returned)
    ((exception, source, key, message),) = returned
    assert exception.reply_code == 312
    assert (source, key) == (exchange.name, "nowhere")
    assert message.body == "2"
    assert bodies(queue) == ["1"]


def test_publish_with_immediate_is_an_error_before_anything_is_sent(entities: Entities) -> None:
    channel = entities.channel()
    exchange = entities.exchange("fanout")(channel)
    queue = entities.declared_queue(channel, exchange)
    with pytest.raises(NotImplementedError, match="'immediate'"):
        exchange.publish("1", immediate=True)
    # The connection is not closed.
    exchange.publish("2")
    assert bodies(queue) == ["2"]
