"""Pages: many results in one message.

Taking one message out of a queue costs the same whether it holds one result or a thousand. A reader
therefore packs the loose results in a shard into pages. A page is searched as bytes for the digests
of the wanted ids, and only matching entries are decoded. This module does no I/O; ``docs/wire.md``
describes the format.

::

    magic      8 bytes   b"CARpage1"
    count      u32       number of entries
    index      count times: digest of the id (8 bytes), offset (u32), length (u32) of the entry
    entries    each a u32 with the length of its head, the head (a JSON object), the body

All integers are big-endian; offsets count from the start of the page.
"""

from __future__ import annotations

import array
import dataclasses
import functools
import hashlib
import json
import struct
import sys
from typing import (
    Callable,
    Collection,
    Dict,
    Iterable,
    Iterator,
    List,
    Optional,
    Set,
    Tuple,
    TypeVar,
    Union,
)

from celery_amqp_results import errors
from celery_amqp_results.protocol import expiry
from celery_amqp_results.protocol.message import STATE, StateMessage, checked
from celery_amqp_results.protocol.ranking import fold, is_final

__all__ = (
    "CONTENT_TYPE",
    "OVERHEAD",
    "PAGE",
    "Census",
    "Wanted",
    "decode",
    "digest",
    "digests",
    "encode",
    "expiration",
    "find",
    "number_of",
    "select",
)

_T = TypeVar("_T")

#: The property ``type`` of a page.
PAGE = "page"
CONTENT_TYPE = "application/x-celery-results-page"

_MAGIC = b"CARpage1"
#: About how many bytes an entry has besides its body.
OVERHEAD = 160

#: Searching a page for this many single ids takes about as long as going through its index.
MANY = 32

#: Bytes of loose states that a census keeps; of further states it keeps only the digests.
MAX_CENSUS_BYTES = 2 * 1024 * 1024

_COUNT = struct.Struct(">I")
_RECORD = struct.Struct(">8sII")
_HEADER = len(_MAGIC) + _COUNT.size
_DIGEST_SIZE = 8

#: Short names of a state's fields in the head of its entry, for all but the body.
_FIELDS = (
    ("i", "id"),
    ("s", "state"),
    ("p", "published"),
    ("t", "content_type"),
    ("e", "content_encoding"),
    ("c", "compression"),
    ("x", "expiration"),
    ("k", "kind"),
    ("q", "body_queue"),
    ("a", "amended"),
)
#: Fields left out of the head when they have this value.
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(StateMessage)}


def digest(message_id: str) -> bytes:
    """Return the eight bytes that stand for an id in the index of a page."""
    return hashlib.blake2b(
        message_id.encode("utf-8", "surrogatepass"), digest_size=_DIGEST_SIZE
    ).digest()


def number_of(message_id: str) -> int:
    """Return the digest of an id as a number, in the order of bytes of this machine."""
    return int.from_bytes(digest(message_id), sys.byteorder)


def encode(states: Iterable[StateMessage]) -> bytes:
    """Return a page that holds *states*, in that order."""
    entries: List[Tuple[bytes, bytes]] = []
    for state in states:
        fields: Dict[str, object] = {}
        for short, name in _FIELDS:
            value = getattr(state, name)
            if value != _DEFAULTS[name]:
                fields[short] = value
        # ASCII only: a lone surrogate in an id stays what it is.
        head = json.dumps(fields, separators=(",", ":")).encode("ascii")
        entries.append((digest(state.id), _COUNT.pack(len(head)) + head + state.body))
    offset = _HEADER + _RECORD.size * len(entries)
    index = []
    for key, entry in entries:
        index.append(_RECORD.pack(key, offset, len(entry)))
        offset += len(entry)
    return b"".join([_MAGIC, _COUNT.pack(len(entries)), *index, *(entry for _, entry in entries)])


#: Called with the error about a damaged entry that is left out.
OnDamage = Callable[[errors.ForeignMessage], None]


class Wanted:
    """Ids of tasks or groups to find in any number of pages."""

    def __init__(self, message_ids: Iterable[str]) -> None:
        self._ids = list(message_ids)

    @functools.cached_property
    def by_digest(self) -> Dict[bytes, Set[str]]:
        """The ids, by their digest; two may have the same one. Computed for the first page."""
        found: Dict[bytes, Set[str]] = {}
        for message_id in self._ids:
            found.setdefault(digest(message_id), set()).add(message_id)
        return found


def find(
    page: bytes, message_ids: Union[Wanted, Iterable[str]], on_damage: Optional[OnDamage] = None
) -> Iterator[StateMessage]:
    """Yield the states of *message_ids* in *page*, those of one id in the order of the page.

    Parameters:
        message_ids: a :class:`Wanted` if several pages are searched for the same ids.
        on_damage: called with each damaged entry; the others are found all the same.

    Raises:
        ForeignMessage: when the page is damaged, or an entry is and *on_damage* is not given.
    """
    wanted = message_ids if isinstance(message_ids, Wanted) else Wanted(message_ids)
    by_digest = wanted.by_digest
    matches = _matches(page, _index_end(page), by_digest)
    for key, state in _entries(page, matches, on_damage):
        if state.id in by_digest[key]:
            yield state


def _matches(page: bytes, end: int, wanted: Collection[bytes]) -> Iterator[int]:
    """Yield the positions of the digests *wanted* in the index of *page*."""
    if len(wanted) > MANY:
        # One pass over the index, for any number of digests.
        for at in range(_HEADER, end, _RECORD.size):
            if page[at : at + _DIGEST_SIZE] in wanted:
                yield at
        return
    for each in wanted:
        at = page.find(each, _HEADER, end)
        while at != -1:
            # The matching bytes may belong to two records.
            if (at - _HEADER) % _RECORD.size == 0:
                yield at
            at = page.find(each, at + 1, end)


