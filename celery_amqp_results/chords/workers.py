"""How the children of a worker report chords to its main process.

The main process of a worker leads chords, but with a pool of processes the children send chords and
store the results of their headers. Before the pool starts, the main process opens a pipe, which the
children inherit. A child writes a byte when it meets a chord.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from typing import Any, Callable, Optional, Tuple

from celery import bootsteps, signals

from celery_amqp_results.toolkit.forks import Process

__all__ = ("Bell", "bell")

#: Seconds between two bytes of a child; the first one is enough.
RING_SECONDS = 30.0

#: States of a worker that is ending or has ended.
_ENDED = (bootsteps.CLOSE, bootsteps.TERMINATE)


class Bell:
    """The pipe from the children of a worker to its main process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pipe: Optional[Tuple[int, int]] = None
        #: The process that has opened the pipe.
        self._main: Optional[Process] = None
        self._child = False
        #: The latest worker of this process, which may end before the process does, as in tests.
        self._worker: Callable[[], object] = lambda: None
        self._quiet_until = 0.0

    def hang(self, sender: Any, **kwargs: object) -> None:
        """Open the pipe, in the main process of the worker *sender*."""
        with self._lock:
            self._worker, self._child = weakref.ref(sender), False
            if not self._in_opener():
                # A worker started by a child of another worker has children of its own.
                self._close()
                reader, writer = os.pipe()
                os.set_blocking(reader, False)
                os.set_blocking(writer, False)
                self._pipe, self._main = (reader, writer), Process()

    @property
    def in_main(self) -> bool:
        """Whether this is the main process of a worker that has not ended."""
        return self._in_opener() and self._working()

    @property
    def in_child(self) -> bool:
        """Whether this is a child of a worker whose main process listens."""
        return self._child

    def reader(self) -> Optional[int]:
        """Return the file descriptor that is readable when a child rings."""
        return self._pipe[0] if self._pipe is not None and self.in_main else None

    def drain(self) -> None:
        """Read all written bytes."""
        reader = self.reader()
        if reader is not None:
            with contextlib.suppress(OSError):
                while os.read(reader, 4096):
                    pass

    def ring(self) -> None:
        """Report to the main process that there are chords, at most every :data:`RING_SECONDS`."""
        now = time.monotonic()
        if self._pipe is not None and now >= self._quiet_until:
            self._quiet_until = now + RING_SECONDS
            # Either the pipe is full, and will be read, or it is closed, and the main process is
            # gone.
            with contextlib.suppress(OSError):
                os.write(self._pipe[1], b"\0")

    def after_fork_in_child(self) -> None:
        """Become a child of the previous owner of the bell."""
        self._lock = threading.Lock()
        self._child = self._child or self._working()
        self._quiet_until = 0.0

    def _in_opener(self) -> bool:
        return self._main is not None and self._main.is_current

    def _working(self) -> bool:
        worker = self._worker()
        # Celery sends no signal when a worker is terminated. The blueprint comes after worker_init.
        state = getattr(getattr(worker, "blueprint", None), "state", None)
        return worker is not None and state not in _ENDED

    def _close(self) -> None:
        if self._pipe is not None:
            for end in self._pipe:
                with contextlib.suppress(OSError):
                    os.close(end)
            self._pipe = None


#: The bell of this process.
bell = Bell()


signals.worker_init.connect(bell.hang, weak=False)
os.register_at_fork(after_in_child=bell.after_fork_in_child)
