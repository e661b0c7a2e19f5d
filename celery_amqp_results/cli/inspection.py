"""Inspecting the broker: the lengths of the shards, and the contents of some of them."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Set, Tuple

import amqp
from amqp import exceptions as amqp_errors

from celery_amqp_results import errors
from celery_amqp_results.amqp.failures import NO_QUEUE
from celery_amqp_results.amqp.link import Link
from celery_amqp_results.cli import management
from celery_amqp_results.cli.common import Exit, Failed, Session
from celery_amqp_results.protocol import page
from celery_amqp_results.protocol.message import GROUP, MARK, StateMessage
from celery_amqp_results.protocol.ranking import is_final
from celery_amqp_results.store import marks as tracking
from celery_amqp_results.store.checkout import Checkout, limits_for

__all__ = ("Broker", "Contents")

#: No heartbeats: the user may be asked a question while the connection is open.
HEARTBEAT = 0.0

#: By default shards are read until this number of messages, and this number of shards, is reached.
ENOUGH = 2000
FEWEST = 8

#: Reading large results stops after this many bodies or bytes.
MAX_BODIES = 16
MAX_BODY_BYTES = 16 * 2**20


@dataclasses.dataclass
class Contents:
    """The contents of some shards."""

    #: Shards that were read, and messages in them.
    shards: int = 0
    messages: int = 0
    pages: int = 0
    #: Tasks that have ended, other tasks, and groups.
    results: int = 0
    running: int = 0
    groups: int = 0
    foreign: int = 0
    bytes: int = 0
    #: The separate queues of large results.
    body_queues: Set[str] = dataclasses.field(default_factory=set)
    #: When the oldest state was published, in seconds since 1970.
    oldest: Optional[float] = None
    #: How far ahead of this clock states were published, in seconds.
    ahead: float = 0.0
    #: States that never expire.
    everlasting: int = 0
    #: With ``track_sent``: tasks that were sent and have no state, and when the oldest of them was
    #: sent, in seconds since 1970.
    sent: int = 0
    sent_since: Optional[float] = None
    #: In the shard that is being read: whether each task has ended, and its last mark.
    _ended: Dict[str, bool] = dataclasses.field(default_factory=dict, repr=False)
    _marks: Dict[str, StateMessage] = dataclasses.field(default_factory=dict, repr=False)

    def take(self, message: amqp.Message) -> None:
        """Count a message."""
        now = time.time()
        self.messages += 1
        self.bytes += len(message.body)
        try:
            if message.properties.get("type") == page.PAGE:
                self.pages += 1
                found = page.decode(message.body)
            else:
                found = [StateMessage.from_properties(message.properties, message.body)]
        except errors.ForeignMessage:
            self.foreign += 1
            return
        for state in found:
            if state.expired(int(now * 1e6)):
                continue
            if state.kind == MARK:
                last = self._marks.get(state.id)
                if last is None or last.published < state.published:
                    self._marks[state.id] = state
                continue
            if state.body_queue is not None:
                self.body_queues.add(state.body_queue)
            if state.kind == GROUP:
                self.groups += 1
            else:
                self._ended[state.id] = self._ended.get(state.id, False) or is_final(state.state)
            if state.expiration is None:
                self.everlasting += 1
            if state.published:
                published = state.published / 1e6
                self.oldest = published if self.oldest is None else min(self.oldest, published)
                self.ahead = max(self.ahead, published - now)

    def finish(self) -> None:
        """Count the tasks of a shard after reading it."""
        self.shards += 1
        ended = sum(self._ended.values())
        self.results += ended
        self.running += len(self._ended) - ended
        for task_id, mark in self._marks.items():
            if mark.state == tracking.SENT and task_id not in self._ended:
                self.sent += 1
                since = mark.published / 1e6
                self.sent_since = min(since, self.sent_since or since)
        self._ended.clear()
        self._marks.clear()


class Broker:
    """A connection for inspecting the results' broker. Closed by ``with``."""

    def __init__(self, session: Session) -> None:
        self.session = session
        layout = session.shared_layout()
        self.topology = session.backend.config.topology
        self.connector = layout.connector
        self.link: Link = self.connector.open(HEARTBEAT)
        self._channel: Any = None

    def __enter__(self) -> Broker:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.link.close()

    @property
    def channel(self) -> Any:
        """A channel; a new one after the broker has closed the last."""
        if self._channel is None or not self._channel.is_open:
            self._channel = self.link.channel()
        return self._channel

    @property
    def properties(self) -> Dict[str, Any]:
        """The properties that the broker announces."""
        return dict(self.link.amqp.server_properties)

    @property
    def channel_max(self) -> int:
        """The most channels of a connection; 0 for no limit."""
        return int(self.link.amqp.channel_max)

    def lengths(self) -> Dict[int, int]:
        """Return the numbers of messages in the existing shards.

        Raises:
            Failed: when the permission is missing.
        """
        topology = self.topology
        found = {n: self.count(topology.shard_queue_name(n)) for n in range(topology.shards)}
        return {shard: counts[0] for shard, counts in found.items() if counts is not None}

    def count(self, queue: str) -> Optional[Tuple[int, int]]:
        """Return the numbers of messages and consumers of a queue, or ``None`` if it is missing.

        Raises:
            Failed: when the permission is missing, or the queue's node is down.
        """
        try:
            found = self.channel.queue_declare(queue, passive=True)
            return int(found.message_count), int(found.consumer_count)
        except amqp_errors.NotFound as exc:
            if exc.reply_text.startswith(NO_QUEUE):
                return None
            raise Failed(
                f"the queue {queue!r} is not available now: {exc}", Exit.UNAVAILABLE
            ) from exc
        except amqp_errors.AccessRefused as exc:
            raise Failed(
                f"the broker refuses to tell about the queue {queue!r}: {exc}", Exit.UNAVAILABLE
            ) from exc

    def exists(self, exchange: str) -> Optional[bool]:
        """Return whether an exchange exists, or ``None`` without the permission to see it."""
        try:
            self.channel.exchange_declare(exchange, "direct", passive=True)
        except amqp_errors.NotFound:
            return False
        except amqp_errors.AccessRefused:
            return None
        return True

    def read(self, shards: Iterable[int]) -> Contents:
        """Read shards without removing anything; each is locked while it is read.

        Raises:
            Failed: when a shard could not be read within ``lookup_timeout``.
        """
        contents = Contents()
        for shard in shards:
            self._check_out(self.topology.shard_queue_name(shard), contents.take)
            contents.finish()
        return contents

    def body_bytes(self, queues: Iterable[str]) -> Optional[int]:
        """Return the total size of large results in bytes, estimated if there are many.

        Returns:
            ``None`` without the permission to read them.

        Raises:
            Failed: when a body could not be read within ``lookup_timeout``.
        """
        names = sorted(queues)
        sizes: List[int] = []
        read = 0
        for read, name in enumerate(names, 1):
            try:
                self._check_out(name, lambda message: sizes.append(len(message.body)))
            except amqp_errors.AccessRefused:
                return None
            if read >= MAX_BODIES or sum(sizes) >= MAX_BODY_BYTES:
                break
        return round(sum(sizes) * len(names) / read) if read else 0

    def _check_out(self, queue: str, take: Callable[[amqp.Message], None]) -> None:
        """Pass each message of a queue to *take*, and requeue all of them."""
        seconds = self.session.backend.options.lookup_timeout
        end = time.monotonic() + seconds
        limits = limits_for(self.topology.queue_type, seconds)
        checkout = Checkout(self.link, queue, take, limits)
        if not checkout.wait(end):
            raise Failed(
                f"queue {queue!r} could not be read within {seconds:g} s (lookup_timeout): "
                "another reader holds it, it is very long, or an alarm blocks publishers",
                Exit.UNAVAILABLE,
            )
        checkout.close(wait=True)

    def management(self) -> Optional[management.Management]:
        """Return the management API, or ``None`` if a guessed address does not answer.

        Raises:
            Failed: when the address is given and does not answer.
        """
        session = self.session
        try:
            return management.find(
                session.backend.config.broker.place,
                session.management_url,
                session.guess_management,
            )
        except management.ManagementError as exc:
            raise Failed(str(exc), Exit.UNAVAILABLE) from exc


def choose(lengths: Mapping[int, int], count: Optional[int]) -> List[int]:
    """Return the shards to read.

    Parameters:
        lengths: the messages in each shard.
        count: how many shards; ``None`` for as many as have :data:`ENOUGH` messages, and at least
            :data:`FEWEST`.
    """
    filled = sorted(shard for shard, length in lengths.items() if length)
    if count is None:
        total = sum(lengths.values())
        count = max(FEWEST, math.ceil(len(filled) * min(1.0, ENOUGH / total))) if total else 0
    return spread(filled, count)


def spread(shards: List[int], count: int) -> List[int]:
    """Return *count* of *shards*, spread evenly."""
    if count >= len(shards):
        return shards
    return [shards[i * len(shards) // count] for i in range(count)]
