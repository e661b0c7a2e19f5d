"""Opening connections to the broker, keeping idle ones for reuse, and telling errors apart.

kombu's ``Connection`` reads URLs, TLS settings and lists of hosts; what is opened is a py-amqp
connection. Nothing here knows what the connections are used for.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import os
import socket
import struct
import threading
import time
import weakref
from typing import Any, Callable, Deque, Dict, Iterator, List, Optional, Tuple

import amqp
import kombu
from amqp import exceptions as amqp_errors
from amqp import spec
from kombu.transport import pyamqp

from celery_amqp_results import errors, options
from celery_amqp_results.amqp import frames, retry, sockets
from celery_amqp_results.amqp.failures import (
    CHANNELS,
    CONNECTIONS,
    TRANSIENT,
    is_refusal,
    limit_of,
    raise_if_from_signal_handler,
)
from celery_amqp_results.amqp.once import OnceLogger
from celery_amqp_results.amqp.retry import is_over, time_left
from celery_amqp_results.amqp.threads import start_thread

__all__ = (
    "TRANSIENT",
    "Connector",
    "Link",
    "LookupTries",
    "Pool",
    "channel_nowait",
    "is_over",
    "is_refusal",
    "limit_of",
    "raise_if_from_signal_handler",
    "time_left",
)

logger = logging.getLogger(__name__)

#: How long a new connection may take until it is open, in seconds, where the app sets nothing.
CONNECT_TIMEOUT = 4.0

#: How long a single read or write on an open connection may take, in seconds.
IO_TIMEOUT = 10.0

#: How many bytes are read from a socket at once.
RECEIVE_SIZE = 64 * 1024

#: The frame of a ``basic.ack``: type, channel, size, class, method, delivery tag, multiple, end.
_ACK = struct.Struct(">BHIHHQBB")
_START_OF_ACK = struct.Struct(">BHIHH")
_METHOD_FRAME = 1
#: Bytes of class, method, tag and multiple.
_SIZE_OF_ACK = 13

#: An idle connection of a pool is closed after this many seconds.
IDLE_SECONDS = 60.0

#: A user that has had a connection for this many seconds waits for something that may take long,
#: such as a shard that a frozen process holds. Its connection no longer counts against the limit
#: of the pool, so that other users need not wait for it.
STUCK_SECONDS = 2.0
#: At most this many connections do not count.
MAX_STUCK = 8


class _Received:
    """Reads from a socket in large pieces, for a py-amqp transport that reads in small ones.

    py-amqp reads the socket three times for each frame and releases the GIL each time. While
    another thread computes, each read would wait for one 5 ms switch interval.
    """

    def __init__(self, transport: Any) -> None:
        self._receive = transport._quick_recv
        self._data = b""
        self._at = 0
        transport._quick_recv = self

    def __call__(self, size: int) -> bytes:
        """Return some bytes, at most *size*; none at the end of the stream."""
        if self._at >= len(self._data):
            if size >= RECEIVE_SIZE:
                return bytes(self._receive(size))
            self._data = self._receive(RECEIVE_SIZE)
            self._at = 0
        piece = self._data[self._at : self._at + size]
        self._at += len(piece)
        return piece

    def pending(self) -> bool:
        """Return whether received bytes are buffered."""
        return self._at < len(self._data)

    def fill(self) -> None:
        """Read more bytes from the socket, unless received bytes are buffered."""
        if not self.pending():
            self._data = self._receive(RECEIVE_SIZE)
            self._at = 0

    def take(self, start: bytes, size: int) -> bytes:
        """Return the next *size* bytes if they are buffered and begin with *start*, or none."""
        at = self._at
        if not self._data.startswith(start, at) or len(self._data) - at < size:
            return b""
        self._at += size
        return self._data[at : at + size]

    def delivery(self) -> Optional[frames.Delivery]:
        """Return the next buffered message if it is complete, without consuming it."""
        return frames.read_delivery(self._data, self._at)

    def skip(self, end: int) -> None:
        """Consume the message that :meth:`delivery` returned."""
        self._at = end


class Link:
    """One open AMQP connection. Not thread-safe: one user at a time.

    Parameters:
        connection: kombu's connection, which knows the broker.
        established: the open connection that it made.
        heartbeat: seconds between heartbeats; 0 for none.
    """

    def __init__(
        self, connection: kombu.Connection, established: amqp.Connection, heartbeat: float
    ) -> None:
        # py-amqp's connection refers to kombu's weakly in places; keep it as long as ours.
        self._kombu = connection
        self.amqp = established
        #: For waiting until it is readable. Kept here, since py-amqp would reconnect when asked for
        #: the socket of a lost connection.
        self.socket = established.transport.sock
        self.heartbeat = heartbeat
        #: Why the broker blocks publishers on this connection, or ``None`` while it does not.
        self.blocked: Optional[str] = None
        self.idle_since = 0.0
        #: Which of the connector's hosts it leads to, see :meth:`Connector.leave`.
        self.host = 0
        #: A channel for publishing that its users keep open between uses.
        self.publishing: Any = None
        #: How many channels may be open at once, where the broker allows fewer than it negotiates.
        self.max_channels = established.channel_max
        # Bounds every read and write without a shorter timeout, so that a broker that stops
        # answering causes an error and not a hang.
        self.socket.settimeout(IO_TIMEOUT)
        self._received = _Received(established.transport)
        established.on_inbound_frame = frames.tolerant(established.on_inbound_frame)
        _links.add(self)
        self.amqp.on_blocked = self._on_blocked
        self.amqp.on_unblocked = self._on_unblocked

    def _on_blocked(self, reason: str) -> None:
        self.blocked = reason
        logger.warning("the broker blocks publishers (memory or disk alarm): %s", reason)

    def _on_unblocked(self) -> None:
        self.blocked = None

    @property
    def alive(self) -> bool:
        """Whether the connection was open when it was last used."""
        return bool(self.amqp.connected)

    @property
    def frames_received(self) -> int:
        """How many frames the broker has sent on this connection."""
        return int(self.amqp.bytes_recv)

    def drain(self, timeout: float) -> bool:
        """Handle what the broker sends until one message is complete, or nothing comes.

        Returns ``False`` when nothing came within *timeout* seconds.
        """
        if not self.readable(timeout):
            return False
        try:
            self._received.fill()
            if self._deliver():
                return True
            # With a timeout, py-amqp would set and reset it on the socket for every frame. Its
            # drain_events() would not return after a heartbeat, which completes nothing, before
            # the next message comes.
            while not self.amqp.blocking_read() and self.readable():
                pass
        except socket.timeout as exc:
            raise_if_from_signal_handler(exc)
            raise amqp_errors.RecoverableConnectionError(
                f"the broker stopped in the middle of a message for {IO_TIMEOUT:g} s"
            ) from None
        return True

    def _deliver(self) -> bool:
        """Pass the next buffered message to its consumer, unless py-amqp must do that."""
        delivery = self._received.delivery()
        channel = delivery and (self.amqp.channels or {}).get(delivery.channel)
        if not delivery or not channel or channel.is_closing or channel.auto_decode:
            return False
        consumer = channel.callbacks.get(delivery.consumer_tag)
        if consumer is None:
            return False
        self._received.skip(delivery.end)
        # py-amqp's heartbeats count these frames.
        self.amqp.bytes_recv += delivery.frames
        delivery.message.channel = channel
        consumer(delivery.message)
        return True

    def acks(self, channel: int) -> Iterator[Tuple[int, bool]]:
        """Yield the buffered confirms: delivery tag, and whether it includes all before.

        They end before the first frame that is something else or not complete, which is left to
        :meth:`drain`. py-amqp would take ten times as long for each. Reads the socket, which must
        be readable.

        Parameters:
            channel: number of the channel that they are for.
        """
        self._received.fill()
        start = _START_OF_ACK.pack(_METHOD_FRAME, channel, _SIZE_OF_ACK, *spec.Basic.Ack)
        while True:
            frame = self._received.take(start, _ACK.size)
            if not frame:
                return
            # py-amqp's heartbeats count these frames.
            self.amqp.bytes_recv += 1
            *_, tag, multiple, _ = _ACK.unpack(frame)
            yield tag, bool(multiple)

    def buffered(self) -> bool:
        """Whether received bytes are buffered that the socket's readiness no longer shows."""
        if self._received.pending():
            return True
        # TLS decrypts whole records, so it may hold more bytes than were read.
        pending = getattr(self.socket, "pending", None)
        return bool(pending is not None and pending())

    def idle_time(self) -> float:
        """The longest wait for the socket, in seconds, before :meth:`tick` is due again."""
        if self.buffered():
            return 0.0
        return self.heartbeat / 4 if self.heartbeat else IO_TIMEOUT

    def readable(self, timeout: float = 0.0) -> bool:
        """Return whether the broker has sent something, or closed the connection.

        Parameters:
            timeout: seconds to wait for it.
        """
        return self.buffered() or sockets.readable(self.socket, timeout)

    def has_room(self) -> bool:
        """Return whether another channel may be opened, and one more after it."""
        if self.amqp.channels is None:
            raise amqp_errors.RecoverableConnectionError("the connection is closed")
        # Channel 0 is the connection itself.
        opened = len(self.amqp.channels) - 1
        return opened == 0 or opened + 1 < min(self.max_channels, self.amqp.channel_max)

    def channel(self) -> amqp.Channel:
        """Open a channel."""
        channel = self.amqp.channel()
        # py-amqp would decode bodies to text, which we would encode again.
        channel.auto_decode = False
        return channel

    def channel_nowait(self, on_close: Callable[[int, str, int, int], None]) -> amqp.Channel:
        """Open a channel without waiting for the broker's answer.

        Parameters:
            on_close: called when the broker closes the channel, with its code and text for the
                reason and the numbers of class and method. The connection stays open.
        """
        return channel_nowait(self.amqp, on_close)

    @contextlib.contextmanager
    def corked(self) -> Iterator[None]:
        """Send everything that is written in a ``with`` block at once, at its end.

        Nothing in the block may wait for an answer. Blocks may be nested; after an error in the
        block nothing is sent.
        """
        transport = self.amqp.transport
        write = transport._write
        pieces: List[bytes] = []

        def hold(piece: Any) -> None:
            # py-amqp writes its next frame into the same buffer.
            pieces.append(bytes(piece))

        transport._write = hold
        try:
            yield
        finally:
            transport._write = write
        if pieces:
            transport.write(b"".join(pieces))

    def tick(self) -> None:
        """Send a heartbeat if one is due; raise if the broker's have stopped coming."""
        if self.heartbeat:
            self.amqp.heartbeat_tick()

    def close(self) -> None:
        """Close the connection as the protocol asks, waiting at most a moment for the answer."""
        with contextlib.suppress(Exception):
            sock = self.amqp.transport.sock
            if sock is not None:
                sock.settimeout(1.0)
            self.amqp.close()
        self.drop()

    def drop(self) -> None:
        """Close the socket without the protocol's handshake."""
        with contextlib.suppress(Exception):
            self.amqp.collect()


