"""Opening connections to the broker, and telling why that fails.

kombu's ``Connection`` reads URLs, TLS settings and lists of hosts; what is opened is a py-amqp
connection. Nothing here knows what the connections are used for.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
import time
from typing import Any, Callable, Optional

import kombu
from amqp import exceptions as amqp_errors
from kombu.transport import pyamqp

from celery_amqp_results import errors, options
from celery_amqp_results.amqp.failures import CHANNELS, CONNECTIONS, TRANSIENT, is_refusal, limit_of
from celery_amqp_results.amqp.link import Link
from celery_amqp_results.amqp.slots import Slot, Slots
from celery_amqp_results.toolkit import retry
from celery_amqp_results.toolkit.bounded import OnceLogger
from celery_amqp_results.toolkit.interrupts import raise_if_from_signal_handler
from celery_amqp_results.toolkit.retry import is_over, time_left

__all__ = ("Connector", "LookupTries")

logger = logging.getLogger(__name__)

#: How long a new connection may take until it is open, in seconds, where the app sets nothing.
CONNECT_TIMEOUT = 4.0

#: Transport options that the backend must set itself: it waits for confirms itself, and its
#: look-ups need their own heartbeat.
_OVERRIDDEN = ("confirm_publish", "heartbeat")


def _override_transport_options(connection: kombu.Connection, name: str) -> None:
    """Give *connection* a name, and drop transport options that the backend must choose itself.

    kombu passes ``broker_transport_options`` on to py-amqp, where they win over everything else.
    """
    given = dict(connection.transport_options or {})
    for option in _OVERRIDDEN:
        given.pop(option, None)
    # As an attribute it can be shortened to the rest of a deadline.
    connection.connect_timeout = given.pop("connect_timeout", None) or connection.connect_timeout
    properties = dict(given.get("client_properties") or {})
    theirs = properties.get("connection_name")
    properties["connection_name"] = f"{theirs}: {name}" if theirs else name
    connection.transport_options = {**given, "client_properties": properties}


class _Connection(pyamqp.Connection):
    """kombu's class of AMQP connections, with two differences.

    It tries the addresses of a host itself. And it stays closed: py-amqp would connect again, with
    a warning, when a thread uses a connection that another one has dropped.
    """

    def _warn_force_connect(self, attr: str) -> None:
        raise amqp_errors.RecoverableConnectionError("the connection is closed")

    def Transport(self, *args: object, **kwargs: object) -> Any:
        """Return py-amqp's transport, which connects to one address at a time."""
        transport = super().Transport(*args, **kwargs)
        transport._connect = functools.partial(_connect_to_any, transport._connect)
        return transport


def _connect_to_any(connect: Callable[..., None], host: str, port: int, timeout: float) -> None:
    """Connect to the first address of *host* that answers.

    py-amqp would go on to the next address after any ``OSError``, also after one that a signal
    handler of the program raised.
    """
    found = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    for number, (*_, address) in enumerate(found, 1):
        try:
            connect(address[0], port, timeout)
        except OSError as exc:
            raise_if_from_signal_handler(exc)
            if number == len(found):
                raise
        else:
            return


