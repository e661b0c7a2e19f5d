"""One open AMQP connection: reading in large pieces, channels, heartbeats, closing."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import time
import weakref
from typing import Any, Callable, Iterator, List, Optional, Tuple

import amqp
import kombu
from amqp import exceptions as amqp_errors
from amqp import spec

from celery_amqp_results.amqp import frames
from celery_amqp_results.amqp.outbox import Outbox
from celery_amqp_results.toolkit import sockets
from celery_amqp_results.toolkit.interrupts import raise_if_from_signal_handler
from celery_amqp_results.toolkit.retry import time_left

__all__ = ("IO_TIMEOUT", "Link", "channel_nowait")

logger = logging.getLogger(__name__)

#: How long a single read or write on an open connection may take, in seconds.
IO_TIMEOUT = 10.0

#: Linux's option for how many milliseconds it keeps bytes that the other side does not take, before
#: it gives up the connection.
_USER_TIMEOUT: Optional[int] = getattr(socket, "TCP_USER_TIMEOUT", None)
#: py-amqp's value, which is short for a broker that is busy.
_SHORT_USER_TIMEOUT = 1000

#: How many bytes are read from a socket at once.
RECEIVE_SIZE = 64 * 1024

#: The frame of a ``basic.ack``: type, channel, size, class, method, delivery tag, multiple, end.
_ACK = struct.Struct(">BHIHHQBB")
_START_OF_ACK = struct.Struct(">BHIHH")
_METHOD_FRAME = 1
#: Bytes of class, method, tag and multiple.
_SIZE_OF_ACK = 13


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
        heartbeat: seconds between heartbeats; 0 for none.
    """

    def __init__(
        self, connection: kombu.Connection, established: amqp.Connection, heartbeat: float
    ) -> None:
        # py-amqp's connection refers to kombu's weakly in places; keep it as long as ours.
        self._kombu = connection
        self.amqp = established
        #: For waiting until it is readable. Kept here, since py-amqp raises an error for the
        #: socket of a lost connection.
        self.socket = established.transport.sock
        self.heartbeat = heartbeat
        #: Why the broker blocks publishers on this connection, or ``None`` while it does not.
        self.blocked: Optional[str] = None
        #: When the broker last ceased to (``time.monotonic``).
        self.unblocked_at = 0.0
        self._outbox: Optional[Outbox] = None
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
        #: TLS decrypts whole records, so it may hold more bytes than were read.
        self._decrypted: Optional[Callable[[], int]] = getattr(self.socket, "pending", None)
        established.on_inbound_frame = frames.tolerant(established.on_inbound_frame)
        self._user_timeout = 0
        self._closed: Optional[weakref.finalize[..., Link]] = None
        _links.add(self)
        self.amqp.on_blocked = self._on_blocked
        self.amqp.on_unblocked = self._on_unblocked

    def _on_blocked(self, reason: str) -> None:
        logger.warning("the broker blocks publishers (memory or disk alarm): %s", reason)
        if self.blocked is None:
            # The broker reads nothing until the alarm ends, however long that takes.
            self._user_timeout = self._set_user_timeout(0)
        self.blocked = reason

    def _on_unblocked(self) -> None:
        if self.blocked is not None:
            self.blocked, self.unblocked_at = None, time.monotonic()
            self._set_user_timeout(self._user_timeout)

    def _set_user_timeout(self, milliseconds: int) -> int:
        """Have the kernel keep bytes for that long; for any time with 0. Return the old value."""
        before = 0
        # The socket may be closed.
        with contextlib.suppress(OSError):
            if _USER_TIMEOUT is not None:
                before = self.socket.getsockopt(socket.IPPROTO_TCP, _USER_TIMEOUT)
                self.socket.setsockopt(socket.IPPROTO_TCP, _USER_TIMEOUT, milliseconds)
        return before

    def keep_unsent(self) -> None:
        """Keep bytes that the socket has no room for, see :attr:`unsent`, for a publisher."""
        if self._outbox is not None:
            return
        self._outbox = Outbox(self.amqp.transport)
        before = self._set_user_timeout(int(1000 * IO_TIMEOUT))
        if before != _SHORT_USER_TIMEOUT:
            # The app has chosen it.
            self._set_user_timeout(before)

    @property
    def unsent(self) -> bool:
        """Whether bytes are kept that :meth:`flush` must send."""
        return self._outbox is not None and self._outbox.waiting

    @property
    def bytes_sent(self) -> int:
        """How many bytes were sent, if unsent ones are kept."""
        return self._outbox.sent if self._outbox is not None else 0

    def flush(self) -> None:
        """Send what the socket has room for now."""
        if self._outbox is not None and self._outbox.waiting:
            self._outbox.flush()

    def ready(self, timeout: float) -> bool:
        """Return whether there is something to read, or room to send, within *timeout* seconds."""
        if not self.unsent:
            return self.readable(timeout)
        return self.buffered() or sockets.ready(self.socket, timeout)

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
        return self._received.pending() or bool(self._decrypted is not None and self._decrypted())

    def idle_time(self) -> float:
        """The longest wait for the socket, in seconds, before :meth:`tick` is due again."""
        if self.buffered():
            return 0.0
        return self.heartbeat / 4 if self.heartbeat else IO_TIMEOUT

    def readable(self, timeout: float = 0.0) -> bool:
        """Return whether the broker sends something, or closes, within *timeout* seconds."""
        return self.buffered() or sockets.readable(self.socket, timeout)

    def wait(self, until: float, wake_up: sockets.WakeUp) -> None:
        """Wait for something to read, *wake_up*, a due :meth:`tick`, or the time *until*."""
        wake_up.wait(time_left(until, self.idle_time()), self.socket)

    def has_room(self) -> bool:
        """Return whether another channel may be opened, besides one for publishing."""
        if self.amqp.channels is None:
            raise amqp_errors.RecoverableConnectionError("the connection is closed")
        # Channel 0 is the connection itself.
        opened = len(self.amqp.channels) - 1
        reserved = self.publishing is None
        return opened == 0 or opened + reserved < min(self.max_channels, self.amqp.channel_max)

    def channel(self) -> amqp.Channel:
        """Open a channel."""
        channel = self.amqp.channel()
        # py-amqp would decode bodies to text, which we would encode again.
        channel.auto_decode = False
        return channel

    def channel_nowait(self, on_close: Callable[[int, str, int, int], None]) -> amqp.Channel:
        """Open a channel without waiting for the broker's answer, see :func:`channel_nowait`."""
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

        def hold(piece: bytes) -> None:
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
            if not self.unsent:
                self.amqp.close()
        self.drop()

    def drop(self) -> None:
        """Close the socket without the protocol's handshake."""
        with contextlib.suppress(Exception):
            self.amqp.collect()
        if self._closed is not None:
            self._closed()

    def on_closed(self, callback: Callable[[], None]) -> None:
        """Call *callback* once, when the connection is closed, or is forgotten without that."""
        self._closed = weakref.finalize(self, callback)
        self._closed.atexit = False


def channel_nowait(
    connection: amqp.Connection, on_close: Callable[[int, str, int, int], None]
) -> amqp.Channel:
    """Open a channel on *connection* without waiting for the broker's answer.

    Parameters:
        connection: an open connection, which others may use as well.
        on_close: called when the broker closes the channel, with its code and text for the reason
            and the numbers of class and method. The connection stays open.
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
        if link._closed is not None:
            # A thread of the parent may have held a lock that the callback needs.
            link._closed.detach()
        with contextlib.suppress(Exception):
            transport = link.amqp.transport
            sock, transport.sock = transport.sock, None
            sock.close()
    _links.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