def channel_nowait(
    connection: amqp.Connection, on_close: Callable[[int, str, int, int], None]
) -> amqp.Channel:
    """Open a channel on *connection* without waiting for the broker's answer.

    Parameters:
        connection: an open connection, which others may use as well.
        on_close: see :meth:`Link.channel_nowait`.
    """
    # kombu's class of channels would be closed together with a producer's.
    channel = amqp.Channel(connection)
    channel.auto_decode = False

    def closed(code: int, text: str, class_id: int, method_id: int) -> None:
        channel.send_method(spec.Channel.CloseOk)
        channel.collect()
        on_close(code, text, class_id, method_id)

    # py-amqp would reopen the channel, and wait for that.
    channel._callbacks[spec.Channel.Close] = closed
    channel.send_method(spec.Channel.Open, "s", ("",))
    return channel


#: All connections of this process.
_links: weakref.WeakSet[Link] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    # The sockets are the parent's. Closing them here sends nothing to the broker. py-amqp's
    # destructors might shut down the connection, and open sockets would keep it alive at the broker
    # after the parent has ended.
    for link in list(_links):
        with contextlib.suppress(Exception):
            transport = link.amqp.transport
            sock, transport.sock = transport.sock, None
            sock.close()
    _links.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


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
    """kombu's class of AMQP connections, which tries the addresses of a host itself."""

    def Transport(self, *args: Any, **kwargs: Any) -> Any:
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
        policy: how opening is retried.
        describe: returns the broker's address without password, for messages.
        app_name: name of the app, which is part of the names of its connections.

    Thread-safe. Holds nothing that must not be used after a fork.
    """

    def __init__(
        self,
        make: Callable[[float], kombu.Connection],
        policy: options.RetryPolicy,
        describe: Callable[[], str],
        app_name: str = "celery",
    ) -> None:
        self._make = make
        self._app_name = app_name
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

    def leave(self, link: Link) -> None:
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
            BackendUnavailable: when the broker refuses us; ``__cause__`` says why.
            OSError, amqp.AMQPError: when no host answers.
        """
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
            self._once.forget(CONNECTIONS)
            return link
        raise AssertionError("unreachable")  # pragma: no cover

    def open(
        self, heartbeat: float, deadline: Optional[float] = None, purpose: str = "results"
    ) -> Link:
        """Open a connection; retry as the retry policy says.

        Parameters:
            heartbeat: seconds between heartbeats; 0 for none.
            deadline: time (``time.monotonic``) after which to give up; the retry policy may end
                the tries earlier.
            purpose: what the connection is for, see :meth:`open_once`.

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
                pause = tries.after(exc, time.monotonic())
                limited = self.is_limited(exc)
                if pause is None or is_over(deadline):
                    raise self._unreachable(exc, tries.failed, limited) from exc
                time.sleep(time_left(deadline, pause))
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
        policy: how long to wait between them.
        end: the look-up's time limit (``time.monotonic``).
        prefix: beginning of the names of the queues, for error messages.
    """

    def __init__(self, policy: options.RetryPolicy, end: float, prefix: str) -> None:
        self._tries = retry.Retry(policy, end)
        self._started = time.monotonic()
        self._prefix = prefix

    def wait(self, exc: BaseException, what: str) -> None:
        """Wait before the next try.

        Parameters:
            exc: the error of the last try.
            what: a description of the read, for error messages.

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


class Pool:
    """Open connections that are lent to one user at a time.

    The connection used last is lent first: only as many stay open as are in use at once, and the
    others grow old and are closed. While connections are idle a thread keeps their heartbeats going
    and closes the old ones; it ends when none is left.

    Parameters:
        connector: opens the connections.
        heartbeat: seconds between heartbeats; 0 for none.
        name: what they are for; names the thread.
        limit: how many connections may be in use at once, besides those whose users are stuck
            (:data:`STUCK_SECONDS`); a user that needs one more waits. ``None`` for no limit.

    Thread-safe. After a fork the child must make a new pool and never use this one again.
    """

    def __init__(
        self, connector: Connector, heartbeat: float, name: str, limit: Optional[int] = None
    ) -> None:
        self._connector = connector
        self._limit = limit
        #: How a user of the pool retries its operations.
        self.policy = connector.policy
        self._heartbeat = heartbeat
        self._name = name
        # One lock guards all that follows. No I/O is done while holding it.
        lock = threading.Lock()
        self._changed = threading.Condition(lock)
        self._returned = threading.Condition(lock)
        #: When each connection in use was lent, by a handle of its user.
        self._lent: Dict[object, float] = {}
        self._idle: Deque[Link] = collections.deque()
        self._keeper: Optional[threading.Thread] = None
        self._closed = False

    @contextlib.contextmanager
    def link(self, deadline: Optional[float] = None) -> Iterator[Link]:
        """Lend a connection for the duration of a ``with`` block.

        A connection on which the block raises is not used again.

        Parameters:
            deadline: time (``time.monotonic``) after which it no longer opens a connection, or
                waits for one.

        Raises:
            BackendUnavailable: when a new one was needed and could not be opened.
            LookupTimeout: when others used all connections until the deadline.
        """
        user = self._reserve(deadline)
        try:
            with self._lend(deadline) as link:
                yield link
        finally:
            with self._changed:
                del self._lent[user]
                self._returned.notify()

    def _reserve(self, deadline: Optional[float]) -> object:
        """Wait until one more connection may be in use; return the handle of its user."""
        user = object()
        with self._changed:
            while True:
                now = time.monotonic()
                if self._limit is None or len(self._lent) - self._stuck(now) < self._limit:
                    self._lent[user] = now
                    return user
                if is_over(deadline):
                    raise errors.LookupTimeout(
                        f"{self._limit} connections for {self._name} were in use by other threads "
                        "of this process until the time was over; asking again is safe"
                    )
                self._returned.wait(time_left(deadline, STUCK_SECONDS / 4))

    def _stuck(self, now: float) -> int:
        """Return how many connections in use do not count, since their users are stuck."""
        stuck = sum(1 for lent_at in self._lent.values() if now - lent_at >= STUCK_SECONDS)
        return min(stuck, MAX_STUCK)

    @contextlib.contextmanager
    def _lend(self, deadline: Optional[float]) -> Iterator[Link]:
        link = self._take() or self._connector.open(self._heartbeat, deadline, self._name)
        self._connector.restrict(link)
        try:
            yield link
        except BaseException as exc:
            link.drop()
            if isinstance(exc, TRANSIENT):
                self._connector.leave(link)
                self._connector.note_limit(exc)
            raise
        self._put(link)

    def _take(self) -> Optional[Link]:
        while True:
            with self._changed:
                if not self._idle:
                    return None
                link = self._idle.pop()
            try:
                # An idle connection may have received something: a heartbeat, the broker's
                # permission to reuse a channel number, or the close.
                while link.alive and link.readable():
                    link.drain(0.001)
                if link.alive:
                    return link
            except TRANSIENT as exc:
                raise_if_from_signal_handler(exc)
            link.drop()

    def _put(self, link: Link) -> None:
        if not link.alive:
            link.drop()
            return
        with self._changed:
            if not self._closed:
                link.idle_since = time.monotonic()
                self._idle.append(link)
                if self._keeper is None:
                    self._keeper = start_thread(self._keep, self._name)
                return
        link.close()

    def _keep(self) -> None:
        pause = self._heartbeat / 2 if self._heartbeat else IDLE_SECONDS / 4
        while True:
            with self._changed:
                if not self._closed:
                    self._changed.wait(pause)
                if self._closed or not self._idle:
                    self._keeper = None
                    return
                # The oldest are on the left. No other thread can take them during this check.
                links, self._idle = self._idle, collections.deque()
            kept = []
            now = time.monotonic()
            for link in links:
                try:
                    if now - link.idle_since >= IDLE_SECONDS:
                        link.close()
                        continue
                    while link.readable():
                        link.drain(0.001)
                    link.tick()
                    kept.append(link)
                except TRANSIENT:
                    link.drop()
            with self._changed:
                if not self._closed:
                    self._idle.extendleft(reversed(kept))
                    kept = []
            for link in kept:
                link.close()

    def close(self) -> None:
        """Close the idle connections; those in use are closed when they come back."""
        with self._changed:
            self._closed = True
            links, self._idle = self._idle, collections.deque()
            keeper = self._keeper
            self._changed.notify_all()
        for link in links:
            link.close()
        if keeper is not None and keeper is not threading.current_thread():
            keeper.join(5.0)
