"""Publishing states, and waiting until the broker has them.

Every connection publishes on one channel in confirm mode. What must not be lost is waited for;
what need not be waited for is remembered until its confirm comes along with a later one, and is
published again if the connection is lost before. A state may then be on the broker twice, which
the fold of states makes harmless.
"""

from __future__ import annotations

import collections
import itertools
import logging
import re
import threading
import time
from typing import (
    Callable,
    Deque,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    Type,
    TypeVar,
)

from amqp import exceptions as amqp_errors

from celery_amqp_results import errors
from celery_amqp_results.amqp import connections
from celery_amqp_results.amqp.confirms import ConfirmChannel, Outgoing, QueueLength
from celery_amqp_results.amqp.declarations import Declarations, declare_queue
from celery_amqp_results.protocol.names import QueueSpec

__all__ = ("Outgoing", "Publisher", "QueueLength", "Receipt")

logger = logging.getLogger(__name__)

#: How many messages that nobody waits for may be unconfirmed on one connection.
MAX_UNCONFIRMED = 500

#: After so many messages that nobody waits for the confirms that have come are taken in.
COLLECT_EVERY = 50

#: Seconds after which what the broker has refused, and nobody waits for, is published again. What
#: it refuses once more after all of them is lost.
REFUSAL_PAUSES = (0.0, 0.2, 0.5, 1.0, 2.0)

#: Publishing has no heartbeats: a dead connection is noticed at the next message, which the
#: kernel gives up after a second (py-amqp sets TCP_USER_TIMEOUT).
HEARTBEAT = 0.0

#: What the broker says of a message that is too large: it closes the channel.
_MAX_SIZE = re.compile(r"larger than .*?max size (\d+)")

_T = TypeVar("_T")

_FAILURES: Tuple[Type[Exception], ...] = (errors.BackendUnavailable, *connections.TRANSIENT)


