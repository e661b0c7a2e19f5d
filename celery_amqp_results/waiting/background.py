"""A follower that looks tasks up in the background.

A thread that waits for one task can block while the task is looked up. A thread that follows tasks
for many clients cannot: while a shard is slow to answer, or an alarm of the broker blocks all
look-ups, the other clients must receive pushed states at once.
"""

from __future__ import annotations

import collections
import time
from typing import Callable, Deque, Dict, List, NamedTuple, Optional

from celery_amqp_results import errors
from celery_amqp_results.amqp.failures import was_refused
from celery_amqp_results.feed.inbox import Inbox
from celery_amqp_results.feed.reads import Reads
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.waiting.followed import Look
from celery_amqp_results.waiting.follower import (
    LOOK_UP_FAILED,
    Follower,
    once,
    warn_of_failed_look_up,
)

__all__ = ("BackgroundFollower",)

#: The most look-ups in progress at once.
MAX_LOOKS = 3


class _Done(NamedTuple):
    """The result of a look-up on another thread."""

    look: Look
    #: The states found; ``None`` if there was no time.
    found: Optional[Dict[str, List[StateMessage]]]
    failure: Optional[Exception]
    #: Whether waiting continues after the failure.
    harmless: bool


class BackgroundFollower(Follower):
    """Follows tasks, and looks them up on other threads.

    Parameters:
        lookup_timeout: seconds that a look-up may take.
        submit: calls a function with an argument on another thread, soon.

    For one thread; must be closed at the end. :meth:`step` does no I/O.
    """

    def __init__(
        self, inbox: Inbox, reads: Reads, lookup_timeout: float, submit: Callable[..., object]
    ) -> None:
        super().__init__(inbox, reads)
        self._lookup_timeout = lookup_timeout
        self._submit = submit
        self._running = 0
        #: Finished look-ups. Other threads append.
        self._done: Deque[_Done] = collections.deque()

    def _look_up(self, until: float, deadline: Optional[float]) -> None:
        """Take in the results of look-ups, and begin others. Does no I/O."""
        while self._done:
            self._running -= 1
            self._end(self._done.popleft())
        if self._running >= MAX_LOOKS:
            return
        due = self._tasks.due
        # A task of another process may have ended, which a look-up can tell without a binding.
        unbound = self._tasks.never_looked_up(self._inbox.unbound(due))
        for ids, bound in ((unbound, False), (due - unbound, True)):
            if ids and self._running < MAX_LOOKS:
                self._running += 1
                self._submit(self._run, self._tasks.begin(ids, bound))

    def _run(self, look: Look) -> None:
        """Look tasks up, on another thread."""
        found: Optional[Dict[str, List[StateMessage]]] = None
        failure: Optional[Exception] = None
        harmless, covered = False, not look.bound
        try:
            if not covered:
                self._inbox.cover(look.ids, time.monotonic() + self._lookup_timeout)
                covered = True
            found = self._reads.states(look.ids, stored=look.stored)
        except TimeoutError:
            # Without a connection there is nothing to look up yet.
            pass
        except errors.BackendUnavailable as exc:
            failure, harmless = exc, covered and not was_refused(exc)
        except Exception as exc:
            failure = exc
        finally:
            self._done.append(_Done(look, found, failure, harmless))
            self.poke()

    def _end(self, done: _Done) -> None:
        if not self._tasks.end(done.look, done.found):
            return
        if done.failure is None:
            once.forget(LOOK_UP_FAILED)
        elif done.harmless:
            warn_of_failed_look_up(done.failure)
        else:
            raise done.failure
