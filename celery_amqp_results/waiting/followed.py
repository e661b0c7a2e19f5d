"""Following tasks: what is known of each, what must be looked up, what is yielded when.

The objects here have no I/O, threads or clock. A :class:`~celery_amqp_results.waiting.follower` is
the shell that feeds them with pushed states and with the results of look-ups.

=============== ==================================== =========================================
a task is        because                              a pushed state is
=============== ==================================== =========================================
complete         nothing can have been missed         yielded at once
due              states may have been missed, or it   held back until the look-up ends, since an
                 was never looked up                  older state in the store may outrank it
due and sure     nothing was pushed for a long time   yielded at once: nothing was missed
=============== ==================================== =========================================

A look-up ends *due* if the bindings stood before it began. One without bindings, for a task that
another process has sent, only finds out whether the task has ended already.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Collection, Dict, Iterable, List, Mapping, Optional, Set

from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.waiting.progress import Progress, Update

__all__ = ("HOLD_SECONDS", "FollowedTasks", "Look")

#: After a possible loss, pushed states of a task are held back until the store was read, for at
#: most this many seconds (a look-up in progress may end first): for a task that ran twice, an older
#: state there may outrank them. After that, and at the end of the wait, a pushed state is better
#: than none.
HOLD_SECONDS = 30.0


@dataclasses.dataclass(eq=False)
class Look:
    """A look-up in progress. The object itself is the handle that ends it."""

    ids: Set[str]
    #: Whether the bindings of the tasks stand before the store is read.
    bound: bool
    #: The tasks with states that memory may not have: it has the current state only, and later
    #: states are pushed while the task is followed.
    stored: Set[str]


@dataclasses.dataclass(eq=False)
class _Task:
    """What is known of the completeness of one task's states."""

    #: Whether its states are pushed, and were since it is followed.
    pushed: bool = False
    #: Whether it was looked up while its shard was not bound.
    looked_up: bool = False
    #: Whether it is due although its bindings stood all the time.
    sure: bool = False
    #: The look-up in progress that will tell of it.
    look: Optional[Look] = None


class FollowedTasks:
    """The table of followed tasks. The docstring of the module shows its transitions."""

    def __init__(self) -> None:
        self._progress = Progress()
        #: The current state so far of each task that has not ended.
        self.pending = self._progress.pending
        self._tasks: Dict[str, _Task] = {}
        #: Tasks to look up.
        self._due: Set[str] = set()
        #: States held back, and since when, by task; the oldest first.
        self._held: Dict[str, List[StateMessage]] = {}
        self._held_since: Dict[str, float] = {}
        #: States to yield, and the tasks with states from the store among them.
        self._news: Dict[str, List[StateMessage]] = {}
        self._from_store: Set[str] = set()
        #: The final states among the last updates that only the store had, although their pushes
        #: should have come.
        self.unpushed: List[StateMessage] = []

    # -- events ------------------------------------------------------------------------------------

    def add(self, ids: Iterable[str]) -> List[str]:
        """Follow *ids* as well; return those that are new, each once."""
        new = self._progress.add(ids)
        self._tasks.update((task_id, _Task()) for task_id in new)
        return new

    def discard(self, task_id: str) -> None:
        """Stop following *task_id*."""
        self._progress.discard(task_id)
        self._tasks.pop(task_id, None)
        self._due.discard(task_id)
        self._held.pop(task_id, None)
        self._held_since.pop(task_id, None)

    def pushed(self, ids: Iterable[str]) -> None:
        """Note tasks whose states were pushed already when they were added."""
        for task_id in ids:
            self._tasks[task_id].pushed = True

    def missed(self, ids: Iterable[str]) -> None:
        """Note that states may have been missed. Look-ups in progress no longer count."""
        for task_id in self._tasks.keys() & ids:
            task = self._tasks[task_id]
            task.pushed = task.sure = False
            task.look = None
            self._due.add(task_id)

    def recheck(self, covered: Iterable[str]) -> None:
        """Make all tasks due. Nothing was missed of those that are *covered*."""
        self._due.update(self._tasks)
        for task_id in covered:
            self._tasks[task_id].sure = True

    def arrived(self, states: Iterable[StateMessage], now: float) -> None:
        """Take in pushed states."""
        for state in states:
            task = self._tasks.get(state.id)
            if task is None:
                continue
            if state.id in self._due and not task.sure:
                self._held.setdefault(state.id, []).append(state)
                self._held_since.setdefault(state.id, now)
            else:
                self._news.setdefault(state.id, []).append(state)

    # -- look-ups ----------------------------------------------------------------------------------

    @property
    def due(self) -> Set[str]:
        """The tasks to look up, except those that a look-up in progress will tell of."""
        return {task_id for task_id in self._due if self._tasks[task_id].look is None}

    def never_looked_up(self, unbound: Iterable[str]) -> Set[str]:
        """Return those of *unbound* tasks that may have ended long ago, for all that is known."""
        return {task_id for task_id in unbound if not self._tasks[task_id].looked_up}

    def begin(self, ids: Collection[str], bound: bool) -> Look:
        """Begin to look up *ids*."""
        tasks = {task_id: self._tasks[task_id] for task_id in ids}
        stored = {i for i, task in tasks.items() if task.sure or not task.pushed}
        look = Look(set(ids), bound, stored)
        for task in tasks.values():
            task.look = look
            task.looked_up = task.looked_up or not bound
        return look

    def end(self, look: Look, found: Optional[Mapping[str, List[StateMessage]]]) -> bool:
        """End a look-up, and release the states that were held back for it.

        *found* is ``None`` if the store could not be read. Returns whether any of its tasks still
        counted on it.
        """
        ids = [i for i in look.ids if i in self._tasks and self._tasks[i].look is look]
        for task_id in ids:
            self._tasks[task_id].look = None
            if found is None:
                continue
            if found[task_id]:
                self._from_store.add(task_id)
                self._news.setdefault(task_id, []).extend(found[task_id])
            if look.bound:
                self._due.discard(task_id)
                self._release(task_id)
        return bool(ids)

    # -- results -----------------------------------------------------------------------------------

    def held_until(self) -> float:
        """Return when the next state held back is released, even if the store is not read."""
        return min(self._held_since.values(), default=math.inf) + HOLD_SECONDS

    def release(self, held_before: float) -> None:
        """Release what is held back since *held_before* (``time.monotonic``) or longer."""
        oldest = itertools.takewhile(lambda i: self._held_since[i] <= held_before, self._held_since)
        for task_id in list(oldest):
            self._release(task_id)

    def _release(self, task_id: str) -> None:
        if task_id in self._held:
            del self._held_since[task_id]
            self._news.setdefault(task_id, []).extend(self._held.pop(task_id))

    @property
    def has_news(self) -> bool:
        """Whether :meth:`updates` may return something."""
        return bool(self._news)

    def updates(self) -> List[Update]:
        """Return the news, and discard the tasks that have ended."""
        news, self._news = self._news, {}
        from_store, self._from_store = self._from_store, set()
        self.unpushed.clear()
        updates = []
        for task_id, states in news.items():
            update = self._progress.update(task_id, states, task_id in from_store)
            if update is None:
                continue
            updates.append(update)
            if update.final is not None:
                if self._tasks[task_id].sure and update.history:
                    self.unpushed.append(update.final)
                self.discard(task_id)
        return updates
