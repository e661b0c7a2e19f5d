"""Publishing on one channel, and knowing what of it the broker has taken over."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import amqp
import amqp.exceptions

from celery_amqp_results import errors
from celery_amqp_results.amqp import connections, frames

__all__ = ("ConfirmChannel", "Outgoing", "QueueLength")

logger = logging.getLogger(__name__)

#: How long the broker may take to confirm before the connection is taken for dead, in seconds.
#: Not counted while the broker says that it blocks publishers.
CONFIRM_TIMEOUT = 30.0


@dataclasses.dataclass(frozen=True)
class Outgoing:
    """A message to publish."""

    #: Name of the queue that keeps it. It comes back where that queue is not there.
    queue: str
    #: AMQP properties, by py-amqp's names.
    properties: Mapping[str, Any]
    body: bytes
    #: Number of the shard whose queue that is, which is declared first; ``None`` for no shard.
    shard: Optional[int] = None
    #: What it is, for messages of errors.
    what: str = "a message"
    #: Exchange and routing key that a copy is published to, for whoever listens there. Nobody waits
    #: for its confirm: that nobody listens, or that somebody's queue is stuck, is no error.
    pushed: Optional[Tuple[str, str]] = None


class QueueLength(NamedTuple):
    """What the broker says of a queue."""

    #: Messages that nobody holds.
    messages: int
    #: Readers; with a single active consumer, those that wait in line may not be counted.
    consumers: int


class ConfirmChannel:
    """A channel in confirm mode, and what is unconfirmed on it.

    Parameters:
        link: an open connection, which the caller is alone with.

    Raises:
        amqp.AMQPError, OSError: when the connection is lost, here and in all methods.
    """

    def __init__(self, link: connections.Link) -> None:
        self.link = link
        self.channel = link.channel()
        self.channel.confirm_select()
        self._tag = 0
        #: What is to be kept, by delivery tag, in the order of publishing.
        self.unconfirmed: Dict[int, Outgoing] = {}
        #: What the broker has refused to keep, by delivery tag.
        self.nacked: Dict[int, Outgoing] = {}
        #: What was to be kept in a queue that is not there.
        self.returned: List[Outgoing] = []
        self._asking: Optional[amqp.Channel] = None
        self.channel.events["basic_ack"].add(self._on_ack)
        self.channel.events["basic_nack"].add(self._on_nack)
        self.channel.events["basic_return"].add(self._on_return)

    def publish(self, message: Outgoing) -> int:
        """Publish *message*, and then its copy for who listens; wait for no confirm.

        In this order: who begins to listen too late for the copy finds what is kept. Both are
        written at once. Should the connection be lost between them, and the first be confirmed
        already, then who listens learns of it by asking the store.

        Returns:
            The delivery tag of what is to be kept.
        """
        connection = self.link.amqp
        if not self.channel.is_open or connection.transport is None:
            raise amqp.exceptions.RecoverableConnectionError("the channel is closed")
        octets = frames.publish_frames(
            self.channel.channel_id,
            "",
            message.queue,
            True,
            message.properties,
            message.body,
            connection.frame_max,
            message.pushed,
        )
        tag = self._tag = self._tag + 1
        self.unconfirmed[tag] = message
        if message.pushed is not None:
            # Of the copy, which is not waited for.
            self._tag += 1
        connection.transport.write(octets)
        # What py-amqp's heartbeats go by.
        connection.bytes_sent += 1
        return tag

    def _on_ack(self, tag: int, multiple: bool) -> None:
        self._settle(tag, multiple)

    def _on_nack(self, tag: int, multiple: bool) -> None:
        refused = self._settle(tag, multiple)
        if not refused:
            # A queue that is full, or the inbox of a process whose node is cut off.
            logger.info("a queue bound to the exchange refuses a state, which is kept all the same")
        self.nacked.update(refused)

    def _settle(self, tag: int, multiple: bool) -> Dict[int, Outgoing]:
        """Note that the broker is done with *tag*; return what of that was to be kept."""
        if not multiple:
            message = self.unconfirmed.pop(tag, None)
            return {} if message is None else {tag: message}
        # Keys are in ascending order.
        settled = []
        for key in self.unconfirmed:
            if key > tag:
                break
            settled.append(key)
        return {key: self.unconfirmed.pop(key) for key in settled}

    def _on_return(self, exc: Exception, exchange: str, routing_key: str, message: Any) -> None:
        # It comes before its confirm. What was published earlier to the same queue may be
        # unconfirmed still, and need not come back: the queue was there then.
        known = {id(outgoing) for outgoing in self.returned}
        candidates = [
            outgoing
            for outgoing in self.unconfirmed.values()
            if outgoing.queue == routing_key and id(outgoing) not in known
        ]
        properties = _identity(message.properties)
        alike = [outgoing for outgoing in candidates if outgoing.body == message.body]
        same = [outgoing for outgoing in alike if _identity(outgoing.properties) == properties]
        # Headers that are no UTF-8 come back as nothing that could be compared.
        self.returned += (same or alike or candidates)[:1]

    def wait(self, tags: Sequence[int], deadline: Optional[float] = None) -> None:
        """Wait until the broker has settled *tags*.

        Parameters:
            tags: delivery tags.
            deadline: time (``time.monotonic``) at which to give up, even while the broker blocks
                publishers; ``None`` for when the connection is taken for dead.

        Raises:
            NotConfirmed: when it has not done so in time.
        """
        started = time.monotonic()
        patience = started + CONFIRM_TIMEOUT
        # The oldest last: each is looked for until it is settled, and not again.
        waiting = list(reversed(tags))
        while True:
            while waiting and waiting[-1] not in self.unconfirmed:
                waiting.pop()
            if not waiting:
                return
            self._take_in(connections.time_left(deadline, 1.0))
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                why = ""
                if self.link.blocked:
                    why = (
                        f": the broker blocks publishers ({self.link.blocked}: a memory or disk "
                        "alarm)"
                    )
                raise errors.NotConfirmed(
                    f"no confirm from the broker within {now - started:.1f} s{why}"
                )
            if self.link.blocked:
                patience = now + CONFIRM_TIMEOUT
            elif now > patience:
                raise errors.NotConfirmed(
                    f"no confirm from the broker within {CONFIRM_TIMEOUT:g} s"
                )

    def length(self, queue: str) -> Optional[QueueLength]:
        """Return how long *queue* is now, or ``None`` where there is no such queue."""
        if self._asking is None:
            # The broker closes the channel when there is no such queue: not this one.
            self._asking = self.link.channel()
        try:
            found = self._asking.queue_declare(queue, passive=True)
        except amqp.exceptions.NotFound as exc:
            # py-amqp has opened the channel again.
            if not exc.reply_text.startswith("NOT_FOUND - no queue "):
                raise
            return None
        return QueueLength(found.message_count, found.consumer_count)

    def collect(self) -> None:
        """Take in the confirms that have come so far, without waiting."""
        while self._take_in(0.0):
            pass

    def _take_in(self, timeout: float) -> bool:
        """Handle what the broker sends; return ``False`` when nothing came in *timeout* seconds."""
        if not self.link.readable(timeout):
            return False
        confirmed = False
        for tag, multiple in self.link.acks(self.channel.channel_id):
            self._settle(tag, multiple)
            confirmed = True
        return confirmed or self.link.drain(0.0)


def _identity(properties: Mapping[str, Any]) -> Tuple[Any, ...]:
    """Return what tells a message from others in the same queue."""
    headers = properties.get("application_headers") or {}
    return properties.get("correlation_id"), properties.get("message_id"), headers
