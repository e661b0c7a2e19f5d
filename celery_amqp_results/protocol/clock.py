"""The clocks that stamp states, and that decide whether they have expired."""

from __future__ import annotations

import threading
import time

__all__ = ("PublishClock", "wall")


def wall() -> int:
    """Return microseconds since 1970."""
    return time.time_ns() // 1000


class PublishClock:
    """Microseconds since 1970 that never repeat or go back within the process.

    Two states that a process publishes one after the other must not tie, or swap when the
    system's clock is set back. Thread-safe.
    """

    def __init__(self) -> None:
        self._last = 0
        self.after_fork_in_child()

    def after_fork_in_child(self) -> None:
        """Replace a lock that a thread of the parent may have held."""
        self._lock = threading.Lock()

    def now(self) -> int:
        """Return the present time, at least one microsecond later than the last one returned."""
        with self._lock:
            self._last = max(self._last + 1, wall())
            return self._last
