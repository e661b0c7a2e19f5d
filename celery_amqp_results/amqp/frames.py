"""The frames of a message, built and read in one go; and what py-amqp cannot read, made readable.

py-amqp serialises any method with any properties, which takes 100 microseconds a message. A state
has few properties, always the same ones, so building the same bytes by hand takes a tenth of that.
py-amqp also reads deliveries piece by piece, three pieces for each frame. When all frames of a
message have arrived, this module reads it in a third of the time and leaves only the properties to
py-amqp. This module does no I/O; its tests read its frames with py-amqp.
"""

from __future__ import annotations

import functools
import logging
import struct
from typing import Any, Callable, List, Mapping, NamedTuple, Optional, Tuple

import amqp
from amqp.exceptions import UnexpectedFrame

__all__ = ("UNREADABLE", "Delivery", "publish_frames", "read_delivery", "tolerant")

logger = logging.getLogger(__name__)

#: The beginning of the property ``type`` of a message whose properties py-amqp cannot read.
UNREADABLE = "unreadable properties: "

_FRAME = struct.Struct(">BHI")
_END = b"\xce"
_LAST = _END[0]
_METHOD, _HEADER, _BODY = 1, 2, 3
#: Class basic, method publish, and a reserved field.
_PUBLISH = struct.pack(">HHH", 60, 40, 0)
_CONTENT = struct.Struct(">HHQ")
#: Bytes of a frame besides its payload.
_OVERHEAD = 8
_MANDATORY = b"\1"
_FLAGS, _UNSIGNED = struct.Struct(">H"), struct.Struct(">I")
_SIGNED, _TIME = struct.Struct(">q"), struct.Struct(">Q")

#: Property to its flag and how it is written, in the order of the protocol. A name is a short
#: string like any text, but one of few, which are remembered as written.
_PROPERTIES = (
    ("content_type", 1 << 15, "name"),
    ("content_encoding", 1 << 14, "name"),
    ("application_headers", 1 << 13, "table"),
    ("delivery_mode", 1 << 12, "octet"),
    ("priority", 1 << 11, "octet"),
    ("correlation_id", 1 << 10, "text"),
    ("reply_to", 1 << 9, "text"),
    ("expiration", 1 << 8, "name"),
    ("message_id", 1 << 7, "text"),
    ("timestamp", 1 << 6, "time"),
    ("type", 1 << 5, "name"),
    ("user_id", 1 << 4, "name"),
    ("app_id", 1 << 3, "name"),
)


def _short(text: str) -> bytes:
    raw = text.encode("utf-8")
    # Longer than 255 bytes is a ValueError of bytes().
    return bytes((len(raw),)) + raw


#: The same, cached, for the few names in use.
_name = functools.lru_cache(maxsize=256)(_short)


def _table(table: Mapping[str, object]) -> bytes:
    parts: List[bytes] = []
    for name, value in table.items():
        if isinstance(value, str):
            raw = value.encode("utf-8", "surrogatepass")
            parts += (_name(name), b"S", _UNSIGNED.pack(len(raw)), raw)
        elif type(value) is int:
            parts += (_name(name), b"l", _SIGNED.pack(value))
        else:
            raise TypeError(f"header {name!r} is {value!r}; only text and whole numbers are used")
    body = b"".join(parts)
    return _UNSIGNED.pack(len(body)) + body


def _properties(properties: Mapping[str, Any]) -> bytes:
    flags = 0
    parts = [b""]
    for name, flag, kind in _PROPERTIES:
        value = properties.get(name)
        if value is None:
            continue
        flags |= flag
        if kind == "name":
            parts.append(_name(value))
        elif kind == "text":
            parts.append(_short(value))
        elif kind == "table":
            parts.append(_table(value))
        elif kind == "octet":
            parts.append(bytes((value,)))
        else:
            parts.append(_TIME.pack(value))
    parts[0] = _FLAGS.pack(flags)
    return b"".join(parts)


#: Exchange, empty for the default exchange; routing key, of up to 255 bytes; and whether the broker
#: returns a message that no queue takes.
Address = Tuple[str, str, bool]


