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

import logging
import threading
import time
from typing import Callable, Optional, Sequence, TypeVar

from celery_amqp_results import errors
from celery_amqp_results.amqp import connections
from celery_amqp_results.amqp.confirm_log import ConfirmLog, Outgoing, Publication, Status
from celery_amqp_results.amqp.confirms import ConfirmChannel, LostInAlarm, QueueLength
from celery_amqp_results.amqp.declarations import Declarations, declare_queue
from celery_amqp_results.amqp.failures import TRANSIENT, was_refused
from celery_amqp_results.amqp.turns import Waiter
from celery_amqp_results.protocol.names import QueueSpec
from celery_amqp_results.store.delivery import (
    Delivery,
    Verdict,
    describe,
    raise_if_final,
    raise_not_confirmed,
)
from celery_amqp_results.store.unwaited import Unwaited
from celery_amqp_results.toolkit import retry
from celery_amqp_results.toolkit.interrupts import raise_if_from_signal_handler

__all__ = ("Outgoing", "Publisher", "QueueLength")

logger = logging.getLogger(__name__)

#: Seconds that :meth:`Publisher.publish` waits for the confirms of live copies, and once more after
#: the broker has routed them. A stuck third-party queue must not delay results.
COPY_SECONDS = 0.25

#: Each time after this many refused tries, a message goes over another connection, if the present
#: one is older than :data:`REFUSED_SECONDS`. A channel of RabbitMQ 3.10 that has met a quorum queue
#: without a leader refuses everything for that queue, also when it has one again.
REFUSED_TRIES = 4
REFUSED_SECONDS = 3.0

#: Seconds before messages are published again that were lost in an alarm of the broker. Storing
#: waits for its end, however long it takes.
ALARM_SECONDS = 1.0

#: Seconds that an ending process waits for confirms.
FLUSH_SECONDS = 10.0

_T = TypeVar("_T")


