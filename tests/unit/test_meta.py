"""States as messages, and which of several is the current one."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import datetime
import decimal
import functools
import itertools
import pickle
import struct
import threading
import types
import uuid
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple

import pytest
from amqp.basic_message import Message
from celery import states
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kombu import compression as kombu_compression
from kombu.exceptions import ContentDisallowed, EncodeError, SerializerNotInstalled

from celery_amqp_results import errors
from celery_amqp_results.amqp import frames
from celery_amqp_results.protocol import clock as clock_module
from celery_amqp_results.protocol.clock import PublishClock
from celery_amqp_results.protocol.codec import Codec
from celery_amqp_results.protocol.message import (
    GROUP,
    NOT_AN_END,
    PART,
    PLAN,
    STATE,
    StateMessage,
    checked,
    message_id,
)
from celery_amqp_results.protocol.ranking import ABORTED, fold, is_final, supersedes

#: Any text that Python can hold, including lone surrogates.
any_text = st.text(st.characters(), min_size=1, max_size=1000)
ids = any_text | st.text("a.*#\ud800\udc00é", min_size=1, max_size=300)
names = st.sampled_from([*sorted(states.ALL_STATES), "PROGRESS", ABORTED])
state_messages = st.builds(
    StateMessage,
    id=ids,
    state=names | any_text,
    published=st.integers(0, 2**63 - 1),
    body=st.binary(max_size=100),
    content_type=st.sampled_from(["application/json", "application/x-python-serialize", "x/ü"]),
    content_encoding=st.sampled_from(["utf-8", "binary"]),
    compression=st.none() | st.sampled_from(["application/x-gzip", "application/x-lzma"]),
    expiration=st.none() | st.integers(0, 2**32 - 1),
    kind=st.sampled_from([STATE, GROUP, PART, PLAN]),
    body_queue=st.none() | st.sampled_from(["results.body.1", "x/ü"]),
    amended=st.none() | st.sampled_from([NOT_AN_END, "mark"]),
)


def at(state: str, published: int) -> StateMessage:
    return StateMessage("t", state, published, b"", "application/json", "utf-8")


# -- ranking -----------------------------------------------------------------------------------

#: States of one task, each published at a different time.
histories = st.lists(
    st.tuples(names, st.integers(0, 1000)), min_size=1, max_size=8, unique_by=lambda pair: pair[1]
).map(lambda pairs: [at(*pair) for pair in pairs])


def current_by_definition(history: Iterable[StateMessage]) -> Optional[StateMessage]:
    """Return the current state by a second definition: the first group that is not empty."""
    history = list(history)
    by_time = sorted(history, key=lambda state: state.published)
    for group in (
        [state for state in by_time if state.state == states.SUCCESS][:1],
        [state for state in by_time if state.state in (states.FAILURE, states.REVOKED)],
        [state for state in by_time if state.state == "ABORTED"],
        by_time,
    ):
        if group:
            return group[-1]
    return None


@given(histories)
def test_the_current_state_is_the_one_of_the_definition(history: List[StateMessage]) -> None:
    assert fold(history) == current_by_definition(history)


@given(histories, st.randoms(use_true_random=False))
def test_the_order_of_arrival_does_not_matter(history: List[StateMessage], random: Any) -> None:
    shuffled = history[:]
    random.shuffle(shuffled)
    assert fold(shuffled) == fold(history)


@given(histories, st.data())
def test_folding_in_parts_gives_the_same(history: List[StateMessage], data: st.DataObject) -> None:
    parts: List[List[StateMessage]] = [[], [], []]
    for state in history:
        parts[data.draw(st.integers(0, 2))].append(state)
    folded = [state for state in map(fold, parts) if state is not None]
    assert fold(folded) == fold(history)

    # One at a time, as a waiter receives them.
    def step(known: Optional[StateMessage], state: StateMessage) -> Optional[StateMessage]:
        return fold([known, state] if known is not None else [state])

    assert functools.reduce(step, history, None) == fold(history)


@given(histories, st.data())
def test_a_duplicate_state_changes_nothing(
    history: List[StateMessage], data: st.DataObject
) -> None:
    again = data.draw(st.lists(st.sampled_from(history), max_size=8))
    assert fold([*history, *again]) == fold(history)
    assert fold([*again, *history]) == fold(history)


@given(histories)
def test_a_superseded_state_never_becomes_current_again(history: List[StateMessage]) -> None:
    seen: List[StateMessage] = []
    for end in range(1, len(history) + 1):
        current = fold(history[:end])
        assert current is not None
        if seen and current != seen[-1]:
            assert current not in seen
        seen.append(current)


@given(
    st.lists(
        st.builds(at, names, st.integers(0, 9)),
        min_size=3,
        max_size=3,
        unique_by=lambda state: state.published,
    )
)
def test_ranking_is_total_and_transitive(
    three: List[StateMessage],
) -> None:
    for one, two, other in itertools.permutations(three):
        assert supersedes(one, two) != supersedes(two, one)
        if supersedes(one, two) and supersedes(two, other):
            assert supersedes(one, other)


# The times are in any order: a state that is later by its clock may arrive first, and vice versa.
@given(st.tuples(names, st.integers(0, 9)), st.tuples(names, st.integers(0, 9)))
def test_a_state_is_superseded_only_as_allowed(old: Tuple[str, int], new: Tuple[str, int]) -> None:
    before, arriving = at(*old), at(*new)
    after = fold([before, arriving])
    assert after in (before, arriving)
    if after == before:
        return
    later = arriving.published >= before.published
    if before.state == states.SUCCESS:
        assert arriving.state == states.SUCCESS
        assert not later
    elif is_final(before.state):
        assert arriving.state == states.SUCCESS or (is_final(arriving.state) and later)
    elif before.state == ABORTED:
        assert is_final(arriving.state) or (arriving.state == ABORTED and later)
    else:
        assert is_final(arriving.state) or arriving.state == ABORTED or later


@pytest.mark.parametrize(
    ("history", "index"),
    [
        ([("STARTED", 1), ("SUCCESS", 2)], 1),
        ([("SUCCESS", 2), ("STARTED", 1)], 0),
        # A duplicate run that begins after the first has finished.
        ([("SUCCESS", 2), ("STARTED", 3)], 0),
        ([("SUCCESS", 2), ("SUCCESS", 3)], 0),
        ([("SUCCESS", 2), ("FAILURE", 3)], 0),
        ([("SUCCESS", 2), ("REVOKED", 3)], 0),
        ([("FAILURE", 2), ("SUCCESS", 3)], 1),
        ([("FAILURE", 3), ("SUCCESS", 2)], 1),
        ([("FAILURE", 2), ("RETRY", 3)], 0),
        ([("FAILURE", 2), ("FAILURE", 3)], 1),
        # Twenty workers store that it was revoked.
        ([("REVOKED", 2), ("REVOKED", 3), ("REVOKED", 1)], 1),
        ([("RETRY", 2), ("STARTED", 3)], 1),
        ([("PROGRESS", 3), ("STARTED", 2)], 0),
        ([("ABORTED", 1), ("STARTED", 2), ("PROGRESS", 3)], 0),
        ([("PROGRESS", 3), ("ABORTED", 1)], 1),
        ([("ABORTED", 1), ("REVOKED", 2)], 1),
        ([("REVOKED", 2), ("ABORTED", 3)], 0),
    ],
)
def test_the_current_state_of_a_history(history: List[Tuple[str, int]], index: int) -> None:
    assert fold(itertools.starmap(at, history)) == at(*history[index])


def test_no_states_fold_to_none() -> None:
    assert fold([]) is None


@given(names | any_text)
def test_there_are_three_final_states(name: str) -> None:
    assert is_final(name) == (name in ("SUCCESS", "FAILURE", "REVOKED"))


def test_equal_times_are_ordered_by_position() -> None:
    assert fold([at("STARTED", 1), at("PROGRESS", 1)]) == at("PROGRESS", 1)
    # But the result that was stored first stays.
    first, second = (dataclasses.replace(at("SUCCESS", 1), body=body) for body in (b"1", b"2"))
    assert fold([first, second]) == first


@given(st.integers(0, 2**62), st.integers(0, 2**32), st.integers(-(10**6), 10**6))
def test_a_state_expires_after_its_milliseconds(
    published: int, milliseconds: int, late: int
) -> None:
    state = dataclasses.replace(at("SUCCESS", published), expiration=milliseconds)
    assert state.expired(published + milliseconds * 1000 + late) == (late >= 0)
    assert not at("SUCCESS", published).expired(2**80)


# -- through the broker ------------------------------------------------------------------------


def py_amqp_writes(properties: Dict[str, Any], body: bytes) -> bytes:
    message = Message(body, **properties)
    octets: bytes = message._serialize_properties()
    return struct.pack(">HHQ", 60, 0, len(body)) + octets


def we_write(properties: Dict[str, Any], body: bytes) -> bytes:
    octets = frames.publish_frames(1, 131072, properties, body, ("x", "key", False))
    (method_size,) = struct.unpack_from(">I", octets, 3)
    start = 7 + method_size + 1
    (size,) = struct.unpack_from(">I", octets, start + 3)
    return octets[start + 7 : start + 7 + size]


@pytest.mark.parametrize("write", [py_amqp_writes, we_write])
@given(state=state_messages, persistent=st.booleans())
@example(state=StateMessage("\ud800\udc00", "S", 0, b"", "t", "e"), persistent=True)
@example(state=StateMessage("é" * 127, "S", 0, b"", "t", "e"), persistent=True)
@example(state=StateMessage("é" * 128, "S", 0, b"", "t", "e"), persistent=True)
@example(state=StateMessage("x" * 255, "S", 0, b"", "t", "e", expiration=0), persistent=True)
@example(state=StateMessage("x" * 256, "S", 0, b"", "t", "e"), persistent=False)
def test_a_state_survives_the_way_through_the_broker(
    write: Callable[[Dict[str, Any], bytes], bytes], state: StateMessage, persistent: bool
) -> None:
    header = write(state.properties(persistent), state.body)
    received = Message()
    received.inbound_header(header)
    assert received.body_size == len(state.body)
    assert received.properties["delivery_mode"] == (2 if persistent else 1)
    again = StateMessage.from_properties(received.properties, state.body)
    assert again == state
    # A look-up reads a message's id before anything else.
    assert message_id(received.properties) == state.id
    assert checked(again) is again if state.kind in (STATE, GROUP) else True
    # Republishing it changes nothing.
    assert again.properties(persistent) == state.properties(persistent)


@given(state_messages, st.sampled_from([bytes, bytearray, memoryview]))
def test_a_body_may_be_any_bytes_like_object(state: StateMessage, kind: Any) -> None:
    again = StateMessage.from_properties(state.properties(True), kind(state.body))
    assert again == state
    assert type(again.body) is bytes


@given(any_text)
@example("é\ud800")
def test_a_body_that_was_decoded_in_transit_is_encoded_again(body: str) -> None:
    state = StateMessage.from_properties(at("SUCCESS", 1).properties(True), body)
    assert state.body == body.encode("utf-8", "surrogatepass")


@given(ids)
@example("x" * 255)
@example("x" * 256)
@example("é" * 128)
def test_the_id_is_a_property_if_it_fits(task_id: str) -> None:
    properties = dataclasses.replace(at("SUCCESS", 1), id=task_id).properties(True)
    try:
        fits = len(task_id.encode("utf-8")) <= 255
    except UnicodeEncodeError:
        fits = False
    assert ("correlation_id" in properties) == fits
    assert ("id" in properties["application_headers"]) == (not fits)


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=5)
    | st.binary(max_size=5)
    | st.sampled_from(
        ["state", "group", "part", "plan", "SUCCESS", "7f", "1", "-1", "9" * 5000, "NaN", "٣"]
    )
    | st.just(decimal.Decimal("1.5"))
    | st.just(datetime.datetime(2026, 1, 1))
)
garbage = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["state", "published", "compression", "id", "other"]), inner, max_size=5
        )
    ),
    max_leaves=8,
)
NAMES = ["type", "correlation_id", "content_type", "content_encoding", "expiration"]


def state_or_foreign(properties: Dict[str, Any], body: Any) -> None:
    with contextlib.suppress(errors.ForeignMessage):
        state = StateMessage.from_properties(properties, body)
        # A message that is accepted as a state can be used as one.
        assert isinstance(state.id, str)
        assert isinstance(state.state, str)
        assert type(state.published) is int
        assert state.published >= 0
        assert type(state.body) is bytes
        assert state.expiration is None or type(state.expiration) is int
        assert state.kind in (STATE, GROUP, PART, PLAN)
        assert fold([state, at("STARTED", 1)]) is not None
        state.expired(0)
        state.properties(True)
    with contextlib.suppress(errors.ForeignMessage):
        assert isinstance(message_id(properties), str)


bodies = st.binary(max_size=5) | st.text(st.characters(), max_size=5)


@given(
    st.dictionaries(st.sampled_from([*NAMES, "application_headers", "priority"]), garbage), bodies
)
@example({"type": "state", "expiration": float("inf")}, b"")
def test_garbage_is_refused_as_foreign_without_other_errors(
    properties: Dict[str, Any], body: Any
) -> None:
    state_or_foreign(properties, body)


@given(state_messages, st.sampled_from([*NAMES, "application_headers"]), garbage, bodies)
@example(at("SUCCESS", 1), "expiration", float("inf"), b"")
@example(at("SUCCESS", 1), "expiration", float("nan"), b"")
@example(at("SUCCESS", 1), "expiration", [], b"")
def test_a_state_with_a_damaged_property_is_refused_or_a_state(
    state: StateMessage, name: str, wrong: Any, body: Any
) -> None:
    properties = {**state.properties(True), name: wrong}
    state_or_foreign(properties, body)
    del properties[name]
    state_or_foreign(properties, body)


@given(state_messages, st.sampled_from(["state", "published", "compression", "id"]), garbage)
def test_a_state_with_a_damaged_header_is_refused_or_a_state(
    state: StateMessage, name: str, wrong: Any
) -> None:
    properties = state.properties(True)
    properties["application_headers"][name] = wrong
    state_or_foreign(properties, b"")
    del properties["application_headers"][name]
    state_or_foreign(properties, b"")


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("type", "page", "'page'"),
        ("type", None, "'type'"),
        ("application_headers", None, "headers are None"),
        ("application_headers", "none", "headers are 'none', not a table"),
        ("content_type", "", "'content_type'"),
        ("content_encoding", None, "'content_encoding'"),
        ("expiration", "soon", "'soon'"),
        ("correlation_id", None, "'correlation_id'"),
    ],
)
def test_the_reason_for_a_foreign_message_is_reported(name: str, wrong: Any, message: str) -> None:
    properties = {**at("SUCCESS", 1).properties(True), name: wrong}
    with pytest.raises(errors.ForeignMessage, match=message):
        StateMessage.from_properties(properties, b"")


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("state", None, "a state"),
        ("state", b"SUCCESS", "a state"),
        ("published", None, "microseconds since 1970"),
        ("published", -1, "microseconds since 1970"),
        ("published", True, "microseconds since 1970"),
        ("published", "1", "microseconds since 1970"),
        ("published", 1.5, "microseconds since 1970"),
        ("compression", b"x", "a content type"),
        ("compression", 1, "a content type"),
        ("body-queue", 1, "the name of a queue"),
        ("amended", True, "the mark of an amendment"),
    ],
)
def test_messages_with_foreign_headers_are_foreign(name: str, wrong: Any, right: str) -> None:
    properties = at("SUCCESS", 1).properties(True)
    properties["application_headers"][name] = wrong
    with pytest.raises(errors.ForeignMessage) as caught:
        StateMessage.from_properties(properties, b"")
    assert str(caught.value) == f"header {name!r} is {wrong!r}, not {right}"


def test_an_id_that_is_no_id_is_in_the_error() -> None:
    properties = at("SUCCESS", 1).properties(True)
    del properties["correlation_id"]
    properties["application_headers"]["id"] = "no digits"
    with pytest.raises(errors.ForeignMessage, match="'no digits'"):
        message_id(properties)


@given(
    state_messages.filter(lambda state: state.kind in (STATE, GROUP)),
    st.sampled_from(
        ["id", "state", "published", "content_type", "content_encoding", "compression",
         "expiration", "kind"]
    ),
    garbage,
)  # fmt: skip
def test_the_fields_of_a_packed_state_are_checked(
    state: StateMessage, name: str, wrong: Any
) -> None:
    damaged = dataclasses.replace(state, **{name: wrong})
    right = isinstance(wrong, str)
    if name in ("published", "expiration"):
        right = type(wrong) is int and (name == "expiration" or wrong >= 0)
    if name in ("compression", "expiration"):
        right = right or wrong is None
    if name == "kind":
        right = wrong in ("state", "group")
    if right:
        assert checked(damaged) is damaged
    else:
        with pytest.raises(errors.ForeignMessage, match="not of its type: StateMessage"):
            checked(damaged)


# -- the body ----------------------------------------------------------------------------------


def installed(serializer: str) -> bool:
    """Return whether kombu can encode with *serializer*: for some, the library may be missing."""
    try:
        Codec(serializer, None).encode({"status": "SUCCESS", "result": 2})
    except (EncodeError, SerializerNotInstalled):
        return False
    return True


def needs_library(serializer: str) -> Any:
    return pytest.param(
        serializer,
        marks=pytest.mark.skipif(not installed(serializer), reason="its library is not installed"),
    )


PLAIN = ["json", needs_library("yaml"), needs_library("msgpack")]
serializers = pytest.mark.parametrize("serializer", ["pickle", *PLAIN])
#: Each once: kombu has a short name and a content type for each.
COMPRESSIONS = sorted(set(kombu_compression.encoders()))
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


#: For tests that try every serializer with every compression.
few = settings(max_examples=25)


def message_of(encoded: Tuple[str, str, Optional[str], bytes]) -> StateMessage:
    content_type, encoding, compression, body = encoded
    return StateMessage("é", "SUCCESS", 1, body, content_type, encoding, compression)


def test_compressions_are_known() -> None:
    assert {"application/x-gzip", "application/x-bz2"} <= set(COMPRESSIONS)


@serializers
@pytest.mark.parametrize("compression", [None, "gzip", *COMPRESSIONS])
@few
@given(result=values)
def test_a_meta_is_restored(serializer: str, compression: str | None, result: Any) -> None:
    wanted = {"status": "SUCCESS", "result": result, "task_id": "é", "children": []}
    message = message_of(Codec(serializer, None, compression).encode(wanted))
    assert type(message.body) is bytes
    assert (message.compression is None) == (compression is None)
    # The reader need not have the same settings.
    assert Codec("json", [message.content_type]).decode(message) == wanted
    # The body is unchanged on the way through the broker.
    again = StateMessage.from_properties(message.properties(True), message.body)
    assert Codec("json", [message.content_type], "gzip").decode(again) == wanted


@pytest.mark.parametrize(
    "result",
    [
        uuid.UUID("0f3b2c4e-8d1a-4a52-9a4b-6f2a1c7d8e90"),
        datetime.datetime(2026, 11, 23, 1, 2, 3, 4, datetime.timezone.utc),
        decimal.Decimal("1.10"),
        "\ud800",
    ],
)
@pytest.mark.parametrize("serializer", ["json", "pickle"])
def test_values_that_celery_can_send_are_restored_with_their_types(
    serializer: str, result: Any
) -> None:
    message = message_of(Codec(serializer, None).encode({"status": "SUCCESS", "result": result}))
    assert Codec("json", [message.content_type]).decode(message)["result"] == result


def test_unencodable_values_raise_kombu_s_error() -> None:
    with pytest.raises(EncodeError):
        Codec("json", None).encode({"status": "SUCCESS", "result": object()})


def test_a_decoded_meta_is_not_decoded_again() -> None:
    known = {"status": "SUCCESS", "result": 1}
    message = dataclasses.replace(at("SUCCESS", 1), body=b"damaged", decoded=known)
    decoded = Codec("json", []).decode(message)
    assert decoded == known
    # The copy belongs to the reader.
    decoded["result"] = 2
    assert known["result"] == 1


content_types = st.sampled_from(
    ["application/json", "application/x-yaml", "application/x-msgpack", "application/data",
     "application/text", "text/plain", "json", "nonsense", "\ud800"]
)  # fmt: skip
encodings = st.sampled_from(
    ["utf-8", "binary", "us-ascii", "utf-16", "idna", "hex", "zlib", "rot13", "nonsense", "\0"]
)
compressions = st.none() | st.sampled_from([*COMPRESSIONS, "gzip", "nonsense", ""])
accepted = st.none() | st.lists(content_types, max_size=3)
deep = st.integers(1, 3000)
damaged_bodies = (
    st.binary(max_size=60)
    | st.text().map(lambda text: text.encode())
    | values.map(lambda value: Codec("json", None).encode({"result": value})[3])
    # Nested deeper than Python can recurse.
    | deep.map(lambda depth: b"[" * depth + b"]" * depth)
    | deep.map(lambda depth: b'{"a":' * depth + b"1" + b"}" * depth)
    | deep.map(lambda depth: b"\x91" * depth + b"\xc0")
    | deep.map(lambda depth: b"\x81\xa1a" * depth + b"\xc0")
)


def decoded_or_refused(codec: Codec, message: StateMessage) -> None:
    with contextlib.suppress(errors.ForeignMessage, ContentDisallowed):
        found = codec.decode(message)
        assert isinstance(found, dict)
        assert {"status", "result"} <= set(found)


@given(damaged_bodies, content_types, encodings, compressions, accepted)
@example(b"\x91" * 1000 + b"\xc0", "application/x-msgpack", "binary", None, None)
def test_a_garbage_body_is_foreign_or_not_accepted_without_other_errors(
    body: bytes,
    content_type: str,
    encoding: str,
    compression: str | None,
    accept: Optional[List[str]],
) -> None:
    message = StateMessage("t\ud800", "SUCCESS", 1, body, content_type, encoding, compression)
    decoded_or_refused(Codec("json", accept), message)


@serializers
@pytest.mark.parametrize("compression", [None, *COMPRESSIONS])
@few
@given(result=values, data=st.data())
def test_a_truncated_body_is_foreign_without_other_errors(
    serializer: str, compression: str | None, result: Any, data: st.DataObject
) -> None:
    wanted = {"status": "SUCCESS", "result": result, "task_id": "é"}
    message = message_of(Codec(serializer, None, compression).encode(wanted))
    end = data.draw(st.integers(0, len(message.body) - 1))
    cut = dataclasses.replace(message, body=message.body[:end])
    decoded_or_refused(Codec(serializer, [message.content_type]), cut)


# A pickle is a program, so a changed byte may have any effect. Pickle is left out.
@pytest.mark.parametrize("serializer", PLAIN)
@given(result=values, data=st.data())
def test_a_body_with_a_changed_byte_is_a_meta_or_foreign_without_other_errors(
    serializer: str, result: Any, data: st.DataObject
) -> None:
    wanted = {"status": "SUCCESS", "result": result, "task_id": "é"}
    message = message_of(Codec(serializer, None).encode(wanted))
    wrong = data.draw(st.integers(0, len(message.body) - 1))
    octets = bytearray(message.body)
    octets[wrong] = data.draw(st.integers(0, 255))
    changed = dataclasses.replace(message, body=bytes(octets))
    decoded_or_refused(Codec(serializer, [message.content_type]), changed)


class Unprintable(list):  # type: ignore[type-arg]
    def __repr__(self) -> str:
        raise RuntimeError("a result of somebody's own class")


def deep_list(depth: int) -> List[Any]:
    value: List[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        "text",
        {},
        {"status": "SUCCESS"},
        {"result": 1},
        Unprintable(),
        deep_list(300),
    ],
    ids=["none", "list", "text", "empty", "no-result", "no-status", "unprintable", "deep"],
)
def test_a_body_that_is_no_meta_is_foreign(value: Any) -> None:
    body = pickle.dumps(value)
    message = StateMessage("t", "SUCCESS", 1, body, "application/x-python-serialize", "binary")
    with pytest.raises(errors.ForeignMessage, match="no meta"):
        Codec("json", ["application/x-python-serialize"]).decode(message)


@given(accept=st.lists(st.sampled_from(["application/json", "json", "text/x"]), max_size=2))
def test_content_that_is_not_accepted_is_not_decoded(accept: List[str]) -> None:
    message = message_of(Codec("pickle", None).encode({"status": "SUCCESS", "result": Trap()}))
    with pytest.raises(ContentDisallowed):
        Codec("json", accept).decode(message)


class Trap:
    """Fails the test when it is unpickled."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("it was decoded",))


