"""A task's state as a message on the broker.

:class:`StateMessage` is one state of one task as the broker keeps it. Its body stays encoded until
a caller wants the value. This module does no I/O.
"""

from __future__ import annotations

import dataclasses
import reprlib
from typing import Any, Dict, Mapping, Optional, Union

from celery_amqp_results import errors

__all__ = ("StateMessage",)

#: Kinds of messages in a shard, in the property ``type``.
STATE = "state"
GROUP = "group"
#: The fate of a task, see :mod:`~celery_amqp_results.store.marks`.
MARK = "mark"
#: The mark of a task whose states were deleted. It is also published to the exchange.
FORGOTTEN = "FORGOTTEN"
#: The return value of a chord's header task, if its state is not kept long enough.
PART = "part"
#: The plan of a chord, in a plan queue.
PLAN = "plan"
#: Header with the time of publishing, in microseconds since 1970.
PUBLISHED = "published"
#: Header with the name of the state.
STATE_HEADER = "state"
#: Header with the id, where it does not fit the property ``correlation_id``.
ID_HEADER = "id"
#: Header with the content type of kombu's compression; the name is kombu's.
COMPRESSION_HEADER = "compression"
#: Header with the name of the queue that has the body, of a state that is a pointer.
BODY_QUEUE_HEADER = "body-queue"
#: Header with the mark of the last amendment that a chord's header task made before it ended.
AMENDED_HEADER = "amended"
#: Stands there for a final state of such a task that does not tell what the task has returned.
NOT_AN_END = "-"
#: Longest AMQP short string, in bytes.
MAX_SHORT_STRING = 255
#: The largest credible clock error, in microseconds. A state dated further ahead must not hide the
#: states of other workers.
MAX_AHEAD = 24 * 3600 * 1_000_000
#: The time that replaces such a date.
UNKNOWN_TIME = 0


@dataclasses.dataclass(frozen=True)
class StateMessage:
    """One state of one task (or one saved group), encoded."""

    #: Id of the task or of the group.
    id: str
    #: Name of the state; of a group, ``GROUP``.
    state: str
    #: When it was published, in microseconds since 1970.
    published: int
    #: The encoded meta.
    body: bytes
    content_type: str
    content_encoding: str
    #: kombu's name for how the body is compressed, or ``None``.
    compression: Optional[str] = None
    #: Milliseconds after which the broker drops it, or ``None``.
    expiration: Optional[int] = None
    #: :data:`STATE`, :data:`GROUP`, :data:`MARK`, :data:`PART` or :data:`PLAN`.
    kind: str = STATE
    #: The queue that has a body too large for a shard; :attr:`body` is empty then.
    body_queue: Optional[str] = None
    #: The mark of the task's last amendment to its chord, :data:`NOT_AN_END`, or ``None``.
    amended: Optional[str] = None
    #: The meta, if decoding it was needed to know the state: :meth:`Codec.decode` returns it.
    decoded: Optional[Mapping[str, object]] = dataclasses.field(
        default=None, compare=False, repr=False
    )

    def expired(self, now: int) -> bool:
        """Return whether the broker would have dropped it by *now*, in microseconds since 1970."""
        return self.expiration is not None and now >= self.published + self.expiration * 1000

    def properties(self, persistent: bool) -> Dict[str, Any]:
        """Return the AMQP properties it is published with, by py-amqp's names for them."""
        headers: Dict[str, object] = {PUBLISHED: self.published, STATE_HEADER: self.state}
        properties: Dict[str, object] = {
            "type": self.kind,
            "content_type": self.content_type,
            "content_encoding": self.content_encoding,
            "delivery_mode": 2 if persistent else 1,
            "application_headers": headers,
        }
        raw_id = self.id.encode("utf-8", "surrogatepass")
        if len(raw_id) <= MAX_SHORT_STRING and _is_utf8(self.id):
            properties["correlation_id"] = self.id
        else:
            headers[ID_HEADER] = raw_id.hex()
        if self.compression:
            headers[COMPRESSION_HEADER] = self.compression
        if self.body_queue:
            headers[BODY_QUEUE_HEADER] = self.body_queue
        if self.amended:
            headers[AMENDED_HEADER] = self.amended
        if self.expiration is not None:
            properties["expiration"] = str(self.expiration)
        return properties

    @classmethod
    def from_properties(
        cls, properties: Mapping[str, object], body: Union[bytes, str]
    ) -> StateMessage:
        """Return the state that a message on the broker holds.

        Raises:
            ForeignMessage: when :meth:`properties` could not have described such a message.
        """
        kind = properties.get("type")
        if kind not in (STATE, GROUP, MARK, PART, PLAN):
            raise errors.ForeignMessage(f"property 'type' is {kind!r}, not that of a state")
        headers = properties.get("application_headers")
        if not isinstance(headers, Mapping):
            raise errors.ForeignMessage(f"the headers are {_short(headers)}, not a table")
        state = headers.get(STATE_HEADER)
        if not isinstance(state, str):
            raise errors.ForeignMessage(f"header {STATE_HEADER!r} is {_short(state)}, not a state")
        published = headers.get(PUBLISHED)
        if isinstance(published, bool) or not isinstance(published, int) or published < 0:
            raise errors.ForeignMessage(
                f"header {PUBLISHED!r} is {_short(published)}, not microseconds since 1970"
            )
        return cls(
            id=message_id(properties),
            state=state,
            published=published,
            body=body.encode("utf-8", "surrogatepass") if isinstance(body, str) else bytes(body),
            content_type=_text(properties, "content_type"),
            content_encoding=_text(properties, "content_encoding"),
            compression=_text_or_none(headers, COMPRESSION_HEADER, "a content type"),
            expiration=_expiration(properties),
            kind=kind,
            body_queue=_text_or_none(headers, BODY_QUEUE_HEADER, "the name of a queue"),
            amended=_text_or_none(headers, AMENDED_HEADER, "the mark of an amendment"),
        )


