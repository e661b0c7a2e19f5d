"""Publishing states, and waiting until the broker has them.

Every connection publishes on one channel in confirm mode. What must not be lost is waited for;
what need not be waited for is remembered until its confirm comes along with a later one, and is
published again if the connection is lost before. A state may then be on the broker twice, which
the fold of states makes harmless.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
import time
from typing import Callable, Deque, Optional, Sequence, Set, Tuple, Type, TypeVar

from amqp import exceptions as amqp_errors

from celery_amqp_results import connections, errors
from celery_amqp_results.confirms import ConfirmChannel, Outgoing, QueueLength
from celery_amqp_results.declarations import Declarations, declare_queue
from celery_amqp_results.topology import QueueSpec

__all__ = ("Outgoing", "Publisher", "QueueLength")

logger = logging.getLogger(__name__)

#: How many messages that nobody waits for may be unconfirmed on one connection.
MAX_UNCONFIRMED = 500

#: After so many messages that nobody waits for the confirms that have come are taken in.
COLLECT_EVERY = 50

#: Publishing has no heartbeats: a dead connection is noticed at the next message, which the
#: kernel gives up after a second (py-amqp sets TCP_USER_TIMEOUT).
HEARTBEAT = 0.0

_T = TypeVar("_T")

_FAILURES: Tuple[Type[Exception], ...] = (errors.BackendUnavailable, *connections.TRANSIENT)


class Publisher:
    """Publishes messages on connections of its own.

    Parameters:
        connector: opens connections.
        declarations: declares the shards before they are first used.

    Thread-safe: each thread that publishes at the same moment has a connection to itself. After a
    fork the child must make a new publisher.
    """

    def __init__(self, connector: connections.Connector, declarations: Declarations) -> None:
        self._connector = connector
        self._declarations = declarations
        self._lock = threading.Lock()
        self._idle: Deque[ConfirmChannel] = collections.deque()
        self._closed = False
        #: Messages that nobody waits for, of connections lost before their confirm came.
        self._orphans: Deque[Outgoing] = collections.deque(maxlen=MAX_UNCONFIRMED)

    def publish(
        self,
        messages: Sequence[Outgoing],
        confirm: bool = True,
        count: Optional[str] = None,
    ) -> Optional[QueueLength]:
        """Publish *messages*, in order, and wait for their confirms together.

        Tried again as the retry policy says when the connection is lost; a message may then be
        there twice.

        Parameters:
            messages: what to publish.
            confirm: whether to return only when the broker has all of them.
            count: name of a queue whose length is asked for after the confirms.

        Returns:
            The length of the queue *count*; ``None`` where there is no such queue, which is so
            when a mandatory message to it came back.

        Raises:
            DeclarationRefused: when the exchange or a shard exists with other properties.
            ResultTooLarge: when the broker refuses a message of this size.
            BackendUnavailable: when the broker could not be reached or refuses us; nothing is
                known of the messages then.
        """

        def work(channel: ConfirmChannel) -> Optional[QueueLength]:
            gone = self._publish(channel, messages, confirm)
            return None if count is None or count in gone else channel.length(count)

        return self._run(work, messages)

    def declare(self, queues: Sequence[QueueSpec]) -> int:
        """Declare *queues*, and return how many read them already.

        Raises:
            DeclarationRefused: when one of them exists with other properties.
            BackendUnavailable: when the broker could not be reached or refuses us.
        """
        return self._run(
            lambda channel: sum(declare_queue(channel.channel, queue) for queue in queues), ()
        )

    def _run(self, work: Callable[[ConfirmChannel], _T], messages: Sequence[Outgoing]) -> _T:
        """Do *work* for *messages*, again as the policy says when the connection is lost."""
        attempt = 0
        while True:
            channel: Optional[ConfirmChannel] = None
            try:
                channel = self._acquire()
                done = work(channel)
            except _FAILURES as exc:
                if channel is not None:
                    self._drop(channel, messages)
                    self._connector.leave(channel.link)
                attempt += 1
                pause = self._judge(exc, messages, attempt)
                logger.warning(
                    "%s was not published, trying again in %.1f s [%d/%s]: %r",
                    _what(messages),
                    pause,
                    attempt,
                    self._connector.policy.max_retries,
                    exc,
                )
                time.sleep(pause)
            except BaseException:
                # Interrupted (a time limit, Ctrl-C), or a declaration was refused: half a frame
                # may be on the wire.
                if channel is not None:
                    self._drop(channel, messages)
                raise
            else:
                self._release(channel)
                return done

    def _publish(
        self, channel: ConfirmChannel, messages: Sequence[Outgoing], confirm: bool
    ) -> Set[str]:
        """Publish, and return the routing keys of what no queue takes and none has to."""
        gone: Set[str] = set()
        declarations = self._declarations
        while self._orphans:
            # Published under the channel's watch from now on.
            channel.publish(self._orphans.popleft())
        pending = list(messages)
        for _ in range(2):
            declarations.ensure_exchange(channel.channel)
            with channel.link.corked():
                for message in pending:
                    shard = message.shard
                    if shard is not None and not (
                        declarations.has_shard(shard)
                        or channel.requested.get(shard) == declarations.generation
                    ):
                        requested = declarations.request_shard(channel.channel, shard)
                        channel.requested[shard] = requested
                for message in pending:
                    channel.publish(message)
            if confirm or len(channel.unconfirmed) > MAX_UNCONFIRMED:
                channel.wait(list(channel.unconfirmed))
                declarations.remember(channel.requested)
                channel.requested.clear()
            elif len(channel.unconfirmed) % COLLECT_EVERY == 0:
                channel.collect()
            if channel.nacked:
                self._publish_to_shards(channel)
            returned, channel.returned = channel.returned, []
            gone.update(message.routing_key for message in returned if message.shard is None)
            # Those may have been published long before, and not been waited for.
            pending = [message for message in returned if message.shard is not None]
            if not pending:
                return gone
            if not declarations.declare:
                shards = sorted({m.shard for m in pending if m.shard is not None})
                names = ", ".join(declarations.topology.shard_queue(n).name for n in shards)
                raise declarations.missing(f"queue {names}, bound to the exchange,")
            logger.warning("a shard queue is gone and is declared again: %s", _what(pending))
            declarations.forget()
        raise errors.NotConfirmed(f"no queue takes {_what(messages)}")

    def _publish_to_shards(self, channel: ConfirmChannel) -> None:
        """Publish what was refused once more, to the queues that keep it and to no others.

        A message is refused when one of the queues that it is routed to does not take it. That
        may be anybody's: one that is full, or the inbox of a process whose node is cut off.
        """
        refused, channel.nacked = channel.nacked, {}
        topology = self._declarations.topology
        for message in refused.values():
            if message.shard is None or not message.exchange:
                raise errors.NotConfirmed("the broker refused to take a message (nack)")
            queue = topology.shard_queue(message.shard).name
            channel.publish(dataclasses.replace(message, exchange="", routing_key=queue))
        channel.wait(list(channel.unconfirmed))
        if channel.nacked:
            raise errors.NotConfirmed("the broker refused to take a message (nack)")
        logger.info(
            "a queue refuses states; they were stored in their shards: %s",
            _what(list(refused.values())),
        )

    def _judge(self, exc: BaseException, messages: Sequence[Outgoing], attempt: int) -> float:
        """Return the pause before the next try, or raise where there is to be none."""
        if isinstance(exc, errors.BackendUnavailable) and not isinstance(exc, errors.NotConfirmed):
            # Connecting has its own tries, by the same policy.
            raise exc
        refusal = self._declarations.refusal(exc)
        if refusal is not None:
            raise refusal from exc
        if isinstance(exc, amqp_errors.PreconditionFailed) and "larger than" in str(exc):
            size = max((len(message.body) for message in messages), default=0)
            raise errors.ResultTooLarge(
                f"{_what(messages)} has {size} bytes and the broker refuses it: {exc}. Return "
                "less, set result_compression, or raise max_message_size in rabbitmq.conf."
            ) from exc
        if connections.is_refusal(exc):
            raise errors.BackendUnavailable(
                f"the broker at {self._connector.describe()} refuses {_what(messages)}: {exc}. "
                "Check the user's permissions on the exchange and the queues "
                f"{self._declarations.topology.prefix}.*"
            ) from exc
        pause = self._connector.policy.pause(attempt)
        if pause is None:
            raise errors.NotConfirmed(
                f"the broker at {self._connector.describe()} did not confirm {_what(messages)} "
                f"in {attempt} tries: {exc!r}"
            ) from exc
        return pause

    def _acquire(self) -> ConfirmChannel:
        while True:
            with self._lock:
                if not self._idle:
                    break
                channel = self._idle.pop()
            if channel.link.alive and channel.channel.is_open:
                return channel
            self._drop(channel, ())
        link = self._connector.open(HEARTBEAT)
        try:
            return ConfirmChannel(link)
        except BaseException:
            link.drop()
            self._connector.leave(link)
            raise

    def _release(self, channel: ConfirmChannel) -> None:
        channel.link.idle_since = time.monotonic()
        surplus: Optional[ConfirmChannel] = None
        with self._lock:
            if self._closed:
                surplus = channel
            else:
                self._idle.append(channel)
                oldest = self._idle[0]
                # Left over from a time when more threads published at once.
                if channel.link.idle_since - oldest.link.idle_since > connections.IDLE_SECONDS:
                    surplus = self._idle.popleft()
        if surplus is not None:
            self._close(surplus)

    def _drop(self, channel: ConfirmChannel, current: Sequence[Outgoing]) -> None:
        """Let go of a broken connection, keeping what others published on it unconfirmed."""
        mine = {id(message) for message in current}
        self._orphans.extend(m for m in channel.unconfirmed.values() if id(m) not in mine)
        channel.link.drop()
        # The broker may have restarted without what was declared.
        self._declarations.forget()

    def close(self) -> None:
        """Wait for what is unconfirmed, and close the connections."""
        with self._lock:
            self._closed = True
            idle, self._idle = list(self._idle), collections.deque()
        for channel in idle:
            self._close(channel)

    def _close(self, channel: ConfirmChannel) -> None:
        try:
            self._publish(channel, (), True)
        except _FAILURES as exc:
            logger.warning(
                "%d states were not confirmed when their connection was closed: %r",
                len(channel.unconfirmed),
                exc,
            )
        channel.link.close()


def _what(messages: Sequence[Outgoing]) -> str:
    if not messages:
        return "a request about queues"
    return ", ".join(message.what for message in messages[:3]) + (
        f" and {len(messages) - 3} more" if len(messages) > 3 else ""
    )