def test_the_value_that_is_no_meta_is_in_the_error() -> None:
    message = StateMessage("t", "SUCCESS", 1, b'["x"]', "application/json", "utf-8")
    with pytest.raises(errors.ForeignMessage, match=r"no meta: \['x'\]"):
        Codec("json", ["application/json"]).decode(message)


def pickled(value: Any, **fields: Any) -> StateMessage:
    body = pickle.dumps(value)
    content_type = "application/x-python-serialize"
    message = StateMessage("t", "SUCCESS", 1, body, content_type, "binary")
    return dataclasses.replace(message, **fields)


reads_pickles = Codec("json", ["application/x-python-serialize"])


def test_ids_that_a_serializer_made_uuids_of_are_texts_again() -> None:
    one, two, three = (uuid.UUID(int=number) for number in (1, 2, 3))
    meta = {"status": "SUCCESS", "result": one, "task_id": one, "parent_id": two, "group_id": three}
    texts = {"task_id": str(one), "parent_id": str(two), "group_id": str(three)}
    decoded = reads_pickles.decode(pickled(meta, id=str(one)))
    assert decoded == {**meta, **texts}
    assert isinstance(decoded["result"], uuid.UUID)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ([1, 2], "the SUCCESS of 't' decodes to no meta: [1, 2]"),
        ({"status": "SUCCESS"}, "the SUCCESS of 't' decodes to no meta: {'status': 'SUCCESS'}"),
        ({"status": ["x"], "result": 1}, "the SUCCESS of 't' names no state: ['x']"),
        ({"status": {"x": 1}, "result": 1}, "the SUCCESS of 't' names no state: {'x': 1}"),
        (
            {"status": "FAILURE", "result": 1},
            "the SUCCESS of 't' says that it is the 'FAILURE' of 't'",
        ),
        (
            {"status": "SUCCESS", "result": 1, "task_id": "other"},
            "the SUCCESS of 't' says that it is the 'SUCCESS' of 'other'",
        ),
    ],
)
def test_the_reason_why_a_body_is_foreign_is_reported(meta: Any, message: str) -> None:
    with pytest.raises(errors.ForeignMessage) as caught:
        reads_pickles.decode(pickled(meta))
    assert str(caught.value) == message


