"""The result queues of tasks on a broker: declaring them, publishing to them, deleting them.

On other transports than AMQP the guarantees depend on the transport. ``memory://`` is exact: all
its users are in the process. With others, such as ``filesystem://``, a process that is killed while
it holds a message loses it, unless the transport restores it; and nothing expires. kombu writes its
files in more than one step, and names those of one millisecond in no order: a reader in another
process can meet half a message, and two states stored at once can change places.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Type, TypeVar

import kombu
from amqp import exceptions as amqp_errors
from kombu.transport.virtual.base import NotEquivalentError

from celery_amqp_results import errors, options
from celery_amqp_results.amqp import connections, transports
from celery_amqp_results.amqp.failures import is_refusal
from celery_amqp_results.per_task.wire import COUNT_HEADERS, NoCacheQueue, Wire
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.toolkit import retry
from celery_amqp_results.toolkit.bounded import OnceLogger

__all__ = ("TaskQueues",)

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class _Locks:
    """A lock for each name in use."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all locks: after a fork, their holders are not in this process."""
        self._guard = threading.Lock()
        self._entries: Dict[str, List[Any]] = {}

    @contextlib.contextmanager
    def hold(self, name: str, timeout: float) -> Iterator[None]:
        """Hold the lock *name*, or raise LookupTimeout after *timeout* seconds."""
        with self._guard:
            entry = self._entries.setdefault(name, [threading.Lock(), 0])
            entry[1] += 1
        try:
            if not entry[0].acquire(timeout=max(0.0, timeout)):
                raise errors.LookupTimeout(
                    f"the result queue {name} is being read by another thread for more than "
                    f"{timeout:g} seconds"
                )
            try:
                yield
            finally:
                entry[0].release()
        finally:
            with self._guard:
                entry[1] -= 1
                if not entry[1]:
                    self._entries.pop(name, None)


#: By queue name. Per process, since two apps in it may read the same queue, for example a test and
#: the worker that it runs in a thread.
_locks = _Locks()
os.register_at_fork(after_in_child=_locks.reset)


class _TransientQueueRefused(Exception):
    """Raised when the broker does not permit transient queues; it has closed the connection."""


