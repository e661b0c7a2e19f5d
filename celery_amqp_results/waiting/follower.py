"""Waiting for tasks by combining pushed states with those in the store.

A :class:`Follower` follows any number of tasks. It yields every state of a task once, in the order
of publishing where that is known, and marks the final one. It looks a task up in the store once
when it starts to follow it (unless the inbox covers it), again after the inbox's connection was
lost, and periodically while no state comes.
"""

from __future__ import annotations

import logging
import math
import os
import time
from typing import Callable, Dict, Iterable, List, Optional

from celery_amqp_results import errors
from celery_amqp_results.amqp.failures import was_refused
from celery_amqp_results.feed.inbox import Inbox
from celery_amqp_results.feed.reads import Reads
from celery_amqp_results.feed.waiter import Waiter
from celery_amqp_results.protocol.clock import wall
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.toolkit.bounded import OnceLogger
from celery_amqp_results.toolkit.interrupts import raise_if_from_signal_handler
from celery_amqp_results.waiting.followed import HOLD_SECONDS, FollowedTasks, Look
from celery_amqp_results.waiting.progress import Update
from celery_amqp_results.waiting.rechecks import Rechecks

__all__ = ("Follower",)

logger = logging.getLogger(__name__)

#: Logs events that repeat at each poll only once, until the broker is back.
once = OnceLogger(logger)
os.register_at_fork(after_in_child=once.after_fork_in_child)
LOOK_UP_FAILED = "look-up failed"

#: If the store has had a final state for this many seconds without a push, the inbox is suspected
#: to be deaf. It is not while states are still coming in that were all published before that time.
LATE = 5.0


class Follower:
    """Follows tasks until they end. For one thread; must be closed at the end.

    Parameters:
        wake: called, by any thread, when :meth:`step` has something to do.
    """

    def __init__(
        self, inbox: Inbox, reads: Reads, wake: Optional[Callable[[], None]] = None
    ) -> None:
        self._inbox = inbox
        self._reads = reads
        self._waiter = Waiter(wake)
        self._tasks = FollowedTasks()
        self.pending = self._tasks.pending
        self._rechecks = Rechecks(time.monotonic())

    def add(self, ids: Iterable[str]) -> None:
        """Follow *ids* as well. Does no I/O."""
        pushed = self._inbox.watch(self._tasks.add(ids), self._waiter)
        self._note_missed()
        self._tasks.pushed(pushed)

    def discard(self, task_id: str) -> None:
        """Stop following *task_id*."""
        if task_id in self.pending:
            self._tasks.discard(task_id)
            self._inbox.unwatch((task_id,), self._waiter)

    def close(self) -> None:
        """Stop following all tasks."""
        ids = list(self.pending)
        self._inbox.unwatch(ids, self._waiter)
        for task_id in ids:
            self._tasks.discard(task_id)

    def poke(self) -> None:
        """Make :meth:`step` return soon. May be called by any thread."""
        self._waiter.poke()

    def pause(self, seconds: float) -> None:
        """Wait for *seconds*, or until there is something to do."""
        self._waiter.wait(seconds)

    def step(self, deadline: Optional[float], pause: float) -> List[Update]:
        """Wait at most *pause* seconds for updates and return them."""
        now = time.monotonic()
        until = now + pause if deadline is None else min(now + pause, deadline)
        if self._rechecks.is_due(now, self._inbox.received):
            self._tasks.recheck([i for i in self.pending if self._inbox.covers(i)])
        self._note_missed()
        self._look_up(until, deadline)
        if not self._tasks.has_news:
            wake_at = min(until, self._rechecks.next_at, self._tasks.held_until())
            self._waiter.wait(max(0.0, wake_at - time.monotonic()))
        states = self._waiter.take()
        # After take(): some of these states may have come on a new connection, and others been
        # missed.
        self._note_missed()
        now = time.monotonic()
        self._tasks.arrived(states, now)
        over = deadline is not None and now >= deadline
        self._tasks.release(math.inf if over else now - HOLD_SECONDS)
        updates = self._tasks.updates()
        ended = [update.task_id for update in updates if update.final is not None]
        self._inbox.unwatch(ended, self._waiter, consumed=True)
        for final in self._tasks.unpushed:
            self._suspect_inbox(final)
        return updates

    def _note_missed(self) -> None:
        """Mark tasks whose states may have been missed for reading from the store."""
        self._tasks.missed(self._waiter.take_uncovered())

    def _look_up(self, until: float, deadline: Optional[float]) -> None:
        """Read the tasks that are due from the store."""
        due = self._tasks.due
        if not due:
            return
        # A task of another process may have ended, which a look-up can tell without a binding.
        unbound = self._tasks.never_looked_up(self._inbox.unbound(due))
        if not unbound:
            try:
                self._inbox.cover(due, min(until, self._tasks.held_until()))
            except TimeoutError as exc:
                raise_if_from_signal_handler(exc)
                return
        look = self._tasks.begin(unbound or due, bound=not unbound)
        found: Optional[Dict[str, List[StateMessage]]] = None
        try:
            found = self._read(look, deadline)
        finally:
            # If the connection was lost meanwhile, the waiter says so, and we read again.
            self._tasks.end(look, found)

    def _read(
        self, look: Look, deadline: Optional[float]
    ) -> Optional[Dict[str, List[StateMessage]]]:
        """Return the states in the store, or ``None`` if it could not be read in time."""
        try:
            found = self._reads.states(look.ids, deadline, look.stored)
        except errors.BackendUnavailable as exc:
            if was_refused(exc):
                raise
            if deadline is None or time.monotonic() < deadline:
                warn_of_failed_look_up(exc)
            return None
        once.forget(LOOK_UP_FAILED)
        return found

    def _suspect_inbox(self, final: StateMessage) -> None:
        """Suspect the inbox of being deaf, since only the store had a final state."""
        if (
            not self._rechecks.is_silent(self._inbox.received)
            and self._inbox.latest < final.published + LATE * 1_000_000
        ):
            # Its push may be on its way, behind others.
            return
        late = wall() - final.published
        if late > LATE * 1_000_000:
            self._inbox.suspect(
                f"the {final.state} of {final.id!r} was published {late / 1e6:.0f} s ago, and was "
                "not pushed"
            )


def warn_of_failed_look_up(exc: Exception) -> None:
    """Log, once until a look-up succeeds, that a wait goes on without a look-up."""
    once.log(logging.WARNING, LOOK_UP_FAILED, "waiting goes on although a look-up failed: %s", exc)
