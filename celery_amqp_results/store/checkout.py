"""Reading the messages of a queue, and putting them back.

A queue can only be read by taking its messages out. A *checkout* consumes with manual
acknowledgement, looks at the messages until its own *fence* comes, and closes the channel. The
broker then requeues everything unacknowledged at its old place, in one step, as it does when a
reader dies. The queue's single active consumer is the lock: a second reader waits in line, and
never finds a queue that only looks empty.

The fence is a message that the reader publishes to the queue. Messages confirmed before lie in
front of it, with one exception: a reader further up the line may have taken out a message and
published it again in another form while the fence was waiting. So a reader sets a second fence when
the first one comes, if it has not found everything or if its fence was delivered to another reader
before. It has the queue to itself by then, and no message can be moved behind the second fence. A
reader that moves messages waits until a fence that it publishes behind them has come back: by then
it has received all fences in front of the moved messages.
"""

from __future__ import annotations

import time
import uuid
from typing import Callable, Iterable, List, Mapping, NamedTuple, Optional

import amqp
from amqp import exceptions as amqp_errors
from amqp import spec

from celery_amqp_results.amqp import nowait
from celery_amqp_results.amqp.failures import NO_QUEUE
from celery_amqp_results.amqp.link import IO_TIMEOUT, Link

__all__ = ("FENCE", "Checkout", "Limits", "limits_for")

#: The property ``type`` of a fence.
FENCE = "fence"

#: How many messages a checkout of a quorum queue may hold: the highest prefetch in AMQP. With no
#: limit a quorum queue stops at 2,000 deliveries, and the fence never comes.
PREFETCH = 65535

#: AMQP's code for a missing object.
NOT_FOUND = 404

#: Seconds between looks at the heartbeats, at most.
TICK = 1.0

#: A fence whose reader has died is dropped after this many milliseconds.
FENCE_EXPIRATION = 60_000
#: A reader that has waited in line for this many seconds publishes its fence again.
FENCE_RENEWAL = 30.0


#: A reader may hold a quorum queue for this many seconds beyond the time limit of a look-up: longer
#: than the broker takes to miss the heartbeats of a frozen reader.
GRACE = 20.0


class Limits(NamedTuple):
    """How much a checkout may hold, and for how long."""

    #: How many messages; 0 for any number, which does not work for quorum queues.
    prefetch: int
    #: Arguments of the consumer.
    arguments: Mapping[str, object]


def limits_for(queue_type: str, lookup_timeout: float) -> Limits:
    """Return the limits for a queue; the broker evicts a reader that does not release it.

    This does not concern readers that die or freeze, since the broker closes their connections. But
    if the *node* of a reader stood still and goes on, the reader's channel may wait for a lost
    answer and hold the queue for a minute more. Quorum queues know the argument since RabbitMQ 4.3;
    an evicted consumer receives basic.cancel, as if the queue had been deleted.

    Parameters:
        queue_type: ``classic`` or ``quorum``.
        lookup_timeout: seconds that a look-up may take.
    """
    if queue_type != "quorum":
        return Limits(0, {})
    return Limits(PREFETCH, {"x-consumer-timeout": int(1000 * (lookup_timeout + GRACE))})


