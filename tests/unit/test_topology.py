"""Names and routing keys: a public format, which must not change."""

from __future__ import annotations

import dataclasses
import re
from typing import Optional
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from celery_amqp_results import errors
from celery_amqp_results.protocol.names import (
    ABSENT,
    BROADCAST,
    MAX_WORD,
    PLAN_QUEUES,
    QueueSpec,
    Route,
    Topology,
    barrier_key,
    client_word,
    encode_word,
    plan_number,
)
from tests.unit.fakes import state

#: Any text that Python can hold, including lone surrogates.
any_text = st.text(st.characters(), min_size=1, max_size=1000)
#: Characters with a meaning in keys and words, with lengths around the limits.
tricky = st.text("ab-_~.*#% ü\ud800\udc00", min_size=1, max_size=80)
exact = st.integers(1, 1000).map(lambda n: "x" * n)
#: Words derived from other texts: an id may look like anything.
made = (any_text | tricky | exact).map(encode_word)
texts = any_text | tricky | exact | made | st.sampled_from(["-", "--", "%2D", "~", "%", "all", "0"])
topology = Topology("celeryresults", 256, "classic")


@given(texts, texts)
@example("-", "%2D")
@example("\ud800\udc00", "\U00010000")
@example("x" * 73, encode_word("x" * 73))
@example("a.b", "a%2Eb")
@example("é", "e\u0301")
def test_different_texts_have_different_words(one: str, other: str) -> None:
    assert (encode_word(one) == encode_word(other)) == (one == other)


@given(texts, st.data())
def test_a_change_of_one_character_changes_the_word(text: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(text) - 1))
    other = text[:at] + data.draw(st.text(st.characters(), max_size=2)) + text[at + 1 :]
    assert (encode_word(text) == encode_word(other)) == (text == other)


@given(texts)
def test_a_word_can_be_decoded_or_is_a_digest(text: str) -> None:
    # So no two texts share a word: every word except a digest can be decoded.
    word = encode_word(text)
    if word.startswith("~"):
        assert re.fullmatch("~[0-9a-f]{48}", word)
        escaped = sum(1 if re.match("[A-Za-z0-9_-]", c) else 3 for c in _bytes(text))
        assert escaped > MAX_WORD
    else:
        assert unquote_to_bytes(word).decode("utf-8", "surrogatepass") == text


def _bytes(text: str) -> list[str]:
    return [chr(byte) for byte in text.encode("utf-8", "surrogatepass")]


@given(texts)
def test_a_word_contains_no_separator(text: str) -> None:
    word = encode_word(text)
    assert 0 < len(word) <= MAX_WORD
    assert re.fullmatch(r"[A-Za-z0-9_%~-]+", word)
    # The word for no value stands for nothing else.
    assert word != ABSENT


@given(texts)
def test_a_text_of_letters_and_digits_is_its_own_word(text: str) -> None:
    if text != ABSENT and re.fullmatch(f"[A-Za-z0-9_-]{{1,{MAX_WORD}}}", text):
        assert encode_word(text) == text
    else:
        assert encode_word(text) != text


def test_the_empty_text_has_the_word_for_no_value() -> None:
    assert encode_word("") == encode_word(None) == ABSENT
    assert client_word("") == client_word(None) == ABSENT


@given(texts, texts)
def test_the_word_of_a_client_is_a_digest_unlike_other_words(one: str, other: str) -> None:
    assert re.fullmatch("[0-9a-f]{16}", client_word(one))
    assert client_word(one) not in (ABSENT, BROADCAST)
    assert (client_word(one) == client_word(other)) == (one == other)


@given(
    texts,
    texts,
    st.none() | texts,
    st.just(BROADCAST) | st.builds(client_word, st.none() | texts),
    st.integers(1, 4096),
    st.booleans(),
)
def test_routing_key_has_six_words_and_fits(
    task_id: str, state: str, group_id: str | None, client: str, shards: int, in_chord: bool
) -> None:
    here = Topology("celeryresults", shards, "classic")
    key = here.routing_key(task_id, state, Route(client, group_id, in_chord))
    assert len(key.encode("ascii")) <= 255
    words = key.split(".")
    assert words == [
        str(here.shard(task_id)),
        client,
        str(plan_number(group_id)) if in_chord and group_id else ABSENT,
        encode_word(group_id),
        encode_word(task_id),
        encode_word(state),
    ]


