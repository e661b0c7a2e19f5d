"""Barriers, and the reads that share them.

A read may use any barrier that is published after the read began. So all reads that begin before
the next barrier is published share it, and later reads share the one after. This module does no
I/O, and is used under a lock.
"""

from __future__ import annotations

import threading
from typing import Dict, Optional, Tuple

__all__ = ("Barrier", "Barriers")


class Barrier:
    """One barrier, and the threads that wait for it."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        #: Whether it has come back.
        self.returned = False
        #: When it was published.
        self.published = 0.0

    @property
    def ended(self) -> bool:
        """Whether it has come back, or is lost."""
        return self._ended.is_set()

    def wait(self, timeout: float) -> None:
        """Wait until it has ended, for *timeout* seconds at most."""
        self._ended.wait(timeout)

    def end(self, returned: bool) -> None:
        """Let all waiting threads go on."""
        self.returned = returned
        self._ended.set()


class Barriers:
    """The barriers of one connection."""

    def __init__(self) -> None:
        #: The barrier that is published next.
        self._next: Optional[Barrier] = None
        #: Published barriers that have not come back, by their numbers.
        self._under_way: Dict[int, Barrier] = {}
        self._late: Optional[Barrier] = None
        self._published = 0

    @property
    def late_since(self) -> Optional[float]:
        """When the barrier was published that was given up, if any: others would be as late."""
        return None if self._late is None else self._late.published

    def join(self) -> Tuple[Barrier, bool]:
        """Return the barrier to wait for, and whether the caller must publish it."""
        if self._next is not None:
            return self._next, False
        self._next = Barrier()
        return self._next, True

    def publish(self, barrier: Barrier, now: float) -> int:
        """Return the number under which to publish *barrier*. From then on no read joins it."""
        self.withdraw(barrier)
        self._published += 1
        barrier.published = now
        self._under_way[self._published] = barrier
        return self._published

    def withdraw(self, barrier: Barrier) -> None:
        """Let no read join *barrier* any more."""
        if self._next is barrier:
            self._next = None

    def take(self, number: int) -> Optional[Barrier]:
        """Return the barrier that came back, which the caller ends; ``None`` if it is unknown."""
        barrier = self._under_way.pop(number, None)
        if barrier is not None and barrier is self._late:
            self._late = None
        return barrier

    def give_up(self, barrier: Barrier) -> None:
        """Note that *barrier* is late."""
        if self._late is None and barrier in self._under_way.values():
            self._late = barrier

    def lost(self) -> None:
        """End all barriers, since the connection is lost."""
        for barrier in (*self._under_way.values(), self._next):
            if barrier is not None:
                barrier.end(False)
        self.__init__()  # type: ignore[misc]
