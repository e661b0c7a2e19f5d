"""Frames built by hand equal those that py-amqp would have sent."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any, Dict, List, Sequence, Tuple

import amqp
import pytest
from amqp import spec
from amqp.basic_message import Message
from amqp.method_framing import frame_handler
from amqp.serialization import loads
from hypothesis import given
from hypothesis import strategies as st

from celery_amqp_results.amqp import frames

#: py-amqp before 5.4 takes negative numbers in headers for large ones.
SMALLEST = -(2**63) if amqp.VERSION >= (5, 4) else 0

words = st.text(max_size=60)
properties = st.fixed_dictionaries(
    {},
    optional={
        "content_type": words,
        "content_encoding": words,
        "delivery_mode": st.sampled_from([1, 2]),
        "priority": st.integers(0, 9),
        "correlation_id": words,
        "reply_to": words,
        "expiration": words,
        "message_id": words,
        "timestamp": st.integers(0, 2**63 - 1),
        "type": words,
        "application_headers": st.dictionaries(
            st.text(max_size=30), st.text() | st.integers(SMALLEST, 2**63 - 1), max_size=5
        ),
    },
)


def split(octets: bytes) -> List[Tuple[int, int, bytes]]:
    """Return the frames in *octets* as (type, channel, payload)."""
    found = []
    while octets:
        kind, channel, size = struct.unpack_from(">BHI", octets)
        assert octets[7 + size] == 0xCE
        found.append((kind, channel, octets[7 : 7 + size]))
        octets = octets[8 + size :]
    return found


@given(st.integers(1, 65535), words, words, st.booleans(), properties, st.binary(max_size=500))
def test_py_amqp_reads_the_built_frames(
    channel: int,
    exchange: str,
    routing_key: str,
    mandatory: bool,
    given_properties: Dict[str, Any],
    body: bytes,
) -> None:
    octets = frames.publish_frames(
        channel, 131072, given_properties, body, (exchange, routing_key, mandatory)
    )
    method, header, *bodies = split(octets)
    assert [method[:2], header[:2]] == [(1, channel), (2, channel)]
    assert struct.unpack_from(">HH", method[2]) == spec.Basic.Publish
    arguments, _ = loads("Bssbb", method[2], 4)
    assert arguments[1:] == [exchange, routing_key, mandatory, False]
    message = Message()
    message.inbound_header(header[2])
    assert message.body_size == len(body)
    assert message.properties == given_properties
    assert b"".join(payload for _, _, payload in bodies) == body


@given(st.binary(max_size=5000), st.integers(64, 600), st.booleans())
def test_a_copy_is_the_same_message_with_another_address(
    body: bytes, frame_max: int, mandatory: bool
) -> None:
    properties = {"type": "state", "application_headers": {"state": "SUCCESS"}}
    addresses = (("", "queue", mandatory), ("x", "key", False))
    twice = frames.publish_frames(1, frame_max, properties, body, *addresses)
    first, second = (
        frames.publish_frames(1, frame_max, properties, body, address) for address in addresses
    )
    assert twice == first + second


@given(st.binary(max_size=5000), st.integers(16, 600))
def test_a_long_body_is_split_at_the_connection_s_frame_size(body: bytes, frame_max: int) -> None:
    octets = frames.publish_frames(3, frame_max, {}, body, ("", "queue", False))
    bodies = split(octets)[2:]
    assert all(kind == 3 and len(payload) + 8 <= frame_max for kind, _, payload in bodies)
    assert b"".join(payload for _, _, payload in bodies) == body


def test_an_oversized_message_is_an_error_before_anything_is_sent() -> None:
    with pytest.raises(ValueError, match="range"):
        frames.publish_frames(1, 4096, {}, b"", ("", "k" * 256, False))
    with pytest.raises(TypeError, match="'odd'"):
        frames.publish_frames(1, 4096, {"application_headers": {"odd": 1.5}}, b"", ("", "k", False))


def delivered(
    channel: int, names: Sequence[str], tag: int, redelivered: bool, octets: bytes
) -> bytes:
    """Return the frames of a message published by *octets*, as the broker delivers them."""
    consumer_tag, exchange, routing_key = (
        bytes((len(name.encode()),)) + name.encode() for name in names
    )
    method = b"".join(
        (
            struct.pack(">HH", *spec.Basic.Deliver),
            consumer_tag,
            struct.pack(">QB", tag, redelivered),
            exchange,
            routing_key,
        )
    )
    _, _, size = struct.unpack_from(">BHI", octets)
    return struct.pack(">BHI", 1, channel, len(method)) + method + b"\xce" + octets[8 + size :]


@given(
    st.integers(1, 65535),
    st.tuples(words, words, words),
    st.integers(0, 2**64 - 1),
    st.booleans(),
    properties,
    st.binary(max_size=300),
    st.integers(64, 400),
    st.data(),
)
def test_a_delivery_is_read_as_py_amqp_reads_it(
    channel: int,
    names: Tuple[str, str, str],
    tag: int,
    redelivered: bool,
    given_properties: Dict[str, Any],
    body: bytes,
    frame_max: int,
    data: st.DataObject,
) -> None:
    # Given a delivery, some of it split into several frames, with other frames around it
    published = frames.publish_frames(
        channel, max(frame_max, 16), given_properties, body, ("", "", False)
    )
    octets = delivered(channel, names, tag, redelivered, published)
    seen: List[Any] = []
    handler = frame_handler(
        SimpleNamespace(bytes_recv=0),
        lambda number, sig, buf, content: seen.append((number, sig, buf, content)),
    )
    for frame in split(octets):
        handler(frame)
    ((number, sig, arguments, expected),) = seen
    values, _ = loads("sLbss", arguments, 4)
    # When it is read
    found = frames.read_delivery(b"xyz" + octets + octets, 3)
    # Then the message is the same
    assert found is not None
    assert (found.channel, sig) == (number, spec.Basic.Deliver)
    assert found.end == 3 + len(octets)
    assert found.frames == len(split(octets))
    info = found.message.delivery_info
    assert [found.consumer_tag, info["delivery_tag"], info["redelivered"]] == values[:3]
    assert [info["exchange"], info["routing_key"]] == values[3:]
    assert found.message.properties == expected.properties == given_properties
    assert found.message.body == body
    # A truncated delivery yields nothing, and a damaged one raises no error
    cut = data.draw(st.integers(0, len(octets) - 1))
    assert frames.read_delivery(octets[:cut], 0) is None
    damaged = bytearray(octets)
    damaged[cut] ^= data.draw(st.integers(1, 255))
    frames.read_delivery(bytes(damaged), 0)


def test_other_frames_are_left_to_py_amqp() -> None:
    published = frames.publish_frames(1, 4096, {}, b"body", ("", "queue", False))
    assert frames.read_delivery(published, 0) is None
    octets = delivered(1, ("tag", "", "queue"), 1, False, published)
    assert frames.read_delivery(octets, 0) is not None
    # Frames of another channel in between, and a body longer than announced
    other = delivered(2, ("tag", "", "queue"), 1, False, published)
    first = len(octets) - len(b"body") - 8
    assert frames.read_delivery(octets[:first] + other, 0) is None
    longer = frames.publish_frames(1, 4096, {}, b"bodies", ("", "queue", False))[-14:]
    assert frames.read_delivery(octets[:first] + longer, 0) is None
