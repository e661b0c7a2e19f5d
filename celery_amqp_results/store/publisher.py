"""Publishing states, and waiting for their confirms.

All threads of a process publish on one channel in confirm mode, see
:mod:`~celery_amqp_results.amqp.shared_channel`. The publisher waits for the confirm of a final
state. It remembers any other state until its confirm has come, which it checks with the next
message and a second later, and publishes it again if the connection is lost before. A state may
then be on the broker twice, which the fold of states makes harmless.

No queue is declared before it is needed: the broker returns a message to a missing shard queue, and
the message is published again after a declaration.
"""

from __future__ import annotations

import collections
import logging
import threading
import time
from typing import Callable, Deque, List, Optional, Sequence, Tuple, Type, TypeVar

from celery_amqp_results import errors
from celery_amqp_results.amqp import connections
from celery_amqp_results.amqp.confirms import (
    ConfirmChannel,
    ConfirmLog,
    Outgoing,
    Publication,
    QueueLength,
    Status,
)
from celery_amqp_results.amqp.declarations import FEW_SHARDS, Declarations, declare_queue
from celery_amqp_results.amqp.failures import TRANSIENT, is_refusal
from celery_amqp_results.amqp.shared_channel import SharedChannel, Waiter
from celery_amqp_results.protocol.names import QueueSpec
from celery_amqp_results.store.delivery import (
    Delivery,
    Verdict,
    concerns,
    describe,
    size_limit,
)
from celery_amqp_results.toolkit import retry
from celery_amqp_results.toolkit.interrupts import raise_if_from_signal_handler
from celery_amqp_results.toolkit.retry import is_over
from celery_amqp_results.toolkit.threads import start_thread

__all__ = ("Outgoing", "Publisher", "QueueLength")

logger = logging.getLogger(__name__)

#: The most unconfirmed messages without a waiting caller.
MAX_UNCONFIRMED = 500

#: After this many messages without a waiting caller their confirms are collected.
COLLECT_EVERY = 50

#: Seconds that :meth:`Publisher.publish` waits for the confirms of live copies. They normally come
#: first. A stuck third-party queue must not delay results.
COPY_SECONDS = 0.25

#: Seconds after which a confirm without a waiting caller is collected.
CHECK_SECONDS = 1.0

#: The checking thread ends after this many checks with nothing to do.
IDLE_CHECKS = 10

#: Pauses, in seconds, before a refused message without a waiting caller is published again. After
#: the last refusal the message is lost.
REFUSAL_PAUSES = (0.0, 0.2, 0.5, 1.0, 2.0)

#: Seconds that an ending process waits for confirms.
FLUSH_SECONDS = 10.0

_T = TypeVar("_T")

_FAILURES: Tuple[Type[Exception], ...] = (errors.BackendUnavailable, *TRANSIENT)


