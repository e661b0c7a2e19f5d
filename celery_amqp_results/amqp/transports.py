"""Channels to a broker of any kind that kombu knows, for the layout ``per-task``.

On AMQP they come from a :class:`~celery_amqp_results.amqp.pool.Pool`, with its heartbeats and
retries. On every other transport kombu's own connections are lent out, one user at a time: none of
these may be used by two threads at once.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import threading
from typing import Any, Callable, ContextManager, Deque, Iterator, Optional, Protocol, Tuple, Type

import kombu
from amqp import exceptions as amqp_errors

from celery_amqp_results import errors
from celery_amqp_results.amqp import connections
from celery_amqp_results.amqp.confirms import wait_for_answers
from celery_amqp_results.amqp.failures import TRANSIENT
from celery_amqp_results.amqp.link import Link
from celery_amqp_results.amqp.pool import Pool
from celery_amqp_results.toolkit import retry

__all__ = (
    "AMQPSession",
    "AMQPSessions",
    "KombuSessions",
    "Session",
    "Sessions",
    "is_amqp",
    "transport_name",
)

#: What kombu calls its AMQP transports; ``librabbitmq`` is another library, and none of ours.
_AMQP_TRANSPORTS = frozenset(
    {
        "amqp",
        "amqps",
        "pyamqp",
        "pyamqps",
        "kombu.transport.pyamqp:Transport",
        "kombu.transport.pyamqp.Transport",
        "kombu.transport.pyamqp:SSLTransport",
        "kombu.transport.pyamqp.SSLTransport",
    }
)

#: The transport whose queues live in the process.
MEMORY = "memory"


def transport_name(connection: kombu.Connection) -> str:
    """Return the name of *connection*'s transport in a URL. Does no I/O."""
    found = connection.transport_cls
    if isinstance(found, str):
        return found
    return f"{found.__module__}:{found.__name__}"


def is_amqp(connection: kombu.Connection) -> bool:
    """Return whether *connection* speaks AMQP through py-amqp. Does no I/O."""
    return transport_name(connection) in _AMQP_TRANSPORTS


class Session(Protocol):
    """The access that an operation has to the broker. For one thread, until the operation ends."""

    @property
    def channel(self) -> Any:
        """An open kombu channel; a new one where the broker has closed the last."""

    def confirm(self, channel: Any) -> None:
        """Have publishing on *channel* wait for the broker's confirm, where there are confirms."""


class Sessions(Protocol):
    """Lends channels. Thread-safe; made anew after a fork."""

    #: Whether the broker speaks AMQP: it confirms, tells whether a queue exists, and keeps the
    #: place of a message that is put back.
    amqp: bool
    #: Whether all who use the broker are in this process.
    local: bool
    #: The errors of a lost connection or a failed operation.
    errors: Tuple[Type[Exception], ...]

    def session(self, deadline: Optional[float] = None) -> ContextManager[Session]:
        """Lend a session for a ``with`` block; one on which the block raises is closed.

        Parameters:
            deadline: time (``time.monotonic``) after which connecting is given up.

        Raises:
            BackendUnavailable: when the broker cannot be reached, or refuses us.
        """

    def close(self) -> None:
        """Close all connections that are not in use."""


class AMQPSession(Session):
    """A session on an AMQP connection."""

    def __init__(self, link: Link) -> None:
        self._link = link

    @property
    def channel(self) -> Any:
        """The open channel."""
        # Number 1 is the same channel each time that this connection is lent, until the broker
        # closes it: opening one takes longer than reading a message.
        return self._link.amqp.channel(1)

    def confirm(self, channel: Any) -> None:
        """Have publishing on *channel* wait for the confirm."""
        # py-amqp before 5.4 opens a channel again that the broker has closed, and then takes it
        # for one that still confirms.
        channel.confirm_select(nowait=True)
        channel.basic_publish = functools.partial(self._publish, channel)

    def _publish(self, channel: Any, *args: Any, **kwargs: Any) -> None:
        """Publish and wait for the confirm, also through an alarm, in which py-amqp gives up."""
        link, answers = self._link, []
        channel.events["basic_ack"] = {lambda *_: answers.append(True)}
        channel.events["basic_nack"] = {lambda *_: answers.append(False)}
        link.keep_unsent()
        channel._basic_publish(*args, **kwargs)
        try:
            wait_for_answers(
                link,
                lambda: bool(answers),
                lambda: link.drain(0.0),
                lambda: link.bytes_sent,
            )
        except errors.NotConfirmed as exc:
            raise amqp_errors.RecoverableConnectionError(str(exc)) from exc
        if not answers[0]:
            raise amqp_errors.MessageNacked


class AMQPSessions:
    """Sessions on AMQP connections."""

    amqp = True
    local = False
    errors = TRANSIENT

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @contextlib.contextmanager
    def session(self, deadline: Optional[float] = None) -> Iterator[Session]:
        """Lend a session."""
        with self._pool.link(deadline) as link:
            yield AMQPSession(link)

    def close(self) -> None:
        """Close all connections that are not in use."""
        self._pool.close()


class _KombuSession(Session):
    def __init__(self, connection: kombu.Connection) -> None:
        self.connection = connection

    @property
    def channel(self) -> Any:
        return self.connection.default_channel

    def confirm(self, channel: Any) -> None:
        pass


class KombuSessions:
    """Sessions on connections of any kombu transport.

    Parameters:
        make: returns a new, not yet connected kombu connection.
        connector: tells how connecting is retried, and the address for messages.
    """

    amqp = False

    def __init__(
        self, make: Callable[[], kombu.Connection], connector: connections.Connector
    ) -> None:
        self._make = make
        self._connector = connector
        sample = make()
        self.local = transport_name(sample) in (MEMORY, "kombu.transport.memory:Transport")
        # The transports list their errors; any that does I/O may also raise an OSError.
        self._losses: Tuple[Type[Exception], ...] = (
            *sample.connection_errors,
            kombu.exceptions.OperationalError,
            OSError,
        )
        self.errors: Tuple[Type[Exception], ...] = (*sample.channel_errors, *self._losses)
        self._lock = threading.Lock()
        self._idle: Deque[kombu.Connection] = collections.deque()
        self._closed = False

    @contextlib.contextmanager
    def session(self, deadline: Optional[float] = None) -> Iterator[Session]:
        """Lend a session, see :class:`Sessions`."""
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is None:
            connection = self._open(deadline)
        try:
            yield _KombuSession(connection)
        except BaseException as exc:
            _release(connection)
            if isinstance(exc, self._losses):
                # The server may have restarted: the next try would take another lost one.
                self._release_idle()
            raise
        with self._lock:
            if not self._closed:
                self._idle.append(connection)
                return
        _release(connection)

    def _release_idle(self) -> None:
        with self._lock:
            idle, self._idle = list(self._idle), collections.deque()
        for connection in idle:
            _release(connection)

    def _open(self, deadline: Optional[float]) -> kombu.Connection:
        tries = retry.Retry(self._connector.policy)
        while True:
            connection = self._make()
            try:
                connection.connect()
                return connection
            except self.errors as exc:
                _release(connection)
                if not retry.wait_before_retry(tries, exc, deadline):
                    raise errors.BackendUnavailable(
                        f"the broker at {self._connector.describe()} cannot be reached after "
                        f"{tries.failed} tries: {exc!r}"
                    ) from exc

    def close(self) -> None:
        """Close all connections that are not in use."""
        with self._lock:
            self._closed = True
        self._release_idle()


def _release(connection: kombu.Connection) -> None:
    with contextlib.suppress(Exception):
        connection.release()
