"""The rule that says which of several states of a task is the current one.

:func:`fold` applies the rule to a list of states. Everything that reads a state uses it, so a
duplicate run, a revoke written by twenty workers at once, or a late STARTED change nothing. This
module does no I/O.
"""

from __future__ import annotations

from typing import Iterable, Optional

from celery import states

from celery_amqp_results.protocol.message import StateMessage

__all__ = ("fold", "is_final", "supersedes")

#: The state of ``celery.contrib.abortable``, which imports too much for one word.
ABORTED = "ABORTED"


def is_final(state: str) -> bool:
    """Return whether *state* ends a task: SUCCESS, FAILURE or REVOKED."""
    return state in states.READY_STATES


def _rank(state: str) -> int:
    if state == states.SUCCESS:
        return 3
    if state in states.READY_STATES:
        return 2
    # A task that was asked to abort stays so until it ends, whatever it reports meanwhile:
    # is_aborted() must not turn false because of a progress report, or of a late STARTED.
    if state == ABORTED:
        return 1
    return 0


def supersedes(new: StateMessage, old: StateMessage) -> bool:
    """Return whether the state *new* counts more than the state *old* of the same task.

    SUCCESS yields to nothing, another final state only to a final one that was published later
    or to SUCCESS; otherwise the state published last counts.
    """
    new_rank, old_rank = _rank(new.state), _rank(old.state)
    if new_rank != old_rank:
        return new_rank > old_rank
    if new_rank == _rank(states.SUCCESS):
        # Two runs of one task: the first result is the one that others may have read already.
        return new.published < old.published
    return new.published >= old.published


def fold(messages: Iterable[StateMessage]) -> Optional[StateMessage]:
    """Return the state that counts, or ``None`` for no messages.

    Parameters:
        messages: states of one task, in any order; of two that were published in the same
            microsecond and rank alike, the later in the order counts.
    """
    current: Optional[StateMessage] = None
    for message in messages:
        if current is None or supersedes(message, current):
            current = message
    return current