class Publisher:
    """Publishes messages on one connection.

    Parameters:
        plain: whether messages that no caller waits for are published without confirms.

    Thread-safe. After a fork the child must make a new publisher.

    Raises:
        DeclarationRefused: when the exchange or a queue exists with other properties, or is missing
            and must not be declared here; this and the following in all methods.
        ResultTooLarge: when the broker refuses a message of this size.
        BackendUnavailable: when the broker could not be reached or refuses us; the messages may or
            may not be stored then.
    """

    def __init__(
        self, connector: connections.Connector, declarations: Declarations, plain: bool = False
    ) -> None:
        self._connector = connector
        self._declarations = declarations
        self._plain = plain
        self._unwaited = Unwaited(connector, declarations, plain)
        self._channel = self._unwaited.channel
        # Guards the counts.
        self._lock = threading.Lock()
        #: Counts of published messages, see :class:`~celery_amqp_results.metrics.Metrics`.
        self.stored = 0
        self.confirmed = 0
        self.published_bytes = 0
        self.large = 0
        self.retried = 0
        self.refused = 0
        self.failed = 0
        self.late_copies = 0

    @property
    def lost(self) -> int:
        """Messages without a waiting caller that the broker does not take."""
        return self._unwaited.strays.lost

    # -- requests ----------------------------------------------------------------------------

    def publish(self, messages: Sequence[Outgoing], confirm: bool = True) -> None:
        """Publish *messages*, in order, and wait for their confirms together.

        Retried by the retry policy when the connection is lost; a message may then be on the broker
        twice.

        Parameters:
            confirm: whether to wait for the confirms. This includes those of live copies, for a
                moment.
        """
        self._deliver(Delivery(messages), confirm)

    def publish_apart(self, queue: QueueSpec, message: Outgoing) -> None:
        """Declare *queue*, publish *message* to it, and return when the broker has it."""
        self._declare((queue,), message)
        self._publish_to_declared((queue,), message)
        with self._lock:
            self.large += 1

    def publish_to(self, queues: Sequence[QueueSpec], message: Outgoing) -> None:
        """Publish *message*, and declare *queues* first if its own queue does not exist.

        Returns when the broker has the message.
        """
        delivery = Delivery((message,))
        self._deliver(delivery, True)
        if not delivery.gone:
            return
        if not self._declarations.declare:
            raise self._declarations.missing(f"queue {message.queue!r}")
        self._declare(queues, message)
        self._publish_to_declared(queues, message)

    def _declare(self, queues: Sequence[QueueSpec], message: Outgoing) -> None:
        def declare(channel: ConfirmChannel) -> None:
            for queue in queues:
                declare_queue(channel.channel, queue)

        self._ask(declare, (message,))

    def _publish_to_declared(self, queues: Sequence[QueueSpec], message: Outgoing) -> None:
        """Publish *message*; declare *queues* again each time its queue is not there.

        Another client may delete it after the declaration.
        """
        tries = retry.Retry(self._connector.policy)
        while True:
            delivery = Delivery((message,))
            self._deliver(delivery, True)
            if not delivery.gone:
                return
            gone = errors.NotConfirmed(f"the queue {message.queue!r} was deleted meanwhile")
            pause = self._pause_or_raise(gone, (message,), tries)
            self._warn(delivery.messages, pause, tries, gone)
            time.sleep(pause)
            self._declare(queues, message)

    def length(self, queue: str) -> Optional[QueueLength]:
        """Return the present length of *queue*, or ``None`` if it does not exist."""
        return self._ask(lambda channel: channel.length(queue))

    def delete(self, queues: Sequence[str]) -> None:
        """Delete *queues* and everything in them; they need not exist."""

        def work(channel: ConfirmChannel) -> None:
            for queue in queues:
                channel.channel.queue_delete(queue)

        self._ask(work)

    def close(self) -> None:
        """Wait for outstanding confirms, and close the connection."""
        self._unwaited.close(FLUSH_SECONDS)

    # -- delivering --------------------------------------------------------------------------

    def _deliver(self, delivery: Delivery, confirm: bool) -> None:
        """Publish the unsent messages of *delivery*; retry as the policy says."""
        tries = retry.Retry(self._connector.policy)
        for publication in delivery.publications:
            publication.plain = self._plain and not confirm
        verdict = delivery.judge()
        while True:
            try:
                failure = self._attempt(delivery, verdict, confirm)
                if failure is None and (not confirm or self._finish(delivery)):
                    break
                verdict = delivery.judge()
                failure = failure or verdict.failure
                if failure is not None:
                    # The exchange may have been deleted: the broker reports that after the message.
                    self._declarations.forget()
                self._prepare(delivery, verdict, failure, tries)
            except BaseException:
                # The caller gets an error, and waits no longer.
                for publication in delivery.publications:
                    publication.waited = False
                raise
        self._count(delivery.messages, confirm)

    def _attempt(
        self, delivery: Delivery, verdict: Verdict, confirm: bool
    ) -> Optional[BaseException]:
        """Publish once, and wait if *confirm* says so; return the error if that fails."""
        unknown = delivery.choose_copies(verdict, confirm, self._declarations.knows)
        try:
            if unknown and self._declarations.declare:
                verdict.declare.extend(self._missing(unknown))
        except TRANSIENT as exc:
            raise_if_from_signal_handler(exc)
            return exc
        if verdict.declare and not confirm:
            self._declarations.check_limit()
        try:
            log = self._send(verdict.again, verdict.declare, confirm)
            if confirm:
                # States stored earlier must be confirmed as well: they may be of the same task.
                self._channel.wait(Waiter([*delivery.publications, *log.unwaited()]))
            else:
                self._unwaited.keep_up(log)
        except TRANSIENT as exc:
            raise_if_from_signal_handler(exc)
            return exc
        return None

    def _missing(self, shards: Sequence[int]) -> Sequence[int]:
        """Return those of *shards* to declare.

        A declaration of many shards is checked against limits, which costs the broker far more than
        a question about the queue.
        """
        topology = self._declarations.topology
        if self._declarations.few:
            return shards
        missing = []
        with self._channel.open(time.monotonic()) as channel:
            for shard in shards:
                if channel.length(topology.shard_queue(shard).name) is None:
                    missing.append(shard)
                else:
                    self._declarations.remember(shard)
        return missing

    def _finish(self, delivery: Delivery) -> bool:
        """Complete a confirmed delivery with its live copies; return whether that was possible.

        The connection may be lost meanwhile, together with some of the copies.
        """
        if not delivery.done:
            return False
        for publication in delivery.publications:
            shard = publication.message.shard
            if publication.status is Status.CONFIRMED and not self._declarations.knows(shard):
                assert shard is not None
                self._declarations.remember(shard)
        held = delivery.held_copies()
        if held:
            self._send_copies(held)
        self._wait_for_copies(delivery)
        return delivery.done

    def _send_copies(self, held: Sequence[Publication]) -> None:
        try:
            with self._channel.open(time.monotonic(), lambda: False) as channel:
                for publication in held:
                    channel.publish_copy(publication)
        except TRANSIENT as exc:
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
                names = sorted({p.message.queue for p in verdict.again})
                raise self._declarations.missing(f"queue {', '.join(names)}")
            # A shard begins when the first message to it comes back.
            self._declarations.check_limit()
            logger.info("a shard queue is declared, since it is not there: %s", returned)
            return
        if failure is None and verdict.refused:
            refused = describe([p.message for p in verdict.refused])
            failure = errors.NotConfirmed(f"the broker refused to take (nack) {refused}")
        elif failure is None:
            failure = errors.NotConfirmed(f"no queue takes {returned}")
        try:
            pause = self._pause_or_raise(failure, delivery.messages, tries)
        except Exception as final:
            with self._lock:
                if not isinstance(final, errors.NotConfirmed) and was_refused(final):
                    self.refused += 1
                else:
                    self.failed += 1
            raise
        self._warn(delivery.messages, pause, tries, failure)
        time.sleep(pause)
        if verdict.refused and tries.failed % REFUSED_TRIES == 0:
            self._channel.renew(REFUSED_SECONDS)

    def _warn(
        self, messages: Sequence[Outgoing], pause: float, tries: retry.Retry, failure: BaseException
    ) -> None:
        logger.warning(
            "%s was not published, trying again in %.1f s [%d/%s]: %r",
            describe(messages),
            pause,
            tries.failed,
            self._connector.policy.max_retries,
            failure,
        )

    def _pause_or_raise(
        self, exc: BaseException, messages: Sequence[Outgoing], tries: retry.Retry
    ) -> float:
        """Return the pause before the next try; raise if there must be none."""
        if isinstance(exc, LostInAlarm):
            pause: Optional[float] = ALARM_SECONDS
        else:
            pause = tries.after(exc, time.monotonic())
        broker = self._connector.describe()
        raise_if_final(exc, messages, broker, self._declarations)
        if pause is None:
            raise_not_confirmed(exc, messages, broker, tries.failed)
        with self._lock:
            self.retried += 1
        return pause

    def _ask(self, work: Callable[[ConfirmChannel], _T], messages: Sequence[Outgoing] = ()) -> _T:
        """Run *work*, which sends the broker a request; retry as the policy says.

        *messages* are named in errors.
        """
        tries = retry.Retry(self._connector.policy)
        while True:
            try:
                with self._channel.open(time.monotonic()) as channel:
                    return work(channel)
            except TRANSIENT as exc:
                self._declarations.forget()
                pause = self._pause_or_raise(exc, messages, tries)
                logger.info("a request about queues is repeated after %r", exc)
                time.sleep(pause)

    def _send(
        self, publications: Sequence[Publication], declare: Sequence[int], waited: bool
    ) -> ConfirmLog:
        """Write *publications*, and lost messages that no caller waits for; return the log."""
        declarations = self._declarations

        def asks() -> bool:
            return not declarations.exchange_checked or bool(declare and not declarations.few)

        try:
            with self._channel.open(time.monotonic(), asks) as channel:
                declarations.ensure_exchange(channel.channel)
                self._unwaited.send(channel)
                full = declarations.check_room(channel.asking, len(declare))
                if full is None:
                    self._write(channel, publications, declare)
                    if not waited:
                        for shard in declare:
                            declarations.remember(shard)
                        for publication in publications:
                            publication.waited = False
                    return channel.log
        except BaseException:
            # The broker may have restarted without the declared objects.
            declarations.forget()
            raise
        raise full

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
                    # On the channel of the declarations, so that it comes after them.
                    publication.plain = publication.plain and not declare
                    channel.publish(publication)

    def _wait_for_copies(self, delivery: Delivery) -> None:
        """Wait until the broker has routed the live copies, and a moment for their confirms.

        A reader can then rely on having received the state. A slow connection may take long to
        carry the copies. If an older one was routed and is late, a third-party queue is stuck, and
        this does not wait for confirms.
        """
        copies = [publication for publication in delivery.publications if publication.copying]
        if not copies:
            return
        now = time.monotonic()
        with self._channel.present() as channel:
            late = channel is not None and channel.log.has_late_copy(now - COPY_SECONDS)
        confirmed = Waiter(copies, lambda publication: not publication.copying)
        if not late:
            self._channel.wait(confirmed, now + COPY_SECONDS)
        if not confirmed.done and self._ask_about_copies():
            self._channel.wait(Waiter(copies, lambda publication: publication.routed))
            if not late:
                self._channel.wait(confirmed, time.monotonic() + COPY_SECONDS)
        if delivery.done:
            for publication in delivery.publications:
                publication.waited = False
        count = sum(publication.copying for publication in copies)
        if count:
            with self._lock:
                self.late_copies += count

    def _ask_about_copies(self) -> bool:
        """Request an answer that follows the live copies; return whether that was possible."""
        try:
            with self._channel.open(time.monotonic(), lambda: False) as channel:
                channel.ask_about_copies()
        except TRANSIENT as exc:
            raise_if_from_signal_handler(exc)
            # The connection is lost, and the copies with it.
            return False
        return True

    def _count(self, messages: Sequence[Outgoing], confirmed: bool) -> None:
        with self._lock:
            for message in messages:
                self.published_bytes += len(message.body)
                # Other messages are marks, and bodies of large results.
                if message.pushed is not None:
                    self.stored += 1
                    self.confirmed += confirmed
