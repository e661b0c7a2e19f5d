"""Bounded memory: a dictionary with a limit, and a logger that logs each message once."""

from __future__ import annotations

import collections
import logging
import threading
from typing import Any, Callable, Generic, Hashable, Iterator, Optional, TypeVar

__all__ = ("BoundedDict", "OnceLogger")

_K = TypeVar("_K", bound=Hashable)
_V = TypeVar("_V")


class BoundedDict(Generic[_K, _V]):
    """A dictionary that drops its oldest entries.

    Not thread-safe: its owner has a lock.

    Parameters:
        limit: how many keys it keeps at most; ``None`` for any number.
        max_size: how large all values may be together; ``None`` for no such limit. A single value
            may be larger.
        size: returns the size of a value.
    """

    def __init__(
        self,
        limit: Optional[int],
        max_size: Optional[int] = None,
        size: Callable[[_V], int] = lambda value: 0,
    ) -> None:
        self._limit = limit
        self._max_size = max_size
        self._size_of = size
        self._items: collections.OrderedDict[_K, _V] = collections.OrderedDict()
        #: Size of all values together.
        self.size = 0

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: object) -> bool:
        return key in self._items

    def __iter__(self) -> Iterator[_K]:
        return iter(self._items)

    def __getitem__(self, key: _K) -> _V:
        return self._items[key]

    def __setitem__(self, key: _K, value: _V) -> None:
        self.pop(key, None)
        self._items[key] = value
        self.size += self._size_of(value)
        while self._is_too_long() or self._is_too_large():
            self.pop(next(iter(self._items)), None)

    def _is_too_long(self) -> bool:
        return self._limit is not None and len(self._items) > self._limit

    def _is_too_large(self) -> bool:
        return self._max_size is not None and self.size > self._max_size and len(self._items) > 1

    def get(self, key: _K, default: Any = None) -> Any:
        """Return the value of *key*, or *default*."""
        return self._items.get(key, default)

    def pop(self, key: _K, default: Any = None) -> Any:
        """Remove *key* and return its value, or *default*."""
        if key not in self._items:
            return default
        value = self._items.pop(key)
        self.size -= self._size_of(value)
        return value

    def clear(self) -> None:
        """Forget everything."""
        self._items.clear()
        self.size = 0


class OnceLogger:
    """Logs a message once, and then at the level DEBUG. Thread-safe.

    Parameters:
        logger: where to log.
        limit: how many messages are remembered.
    """

    def __init__(self, logger: logging.Logger, limit: int = 100) -> None:
        self._logger = logger
        self._lock = threading.Lock()
        self._seen: BoundedDict[Hashable, bool] = BoundedDict(limit)

    def log(self, level: int, key: Hashable, message: str, *args: Any) -> None:
        """Log a message at *level* if it is the first with *key*, and at DEBUG otherwise."""
        with self._lock:
            first = key not in self._seen
            self._seen[key] = True
        self._logger.log(level if first else logging.DEBUG, message, *args)

    def forget(self, key: Hashable) -> None:
        """Log the next message with *key* at full level again."""
        with self._lock:
            self._seen.pop(key)