def matches(binding: str, key: str) -> bool:
    """Return whether the broker routes *key* to a queue bound with *binding*."""
    pattern = re.escape(binding).replace(r"\*", r"[^.]*").replace(r"\.\#", r"(\.[^.]*)*")
    return re.fullmatch(pattern, key) is not None


@given(texts, texts, texts, texts, texts)
def test_bindings_match_exactly_the_intended_keys(
    task_id: str, other: str, state: str, origin: str, group_id: str
) -> None:
    client = client_word(origin)
    key = topology.routing_key(task_id, state, Route(client, group_id, in_chord=True))
    assert matches(topology.shard_binding(topology.shard(task_id)), key)
    assert not matches(topology.shard_binding((topology.shard(task_id) + 1) % 256), key)
    assert matches(topology.client_binding(client), key)
    assert not matches(topology.client_binding(BROADCAST), key)
    assert matches(topology.task_binding(task_id), key)
    assert matches(topology.task_binding(other), key) == (other == task_id)
    # A state without a known sender reaches every inbox.
    assert matches(
        topology.client_binding(BROADCAST),
        topology.routing_key(task_id, state, Route(BROADCAST)),
    )
    for number in range(PLAN_QUEUES):
        leads = bool(group_id) and number == plan_number(group_id)
        assert matches(topology.plan_binding(number), key) == leads


@given(texts, st.integers(1, 4096))
def test_every_id_has_a_shard(task_id: str, shards: int) -> None:
    one = Topology("x", shards, "classic").shard(task_id)
    assert 0 <= one < shards
    # It depends only on the id and the number of shards.
    assert Topology("y", shards, "quorum").shard(task_id) == one


def test_ids_are_spread_over_all_shards() -> None:
    assert {topology.shard(f"task-{number}") for number in range(4096)} == set(range(256))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a", "a"),
        ("0f3b2c4e-8d1a-4a52-9a4b-6f2a1c7d8e90", "0f3b2c4e-8d1a-4a52-9a4b-6f2a1c7d8e90"),
        ("a.b *#", "a%2Eb%20%2A%23"),
        ("-", "%2D"),
        ("--", "--"),
        ("~", "%7E"),
        ("%2D", "%252D"),
        ("all", "all"),
        ("ü", "%C3%BC"),
        ("\ud800", "%ED%A0%80"),
        ("x" * 72, "x" * 72),
        ("x" * 73, "~3addf38bd8785dc47ff2f5ad10f420fc02e05782f78a924f"),
        ("." * 24, "%2E" * 24),
        ("." * 25, "~6c41a584f89383acb4b8f0b2d438011fe45c02364c7b176e"),
        ("é" * 100, "~fb2eb4ad31c16f4585203b6c17f6808e82585f069d967c08"),
    ],
)
def test_words_have_not_changed(text: str, word: str) -> None:
    assert encode_word(text) == word


@pytest.mark.parametrize(
    ("task_id", "shard_of_256", "shard_of_7"),
    [
        ("a", 67, 4),
        ("b", 249, 4),
        ("ü", 213, 4),
        ("\ud800", 40, 1),
        ("0f3b2c4e-8d1a-4a52-9a4b-6f2a1c7d8e90", 230, 1),
        ("x" * 1000, 230, 5),
    ],
)
def test_shards_have_not_changed(task_id: str, shard_of_256: int, shard_of_7: int) -> None:
    assert topology.shard(task_id) == shard_of_256
    assert Topology("x", 7, "classic").shard(task_id) == shard_of_7
    assert Topology("x", 1, "classic").shard(task_id) == 0


