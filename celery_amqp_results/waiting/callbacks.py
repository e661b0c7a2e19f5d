"""Callbacks of results: ``AsyncResult.then`` without a waiting thread.

A thread follows the tasks whose results have callbacks, and calls these. It is not the thread that
reads the inbox: a callback may be slow, or wait for another task.

A result set registers itself, by a barrier, as a callback of each of its members. This alone is no
request to wait, and following the members would mean a connection for every program that only
sends. So the callbacks of result sets are called by the thread that waits for the set.
"""

from __future__ import annotations

import collections
import logging
import threading
import time
from typing import Callable, Deque, Dict, List, Optional, Tuple

from vine import barrier

from celery_amqp_results import errors
from celery_amqp_results.library_types import TaskResult
from celery_amqp_results.protocol.ids import id_text
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.toolkit.threads import start_thread
from celery_amqp_results.waiting.following import Following

__all__ = ("PendingResults",)

logger = logging.getLogger(__name__)

#: The thread ends after this many seconds without a task to follow.
LINGER = 5.0

#: A result is registered just before it gets its callback. After this many seconds without a
#: callback it is not going to get one.
GRACE = 1.0


class PendingResults:
    """The result objects with callbacks to call when their tasks end.

    Parameters:
        resolve: gives a result object its final state, unless it has it already.

    Thread-safe. :meth:`remove` may be called by the garbage collector at any point.
    """

    def __init__(
        self,
        make_follower: Callable[[], Following],
        resolve: Callable[[TaskResult, StateMessage], None],
    ) -> None:
        self._make_follower = make_follower
        self._resolve = resolve
        # Guards the following attributes, except the two queues.
        self._lock = threading.Lock()
        self._results: Dict[str, List[TaskResult]] = {}
        self._follower: Optional[Following] = None
        self._closing = False
        #: Ids to follow, and when they were added.
        self._added: Deque[Tuple[str, float]] = collections.deque()
        self._removed: Deque[TaskResult] = collections.deque()

    def add(self, result: TaskResult) -> None:
        """Register *result* for the end of its task. Does no I/O."""
        task_id = id_text(result.id)
        with self._lock:
            if self._closing:
                return
            if not self._knows(result):
                self._results.setdefault(task_id, []).append(result)
            now = time.monotonic()
            self._added.append((task_id, now))
            if self._follower is None:
                follower = self._make_follower()
                start_thread(self._run, "callbacks", follower)
                self._follower = follower
                # Results left over from a thread that ended by an error.
                self._added.extend((left, now) for left in self._results)
            self._follower.poke()

    def remove(self, result: TaskResult) -> None:
        """Unregister *result*. Takes no lock and does no I/O."""
        # Does not wake the thread: that takes a lock, and the garbage collector may call this. A
        # registered result is referenced from here, so it is always removed explicitly.
        if self._knows(result):
            self._removed.append(result)

    def close(self) -> None:
        """Call no more callbacks. Ends the thread, but does not wait for it."""
        with self._lock:
            self._closing = True
            if self._follower is not None:
                self._follower.poke()

    def _knows(self, result: TaskResult) -> bool:
        if result.id is None:
            # An empty group.
            return False
        # Result objects of one task are equal.
        return any(known is result for known in self._results.get(id_text(result.id), ()))

    def _run(self, follower: Following) -> None:
        idle_since = time.monotonic()
        try:
            while not self._closing:
                self._follow_added(follower)
                while self._removed:
                    self._unfollow(follower, self._removed.popleft())
                if follower.pending:
                    idle_since = time.monotonic()
                elif time.monotonic() - idle_since >= LINGER:
                    with self._lock:
                        if not self._added:
                            self._follower = None
                            return
                self._step(follower)
        except Exception:
            logger.exception("callbacks of results are not called any more")
        finally:
            follower.close()
            with self._lock:
                if self._follower is follower:
                    self._follower = None

    def _follow_added(self, follower: Following) -> None:
        """Follow the tasks added whose results have callbacks, and drop the others."""
        undecided = []
        while self._added:
            task_id, since = self._added.popleft()
            with self._lock:
                answers = {_has_callback(result) for result in self._results.get(task_id, ())}
                if True not in answers:
                    if None in answers and time.monotonic() - since < GRACE:
                        undecided.append((task_id, since))
                    else:
                        self._results.pop(task_id, None)
                    continue
            follower.add((task_id,))
        if undecided:
            self._added.extend(undecided)
            time.sleep(0.001)
            follower.poke()

    def _step(self, follower: Following) -> None:
        try:
            updates = follower.step(None, LINGER)
        except errors.BackendUnavailable as exc:
            if self._closing:
                return
            # A waiting caller would get this error; callbacks can only wait until the broker is
            # back.
            logger.warning("callbacks of results have to wait: %s", exc)
            follower.pause(1.0)
            return
        unfetched = [
            update.task_id
            for update in updates
            if update.final is not None and not self._call(update.task_id, update.final)
        ]
        if unfetched:
            follower.pause(1.0)
            now = time.monotonic()
            self._added.extend((task_id, now) for task_id in unfetched)

    def _call(self, task_id: str, final: StateMessage) -> bool:
        """Call the callbacks of a task that has ended; return whether its result was fetched."""
        with self._lock:
            results = self._results.pop(task_id, [])
        for position, result in enumerate(results):
            try:
                self._resolve(result, final)
            except BaseException as exc:
                # A callback may raise SystemExit, for example, and errors of other results.
                if not isinstance(exc, errors.BackendUnavailable) or result._cache is not None:
                    logger.exception("a callback of the result %s has failed", task_id)
                    continue
                logger.warning("callbacks of results have to wait: %s", exc)
                with self._lock:
                    self._results.setdefault(task_id, [])[:0] = results[position:]
                return False
        return True

    def _unfollow(self, follower: Following, result: TaskResult) -> None:
        task_id = id_text(result.id)
        with self._lock:
            results = [r for r in self._results.get(task_id, ()) if r is not result]
            if results:
                self._results[task_id] = results
                return
            self._results.pop(task_id, None)
        follower.discard(task_id)


def _has_callback(result: TaskResult) -> Optional[bool]:
    """Return whether a result has callbacks other than result sets; ``None`` if it has none."""
    listeners = [listener for listener in result.on_ready.listeners if listener is not None]
    if not listeners:
        return None
    return not all(isinstance(listener, barrier) for listener in listeners)
