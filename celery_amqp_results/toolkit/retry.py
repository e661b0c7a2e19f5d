"""When an operation that failed is tried again."""

from __future__ import annotations

import math
import random
import time
from typing import Callable, Optional

from celery_amqp_results import options
from celery_amqp_results.toolkit.interrupts import raise_if_from_signal_handler

__all__ = ("Retry", "deadline_after", "is_over", "time_left", "wait_before_retry")

#: Pauses vary by this share, so that processes that lost a broker together do not return together.
JITTER = 0.2

#: The shortest pause, in seconds, between tries that never end. Without it they keep a core busy.
LEAST_PAUSE = 0.1


def deadline_after(
    timeout: Optional[float], clock: Callable[[], float] = time.monotonic
) -> Optional[float]:
    """Return when *timeout* seconds are over by *clock*; ``None`` for never.

    Raises:
        ValueError: when *timeout* is not a number, with which nothing would ever be over.
    """
    if timeout is None:
        return None
    if math.isnan(timeout):
        raise ValueError("nan is no timeout: give seconds, or None for no end")
    return clock() + timeout


def time_left(deadline: Optional[float], at_most: float) -> float:
    """Return the seconds until *deadline* (``time.monotonic``), at most *at_most*, at least 0."""
    if deadline is None:
        return at_most
    return max(0.0, min(at_most, deadline - time.monotonic()))


def is_over(deadline: Optional[float]) -> bool:
    """Return whether *deadline* (``time.monotonic``) is over; ``None`` never is."""
    return deadline is not None and time.monotonic() >= deadline


class Retry:
    """The tries of one operation. Has no clock and does not sleep.

    Parameters:
        policy: how often to try again, and the pauses between the tries.
        end: time (``time.monotonic``) at which to give up; ``None`` for no such time.
        jitter: returns a random number from 0 to 1.
    """

    def __init__(
        self,
        policy: options.RetryPolicy,
        end: Optional[float] = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._policy = policy
        self._end = end
        self._jitter = jitter
        #: How many tries have failed.
        self.failed = 0

    def after(self, exc: BaseException, now: float) -> Optional[float]:
        """Return the seconds to wait before the next try, or ``None`` to give up.

        Parameters:
            exc: the error of the last try. Raised again if a signal handler raised it.
            now: the time (``time.monotonic``).
        """
        raise_if_from_signal_handler(exc)
        self.failed += 1
        pause = self._policy.pause(self.failed)
        if pause is None:
            return None
        pause *= 1 - JITTER * self._jitter()
        if self._policy.max_retries is None:
            pause = self._endless(pause)
        if self._end is not None and now + pause >= self._end:
            return None
        return pause

    def after_success(self, exc: BaseException, now: float) -> float:
        """Return the seconds to wait before the next try, without ever giving up.

        For a connection that stood before: the broker was reachable, and will be again. Parameters
        and errors are those of :meth:`after`.
        """
        pause = self.after(exc, now)
        return self._endless(self._policy.interval_max if pause is None else pause)

    def _endless(self, pause: float) -> float:
        """Return the pause to make if the tries never end. The first new try is not delayed."""
        return pause if self.failed == 1 else max(pause, LEAST_PAUSE)

    def succeeded(self) -> None:
        """Reset the tries, since the operation has succeeded."""
        self.failed = 0


def wait_before_retry(tries: Retry, exc: BaseException, deadline: Optional[float] = None) -> bool:
    """Wait after a failed try; return ``False``, at once, if there must be no other one.

    Parameters:
        exc: the error of the last try. Raised again if a signal handler raised it.
        deadline: time (``time.monotonic``) after which there is no other try.
    """
    pause = tries.after(exc, time.monotonic())
    if pause is None or is_over(deadline):
        return False
    time.sleep(time_left(deadline, pause))
    return True
