"""Telling a process from its forked children."""

from __future__ import annotations

import os

__all__ = ("Process",)


class Process:
    """The process that has made this object.

    A forked child inherits connections and locks that belong to its parent, and must not use them.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_current(self) -> bool:
        """Whether the caller is in that process."""
        return self._pid == os.getpid()