def test_a_meta_is_compared_with_its_message_only_for_a_state_with_an_id() -> None:
    meta = {"status": "FAILURE", "result": 1, "task_id": "other"}
    assert reads_pickles.decode(pickled(meta, kind=GROUP)) == meta
    assert reads_pickles.decode(pickled(meta, id="")) == meta
    with pytest.raises(errors.ForeignMessage):
        reads_pickles.decode(pickled(meta))


def test_an_undecodable_body_is_reported_with_the_reason() -> None:
    with pytest.raises(errors.ForeignMessage) as caught:
        reads_pickles.decode(pickled({}, body=b"damaged"))
    assert str(caught.value).startswith("the SUCCESS of 't' cannot be decoded: DecodeError(")


def test_a_result_that_is_too_large_to_compress_is_reported_with_both_sizes() -> None:
    meta = {"status": "SUCCESS", "result": 1}
    size = len(Codec("json", None).encode(meta)[3])
    with pytest.raises(errors.ResultTooLarge) as caught:
        Codec("json", None, "gzip", size - 1).encode(meta)
    assert str(caught.value) == (
        f"a result of {size} bytes cannot be stored compressed: readers decompress {size - 1} at "
        "most. Return less, or raise the option max_decompressed_size everywhere."
    )


# -- the clock ---------------------------------------------------------------------------------


