"""From the threads of the backend to an event loop.

There is one :class:`Bridge` for each pair of an event loop and a layout, however many coroutines
wait. Its thread, the *driver*, follows all their tasks together and passes new states to the loop.
Blocking calls, mostly look-ups, run in batches on a few threads that all bridges share. So nothing
blocks the loop, and a slow look-up delays only the coroutines that asked for it.

A bridge lives while coroutines wait, and a few seconds longer.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import copy
import logging
import os
import threading
import time
import weakref
from typing import (
    Any,
    Callable,
    Collection,
    Dict,
    FrozenSet,
    Iterable,
    List,
    Optional,
    Protocol,
    Sequence,
    Tuple,
    TypeVar,
)

from celery_amqp_results import errors
from celery_amqp_results.layouts import Layout
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.ranking import fold
from celery_amqp_results.toolkit.threads import block_signals, start_thread
from celery_amqp_results.waiting.following import Following
from celery_amqp_results.waiting.progress import Update
from celery_amqp_results.waiting.tap import Tap, tap_of

__all__ = ("Bridge", "Subscriber", "bridge_of", "run_blocking")

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

#: The driver's thread ends after this many seconds without a task to follow.
LINGER = 5.0

#: The most threads for blocking calls in the process.
MAX_THREADS = 8


class Subscriber(Protocol):
    """Receives updates about tasks on the event loop. Called by the loop alone."""

    def take(self, update: Update) -> None:
        """Take the new states of a task."""

    def fail(self, failure: Exception) -> None:
        """Take the error after which nothing more comes."""


# -- blocking calls --------------------------------------------------------------------------------


class _Threads:
    """The threads for blocking calls; a forked child has its own."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._lock = threading.Lock()
        self._executor: Optional[concurrent.futures.ThreadPoolExecutor] = None

    def get(self) -> concurrent.futures.ThreadPoolExecutor:
        with self._lock:
            if self._executor is None:
                self._executor = concurrent.futures.ThreadPoolExecutor(
                    MAX_THREADS, "celery-results-aio", block_signals
                )
            return self._executor


_threads = _Threads()
os.register_at_fork(after_in_child=_threads.reset)


def _submit(function: Callable[..., Any], *args: Any) -> None:
    """Call *function* on one of these threads."""
    try:
        _threads.get().submit(function, *args)
    except RuntimeError:
        # The interpreter is about to end and can start no more threads.
        function(*args)


async def run_blocking(function: Callable[..., _T], *args: Any) -> _T:
    """Call *function* on one of a few threads and return its result.

    When the waiting coroutine is cancelled, the function runs to its end all the same.
    """
    return await asyncio.get_running_loop().run_in_executor(_threads.get(), function, *args)


# -- the thread that follows -----------------------------------------------------------------------


class _Driver:
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
                self._follower = self._layout.follower(_submit)
                self.running = True
                start_thread(self._run, "aio-follow", self._follower)
            self._commands.append((add, ids))
            self._follower.poke()

    def _run(self, follower: Following) -> None:
        failure: Optional[Exception] = None
        try:
            self._follow(follower)
        except Exception as exc:
            logger.exception("results are not handed to the event loop any more")
            failure = exc
        with self._lock:
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
            except (errors.BackendUnavailable, errors.DeclarationRefused) as exc:
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


class _TapDriver:
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


# -- on the loop -----------------------------------------------------------------------------------


