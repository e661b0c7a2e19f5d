"""The frames built by hand are what py-amqp would have sent."""

from __future__ import annotations

import struct
from typing import Any, Dict, List, Tuple

import amqp
import pytest
from amqp import spec
from amqp.basic_message import Message
from amqp.serialization import loads
from hypothesis import given
from hypothesis import strategies as st

from celery_amqp_results import frames

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
def test_py_amqp_reads_what_is_built(
    channel: int,
    exchange: str,
    routing_key: str,
    mandatory: bool,
    given_properties: Dict[str, Any],
    body: bytes,
) -> None:
    octets = frames.publish_frames(
        channel, exchange, routing_key, mandatory, given_properties, body, frame_max=131072
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


@given(st.binary(max_size=5000), st.integers(16, 600))
def test_a_long_body_is_divided_as_the_connection_wants_it(body: bytes, frame_max: int) -> None:
    octets = frames.publish_frames(3, "", "queue", False, {}, body, frame_max)
    bodies = split(octets)[2:]
    assert all(kind == 3 and len(payload) + 8 <= frame_max for kind, _, payload in bodies)
    assert b"".join(payload for _, _, payload in bodies) == body


def test_what_does_not_fit_is_an_error_before_anything_is_sent() -> None:
    with pytest.raises(ValueError, match="range"):
        frames.publish_frames(1, "", "k" * 256, False, {}, b"", 4096)
    with pytest.raises(TypeError, match="'odd'"):
        frames.publish_frames(1, "", "k", False, {"application_headers": {"odd": 1.5}}, b"", 4096)
