"""Taking the messages of a queue out to look at them, and putting them back.

A queue can only be read by taking its messages out. A *checkout* consumes with manual
acknowledgement, looks at what comes until its own *fence* does, and closes the channel, upon which
the broker puts back in its place, in one step, everything that was not acknowledged. A reader that
dies does the same. The queue's single active consumer is the lock: a second reader waits in line,
and never finds a queue that only looks empty.

The fence is a message that the reader publishes to the queue. What was confirmed before lies in
front of it. One thing may lie behind a fence although it was there before: what a reader further
up the line took out and published again in another form, while the fence was waiting. So a reader
that has not found what it looks for, or whose fence somebody else was given before, sets a second
fence when the first one comes: it has the queue to itself by then, and nothing can be moved behind
the second one. Who moves messages waits until a fence that it publishes behind them has come back:
by then it was given all the fences that lie in front of what it moved.
"""

from __future__ import annotations

import time
import uuid
from typing import Any, Callable, Iterable, List, Mapping, Optional

import amqp
from amqp import exceptions as amqp_errors
from amqp import spec

from celery_amqp_results.amqp import connections

__all__ = ("FENCE", "Checkout", "longest_hold", "longest_prefetch")

#: The property ``type`` of a fence.
FENCE = "fence"

#: How many messages a checkout of a quorum queue may hold: the most that AMQP can say. With no
#: limit a quorum queue stops at 2,000 deliveries, and the fence never comes.
PREFETCH = 65535

#: AMQP's code for what is not there.
NOT_FOUND = 404

#: A fence that its reader did not live to take is dropped after this many milliseconds.
FENCE_EXPIRATION = 60_000
#: Who lives to wait in line for so many seconds sets another one before that.
FENCE_RENEWAL = 30.0


def longest_prefetch(queue_type: str) -> int:
    """Return how many messages a checkout may hold at most; 0 for no limit."""
    return PREFETCH if queue_type == "quorum" else 0


#: For so many seconds more than a look-up may take a quorum queue is left to its reader: longer
#: than the broker takes to miss the heartbeats of one that is frozen.
GRACE = 20.0


def longest_hold(queue_type: str, lookup_timeout: float) -> Mapping[str, Any]:
    """Return consumer arguments that take the queue away from a reader that does not let go of it.

    That is not for readers that die or freeze, whose connections the broker closes. But the channel
    of one whose *node* stood still, and goes on, may wait for an answer that was lost meanwhile,
    and keep the queue for a minute more. Quorum queues know the argument since RabbitMQ 4.3; who
    lives to be taken the queue away is told, as if it had been deleted.

    Parameters:
        queue_type: ``classic`` or ``quorum``.
        lookup_timeout: seconds that a look-up may take.
    """
    if queue_type != "quorum":
        return {}
    return {"x-consumer-timeout": int(1000 * (lookup_timeout + GRACE))}


