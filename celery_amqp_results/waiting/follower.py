"""Waiting for tasks by combining pushed states with those in the store.

A :class:`Follower` follows any number of tasks. It yields every state of a task once, in the order
of publishing where that is known, and marks the final one. It looks a task up in the store once
when it starts to follow it (unless the inbox covers it), again after the inbox's connection was
lost, and periodically while no state comes: a push is a hint, the store is the truth.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import time
from typing import (
    Callable,
    Collection,
    Dict,
    Iterable,
    List,
    NamedTuple,
    Optional,
    Set,
    Tuple,
)

from celery_amqp_results import errors
from celery_amqp_results.amqp.failures import is_refusal
from celery_amqp_results.feed.inbox import Inbox, Waiter
from celery_amqp_results.feed.reads import Reads
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.ranking import fold, is_final
from celery_amqp_results.toolkit.bounded import OnceLogger
from celery_amqp_results.toolkit.interrupts import raise_if_from_signal_handler

__all__ = ("Follower", "Update")

logger = logging.getLogger(__name__)

#: Logs events that repeat at each poll only once, until the broker is back.
once = OnceLogger(logger)
LOOK_UP_FAILED = "look-up failed"

#: Seconds without a push after which the store is read again; doubled each time, up to the maximum.
#: It costs next to nothing, and ends a wait whose push was lost for an unforeseen reason.
FIRST_RECHECK = 15.0
LAST_RECHECK = 300.0
#: The store is not read again while states are coming in: the awaited one may be on its way, behind
#: many others if this process stood still or is overloaded. The inbox is considered idle after
#: SILENCE seconds without a message. A flow that never ends delays the read once.
SILENCE = 1.0

#: If the store has had a final state for this many seconds without a push, the inbox is suspected
#: to be deaf. It is not while states are still coming in that were all published before that time.
LATE = 5.0

#: After a possible loss, pushed states of a task are held back until the store was read, for at
#: most this many seconds (a look-up in progress may end first): for a task that ran twice, an older
#: state there may outrank them. After that, and at the end of the wait, a pushed state is better
#: than none.
HOLD_SECONDS = 30.0


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


class _Held(NamedTuple):
    """The states of a task that are held back."""

    #: Since when (``time.monotonic``).
    since: float
    states: List[StateMessage]


class Follower:
    """Follows tasks until they end. For one thread; must be closed at the end.

    Parameters:
        inbox: pushes states.
        reads: returns known states.
        wake: called, by any thread, when :meth:`step` has something to do.
    """

    def __init__(
        self, inbox: Inbox, reads: Reads, wake: Optional[Callable[[], None]] = None
    ) -> None:
        self._inbox = inbox
        self._reads = reads
        self._waiter = Waiter(wake)
        #: The current state so far of each followed task.
        self.pending: Dict[str, Optional[StateMessage]] = {}
        self._seen: Dict[str, Set[Tuple[int, str]]] = {}
        #: Tasks to read from the store, and their states that were pushed meanwhile: an older state
        #: in the store may outrank them.
        self._unsettled: Set[str] = set()
        self._held: Dict[str, _Held] = {}
        #: Strangers' tasks that were read from the store before their shards were bound.
        self._peeked: Set[str] = set()
        #: Tasks whose states are pushed while they are followed.
        self._pushed: Set[str] = set()
        #: Tasks that were covered when they were last read again.
        self._rechecked: Set[str] = set()
        #: Tasks with states in the store in this step.
        self._found: Set[str] = set()
        self._pause = FIRST_RECHECK
        self._recheck_at = time.monotonic() + FIRST_RECHECK
        #: Since when no push has been seen, as far as that was checked, and how many messages had
        #: come by then.
        self._silent_since: Optional[float] = None
        self._heard = 0
        #: Whether the inbox was idle when all tasks were last read again.
        self._silent = False

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def add(self, ids: Iterable[str]) -> None:
        """Follow *ids* as well. Does no I/O."""
        new = [task_id for task_id in dict.fromkeys(ids) if task_id not in self.pending]
        self.pending.update(dict.fromkeys(new))
        pushed = self._inbox.watch(new, self._waiter)
        self._note_uncovered()
        self._pushed |= pushed

    def discard(self, task_id: str) -> None:
        """Stop following *task_id*."""
        if task_id in self.pending:
            self._finish(task_id, consumed=False)

    def close(self) -> None:
        """Stop following all tasks."""
        self._inbox.unwatch(self.pending, self._waiter)
        self.pending.clear()

    def poke(self) -> None:
        """Make :meth:`step` return soon. May be called by any thread."""
        self._waiter.poke()

    def pause(self, seconds: float) -> None:
        """Wait for *seconds*, or until there is something to do."""
        self._waiter.wait(seconds)

    def step(self, deadline: Optional[float], pause: float) -> List[Update]:
        """Wait for new states and return them.

        Parameters:
            deadline: time (``time.monotonic``) after which the store is no longer read.
            pause: seconds to wait at most before returning an empty list. Reading the store may
                take longer.

        Raises:
            BackendUnavailable: when the broker cannot be reached or refuses us.
            DeclarationRefused: when something on the broker exists with other properties.
        """
        until = time.monotonic() + pause
        if deadline is not None:
            until = min(until, deadline)
        now = time.monotonic()
        if self._is_to_recheck(now):
            self._unsettled.update(self.pending)
            self._rechecked.update(i for i in self.pending if self._inbox.covers(i))
            self._pause = min(2 * self._pause, LAST_RECHECK)
            self._recheck_at = now + self._pause
        self._note_uncovered()
        updates: Dict[str, List[StateMessage]] = {}
        self._found.clear()
        if self._unsettled:
            self._settle(until, deadline, updates)
        if not updates:
            wake_at = min(until, self._next_look(), self._held_until())
            self._waiter.wait(max(0.0, wake_at - time.monotonic()))
        states = self._waiter.take()
        # After take(): some of these states may have come on a new connection, and others been
        # missed.
        self._note_uncovered()
        for state in states:
            # A task that was covered when it was read again has missed nothing.
            if state.id in self._unsettled and state.id not in self._rechecked:
                self._hold(state)
            else:
                updates.setdefault(state.id, []).append(state)
        self._release(self._held_long(deadline), updates)
        return [
            update
            for task_id, states in updates.items()
            if (update := self._update(task_id, states)) is not None
        ]

    def _is_to_recheck(self, now: float) -> bool:
        """Return whether all tasks must be read from the store again."""
        if now < self._recheck_at - SILENCE:
            return False
        received = self._inbox.received
        if self._silent_since is None or received != self._heard:
            self._silent_since, self._heard = now, received
        self._silent = now - self._silent_since >= SILENCE
        if not self._silent and now < self._recheck_at + self._pause:
            return False
        self._silent_since = None
        return True

    def _next_look(self) -> float:
        """Return when to call :meth:`_is_to_recheck` next."""
        if self._silent_since is None:
            return self._recheck_at - SILENCE
        return self._silent_since + SILENCE

    def _note_uncovered(self) -> None:
        """Mark tasks whose states may have been missed for reading from the store."""
        uncovered = self._waiter.take_uncovered() & self.pending.keys()
        if uncovered:
            self._rechecked -= uncovered
            self._pushed -= uncovered
            self._unsettle(uncovered)

    def _unsettle(self, ids: Set[str]) -> None:
        """Mark *ids* for reading from the store, since states of them may have been missed."""
        self._unsettled |= ids

    def _hold(self, state: StateMessage) -> None:
        self._held.setdefault(state.id, _Held(time.monotonic(), [])).states.append(state)

    def _held_until(self) -> float:
        """Return when the next state held back is released, if the store is not read."""
        for held in self._held.values():
            # They are ordered by time.
            return held.since + HOLD_SECONDS
        return math.inf

    def _held_long(self, deadline: Optional[float]) -> List[str]:
        """Return the tasks whose states must no longer be held back."""
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            return list(self._held)
        # They are ordered by time.
        return list(
            itertools.takewhile(
                lambda task_id: now - self._held[task_id].since >= HOLD_SECONDS, self._held
            )
        )

    def _release(self, ids: Iterable[str], updates: Dict[str, List[StateMessage]]) -> None:
        """Release the states held back for *ids*."""
        for task_id in ids:
            held = self._held.pop(task_id, None)
            if held is not None:
                updates.setdefault(task_id, []).extend(held.states)

    def _settle(
        self,
        until: float,
        deadline: Optional[float],
        updates: Dict[str, List[StateMessage]],
    ) -> None:
        """Read the marked tasks from the store."""
        # A stranger's task may well have ended, which a look-up can tell without a binding.
        strange = self._inbox.unbound(self._unsettled) - self._peeked
        if strange:
            self._peeked |= strange
            found = self._read(strange, deadline)
            if found is not None:
                self._take_in(found, updates)
            return
        try:
            self._inbox.cover(self._unsettled, min(until, self._held_until()))
        except TimeoutError as exc:
            raise_if_from_signal_handler(exc)
            return
        found = self._read(self._unsettled, deadline)
        if found is None:
            return
        # If the connection was lost meanwhile, the waiter says so, and we read again.
        self._unsettled.clear()
        self._take_in(found, updates)
        self._release(list(self._held), updates)

    def _read(
        self, ids: Collection[str], deadline: Optional[float]
    ) -> Optional[Dict[str, List[StateMessage]]]:
        """Return the states of *ids* in the store, or ``None`` if it could not be read in time."""
        try:
            found = self._reads.states(ids, deadline, self._to_store(ids))
        except errors.BackendUnavailable as exc:
            if exc.__cause__ is not None and is_refusal(exc.__cause__):
                raise
            if deadline is None or time.monotonic() < deadline:
                once.log(
                    logging.WARNING,
                    LOOK_UP_FAILED,
                    "waiting goes on although a look-up failed: %s",
                    exc,
                )
            return None
        once.forget(LOOK_UP_FAILED)
        self._found.update(task_id for task_id, states in found.items() if states)
        return found

    def _to_store(self, ids: Collection[str]) -> Set[str]:
        """Return those of *ids* with states that memory may not have.

        Memory has the current state only. Later states are pushed while the task is followed.
        """
        return set(ids) - (self._pushed - self._rechecked)

    @staticmethod
    def _take_in(
        found: Dict[str, List[StateMessage]], updates: Dict[str, List[StateMessage]]
    ) -> None:
        for task_id, states in found.items():
            updates.setdefault(task_id, []).extend(states)

    def _update(self, task_id: str, states: List[StateMessage]) -> Optional[Update]:
        if task_id not in self.pending:
            return None
        seen = self._seen.setdefault(task_id, set())
        new = []
        for state in sorted(states, key=_published):
            key = (state.published, state.state)
            if key not in seen:
                seen.add(key)
                new.append(state)
        if not new:
            return None
        known = self.pending[task_id]
        current = fold([known, *new] if known is not None else new)
        self.pending[task_id] = current
        final = current if _ended(current) else None
        if final is not None:
            self._listen(final)
            self._finish(task_id, consumed=True)
        return Update(task_id, new, final, task_id in self._found)

    def _listen(self, final: StateMessage) -> None:
        """Suspect the inbox of being deaf if only the store had a final state."""
        if final.id not in self._rechecked or final.id not in self._found:
            return
        if (
            not (self._silent and self._inbox.received == self._heard)
            and self._inbox.latest < final.published + LATE * 1_000_000
        ):
            # Its push may be on its way, behind others.
            return
        late = time.time_ns() // 1000 - final.published
        if late > LATE * 1_000_000:
            self._inbox.suspect(
                f"the {final.state} of {final.id!r} was published {late / 1e6:.0f} s ago, and was "
                "not pushed"
            )

    def _finish(self, task_id: str, consumed: bool) -> None:
        del self.pending[task_id]
        self._seen.pop(task_id, None)
        self._held.pop(task_id, None)
        self._unsettled.discard(task_id)
        self._peeked.discard(task_id)
        self._rechecked.discard(task_id)
        self._pushed.discard(task_id)
        self._inbox.unwatch((task_id,), self._waiter, consumed)


def _published(state: StateMessage) -> int:
    return state.published


def _ended(state: Optional[StateMessage]) -> bool:
    return state is not None and is_final(state.state)
