"""A counter that several processes share, for tasks that leave no other trace."""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import tempfile
import threading
from typing import Dict, Iterator

__all__ = ("Ticks", "of_file", "ticking")


class Ticks:
    """A counter in a file that several processes map; each has a slot of its own."""

    SLOTS = 4096
    SLOT = struct.Struct("=Q")

    def __init__(self, path: str) -> None:
        with open(path, "r+b") as file:
            file.truncate(self.SLOTS * self.SLOT.size)
            self._map = mmap.mmap(file.fileno(), 0)
        self.path = path
        self._lock = threading.Lock()
        # Two processes with the same slot would lose counts. The processes of a worker start at
        # about the same time, so that their ids differ by less than the number of slots.
        self._at = os.getpid() % self.SLOTS * self.SLOT.size

    def add(self) -> None:
        """Count one more."""
        with self._lock:
            (count,) = self.SLOT.unpack_from(self._map, self._at)
            self.SLOT.pack_into(self._map, self._at, count + 1)

    def total(self) -> int:
        """Return the sum of all processes."""
        return sum(count for (count,) in self.SLOT.iter_unpack(self._map))


_opened: Dict[str, Ticks] = {}


def of_file(path: str) -> Ticks:
    """Return the counter of this process in the file *path*."""
    if path not in _opened:
        # Opened in the process that counts: by now the pool has forked.
        _opened[path] = Ticks(path)
    return _opened[path]


@contextlib.contextmanager
def ticking() -> Iterator[Ticks]:
    """Yield a counter in a file that is removed afterwards."""
    with tempfile.NamedTemporaryFile(prefix="bench-") as file:
        yield Ticks(file.name)