def decode(page: bytes, on_damage: Optional[OnDamage] = None) -> List[StateMessage]:
    """Return all states in *page*.

    Parameters:
        on_damage: called with each damaged entry; the others are returned all the same.

    Raises:
        ForeignMessage: when the page is damaged, or an entry is and *on_damage* is not given.
    """
    everything = range(_HEADER, _index_end(page), _RECORD.size)
    return [state for _, state in _entries(page, everything, on_damage)]


def digests(page: bytes) -> Iterable[int]:
    """Return the digests of all ids in *page*, as numbers in the order of bytes of this machine.

    Raises:
        ForeignMessage: when the page is damaged.
    """
    index = array.array("Q")
    index.frombytes(page[_HEADER : _index_end(page)])
    # A record is twice as long as a digest, which comes first.
    return index[::2]


class Census:
    """The content of a whole shard, as a checkout has seen it.

    Attributes:
        loose: states of tasks, in the order of the shard.
        digests: of the ids of everything else, see :func:`number_of`.
    """

    def __init__(self) -> None:
        self.loose: List[StateMessage] = []
        self.digests: Set[int] = set()
        self._bytes = 0

    def add(self, state: StateMessage) -> None:
        """Count a loose message."""
        if state.kind != STATE:
            return
        self._bytes += len(state.body) + OVERHEAD
        if self._bytes > MAX_CENSUS_BYTES:
            self.digests.add(number_of(state.id))
        else:
            self.loose.append(state)

    def add_page(self, page: bytes) -> None:
        """Count the entries of a page.

        Raises:
            ForeignMessage: when the page is damaged.
        """
        self.digests.update(digests(page))


def _entries(
    page: bytes, positions: Iterable[int], on_damage: Optional[OnDamage]
) -> Iterator[Tuple[bytes, StateMessage]]:
    """Yield digest and state of the entries whose records are at *positions* in the index."""
    budget = len(page)
    for at in positions:
        key, offset, length = _RECORD.unpack_from(page, at)
        budget -= length
        if budget < 0:
            # A small page could otherwise fill the memory with copies of one entry.
            raise errors.ForeignMessage(f"entries of a page of {len(page)} bytes overlap")
        try:
            state = _entry(page, offset, length)
        except errors.ForeignMessage as exc:
            if on_damage is None:
                raise
            on_damage(exc)
        else:
            yield key, state


def _index_end(page: bytes) -> int:
    if page[: len(_MAGIC)] != _MAGIC or len(page) < _HEADER:
        raise errors.ForeignMessage(f"a page does not begin as one, but with {page[:16]!r}")
    (count,) = _COUNT.unpack_from(page, len(_MAGIC))
    end = _HEADER + _RECORD.size * count
    if end > len(page):
        raise errors.ForeignMessage(f"a page of {len(page)} bytes says that it has {count} entries")
    return int(end)


def _entry(page: bytes, offset: int, length: int) -> StateMessage:
    try:
        end = offset + length
        if end > len(page):
            raise ValueError(f"an entry ends at {end} of {len(page)} bytes")
        (head_length,) = _COUNT.unpack_from(page, offset)
        start = offset + _COUNT.size
        body = start + head_length
        if body > end:
            raise ValueError(f"an entry of {length} bytes has a head of {head_length} bytes")
        fields = json.loads(page[start:body])
        values = {name: fields[short] for short, name in _FIELDS if short in fields}
        return checked(StateMessage(body=page[body:end], **values))
    except errors.ForeignMessage:
        raise
    except (ValueError, TypeError, KeyError, RecursionError, struct.error) as exc:
        raise errors.ForeignMessage(f"an entry of a page is damaged: {exc!r:.300}") from exc


def select(
    states: Iterable[Tuple[_T, StateMessage]], now: int
) -> Tuple[List[Tuple[_T, StateMessage]], List[Tuple[_T, StateMessage]]]:
    """Divide *states* into those worth keeping in a page and those that may be dropped.

    For a task that has ended only the current state is kept, unless it has expired. For a task that
    goes on only expired states are dropped, since a watcher may want its history.

    Parameters:
        states: states of any number of tasks and groups, each with where it is kept; for each task,
            all states in the shard.
        now: microseconds since 1970.

    Returns:
        The final states and groups to keep, and the states to drop. States of tasks that go on
        are in neither, unless they have expired.
    """
    by_id: Dict[Tuple[str, str], List[Tuple[_T, StateMessage]]] = {}
    for placed in states:
        by_id.setdefault((placed[1].kind, placed[1].id), []).append(placed)
    keep: List[Tuple[_T, StateMessage]] = []
    drop: List[Tuple[_T, StateMessage]] = []
    for (kind, _), found in by_id.items():
        current = fold([state for _, state in found])
        if current is None or not (kind != STATE or is_final(current.state)):
            drop.extend(placed for placed in found if placed[1].expired(now))
            continue
        for placed in found:
            # Only one of two equal copies is kept.
            if placed[1] is current and not current.expired(now):
                keep.append(placed)
            else:
                drop.append(placed)
    return keep, drop


def expiration(states: Iterable[StateMessage], now: int) -> Optional[int]:
    """Return the milliseconds after which a page of *states* may be dropped, ``None`` for never."""
    latest = 0
    for state in states:
        if state.expiration is None:
            return None
        latest = max(latest, state.published + state.expiration * 1000)
    # The latest of its entries decides: each entry's own expiration is checked when it is read.
    return min(max(1, -(-(latest - now) // 1000)), expiry.MAX_MILLISECONDS)
