"""A task's state as a message, and the rule for which state counts.

:class:`StateMessage` is one state of one task as it lies on the broker: its body is not decoded
until somebody wants it. :func:`fold` is the one rule for what a list of them amounts to;
everything that reads a state uses it, so that a duplicate run, a revoke written by twenty workers
at once, or a late STARTED change nothing. This module does no I/O.
"""

from __future__ import annotations

import bz2
import contextlib
import dataclasses
import importlib
import lzma
import reprlib
import threading
import time
import zlib
from typing import Any, Callable, Dict, Iterable, Mapping, Optional, Tuple

from celery import states
from kombu import compression as kombu_compression
from kombu import serialization

from celery_amqp_results import errors

__all__ = (
    "Codec",
    "PublishClock",
    "StateMessage",
    "fold",
    "is_final",
    "supersedes",
)

#: Kinds of messages in a shard, in the property ``type``.
STATE = "state"
GROUP = "group"
#: What became of a task, see :mod:`~celery_amqp_results.tracking`.
MARK = "mark"
#: Kinds of messages in the queue of a chord: what its header task returned, and what is to be done.
PART = "part"
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

#: The state of ``celery.contrib.abortable``, which imports too much for one word.
ABORTED = "ABORTED"

#: Longest AMQP short string, in bytes.
MAX_SHORT_STRING = 255

#: A decompressed body has at most so many bytes, where nothing else is said.
MAX_DECOMPRESSED = 128 * 1024 * 1024
#: Memory that decompressing LZMA may take besides; the highest preset takes a fourth of it.
LZMA_MEMORY = 256 * 1024 * 1024
#: So many bytes of a Brotli body at a time: each may give up to 16 MiB for some ten of them.
BROTLI_PIECE = 32

