"""A follower that looks tasks up in the background.

A thread that waits for one task can block while the task is looked up. A thread that follows tasks
for many clients cannot: while a shard is slow to answer, or an alarm of the broker blocks all
look-ups, the other clients must receive pushed states at once.
"""

from __future__ import annotations

import collections
import time
from typing import Callable, Deque, Dict, List, Optional

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


class _Job:
    """A look-up on another thread, or its result."""

    def __init__(self, look: Look) -> None:
        self.look = look
        self.covered = False
        #: The states found; ``None`` if there was no time.
        self.found: Optional[Dict[str, List[StateMessage]]] = None
        self.failure: Optional[Exception] = None
        #: Whether waiting continues after the failure.
        self.harmless = False


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
        self._done: Deque[_Job] = collections.deque()

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
                self._submit(self._run, _Job(self._tasks.begin(ids, bound)))

    def _run(self, job: _Job) -> None:
        """Look tasks up, on another thread."""
        look = job.look
        try:
            if look.bound:
                self._inbox.cover(look.ids, time.monotonic() + self._lookup_timeout)
                job.covered = True
            job.found = self._reads.states(look.ids, stored=look.stored)
        except TimeoutError:
            # Without a connection there is nothing to look up yet.
            pass
        except errors.BackendUnavailable as exc:
            job.failure = exc
            covered = not look.bound or job.covered
            job.harmless = covered and not was_refused(exc)
        except Exception as exc:
            job.failure = exc
        finally:
            self._done.append(job)
            self.poke()

    def _end(self, job: _Job) -> None:
        counted = self._tasks.end(job.look, job.found)
        if not counted:
            return
        if job.failure is None:
            once.forget(LOOK_UP_FAILED)
        elif job.harmless:
            warn_of_failed_look_up(job.failure)
        else:
            raise job.failure
