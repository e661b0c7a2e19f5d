"""Taking turns at reading the publishing channel. No I/O.

One waiting thread is the *leader*, and the others are *followers*: each waits until the leader
wakes it, since its confirms have come, or since it is its turn to lead.
"""

from __future__ import annotations

import collections
import contextlib
import operator
import threading
from typing import Callable, Deque, Optional, Sequence

from celery_amqp_results.amqp.confirm_log import Publication

__all__ = ("Request", "Turns", "Waiter")


class Waiter:
    """A thread that waits for some publications.

    Parameters:
        publications: what it waits for.
        is_done: tells what it waits for at each of them.
    """

    def __init__(
        self,
        publications: Sequence[Publication],
        is_done: Callable[[Publication], bool] = operator.attrgetter("settled"),
    ) -> None:
        self._publications = publications
        #: How many are known to be done. Two threads may count at once, each from here.
        self._known = 0
        self._is_done = is_done
        self._event: Optional[threading.Event] = None

    @property
    def done(self) -> bool:
        """Whether everything it waits for is done."""
        for at in range(self._known, len(self._publications)):
            if not self._is_done(self._publications[at]):
                self._known = at
                return False
        self._known = len(self._publications)
        return True

    def follow(self) -> None:
        """Get ready for :meth:`wait`."""
        if self._event is None:
            self._event = threading.Event()
        self._event.clear()

    def wait(self, timeout: float) -> None:
        """Wait to be woken, at most *timeout* seconds."""
        assert self._event is not None
        self._event.wait(timeout)

    def wake(self) -> None:
        """End the present :meth:`wait`."""
        assert self._event is not None
        self._event.set()


class Request(Waiter):
    """A thread that waits until the broker is *free* to take what it has to write."""

    def __init__(self, free: Callable[[], bool]) -> None:
        super().__init__(())
        self._free = free

    @property
    def done(self) -> bool:
        """Whether the wait is over."""
        return self._free()


class Turns:
    """Decides which waiting thread leads. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._leader: Optional[Waiter] = None
        self._followers: Deque[Waiter] = collections.deque()

    def if_unled(self, take_in: Callable[[], None]) -> None:
        """Call *take_in* unless a thread leads.

        A leader would wait in vain for the bytes that another thread has taken in.
        """
        with self._lock:
            if self._leader is None:
                take_in()

    def lead(self, waiter: Waiter, timeout: float) -> bool:
        """Return whether *waiter* leads now; wait otherwise, *timeout* seconds at most.

        The caller calls :meth:`hand_over` in the end, whatever happens.
        """
        with self._lock:
            if self._leader is None:
                self._leader = waiter
            else:
                waiter.follow()
                self._followers.append(waiter)
                if waiter.done:
                    # The leader took in its confirm before it knew of this follower.
                    self._followers.pop()
                    return False
        if self._leader is waiter:
            return True
        waiter.wait(timeout)
        with self._lock, contextlib.suppress(ValueError):
            self._followers.remove(waiter)
        return False

    def wake_done(self) -> None:
        """Wake the followers that need not wait any more."""
        if not self._followers:
            return
        with self._lock:
            done = [follower for follower in self._followers if follower.done]
            for follower in done:
                self._followers.remove(follower)
                follower.wake()

    def hand_over(self, waiter: Waiter) -> None:
        """End the turn of *waiter* if it leads: another one will."""
        if self._leader is not waiter:
            return
        with self._lock:
            self._leader = None
            followers, self._followers = list(self._followers), collections.deque()
            led = False
            for follower in followers:
                if led and not follower.done:
                    self._followers.append(follower)
                    continue
                led = led or not follower.done
                follower.wake()

    def withdraw(self, waiter: Waiter) -> None:
        """Wake a follower if no thread leads, since *waiter* was chosen and has not led."""
        if self._leader is waiter:
            # An exception from a signal handler has kept it from handing over.
            self.hand_over(waiter)
        elif self._followers:
            with self._lock:
                if self._leader is None and self._followers:
                    self._followers[0].wake()
