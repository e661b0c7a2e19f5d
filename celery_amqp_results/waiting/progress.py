"""The states of followed tasks, each once: the final one ends its task. No I/O.

For a watch, no state comes after one that outranks it.
"""

from __future__ import annotations

import dataclasses
from typing import Callable, Dict, Hashable, Iterable, List, Optional, Set

from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.ranking import by_task, fold, is_final, supersedes
from celery_amqp_results.toolkit.bounded import BoundedDict

__all__ = ("Newest", "Progress", "Update", "published_as")


@dataclasses.dataclass(frozen=True)
class Update:
    """New states of a task."""

    task_id: str
    #: States not yielded before, in the order of publishing.
    states: List[StateMessage]
    #: The state that ends the task, or ``None`` while it goes on.
    final: Optional[StateMessage]
    #: Whether some of the states were read from the store, so that they may be old.
    history: bool = dataclasses.field(default=False, compare=False)


def published_as(state: StateMessage) -> Hashable:
    """Return what two receptions of the same state have in common."""
    return state.published, state.state


class Progress:
    """The tasks that have not ended, and their states so far."""

    def __init__(self, identify: Callable[[StateMessage], Hashable] = published_as) -> None:
        self._identify = identify
        #: The tasks that have not ended, each with its current state so far.
        self.pending: Dict[str, Optional[StateMessage]] = {}
        self._seen: Dict[str, Set[Hashable]] = {}

    def add(self, ids: Iterable[str]) -> List[str]:
        """Follow *ids* as well; return those that are new, each once."""
        new = [task_id for task_id in dict.fromkeys(ids) if task_id not in self.pending]
        self.pending.update(dict.fromkeys(new))
        return new

    def discard(self, task_id: str) -> None:
        """Stop following *task_id*."""
        self.pending.pop(task_id, None)
        self._seen.pop(task_id, None)

    def clear(self) -> None:
        """Stop following all tasks."""
        self.pending.clear()
        self._seen.clear()

    def update(
        self, task_id: str, states: Iterable[StateMessage], history: bool = False
    ) -> Optional[Update]:
        """Take in *states*; return what is new, or ``None``. A task that ends is discarded."""
        if task_id not in self.pending:
            return None
        seen = self._seen.setdefault(task_id, set())
        new = []
        for state in sorted(states, key=lambda state: state.published):
            key = self._identify(state)
            if key not in seen:
                seen.add(key)
                new.append(state)
        if not new:
            return None
        known = self.pending[task_id]
        current = fold(new if known is None else [known, *new])
        self.pending[task_id] = current
        final = current if current is not None and is_final(current.state) else None
        if final is not None:
            self.discard(task_id)
        return Update(task_id, new, final, history)

    def updates(self, states: Iterable[StateMessage]) -> List[Update]:
        """Take in states of several tasks, see :meth:`update`."""
        found = (self.update(task_id, new) for task_id, new in by_task(states).items())
        return [update for update in found if update is not None]


class Newest:
    """Filters updates for states that become current, each once.

    Parameters:
        limit: the most tasks that are remembered; ``None`` for any number.
    """

    def __init__(self, limit: Optional[int] = None) -> None:
        self._last: BoundedDict[str, StateMessage] = BoundedDict(limit)

    def of_update(self, update: Update) -> List[StateMessage]:
        """Return the states of *update* that become current, in order.

        The history of a task that is new here is left out.
        """
        states: List[StateMessage] = update.states
        if update.history and update.task_id not in self._last:
            present = fold(states)
            states = [] if present is None else [present]
        return [state for state in states if self.accept(state)]

    def accept(self, state: StateMessage) -> bool:
        """Return whether *state* outranks all earlier states of its task."""
        last = self._last.get(state.id)
        if last is not None and (
            published_as(state) == published_as(last) or not supersedes(state, last)
        ):
            return False
        # Its body is no longer needed.
        self._last[state.id] = dataclasses.replace(state, body=b"", decoded=None)
        return True

    def drop(self, task_id: str) -> None:
        """Forget a task that has no more states to come."""
        self._last.pop(task_id, None)
