"""Waiters: how pushed states reach the clients that wait for them."""

from __future__ import annotations

import collections
import contextlib
import threading
from typing import Callable, Deque, Dict, Iterable, Iterator, List, Optional, Set, TypeVar

from celery_amqp_results.protocol.message import StateMessage

__all__ = ("Waiter", "Waiters")

_T = TypeVar("_T")


class Waiter:
    """A waiter: collects the states of the tasks that it watches.

    The reader thread fills it, and the waiting thread empties it. Any thread may call its methods.

    Parameters:
        wake: called, by any thread, whenever there is something to take; ``None`` where
            :meth:`wait` is used.
    """

    def __init__(self, wake: Optional[Callable[[], None]] = None) -> None:
        self._arrived: Deque[StateMessage] = collections.deque()
        self._event = threading.Event()
        self._wake = wake
        #: Tasks to read from the store, since states may have been missed.
        self._uncovered: Deque[str] = collections.deque()
        self._failure: Optional[Exception] = None

    def poke(self) -> None:
        """Wake the waiting thread."""
        self._event.set()
        if self._wake is not None:
            self._wake()

    def feed(self, state: StateMessage) -> None:
        """Add a state."""
        self._arrived.append(state)
        self.poke()

    def uncover(self, ids: Iterable[str]) -> None:
        """Report that states of *ids* may have been missed."""
        self._uncovered.extend(ids)
        self.poke()

    def fail(self, failure: Exception) -> None:
        """Report that no more states will come."""
        self._failure = failure
        self.poke()

    def wait(self, timeout: float) -> bool:
        """Wait until there is something to take; return whether there is."""
        return self._event.wait(timeout)

    def take(self) -> List[StateMessage]:
        """Return the states that have come since the last call.

        Raises:
            Exception: the argument of :meth:`fail`.
        """
        self._event.clear()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return list(_popped(self._arrived))

    def take_uncovered(self) -> Set[str]:
        """Return the tasks to read from the store, each once."""
        return set(_popped(self._uncovered))


class Waiters:
    """The waiters of a process, by the tasks that they watch. Not thread-safe."""

    def __init__(self) -> None:
        self.by_task: Dict[str, List[Waiter]] = {}

    def __len__(self) -> int:
        return len(self.by_task)

    def add(self, task_id: str, waiter: Waiter) -> None:
        """Have *waiter* watch a task."""
        self.by_task.setdefault(task_id, []).append(waiter)

    def remove(self, task_id: str, waiter: Waiter) -> bool:
        """Stop *waiter* from watching a task; return whether it did."""
        waiters = self.by_task.get(task_id, [])
        if waiter not in waiters:
            return False
        waiters.remove(waiter)
        if not waiters:
            del self.by_task[task_id]
        return True

    def __contains__(self, task_id: object) -> bool:
        return task_id in self.by_task

    def feed(self, state: StateMessage) -> None:
        """Hand *state* to all that watch its task."""
        for waiter in self.by_task.get(state.id, ()):
            waiter.feed(state)

    def uncover(self) -> None:
        """Report to all that states may have been missed."""
        for task_id, waiters in self.by_task.items():
            for waiter in waiters:
                waiter.uncover((task_id,))

    def fail(self, failure: Exception) -> None:
        """Report to all that no more states will come."""
        for waiters in self.by_task.values():
            for waiter in waiters:
                waiter.fail(failure)


def _popped(queue: Deque[_T]) -> Iterator[_T]:
    # Other threads append meanwhile, so a length taken before would be wrong.
    with contextlib.suppress(IndexError):
        while True:
            yield queue.popleft()
