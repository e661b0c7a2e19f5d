"""Bounded memory: a dictionary with a limit, and a logger that logs each message once."""

from __future__ import annotations

import collections
import logging
import threading
from typing import Hashable, Optional, TypeVar

__all__ = ("BoundedDict", "OnceLogger")

#: How many messages are remembered as logged.
MAX_LOGGED = 100

_K = TypeVar("_K", bound=Hashable)
_V = TypeVar("_V")


class BoundedDict(collections.OrderedDict[_K, _V]):
    """A dictionary that drops the entries set first.

    Not thread-safe: its owner has a lock.

    Parameters:
        limit: how many keys it keeps at most; ``None`` for any number.
    """

    def __init__(self, limit: Optional[int]) -> None:
        super().__init__()
        self._limit = limit

    def __setitem__(self, key: _K, value: _V) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        if self._limit is not None and len(self) > self._limit:
            self.popitem(last=False)


class OnceLogger:
    """Logs a message to *logger* once, and then at the level DEBUG. Thread-safe."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._seen: BoundedDict[Hashable, bool] = BoundedDict(MAX_LOGGED)
        self.after_fork_in_child()

    def after_fork_in_child(self) -> None:
        """Replace a lock that a thread of the parent may have held."""
        self._lock = threading.Lock()

    def log(self, level: int, key: Hashable, message: str, *args: object) -> None:
        """Log a message at *level* if it is the first with *key*, and at DEBUG otherwise."""
        with self._lock:
            first = key not in self._seen
            self._seen[key] = True
        self._logger.log(level if first else logging.DEBUG, message, *args)

    def forget(self, key: Hashable) -> None:
        """Log the next message with *key* at full level again."""
        with self._lock:
            self._seen.pop(key, None)
