"""The threads beside an event loop: one that follows tasks, and a few for blocking calls."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, List, Optional, Sequence, Tuple, TypeVar

from celery_amqp_results import errors
from celery_amqp_results.layouts import Layout
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.toolkit.threads import block_signals, start_thread
from celery_amqp_results.waiting.following import Following
from celery_amqp_results.waiting.progress import Update
from celery_amqp_results.waiting.tap import Tap

__all__ = ("NOT_OF_ONE_TASK", "Driver", "TapDriver", "run_blocking", "threads")

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

#: The driver's thread ends after this many seconds without a task to follow.
LINGER = 5.0

#: Errors of a look-up that every task would meet.
NOT_OF_ONE_TASK = (errors.BackendUnavailable, errors.DeclarationRefused)

#: The most threads for blocking calls in the process.
MAX_THREADS = 8


def _new_threads() -> ThreadPoolExecutor:
    # They are started when they are needed.
    return ThreadPoolExecutor(MAX_THREADS, "celery-results-aio", block_signals)


_threads = _new_threads()


def _after_fork_in_child() -> None:
    global _threads
    _threads = _new_threads()


os.register_at_fork(after_in_child=_after_fork_in_child)


def threads() -> ThreadPoolExecutor:
    """Return the threads of this process for blocking calls."""
    return _threads


def _submit(function: Callable[..., object], *args: object) -> None:
    """Call *function* on one of these threads."""
    try:
        threads().submit(function, *args)
    except RuntimeError:
        # The interpreter is about to end and can start no more threads.
        function(*args)


async def run_blocking(function: Callable[..., _T], *args: object) -> _T:
    """Call *function* on one of a few threads and return its result.

    When the waiting coroutine is cancelled, a function that has begun runs to its end all the same.
    One that still waits for a thread is not called.
    """
    return await asyncio.get_running_loop().run_in_executor(threads(), function, *args)


# -- the thread that follows -----------------------------------------------------------------------


class Driver:
    """Follows tasks on a thread of its own, and posts updates to the loop.

    Parameters:
        layout: makes the follower.
        post: called by the thread with a function and arguments for the loop to call; returns
            whether the loop still exists.
        take: the loop calls it with updates.
        fail: the loop calls it with the ids that are no longer followed, and the reason.

    Thread-safe.
    """

    def __init__(
        self,
        layout: Layout,
        post: Callable[..., bool],
        take: Callable[[List[Update]], None],
        fail: Callable[[List[str], Exception], None],
    ) -> None:
        self._layout = layout
        self._post = post
        self._take = take
        self._fail = fail
        # Guards the three that follow.
        self._lock = threading.Lock()
        self._follower: Optional[Following] = None
        #: Ids to follow (true) or to stop following (false), in order.
        self._commands: List[Tuple[bool, Sequence[str]]] = []
        self.running = False

    def add(self, ids: Sequence[str]) -> None:
        """Follow *ids*. Does no I/O."""
        self._command(True, ids)

    def discard(self, ids: Sequence[str]) -> None:
        """Stop following *ids*. Does no I/O."""
        self._command(False, ids)

    def _command(self, add: bool, ids: Sequence[str]) -> None:
        with self._lock:
            if self._follower is None:
                if not add:
                    return
                follower = self._layout.follower(_submit)
                start_thread(self._run, "aio-follow", follower)
                self._follower = follower
                self.running = True
            self._commands.append((add, ids))
            self._follower.poke()

    def _run(self, follower: Following) -> None:
        failure: Optional[Exception] = None
        try:
            self._follow(follower)
        except Exception as exc:
            logger.exception("results are not handed to the event loop any more")
            failure = exc
        commands: List[Tuple[bool, Sequence[str]]] = []
        with self._lock:
            # Another thread may have been started as this one ended.
            if self._follower is follower:
                self._follower = None
                self.running = False
                commands, self._commands = self._commands, []
        if failure is not None:
            ids = [task_id for add, ids in commands if add for task_id in ids]
            self._post(self._fail, [*follower.pending, *ids], failure)
        follower.close()

    def _follow(self, follower: Following) -> None:
        idle_since = time.monotonic()
        while True:
            self._obey(follower)
            now = time.monotonic()
            if follower.pending:
                idle_since = now
            elif now - idle_since >= LINGER:
                with self._lock:
                    if not self._commands:
                        self._follower = None
                        self.running = False
                        return
            if not self._post(None):
                return
            try:
                updates = follower.step(None, LINGER)
            except NOT_OF_ONE_TASK as exc:
                self._lose(follower, exc)
                continue
            except Exception as exc:
                self._find_culprits(follower, exc)
                continue
            if updates:
                self._post(self._take, updates)

    def _obey(self, follower: Following) -> None:
        with self._lock:
            commands, self._commands = self._commands, []
        for add, ids in commands:
            if add:
                follower.add(ids)
            else:
                for task_id in ids:
                    follower.discard(task_id)

    def _lose(self, follower: Following, exc: Exception) -> None:
        """Report that the followed tasks have failed, and stop following them."""
        ids = list(follower.pending)
        for task_id in ids:
            follower.discard(task_id)
        self._post(self._fail, ids, exc)

    def _find_culprits(self, follower: Following, exc: Exception) -> None:
        """Find the task whose result has raised *exc*, so that the others go on.

        The layout ``per-task`` decodes results as it reads them, and rejects content types that are
        not accepted.
        """
        found = False
        for task_id in list(follower.pending):
            try:
                self._layout.poll((task_id,))
            except errors.BackendUnavailable:
                continue
            except Exception as its_own:
                found = True
                follower.discard(task_id)
                self._post(self._fail, [task_id], its_own)
        if not found:
            self._lose(follower, exc)


class TapDriver:
    """Passes every published state to the loop, on a thread of its own."""

    def __init__(
        self,
        tap: Tap,
        post: Callable[..., bool],
        take: Callable[[List[StateMessage]], None],
        fail: Callable[[Exception], None],
    ) -> None:
        self._tap = tap
        self._post = post
        self._take = take
        self._fail = fail
        self._closing = False
        start_thread(self._run, "aio-tap")

    def close(self) -> None:
        """End the thread. Does not wait for it."""
        self._closing = True
        self._tap.poke()

    def _run(self) -> None:
        with self._tap:
            try:
                while not self._closing and self._post(None):
                    states = self._tap.step(None, LINGER)
                    if states:
                        self._post(self._take, states)
            except Exception as exc:
                self._post(self._fail, exc)