class Checkout:
    """One read of one queue.

    The queue must have a single active consumer. Nothing is waited for here: whoever makes a
    checkout drains the link until :attr:`fenced`.

    Parameters:
        link: an open connection, which the caller is alone with.
        queue: name of the queue.
        on_message: called with each message that is no fence, while the link is drained.
        prefetch: how many messages it may hold; 0 for no limit, which a quorum queue must not be
            read with.
        arguments: of the consumer, see :func:`longest_hold`; none by default.
        look_again: asked when the first fence has come whether a second one is to be set, for
            messages that somebody may have moved behind the first. Where it is given, that is
            done without asking if another reader was given the fence before.

    Raises:
        amqp.AMQPError, OSError: when the connection is lost. Draining the link raises
            ConsumerCancelled when the queue is deleted meanwhile, and the error of the broker when
            it refuses the read.
    """

    def __init__(
        self,
        link: connections.Link,
        queue: str,
        on_message: Callable[[amqp.Message], None],
        prefetch: int = PREFETCH,
        look_again: Optional[Callable[[], bool]] = None,
        arguments: Optional[Mapping[str, Any]] = None,
    ) -> None:
        self.link = link
        self.queue = queue
        #: Whether the fence has come, or cannot come since there is no such queue.
        self.fenced = False
        #: Whether there is no such queue.
        self.missing = False
        #: How many messages have come, fences among them.
        self.seen = 0
        self._on_message = on_message
        self._look_again = look_again
        self._fence = ""
        self._fence_set = 0.0
        self._fence_tags: List[int] = []
        self._deleted = False
        # No answer is waited for: the next thing of interest is the first message.
        with link.corked():
            self.channel = link.channel_nowait(self._on_close)
            self.channel.send_method(spec.Basic.Qos, "lBb", (0, prefetch, False))
            self.channel.basic_consume(
                queue,
                consumer_tag="r",
                no_ack=False,
                nowait=True,
                callback=self._receive,
                on_cancel=self._cancelled,
                arguments=dict(arguments or {}),
            )
            # Not before: a fence for a queue that is not there is lost, and if somebody declared
            # the queue before we consume from it, it would be waited for in vain.
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
        """Set the fence again if it will soon expire. To be called now and then while waiting."""
        if not self.fenced and time.monotonic() - self._fence_set >= FENCE_RENEWAL:
            self.set_fence()

    def _on_close(self, code: int, text: str, class_id: int, method_id: int) -> None:
        self.missing = code == NOT_FOUND and text.startswith("NOT_FOUND - no queue ")
        self.fenced = True
        if not self.missing:
            # Of a queue whose node is down, for one, the broker says NOT_FOUND as well.
            raise amqp_errors.error_for_code(
                code, text, (class_id, method_id), amqp_errors.ChannelError
            )

    def _cancelled(self, consumer_tag: str) -> None:
        # The queue was deleted, its leader went away, or it was held for too long.
        if self._deleted:
            return
        raise amqp_errors.ConsumerCancelled(consumer_tag, spec.Basic.Cancel)

    def _receive(self, message: amqp.Message) -> None:
        if self.fenced:
            # Published since; it is put back.
            return
        self.seen += 1
        properties = message.properties
        if properties.get("type") == FENCE:
            # Those of readers that died are in nobody's way any more; those of readers that wait
            # in line are not acknowledged, and put back.
            if properties.get("message_id") == self._fence:
                self._fence_tags.append(message.delivery_tag)
                look_again, self._look_again = self._look_again, None
                # Delivered before: then another reader had the queue while the fence lay in it.
                waited = bool(message.delivery_info.get("redelivered"))
                if look_again is not None and (waited or look_again()):
                    # At once: what comes next is to be seen.
                    self.set_fence()
                else:
                    self.fenced = True
            return
        self._on_message(message)

    def wait(self, deadline: float, step: float) -> bool:
        """Read until the fence comes; return ``False`` when it has not come before *deadline*.

        For whoever reads one queue on a connection.

        Parameters:
            deadline: time (``time.monotonic``).
            step: seconds between looks at the heartbeats, at most.
        """
        while not self.fenced:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self.link.drain(min(left, step))
            self.link.tick()
            self.renew_fence()
        return True

    def acknowledge(self, tags: Iterable[int]) -> None:
        """Take messages out for good.

        Parameters:
            tags: their delivery tags.
        """
        for tag in tags:
            self.channel.basic_ack(tag)

    def delete(self, *others: str) -> None:
        """Delete the queue with all that is in it, and let go of it.

        That is not waited for. Whoever waits in line is told.

        Parameters:
            others: names of queues to delete as well; they need not exist.
        """
        self._deleted = True
        with self.link.corked():
            for queue in (self.queue, *others):
                self.channel.queue_delete(queue, nowait=True)
            self.channel.send_method(spec.Channel.Close, "BsBB", (0, "", 0, 0))

    def close(self, wait: bool) -> None:
        """Have the broker put everything back that was not acknowledged.

        Parameters:
            wait: whether to return only when that is done.
        """
        if self.missing:
            return
        # What is still on its way is of no interest.
        self.fenced = True
        with self.link.corked():
            self.acknowledge(self._fence_tags)
            # Channel.close() would log each message that is still on its way as a protocol error.
            self.channel.send_method(spec.Channel.Close, "BsBB", (0, "", 0, 0))
        while wait and self.channel.connection is not None:
            if not self.link.drain(connections.IO_TIMEOUT):
                raise amqp_errors.RecoverableConnectionError(
                    f"the broker did not close a channel within {connections.IO_TIMEOUT:g} s"
                )