def test_no_two_states_of_a_process_have_the_same_time() -> None:
    clock = PublishClock()
    times: List[List[int]] = [[] for _ in range(4)]
    start = threading.Barrier(len(times))

    def read(into: List[int]) -> None:
        start.wait()
        into.extend(clock.now() for _ in range(2000))

    threads = [threading.Thread(target=read, args=(into,)) for into in times]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(one == sorted(one) for one in times)
    every = list(itertools.chain.from_iterable(times))
    assert len(set(every)) == len(every) == 8000


def test_a_time_is_a_whole_number() -> None:
    assert type(clock_module.wall()) is int


def test_two_threads_get_different_times(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = PublishClock()
    times: List[int] = []
    other = threading.Thread(target=lambda: times.append(clock.now()))

    def time_ns() -> int:
        if other.ident is None:
            # The other thread asks now. It must wait for the first, which must not wait for it.
            other.start()
            other.join(0.2)
        return 0

    monkeypatch.setattr(clock_module, "time", types.SimpleNamespace(time_ns=time_ns))
    times.append(clock.now())
    other.join()
    assert sorted(times) == [1, 2]


def test_times_increase_across_threads() -> None:
    clock = PublishClock()
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        # Each is requested after the previous one has returned, by any free thread.
        times = [threads.submit(clock.now).result() for _ in range(500)]
    assert all(one < other for one, other in zip(times, times[1:]))


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=10))
def test_times_increase_even_if_the_clock_is_set_back(ticks: List[int]) -> None:
    clock = PublishClock()
    given_times = []
    with pytest.MonkeyPatch.context() as patch:
        for tick in ticks:
            patch.setattr(
                clock_module, "time", types.SimpleNamespace(time_ns=lambda tick=tick: tick)
            )
            given_times.append(clock.now())
    assert all(one < other for one, other in zip(given_times, given_times[1:]))
    assert all(one >= tick // 1000 for one, tick in zip(given_times, ticks))


def test_a_forked_child_does_not_block_on_a_lock_of_its_parent() -> None:
    clock = PublishClock()
    before = clock.now()
    with clock._lock:
        # As in a child that was forked while another thread was asking for the time.
        clock.after_fork_in_child()
        assert clock.now() > before
