"""A follower that looks tasks up in the background.

A thread that waits for one task can block while the task is looked up. A thread that follows tasks
for many clients cannot: while a shard is slow to answer, or an alarm of the broker blocks all
look-ups, the other clients must receive pushed states at once.
"""

from __future__ import annotations

import collections
import logging
import time
from typing import Any, Callable, Deque, Dict, List, Optional, Set

from celery_amqp_results import errors
from celery_amqp_results.amqp.failures import is_refusal
from celery_amqp_results.feed.inbox import Inbox
from celery_amqp_results.feed.reads import Reads
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.waiting.follower import LOOK_UP_FAILED, Follower, once

__all__ = ("BackgroundFollower",)

logger = logging.getLogger(__name__)

#: The most look-ups in progress at once.
MAX_LOOKS = 3


class _Look:
    """A look-up in progress, or done."""

    def __init__(self, ids: Set[str], cover: bool, stored: Set[str]) -> None:
        self.ids = ids
        #: Whether the tasks are covered first.
        self.cover = cover
        self.covered = False
        #: The tasks that are read from the store, even if they are in memory.
        self.stored = stored
        #: The states found; ``None`` if there was no time.
        self.found: Optional[Dict[str, List[StateMessage]]] = None
        self.failure: Optional[Exception] = None
        #: Whether waiting continues after the failure.
        self.harmless = False


class BackgroundFollower(Follower):
    """Follows tasks, and looks them up on other threads.

    Parameters:
        inbox: pushes states.
        reads: returns known states.
        lookup_timeout: seconds that a look-up may take.
        submit: calls a function with an argument on another thread, soon.

    For one thread; must be closed at the end. :meth:`step` does no I/O.
    """

    def __init__(
        self, inbox: Inbox, reads: Reads, lookup_timeout: float, submit: Callable[..., Any]
    ) -> None:
        super().__init__(inbox, reads)
        self._lookup_timeout = lookup_timeout
        self._submit = submit
        #: Tasks being looked up. A look-up that is no longer named here is obsolete: its task was
        #: dropped, or states of it may have been missed meanwhile.
        self._looking: Dict[str, _Look] = {}
        self._running = 0
        #: Finished look-ups. Other threads append.
        self._done: Deque[_Look] = collections.deque()

    def close(self) -> None:
        """Stop following all tasks. Look-ups in progress run to their end."""
        super().close()
        self._looking.clear()

    def _unsettle(self, ids: Set[str]) -> None:
        super()._unsettle(ids)
        for task_id in ids:
            self._looking.pop(task_id, None)

    def _finish(self, task_id: str, consumed: bool) -> None:
        self._looking.pop(task_id, None)
        super()._finish(task_id, consumed)

    def _settle(
        self,
        until: float,
        deadline: Optional[float],
        updates: Dict[str, List[StateMessage]],
    ) -> None:
        """Take in the findings of look-ups, and begin others. Does no I/O."""
        while self._done:
            self._take_look(self._done.popleft(), updates)
        idle = self._unsettled - self._looking.keys()
        if not idle or self._running >= MAX_LOOKS:
            return
        # A stranger's task may well have ended, which a look-up can tell without a binding.
        strange = self._inbox.unbound(idle) - self._peeked
        self._peeked |= strange
        for ids, cover in ((strange, False), (idle - strange, True)):
            if ids and self._running < MAX_LOOKS:
                self._begin(_Look(ids, cover, self._to_store(ids)))

    def _begin(self, look: _Look) -> None:
        self._looking.update(dict.fromkeys(look.ids, look))
        self._running += 1
        self._submit(self._look, look)

    def _look(self, look: _Look) -> None:
        """Look tasks up, on another thread."""
        try:
            if look.cover:
                self._inbox.cover(look.ids, time.monotonic() + self._lookup_timeout)
                look.covered = True
            look.found = self._reads.states(look.ids, stored=look.stored)
        except TimeoutError:
            # Without a connection there is nothing to look up yet.
            pass
        except errors.BackendUnavailable as exc:
            look.failure = exc
            covered = not look.cover or look.covered
            refused = exc.__cause__ is not None and is_refusal(exc.__cause__)
            look.harmless = covered and not refused
        except Exception as exc:
            look.failure = exc
        finally:
            self._done.append(look)
            self.poke()

    def _take_look(self, look: _Look, updates: Dict[str, List[StateMessage]]) -> None:
        self._running -= 1
        ids = {task_id for task_id in look.ids if self._looking.get(task_id) is look}
        for task_id in ids:
            del self._looking[task_id]
        if not ids:
            return
        if look.failure is not None:
            if not look.harmless:
                raise look.failure
            once.log(
                logging.WARNING,
                LOOK_UP_FAILED,
                "waiting goes on although a look-up failed: %s",
                look.failure,
            )
            return
        once.forget(LOOK_UP_FAILED)
        if look.found is None:
            return
        found = {task_id: look.found[task_id] for task_id in ids}
        self._found.update(task_id for task_id, states in found.items() if states)
        if look.cover:
            self._unsettled -= ids
        self._take_in(found, updates)
        if look.cover:
            self._release(ids, updates)