#: No clock is off by more than this, in microseconds. A state from later than that may not hide
#: what other workers say of the task.
MAX_AHEAD = 24 * 3600 * 1_000_000
#: The time that such a state is taken to be of.
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
    #: The queue that has the body, where that is too large for a shard; :attr:`body` is empty then.
    body_queue: Optional[str] = None
    #: The meta, where it had to be decoded to know the state: :meth:`Codec.decode` returns it.
    decoded: Optional[Mapping[str, Any]] = dataclasses.field(
        default=None, compare=False, repr=False
    )

    def expired(self, now: int) -> bool:
        """Return whether the broker would have dropped it by *now*, in microseconds since 1970."""
        return self.expiration is not None and now >= self.published + self.expiration * 1000

    def properties(self, persistent: bool) -> Dict[str, Any]:
        """Return the AMQP properties it is published with, by py-amqp's names for them."""
        headers: Dict[str, Any] = {PUBLISHED: self.published, STATE_HEADER: self.state}
        properties: Dict[str, Any] = {
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
        if self.expiration is not None:
            properties["expiration"] = str(self.expiration)
        return properties

    @classmethod
    def from_properties(cls, properties: Mapping[str, Any], body: Any) -> StateMessage:
        """Return the state that a message on the broker holds.

        Parameters:
            properties: AMQP properties, by py-amqp's names for them.
            body: the body, not decoded.

        Raises:
            ForeignMessage: when it is not a message that :meth:`properties` could have described.
        """
        kind = properties.get("type")
        if kind not in (STATE, GROUP, MARK, PART, PLAN):
            raise errors.ForeignMessage(f"property 'type' is {kind!r}, not that of a state")
        headers = properties.get("application_headers")
        if not isinstance(headers, Mapping):
            raise errors.ForeignMessage(f"the headers are {_short(headers)}, not a table")
        state = headers.get(STATE_HEADER)
        if not isinstance(state, str) or not state:
            raise errors.ForeignMessage(f"header {STATE_HEADER!r} is {_short(state)}, not a state")
        published = headers.get(PUBLISHED)
        if isinstance(published, bool) or not isinstance(published, int) or published < 0:
            raise errors.ForeignMessage(
                f"header {PUBLISHED!r} is {_short(published)}, not microseconds since 1970"
            )
        compression = headers.get(COMPRESSION_HEADER)
        if compression is not None and not isinstance(compression, str):
            raise errors.ForeignMessage(
                f"header {COMPRESSION_HEADER!r} is {_short(compression)}, not a content type"
            )
        body_queue = headers.get(BODY_QUEUE_HEADER)
        if body_queue is not None and not isinstance(body_queue, str):
            raise errors.ForeignMessage(
                f"header {BODY_QUEUE_HEADER!r} is {body_queue!r}, not the name of a queue"
            )
        return cls(
            id=message_id(properties),
            state=state,
            published=published,
            body=body.encode("utf-8", "surrogatepass") if isinstance(body, str) else bytes(body),
            content_type=_text(properties, "content_type"),
            content_encoding=_text(properties, "content_encoding"),
            compression=compression,
            expiration=_expiration(properties),
            kind=kind,
            body_queue=body_queue,
        )


def checked(state: StateMessage) -> StateMessage:
    """Return *state*, which came out of a page, if its fields are what they should be.

    Raises:
        ForeignMessage: when one is not.
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
        and state.kind in (STATE, GROUP, MARK)
        and (state.body_queue is None or isinstance(state.body_queue, str))
    ):
        raise errors.ForeignMessage(f"a field is not of its type: {_short(state)}")
    return state


def dated(state: StateMessage, now: int) -> StateMessage:
    """Return *state*, published at :data:`UNKNOWN_TIME` if it claims to be of the far future.

    A worker whose clock is wrong by years has results all the same. But among states that rank
    alike it would win for ever, so it loses.

    Parameters:
        now: microseconds since 1970.
    """
    if state.published <= now + MAX_AHEAD:
        return state
    return dataclasses.replace(state, published=UNKNOWN_TIME)


def _short(value: Any) -> str:
    # A header may be as long as a frame, and goes to the log.
    return reprlib.repr(value)


def message_id(properties: Mapping[str, Any]) -> str:
    """Return the id that a message is about, from its properties alone.

    Raises:
        ForeignMessage: when it names none.
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


def _text(properties: Mapping[str, Any], name: str) -> str:
    value = properties.get(name)
    if not isinstance(value, str) or not value:
        raise errors.ForeignMessage(f"property {name!r} is {value!r}, not text")
    return value


def _expiration(properties: Mapping[str, Any]) -> Optional[int]:
    value = properties.get("expiration")
    if value is None:
        return None
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise errors.ForeignMessage(
            f"property 'expiration' is {value!r}, not milliseconds"
        ) from None


def is_final(state: str) -> bool:
    """Return whether *state* ends a task: SUCCESS, FAILURE or REVOKED."""
    return state in states.READY_STATES


def _rank(state: str) -> int:
    if state == states.SUCCESS:
        return 3
    if state in states.READY_STATES:
        return 2
    # A task that was asked to abort stays so until it ends, whatever it reports meanwhile:
    # is_aborted() must not turn false because of a progress report, or of a late STARTED.
    if state == ABORTED:
        return 1
    return 0


def supersedes(new: StateMessage, old: StateMessage) -> bool:
    """Return whether the state *new* counts more than the state *old* of the same task.

    SUCCESS yields to nothing, another final state only to a final one that was published later
    or to SUCCESS; otherwise the state published last counts.
    """
    new_rank, old_rank = _rank(new.state), _rank(old.state)
    if new_rank != old_rank:
        return new_rank > old_rank
    if new_rank == _rank(states.SUCCESS):
        # Two runs of one task: the first result is the one that others may have read already.
        return new.published < old.published
    return new.published >= old.published


def fold(messages: Iterable[StateMessage]) -> Optional[StateMessage]:
    """Return the state that counts, or ``None`` for no messages.

    Parameters:
        messages: states of one task, in any order; of two that were published in the same
            microsecond and rank alike, the later in the order counts.
    """
    current: Optional[StateMessage] = None
    for message in messages:
        if current is None or supersedes(message, current):
            current = message
    return current


class PublishClock:
    """Microseconds since 1970 that never repeat or go back within the process.

    Two states that a process publishes one after the other must not tie, or swap when the
    system's clock is set back. Thread-safe.
    """

    def __init__(self) -> None:
        self._last = 0
        self.after_fork_in_child()

    def after_fork_in_child(self) -> None:
        """Let go of a lock that a thread of the parent may have held."""
        self._lock = threading.Lock()

    def now(self) -> int:
        """Return the present time, at least one microsecond later than the last one returned."""
        with self._lock:
            self._last = max(self._last + 1, time.time_ns() // 1000)
            return self._last


def _decompress_stream(decompressor: Any, body: bytes, limit: int) -> bytes:
    """Decompress with one of the standard library's decompressors, which all work alike."""
    data: bytes = decompressor.decompress(body, limit + 1)
    if len(data) <= limit and not decompressor.eof:
        raise ValueError("the compressed data ends too early")
    return data


def _decompress_brotli(body: bytes, limit: int) -> bytes:
    decompressor = importlib.import_module("brotli").Decompressor()
    pieces = []
    size = 0
    for at in range(0, len(body), BROTLI_PIECE):
        pieces.append(decompressor.process(body[at : at + BROTLI_PIECE]))
        size += len(pieces[-1])
        if size > limit:
            break
    else:
        if not decompressor.is_finished():
            raise ValueError("the compressed data ends too early")
    return b"".join(pieces)


def _decompress_zstd(body: bytes, limit: int) -> bytes:
    for name in ("compression.zstd", "backports.zstd"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        return _decompress_stream(module.ZstdDecompressor(), body, limit)
    # kombu before 5.6
    reader = importlib.import_module("zstandard").ZstdDecompressor().stream_reader(body)
    data: bytes = reader.read(limit + 1)
    return data


#: By content type, how to decompress at most so many bytes and one more: kombu's own functions
#: fill the memory with whatever comes.
_DECOMPRESS: Dict[str, Callable[[bytes, int], bytes]] = {
    "application/x-gzip": lambda body, limit: _decompress_stream(zlib.decompressobj(), body, limit),
    "application/x-bz2": lambda body, limit: _decompress_stream(bz2.BZ2Decompressor(), body, limit),
    "application/x-lzma": lambda body, limit: _decompress_stream(
        lzma.LZMADecompressor(memlimit=LZMA_MEMORY), body, limit
    ),
    "application/x-brotli": _decompress_brotli,
    "application/zstd": _decompress_zstd,
}


def decompress(body: bytes, compression: str, limit: int) -> bytes:
    """Return *body* decompressed.

    Parameters:
        compression: content type of one of kombu's compressions.
        limit: how many bytes it may have. Of a compression that an app has registered with kombu
            itself that can only be seen when it is done.

    Raises:
        ValueError: when it has more, or when nobody knows the compression.
        Exception: what the decompressor raises on damaged data.
    """
    function = _DECOMPRESS.get(compression)
    if function is not None:
        data = function(body, limit)
    elif compression in kombu_compression.encoders():
        data = kombu_compression.decompress(body, compression)
    else:
        raise ValueError(f"no such compression: {_short(compression)}")
    if len(data) > limit:
        raise ValueError(
            f"{len(body)} bytes decompress to more than {limit} (option max_decompressed_size)"
        )
    return data


class Codec:
    """Encodes and decodes metas by the app's serializer settings.

    Parameters:
        serializer: kombu's name of the serializer to write with.
        accept: content types that may be read.
        compression: kombu's name of the compression to write with, or ``None``.
        max_decompressed: bytes that a compressed body may have when it is decompressed.
    """

    def __init__(
        self,
        serializer: str,
        accept: Optional[Iterable[str]],
        compression: Optional[str] = None,
        max_decompressed: int = MAX_DECOMPRESSED,
    ) -> None:
        self.serializer = serializer
        self.accept = accept
        self.compression = compression
        self.max_decompressed = max_decompressed

    def encode(self, meta: Mapping[str, Any]) -> Tuple[str, str, Optional[str], bytes]:
        """Return *meta* as (content type, content encoding, compression, body).

        Raises:
            kombu.exceptions.EncodeError: when the serializer cannot encode it.
            ResultTooLarge: when it is to be compressed, and nobody would decompress so much.
        """
        content_type, content_encoding, payload = serialization.dumps(
            meta, serializer=self.serializer
        )
        compression = None
        if self.compression:
            if len(payload) > self.max_decompressed:
                raise errors.ResultTooLarge(
                    f"a result of {len(payload)} bytes cannot be stored compressed: readers "
                    f"decompress {self.max_decompressed} at most. Return less, or raise the "
                    "option max_decompressed_size everywhere."
                )
            payload, compression = kombu_compression.compress(payload, self.compression)
        if isinstance(payload, str):
            payload = payload.encode("utf-8")
        return content_type, content_encoding, compression, payload

    def decode(self, message: StateMessage) -> Dict[str, Any]:
        """Return the meta that *message* holds.

        Raises:
            kombu.exceptions.ContentDisallowed: when its content type is not accepted.
            ForeignMessage: when the body is damaged, or is no meta.
        """
        if message.decoded is not None:
            return dict(message.decoded)
        body = message.body
        try:
            if message.compression:
                body = decompress(body, message.compression, self.max_decompressed)
            _check_encoding(message.content_encoding)
            meta = serialization.loads(
                body,
                content_type=message.content_type,
                content_encoding=message.content_encoding,
                accept=self.accept,
            )
        except serialization.ContentDisallowed:
            raise
        except Exception as exc:
            # Whatever the serializer or the decompressor raises on a damaged body.
            raise errors.ForeignMessage(
                f"the {message.state} of {message.id!r} cannot be decoded: {exc!r:.300}"
            ) from exc
        if not isinstance(meta, dict) or "status" not in meta or "result" not in meta:
            # Of a pickle, repr() may be anybody's; and it is as long as the value.
            raise errors.ForeignMessage(
                f"the {message.state} of {message.id!r} decodes to no meta: {reprlib.repr(meta)}"
            )
        if message.kind == STATE and message.id:
            said = meta["status"], meta.get("task_id", message.id)
            if said != (message.state, message.id):
                raise errors.ForeignMessage(
                    f"the {message.state} of {message.id!r} says that it is the "
                    f"{_short(said[0])} of {_short(said[1])}"
                )
        return meta


def _check_encoding(name: str) -> None:
    """Refuse encodings that are no text: among Python's are some that decompress."""
    if name not in ("utf-8", "binary") and name.lower() not in serialization.SKIP_DECODE:
        with contextlib.suppress(UnicodeError):
            # A LookupError for what is no text encoding.
            b"x".decode(name)
