"""Waiting for tasks: what the inbox pushes, put together with what the store keeps.

A :class:`Follower` follows any number of tasks. Of each it hands out every state once, in the
order of publishing where that can be told, and says which one ends the task. It looks a task up
in the store once when it starts to follow it (unless the inbox covers it), again after the
inbox's connection was lost, and now and then while nothing comes: a push is a hint, the store is
the truth.
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
from celery_amqp_results.amqp import connections
from celery_amqp_results.amqp.once import OnceLogger
from celery_amqp_results.feed.inbox import Inbox, Waiter
from celery_amqp_results.feed.reads import Reads
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.ranking import fold, is_final

__all__ = ("Follower", "Update")

logger = logging.getLogger(__name__)

#: What happens at each poll while a broker is away is logged once, until it is back.
once = OnceLogger(logger)
LOOK_UP_FAILED = "look-up failed"

#: Seconds after which the store is asked again although nothing was pushed; doubled each time, up
#: to the most. It costs next to nothing, and ends a wait whose push went astray for a reason that
#: nobody has thought of.
FIRST_RECHECK = 15.0
LAST_RECHECK = 300.0
#: It is not asked while states are coming in: what is waited for may be among those on their way,
#: many of them where this process stood still, or has more to take in than it can. Nothing comes
#: any more when nothing has for so many seconds. A flow that never ends puts it off once.
SILENCE = 1.0

#: An end that the store knows for so many seconds, and that was not pushed, says that nothing is:
#: unless states are being pushed, and none that was published so much later.
LATE = 5.0

#: What was pushed of a task of which states may have been missed is held back until the store was
#: asked, for so many seconds (a look-up under way is let end): an older state there may count more,
#: of a task that ran twice. After that, and at the end of the wait, what was pushed is better than
#: nothing.
HOLD_SECONDS = 30.0


@dataclasses.dataclass(frozen=True)
class Update:
    """What is new of a task."""

    task_id: str
    #: States not handed out before, in the order of publishing.
    states: List[StateMessage]
    #: The state that ends the task, or ``None`` while it goes on.
    final: Optional[StateMessage]
    #: Whether some of the states were read from the store, so that they may be long past.
    history: bool = dataclasses.field(default=False, compare=False)


class _Held(NamedTuple):
    """What is held back of a task."""

    #: Since when, by ``time.monotonic``.
    since: float
    states: List[StateMessage]


class Follower:
    """Follows tasks until they end. To be used by one thread, and closed at the end.

    Parameters:
        inbox: pushes states.
        reads: says what is known.
        wake: called, by any thread, when :meth:`step` has something to do.
    """

    def __init__(
        self, inbox: Inbox, reads: Reads, wake: Optional[Callable[[], None]] = None
    ) -> None:
        self._inbox = inbox
        self._reads = reads
        self._waiter = Waiter(wake)
        #: Of each task followed, the state that counts so far.
        self.pending: Dict[str, Optional[StateMessage]] = {}
        self._seen: Dict[str, Set[Tuple[int, str]]] = {}
        #: Tasks whose store is to be asked, and what was pushed of them meanwhile: an older state
        #: in the store may count more.
        self._unsettled: Set[str] = set()
        self._held: Dict[str, _Held] = {}
        #: Tasks of others that the store was asked about before their shards were bound.
        self._peeked: Set[str] = set()
        #: Tasks whose states are pushed since they are followed.
        self._pushed: Set[str] = set()
        #: Tasks that were covered when they were last asked for all the same.
        self._rechecked: Set[str] = set()
        #: Tasks of which the store had something in this step.
        self._found: Set[str] = set()
        self._pause = FIRST_RECHECK
        self._recheck_at = time.monotonic() + FIRST_RECHECK
        #: Since when nothing has been pushed to this process, as far as that was looked at, and how
        #: much had been by then.
        self._silent_since: Optional[float] = None
        self._heard = 0
        #: Whether nothing was, when the store was last asked about all again.
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
        """Follow *task_id* no more."""
        if task_id in self.pending:
            self._finish(task_id, consumed=False)

    def close(self) -> None:
        """Follow nothing any more."""
        self._inbox.unwatch(self.pending, self._waiter)
        self.pending.clear()

    def poke(self) -> None:
        """Have :meth:`step` return soon. May be called by any thread."""
        self._waiter.poke()

    def pause(self, seconds: float) -> None:
        """Wait for *seconds*, or until there is something to do."""
        self._waiter.wait(seconds)

    def step(self, deadline: Optional[float], pause: float) -> List[Update]:
        """Wait for something new and return it.

        Parameters:
            deadline: time (``time.monotonic``) after which the store is not asked any more.
            pause: seconds to wait at most before returning empty-handed. Asking the store may
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
        # Not before: of these, some may have come on a new connection, and others been missed.
        self._note_uncovered()
        for state in states:
            # Of what was covered when it was asked for all the same, nothing was missed.
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
        """Return whether the store is to be asked about all again."""
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
        """Return when :meth:`_is_to_recheck` is to be asked next."""
        if self._silent_since is None:
            return self._recheck_at - SILENCE
        return self._silent_since + SILENCE

    def _note_uncovered(self) -> None:
        """Have the store asked about tasks of which states may have been missed."""
        uncovered = self._waiter.take_uncovered() & self.pending.keys()
        if uncovered:
            self._rechecked -= uncovered
            self._pushed -= uncovered
            self._unsettle(uncovered)

    def _unsettle(self, ids: Set[str]) -> None:
        """Have the store asked about *ids*: states of them may have been missed."""
        self._unsettled |= ids

    def _hold(self, state: StateMessage) -> None:
        self._held.setdefault(state.id, _Held(time.monotonic(), [])).states.append(state)

    def _held_until(self) -> float:
        """Return when something held back is to be handed out next, if the store is not asked."""
        for held in self._held.values():
            # They are in the order of time.
            return held.since + HOLD_SECONDS
        return math.inf

    def _held_long(self, deadline: Optional[float]) -> List[str]:
        """Return the tasks of which nothing may be held back any more."""
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            return list(self._held)
        # They are in the order of time.
        return list(
            itertools.takewhile(
                lambda task_id: now - self._held[task_id].since >= HOLD_SECONDS, self._held
            )
        )

    def _release(self, ids: Iterable[str], updates: Dict[str, List[StateMessage]]) -> None:
        """Hand out what was held back of *ids*."""
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
        """Ask the store about what is unsettled."""
        # A task of somebody else may well have ended: that can be known without a binding.
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
            connections.raise_if_from_signal_handler(exc)
            return
        found = self._read(self._unsettled, deadline)
        if found is None:
            return
        # The connection may have been lost meanwhile: the waiter says so, and we ask again.
        self._unsettled.clear()
        self._take_in(found, updates)
        self._release(list(self._held), updates)

    def _read(
        self, ids: Collection[str], deadline: Optional[float]
    ) -> Optional[Dict[str, List[StateMessage]]]:
        """Return what the store has of *ids*, or ``None`` where it could not be asked in time."""
        try:
            found = self._reads.states(ids, deadline, self._to_store(ids))
        except errors.BackendUnavailable as exc:
            if exc.__cause__ is not None and connections.is_refusal(exc.__cause__):
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
        """Return those of *ids* that memory cannot tell everything about.

        It has the current state only. What came to be since we follow the task must have been
        pushed to us.
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
        """Suspect the inbox of hearing nothing, where only the store has told of an end."""
        if final.id not in self._rechecked or final.id not in self._found:
            return
        if (
            not (self._silent and self._inbox.received == self._heard)
            and self._inbox.latest < final.published + LATE * 1_000_000
        ):
            # Its push may be on its way, behind those of others.
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
