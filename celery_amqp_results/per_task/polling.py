"""Waiting for tasks on transports other than AMQP: the queues are read again and again.

The interval grows with the time waited. A state published in the same process, as with
``memory://``, ends the pause.
"""

from __future__ import annotations

import threading
import time
import weakref
from typing import ClassVar, Collection, Iterable, List, Optional, Tuple

from celery_amqp_results import errors
from celery_amqp_results.per_task.lookups import LookUps
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.toolkit.retry import time_left
from celery_amqp_results.waiting.progress import Progress, Update

__all__ = ("LONGEST_PAUSE", "PAUSE_SHARE", "PollingFollower", "QueueFollower", "identify")

#: Pauses between two looks, in seconds: a share of the time waited so far, within limits.
SHORTEST_PAUSE = 0.01
LONGEST_PAUSE = 0.5
PAUSE_SHARE = 0.1


def identify(state: StateMessage) -> Tuple[str, int]:
    """Return what is the same for the same state: states carry no time and no id."""
    return state.state, hash(state.body)


class QueueFollower:
    """The common part of both kinds of followers. For one thread; must be closed at the end."""

    def __init__(self, lookups: LookUps) -> None:
        self._lookups = lookups
        self._progress = Progress(identify)
        self.pending = self._progress.pending

    def add(self, ids: Iterable[str]) -> None:
        """Follow *ids* as well. Does no I/O."""
        self._progress.add(ids)

    def discard(self, task_id: str) -> None:
        """Stop following *task_id*."""
        self._progress.discard(task_id)

    def close(self) -> None:
        """Stop following all tasks."""
        self._progress.clear()

    def _check_open(self) -> None:
        if self._lookups.queues.closed:
            raise errors.BackendUnavailable("the result backend was closed while waiting")

    def _read(self, ids: Collection[str], deadline: Optional[float]) -> List[Update]:
        """Read the queues of *ids* and return the updates."""
        self._check_open()
        found = self._lookups.glance(list(ids), deadline)
        return self._progress.updates(state for state in found.values() if state is not None)


class PollingFollower(QueueFollower):
    """Follows tasks by reading their queues again and again."""

    _all: ClassVar[weakref.WeakSet[PollingFollower]] = weakref.WeakSet()

    def __init__(self, lookups: LookUps) -> None:
        super().__init__(lookups)
        self._event = threading.Event()
        self._since = time.monotonic()
        self._due = 0.0
        self._all.add(self)

    @classmethod
    def wake_all(cls) -> None:
        """Make every follower in the process read its queues, since one has a new state."""
        for follower in list(cls._all):
            follower._due = 0.0
            follower._event.set()

    def add(self, ids: Iterable[str]) -> None:
        """Follow *ids* as well. Does no I/O."""
        super().add(ids)
        self._since = time.monotonic()
        self._due = 0.0

    def poke(self) -> None:
        """Make :meth:`step` return soon. May be called by any thread."""
        self._event.set()

    def pause(self, seconds: float) -> None:
        """Wait for *seconds*, or until poked."""
        self._event.wait(seconds)

    def step(self, deadline: Optional[float], pause: float) -> List[Update]:
        """Wait at most *pause* seconds for updates and return them."""
        until = time.monotonic() + time_left(deadline, pause)
        while True:
            poked = self._event.is_set()
            if poked:
                self._event.clear()
            now = time.monotonic()
            if now >= self._due:
                share = PAUSE_SHARE * (now - self._since)
                self._due = now + min(max(share, SHORTEST_PAUSE), LONGEST_PAUSE)
                updates = self._read(self.pending, deadline)
                if updates:
                    self._since = self._due = time.monotonic()
                    return updates
            now = time.monotonic()
            if poked or now >= until:
                return []
            self._event.wait(max(0.0, min(until, self._due) - now))