class Bridge:
    """Delivers updates about tasks to the coroutines that wait for them on one event loop.

    Parameters:
        loop: the event loop.
        layout: where the results are kept.

    For the loop's thread only, except :meth:`abandon` and :meth:`abandon_everything`.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, layout: Layout) -> None:
        # The registry maps the loop to the bridge: a strong reference would keep the loop for ever.
        self._loop = weakref.ref(loop)
        self.layout = layout
        self._driver = _Driver(layout, self._post, self._take, self._fail_tasks)
        self._subscribers: Dict[str, List[Subscriber]] = {}
        #: The current state of each followed task, for coroutines that begin to wait later.
        self._present: Dict[str, StateMessage] = {}
        #: Ids that the driver gets at the end of this turn of the loop.
        self._added: List[str] = []
        #: Futures of the coroutines that asked for the current state in this turn of the loop.
        self._asked: Dict[str, List[asyncio.Future[Optional[StateMessage]]]] = {}
        self._taps: Dict[Optional[FrozenSet[str]], Tuple[_TapDriver, List[Subscriber]]] = {}

    @property
    def idle(self) -> bool:
        """Whether no coroutine waits and no thread is at work."""
        return not (
            self._subscribers or self._added or self._asked or self._taps or self._driver.running
        )

    def _post(self, function: Optional[Callable[..., None]], *args: Any) -> bool:
        """Make the loop call *function*; return whether the loop still exists. For any thread."""
        loop = self._loop()
        if loop is None or loop.is_closed():
            return False
        if function is not None:
            try:
                loop.call_soon_threadsafe(function, *args)
            except RuntimeError:
                return False
        return True

    # -- given tasks ---------------------------------------------------------------------------

    def subscribe(self, ids: Iterable[str], subscriber: Subscriber) -> None:
        """Send updates of *ids* to *subscriber*, beginning with the known states."""
        for task_id in ids:
            subscribers = self._subscribers.get(task_id)
            if subscribers is None:
                self._subscribers[task_id] = [subscriber]
                if not self._added:
                    # All that begin to wait in this turn are looked up together.
                    asyncio.get_running_loop().call_soon(self._flush)
                self._added.append(task_id)
                continue
            subscribers.append(subscriber)
            present = self._present.get(task_id)
            if present is not None:
                subscriber.take(Update(task_id, [present], None, history=True))

    def _flush(self) -> None:
        added, self._added = self._added, []
        wanted = [task_id for task_id in added if task_id in self._subscribers]
        if wanted:
            self._driver.add(wanted)

    def unsubscribe(self, ids: Iterable[str], subscriber: Subscriber) -> None:
        """Send no more updates of *ids* to *subscriber*."""
        left = []
        for task_id in ids:
            subscribers = self._subscribers.get(task_id)
            if subscribers is None:
                continue
            with contextlib.suppress(ValueError):
                subscribers.remove(subscriber)
            if not subscribers:
                del self._subscribers[task_id]
                self._present.pop(task_id, None)
                left.append(task_id)
        if left:
            self._driver.discard(left)

    def abandon(self, ids: Collection[str], subscriber: Subscriber) -> None:
        """Schedule :meth:`unsubscribe` on the loop. For any thread."""
        self._post(self.unsubscribe, ids, subscriber)

    def _take(self, updates: List[Update]) -> None:
        for update in updates:
            task_id = update.task_id
            if update.final is not None:
                self._present.pop(task_id, None)
                subscribers = self._subscribers.pop(task_id, [])
            else:
                subscribers = self._subscribers.get(task_id, [])
                if subscribers:
                    known = self._present.get(task_id)
                    present = fold([*([known] if known else []), *update.states])
                    assert present is not None
                    self._present[task_id] = present
            for subscriber in list(subscribers):
                subscriber.take(update)

    def _fail_tasks(self, ids: List[str], failure: Exception) -> None:
        for task_id in ids:
            self._present.pop(task_id, None)
            for subscriber in self._subscribers.pop(task_id, []):
                subscriber.fail(_copied(failure))

    # -- everything ----------------------------------------------------------------------------

    def subscribe_to_everything(
        self, wanted: Optional[FrozenSet[str]], subscriber: Subscriber
    ) -> None:
        """Send every state that is published from about now on to *subscriber*.

        Raises:
            Unsupported: when the layout cannot watch everything.
        """
        if wanted not in self._taps:
            tap = tap_of(self.layout, wanted)

            def take(states: List[StateMessage]) -> None:
                for state in states:
                    for each in list(subscribers):
                        each.take(Update(state.id, [state], None))

            def fail(failure: Exception) -> None:
                if self._taps.get(wanted, (None,))[0] is driver:
                    del self._taps[wanted]
                for each in list(subscribers):
                    each.fail(_copied(failure))

            subscribers: List[Subscriber] = []
            driver = _TapDriver(tap, self._post, take, fail)
            self._taps[wanted] = (driver, subscribers)
        self._taps[wanted][1].append(subscriber)

    def unsubscribe_from_everything(
        self, wanted: Optional[FrozenSet[str]], subscriber: Subscriber
    ) -> None:
        """Send no more states to *subscriber*."""
        if wanted not in self._taps:
            return
        driver, subscribers = self._taps[wanted]
        with contextlib.suppress(ValueError):
            subscribers.remove(subscriber)
        if not subscribers:
            del self._taps[wanted]
            driver.close()

    def abandon_everything(self, wanted: Optional[FrozenSet[str]], subscriber: Subscriber) -> None:
        """Schedule :meth:`unsubscribe_from_everything` on the loop. For any thread."""
        self._post(self.unsubscribe_from_everything, wanted, subscriber)

    # -- asking once ---------------------------------------------------------------------------

    async def poll(self, ids: Sequence[str]) -> Dict[str, Optional[StateMessage]]:
        """Return the current state of each of *ids*, or ``None`` where nothing is known.

        All ids requested in one turn of the loop are looked up together.

        Raises:
            LookupTimeout, BackendUnavailable, DeclarationRefused: as ``Layout.poll``.
        """
        loop = asyncio.get_running_loop()
        if not self._asked:
            loop.call_soon(self._ask)
        futures = {}
        for task_id in ids:
            futures[task_id] = future = loop.create_future()
            self._asked.setdefault(task_id, []).append(future)
        try:
            return {task_id: await future for task_id, future in futures.items()}
        finally:
            for future in futures.values():
                # The error is shared by all callers, and another one raises it.
                if not future.cancel() and not future.cancelled():
                    future.exception()

    def _ask(self) -> None:
        asked, self._asked = self._asked, {}
        if not asked:
            return
        task = asyncio.get_running_loop().run_in_executor(
            _threads.get(), self.layout.poll, list(asked)
        )

        def answer(done: asyncio.Future[Dict[str, Optional[StateMessage]]]) -> None:
            failure = None if done.cancelled() else done.exception()
            for task_id, futures in asked.items():
                for future in futures:
                    if future.done():
                        continue
                    if done.cancelled():
                        future.cancel()
                    elif failure is not None:
                        future.set_exception(_copied(failure))
                    else:
                        future.set_result(done.result()[task_id])

        task.add_done_callback(answer)


def _copied(exc: BaseException) -> Any:
    """Return a copy of *exc* to raise: one object raised at many places makes it grow."""
    try:
        copied = copy.copy(exc)
    except Exception:
        return exc
    copied.__cause__ = exc.__cause__
    return copied


#: The bridges of each event loop, by the layout.
_bridges: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Dict[int, Bridge]] = (
    weakref.WeakKeyDictionary()
)
_bridges_lock = threading.Lock()


def bridge_of(backend: Any) -> Bridge:
    """Return the bridge of the running loop to the layout of *backend*."""
    loop = asyncio.get_running_loop()
    layout = backend.layout
    with _bridges_lock:
        bridges = _bridges.setdefault(loop, {})
        bridge = bridges.get(id(layout))
        if bridge is None:
            # An idle bridge has no threads left, and would only keep its layout alive.
            for key in [key for key, each in bridges.items() if each.idle]:
                del bridges[key]
            bridge = bridges[id(layout)] = Bridge(loop, layout)
        return bridge


def _after_fork_in_child() -> None:
    global _bridges_lock
    _bridges_lock = threading.Lock()
    _bridges.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