def publish_frames(
    channel: int,
    frame_max: int,
    properties: Mapping[str, object],
    body: bytes,
    *addresses: Address,
) -> bytes:
    """Return the bytes that publish a message, once to each of *addresses*.

    Parameters:
        channel: number of the channel.
        frame_max: the largest frame that the connection allows, in bytes.
        properties: AMQP properties by py-amqp's names; headers are text or whole numbers.

    Raises:
        ValueError: when a text is too long for its place.
        TypeError: when a header is neither text nor a whole number.
    """
    header = _CONTENT.pack(60, 0, len(body)) + _properties(properties)
    parts = [_FRAME.pack(_HEADER, channel, len(header)), header, _END]
    room = frame_max - _OVERHEAD
    for start in range(0, len(body), room):
        piece = body[start : start + room]
        parts += (_FRAME.pack(_BODY, channel, len(piece)), piece, _END)
    octets: List[bytes] = []
    for exchange, routing_key, mandatory in addresses:
        flags = _MANDATORY if mandatory else b"\0"
        method = b"".join((_PUBLISH, _name(exchange), _short(routing_key), flags))
        octets += (_FRAME.pack(_METHOD, channel, len(method)), method, _END, *parts)
    return b"".join(octets)


#: Type, channel and size of a frame, and class and method of ``basic.deliver``.
_START_OF_DELIVER = struct.Struct(">BHIHH")
_DELIVER = (60, 60)
_TAG = struct.Struct(">QB")


class Delivery(NamedTuple):
    """A message that was delivered."""

    #: Number of the channel.
    channel: int
    consumer_tag: str
    message: amqp.Message
    #: How many frames it came in.
    frames: int
    #: Where in the bytes the next one begins.
    end: int


def read_delivery(data: bytes, start: int) -> Optional[Delivery]:
    """Return the message whose frames begin at *start* of *data*.

    Returns ``None`` if it is something else, incomplete, or odd in any way: py-amqp handles those.
    """
    try:
        kind, channel, size, *method = _START_OF_DELIVER.unpack_from(data, start)
        if kind != _METHOD or tuple(method) != _DELIVER:
            return None
        at = start + _START_OF_DELIVER.size
        consumer_tag, at = _text(data, at)
        delivery_tag, redelivered = _TAG.unpack_from(data, at)
        exchange, at = _text(data, at + _TAG.size)
        routing_key, at = _text(data, at)
        end = start + _FRAME.size + size
        if at != end or data[end] != _LAST:
            return None
        head = end + 1 + _FRAME.size
        kind, number, size = _FRAME.unpack_from(data, end + 1)
        end = head + size
        if (kind, number) != (_HEADER, channel) or data[end] != _LAST:
            return None
        message = amqp.Message()
        # A slice, so that py-amqp cannot read beyond its end.
        message.inbound_header(data[head:end])
        count, left, pieces = 2, message.body_size, []
        while left:
            kind, number, size = _FRAME.unpack_from(data, end + 1)
            at = end + 1 + _FRAME.size
            end = at + size
            if (kind, number) != (_BODY, channel) or size > left or data[end] != _LAST:
                return None
            pieces.append(data[at:end])
            left -= size
            count += 1
    except Exception:
        # Cut off, or unreadable.
        return None
    message.body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    message.delivery_info = {
        "consumer_tag": consumer_tag,
        "delivery_tag": delivery_tag,
        "redelivered": bool(redelivered & 1),
        "exchange": exchange,
        "routing_key": routing_key,
    }
    return Delivery(channel, consumer_tag, message, count, end + 1)


def _text(data: bytes, at: int) -> Tuple[str, int]:
    end = at + 1 + data[at]
    return data[at + 1 : end].decode("utf-8", "surrogatepass"), end


Frame = Tuple[int, int, Any]


def tolerant(on_frame: Callable[[Frame], bool]) -> Callable[[Frame], bool]:
    """Return *on_frame*, py-amqp's handler of frames, made to survive malformed messages.

    RabbitMQ passes on bytes that are not UTF-8, times that are not dates, and deeply nested tables.
    py-amqp raises an error at these in the middle of reading a connection: one such message in a
    queue would break every reader of it.

    A message whose properties cannot be read has only a ``type``, which begins with
    :data:`UNREADABLE`. One whose routing key cannot be read is skipped entirely.
    """

    def handle(frame: Frame) -> bool:
        kind, channel, payload = frame
        try:
            return on_frame(frame)
        except Exception as exc:
            if kind == _HEADER:
                # Class, weight and size of the body, and then one property.
                kept = bytes(payload[: _CONTENT.size])
                why = f"{UNREADABLE}{exc!r:.100}".encode("ascii", "backslashreplace").decode()
                try:
                    return on_frame((kind, channel, kept + _properties({"type": why[:255]})))
                except UnexpectedFrame:
                    # The header was not at fault: the message has no body, and was handled.
                    pass
            if kind not in (_HEADER, _BODY) or not isinstance(exc, UnicodeDecodeError):
                raise
            logger.warning("passed over a message with an unreadable routing key: %r", exc)
            return True

    return handle
