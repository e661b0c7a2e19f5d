"""What a leader keeps besides its chords: results in memory, early ends, and look-ups to do.

This module does no I/O and has no clock.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from typing import Collection, Dict, Iterable, List, Optional, Set, Tuple

from celery_amqp_results.chords.actions import LookUp
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.ranking import supersedes

__all__ = ("Ends", "LookUps", "Marks")

#: Clocks of two hosts differ by less than this, in microseconds. If they differ by more, the
#: first recheck finds what was missed.
SKEW = 4_000_000

#: The most ends that are kept for chords whose plan has not arrived.
MAX_EARLY = 100_000

#: The most ids in one look-up.
MAX_LOOK_UP = 20_000

#: Pauses, in seconds, before a failed look-up or sending is tried again.
RETRY_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class Ends:
    """The memory for results, and the ends of tasks whose chord is not known yet.

    Parameters:
        memory: bytes of results to keep; others are read again when they are needed.
    """

    def __init__(self, memory: int) -> None:
        self._memory = memory
        #: With their times of arrival.
        self._early: collections.OrderedDict[str, Tuple[StateMessage, int]] = (
            collections.OrderedDict()
        )
        #: Bytes of all kept results.
        self.bytes = 0
        #: Ends that came before this may be forgotten, in microseconds since 1970.
        self.forgotten = 0

    def keep(self, state: StateMessage) -> Tuple[StateMessage, bool]:
        """Return *state*, without its body if the body does not fit the memory.

        Returns:
            The state, and whether its body must be read again.
        """
        size = len(state.body)
        while self._early and self.bytes + size > self._memory:
            self._forget_first()
        if size and self.bytes + size > self._memory:
            return dataclasses.replace(state, body=b""), True
        self.bytes += size
        return state, not size and state.body_queue is None

    def release(self, states: Iterable[StateMessage]) -> None:
        """Note that kept *states* are not needed any more."""
        self.bytes -= sum(len(state.body) for state in states)

    def add(self, state: StateMessage, wall: int) -> None:
        """Keep the end of a task without a known chord, at the time *wall*."""
        known = self.take(state.id)
        if known is not None and not supersedes(state, known):
            state = known
        kept, _ = self.keep(state)
        self._early[state.id] = (kept, wall)
        if len(self._early) > MAX_EARLY:
            self._forget_first()

    def take(self, task_id: str) -> Optional[StateMessage]:
        """Remove and return the early end of a task, if there is one."""
        known = self._early.pop(task_id, None)
        if known is None:
            return None
        self.release(known[:1])
        return known[0]

    def _forget_first(self) -> None:
        _, (state, came) = self._early.popitem(last=False)
        self.release((state,))
        self.forgotten = max(self.forgotten, came + SKEW)

    def clear(self) -> None:
        """Forget everything."""
        self._early.clear()
        self.bytes = 0


class Marks:
    """The marks of the chords that a task belongs to, by task."""

    def __init__(self) -> None:
        self._marks: Dict[str, Set[str]] = {}

    @property
    def tasks(self) -> Collection[str]:
        """The tasks that belong to any chord."""
        return self._marks.keys()

    def add(self, task_id: str, mark: str) -> None:
        """Note that a task belongs to a chord."""
        self._marks.setdefault(task_id, set()).add(mark)

    def of(self, ids: Iterable[str]) -> List[str]:
        """Return the marks of the chords that any of *ids* belongs to."""
        # Sorted, so that a simulated run can be repeated.
        return sorted({mark for task_id in ids for mark in self._marks.get(task_id, ())})

    def leave(self, mark: str, ids: Iterable[str]) -> List[str]:
        """Forget a chord; return those of *ids* that belong to no other chord."""
        left = []
        for task_id in ids:
            marks = self._marks.get(task_id)
            if marks is not None:
                marks.discard(mark)
                if not marks:
                    del self._marks[task_id]
                    left.append(task_id)
        return left

    def clear(self) -> None:
        """Forget everything."""
        self._marks.clear()


class LookUps:
    """The tasks to look up in the store; one look-up at a time."""

    def __init__(self) -> None:
        #: The tasks of the next look-up, from headers and from bodies.
        self._tasks: Set[str] = set()
        self._bodies: Set[str] = set()
        self._asking: Optional[LookUp] = None
        self._ask_at = 0.0
        self._failures = 0

    @property
    def due_at(self) -> float:
        """When the next look-up is due."""
        return self._ask_at if (self._tasks or self._bodies) and self._asking is None else math.inf

    def want(self, tasks: Iterable[str], bodies: Iterable[str] = ()) -> None:
        """Have tasks of headers and of bodies looked up."""
        self._tasks.update(tasks)
        self._bodies.update(bodies)

    def drop(self, tasks: Iterable[str], bodies: Iterable[str]) -> None:
        """Note that no chord waits for these tasks any more."""
        self._tasks.difference_update(tasks)
        self._bodies.difference_update(bodies)

    def begin(self) -> LookUp:
        """Return the look-up that is due."""
        tasks = frozenset(itertools.islice(self._tasks, MAX_LOOK_UP))
        bodies = frozenset(itertools.islice(self._bodies, MAX_LOOK_UP))
        self._tasks -= tasks
        self._bodies -= bodies
        self._asking = LookUp(tasks, bodies)
        return self._asking

    def answered(self, request: LookUp, now: float) -> bool:
        """Note that *request* is answered; return whether the answer still counts."""
        if request is not self._asking:
            # The read happened before the connection was lost.
            return False
        self._asking = None
        self._failures = 0
        self._ask_at = now
        return True

    def failed(
        self, request: LookUp, tasks: Collection[str], bodies: Collection[str], now: float
    ) -> None:
        """Note that the store could not be read; *tasks* and *bodies* are still waited for."""
        if request is not self._asking:
            return
        self._asking = None
        self._tasks |= request.tasks.intersection(tasks)
        self._bodies |= request.bodies.intersection(bodies)
        self._ask_at = now + pause(self._failures)
        self._failures += 1

    def clear(self) -> None:
        """Forget everything."""
        self._tasks.clear()
        self._bodies.clear()
        self._asking = None


def pause(failures: int) -> float:
    """Return the seconds to wait after that many failures in a row."""
    return RETRY_SECONDS[min(failures, len(RETRY_SECONDS) - 1)]
