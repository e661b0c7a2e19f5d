"""Open connections that are kept for reuse."""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from typing import Deque, Dict, Iterator, Optional

from celery_amqp_results import errors
from celery_amqp_results.amqp.connections import Connector
from celery_amqp_results.amqp.failures import TRANSIENT
from celery_amqp_results.amqp.link import Link
from celery_amqp_results.toolkit.interrupts import raise_if_from_signal_handler
from celery_amqp_results.toolkit.retry import is_over, time_left
from celery_amqp_results.toolkit.threads import start_helper

__all__ = ("AllInUse", "Pool")

#: An idle connection of a pool is closed after this many seconds.
IDLE_SECONDS = 60.0

#: A user that has had a connection for this many seconds waits for something that may take long,
#: such as a shard that a frozen process holds. Its connection no longer counts against the limit
#: of the pool, so that other users need not wait for it.
STUCK_SECONDS = 2.0
#: At most this many connections do not count.
MAX_STUCK = 8


class AllInUse(errors.LookupTimeout):
    """Other threads used all connections of the pool until the deadline."""


class Pool:
    """Open connections that are lent to one user at a time.

    The connection used last is lent first: only as many stay open as are in use at once, and the
    others grow old and are closed. While connections are idle a thread keeps their heartbeats going
    and closes the old ones; it ends when none is left.

    Parameters:
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
        connector.slots.add_giver(self.give_up_idle)

    @contextlib.contextmanager
    def link(self, deadline: Optional[float] = None) -> Iterator[Link]:
        """Lend a connection for the duration of a ``with`` block.

        A connection on which the block raises is not used again.

        Parameters:
            deadline: time (``time.monotonic``) after which it no longer opens a connection, or
                waits for one.

        Raises:
            BackendUnavailable: when a new one was needed and could not be opened.
            AllInUse: when others used all connections until the deadline.
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
                    raise AllInUse(
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
                self._connector.mark_host_failed(link)
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
            if not self._closed and not self._connector.slots.wanted:
                link.idle_since = time.monotonic()
                self._idle.append(link)
                if self._keeper is None:
                    self._keeper = start_helper(self._keep, self._name)
                return
        link.close()

    def give_up_idle(self) -> bool:
        """Close the connection that has been idle longest; return whether there was one."""
        with self._changed:
            link = self._idle.popleft() if self._idle else None
        if link is None:
            return False
        link.close()
        return True

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
