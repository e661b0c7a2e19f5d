"""Names and routing keys: part of a public format, so that they must not change."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from celery_amqp_results.topology import (
    ABSENT,
    BROADCAST,
    MAX_WORD,
    Topology,
    client_word,
    encode_word,
)

# Any text that Python can hold, lone surrogates among it, and what is near the limits.
texts = st.text(min_size=1, max_size=1000) | st.text(
    alphabet="ab-_~.*#% ü\ud800", min_size=1, max_size=80
)
topology = Topology("celeryresults", 256, "classic")


@given(texts, texts)
def test_different_texts_give_different_words(one: str, other: str) -> None:
    assert (encode_word(one) == encode_word(other)) == (one == other)


@given(texts)
def test_a_word_is_one_word_of_a_routing_key(text: str) -> None:
    word = encode_word(text)
    assert 0 < len(word) <= MAX_WORD
    assert word.isascii()
    assert not set(word) & set(".*#")
    assert word not in (ABSENT, BROADCAST) or word == text


@given(texts, texts, st.none() | texts, st.none() | texts)
def test_a_routing_key_has_five_words_and_fits(
    task_id: str, state: str, group_id: str | None, origin: str | None
) -> None:
    key = topology.routing_key(task_id, state, client_word(origin), group_id)
    assert len(key.encode()) <= 255
    words = key.split(".")
    assert len(words) == 5
    assert words[0] == str(topology.shard(task_id))
    assert (words[2] == ABSENT) == (group_id is None)


@given(texts, st.integers(1, 4096))
def test_every_id_has_a_shard(task_id: str, shards: int) -> None:
    assert 0 <= Topology("x", shards, "classic").shard(task_id) < shards


def test_the_words_are_what_they_always_were() -> None:
    assert encode_word("a.b *#") == "a%2Eb%20%2A%23"
    assert encode_word("-") == "%2D"
    assert encode_word("~") == "%7E"
    assert encode_word("") == encode_word(None) == ABSENT
    assert encode_word("é" * 100) == "~fb2eb4ad31c16f4585203b6c17f6808e82585f069d967c08"
    assert [topology.shard(i) for i in ("a", "b", "ü", "\ud800")] == [67, 249, 213, 40]
    assert (
        topology.routing_key(
            "0f3b2c4e-8d1a-4a52-9a4b-6f2a1c7d8e90", "SUCCESS", client_word("gen1@host"), "g"
        )
        == "230.06ba4474b85f26a1.g.0f3b2c4e-8d1a-4a52-9a4b-6f2a1c7d8e90.SUCCESS"
    )


def test_queues_are_declared_as_the_documentation_says() -> None:
    classic = topology.shard_queue(7)
    assert (classic.name, classic.durable, classic.exclusive, classic.auto_delete) == (
        "celeryresults.shard.7",
        True,
        False,
        False,
    )
    assert classic.arguments == {"x-queue-type": "classic", "x-single-active-consumer": True}
    quorum = Topology("celeryresults", 256, "quorum").shard_queue(7)
    assert quorum.arguments["x-queue-type"] == "quorum"
    assert quorum.arguments["x-delivery-limit"] == 2**31 - 1
    # Others count the shards differently: the broker tells, by this name.
    assert topology.exchange_arguments == {"alternate-exchange": "celeryresults.shards-256"}
