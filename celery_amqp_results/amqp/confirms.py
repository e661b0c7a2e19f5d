"""Publishing on one channel, and tracking which messages the broker has confirmed.

A :class:`Publication` is the handle of one message. A :class:`ConfirmLog` decides what each answer
of the broker means for them; it does no I/O and has no clock. A :class:`ConfirmChannel` moves the
bytes.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
import time
from typing import Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Tuple

import amqp
import amqp.exceptions

from celery_amqp_results import errors
from celery_amqp_results.amqp import frames, nowait
from celery_amqp_results.amqp.link import Link
from celery_amqp_results.toolkit.retry import time_left

__all__ = (
    "ConfirmChannel",
    "ConfirmLog",
    "LostInAlarm",
    "Outgoing",
    "Patience",
    "Publication",
    "QueueLength",
    "Status",
)

logger = logging.getLogger(__name__)

#: Seconds after which the connection counts as dead if the broker takes and confirms nothing. The
#: time in which it blocks publishers does not count.
CONFIRM_TIMEOUT = 30.0
#: Seconds after which it counts as dead although the broker confirms other messages. A shard of a
#: cluster may have lost the majority of its nodes; or the broker may have forgotten a confirm.
LONGEST_CONFIRM = 300.0

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


class LostInAlarm(errors.NotConfirmed):
    """The connection was lost while an alarm of the broker blocked it. That is no failed try."""


class Patience:
    """Decides when a connection counts as dead on which a confirm does not come. Has no clock.

    Parameters:
        now: the time (``time.monotonic``), here and in the methods.
    """

    def __init__(self, now: float) -> None:
        self._began = self._latest = now
        self._progress = 0

    def is_over(self, now: float, blocked: bool, progress: int) -> bool:
        """Return whether the connection counts as dead.

        Parameters:
            blocked: whether the broker blocks publishers.
            progress: a number that changes while the broker takes or confirms something.
        """
        if blocked:
            self._began = self._latest = now
        elif progress != self._progress:
            self._progress, self._latest = progress, now
        return now - self._latest > CONFIRM_TIMEOUT or now - self._began > LONGEST_CONFIRM


class QueueLength(NamedTuple):
    """The length of a queue, as the broker reports it."""

    #: Messages ready for delivery.
    messages: int
    #: Consumers; with a single active consumer, the waiting ones may not be counted.
    consumers: int


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
        "push",
        "refusals",
        "returned",
        "sent",
        "status",
        "waited",
    )

    def __init__(self, message: Outgoing) -> None:
        self.message = message
        #: Whether a caller waits for its confirm.
        self.waited = True
        self.status = Status.UNSENT
        #: Whether the live copy is sent together with the message. Otherwise it follows when the
        #: message is confirmed.
        self.push = True
        #: Whether the live copy is unconfirmed.
        self.copying = False
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


class ConfirmLog:
    """Tracks the messages published on one channel, and the broker's answers.

    Delivery tags count from 1. A message has one, and its live copy the next one.
    """

    def __init__(self) -> None:
        self._tag = 0
        # Both in the order of publishing.
        self._kept: Dict[int, Publication] = {}
        self._copies: Dict[int, Publication] = {}
        #: Messages that were returned or refused and that no caller waits for.
        self.strays: List[Publication] = []
        #: How often the broker has confirmed or refused something.
        self.answers = 0

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Publication]:
        return iter(list(self._kept.values()))

    @property
    def busy(self) -> bool:
        """Whether anything that matters is unconfirmed, or must be published again."""
        copies = any(publication.waited for publication in list(self._copies.values()))
        return bool(self._kept or copies or self.strays)

    def unwaited(self) -> List[Publication]:
        """Return the unconfirmed publications that no caller waits for."""
        # Copied in one step: another thread may take in confirms meanwhile.
        return [publication for publication in list(self._kept.values()) if not publication.waited]

    def has_late_copy(self, before: float) -> bool:
        """Return whether a live copy sent before that time is still unconfirmed."""
        oldest = next(iter(self._copies.values()), None)
        return oldest is not None and oldest.sent < before

    def sent(self, publication: Publication, now: float) -> None:
        """Note that *publication* is being sent, with its live copy if it has one."""
        self._tag += 1
        self._kept[self._tag] = publication
        publication.status, publication.returned, publication.failure = Status.SENT, False, None
        publication.sent = now
        publication.copying = False
        if publication.push and publication.message.pushed is not None:
            self.copy_sent(publication)

    def copy_sent(self, publication: Publication) -> None:
        """Note that the live copy of *publication* is being sent."""
        publication.push = publication.copying = True
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
            for publication in self._kept.values()
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
        lost = list(self._kept.values())
        # The live copy of a kept state may be lost. A caller that still waits for it sends both
        # again.
        lost += [p for p in self._copies.values() if p.waited and p.status is Status.CONFIRMED]
        for publication in lost:
            publication.status, publication.failure = Status.LOST, failure
        for publication in self._copies.values():
            publication.copying = False
        self._kept, self._copies = {}, {}
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


class ConfirmChannel:
    """A channel in confirm mode, and its unconfirmed publications.

    Not thread-safe.

    Parameters:
        in_alarm: whether an alarm of the broker may block it as soon as something is published.

    Raises:
        amqp.AMQPError, OSError: when the connection is lost, here and in all methods.
    """

    def __init__(self, link: Link, in_alarm: bool = False) -> None:
        self.link = link
        self.log = ConfirmLog()
        self._in_alarm = in_alarm
        self.channel = link.channel()
        # The broker never refuses this, so its answer is not worth a round trip.
        self.channel.confirm_select(nowait=True)
        self._asking: Optional[amqp.Channel] = None
        self.channel.events["basic_ack"].add(self.log.acknowledged)
        self.channel.events["basic_nack"].add(self._on_nack)
        self.channel.events["basic_return"].add(self._on_return)

    @property
    def mute(self) -> bool:
        """Whether the broker may answer no request before an alarm ends."""
        doubtful = self._in_alarm and len(self.log) > 0 and not self.log.answers
        return bool(self.link.blocked) or doubtful

    @property
    def progress(self) -> int:
        """A number that grows while the broker takes messages or answers."""
        return self.log.answers + self.link.bytes_sent

    def publish(self, publication: Publication) -> None:
        """Publish a message, then its live copy; do not wait for confirms.

        The order matters: a reader that binds too late for the live copy finds the durable copy.
        Both are written at once. If the connection is lost between them, a reader learns of the
        state at its next look-up.
        """
        message = publication.message
        addresses: List[frames.Address] = [("", message.queue, True)]
        if publication.push and message.pushed is not None:
            addresses.append((*message.pushed, False))
        octets = self._frames(message, *addresses)
        self.log.sent(publication, time.monotonic())
        nowait.write(self.link.amqp, octets)

    def publish_copy(self, publication: Publication) -> None:
        """Publish the live copy of a message that the broker has confirmed."""
        message = publication.message
        assert message.pushed is not None
        octets = self._frames(message, (*message.pushed, False))
        self.log.copy_sent(publication)
        nowait.write(self.link.amqp, octets)

    def _frames(self, message: Outgoing, *addresses: frames.Address) -> bytes:
        if not self.channel.is_open:
            raise amqp.exceptions.RecoverableConnectionError("the channel is closed")
        return frames.publish_frames(
            self.channel.channel_id,
            self.link.amqp.frame_max,
            message.properties,
            message.body,
            *addresses,
        )

    def _on_nack(self, tag: int, multiple: bool) -> None:
        if self.log.refused(tag, multiple):
            # A full queue, or the inbox of a process whose node is cut off.
            logger.info("a queue bound to the exchange refuses a state, which is kept all the same")

    def _on_return(
        self, exc: Exception, exchange: str, routing_key: str, message: amqp.Message
    ) -> None:
        self.log.came_back(routing_key, message.properties, message.body)

    def wait(self, publications: Iterable[Publication], deadline: Optional[float] = None) -> None:
        """Wait until all of *publications* are settled.

        For a caller that uses the connection exclusively.

        Parameters and errors are those of :func:`wait_for_answers`.
        """
        waiting = list(publications)

        def answered() -> bool:
            nonlocal waiting
            waiting = [publication for publication in waiting if not publication.settled]
            return not waiting

        wait_for_answers(self.link, answered, self.take_in, lambda: self.progress, deadline)

    def asking(self) -> amqp.Channel:
        """Return a channel for requests that the broker may refuse by closing it.

        py-amqp opens it again then.
        """
        if self._asking is None:
            self._asking = self.link.channel()
        return self._asking

    def length(self, queue: str) -> Optional[QueueLength]:
        """Return the present length of *queue*, or ``None`` if it does not exist."""
        try:
            found = self.asking().queue_declare(queue, passive=True)
        except amqp.exceptions.NotFound as exc:
            # py-amqp has opened the channel again.
            if not exc.reply_text.startswith("NOT_FOUND - no queue "):
                raise
            return None
        return QueueLength(found.message_count, found.consumer_count)

    def take_in(self) -> None:
        """Handle what the broker has sent, without waiting for more."""
        if self.link.readable():
            self.take_in_readable()

    def take_in_readable(self) -> None:
        """Handle what the broker has sent on a connection that is readable.

        The last message may be left on the socket, where the next wait finds it.
        """
        link, log = self.link, self.log
        while True:
            confirmed = False
            for tag, multiple in link.acks(self.channel.channel_id):
                log.acknowledged(tag, multiple)
                confirmed = True
            if not confirmed:
                link.drain(0.0)
            # Mostly that was all, and asking the socket again would cost a system call.
            if not link.buffered():
                return


def wait_for_answers(
    link: Link,
    answered: Callable[[], bool],
    take_in: Callable[[], object],
    progress: Callable[[], int],
    deadline: Optional[float] = None,
) -> None:
    """Read *link* until *answered*; also through an alarm, in which py-amqp would give up.

    Parameters:
        take_in: handles what the broker has sent.
        progress: see :meth:`Patience.is_over`.
        deadline: time (``time.monotonic``) at which to give up, even while the broker blocks
            publishers; with ``None`` the wait ends when the connection counts as dead.

    Raises:
        NotConfirmed: when the broker has not answered in time.
    """
    started = time.monotonic()
    patience = Patience(started)
    while not answered():
        if link.ready(time_left(deadline, 1.0)):
            link.flush()
            take_in()
            if answered():
                return
        link.tick()
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            why = ""
            if link.blocked:
                why = f": the broker blocks publishers ({link.blocked}: a memory or disk alarm)"
            raise errors.NotConfirmed(
                f"no confirm from the broker within {now - started:.1f} s{why}"
            )
        if patience.is_over(now, bool(link.blocked), progress()):
            raise no_confirm()


def no_confirm() -> errors.NotConfirmed:
    """Return the error for a connection on which no confirm comes."""
    return errors.NotConfirmed(f"no confirm from the broker within {CONFIRM_TIMEOUT:g} s")


def _identity(properties: Mapping[str, object]) -> Tuple[object, ...]:
    """Return the fields that distinguish a message from others in the same queue."""
    headers = properties.get("application_headers") or {}
    return properties.get("correlation_id"), properties.get("message_id"), headers
