"""Starting threads."""

from __future__ import annotations

import logging
import signal
import threading
from typing import Callable, FrozenSet, Optional

__all__ = ("block_signals", "start_helper", "start_thread")

logger = logging.getLogger(__name__)

#: Signals caused by the thread itself. If blocked, they would end the process without a message.
_SYNCHRONOUS = frozenset({"SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV", "SIGTRAP", "SIGSYS", "SIGABRT"})


def start_thread(target: Callable[..., object], name: str, *args: object) -> threading.Thread:
    """Start a daemon thread that receives no signals, and return it.

    The system gives a signal to any thread that does not block it. Python runs handlers in the
    main thread only. A server that waits for signals in C, as uWSGI does, would miss those that
    reach one of our threads.

    Parameters:
        name: its name, to which ``celery-results-`` is prepended.
    """
    thread = threading.Thread(target=target, name=f"celery-results-{name}", args=args, daemon=True)
    if not hasattr(signal, "pthread_sigmask"):  # pragma: no cover
        thread.start()
        return thread
    # A thread inherits the mask of the one that starts it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _blocked())
    try:
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return thread


def start_helper(target: Callable[[], object], name: str) -> Optional[threading.Thread]:
    """Start a thread that its user can do without for now.

    Parameters are those of :func:`start_thread`. Returns ``None`` when the system allows no further
    thread, which is logged.
    """
    try:
        return start_thread(target, name)
    except RuntimeError as exc:
        logger.warning("the thread celery-results-%s was not started: %s", name, exc)
        return None


def block_signals() -> None:
    """Make the calling thread receive no signals, if other code has started it."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, _blocked())


def _blocked() -> FrozenSet[int]:
    synchronous = {getattr(signal, name) for name in _SYNCHRONOUS if hasattr(signal, name)}
    return frozenset(signal.valid_signals()) - synchronous
