"""The limit on a backend's open connections: the setting ``broker_pool_limit``."""

from __future__ import annotations

import collections
import threading
import time
import weakref
from typing import Any, Callable, List, Optional

from celery_amqp_results import errors
from celery_amqp_results.toolkit.retry import is_over, time_left

__all__ = ("LASTING", "Slot", "Slots")

#: Purposes of connections that stay open for as long as their user exists. One connection is always
#: left for the others, which take turns.
LASTING = frozenset({"inbox", "chords", "watch", "push"})

#: Seconds that a caller without a deadline waits for a connection.
PATIENCE = 30.0

#: Seconds after which a waiting caller looks again for an idle connection.
LOOK_AGAIN = 0.1


class Slot:
    """The place of one connection."""

    def __init__(self, purpose: str) -> None:
        self.purpose = purpose
        #: Whether the connection is counted.
        self.taken = False


class Slots:
    """Counts open connections, and makes callers wait that would exceed the limit.

    Parameters:
        limit: how many connections may be open at once; ``None`` or 0 for any number.

    Thread-safe. After a fork the child must make new ones.
    """

    def __init__(self, limit: Optional[int]) -> None:
        self.limit = limit or None
        # Reentrant: a garbage collection within may close a forgotten connection.
        self._changed = threading.Condition(threading.RLock())
        #: How many connections are open, by purpose.
        self._open: collections.Counter[str] = collections.Counter()
        #: The waiting callers, in the order in which they came.
        self._line: List[Slot] = []
        self._givers: List[weakref.WeakMethod[Callable[[], bool]]] = []

    def add_giver(self, give_up_idle: Callable[[], bool]) -> None:
        """Add a method that closes an idle connection and returns whether there was one.

        Its object is not kept alive.
        """
        self._givers.append(weakref.WeakMethod(give_up_idle))

    def take(self, slot: Slot, deadline: Optional[float] = None) -> None:
        """Count one more connection; wait until that is possible.

        If a signal handler raises an error meanwhile, the caller must give *slot* back.

        Parameters:
            slot: a new one.
            deadline: time (``time.monotonic``) at which to give up; ``None`` for :data:`PATIENCE`.

        Raises:
            BackendUnavailable: when the limit does not allow it until then.
        """
        until = time.monotonic() + PATIENCE if deadline is None else deadline
        purpose = slot.purpose
        with self._changed:
            self._line.append(slot)
            if self._take_in_turn(slot):
                return
        while not self._take_in_turn(slot):
            if is_over(until) or (purpose in LASTING and self.limit == 1):
                self.give_back(slot)
                raise self._exceeded(purpose)
            if not self._waits_for_lasting(purpose) and self._give_up_one():
                continue
            with self._changed:
                self._changed.wait(time_left(until, LOOK_AGAIN))

    @property
    def wanted(self) -> bool:
        """Whether callers wait for a connection that is idle now, and should be closed."""
        with self._changed:
            return any(not self._waits_for_lasting(slot.purpose) for slot in self._line)

    def _waits_for_lasting(self, purpose: str) -> bool:
        """Return whether only the end of a lasting connection makes room."""
        if purpose not in LASTING or self.limit is None:
            return False
        return sum(self._open[name] for name in LASTING) + 1 >= self.limit

    def _take_in_turn(self, slot: Slot) -> bool:
        with self._changed:
            first = next((each for each in self._line if self._has_room(each.purpose)), None)
            if first is not slot:
                return False
            slot.taken = True
            self._open[slot.purpose] += 1
            self._leave_line(slot)
            return True

    def _leave_line(self, slot: Slot) -> None:
        if slot in self._line:
            self._line.remove(slot)
            self._changed.notify_all()

    def give_back(self, slot: Slot) -> None:
        """Note that a connection was closed, or not opened. Safe within garbage collection."""
        with self._changed:
            self._leave_line(slot)
            if slot.taken:
                slot.taken = False
                self._open[slot.purpose] -= 1
                self._changed.notify_all()

    def _has_room(self, purpose: str) -> bool:
        if self.limit is None:
            return True
        return not self._waits_for_lasting(purpose) and sum(self._open.values()) < self.limit

    def _give_up_one(self) -> bool:
        for giver in self._givers:
            give_up_idle: Any = giver()
            if give_up_idle is not None and give_up_idle():
                return True
        return False

    def _exceeded(self, purpose: str) -> errors.BackendUnavailable:
        with self._changed:
            used = ", ".join(f"{count} for {name}" for name, count in sorted((+self._open).items()))
        return errors.BackendUnavailable(
            f"no connection may be opened for {purpose}: broker_pool_limit is {self.limit}, and "
            f"this process has open: {used or 'none'}. Any number of threads can store and look up "
            "on 1 connection; waiting for results needs 1 more, each watch 1 more, and leading "
            "chords 1 more. Raise broker_pool_limit, or try again."
        )
