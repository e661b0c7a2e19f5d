"""One connection of the inbox: its queue, its bindings, and the bytes that are read from it.

The inbox's thread reads the socket. A thread that has published a barrier reads it instead until
the barrier is back: otherwise each answer would wait for the inbox's thread to run, and then for
its own. Both pass everything on in the same way.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
import time
from typing import Deque, Dict, Iterator, List, Optional, Protocol, Tuple, Type

import amqp

from celery_amqp_results.amqp import connections, frames, nowait
from celery_amqp_results.amqp.declarations import Declarations
from celery_amqp_results.amqp.failures import TRANSIENT
from celery_amqp_results.feed.barriers import Barrier, Barriers
from celery_amqp_results.feed.bindings import ALL, Action
from celery_amqp_results.protocol.names import BROADCAST, OVERFLOW, barrier_key
from celery_amqp_results.toolkit.interrupts import raise_if_from_signal_handler
from celery_amqp_results.toolkit.retry import is_over, time_left
from celery_amqp_results.toolkit.sockets import SocketWatch

__all__ = ("BARRIER", "Owner", "Session")

logger = logging.getLogger(__name__)

#: The property ``type`` of a barrier.
BARRIER = "barrier"
#: The number of a barrier is its property ``message_id``, in this form.
_NUMBER = "{:016x}"

#: Seconds after which a barrier that has not come back is lost for certain. The broker returns none
#: that another queue has received: a queue bound with ``#`` receives all.
LOST_SECONDS = 30.0

#: Seconds between heartbeats: a dead connection is noticed after twice that.
HEARTBEAT = 15.0

#: The largest number of messages in the inbox queue. The reader takes them as they come, so that
#: this is reached only while the process stands still, for as long as its heartbeat allows.
MAX_QUEUED = 1_000_000

#: The errors of a lost connection; a closed socket has no number, which is a ValueError.
_LOST: Tuple[Type[Exception], ...] = (*TRANSIENT, ValueError)

#: The longest single wait of a reader for the socket that it has borrowed, in seconds.
POLL_SECONDS = 0.02

#: A read that needs no barrier takes in this many messages at most. If there are more, the process
#: has not kept up, and the read needs a barrier.
MAX_TAKEN_IN = 100


class Owner(Protocol):
    """The inbox that a session and its keeper belong to."""

    @property
    def connections(self) -> int:
        """How many connections were opened, one after the other."""

    @property
    def closing(self) -> bool:
        """Whether to stop reading."""

    @property
    def restless(self) -> bool:
        """Whether :meth:`actions` has something to do."""

    def actions(self) -> List[Action]:
        """Return the bindings to add and to remove, each once."""

    def on_open(self, session: Session) -> None:
        """Note that the connection stands."""

    def on_bound(self, key: int) -> None:
        """Note that a binding stands."""

    def on_message(self, message: amqp.Message) -> None:
        """Take in a pushed message."""

    def on_proof(self, at: float) -> None:
        """Note that everything has come that was confirmed before a time."""

    def on_lost(self) -> None:
        """Note that the connection is lost."""

    def on_end(self, failure: Exception) -> None:
        """Note that there will be no other connection until the keeper is started again."""


class Session:
    """One connection of the inbox, with its queue declared, bound and consumed.

    Parameters:
        client: the word of this process in routing keys.

    Raises:
        BackendUnavailable, DeclarationRefused, amqp.AMQPError, OSError: when it cannot be opened.
    """

    def __init__(
        self,
        owner: Owner,
        connector: connections.Connector,
        declarations: Declarations,
        client: str,
    ) -> None:
        self._owner = owner
        self._connector = connector
        self._declarations = declarations
        #: Held during every write and read on the connection: a TLS socket must not be read and
        #: written at once.
        self.io = threading.Lock()
        self._refused = False
        #: Why the connection must be replaced.
        self._failure: Optional[BaseException] = None
        # Guards the barriers. Taken within the lock above, never around it.
        self._lock = threading.Lock()
        self._barriers = Barriers()
        #: Requested binding keys, in order.
        self._binding: Deque[int] = collections.deque()
        self.link = connector.open_once(HEARTBEAT, purpose="inbox")
        try:
            self._watch = SocketWatch(self.link.socket)
            self._set_up(client)
        except BaseException:
            self.drop()
            raise

    def _set_up(self, client: str) -> None:
        topology = self._declarations.topology
        self.channel = channel = self.link.channel()
        self._declarations.ensure_exchange(channel)
        # A message dropped from the full inbox is dead-lettered to this queue of length one: its
        # arrival reports that states were missed.
        overflow = f"{OVERFLOW}.{client}-{id(self):x}"
        spilled = _declare(channel, {"x-max-length": 1})
        channel.queue_bind(spilled, topology.exchange, overflow)
        self.queue = _declare(
            channel,
            {
                "x-max-length": MAX_QUEUED,
                "x-overflow": "drop-head",
                "x-dead-letter-exchange": topology.exchange,
                "x-dead-letter-routing-key": overflow,
            },
        )
        for word in (client, BROADCAST):
            channel.queue_bind(self.queue, topology.exchange, topology.client_binding(word))
        key = barrier_key()
        channel.queue_bind(self.queue, topology.exchange, key)
        # Brokers other than RabbitMQ limit consumers by default.
        channel.basic_qos(0, 0, False)
        for queue, callback in ((self.queue, self._on_message), (spilled, self._on_overflow)):
            channel.basic_consume(queue, no_ack=True, callback=callback, on_cancel=self._on_cancel)
        nowait.on_bound(channel, self._on_bind_ok)
        # A broker that refuses barriers closes this channel alone.
        barriers = self.link.channel_nowait(self._on_barriers_refused)
        barriers.events["basic_return"].add(self._on_barrier_returned)
        written = self._barrier_frames(barriers.channel_id, key)
        #: What is written before and after the number of a barrier.
        self._barrier_start, self._barrier_end = written.split(_NUMBER.format(0).encode())
        self._owner.on_open(self)
        self._bind_and_unbind()

    def _barrier_frames(self, channel: int, key: str) -> bytes:
        return frames.publish_frames(
            channel,
            self.link.amqp.frame_max,
            {"type": BARRIER, "message_id": _NUMBER.format(0), "delivery_mode": 1},
            b"",
            (self._declarations.topology.exchange, key, True),
        )

    def wake(self) -> None:
        """Make :meth:`read` carry out the pending requests. May be called by any thread."""
        self._watch.ring()

    def close(self) -> None:
        """Close the connection with the protocol's handshake."""
        with self.io:
            self.link.close()
            self._watch.close()
        with self._lock:
            self._barriers.lost()

    def drop(self) -> None:
        """Close the socket without a handshake, and try other hosts first from now on."""
        # The first ends the wait of a thread that has borrowed the socket.
        self.link.drop()
        self._watch.close()
        with self._lock:
            self._barriers.lost()
        self._connector.mark_host_failed(self.link)

    # -- barriers ----------------------------------------------------------------------------------

    @property
    def blocked(self) -> bool:
        """Whether barriers do not work: an alarm stops publishers, or the broker refuses them."""
        return self._refused or bool(self.link.blocked)

    def pass_barrier(self, timeout: float) -> bool:
        """Wait until everything has come that was confirmed before this call.

        Reads the socket meanwhile, unless another thread has borrowed it. Returns ``False`` if it
        is not certain within *timeout* seconds: the barrier is late or lost, or the broker accepts
        none.
        """
        with self._lock:
            if self.blocked:
                return False
            late_since = self._barriers.late_since
            if late_since is not None:
                # After an alarm it has just begun to come back.
                if time.monotonic() - max(late_since, self.link.unblocked_at) > LOST_SECONDS:
                    self.replace(f"a barrier has not come back within {LOST_SECONDS:g} s")
                return False
            barrier, first = self._barriers.join()
        end = time.monotonic() + timeout
        # Borrowed first: a barrier may be back before this thread would have the socket.
        with self._watch.borrowed() as borrowed:
            if first:
                self._publish(barrier)
            if borrowed:
                with self._passing_on_errors():
                    while not (barrier.ended or self._failure or is_over(end)):
                        # Another thread may have taken the barrier in.
                        if self.link.readable(time_left(end, POLL_SECONDS)):
                            self._drain()
        if not barrier.ended:
            barrier.wait(time_left(end, timeout))
        with self._lock:
            if not barrier.returned:
                self._barriers.give_up(barrier)
            return barrier.returned

    def _publish(self, barrier: Barrier) -> None:
        """Publish a barrier. Reads that begin later need another one."""
        try:
            with self._passing_on_errors(), self.io:
                with self._lock:
                    number = self._barriers.publish(barrier, time.monotonic())
                digits = _NUMBER.format(number).encode()
                nowait.write(self.link.amqp, self._barrier_start + digits + self._barrier_end)
        finally:
            with self._lock:
                # After an interrupt, no read may join a barrier that is never published.
                self._barriers.withdraw(barrier)

    def take_in(self) -> bool:
        """Take in what has arrived, without waiting; return whether that is everything."""
        with self._passing_on_errors():
            for _ in range(MAX_TAKEN_IN):
                if not self._drain():
                    return True
        return False

    def replace(self, why: str) -> None:
        """Have the inbox's thread lose this connection."""
        self._failure = amqp.exceptions.RecoverableConnectionError(why)
        self._watch.ring()

    @contextlib.contextmanager
    def _passing_on_errors(self) -> Iterator[None]:
        """Let the inbox's thread go on in the end, and raise the errors of the connection."""
        try:
            yield
        except _LOST as exc:
            self.replace(f"a thread that read the connection was interrupted: {exc!r}")
            raise_if_from_signal_handler(exc)
            # The session may have been closed by the inbox's thread, and its socket with it.
            self._failure = exc if isinstance(exc, TRANSIENT) else self._failure
        except BaseException as exc:
            # Part of a message may be missing.
            self.replace(f"a thread that read the connection was interrupted: {exc!r}")
            raise
        finally:
            # The socket does not show what is already buffered.
            if self._failure is not None or self._owner.restless or self.link.buffered():
                self._watch.ring()

    # -- the inbox's thread ------------------------------------------------------------------------

    def read(self) -> None:
        """Read until the inbox is closed or the connection is lost, which raises."""
        owner = self._owner
        next_tick = 0.0
        while not owner.closing:
            readable = self._watch.wait_for_socket(self.link.idle_time())
            if self._failure is not None:
                raise self._failure
            if readable:
                self._drain()
            # These messages were received together: no system call, so that a computing thread
            # cannot take the GIL in between.
            while self.link.buffered() and not owner.closing:
                self._drain()
            if owner.restless:
                self._bind_and_unbind()
            now = time.monotonic()
            if now >= next_tick:
                with self.io:
                    self.link.tick()
                next_tick = now + HEARTBEAT / 4

    def _drain(self) -> bool:
        with self.io:
            return self.link.drain(0.0)

    def _bind_and_unbind(self) -> None:
        """Send the bindings and unbindings that the inbox requests; the answers come later."""
        actions = self._owner.actions()
        topology = self._declarations.topology
        with self.io, self.link.corked():
            for bind, key in actions:
                pattern = topology.every_binding() if key == ALL else topology.shard_binding(key)
                where = (self.queue, topology.exchange, pattern)
                if bind:
                    self._binding.append(key)
                    nowait.bind(self.channel, *where)
                else:
                    nowait.unbind(self.channel, *where)

    # -- what the broker sends ---------------------------------------------------------------------

    def _on_bind_ok(self, *arguments: object) -> None:
        self._owner.on_bound(self._binding.popleft())

    def _on_message(self, message: amqp.Message) -> None:
        properties = message.properties
        if properties.get("type") != BARRIER:
            self._owner.on_message(message)
            return
        # Other programs may publish a message like this.
        with contextlib.suppress(TypeError, ValueError):
            self._on_barrier(int(properties.get("message_id"), 16))

    def _on_barrier(self, number: int) -> None:
        with self._lock:
            barrier = self._barriers.take(number)
        if barrier is not None:
            self._owner.on_proof(barrier.published)
            barrier.end(True)

    def _on_cancel(self, consumer_tag: str) -> None:
        raise amqp.exceptions.ConsumerCancelled("the inbox queue was deleted", (60, 30))

    def _on_overflow(self, message: amqp.Message) -> None:
        raise amqp.exceptions.RecoverableConnectionError(
            f"the inbox overflowed: more than {MAX_QUEUED} states came while this process stood "
            "still"
        )

    def _on_barriers_refused(self, code: int, text: str, class_id: int, method_id: int) -> None:
        exchange = self._declarations.topology.exchange
        if code == amqp.exceptions.NotFound.code:
            raise amqp.exceptions.RecoverableConnectionError(
                f"the exchange {exchange!r} was deleted, and the inbox's bindings with it"
            )
        self._refused = True
        logger.warning(
            "the broker refuses barriers, and every read of a state looks into the store: (%s) %s. "
            "Check the user's write permission on the exchange %r, and its topic permissions",
            code,
            text,
            exchange,
        )

    def _on_barrier_returned(self, *arguments: object) -> None:
        raise amqp.exceptions.RecoverableConnectionError(
            "the inbox's bindings are gone: the exchange "
            f"{self._declarations.topology.exchange!r} was deleted and declared again"
        )


def _declare(channel: amqp.Channel, arguments: Dict[str, object]) -> str:
    """Declare an exclusive queue named by the broker and return its name."""
    return str(
        channel.queue_declare(
            "",
            durable=False,
            exclusive=True,
            auto_delete=True,
            arguments={"x-queue-type": "classic", **arguments},
        ).queue
    )
