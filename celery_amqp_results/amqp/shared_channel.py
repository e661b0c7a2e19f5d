"""One publishing channel for all threads and greenlets of a process.

A publisher writes to the socket at once, and then waits for the confirm. One waiting thread leads,
see :mod:`~celery_amqp_results.amqp.turns`: it reads the socket, and wakes the others when their
confirms have come. When it has its own, it passes the lead to another. A process with one thread
thus reads its own confirms as if it had the channel to itself, and several threads share the
broker's group commits.

One lock guards all reads and writes of the socket, which TLS needs. No thread holds it while it
waits for bytes.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from typing import Callable, Iterator, List, Optional

from celery_amqp_results import errors
from celery_amqp_results.amqp import confirms, connections
from celery_amqp_results.amqp.confirm_log import Publication
from celery_amqp_results.amqp.confirms import ConfirmChannel, LostInAlarm
from celery_amqp_results.amqp.failures import TRANSIENT, is_refusal
from celery_amqp_results.amqp.turns import Request, Turns, Waiter
from celery_amqp_results.toolkit.interrupts import raise_if_from_signal_handler
from celery_amqp_results.toolkit.retry import is_over, time_left

__all__ = ("SharedChannel",)

#: Publishing has no heartbeats. A dead connection is noticed at the next message, which the kernel
#: gives up after some seconds (TCP_USER_TIMEOUT), or for which no confirm comes.
HEARTBEAT = 0.0

#: The longest single wait of a follower, in seconds. Between waits it looks for an alarm.
STEP = 1.0

#: The longest single wait of the leader for bytes, in seconds. Another thread may have taken in its
#: confirm together with the answer to a request.
READ_STEP = 0.05

#: Seconds in which outstanding confirms must come when the connection is given up.
GIVE_UP_SECONDS = 0.5


class SharedChannel:
    """Opens the channel, and moves bytes on it for many threads.

    Parameters:
        on_lost: called with every publication that a lost connection leaves behind and that no
            caller waits for. Must not publish.
        plain: whether messages are published without confirms.

    Thread-safe. After a fork the child must make a new one.
    """

    def __init__(
        self,
        connector: connections.Connector,
        on_lost: Callable[[Publication], None],
        plain: bool = False,
    ) -> None:
        self._connector = connector
        self._plain = plain
        self._on_lost = on_lost
        # Guards the channel, and everything read from its socket or written to it.
        self._io = threading.Lock()
        self._channel: Optional[ConfirmChannel] = None
        #: Whether the last one was lost while an alarm blocked it.
        self._in_alarm = False
        #: When the last attempt to open it began, and how it failed.
        self._opening = 0.0
        self._open_failure: Optional[errors.BackendUnavailable] = None
        # Its lock is taken within the lock above, never around it.
        self._turns = Turns()
        #: Not set while the connection is given up for another one.
        self._may_send = threading.Event()
        self._may_send.set()
        connector.slots.add_giver(self.give_up_idle)

    @contextlib.contextmanager
    def _held(self, deadline: Optional[float]) -> Iterator[None]:
        """Hold the lock for I/O, which a thread that connects may hold for long."""
        if deadline is None:
            # An exception from a signal handler cannot come between the lock and the block.
            with self._io:
                yield
            return
        if not self._io.acquire(timeout=time_left(deadline, threading.TIMEOUT_MAX)):
            raise errors.BackendUnavailable(
                "other threads of this process still connect to the broker, or use the connection"
            )
        try:
            yield
        finally:
            self._io.release()

    @contextlib.contextmanager
    def open(
        self,
        since: float,
        asks: Callable[[], bool] = lambda: True,
        deadline: Optional[float] = None,
    ) -> Iterator[ConfirmChannel]:
        """Lend the channel for a ``with`` block that writes, or that asks the broker something.

        Waits for the end of an alarm first if the broker would not answer, or reads no more. When
        the block raises, all threads lose the connection: half a frame may be on it.

        Parameters:
            since: when the caller's attempt began. It shares the failure of an attempt to connect
                that began after that, instead of making one more.
            asks: whether the block waits for an answer.
            deadline: time (``time.monotonic``) after which to give up that wait, connecting, and
                waiting for other threads; the retry policy may give up connecting earlier.

        Raises:
            BackendUnavailable: when the connection could not be opened, or at the deadline.
        """
        if not self._may_send.is_set():
            self._may_send.wait(STEP)
        while True:
            with self._held(deadline):
                channel = self._ready(since, deadline)
                if self._is_free(channel, asks):
                    try:
                        yield channel
                    except BaseException as exc:
                        failure = self._lose(channel, exc)
                        if failure is exc:
                            raise
                        raise_if_from_signal_handler(exc)
                        raise failure from exc
                    # With its answers, the block may have taken in confirms of others.
                    self._turns.wake_done()
                    return
            self.wait(Request(functools.partial(self._is_free, channel, asks)), deadline)
            if is_over(deadline):
                raise errors.NotConfirmed(f"the broker blocks publishers ({channel.link.blocked})")

    def _is_free(self, channel: ConfirmChannel, asks: Callable[[], bool]) -> bool:
        """Whether nothing must be waited for before *channel* is written to, or it is lost."""
        if channel is not self._channel:
            return True
        return not (channel.link.unsent or (channel.mute and asks()))

    @contextlib.contextmanager
    def present(self, deadline: Optional[float] = None) -> Iterator[Optional[ConfirmChannel]]:
        """Lend the channel if it is open; ``None`` otherwise.

        Raises:
            BackendUnavailable: when other threads use it until *deadline*.
        """
        with self._held(deadline):
            channel = self._channel
            try:
                yield channel
            except BaseException as exc:
                if channel is not None:
                    self._lose(channel, exc)
                raise

    def _ready(self, since: float, deadline: Optional[float]) -> ConfirmChannel:
        channel = self._channel
        # A load balancer may have closed the connection while it was idle.
        if channel is not None and self._took_in_unled(channel):
            if channel.link.alive and channel.channel.is_open:
                return channel
            self._lose(channel, errors.BackendUnavailable("the connection was closed"))
        if self._open_failure is not None and self._opening >= since:
            raise errors.BackendUnavailable(
                str(self._open_failure)
            ) from self._open_failure.__cause__
        self._opening, self._open_failure = time.monotonic(), None
        try:
            link = self._connector.open(HEARTBEAT, deadline, "publish")
        except errors.BackendUnavailable as exc:
            # Callers without a deadline have more tries.
            if deadline is None:
                self._open_failure = exc
            raise
        try:
            link.keep_unsent()
            self._channel = ConfirmChannel(link, self._in_alarm, self._plain)
        except BaseException:
            link.drop()
            self._connector.mark_host_failed(link)
            raise
        return self._channel

    def _took_in_unled(self, channel: ConfirmChannel) -> bool:
        """Take in what has come, unless a leader does that; see :meth:`_survives`."""

        def take_in() -> None:
            channel.link.flush()
            channel.take_in()

        return self._survives(channel, functools.partial(self._turns.if_unled, take_in))

    def _survives(self, channel: ConfirmChannel, work: Callable[[], None]) -> bool:
        """Have *work* use *channel*; return whether the connection survives that."""
        try:
            work()
        except TRANSIENT as exc:
            raise_if_from_signal_handler(exc)
            self._lose(channel, exc)
            return False
        except BaseException as exc:
            self._lose(channel, exc)
            raise
        return True

    def _lose(self, channel: ConfirmChannel, failure: BaseException) -> BaseException:
        """Drop the connection, and return the error that its publications are lost with.

        Every thread that waits on it finds that it is lost.
        """
        if self._channel is channel:
            self._channel = None
        self._in_alarm = bool(channel.link.blocked)
        if self._in_alarm and isinstance(failure, TRANSIENT) and not is_refusal(failure):
            failure = LostInAlarm(f"the connection was lost in an alarm: {failure!r}")
        self._report_lost(channel, failure)
        channel.link.drop()
        self._connector.mark_host_failed(channel.link)
        self._turns.wake_done()
        return failure

    def _report_lost(self, channel: ConfirmChannel, failure: BaseException) -> None:
        left = [*channel.log.strays, *channel.log.lost(failure)]
        channel.log.strays = []
        for publication in left:
            if not publication.waited:
                self._on_lost(publication)

    def wait(self, waiter: Waiter, deadline: Optional[float] = None) -> None:
        """Wait until *waiter* is done; a lost connection ends the wait as well.

        Parameters:
            deadline: time (``time.monotonic``) at which to stop waiting. With ``None`` the
                connection counts as dead after :data:`confirms.CONFIRM_TIMEOUT` seconds in which
                the broker has taken and confirmed nothing, unless it blocks publishers.
        """
        patience = confirms.Patience(time.monotonic())
        try:
            while not waiter.done:
                self._take_turn(waiter, deadline)
                if is_over(deadline):
                    return
                channel, now = self._channel, time.monotonic()
                if channel is None:
                    continue
                blocked = bool(channel.link.blocked)
                if patience.is_over(now, blocked, channel.progress) and not waiter.done:
                    with self._io:
                        if channel is self._channel:
                            self._lose(channel, confirms.no_confirm())
        finally:
            self._turns.withdraw(waiter)

    def _take_turn(self, waiter: Waiter, deadline: Optional[float]) -> None:
        """Read as the leader, or wait for the leader to read."""
        try:
            if not self._turns.lead(waiter, time_left(deadline, STEP)):
                return
            # This thread or a follower may wait only for confirms that were taken in before it led.
            self._turns.wake_done()
            while not waiter.done and self._channel is not None:
                came = self._read(time_left(deadline, READ_STEP))
                if not came or is_over(deadline):
                    break
                self._turns.wake_done()
        finally:
            self._turns.hand_over(waiter)

    def _read(self, timeout: float) -> bool:
        """Take in what comes within *timeout* seconds; return whether anything did."""
        channel = self._channel
        if channel is None:
            return False
        before = channel.link.frames_received
        try:
            if not channel.link.ready(timeout):
                return False
        except (OSError, ValueError) as exc:
            raise_if_from_signal_handler(exc)
            # Another thread has lost the connection, and closed its socket.
            if channel is self._channel:
                raise
            return False
        with self._io:
            if channel is self._channel:
                self._survives(channel, functools.partial(_take_in, channel, before))
        return True

    def renew(self, seconds: float) -> None:
        """Drop a connection that is older than *seconds*; the next message opens another."""
        with self._held(None):
            channel = self._channel
            if channel is not None and time.monotonic() - self._opening > seconds:
                self._lose(channel, errors.NotConfirmed("the broker refuses states (nack)"))

    def collect(self, deadline: Optional[float] = None) -> List[Publication]:
        """Take in buffered confirms without waiting; return stray publications.

        Raises:
            BackendUnavailable: when other threads use the connection until *deadline*.
        """
        with self._held(deadline):
            channel = self._channel
            if channel is None or not self._took_in_unled(channel):
                return []
            if not self._survives(channel, channel.ask_about_plain):
                return []
            return channel.log.unwaited()

    def give_up_idle(self) -> bool:
        """Close the connection when everything is confirmed; return whether it was closed.

        Meanwhile no thread sends anything, so that publishing threads take turns with others.
        """
        channel = self._channel
        if channel is None:
            return False
        self._may_send.clear()
        try:
            self.collect()
            self.wait(Waiter(list(channel.log)), time.monotonic() + GIVE_UP_SECONDS)
            with self.present() as present:
                if present is None or present is not channel or channel.log.busy:
                    return False
                if channel.link.unsent:
                    return False
                self._channel = None
                channel.link.close()
                return True
        except TRANSIENT as exc:
            raise_if_from_signal_handler(exc)
            # The threads that publish notice that themselves.
            return False
        finally:
            self._may_send.set()

    def close(self, deadline: float) -> None:
        """Close the connection with the protocol's handshake.

        If a thread still connects at *deadline*, there is nothing to close.
        """
        with contextlib.suppress(errors.BackendUnavailable), self._held(deadline):
            channel = self._channel
            if channel is not None:
                self._channel = None
                closed = errors.BackendUnavailable("the result backend was closed")
                self._report_lost(channel, closed)
                channel.link.close()
        self._turns.wake_done()


def _take_in(channel: ConfirmChannel, frames_before: int) -> None:
    """Take in what has come on a connection that was ready, after some frames were received."""
    if channel.link.unsent:
        # There may be room for it, and nothing to read.
        channel.link.flush()
        channel.take_in()
    elif channel.link.frames_received == frames_before:
        channel.take_in_readable()
    else:
        # Another thread has read meanwhile, perhaps everything.
        channel.take_in()
