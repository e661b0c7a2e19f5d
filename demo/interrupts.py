"""Ctrl-C at any moment, without losing track of a process that was just being started.

SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt in the main thread; within :func:`held` they do
so at its end, and after :func:`ignore` (while cleaning up, which takes seconds) not at all.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from typing import Any, Iterator

#: A terminal, make and a shell may each pass on the same Ctrl-C: interrupts within this many
#: seconds count as one.
SAME = 1.0

#: Seconds after which an interrupt that was swallowed is raised again.
AGAIN = 0.01

_held = 0
_pending = False
_ignored = False
_last = -SAME


def install() -> None:
    """Take over the signals."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _on_signal)
    signal.signal(signal.SIGALRM, _on_alarm)
    sys.unraisablehook = _on_unraisable


def ignore() -> None:
    """Ignore the signals from now on."""
    global _ignored
    _ignored = True


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Delay an interrupt until the end of the ``with`` block."""
    global _held, _pending
    _held += 1
    try:
        yield
    finally:
        _held -= 1
        if _pending and not _held:
            _pending = False
            _interrupt()


def _on_signal(number: int, frame: Any) -> None:
    global _pending
    if _held:
        _pending = True
    else:
        _interrupt()


def _on_unraisable(unraisable: Any) -> None:
    if unraisable.exc_type is KeyboardInterrupt:
        # Raised within a destructor or a callback of the garbage collector, which swallows it.
        signal.setitimer(signal.ITIMER_REAL, AGAIN)
    else:
        sys.__unraisablehook__(unraisable)


def _on_alarm(number: int, frame: Any) -> None:
    global _last
    _last = -SAME
    _on_signal(number, frame)


def _interrupt() -> None:
    global _last
    now = time.monotonic()
    if _ignored or now - _last < SAME:
        return
    _last = now
    raise KeyboardInterrupt