class Connector:
    """Opens connections for one backend.

    Parameters:
        make: returns a new, not yet connected kombu connection; called with the heartbeat in
            seconds.
        describe: returns the broker's address without password, for messages.
        app_name: name of the app, which is part of the names of its connections.
        max_connections: how many may be open at once; ``None`` for any number.

    Thread-safe. Holds nothing that must not be used after a fork.
    """

    def __init__(
        self,
        make: Callable[[float], kombu.Connection],
        policy: options.RetryPolicy,
        describe: Callable[[], str],
        app_name: str = "celery",
        max_connections: Optional[int] = None,
    ) -> None:
        self._make = make
        self._app_name = app_name
        #: The connections that may be open at once.
        self.slots = Slots(max_connections)
        self.policy = policy
        self.describe = describe
        #: Number of the host that is tried first, counted over all rounds through the hosts.
        self._host = 0
        #: Logs repeated failures once.
        self._once = OnceLogger(logger)
        #: How many channels a connection may open, once the broker has refused one.
        self._max_channels: Optional[int] = None

    def _name(self, purpose: str) -> str:
        return f"{self._app_name} {os.getpid()}@{socket.gethostname()} ({purpose})"

    def mark_host_failed(self, link: Link) -> None:
        """Try other hosts first from now on, since *link* has failed.

        A node that is cut off from its cluster accepts connections, but does nothing on them.
        """
        if link.host == self._host:
            self._host += 1

    def restrict(self, link: Link) -> None:
        """Apply the broker's known channel limit to *link*."""
        if self._max_channels is not None:
            link.max_channels = self._max_channels

    def note_limit(self, exc: BaseException) -> None:
        """Open fewer channels from now on if *exc* says that there were too many.

        The limit applies to a user or a node, and includes the channels of other connections.
        """
        limit = limit_of(exc)
        if limit is not None and limit.what == CHANNELS:
            self._max_channels = max(2, (self._max_channels or limit.number) // 2)
            self._once.log(
                logging.WARNING,
                CHANNELS,
                "look-ups open at most %d channels at once from now on: %s",
                self._max_channels,
                exc,
            )

    def open_once(
        self, heartbeat: float, deadline: Optional[float] = None, purpose: str = "results"
    ) -> Link:
        """Open a connection, trying each host of the URL once, first the one that answered last.

        Parameters:
            heartbeat: seconds between heartbeats; 0 for none.
            deadline: time (``time.monotonic``) after which no further host is tried.
            purpose: what the connection is for, shown by the broker as part of its name.

        Raises:
            BackendUnavailable: when the broker refuses us, which ``__cause__`` explains, or when
                ``broker_pool_limit`` allows no further connection.
            OSError, amqp.AMQPError: when no host answers.
        """
        slot = Slot(purpose)
        try:
            self.slots.take(slot, deadline)
            link = self._open_counted(heartbeat, deadline, purpose)
            link.on_closed(functools.partial(self.slots.give_back, slot))
        except BaseException:
            self.slots.give_back(slot)
            raise
        self._once.forget(CONNECTIONS)
        return link

    def _open_counted(self, heartbeat: float, deadline: Optional[float], purpose: str) -> Link:
        connection = self._make(heartbeat)
        _override_transport_options(connection, self._name(purpose))
        hosts = max(1, len(connection.alt or ()))
        first = self._host
        for _ in range(first % hosts):
            connection.maybe_switch_next()
        for attempt in range(hosts):
            timeout = connection.connect_timeout or CONNECT_TIMEOUT
            connection.connect_timeout = max(0.1, time_left(deadline, timeout))
            try:
                # Connection.connect() would retry and log on its own: there is one policy, ours.
                transport = connection.transport
                transport.Connection = _Connection
                link = Link(connection, transport.establish_connection(), heartbeat)
            except TRANSIENT as exc:
                raise_if_from_signal_handler(exc)
                if is_refusal(exc):
                    raise errors.BackendUnavailable(
                        f"the broker at {self.describe()} refuses the result backend: {exc}. "
                        "Check user, password, virtual host and permissions in the result backend "
                        "URL."
                    ) from exc
                if attempt + 1 == hosts or is_over(deadline):
                    raise
                connection.maybe_switch_next()
                continue
            self._host = link.host = first + attempt
            return link
        raise AssertionError("unreachable")  # pragma: no cover

    def open(
        self, heartbeat: float, deadline: Optional[float] = None, purpose: str = "results"
    ) -> Link:
        """Open a connection as :meth:`open_once` does; retry as the retry policy says.

        Parameters:
            deadline: time (``time.monotonic``) after which to give up; the retry policy may end
                the tries earlier.

        Raises:
            BackendUnavailable: when the broker could not be reached, or refuses us.
        """
        tries = retry.Retry(self.policy)
        while True:
            try:
                link = self.open_once(heartbeat, deadline, purpose)
            except errors.BackendUnavailable:
                raise
            except TRANSIENT as exc:
                limited = self.is_limited(exc)
                if not retry.wait_before_retry(tries, exc, deadline):
                    raise self._unreachable(exc, tries.failed, limited) from exc
            else:
                return link

    def is_limited(self, exc: BaseException) -> bool:
        """Return whether *exc* is about a broker limit; log each limit once until it is over."""
        limit = limit_of(exc)
        if limit is None:
            return False
        self._once.log(
            logging.WARNING,
            CONNECTIONS,
            "the broker at %s allows no further connection, which is tried again: %s",
            self.describe(),
            exc,
        )
        return True

    def _unreachable(
        self, exc: BaseException, attempts: int, limited: bool
    ) -> errors.BackendUnavailable:
        if limited:
            return errors.BackendUnavailable(
                f"the broker at {self.describe()} allowed no further connection in {attempts} "
                f"tries: {exc}. Run fewer processes, or raise that limit."
            )
        return errors.BackendUnavailable(
            f"the broker at {self.describe()} cannot be reached after {attempts} "
            f"tries: {exc!r}. Is RabbitMQ running there, and is the result backend "
            "URL right?"
        )


class LookupTries:
    """The tries of one look-up, each on a connection that may be lost.

    Parameters:
        end: the look-up's time limit (``time.monotonic``).
        prefix: beginning of the names of the queues, for error messages.
    """

    def __init__(self, policy: options.RetryPolicy, end: float, prefix: str) -> None:
        self._tries = retry.Retry(policy, end)
        self._started = time.monotonic()
        self._prefix = prefix

    def wait(self, exc: BaseException, what: str) -> None:
        """Wait before the next try.

        Raises:
            BackendUnavailable: when the broker has refused it.
            LookupTimeout: when the time or the tries are used up.
        """
        pause = self._tries.after(exc, time.monotonic())
        if is_refusal(exc):
            raise errors.BackendUnavailable(
                f"the broker refused the read of {what}: {exc}. Check the user's permissions on "
                f"the queues {self._prefix}.*, and on the default exchange (amq.default)"
            ) from exc
        if pause is None:
            raise errors.LookupTimeout(
                f"{what} could not be read in {time.monotonic() - self._started:.1f} s: the "
                f"connection was lost {self._tries.failed} times, at last with {exc!r}"
            ) from exc
        logger.info("a look-up of %s is repeated after %r", what, exc)
        time.sleep(pause)
