"""When followed tasks are read from the store again: a push is a hint, the store is the truth."""

from __future__ import annotations

from typing import Optional

__all__ = ("FIRST_RECHECK", "LAST_RECHECK", "Rechecks")

#: Seconds without a push after which the store is read again; doubled each time, up to the maximum.
#: It costs next to nothing, and ends a wait whose push was lost for an unforeseen reason.
FIRST_RECHECK = 15.0
LAST_RECHECK = 300.0
#: The store is not read again while states are coming in: the awaited one may be on its way, behind
#: many others if this process stood still or is overloaded. The inbox is considered idle after
#: SILENCE seconds without a message. A flow that never ends delays the read once.
SILENCE = 1.0


class Rechecks:
    """Decides when all tasks are read from the store again. Has no clock and does no I/O.

    Times are those of ``time.monotonic``; *received* is how many messages have come.
    """

    def __init__(self, now: float) -> None:
        self._pause = FIRST_RECHECK
        self._due_at = now + FIRST_RECHECK
        #: Since when no push has been seen, as far as that was checked, and how many messages had
        #: come by then.
        self._silent_since: Optional[float] = None
        self._received = 0
        self._was_silent = False

    def is_due(self, now: float, received: int) -> bool:
        """Return whether to read the store now; then the next time is later."""
        if now < self._due_at - SILENCE:
            return False
        if self._silent_since is None or received != self._received:
            self._silent_since, self._received = now, received
        self._was_silent = now - self._silent_since >= SILENCE
        if not self._was_silent and now < self._due_at + self._pause:
            return False
        self._silent_since = None
        self._pause = min(2 * self._pause, LAST_RECHECK)
        self._due_at = now + self._pause
        return True

    @property
    def next_at(self) -> float:
        """When to call :meth:`is_due` next."""
        since = self._due_at if self._silent_since is None else self._silent_since + 2 * SILENCE
        return since - SILENCE

    def is_silent(self, received: int) -> bool:
        """Return whether the inbox was idle at the last reading, and nothing has come since."""
        return self._was_silent and received == self._received
