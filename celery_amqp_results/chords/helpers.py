"""Threads for the slow work of a leader: reading the store, and sending bodies."""

from __future__ import annotations

import logging
import queue
import threading
from typing import Callable, Optional

from celery_amqp_results.toolkit.threads import start_thread

__all__ = ("Helpers",)

logger = logging.getLogger(__name__)

#: The most threads that read the store and send bodies.
HELPERS = 4

#: Seconds after which an idle helper ends.
HELPER_IDLE = 30.0


class Helpers:
    """Runs functions on a few threads, which are started when needed. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads = 0
        self._busy = 0
        self._queue: queue.Queue[Optional[Callable[[], None]]] = queue.Queue()

    def submit(self, function: Callable[[], None]) -> None:
        """Call *function* soon.

        Raises:
            RuntimeError: when there is no thread, and none can be started.
        """
        with self._lock:
            if self._threads < min(HELPERS, self._busy + 1):
                try:
                    start_thread(self._run, "chord-helper")
                    self._threads += 1
                except RuntimeError:
                    if not self._threads:
                        raise
            self._busy += 1
            self._queue.put(function)

    @property
    def busy(self) -> bool:
        """Whether a function is running or waiting."""
        return self._busy > 0

    def close(self) -> None:
        """End the idle threads now, and the others as soon as they are idle."""
        with self._lock:
            for _ in range(self._threads):
                self._queue.put(None)
            self._threads = 0

    def _run(self) -> None:
        while True:
            try:
                function = self._queue.get(timeout=HELPER_IDLE)
            except queue.Empty:
                with self._lock:
                    if self._queue.empty():
                        self._threads -= 1
                        return
                continue
            if function is None:
                return
            try:
                function()
            except BaseException:
                # User code may raise SystemExit, for example.
                logger.exception("a helper of the chord leader has failed")
            finally:
                with self._lock:
                    self._busy -= 1
