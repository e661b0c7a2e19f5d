"""From the threads of the backend to an event loop.

There is one :class:`Bridge` for each pair of an event loop and a layout, however many coroutines
wait. Its thread, the *driver*, follows all their tasks together and passes new states to the loop.
Blocking calls, mostly look-ups, run in batches on a few threads that all bridges share. So nothing
blocks the loop, and a slow look-up delays only the coroutines that asked for it.

A bridge lives while coroutines wait, and a few seconds longer.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import os
import threading
import weakref
from typing import (
    Any,
    Callable,
    Dict,
    FrozenSet,
    Iterable,
    List,
    Optional,
    Protocol,
    Sequence,
    Tuple,
    Union,
)

from celery_amqp_results.aio.driver import NOT_OF_ONE_TASK, Driver, TapDriver, threads
from celery_amqp_results.backend import AMQPBackend
from celery_amqp_results.layouts import Layout
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.ranking import fold
from celery_amqp_results.waiting.progress import Update
from celery_amqp_results.waiting.tap import tap_of

__all__ = ("Bridge", "Subscriber", "bridge_of")

_States = Dict[str, Optional[StateMessage]]
_Answer = Union[_States, BaseException]


class Subscriber(Protocol):
    """Receives updates about tasks on the event loop. Called by the loop alone."""

    def take(self, update: Update) -> None:
        """Take the new states of a task."""

    def fail(self, failure: Exception) -> None:
        """Take the error after which nothing more comes."""


# -- on the loop -----------------------------------------------------------------------------------


class Bridge:
    """Delivers updates about tasks to the coroutines that wait for them on one event loop.

    For the loop's thread only, except :meth:`post`.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, layout: Layout) -> None:
        # The registry maps the loop to the bridge: a strong reference would keep the loop for ever.
        self._loop = weakref.ref(loop)
        self.layout = layout
        self._driver = Driver(layout, self.post, self._take, self._fail_tasks)
        self._subscribers: Dict[str, List[Subscriber]] = {}
        #: The current state of each followed task, for coroutines that begin to wait later.
        self._present: Dict[str, StateMessage] = {}
        #: Ids that the driver gets at the end of this turn of the loop.
        self._added: List[str] = []
        #: What the coroutines asked for in this turn of the loop, and the futures for the answers.
        self._asked: List[Tuple[Sequence[str], asyncio.Future[_States]]] = []
        self._taps: Dict[Optional[FrozenSet[str]], Tuple[TapDriver, List[Subscriber]]] = {}

    @property
    def idle(self) -> bool:
        """Whether no coroutine waits and no thread is at work."""
        return not (
            self._subscribers or self._added or self._asked or self._taps or self._driver.running
        )

    def post(self, function: Optional[Callable[..., None]], *args: object) -> bool:
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
            try:
                self._driver.add(wanted)
            except Exception as exc:
                # No thread can be started now.
                self._fail_tasks(wanted, exc)

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
        """Send every state that is published from about now on to *subscriber*."""
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
            driver = TapDriver(tap, self.post, take, fail)
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

    # -- asking once ---------------------------------------------------------------------------

    async def poll(self, ids: Sequence[str]) -> _States:
        """Return the current state of each of *ids*, or ``None`` where nothing is known.

        All ids requested in one turn of the loop are looked up together. Raises what
        ``Layout.poll`` does for these ids.
        """
        if not ids:
            return {}
        loop = asyncio.get_running_loop()
        if not self._asked:
            loop.call_soon(self._ask)
        future: asyncio.Future[_States] = loop.create_future()
        self._asked.append((ids, future))
        return await future

    def _ask(self) -> None:
        asked, self._asked = self._asked, []
        loop = asyncio.get_running_loop()

        def answer(done: asyncio.Future[List[_Answer]]) -> None:
            if done.cancelled():
                for _, future in asked:
                    future.cancel()
                return
            failure = done.exception()
            answers = done.result() if failure is None else [failure] * len(asked)
            for (_, future), found in zip(asked, answers):
                if future.done():
                    continue
                if isinstance(found, BaseException):
                    future.set_exception(_copied(found))
                    # The coroutine may be cancelled before it gets the error.
                    future.exception()
                else:
                    future.set_result(found)

        try:
            requests = [ids for ids, _ in asked]
            task = loop.run_in_executor(threads(), _poll_together, self.layout, requests)
        except Exception as exc:
            # The interpreter is about to end, or no thread can be started now.
            task = loop.create_future()
            task.set_exception(exc)
        task.add_done_callback(answer)


def _poll_together(layout: Layout, requests: Sequence[Sequence[str]]) -> List[_Answer]:
    """Look up the ids of all *requests* together; return the states, or the error, of each.

    In the layout ``per-task`` one unreadable task fails the whole look-up. Then each request is
    looked up alone, so that the others get their states.
    """
    try:
        found = layout.poll(list(dict.fromkeys(itertools.chain.from_iterable(requests))))
    except Exception as exc:
        if len(requests) == 1 or isinstance(exc, NOT_OF_ONE_TASK):
            return [exc] * len(requests)
        return [answer for ids in requests for answer in _poll_together(layout, [ids])]
    return [{task_id: found[task_id] for task_id in ids} for ids in requests]


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


def bridge_of(backend: AMQPBackend) -> Bridge:
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