class TaskQueues:
    """The queues of tasks on one broker. Thread-safe. Does no I/O until it is used."""

    def __init__(
        self,
        sessions: transports.Sessions,
        connector: connections.Connector,
        wire: Wire,
        settings: options.Options,
    ) -> None:
        self.sessions = sessions
        self.connector = connector
        self.wire = wire
        #: Whether the backend was closed.
        self.closed = False
        #: Damaged or foreign messages, counted at each encounter.
        self.rejected = 0
        self._settings = settings
        self._exchange_declared = False
        self._transient_queues = not wire.persistent
        self._once = OnceLogger(logger)

    def run(
        self,
        failure: str,
        operation: Callable[[transports.Session], _T],
        deadline: Optional[float] = None,
    ) -> _T:
        """Run an operation with a channel, and retry as the policy says.

        Parameters:
            failure: what has failed, for the error.
            operation: called with a session; it may be called several times.
            deadline: time (``time.monotonic``) after which there is no other try.

        Raises:
            BackendUnavailable: when the broker cannot be reached, or refuses us.
        """
        tries = retry.Retry(self._settings.retry_policy)
        while True:
            try:
                with self.sessions.session(deadline) as session:
                    return operation(session)
            except _TransientQueueRefused:
                continue
            except (errors.BackendUnavailable, errors.DeclarationRefused):
                raise
            except self.sessions.errors as exc:
                # The broker may have restarted without the exchange.
                self._exchange_declared = False
                if is_refusal(exc) or not retry.wait_before_retry(tries, exc, deadline):
                    if isinstance(exc, amqp_errors.MessageNacked):
                        raise errors.NotConfirmed(
                            f"{failure}: the broker refused to take (nack) it {tries.failed} "
                            f"times, at {self.connector.describe()}"
                        ) from exc
                    raise errors.BackendUnavailable(
                        f"{failure}, after {max(1, tries.failed)} tries at "
                        f"{self.connector.describe()}: {exc!r}"
                    ) from exc

    def hold(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Keep other threads of this process from the queue *name* for a ``with`` block."""
        return _locks.hold(name, self._settings.lookup_timeout)

    @property
    def missing(self) -> Tuple[Type[Exception], ...]:
        """The errors of an operation on a queue that does not exist."""
        return (amqp_errors.NotFound if self.sessions.amqp else amqp_errors.ChannelError,)

    def note_damage(self, queue: str, why: Exception) -> None:
        """Count a message that is damaged or not ours; log it unless the same was logged."""
        self.rejected += 1
        text = f"ignored a foreign or damaged message in {queue}: {why}"
        self._once.log(logging.WARNING, text, "%s", text)

    # -- declaring ---------------------------------------------------------------------------------

    def declare_exchange(self, session: transports.Session) -> None:
        """Declare the exchange, unless this process has."""
        if self._exchange_declared:
            return
        try:
            self.wire.exchange_entity()(session.channel).declare()
        except (amqp_errors.PreconditionFailed, NotEquivalentError) as exc:
            self._once.log(
                logging.WARNING,
                "exchange",
                "the exchange %r differs from the one wanted here, and is used as it is; give all "
                "apps the same result_exchange_type and result_persistent: %s",
                self.wire.exchange,
                exc,
            )
        self._exchange_declared = True

    def _declare(self, session: transports.Session, task_id: str) -> None:
        self.declare_exchange(session)
        transient = self._transient_queues
        queue = self.wire.queue_entity(task_id, durable=not transient)
        try:
            queue(session.channel).queue_declare()
        except amqp_errors.PreconditionFailed as exc:
            self._use_other(session, queue, exc)
        except amqp_errors.InternalError as exc:
            if not transient:
                raise
            self._transient_queues = False
            self._once.log(
                logging.WARNING,
                "transient",
                "the broker refuses transient queues: results that need not be kept "
                "(result_persistent = False) are transient messages in durable queues: %s",
                exc,
            )
            raise _TransientQueueRefused from exc
        queue(session.channel).queue_bind()

    def _use_other(
        self, session: transports.Session, queue: NoCacheQueue, exc: amqp_errors.PreconditionFailed
    ) -> None:
        """Accept a queue that exists with other properties."""
        try:
            queue(session.channel).queue_declare(passive=True)
        except amqp_errors.NotFound:
            raise errors.DeclarationRefused(
                f"the broker refuses the result queue {queue.name}: {exc}. Check the settings "
                "result_expires and result_persistent."
            ) from exc
        self._once.log(
            logging.WARNING,
            "queue",
            "result queues exist that differ from the ones wanted here, and are used as they "
            "are; give all apps the same result_expires and result_persistent: %s",
            exc,
        )

    # -- publishing and deleting -------------------------------------------------------------------

    def store(self, state: StateMessage) -> None:
        """Put *state* into the queue of its task or group, and return when it is confirmed."""
        name = self.wire.rkey(state.id)
        properties = {
            "content_type": state.content_type,
            "content_encoding": state.content_encoding,
            "delivery_mode": self.wire.delivery_mode,
            "correlation_id": state.id,
        }

        def put(session: transports.Session) -> None:
            self._declare(session, state.id)
            returned = self._publish(session, self.wire.exchange, name, state.body, properties)
            if returned:
                # The queue has gone with a consumer of Celery 4 that ended after our declaration.
                raise amqp_errors.RecoverableChannelError(f"no queue took the message: {returned}")

        # On other transports a message that is put back goes to the end of its queue, and must not
        # end up behind a newer one.
        order = contextlib.nullcontext() if self.sessions.amqp else self.hold(name)
        with order:
            self.run(f"the {state.state} of {state.id} cannot be stored", put)

    def replace(self, session: transports.Session, name: str, message: kombu.Message) -> None:
        """Put a copy of *message* at the end of its queue *name*, and acknowledge the original."""
        properties = {
            key: value for key, value in message.properties.items() if key != "application_headers"
        }
        properties["content_type"] = message.content_type
        properties["content_encoding"] = message.content_encoding
        properties["headers"] = {k: v for k, v in message.headers.items() if k not in COUNT_HEADERS}
        self._publish(session, "", name, message.body, properties)
        # If no queue took the copy, the queue is gone, and so is the original.
        message.ack()

    def _publish(
        self,
        session: transports.Session,
        exchange: str,
        name: str,
        body: bytes,
        properties: Dict[str, object],
    ) -> str:
        """Publish to the queue *name* and wait; return the broker's reason if no queue took it."""
        channel = session.channel
        producer = kombu.Producer(channel, auto_declare=False)
        properties = {**properties, "exchange": exchange, "routing_key": name}
        if not self.sessions.amqp:
            producer.publish(body, **properties)
            return ""
        returned: List[str] = []
        channel.events["basic_return"] = {lambda exc, *_: returned.append(str(exc))}
        if self._settings.confirm:
            session.confirm(channel)
        try:
            producer.publish(body, mandatory=True, **properties)
        except amqp_errors.PreconditionFailed as exc:
            raise errors.ResultTooLarge(
                f"the broker refuses a message of {len(body)} bytes for the queue {name}: {exc}. "
                "Its limit is the setting max_message_size."
            ) from exc
        return returned[0] if returned else ""

    def delete(self, name: str) -> None:
        """Delete the queue *name*, if it exists."""

        def delete(session: transports.Session) -> None:
            with self.hold(name):
                self._delete(session, name)

        self.run("results cannot be deleted", delete)

    def _delete(self, session: transports.Session, name: str) -> None:
        if not self.sessions.amqp:
            try:
                session.channel.queue_declare(queue=name, passive=True)
            except self.missing:
                return
            # Deleting deletes only what this process has bound.
            session.channel.queue_purge(name)
        session.channel.queue_delete(queue=name)
        if self.sessions.local:
            # The routing table of the exchange would keep the queue.
            session.channel.queue_unbind(name, self.wire.exchange, name)
