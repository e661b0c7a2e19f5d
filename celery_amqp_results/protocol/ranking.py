"""The rule that decides which of several states of a task is the current one.

:func:`fold` applies the rule to a list of states. Every reader of states uses it, so a duplicate
run, a revoke written by twenty workers at once, or a late STARTED change nothing. This module does
no I/O.
"""

from __future__ import annotations

from typing import Dict, Iterable, List, Optional

from celery import states

from celery_amqp_results.protocol.message import StateMessage

__all__ = ("by_task", "fold", "is_final", "is_lasting", "supersedes")

#: The state of ``celery.contrib.abortable``; importing that module for one constant is too slow.
ABORTED = "ABORTED"


def is_final(state: str) -> bool:
    """Return whether *state* ends a task: SUCCESS, FAILURE or REVOKED."""
    return state in states.READY_STATES


#: A task that was asked to abort stays ABORTED until it ends: is_aborted() must not turn false
#: because of a progress report or a late STARTED. All states that are not listed have rank 0.
_RANKS = {**dict.fromkeys(states.READY_STATES, 2), states.SUCCESS: 3, ABORTED: 1}


def supersedes(new: StateMessage, old: StateMessage) -> bool:
    """Return whether the state *new* outranks the state *old* of the same task.

    SUCCESS yields to nothing. Any other final state yields only to SUCCESS or to a final state
    published later. Otherwise the state published last wins.
    """
    new_rank, old_rank = _RANKS.get(new.state, 0), _RANKS.get(old.state, 0)
    if new_rank != old_rank:
        return new_rank > old_rank
    if new.state == states.SUCCESS:
        # Two runs of one task: others may already have read the first result.
        return new.published < old.published
    return new.published >= old.published


def is_lasting(state: Optional[StateMessage]) -> bool:
    """Return whether a task keeps this status until it is forgotten: SUCCESS.

    Another SUCCESS that was published earlier, and arrives later, still takes its place.
    """
    return state is not None and state.state == states.SUCCESS


def by_task(messages: Iterable[StateMessage]) -> Dict[str, List[StateMessage]]:
    """Return states by the id of their task, each list in the given order."""
    found: Dict[str, List[StateMessage]] = {}
    for message in messages:
        found.setdefault(message.id, []).append(message)
    return found


def fold(messages: Iterable[StateMessage]) -> Optional[StateMessage]:
    """Return the current state, or ``None`` for no messages.

    Parameters:
        messages: states of one task, in any order; of two with equal rank that were published in
            the same microsecond, the later in the order wins.
    """
    current: Optional[StateMessage] = None
    for message in messages:
        if current is None or supersedes(message, current):
            current = message
    return current