class Publisher:
    """Publishes messages on one connection.

    Parameters:
        connector: opens the connection.
        declarations: declares the exchange, and missing shards.

    Thread-safe. After a fork the child must make a new publisher.
    """

    def __init__(self, connector: connections.Connector, declarations: Declarations) -> None:
        self._connector = connector
        self._declarations = declarations
        self._channel = SharedChannel(connector, self._adopt)
        #: Messages without a waiting caller that must be published again.
        self._strays: Deque[Publication] = collections.deque(maxlen=MAX_UNCONFIRMED)
        # Guards everything below. No I/O is done while holding it.
        self._lock = threading.Lock()
        self._keeper: Optional[threading.Thread] = None
        self._closed = threading.Event()
        #: Counts of published messages, see :class:`~celery_amqp_results.metrics.Metrics`.
        self.stored = 0
        self.confirmed = 0
        self.published_bytes = 0
        self.large = 0
        self.retried = 0
        self.refused = 0
        self.failed = 0
        self.late_copies = 0

    # -- requests ----------------------------------------------------------------------------

    def publish(self, messages: Sequence[Outgoing], confirm: bool = True) -> None:
        """Publish *messages*, in order, and wait for their confirms together.

        Retried by the retry policy when the connection is lost; a message may then be on the broker
        twice.

        Parameters:
            messages: messages to publish.
            confirm: whether to wait for the confirms. This includes those of live copies, for a
                moment.

        Raises:
            DeclarationRefused: when the exchange or a shard exists with other properties.
            ResultTooLarge: when the broker refuses a message of this size.
            BackendUnavailable: when the broker could not be reached or refuses us; the messages may
                or may not be stored then.
        """
        self._deliver(Delivery(messages), confirm)

    def publish_apart(self, queue: QueueSpec, message: Outgoing) -> None:
        """Declare *queue*, publish *message* to it, and return when the broker has it.

        Raises:
            ResultTooLarge: when the broker refuses a message of this size.
            DeclarationRefused: when the queue exists with other properties.
            BackendUnavailable: when the broker could not be reached or refuses us.
        """
        self._ask(lambda channel: declare_queue(channel.channel, queue), (message,))
        delivery = Delivery((message,))
        self._deliver(delivery, True)
        if delivery.gone:
            raise errors.NotConfirmed(f"the queue {queue.name!r} was deleted meanwhile")
        with self._lock:
            self.large += 1

    def publish_to(self, queues: Sequence[QueueSpec], message: Outgoing) -> None:
        """Publish *message*, and declare *queues* first if its own queue does not exist.

        Returns when the broker has the message.

        Raises:
            ResultTooLarge: when the broker refuses a message of this size.
            DeclarationRefused: when a queue exists with other properties, or is missing and must
                not be declared here.
            BackendUnavailable: when the broker could not be reached or refuses us.
        """
        delivery = Delivery((message,))
        self._deliver(delivery, True)
        if not delivery.gone:
            return
        if not self._declarations.declare:
            raise self._declarations.missing(f"queue {message.queue!r}")

        def declare(channel: ConfirmChannel) -> None:
            for queue in queues:
                declare_queue(channel.channel, queue)

        self._ask(declare, (message,))
        delivery = Delivery((message,))
        self._deliver(delivery, True)
        if delivery.gone:
            raise errors.NotConfirmed(f"the queue {message.queue!r} was deleted meanwhile")

    def length(self, queue: str) -> Optional[QueueLength]:
        """Return the present length of *queue*, or ``None`` if it does not exist.

        Raises:
            BackendUnavailable: when the broker could not be reached or refuses us.
        """
        return self._ask(lambda channel: channel.length(queue))

    def delete(self, queues: Sequence[str]) -> None:
        """Delete *queues* and everything in them; they need not exist.

        Raises:
            BackendUnavailable: when the broker could not be reached or refuses us.
        """

        def work(channel: ConfirmChannel) -> None:
            for queue in queues:
                channel.channel.queue_delete(queue)

        self._ask(work)

    def flush(self, timeout: float = FLUSH_SECONDS) -> None:
        """Wait until everything is confirmed, at most *timeout* seconds.

        To be called when the process ends.
        """
        end = time.monotonic() + timeout
        left: List[Publication] = []
        try:
            while not is_over(end):
                left = self._channel.collect()
                if not left and not self._has_strays():
                    return
                if self._has_strays():
                    left = self._send([], time.monotonic()).unwaited()
                self._channel.wait(Waiter(left), end)
        except _FAILURES as exc:
            raise_if_from_signal_handler(exc)
            logger.info("states were not confirmed when the process ended: %r", exc)
        count = len(self._strays) + sum(not p.settled for p in left)
        if count:
            logger.warning("%d states were not confirmed when the process ended", count)

    def close(self) -> None:
        """Wait for outstanding confirms, and close the connection."""
        self._closed.set()
        self.flush()
        self._channel.close()

    # -- delivering --------------------------------------------------------------------------

    def _deliver(self, delivery: Delivery, confirm: bool) -> None:
        """Publish the unsent messages of *delivery*; retry as the policy says."""
        tries = retry.Retry(self._connector.policy)
        verdict = Verdict(delivery.unsent(), [], None, [], [])
        while True:
            failure: Optional[BaseException] = None
            self._choose_copies(verdict, confirm)
            try:
                log = self._send(verdict.again, time.monotonic(), verdict.declare, confirm)
                if not confirm:
                    self._keep_up(log)
                    break
                # States stored earlier must be confirmed as well: they may be of the same task.
                self._channel.wait(Waiter([*delivery.publications, *log.unwaited()]))
            except _FAILURES as exc:
                raise_if_from_signal_handler(exc)
                failure = exc
            except BaseException:
                self._abandon(delivery)
                raise
            verdict = delivery.judge()
            if not verdict.again and failure is None:
                self._send_copies(delivery)
                self._wait_for_copies(delivery)
                # The connection may have been lost meanwhile, together with some of the copies.
                verdict = delivery.judge()
                if not verdict.again:
                    break
            failure = failure or verdict.failure
            if failure is not None:
                # The exchange may have been deleted: the broker reports that after the message.
                self._forget_declarations()
            self._prepare(delivery, verdict, failure, tries)
        self._count(delivery.messages, confirm)

    def _choose_copies(self, verdict: Verdict, confirm: bool) -> None:
        """Decide which live copies are sent at once.

        A reader that receives a state must find it in the store from then on. So the copy waits for
        the confirm if the shard may have no queue. Without a waiting caller the shard is declared
        first instead.
        """
        for publication in verdict.again:
            shard = publication.message.shard
            publication.push = True
            if shard is None or shard in verdict.declare or self._declarations.knows(shard):
                continue
            if confirm or not self._declarations.declare:
                publication.push = not confirm
            else:
                self._declarations.check_limit()
                verdict.declare.append(shard)

    def _send_copies(self, delivery: Delivery) -> None:
        """Send the live copies that were held until the confirm."""
        held = [p for p in delivery.publications if not p.push and p.message.pushed is not None]
        for publication in delivery.publications:
            shard = publication.message.shard
            if shard is not None and publication.status is Status.CONFIRMED:
                self._declarations.remember(shard)
        if not held:
            return
        try:
            with self._channel.open(time.monotonic()) as channel:
                for publication in held:
                    channel.publish_copy(publication)
        except _FAILURES as exc:
            raise_if_from_signal_handler(exc)
            # Both copies are sent again.
            for publication in held:
                publication.status, publication.failure = Status.LOST, exc

    def _prepare(
        self,
        delivery: Delivery,
        verdict: Verdict,
        failure: Optional[BaseException],
        tries: retry.Retry,
    ) -> None:
        """Wait until it is time to publish again, or raise the error that ends the attempts."""
        returned = describe([p.message for p in verdict.again])
        if failure is None and verdict.declare and not (verdict.homeless or verdict.refused):
            if not self._declarations.declare:
                self._abandon(delivery)
                names = sorted({p.message.queue for p in verdict.again})
                raise self._declarations.missing(f"queue {', '.join(names)}")
            # A shard begins when the first message to it comes back.
            self._declarations.check_limit()
            logger.info("a shard queue is declared, since it is not there: %s", returned)
            return
        if failure is None and verdict.refused:
            failure = errors.NotConfirmed(
                "the broker refused to take (nack) "
                + describe([p.message for p in verdict.refused])
            )
        elif failure is None:
            failure = errors.NotConfirmed(f"no queue takes {returned}")
        try:
            pause = self._pause_or_raise(failure, delivery.messages, tries)
        except Exception as final:
            self._abandon(delivery)
            refused = not isinstance(final, errors.NotConfirmed) and is_refusal(
                final.__cause__ or final
            )
            with self._lock:
                if refused:
                    self.refused += 1
                else:
                    self.failed += 1
            raise
        with self._lock:
            self.retried += 1
        logger.warning(
            "%s was not published, trying again in %.1f s [%d/%s]: %r",
            describe(delivery.messages),
            pause,
            tries.failed,
            self._connector.policy.max_retries,
            failure,
        )
        try:
            time.sleep(pause)
        except BaseException:
            self._abandon(delivery)
            raise

    def _ask(self, work: Callable[[ConfirmChannel], _T], messages: Sequence[Outgoing] = ()) -> _T:
        """Run *work*, which sends the broker a request; retry as the policy says.

        *messages* are named in errors.
        """
        tries = retry.Retry(self._connector.policy)
        while True:
            try:
                with self._channel.open(time.monotonic()) as channel:
                    return work(channel)
            except _FAILURES as exc:
                self._forget_declarations()
                pause = self._pause_or_raise(exc, messages, tries)
                with self._lock:
                    self.retried += 1
                logger.info("a request about queues is repeated after %r", exc)
                time.sleep(pause)

    def _send(
        self,
        publications: Sequence[Publication],
        since: float,
        declare: Sequence[int] = (),
        waited: bool = True,
    ) -> ConfirmLog:
        """Write *publications*, and the stray messages that must be published again.

        Returns:
            The log of unconfirmed publications on the connection.
        """
        declarations = self._declarations
        try:
            with self._channel.open(since) as channel:
                declarations.ensure_exchange(channel.channel)
                if channel.log.strays or self._strays:
                    self._send_strays(channel)
                full = self._room_refusal(channel, len(declare))
                if full is None:
                    self._write(channel, publications, declare)
                    if not waited:
                        for shard in declare:
                            declarations.remember(shard)
                        for publication in publications:
                            publication.waited = False
                    return channel.log
        except BaseException:
            self._forget_declarations()
            raise
        raise full

    def _room_refusal(
        self, channel: ConfirmChannel, count: int
    ) -> Optional[errors.BackendUnavailable]:
        """Return the error to raise instead of declaring *count* shards, or ``None``."""
        if not count or self._declarations.topology.shards <= FEW_SHARDS:
            return None
        return self._declarations.check_room(channel.asking(), count)

    def _write(
        self, channel: ConfirmChannel, publications: Sequence[Publication], declare: Sequence[int]
    ) -> None:
        if len(publications) == 1 and not declare:
            channel.publish(publications[0])
        elif publications:
            with channel.link.corked():
                for shard in declare:
                    self._declarations.request_shard(channel.channel, shard)
                for publication in publications:
                    channel.publish(publication)

    def _send_strays(self, channel: ConfirmChannel) -> None:
        strays, channel.log.strays = [*self._strays, *channel.log.strays], []
        self._strays.clear()
        now = time.monotonic()
        for number, publication in enumerate(strays):
            message = publication.message
            if publication.status is Status.REFUSED:
                if publication.refusals > len(REFUSAL_PAUSES):
                    logger.error(
                        "lost, since the broker refused it %d times (nack): %s",
                        publication.refusals,
                        message.what,
                    )
                    continue
                if now < publication.sent + REFUSAL_PAUSES[publication.refusals - 1]:
                    self._strays.append(publication)
                    continue
            elif publication.status is Status.RETURNED:
                if message.shard is None:
                    continue
                if not self._declarations.declare:
                    logger.error(
                        "lost: %s: %s",
                        message.what,
                        self._declarations.missing(f"queue {message.queue}"),
                    )
                    continue
                try:
                    self._declarations.check_limit()
                except errors.BackendUnavailable as exc:
                    full: Optional[errors.BackendUnavailable] = exc
                else:
                    full = self._room_refusal(channel, 1)
                if full is not None:
                    logger.error("lost: %s: %s", message.what, full)
                    continue
                self._declarations.request_shard(channel.channel, message.shard)
            try:
                channel.publish(publication)
            except BaseException:
                self._strays.extend(strays[number + (not publication.settled) :])
                raise

    def _keep_up(self, log: ConfirmLog) -> None:
        """Keep the number of unconfirmed messages limited, and the checking thread running."""
        if len(log) > MAX_UNCONFIRMED:
            # Only for half of them, so that the broker always has work.
            self._channel.wait(Waiter(log.unwaited()[: MAX_UNCONFIRMED // 2]))
        elif len(log) % COLLECT_EVERY == 0:
            self._channel.collect()
        if self._keeper is None and not self._closed.is_set():
            with self._lock:
                if self._keeper is None:
                    self._keeper = start_thread(self._keep, "confirms")

    def _wait_for_copies(self, delivery: Delivery) -> None:
        """Wait a moment for the confirms of live copies.

        A reader can then rely on having received the state. If an older copy is late, a third-party
        queue is stuck, and this does not wait.
        """
        if not any(publication.copying for publication in delivery.publications):
            return
        now = time.monotonic()
        with self._channel.present() as channel:
            late = channel is not None and channel.log.has_late_copy(now - COPY_SECONDS)
        if not late:
            self._channel.wait(Waiter(delivery.publications, copies=True), now + COPY_SECONDS)
        count = sum(publication.copying for publication in delivery.publications)
        for publication in delivery.publications:
            publication.waited = False
        if count:
            with self._lock:
                self.late_copies += count

    def _abandon(self, delivery: Delivery) -> None:
        """Stop waiting for *delivery*; its caller gets an error."""
        for publication in delivery.publications:
            publication.waited = False

    def _count(self, messages: Sequence[Outgoing], confirmed: bool) -> None:
        with self._lock:
            for message in messages:
                self.published_bytes += len(message.body)
                # Other messages are marks, and bodies of large results.
                if message.pushed is not None:
                    self.stored += 1
                    self.confirmed += confirmed

    def _pause_or_raise(
        self, exc: BaseException, messages: Sequence[Outgoing], tries: retry.Retry
    ) -> float:
        """Return the pause before the next try; raise if there must be none."""
        pause = tries.after(exc, time.monotonic())
        if isinstance(exc, errors.BackendUnavailable) and not isinstance(exc, errors.NotConfirmed):
            # Connecting retries on its own, by the same policy.
            raise exc
        if concerns(exc, messages):
            self._raise_refusal(exc, messages)
        if pause is None:
            raise errors.NotConfirmed(
                f"the broker at {self._connector.describe()} did not confirm {describe(messages)} "
                f"in {tries.failed} tries: {exc!r}"
            ) from exc
        return pause

    def _raise_refusal(self, exc: BaseException, messages: Sequence[Outgoing]) -> None:
        """Raise the error for *exc* if a retry cannot change it."""
        refusal = self._declarations.refusal(exc)
        if refusal is not None:
            raise refusal from exc
        limit = size_limit(exc)
        if limit is not None and messages:
            largest = max(messages, key=lambda message: len(message.body))
            too_large = errors.ResultTooLarge(
                f"{largest.what} has {len(largest.body)} bytes when encoded, and the broker at "
                f"{self._connector.describe()} takes messages of up to {limit} bytes "
                "(max_message_size in its rabbitmq.conf). Return less, set "
                "result_compression, or raise that limit."
            )
            too_large.size, too_large.limit = len(largest.body), limit
            raise too_large from exc
        if limit is None and is_refusal(exc):
            raise errors.BackendUnavailable(
                f"the broker at {self._connector.describe()} refuses {describe(messages)}: {exc}. "
                "Check the user's permissions on the exchange and the queues "
                f"{self._declarations.topology.prefix}.*, and on the default exchange (amq.default)"
            ) from exc

    def _forget_declarations(self) -> None:
        # The broker may have restarted without the declared objects.
        self._declarations.forget()

    # -- messages without a waiting caller ---------------------------------------------------

    def _adopt(self, publication: Publication) -> None:
        """Schedule a message from a lost connection for publishing again."""
        failure, message = publication.failure, publication.message
        limit = size_limit(failure)
        if limit is not None and len(message.body) > limit:
            logger.error(
                "%s is lost: it has %d bytes, and the broker takes up to %d",
                message.what,
                len(message.body),
                limit,
            )
            return
        self._strays.append(publication)

    def _has_strays(self) -> bool:
        with self._channel.present() as channel:
            return bool(self._strays or (channel is not None and channel.log.strays))

    def _keep(self) -> None:
        """Collect confirms without a waiting caller, until there are none for a while."""
        idle = 0
        while not self._closed.wait(CHECK_SECONDS):
            try:
                busy = self._check()
            except Exception as exc:
                busy = True
                logger.info("states that nobody waits for are not published yet: %r", exc)
            idle = 0 if busy else idle + 1
            if idle >= IDLE_CHECKS:
                break
        with self._lock:
            self._keeper = None

    def _check(self) -> bool:
        """Publish lost messages again; return whether anything is unconfirmed."""
        unconfirmed = self._channel.collect()
        if self._has_strays():
            unconfirmed = self._send([], time.monotonic()).unwaited()
        old = [p for p in unconfirmed if time.monotonic() - p.sent > CHECK_SECONDS]
        if old:
            # This closes the connection if no confirm comes for long.
            self._channel.wait(Waiter(old))
        return bool(unconfirmed) or self._has_strays()
