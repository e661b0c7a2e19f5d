"""Decides which messages on a connection the broker has confirmed. Pure: no I/O, no clock.

A :class:`Publication` is the handle of one message. A :class:`ConfirmLog` decides what each answer
of the broker means for them.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
from typing import Deque, Dict, Iterator, List, Mapping, Optional, Tuple

__all__ = ("ConfirmLog", "Outgoing", "Publication", "Status")

#: The most live copies with outstanding confirms. A stuck third-party queue that is bound to the
#: exchange confirms none.
MAX_COPIES = 200


@dataclasses.dataclass(frozen=True)
class Outgoing:
    """A message to publish."""

    #: Name of the queue that keeps it. The message comes back if there is no such queue.
    queue: str
    #: AMQP properties, by py-amqp's names.
    properties: Mapping[str, object]
    body: bytes
    #: Number of the shard whose queue that is, which is declared if the message comes back;
    #: ``None`` for no shard.
    shard: Optional[int] = None
    #: A description, for error messages.
    what: str = "a message"
    #: Exchange and routing key of the live copy, which need not reach any queue.
    pushed: Optional[Tuple[str, str]] = None


class Status(enum.Enum):
    """The outcome of a publication."""

    UNSENT = "unsent"
    SENT = "sent"
    #: The broker has it.
    CONFIRMED = "confirmed"
    #: There is no such queue.
    RETURNED = "returned"
    #: The queue does not take it (nack).
    REFUSED = "refused"
    #: The connection was lost before the broker answered.
    LOST = "lost"


class Publication:
    """One message being published."""

    __slots__ = (
        "copying",
        "failure",
        "homeless",
        "message",
        "plain",
        "push",
        "refusals",
        "returned",
        "routed_at",
        "sent",
        "status",
        "waited",
    )

    def __init__(self, message: Outgoing) -> None:
        self.message = message
        #: Whether a caller waits for its confirm.
        self.waited = True
        #: Whether it is published without a confirm, see :class:`ConfirmChannel`.
        self.plain = False
        self.status = Status.UNSENT
        #: Whether the live copy is sent together with the message. Otherwise it follows when the
        #: message is confirmed.
        self.push = True
        #: Whether the live copy is unconfirmed.
        self.copying = False
        #: When an answer said that the broker has routed the live copy (``time.monotonic``);
        #: ``None`` before that, and without a request.
        self.routed_at: Optional[float] = None
        #: Whether the message came back; its confirm comes after that.
        self.returned = False
        #: Whether it has come back once, since its queue was missing.
        self.homeless = False
        #: When it was sent (``time.monotonic``).
        self.sent = 0.0
        #: The error that the connection was lost with.
        self.failure: Optional[BaseException] = None
        #: How often a queue has refused it.
        self.refusals = 0

    @property
    def settled(self) -> bool:
        """Whether the broker has given its last answer for the durable copy."""
        return self.status is not Status.SENT

    @property
    def routed(self) -> bool:
        """Whether the broker has routed the live copy, or has none to route."""
        return not self.copying or self.routed_at is not None


class ConfirmLog:
    """Tracks the messages published on one connection, and the broker's answers.

    Delivery tags count from 1. A message has one, and its live copy the next one. Plain messages
    have none: the answer to a request stands for all of them that were sent before it.
    """

    def __init__(self) -> None:
        self._tag = 0
        # All in the order of publishing.
        self._kept: Dict[int, Publication] = {}
        self._copies: Dict[int, Publication] = {}
        self._plain: Dict[int, Publication] = {}
        self._last_plain = self._last_asked = 0
        #: For each request without an answer, the last plain message before it.
        self._requests: Deque[int] = collections.deque()
        #: For each request about live copies without an answer, the last tag before it.
        self._copy_requests: Deque[int] = collections.deque()
        #: Messages that were returned or refused and that no caller waits for.
        self.strays: List[Publication] = []
        #: How often the broker has confirmed or refused something.
        self.answers = 0

    def __len__(self) -> int:
        return len(self._kept) + len(self._plain)

    def __iter__(self) -> Iterator[Publication]:
        # Copied in one step each: another thread may take in confirms meanwhile.
        return iter([*list(self._kept.values()), *list(self._plain.values())])

    @property
    def busy(self) -> bool:
        """Whether anything that matters is unconfirmed, or must be published again."""
        copies = any(publication.waited for publication in list(self._copies.values()))
        return bool(self._kept or self._plain or copies or self.strays)

    @property
    def unasked(self) -> bool:
        """Whether plain messages were sent since the last request."""
        return self._last_plain > self._last_asked

    def unwaited(self) -> List[Publication]:
        """Return the unconfirmed publications that no caller waits for."""
        return [publication for publication in self if not publication.waited]

    def has_late_copy(self, before: float) -> bool:
        """Return whether a live copy that was routed before that time is still unconfirmed."""
        oldest = next(iter(self._copies.values()), None)
        return oldest is not None and oldest.routed_at is not None and oldest.routed_at < before

    def sent(self, publication: Publication, now: float) -> None:
        """Note that *publication* is being sent, with its live copy if it has one."""
        publication.status, publication.returned, publication.failure = Status.SENT, False, None
        publication.sent = now
        publication.copying = False
        if publication.plain:
            self._last_plain += 1
            self._plain[self._last_plain] = publication
            return
        self._tag += 1
        self._kept[self._tag] = publication
        if publication.push and publication.message.pushed is not None:
            self.copy_sent(publication)

    def copy_sent(self, publication: Publication) -> None:
        """Note that the live copy of *publication* is being sent."""
        publication.push = publication.copying = True
        publication.routed_at = None
        self._tag += 1
        self._copies[self._tag] = publication
        if len(self._copies) > MAX_COPIES:
            self._copies.pop(next(iter(self._copies))).copying = False

    def acknowledged(self, tag: int, multiple: bool) -> None:
        """Note that the broker has confirmed *tag*, or everything up to it."""
        self.answers += 1
        for publication in _taken(self._kept, tag, multiple):
            self._settle(publication, Status.RETURNED if publication.returned else Status.CONFIRMED)
        for publication in _taken(self._copies, tag, multiple):
            publication.copying = False

    def request_sent(self) -> None:
        """Note that a request follows all plain messages so far."""
        self._last_asked = self._last_plain
        self._requests.append(self._last_plain)

    def answered(self) -> None:
        """Note the answer to the oldest request: the broker has routed what was sent before it."""
        self.answers += 1
        for publication in _taken(self._plain, self._requests.popleft(), True):
            self._settle(publication, Status.RETURNED if publication.returned else Status.CONFIRMED)

    def copy_request_sent(self) -> None:
        """Note that a request follows all live copies so far."""
        self._copy_requests.append(self._tag)

    def copies_routed(self, now: float) -> None:
        """Note the answer to the oldest request about live copies."""
        self.answers += 1
        last = self._copy_requests.popleft()
        for tag, publication in self._copies.items():
            if tag <= last and publication.routed_at is None:
                publication.routed_at = now

    def refused(self, tag: int, multiple: bool) -> int:
        """Note that the broker refused *tag*, or everything up to it.

        Returns the number of live copies among them. A queue that is bound to the exchange did not
        take them; the durable copies are not affected.
        """
        for publication in _taken(self._kept, tag, multiple):
            publication.refusals += 1
            self._settle(publication, Status.REFUSED)
        copies = _taken(self._copies, tag, multiple)
        for publication in copies:
            publication.copying = False
        return len(copies)

    def _settle(self, publication: Publication, status: Status) -> None:
        publication.status = status
        if not publication.waited and status is not Status.CONFIRMED:
            self.strays.append(publication)

    def came_back(self, queue: str, properties: Mapping[str, object], body: bytes) -> None:
        """Note that a message was returned: there is no *queue*. Its confirm follows.

        An earlier message to the same queue may still be unconfirmed without having come back: the
        queue existed then. So the message itself must be identified.
        """
        candidates = [
            publication
            for publication in self
            if publication.message.queue == queue and not publication.returned
        ]
        identity = _identity(properties)
        alike = [p for p in candidates if p.message.body == body]
        same = [p for p in alike if _identity(p.message.properties) == identity]
        # Headers that are not UTF-8 come back as something that cannot be compared.
        for publication in (same or alike or candidates)[:1]:
            publication.returned = publication.homeless = True

    def lost(self, failure: BaseException) -> List[Publication]:
        """Note that the connection was lost; return all publications without an answer."""
        lost = list(self)
        # The live copy of a kept state may be lost. A caller that still waits for it sends both
        # again.
        lost += [p for p in self._copies.values() if p.waited and p.status is Status.CONFIRMED]
        for publication in lost:
            publication.status, publication.failure = Status.LOST, failure
        for publication in self._copies.values():
            publication.copying = False
        self._kept, self._copies, self._plain = {}, {}, {}
        self._requests.clear()
        self._copy_requests.clear()
        self._last_asked = self._last_plain
        return lost


def _taken(unsettled: Dict[int, Publication], tag: int, multiple: bool) -> List[Publication]:
    """Remove the publications that *tag* stands for from *unsettled*, and return them."""
    if not multiple:
        publication = unsettled.pop(tag, None)
        return [] if publication is None else [publication]
    # Keys are in ascending order.
    settled = []
    for key in unsettled:
        if key > tag:
            break
        settled.append(key)
    return [unsettled.pop(key) for key in settled]


def _identity(properties: Mapping[str, object]) -> Tuple[object, ...]:
    """Return the fields that distinguish a message from others in the same queue."""
    headers = properties.get("application_headers") or {}
    return properties.get("correlation_id"), properties.get("message_id"), headers