def checked(state: StateMessage) -> StateMessage:
    """Return *state*, which was read from a page, if its fields are valid.

    Raises:
        ForeignMessage: when a field is invalid.
    """
    if not (
        isinstance(state.id, str)
        and isinstance(state.state, str)
        and type(state.published) is int
        and state.published >= 0
        and isinstance(state.content_type, str)
        and isinstance(state.content_encoding, str)
        and (state.compression is None or isinstance(state.compression, str))
        and (state.expiration is None or type(state.expiration) is int)
        and state.kind in (STATE, GROUP, MARK, PART)
        and (state.body_queue is None or isinstance(state.body_queue, str))
        and (state.amended is None or isinstance(state.amended, str))
    ):
        raise errors.ForeignMessage(f"a field is not of its type: {_short(state)}")
    return state


def dated(state: StateMessage, now: int) -> StateMessage:
    """Return *state*, published at :data:`UNKNOWN_TIME` if its date is in the far future.

    Results of a worker whose clock is wrong by years still count. But among states of equal rank
    such a state would win for ever, so it loses. *now* is in microseconds since 1970.
    """
    if state.published <= now + MAX_AHEAD:
        return state
    return dataclasses.replace(state, published=UNKNOWN_TIME)


def _short(value: object) -> str:
    # A header may be as long as a frame, and goes to the log.
    return reprlib.repr(value)


def message_id(properties: Mapping[str, object]) -> str:
    """Return the id in a message's properties.

    Raises:
        ForeignMessage: when they contain none.
    """
    found = properties.get("correlation_id")
    if isinstance(found, str) and found:
        return found
    headers = properties.get("application_headers")
    digits = headers.get(ID_HEADER) if isinstance(headers, Mapping) else None
    try:
        return bytes.fromhex(digits).decode("utf-8", "surrogatepass")  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise errors.ForeignMessage(
            f"neither the property 'correlation_id' ({found!r}) nor the header {ID_HEADER!r} "
            f"({_short(digits)}) is an id"
        ) from None


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _text(properties: Mapping[str, object], name: str) -> str:
    value = properties.get(name)
    if not isinstance(value, str) or not value:
        raise errors.ForeignMessage(f"property {name!r} is {value!r}, not text")
    return value


def _text_or_none(headers: Mapping[str, object], name: str, what: str) -> Optional[str]:
    value = headers.get(name)
    if value is not None and not isinstance(value, str):
        raise errors.ForeignMessage(f"header {name!r} is {_short(value)}, not {what}")
    return value


def _expiration(properties: Mapping[str, object]) -> Optional[int]:
    value = properties.get("expiration")
    if value is None:
        return None
    try:
        return int(value)  # type: ignore[call-overload,no-any-return]
    except (TypeError, ValueError, OverflowError):
        raise errors.ForeignMessage(
            f"property 'expiration' is {value!r}, not milliseconds"
        ) from None