class Checkout:
    """One read of one queue.

    The queue must have a single active consumer. Nothing here blocks: the caller drains the link
    until :attr:`fenced`.

    Parameters:
        link: an open connection that the caller uses exclusively.
        on_message: called with each message that is no fence, while the link is drained.
        look_again: called when the first fence has come; returns whether to set a second one, for
            messages moved behind the first. If it is given, a second fence is also set when the
            first was delivered to another reader before.

    Raises:
        amqp.AMQPError, OSError: when the connection is lost. Draining the link raises
            ConsumerCancelled when the queue is deleted meanwhile, and the error of the broker when
            it refuses the read.
    """

    def __init__(
        self,
        link: Link,
        queue: str,
        on_message: Callable[[amqp.Message], None],
        limits: Limits,
        look_again: Optional[Callable[[], bool]] = None,
    ) -> None:
        self.link = link
        self.queue = queue
        #: Whether the fence has come, or cannot come since the queue does not exist.
        self.fenced = False
        #: Whether the queue does not exist.
        self.missing = False
        #: How many messages have come, including fences.
        self.seen = 0
        self._on_message = on_message
        self._look_again = look_again
        self._fence = ""
        self._fence_set = 0.0
        self._fence_tags: List[int] = []
        self._deleted = False
        # Nothing here waits for an answer: the next thing of interest is the first message.
        with link.corked():
            self.channel = link.channel_nowait(self._on_close)
            nowait.qos(self.channel, limits.prefetch)
            self.channel.basic_consume(
                queue,
                consumer_tag="r",
                no_ack=False,
                nowait=True,
                callback=self._receive,
                on_cancel=self._cancelled,
                arguments=dict(limits.arguments),
            )
            # The fence must follow the consumer: a fence published to a missing queue is lost. If
            # the queue were declared after that, the wait for the fence would never end.
            self.set_fence()

    def set_fence(self) -> None:
        """Publish a fence; :attr:`fenced` is false until it comes."""
        self.fenced = False
        self._fence = uuid.uuid4().hex
        self._fence_set = time.monotonic()
        self.channel.basic_publish(
            amqp.Message(
                b"",
                type=FENCE,
                message_id=self._fence,
                expiration=str(FENCE_EXPIRATION),
                delivery_mode=1,
            ),
            routing_key=self.queue,
        )

    def renew_fence(self) -> None:
        """Set the fence again if it will soon expire. To be called periodically while waiting."""
        if not self.fenced and time.monotonic() - self._fence_set >= FENCE_RENEWAL:
            self.set_fence()

    def _on_close(self, code: int, text: str, class_id: int, method_id: int) -> None:
        self.missing = code == NOT_FOUND and text.startswith(NO_QUEUE)
        self.fenced = True
        if not self.missing:
            raise amqp_errors.error_for_code(
                code, text, (class_id, method_id), amqp_errors.ChannelError
            )

    def _cancelled(self, consumer_tag: str) -> None:
        # The queue was deleted, its leader failed, or this reader was evicted.
        if self._deleted:
            return
        raise amqp_errors.ConsumerCancelled(consumer_tag, spec.Basic.Cancel)

    def _receive(self, message: amqp.Message) -> None:
        if self.fenced:
            # Published after the fence; the broker requeues it.
            return
        self.seen += 1
        properties = message.properties
        if properties.get("type") == FENCE:
            # The fences of dead readers can go. Those of readers that wait in line are not
            # acknowledged, and so requeued.
            if properties.get("message_id") == self._fence:
                self._fence_tags.append(message.delivery_tag)
                look_again, self._look_again = self._look_again, None
                # A redelivered fence: another reader had the queue while the fence lay in it.
                waited = bool(message.delivery_info.get("redelivered"))
                if look_again is not None and (waited or look_again()):
                    # At once, since it must see all messages that follow.
                    self.set_fence()
                else:
                    self.fenced = True
            return
        self._on_message(message)

    def wait(self, deadline: float) -> bool:
        """Read until the fence comes; return ``False`` when it has not come before *deadline*.

        For a caller that reads one queue on a connection.
        """
        return self._drain_until(lambda: self.fenced, deadline)

    def _drain_until(self, done: Callable[[], bool], deadline: float) -> bool:
        while not done():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self.link.drain(min(left, TICK))
            self.link.tick()
            self.renew_fence()
        return True

    def acknowledge(self, tags: Iterable[int]) -> None:
        """Remove messages from the queue."""
        for tag in tags:
            self.channel.basic_ack(tag)

    def delete(self, *others: str) -> None:
        """Delete the queue and everything in it, and release it; delete queues of *others* as well.

        They need not exist. Does not wait for an answer. Waiting consumers receive basic.cancel.
        """
        self._deleted = True
        with self.link.corked():
            for queue in (self.queue, *others):
                self.channel.queue_delete(queue, nowait=True)
            self.channel.send_method(spec.Channel.Close, "BsBB", (0, "", 0, 0))

    def close(self, wait: bool) -> None:
        """Make the broker requeue everything unacknowledged; *wait* until that is done."""
        if self.missing:
            return
        # Messages still on their way are ignored.
        self.fenced = True
        with self.link.corked():
            self.acknowledge(self._fence_tags)
            # Channel.close() would log each message that is still on its way as a protocol error.
            self.channel.send_method(spec.Channel.Close, "BsBB", (0, "", 0, 0))
        end = time.monotonic() + IO_TIMEOUT
        if wait and not self._drain_until(lambda: self.channel.connection is None, end):
            # Heartbeats may have come meanwhile.
            raise amqp_errors.RecoverableConnectionError(
                f"the broker did not close a channel within {IO_TIMEOUT:g} s"
            )