def test_routing_keys_and_bindings_have_not_changed() -> None:
    task_id = "0f3b2c4e-8d1a-4a52-9a4b-6f2a1c7d8e90"
    assert client_word("gen1@host") == "06ba4474b85f26a1"
    assert (
        topology.routing_key(task_id, "SUCCESS", Route(client_word("gen1@host"), "g"))
        == f"230.06ba4474b85f26a1.-.g.{task_id}.SUCCESS"
    )
    assert (
        topology.routing_key(task_id, "SUCCESS", Route(client_word("gen1@host"), "g", True))
        == f"230.06ba4474b85f26a1.6.g.{task_id}.SUCCESS"
    )
    assert topology.routing_key(task_id, "STARTED") == f"230.-.-.-.{task_id}.STARTED"
    assert topology.shard_binding(230) == "230.#"
    assert topology.client_binding("06ba4474b85f26a1") == "*.06ba4474b85f26a1.#"
    assert topology.client_binding(BROADCAST) == "*.all.#"
    assert topology.task_binding(task_id) == f"230.*.*.*.{task_id}.*"
    assert topology.plan_binding(3) == "*.*.3.#"
    assert topology.state_binding("FAILURE") == "*.*.*.*.*.FAILURE"


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_queues_are_declared_as_documented(queue_type: str) -> None:
    here = Topology("celeryresults", 256, queue_type)
    arguments = {"x-queue-type": queue_type, "x-single-active-consumer": True}
    if queue_type == "quorum":
        arguments["x-delivery-limit"] = 2**31 - 1
        arguments["x-consumer-disconnected-timeout"] = 1000

    def durable(name: str, **more: int) -> QueueSpec:
        return QueueSpec(name, {**arguments, **more})

    assert here.shard_queue(7) == durable("celeryresults.shard.7")
    assert here.plan_queue(7) == durable("celeryresults.chords.7")
    assert here.large_queue("a.b", "mark") == durable("celeryresults.large.a%2Eb.mark")
    expiring = {"x-expires": 5000}
    assert here.large_queue("a", "m", 5000) == durable("celeryresults.large.a.m", **expiring)


def test_the_permanent_declarations_are_the_exchange_and_all_queues() -> None:
    here = Topology("x", 2, "quorum")
    content = here.definitions("v")
    assert content["exchanges"] == [
        {
            "name": "x.states",
            "vhost": "v",
            "type": "topic",
            "durable": True,
            "auto_delete": False,
            "internal": False,
            "arguments": {"alternate-exchange": "x.shards-2-quorum"},
        }
    ]
    specs = [here.shard_queue(0), here.shard_queue(1), *map(here.plan_queue, range(PLAN_QUEUES))]
    assert content["queues"] == [
        {
            "name": spec.name,
            "vhost": "v",
            "durable": True,
            "auto_delete": False,
            "arguments": spec.arguments,
        }
        for spec in specs
    ]


@pytest.mark.parametrize(
    ("queue", "right"),
    [
        (None, True),
        ("x.large.a%2Eb.mark", True),
        ("x.large.a%2Eb", False),
        ("x.large.other.mark", False),
        ("y.large.a%2Eb.mark", False),
        ("x.shard.0", False),
    ],
)
def test_a_state_may_only_point_to_a_queue_of_its_own(queue: Optional[str], right: bool) -> None:
    pointer = state("a.b", body_queue=queue)
    here = Topology("x", 2, "classic")
    if right:
        here.check_body_queue(pointer)
        return
    with pytest.raises(errors.ForeignMessage) as caught:
        here.check_body_queue(pointer)
    assert str(caught.value) == (
        f"the body of 'a.b' is said to be in {queue!r}, which does not begin with 'x.large.a%2Eb.'"
    )


def test_the_message_about_a_wrong_queue_is_short() -> None:
    pointer = state("a" * 5000, body_queue="q" * 5000)
    with pytest.raises(errors.ForeignMessage) as caught:
        topology.check_body_queue(pointer)
    assert len(str(caught.value)) < 700


def test_a_barrier_reaches_only_the_inbox_that_is_bound_with_its_key() -> None:
    key = barrier_key()
    assert key != barrier_key()
    assert re.fullmatch("barrier[.][0-9a-f]{32}", key)
    assert not matches(topology.every_binding(), key)
    assert matches(topology.every_binding(), topology.routing_key("a", "SUCCESS"))


def test_a_route_without_a_chord_names_no_plan_queue() -> None:
    assert Route(group_id="g").plan_queue == ABSENT
    assert Route(in_chord=True).plan_queue == ABSENT
    route = Route(group_id="g", in_chord=True)
    assert route.plan_queue == str(plan_number("g"))
    assert dataclasses.replace(route, group_id="").plan_queue == ABSENT


def test_the_exchange_declares_the_number_of_shards() -> None:
    assert topology.exchange == "celeryresults.states"
    # Another app uses a different number of shards: the broker refuses it by this argument.
    assert topology.exchange_arguments == {"alternate-exchange": "celeryresults.shards-256"}
