"""States as messages, and which of several counts."""

from __future__ import annotations

import contextlib
import itertools
import threading
from typing import Any, Dict, List

import pytest
from amqp.basic_message import Message
from celery import states
from hypothesis import given
from hypothesis import strategies as st
from kombu.exceptions import ContentDisallowed

from celery_amqp_results import errors, meta
from celery_amqp_results.meta import Codec, PublishClock, StateMessage

ids = st.text(min_size=1, max_size=1000) | st.text(alphabet="a.*#\ud800é", min_size=1)
names = st.sampled_from([*sorted(states.ALL_STATES), "PROGRESS", "ABORTED"])
state_messages = st.builds(
    StateMessage,
    id=ids,
    state=names | st.text(min_size=1, max_size=300),
    published=st.integers(0, 2**62),
    body=st.binary(max_size=100),
    content_type=st.just("application/json"),
    content_encoding=st.sampled_from(["utf-8", "binary"]),
    compression=st.none() | st.just("application/x-gzip"),
    expiration=st.none() | st.integers(1, 2**32 - 1),
    kind=st.sampled_from([meta.STATE, meta.GROUP]),
)


def at(state: str, published: int) -> StateMessage:
    return StateMessage("t", state, published, b"", "application/json", "utf-8")


#: States of one task, each published at a time of its own.
histories = st.lists(
    st.tuples(names, st.integers(0, 1000)), min_size=1, max_size=8, unique_by=lambda pair: pair[1]
).map(lambda pairs: [at(*pair) for pair in pairs])


@given(histories, st.randoms())
def test_the_order_of_arrival_does_not_matter(history: List[StateMessage], random: Any) -> None:
    shuffled = history[:]
    random.shuffle(shuffled)
    assert meta.fold(shuffled) == meta.fold(history)


@given(histories, histories)
def test_folding_in_parts_gives_the_same(
    one: List[StateMessage], other: List[StateMessage]
) -> None:
    seen = {state.published for state in one}
    other = [state for state in other if state.published not in seen]
    parts = [part for part in (meta.fold(one), meta.fold(other)) if part is not None]
    assert meta.fold(parts) == meta.fold([*one, *other])


@given(histories)
def test_a_state_that_is_there_twice_changes_nothing(history: List[StateMessage]) -> None:
    assert meta.fold([*history, *history]) == meta.fold(history)


@given(histories, st.tuples(names, st.integers(1001, 2000)))
def test_success_yields_to_nothing_and_an_end_only_to_an_end(
    history: List[StateMessage], late: Any
) -> None:
    before = meta.fold(history)
    after = meta.fold([*history, at(*late)])
    assert before is not None
    assert after is not None
    if before.state == states.SUCCESS:
        assert after == before
    elif meta.is_final(before.state):
        assert meta.is_final(after.state)
    elif before.state == "ABORTED":
        assert after.state == "ABORTED" or meta.is_final(after.state)
    else:
        assert after == at(*late)


def test_nothing_folds_to_nothing() -> None:
    assert meta.fold([]) is None


@given(state_messages, st.booleans())
def test_a_state_survives_the_way_over_the_broker(state: StateMessage, persistent: bool) -> None:
    # As py-amqp writes and reads it.
    sent = Message(state.body, **state.properties(persistent))
    octets = sent._serialize_properties()
    received = Message()
    received._load_properties(60, octets, 0)
    assert received.properties["delivery_mode"] == (2 if persistent else 1)
    assert StateMessage.from_properties(received.properties, state.body) == state


garbage = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.dictionaries(
        st.sampled_from(["state", "published", "compression", "id"]), inner, max_size=4
    ),
    max_leaves=6,
)


@given(
    st.dictionaries(
        st.sampled_from(
            ["type", "correlation_id", "application_headers", "content_type", "content_encoding",
             "expiration"]
        ),
        garbage | st.sampled_from(["state", "group", "application/json"]),
    ),
    st.binary(max_size=5) | st.text(max_size=5),
)  # fmt: skip
def test_a_foreign_message_is_refused_and_nothing_worse(
    properties: Dict[str, Any], body: Any
) -> None:
    with contextlib.suppress(errors.ForeignMessage):
        assert isinstance(StateMessage.from_properties(properties, body), StateMessage)


@pytest.mark.parametrize("serializer", ["json", "pickle"])
@pytest.mark.parametrize("compression", [None, "gzip", "bzip2"])
def test_a_meta_comes_back(serializer: str, compression: str | None) -> None:
    wanted = {"status": "SUCCESS", "result": {"a": [1, "é", None]}, "task_id": "t"}
    content_type, encoding, compressed, body = Codec(serializer, None, compression).encode(wanted)
    message = StateMessage("t", "SUCCESS", 1, body, content_type, encoding, compressed)
    # Whoever reads need not be set to the same.
    assert Codec("json", [content_type]).decode(message) == wanted


@given(st.binary(max_size=60), st.none() | st.sampled_from(["application/x-gzip", "x"]))
def test_a_damaged_body_is_foreign_and_nothing_worse(body: bytes, compression: str | None) -> None:
    message = StateMessage("t", "SUCCESS", 1, body, "application/json", "utf-8", compression)
    with contextlib.suppress(errors.ForeignMessage):
        assert "status" in Codec("json", ["application/json"]).decode(message)


def test_what_is_not_accepted_is_not_decoded() -> None:
    content_type, encoding, _, body = Codec("pickle", None).encode({"status": 1, "result": 2})
    message = StateMessage("t", "SUCCESS", 1, body, content_type, encoding)
    with pytest.raises(ContentDisallowed):
        Codec("json", ["application/json"]).decode(message)


def test_no_two_states_of_a_process_are_published_at_once() -> None:
    clock = PublishClock()
    times: List[List[int]] = [[] for _ in range(4)]

    def read(into: List[int]) -> None:
        into.extend(clock.now() for _ in range(2000))

    threads = [threading.Thread(target=read, args=(into,)) for into in times]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(one == sorted(one) for one in times)
    every = list(itertools.chain.from_iterable(times))
    assert len(set(every)) == len(every)


def test_a_clock_that_is_set_back_does_not_set_states_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = PublishClock()
    before = clock.now()
    monkeypatch.setattr(meta.time, "time_ns", lambda: 0)
    assert clock.now() == before + 1
