"""Publishing on one channel, and waiting for the broker's confirms.

:mod:`~celery_amqp_results.amqp.confirm_log` decides what the answers of the broker mean. This
module moves the bytes.
"""

from __future__ import annotations

import logging
import time
from typing import Callable, Iterable, List, NamedTuple, Optional

import amqp
import amqp.exceptions

from celery_amqp_results import errors
from celery_amqp_results.amqp import frames, nowait
from celery_amqp_results.amqp.confirm_log import ConfirmLog, Outgoing, Publication
from celery_amqp_results.amqp.failures import NO_QUEUE
from celery_amqp_results.amqp.link import Link
from celery_amqp_results.toolkit.retry import time_left

__all__ = ("ConfirmChannel", "LostInAlarm", "Patience", "QueueLength")

logger = logging.getLogger(__name__)

#: Seconds after which the connection counts as dead if the broker takes and confirms nothing. The
#: time in which it blocks publishers does not count.
CONFIRM_TIMEOUT = 30.0
#: Seconds after which it counts as dead although the broker confirms other messages. A shard of a
#: cluster may have lost the majority of its nodes; or the broker may have forgotten a confirm.
LONGEST_CONFIRM = 300.0


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


class ConfirmChannel:
    """A channel in confirm mode, and its unconfirmed publications.

    For each confirm, a classic queue of RabbitMQ 4 opens and closes a file. So *plain* messages go
    through a second channel without confirms. Now and then a request follows them there. Its answer
    says that the broker has routed them, after it has returned those without a queue.

    Not thread-safe.

    Parameters:
        in_alarm: whether an alarm of the broker may block it as soon as something is published.
        plain: whether there are plain messages. Where the connection has no room for another
            channel, they are confirmed like others.

    Raises:
        amqp.AMQPError, OSError: when the connection is lost, here and in all methods.
    """

    def __init__(self, link: Link, in_alarm: bool = False, plain: bool = False) -> None:
        self.link = link
        self.log = ConfirmLog()
        self._in_alarm = in_alarm
        self.channel = link.channel()
        # The broker never refuses this, so its answer is not worth a round trip.
        self.channel.confirm_select(nowait=True)
        self._asking: Optional[amqp.Channel] = None
        self._plain: Optional[amqp.Channel] = None
        if plain and link.has_room():
            self._plain = link.channel()
            self._plain.events["basic_return"].add(self._on_return)
            nowait.on_qos(self._plain, self.log.answered)
        nowait.on_qos(self.channel, lambda: self.log.copies_routed(time.monotonic()))
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
        publication.plain = publication.plain and self._plain is not None
        if publication.plain:
            assert self._plain is not None
            octets = self._frames(self._plain, message, *addresses)
        else:
            # Its caller waits for earlier messages too.
            self.ask_about_plain()
            octets = self._frames(self.channel, message, *addresses)
        self.log.sent(publication, time.monotonic())
        nowait.write(self.link.amqp, octets)

    def ask_about_plain(self) -> None:
        """Request an answer that follows all plain messages so far, without waiting for it."""
        if self._plain is not None and self.log.unasked:
            self.log.request_sent()
            nowait.qos(self._plain)

    def ask_about_copies(self) -> None:
        """Request an answer that follows all live copies so far, without waiting for it.

        It says that the broker has routed them, whether or not the queues confirm them.
        """
        self.log.copy_request_sent()
        nowait.qos(self.channel)

    def publish_copy(self, publication: Publication) -> None:
        """Publish the live copy of a message that the broker has confirmed."""
        message = publication.message
        assert message.pushed is not None
        octets = self._frames(self.channel, message, (*message.pushed, False))
        self.log.copy_sent(publication)
        nowait.write(self.link.amqp, octets)

    def _frames(
        self, channel: amqp.Channel, message: Outgoing, *addresses: frames.Address
    ) -> bytes:
        if not channel.is_open:
            raise amqp.exceptions.RecoverableConnectionError("the channel is closed")
        return frames.publish_frames(
            channel.channel_id,
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
            if not exc.reply_text.startswith(NO_QUEUE):
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
