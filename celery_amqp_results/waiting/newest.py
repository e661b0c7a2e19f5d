"""The order of watches: each state that becomes current, once, and never an older one after it."""

from __future__ import annotations

import dataclasses
from typing import List, Optional

from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.ranking import fold, supersedes
from celery_amqp_results.toolkit.bounded import BoundedDict
from celery_amqp_results.waiting.progress import Update, published_as

__all__ = ("Newest",)


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