class Receipt(NamedTuple):
    """Messages on their way, whose confirms somebody is going to ask for."""

    channel: ConfirmChannel
    messages: Tuple[Outgoing, ...]


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
        #: What was published so far, see :class:`~celery_amqp_results.metrics.Metrics`.
        self.stored = 0
        self.confirmed = 0
        self.published_bytes = 0
        self.large = 0
        self.retried = 0
        self.refused = 0
        self.failed = 0
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

        return self._run(work, messages, confirm)

    def publish_apart(self, queue: QueueSpec, message: Outgoing) -> None:
        """Declare *queue*, publish *message* to it, and return when the broker has it.

        Raises:
            ResultTooLarge: when the broker refuses a message of this size.
            DeclarationRefused: when the queue exists with other properties.
            BackendUnavailable: when the broker could not be reached or refuses us.
        """

        def work(channel: ConfirmChannel) -> None:
            declare_queue(channel.channel, queue)
            if self._publish(channel, (message,), True):
                raise errors.NotConfirmed(f"the queue {queue.name!r} was deleted meanwhile")

        self._run(work, (message,))
        with self._lock:
            self.large += 1

    def publish_to(self, queues: Sequence[QueueSpec], message: Outgoing) -> None:
        """Publish *message*, and declare *queues* before if its own queue is not there.

        Returns when the broker has the message.

        Raises:
            ResultTooLarge: when the broker refuses a message of this size.
            DeclarationRefused: when a queue exists with other properties, or is not there and must
                not be declared here.
            BackendUnavailable: when the broker could not be reached or refuses us.
        """

        def work(channel: ConfirmChannel) -> None:
            if not self._publish(channel, (message,), True):
                return
            if not self._declarations.declare:
                raise self._declarations.missing(f"queue {message.queue!r}")
            for queue in queues:
                declare_queue(channel.channel, queue)
            if self._publish(channel, (message,), True):
                raise errors.NotConfirmed(f"the queue {message.queue!r} was deleted meanwhile")

        self._run(work, (message,))

    def delete(self, queues: Sequence[str]) -> None:
        """Delete *queues* with all that is in them; they need not exist.

        Raises:
            BackendUnavailable: when the broker could not be reached or refuses us.
        """

        def work(channel: ConfirmChannel) -> None:
            for queue in queues:
                channel.channel.queue_delete(queue)

        self._run(work, ())

    def declare(
        self, queues: Sequence[QueueSpec], messages: Sequence[Outgoing] = ()
    ) -> Optional[Receipt]:
        """Declare *queues*, and publish *messages*, unless somebody reads one of the queues.

        Parameters:
            queues: what to declare.
            messages: what to publish; that the broker has them is to be asked for with
                :meth:`wait_for`.

        Returns:
            ``None`` when somebody reads one of the queues already; nothing is published then.

        Raises:
            DeclarationRefused: when one of them exists with other properties.
            BackendUnavailable: when the broker could not be reached or refuses us.
        """

        def work(channel: ConfirmChannel) -> Optional[Receipt]:
            if sum(declare_queue(channel.channel, queue) for queue in queues):
                return None
            if messages:
                self._publish(channel, messages, False)
            return Receipt(channel, tuple(messages))

        return self._run(work, messages)

    def wait_for(self, receipt: Receipt) -> bool:
        """Wait until the broker has what was published; return ``False`` if no queue took it.

        Raises:
            ResultTooLarge, BackendUnavailable: see :meth:`publish`.
        """
        channel, messages = receipt
        with self._lock:
            mine = channel in self._idle
            if mine:
                self._idle.remove(channel)
        gone: Set[str] = set()

        def work(other: ConfirmChannel) -> None:
            # Where another thread has the connection now, or it is lost, it is published again.
            on_it = other is channel
            gone.update(self._publish(other, () if on_it else messages, True, messages))

        self._run(work, messages, True, channel if mine else None)
        return gone.isdisjoint(message.queue for message in messages)

    def _run(
        self,
        work: Callable[[ConfirmChannel], _T],
        messages: Sequence[Outgoing],
        confirm: bool = False,
        channel: Optional[ConfirmChannel] = None,
    ) -> _T:
        """Do *work* for *messages*, again as the policy says when the connection is lost.

        Parameters:
            work: what to do.
            messages: those that *work* publishes, every time that it is done.
            confirm: whether they are confirmed when it is done.
            channel: what the first try uses, and nobody else does; ``None`` for any.
        """
        attempt = 0
        while True:
            try:
                channel = channel or self._acquire()
                done = work(channel)
            except _FAILURES as exc:
                connections.raise_if_from_signal_handler(exc)
                if channel is not None:
                    _discard_oversize(channel, messages, exc)
                    self._drop(channel, messages)
                    self._connector.leave(channel.link)
                attempt += 1
                try:
                    pause = self._judge(exc, messages, attempt)
                except errors.NotConfirmed:
                    self._count_failure(refused=False)
                    raise
                except Exception as final:
                    self._count_failure(connections.is_refusal(final.__cause__ or final))
                    raise
                with self._lock:
                    self.retried += 1
                logger.warning(
                    "%s was not published, trying again in %.1f s [%d/%s]: %r",
                    _what(messages),
                    pause,
                    attempt,
                    self._connector.policy.max_retries,
                    exc,
                )
                time.sleep(pause)
                channel = None
            except BaseException:
                # Interrupted (a time limit, Ctrl-C), or a declaration was refused: half a frame
                # may be on the wire.
                if channel is not None:
                    self._drop(channel, messages)
                raise
            else:
                self._release(channel, messages, confirm)
                return done

    def _count_failure(self, refused: bool) -> None:
        with self._lock:
            if refused:
                self.refused += 1
            else:
                self.failed += 1

    def _publish(
        self,
        channel: ConfirmChannel,
        messages: Sequence[Outgoing],
        confirm: bool,
        published: Sequence[Outgoing] = (),
    ) -> Set[str]:
        """Publish, and return the names of queues that are not there and need not be.

        Parameters:
            channel: where to publish.
            messages: what to publish.
            confirm: whether to wait until the broker has everything that was published there.
            published: what was published there before, and is an error as well if it is refused.
        """
        gone: Set[str] = set()
        mine = {id(message) for message in (*messages, *published)}
        declarations = self._declarations
        declarations.ensure_exchange(channel.channel)
        if self._orphans:
            self._publish_orphans(channel)
        pending = list(messages)
        again = declared = False
        refusals = 0
        while True:
            self._write(channel, pending, confirm or again)
            if any(id(message) in mine for message in channel.nacked.values()):
                refused = list(channel.nacked.values())
                raise errors.NotConfirmed(f"the broker refused to take (nack) {_what(refused)}")
            # What is left was published before by those who have not waited. A node that goes down
            # refuses everything for a while: who waits for a confirm gives it a few seconds.
            unwanted = list(channel.nacked.values())
            if unwanted:
                pauses = REFUSAL_PAUSES if confirm else REFUSAL_PAUSES[:1]
                refusals += 1
                if refusals <= len(pauses):
                    time.sleep(pauses[refusals - 1])
                else:
                    logger.error(
                        "lost, since the broker refused it %d times (nack): %s",
                        refusals,
                        _what(unwanted),
                    )
                    unwanted = []
                channel.nacked = {}
            returned, channel.returned = channel.returned, []
            gone.update(message.queue for message in returned if message.shard is None)
            homeless = self._homeless(returned, mine)
            pending = homeless + unwanted
            if not pending:
                return gone
            if homeless:
                if declared:
                    raise errors.NotConfirmed(f"no queue takes {_what(messages)}")
                logger.warning(
                    "a shard queue is not there, and is declared now: %s", _what(homeless)
                )
                declarations.forget()
                declared = True
            # With another copy: who has begun to listen since has neither heard of it nor found it.
            again = True

    def _write(self, channel: ConfirmChannel, messages: Sequence[Outgoing], wait: bool) -> None:
        """Publish *messages*, to shards that are declared where that has to be done.

        Parameters:
            channel: where to publish.
            messages: what to publish.
            wait: whether to wait until the broker has settled everything that was published there.
        """
        declarations = self._declarations
        missing = [
            message.shard
            for message in messages
            if message.shard is not None and not declarations.has_shard(message.shard)
        ]
        if len(messages) == 1 and not missing:
            channel.publish(messages[0])
        else:
            with channel.link.corked():
                for shard in dict.fromkeys(missing):
                    declarations.request_shard(channel.channel, shard)
                for message in messages:
                    channel.publish(message)
        if wait:
            channel.wait(list(channel.unconfirmed))
        elif len(channel.unconfirmed) > MAX_UNCONFIRMED:
            # Not for all of them: the broker is not to run dry meanwhile.
            channel.wait(list(itertools.islice(channel.unconfirmed, MAX_UNCONFIRMED // 2)))
        elif len(channel.unconfirmed) % COLLECT_EVERY == 0:
            channel.collect()
        # By now the queues are there, if that was waited for. What another thread publishes
        # sooner would come back to it.
        for shard in missing:
            declarations.remember_shard(shard)
        if channel.returned and channel.unconfirmed:
            # What was published before the shard is declared again may come back as well.
            channel.wait(list(channel.unconfirmed))

    def _homeless(self, returned: Sequence[Outgoing], mine: Set[int]) -> List[Outgoing]:
        """Return those of *returned* that are to be published again to a shard.

        They may have been published long before, and not been waited for.

        Parameters:
            returned: what has come back.
            mine: by ``id()``, what whoever publishes now is to be told of.

        Raises:
            DeclarationRefused: when one of *mine* has no shard, and none is to be declared.
        """
        homeless = [message for message in returned if message.shard is not None]
        if not homeless or self._declarations.declare:
            return homeless
        names = ", ".join(sorted({message.queue for message in homeless}))
        missing_queue = self._declarations.missing(f"queue {names}")
        if any(id(message) in mine for message in homeless):
            raise missing_queue
        logger.error("lost: %s: %s", _what(homeless), missing_queue)
        return []

    def _publish_orphans(self, channel: ConfirmChannel) -> None:
        while True:
            with self._lock:
                if not self._orphans:
                    return
                message = self._orphans.popleft()
            try:
                # Under this channel's watch from now on.
                channel.publish(message)
            except BaseException:
                if all(message is not other for other in channel.unconfirmed.values()):
                    with self._lock:
                        self._orphans.appendleft(message)
                raise

    def _judge(self, exc: BaseException, messages: Sequence[Outgoing], attempt: int) -> float:
        """Return the pause before the next try, or raise where there is to be none."""
        if isinstance(exc, errors.BackendUnavailable) and not isinstance(exc, errors.NotConfirmed):
            # Connecting has its own tries, by the same policy.
            raise exc
        refusal = self._declarations.refusal(exc)
        if refusal is not None:
            raise refusal from exc
        limit = _size_limit(exc)
        if limit is not None:
            largest = max(messages, key=lambda message: len(message.body), default=None)
            if largest is not None and len(largest.body) > limit:
                too_large = errors.ResultTooLarge(
                    f"{largest.what} has {len(largest.body)} bytes when encoded, and the broker at "
                    f"{self._connector.describe()} takes messages of up to {limit} bytes "
                    "(max_message_size in its rabbitmq.conf). Return less, set "
                    "result_compression, or raise that limit."
                )
                too_large.size, too_large.limit = len(largest.body), limit
                raise too_large from exc
        elif connections.is_refusal(exc):
            raise errors.BackendUnavailable(
                f"the broker at {self._connector.describe()} refuses {_what(messages)}: {exc}. "
                "Check the user's permissions on the exchange and the queues "
                f"{self._declarations.topology.prefix}.*, and on the default exchange (amq.default)"
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
        link = self._connector.open(HEARTBEAT, None, "publish")
        try:
            return ConfirmChannel(link)
        except BaseException:
            link.drop()
            self._connector.leave(link)
            raise

    def _release(
        self, channel: ConfirmChannel, published: Sequence[Outgoing], confirmed: bool
    ) -> None:
        channel.link.idle_since = time.monotonic()
        surplus: Optional[ConfirmChannel] = None
        with self._lock:
            for message in published:
                self.published_bytes += len(message.body)
                # Others are parts of chords, marks, and bodies of large results.
                if message.pushed is not None:
                    self.stored += 1
                    self.confirmed += confirmed
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
        left = (*channel.unconfirmed.values(), *channel.returned, *channel.nacked.values())
        # What has come back may be unconfirmed as well.
        self._orphans.extend(m for key, m in {id(m): m for m in left}.items() if key not in mine)
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
            if channel.unconfirmed:
                logger.warning(
                    "%d states were not confirmed when their connection was closed: %r",
                    len(channel.unconfirmed),
                    exc,
                )
        channel.link.close()


def _size_limit(exc: BaseException) -> Optional[int]:
    """Return the largest size that the broker takes, if *exc* says that a message is larger."""
    if not isinstance(exc, amqp_errors.PreconditionFailed):
        return None
    found = _MAX_SIZE.search(str(exc))
    return int(found.group(1)) if found else None


def _discard_oversize(
    channel: ConfirmChannel, current: Sequence[Outgoing], exc: BaseException
) -> None:
    """Forget what the broker will never take, and that nobody waits for."""
    limit = _size_limit(exc)
    if limit is None:
        return
    mine = {id(message) for message in current}
    for tag, message in list(channel.unconfirmed.items()):
        if len(message.body) > limit and id(message) not in mine:
            del channel.unconfirmed[tag]
            logger.error(
                "%s is lost: it has %d bytes, and the broker takes up to %d",
                message.what,
                len(message.body),
                limit,
            )


def _what(messages: Sequence[Outgoing]) -> str:
    if not messages:
        return "a request about queues"
    return ", ".join(message.what for message in messages[:3]) + (
        f" and {len(messages) - 3} more" if len(messages) > 3 else ""
    )
