"""Waiting for tasks and watching them from coroutines; see :mod:`celery_amqp_results.aio`."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import logging
import time
import uuid
from typing import (
    Any,
    AsyncIterator,
    Collection,
    Deque,
    Dict,
    Generic,
    Iterable,
    List,
    Optional,
    Set,
    Tuple,
    TypeVar,
    Union,
)

import celery
from celery import states as celery_states
from celery.result import AsyncResult, EagerResult, ResultSet, assert_will_not_block

from celery_amqp_results import errors
from celery_amqp_results.aio import bridge
from celery_amqp_results.backend import AMQPBackend
from celery_amqp_results.errors import WaitTimeout
from celery_amqp_results.protocol.ids import id_text
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.ranking import is_final
from celery_amqp_results.waiting import results as trees
from celery_amqp_results.waiting import watch as watching
from celery_amqp_results.waiting.newest import Newest
from celery_amqp_results.waiting.progress import Update
from celery_amqp_results.waiting.results import tasks_in
from celery_amqp_results.waiting.tap import tap_of

__all__ = (
    "Completed",
    "WaitTimeout",
    "Watch",
    "as_completed",
    "forget",
    "gather",
    "get",
    "get_meta",
    "state",
    "watch",
)

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

Meta = Dict[str, Any]

#: A larger body is decoded on another thread, since decoding it here would block the loop.
LARGE_BODY = 64 * 1024

#: The most states that a watch buffers for a slow reader. Beyond that it drops the oldest: of given
#: tasks only those that are not final, of everything any.
MAX_BUFFERED = 10_000


# -- targets ---------------------------------------------------------------------------------------


def _backend_of(node: Any, app: Any = None) -> Any:
    """Return the backend that knows of an id or of a result object."""
    backend = None if isinstance(node, str) else getattr(node, "backend", None)
    if backend is None:
        backend = (app or celery.current_app).backend
    if not isinstance(backend, AMQPBackend):
        raise TypeError(
            f"the result backend is {backend!r}: celery_amqp_results.aio can wait for results of "
            "the backend amqp:// alone. For a task id, give the app whose task it is as app=..."
        )
    return backend


def _checked(node: Any) -> Any:
    """Return an id as text, and a result object as it is.

    Raises:
        TypeError: when it is neither.
    """
    if isinstance(node, (str, bytes, uuid.UUID)):
        return id_text(node)
    if isinstance(node, (AsyncResult, EagerResult, ResultSet)):
        return node
    raise TypeError(
        f"{node!r} cannot be waited for: give a task id, a result object, or a group. For several, "
        "use gather()"
    )


def _id(leaf: Any) -> str:
    return leaf if isinstance(leaf, str) else id_text(leaf.id)


def _is_known(leaf: Any) -> bool:
    """Whether *leaf* is known without asking the store."""
    return not isinstance(leaf, str) and (
        leaf.ignored
        or (leaf._cache is not None and leaf._cache["status"] in celery_states.READY_STATES)
    )


def _known_value(leaf: Any) -> Tuple[str, Any]:
    """Return state and value of what :func:`_is_known`."""
    # A task that ignores its result is not waited for: AsyncResult.get returns None.
    if leaf.ignored:
        return celery_states.SUCCESS, None
    return leaf._cache["status"], leaf._cache["result"]


async def _decoded(backend: Any, state: StateMessage) -> StateMessage:
    """Return *state*, decoded on another thread if decoding may take long.

    The body of a large result is fetched from the broker there as well.

    Raises:
        ResultExpired: when the body is gone.
        LookupTimeout, BackendUnavailable: when it could not be read.
        kombu.exceptions.ContentDisallowed, ForeignMessage: when it cannot be decoded.
    """
    if state.decoded is not None:
        return state
    if state.body_queue is not None or state.compression or len(state.body) > LARGE_BODY:
        content = await bridge.run_blocking(backend.reader.content, state)
        state = dataclasses.replace(state, decoded=content, body_queue=None)
    return state


class _Ends:
    """Collects the final states of some tasks.

    Parameters:
        ids: the tasks.
        failing: those of the tasks whose failure ends the wait.
    """

    __slots__ = ("failing", "found", "future", "missing")

    def __init__(self, ids: Iterable[str], failing: Collection[str]) -> None:
        self.missing = set(ids)
        self.failing = failing
        self.found: Dict[str, StateMessage] = {}
        #: Set to the id of the task that has failed, or to ``None`` when all have ended.
        self.future: asyncio.Future[Optional[str]] = asyncio.get_running_loop().create_future()

    def take(self, update: Update) -> None:
        task_id, final = update.task_id, update.final
        if final is None:
            return
        failed = final.state in celery_states.PROPAGATE_STATES and task_id in self.failing
        if failed or task_id in self.missing:
            self.found[task_id] = final
        self.missing.discard(task_id)
        if self.future.done():
            return
        if failed:
            self.future.set_result(task_id)
        elif not self.missing:
            self.future.set_result(None)

    def fail(self, failure: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(failure)

    def expire(self, timeout: float, total: int) -> None:
        if not self.future.done():
            self.future.set_exception(_timed_out(timeout, len(self.missing), total))


def _timed_out(timeout: float, missing: int, total: int) -> WaitTimeout:
    what = "the task is" if total == 1 else f"{missing} of {total} tasks are"
    return WaitTimeout(f"{what} not ready after {timeout:g} seconds")


async def _ends(
    backend: Any, ids: List[str], timeout: Optional[float], failing: Collection[str]
) -> Tuple[Dict[str, StateMessage], Optional[str]]:
    """Wait until the tasks have ended, or one of those in *failing* has failed.

    Returns:
        The final states that are known, and the id of the task that has failed, if it is that.
    """
    its_bridge = bridge.bridge_of(backend)
    ends = _Ends(ids, failing)
    followed = list(dict.fromkeys((*ids, *failing)))
    if timeout is not None and timeout <= 0:
        for task_id, found in (await its_bridge.poll(followed)).items():
            if found is not None and is_final(found.state):
                ends.take(Update(task_id, [found], found))
        ends.expire(timeout, len(ids))
        return ends.found, await ends.future
    handle = None
    its_bridge.subscribe(followed, ends)
    try:
        if timeout is not None:
            loop = asyncio.get_running_loop()
            handle = loop.call_later(timeout, ends.expire, timeout, len(ids))
        return ends.found, await ends.future
    finally:
        if handle is not None:
            handle.cancel()
        if ends.missing or len(followed) > len(ids):
            its_bridge.unsubscribe(followed, ends)


# -- get, gather -----------------------------------------------------------------------------------


async def get(
    target: Any,
    timeout: Optional[float] = None,
    propagate: bool = True,
    *,
    app: Any = None,
    follow_parents: bool = True,
    disable_sync_subtasks: bool = True,
) -> Any:
    """Wait for a task and return its value, as ``AsyncResult.get`` does.

    Parameters:
        target: a task id, a result object, or a group or another result set. A group returns a
            list of values, with a nested list for each group in it.
        timeout: seconds; ``None`` for no end, 0 to ask once.
        propagate: whether to raise the exception of a task that failed; otherwise it is returned.
            The first failure in a group ends the wait.
        app: the app of a task id; the current app by default. Result objects know theirs.
        follow_parents: whether to raise the exception of a task before this one in a chain, which
            so will never run. Only with *propagate*.
        disable_sync_subtasks: whether to refuse to wait within a task.

    Returns:
        The value of the task; ``None`` if it ignores its result.

    Raises:
        WaitTimeout: when *timeout* is over. It is a ``celery.exceptions.TimeoutError`` and an
            ``asyncio.TimeoutError``.
        Exception: the exception of the task, if it failed and *propagate* is true.
        BackendUnavailable: when the broker cannot be reached at the beginning, refuses us, or when
            the backend was closed. A connection lost later is reopened silently.
        TypeError: when *target* cannot be waited for.

    When the coroutine is cancelled the task goes on; it may be waited for again. Callbacks of a
    result object (``then``) are called on the event loop.
    """
    if disable_sync_subtasks:
        assert_will_not_block()
    (value,) = await _values((_checked(target),), timeout, propagate, app, follow_parents)
    return value


async def gather(
    *targets: Any,
    timeout: Optional[float] = None,
    return_exceptions: bool = False,
    app: Any = None,
    disable_sync_subtasks: bool = True,
) -> List[Any]:
    """Wait for several tasks or groups together and return their values in order.

    Parameters:
        targets: ids, result objects, groups.
        timeout: seconds for all of them; ``None`` for no end, 0 to ask once.
        return_exceptions: whether exceptions of tasks are returned among the values; the first one
            is raised otherwise.
        app, disable_sync_subtasks: see :func:`get`.

    Raises:
        WaitTimeout, BackendUnavailable, TypeError, Exception: see :func:`get`.
    """
    if disable_sync_subtasks:
        assert_will_not_block()
    nodes = tuple(_checked(target) for target in targets)
    return await _values(nodes, timeout, not return_exceptions, app, False)


async def _values(
    nodes: Tuple[Any, ...],
    timeout: Optional[float],
    propagate: bool,
    app: Any,
    follow_parents: bool,
) -> List[Any]:
    leaves = [leaf for node in nodes for leaf in trees.leaves(node)]
    known: Dict[str, Tuple[str, Any]] = {}
    waited: Dict[str, List[Any]] = {}
    for leaf in leaves:
        if _is_known(leaf):
            known[_id(leaf)] = _known_value(leaf)
        else:
            waited.setdefault(_id(leaf), []).append(leaf)
    if propagate:
        for leaf in leaves:
            if _is_known(leaf):
                _raise_failure(leaf, *known[_id(leaf)])
    for task_id in known:
        waited.pop(task_id, None)
    if waited:
        backend = _common_backend((leaf for same in waited.values() for leaf in same), app)
        parents = _unfailed_parents([*nodes, *leaves]) if propagate and follow_parents else {}
        known.update(await _wait_for(backend, waited, timeout, propagate, parents))
    return [_value(node, known) for node in nodes]


def _common_backend(leaves: Iterable[Any], app: Any) -> Any:
    """Return the backend of all of *leaves*, of which there is at least one.

    Raises:
        TypeError: when they have several backends.
    """
    backends = [_backend_of(leaf, app) for leaf in leaves]
    if any(each.layout is not backends[0].layout for each in backends):
        raise TypeError("results of several apps cannot be waited for together")
    return backends[0]


def _unfailed_parents(nodes: Iterable[Any]) -> Dict[str, Any]:
    """Return the tasks before *nodes* in a chain that are not known to have ended, first to last.

    Raises:
        Exception: the exception of one that has failed.
    """
    unknown: Dict[str, Any] = {}
    for node in nodes:
        for parent in reversed(list(trees.parents(node))):
            if _is_known(parent):
                _raise_failure(parent, *_known_value(parent))
            else:
                unknown.setdefault(_id(parent), parent)
    return unknown


async def _wait_for(
    backend: Any,
    waited: Dict[str, List[Any]],
    timeout: Optional[float],
    propagate: bool,
    parents: Dict[str, Any],
) -> Dict[str, Tuple[str, Any]]:
    """Wait for tasks, and return the state and value of each.

    Parameters:
        waited: result objects and ids, by id.
        parents: tasks whose failure means that these will never run.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    failing: Dict[str, List[Any]] = dict(waited) if propagate else {}
    for task_id, parent in parents.items():
        failing.setdefault(task_id, [parent])
    found, failed = await _ends(backend, list(waited), timeout, failing)
    if failed is not None and failed not in parents:
        # Celery raises the error of the header, not that of the body: the former came first.
        found.update(await _failures(backend, parents, deadline))
    known: Dict[str, Tuple[str, Any]] = {}
    pause = _Pause()
    for task_id, state in found.items():
        await pause()
        decoded = await _decoded(backend, state)
        for leaf in waited.get(task_id) or failing[task_id]:
            known[task_id] = _resolve(backend, leaf, decoded)
    if failed is not None:
        for task_id in (*parents, failed):
            if task_id in known:
                _raise_failure(failing[task_id][0], *known[task_id])
    return known


async def _failures(
    backend: Any, parents: Dict[str, Any], deadline: Optional[float]
) -> Dict[str, StateMessage]:
    """Return the final states of those of *parents* that have failed, if there is time to ask."""
    seconds = None if deadline is None else deadline - time.monotonic()
    if not parents or (seconds is not None and seconds <= 0):
        return {}
    polled: Dict[str, Optional[StateMessage]] = {}
    with contextlib.suppress(asyncio.TimeoutError, errors.BackendUnavailable):
        poll = bridge.bridge_of(backend).poll(list(parents))
        polled = await asyncio.wait_for(poll, seconds)
    return {
        task_id: state
        for task_id, state in polled.items()
        if state is not None and state.state in celery_states.PROPAGATE_STATES
    }


def _resolve(backend: Any, leaf: Any, state: StateMessage) -> Tuple[str, Any]:
    """Give a result object its final state; return the state's name and the value."""
    if isinstance(leaf, str):
        meta = backend.reader.decode(state)
        return meta["status"], meta["result"]
    backend.waits.resolve(leaf, state)
    return _known_value(leaf)


class _Pause:
    """Yields to the event loop during long work."""

    #: Seconds of work before it yields.
    SLICE = 0.005

    def __init__(self) -> None:
        self._until = time.monotonic() + self.SLICE

    async def __call__(self) -> None:
        if time.monotonic() >= self._until:
            await asyncio.sleep(0)
            self._until = time.monotonic() + self.SLICE


def _raise_failure(leaf: Any, state: str, value: Any) -> None:
    """Raise the exception of a task that has failed."""
    if state not in celery_states.PROPAGATE_STATES:
        return
    if not isinstance(leaf, (str, EagerResult)):
        # Includes the worker's traceback, if the app enables that.
        leaf.maybe_throw(propagate=True)
    raise value if isinstance(value, BaseException) else Exception(value)


def _value(node: Any, known: Dict[str, Tuple[str, Any]]) -> Any:
    if isinstance(node, ResultSet):
        return [_value(member, known) for member in node.results]
    return known[_id(node)][1]


# -- as they come ----------------------------------------------------------------------------------


class _Feed:
    """Buffers states for a coroutine that iterates.

    Parameters:
        ids: the tasks; ``None`` for everything.
        wanted: names of the states to keep; ``None`` for all.
    """

    def __init__(
        self, ids: Optional[Collection[str]], wanted: Optional[Collection[str]] = None
    ) -> None:
        self.missing: Optional[Set[str]] = None if ids is None else set(ids)
        self.wanted = wanted
        self.arrived: Deque[StateMessage] = collections.deque()
        self.failure: Optional[Exception] = None
        #: States dropped because too many were waiting.
        self.left_out = 0
        self._newest = Newest()
        self._waiting: Optional[asyncio.Future[None]] = None

    def take(self, update: Update) -> None:
        # The tap drops superseded states itself.
        counting = update.states if self.missing is None else self._newest.of_update(update)
        for state in counting:
            if self.wanted is None or state.state in self.wanted:
                self.arrived.append(state)
        if self.missing is not None and update.final is not None:
            self.missing.discard(update.task_id)
            self._newest.drop(update.task_id)
        if len(self.arrived) > MAX_BUFFERED:
            self._leave_out()
        self._wake()

    def _leave_out(self) -> None:
        before = len(self.arrived)
        keep = list(self.arrived)[-MAX_BUFFERED // 2 :]
        if self.missing is not None:
            older = list(self.arrived)[: -MAX_BUFFERED // 2]
            keep = [state for state in older if is_final(state.state)] + keep
        self.arrived = collections.deque(keep)
        if not self.left_out:
            logger.warning(
                "more than %d states wait for somebody who watches: the oldest are left out",
                MAX_BUFFERED,
            )
        self.left_out += before - len(keep)

    def fail(self, failure: Exception) -> None:
        self.failure = failure
        self._wake()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def wait(self, seconds: Optional[float]) -> None:
        """Wait until a state has come, for *seconds* at most."""
        loop = asyncio.get_running_loop()
        self._waiting = loop.create_future()
        handle = None if seconds is None else loop.call_later(seconds, self._wake)
        try:
            await self._waiting
        finally:
            self._waiting = None
            if handle is not None:
                handle.cancel()


class _Stream(Generic[_T]):
    """The common part of :class:`Watch` and :class:`Completed`.

    An asynchronous iterator, for one coroutine at a time. Unlike an asynchronous generator it can
    be used further after the coroutine that asked for the next item was cancelled or timed out; no
    item is lost. Leaving the loop, calling :meth:`aclose` or dropping the object removes all its
    bindings.
    """

    def __init__(
        self,
        backend: Any,
        ids: Optional[List[str]],
        timeout: Optional[float],
        wanted: Any = None,
        final_only: bool = False,
    ) -> None:
        self._backend = backend
        self._ids = ids
        self._timeout = timeout
        self._wanted = wanted
        self._final_only = final_only
        self._deadline: Optional[float] = None
        self._feed: Optional[_Feed] = None
        self._bridge: Optional[bridge.Bridge] = None
        self._loop: Optional[asyncio.AbstractEventLoop] = None
        self._asking = False
        self._ended = False

    def __aiter__(self) -> AsyncIterator[_T]:
        return self

    async def __aenter__(self) -> _Stream[_T]:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the iteration and remove its bindings. May be called more than once."""
        if self._ended:
            return
        self._ended = True
        if self._bridge is not None and self._feed is not None:
            if self._ids is None:
                self._bridge.unsubscribe_from_everything(self._wanted, self._feed)
            else:
                self._bridge.unsubscribe(self._ids, self._feed)
            # A coroutine may be waiting for the next item now.
            self._feed._wake()

    def __del__(self) -> None:
        # Perhaps on another thread.
        if not getattr(self, "_ended", True) and self._bridge is not None and self._feed:
            if self._ids is None:
                self._bridge.abandon_everything(self._wanted, self._feed)
            else:
                self._bridge.abandon(self._ids, self._feed)

    async def __anext__(self) -> _T:
        """Return the next item.

        Raises:
            StopAsyncIteration: when all the tasks have ended.
            WaitTimeout: when the timeout is over.
        """
        if self._asking:
            raise RuntimeError("another coroutine is waiting for the next item already")
        self._asking = True
        try:
            return await self._next()
        finally:
            self._asking = False

    def _take_known(self) -> Optional[Tuple[_T]]:
        """Return the next item that is known without asking the store."""
        raise NotImplementedError

    async def _item(self, state: StateMessage) -> Optional[Tuple[_T]]:
        """Return the item for a state, or ``None`` to leave it out."""
        raise NotImplementedError

    async def _next(self) -> _T:
        if self._ended:
            raise StopAsyncIteration
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            if self._timeout is not None:
                self._deadline = time.monotonic() + self._timeout
        elif self._loop is not loop:
            raise RuntimeError("this belongs to another event loop: begin it on the running one")
        item = self._take_known()
        if item is not None:
            return item[0]
        if self._feed is None:
            await self._begin()
        feed = self._feed
        assert feed is not None
        while True:
            while feed.arrived:
                # Removed only after decoding: a coroutine cancelled meanwhile has lost nothing.
                state = feed.arrived[0]
                decoded = await self._decoded_or_none(state)
                if feed.arrived and feed.arrived[0] is state:
                    feed.arrived.popleft()
                item = None if decoded is None else await self._item(decoded)
                if item is not None:
                    return item[0]
            if self._ended:
                raise StopAsyncIteration
            if feed.failure is not None:
                await self.aclose()
                raise feed.failure
            if feed.missing is not None and not feed.missing:
                await self.aclose()
                raise StopAsyncIteration
            seconds = None if self._deadline is None else self._deadline - time.monotonic()
            if seconds is not None and seconds <= 0:
                await self.aclose()
                if self._ids is None or self._timeout is None or feed.missing is None:
                    raise StopAsyncIteration
                raise _timed_out(self._timeout, len(feed.missing), len(self._ids))
            await feed.wait(seconds)

    async def _decoded_or_none(self, state: StateMessage) -> Optional[StateMessage]:
        """Return *state*, decoded; ``None`` if a watch of everything cannot decode it."""
        try:
            return await _decoded(self._backend, state)
        except watching.UNREADABLE as exc:
            if self._ids is None:
                watching.leave_out(state, exc)
                return None
            await self.aclose()
            raise
        except Exception:
            await self.aclose()
            raise

    async def _begin(self) -> None:
        feed = _Feed(self._ids, celery_states.READY_STATES if self._final_only else self._wanted)
        if self._ids is not None and not self._ids:
            self._feed = feed
            return
        its_bridge = bridge.bridge_of(self._backend)
        if self._timeout is not None and self._timeout <= 0:
            for task_id, state in (await its_bridge.poll(self._ids or ())).items():
                if state is not None:
                    feed.take(Update(task_id, [state], state if is_final(state.state) else None))
        elif self._ids is None:
            its_bridge.subscribe_to_everything(self._wanted, feed)
            self._bridge = its_bridge
        else:
            its_bridge.subscribe(self._ids, feed)
            self._bridge = its_bridge
        self._feed = feed


class Watch(_Stream[Meta]):
    """The metas of states as they happen; made by :func:`watch`."""

    def __init__(self, target: Any, states: Any, timeout: Optional[float], app: Any) -> None:
        wanted = watching.read_states(states)
        self._ended_before: Deque[Meta] = collections.deque()
        if target is None:
            backend, ids = _backend_of("", app), None
            if timeout is None or timeout > 0:
                # Raises at once where that is not supported.
                tap_of(backend.layout, wanted)
        else:
            found = watching.read_target(target)
            self._ended_before.extend(
                meta for meta in found.ended if wanted is None or meta["status"] in wanted
            )
            ids = found.ids
            backend = _backend_of_all(target, app)
        super().__init__(backend, ids, timeout, wanted)

    def _take_known(self) -> Optional[Tuple[Meta]]:
        return (self._ended_before.popleft(),) if self._ended_before else None

    async def _item(self, state: StateMessage) -> Optional[Tuple[Meta]]:
        decode = self._backend.reader.decode
        if self._ids is None:
            meta = watching.decode_or_none(state, decode)
            return None if meta is None else (meta,)
        try:
            return ({"task_id": state.id, **decode(state)},)
        except Exception:
            await self.aclose()
            raise


def watch(
    target: Any = None,
    *,
    states: Union[str, Iterable[str], None] = None,
    timeout: Optional[float] = None,
    app: Any = None,
) -> Watch:
    """Watch tasks: iterate over the metas of states as they happen.

    Does what ``backend.watch`` does, for coroutines: the current state of each task comes first,
    then each state that becomes current, once; an older state never comes after a newer one. It
    ends when all the tasks have ended.

    Parameters:
        target: a task id, a result object, a group or another result set, a list of these, or
            ``None`` for every state of every task from about now on, which does not end.
        states: names of the states to get, or one name; ``None`` for all.
        timeout: seconds in total from the first iteration; ``None`` for no end, 0 for the current
            states alone.
        app: the app of task ids and of everything; the current app by default.

    Returns:
        An asynchronous iterator. It may be closed with ``aclose``, or by ``async with``. Asking for
        the next meta may be cancelled or timed out without losing any. At most 10,000 states are
        buffered for a slow reader. Beyond that the oldest that are not final are dropped; a watch
        of everything drops the oldest, final or not.

    Raises:
        TypeError, ValueError: when *target* or *states* are invalid, at once.
        Unsupported: for a watch of everything in the layout ``per-task``, at once.

    Iterating raises:
        WaitTimeout: when *timeout* is over and a given task has not ended. A watch of everything
            just ends.
        BackendUnavailable: when the broker cannot be reached at the beginning, refuses us, or when
            the backend was closed.
        kombu.exceptions.ContentDisallowed, ForeignMessage: when a state of a given task cannot be
            decoded. A watch of everything leaves it out and logs a warning.
        RuntimeError: when two coroutines iterate over it at once, or another event loop does.
    """
    return Watch(target, states, timeout, app)


def _backend_of_all(target: Any, app: Any) -> Any:
    nodes = list(tasks_in(target))
    waited = [node for node in nodes if not isinstance(node, EagerResult)]
    # With nothing to wait for, no backend is needed.
    return _common_backend(waited, app) if waited else None


class Completed(_Stream[Tuple[str, Any]]):
    """Ids and values of tasks as they end; made by :func:`as_completed`."""

    def __init__(self, target: Any, timeout: Optional[float], propagate: bool, app: Any) -> None:
        self._propagate = propagate
        self._known: Deque[Any] = collections.deque()
        self._leaves: Dict[str, List[Any]] = {}
        for leaf in tasks_in(target):
            if _is_known(leaf):
                self._known.append(leaf)
            else:
                self._leaves.setdefault(_id(leaf), []).append(leaf)
        super().__init__(_backend_of_all(target, app), list(self._leaves), timeout, final_only=True)

    def _take_known(self) -> Optional[Tuple[Tuple[str, Any]]]:
        if not self._known:
            return None
        leaf = self._known.popleft()
        return self._end(leaf, *_known_value(leaf))

    async def _item(self, state: StateMessage) -> Optional[Tuple[Tuple[str, Any]]]:
        for leaf in self._leaves[state.id]:
            known = _resolve(self._backend, leaf, state)
        return self._end(leaf, *known)

    def _end(self, leaf: Any, name: str, value: Any) -> Tuple[Tuple[str, Any]]:
        if self._propagate:
            _raise_failure(leaf, name, value)
        return ((_id(leaf), value),)


def as_completed(
    target: Any, timeout: Optional[float] = None, propagate: bool = True, *, app: Any = None
) -> Completed:
    """Iterate over tasks as they finish, by ``async for task_id, value in``.

    Parameters:
        target: a group or another result set, a list of results and ids, or one of them. Members
            of groups in a group come one by one.
        timeout: seconds in total from the first iteration; ``None`` for no end, 0 to ask once.
        propagate: whether to raise the exception of a task that failed. ``async for`` ends there,
            but the iterator can be used further. Otherwise the exception is the value.
        app: the app of task ids; the current app by default.

    Returns:
        An asynchronous iterator; see :func:`watch` on closing and cancelling.

    Raises:
        TypeError: when *target* cannot be waited for, at once.

    Iterating raises:
        WaitTimeout: when *timeout* is over.
        Exception: the exception of a task, if it failed and *propagate* is true.
        BackendUnavailable: see :func:`get`.
    """
    return Completed(target, timeout, propagate, app)


# -- asking once -----------------------------------------------------------------------------------


async def get_meta(target: Any, *, app: Any = None) -> Meta:
    """Return the current meta of a task, as ``backend.get_task_meta`` does, with the ``task_id``.

    The meta of an unknown task is ``{"status": "PENDING", "result": None}``. All tasks requested in
    one turn of the event loop are looked up together.

    Parameters:
        target: a task id or a result object.
        app: the app of a task id; the current app by default.

    Raises:
        LookupTimeout: when the store could not be read in time.
        BackendUnavailable: when the broker cannot be reached or refuses us.
        kombu.exceptions.ContentDisallowed, ForeignMessage: when the state cannot be decoded.
        TypeError: when *target* is neither.
    """
    leaf = _checked(target)
    if isinstance(leaf, ResultSet):
        raise TypeError(f"{target!r} is a group, which has no state: ask for its members")
    if not isinstance(leaf, str) and leaf._cache is not None:
        return {"task_id": _id(leaf), **leaf._cache}
    task_id = _id(leaf)
    backend = _backend_of(leaf, app)
    state = (await bridge.bridge_of(backend).poll((task_id,)))[task_id]
    if state is not None:
        try:
            return {"task_id": task_id, **backend.reader.decode(await _decoded(backend, state))}
        except errors.ResultExpired as exc:
            logger.warning("taken for expired: %s", exc)
    return {"task_id": task_id, "status": celery_states.PENDING, "result": None}


async def state(target: Any, *, app: Any = None) -> str:
    """Return the name of the current state of a task, ``PENDING`` if nothing is known of it.

    Parameters and errors are those of :func:`get_meta`.
    """
    return str((await get_meta(target, app=app))["status"])


async def forget(target: Any, *, app: Any = None) -> None:
    """Delete everything kept of a task and those before it in a chain, or of a group's members.

    Parameters:
        target: a task id, a result object, or a group. The cache of a result object is cleared.
        app: the app of a task id; the current app by default.

    Raises:
        LookupTimeout, BackendUnavailable: as :func:`get_meta`. Some may be deleted; forgetting
            again is safe.
        TypeError: when *target* is none of these.
    """
    ids: Dict[str, None] = {}
    backend = None
    for leaf in trees.leaves(_checked(target)):
        if isinstance(leaf, EagerResult):
            continue
        backend = backend or _backend_of(leaf, app)
        for each in (leaf, *trees.parents(leaf)):
            if not isinstance(each, (str, EagerResult)):
                each._cache = None
            ids[_id(each)] = None
    if backend is not None:
        await bridge.run_blocking(_forget, backend, list(ids))


def _forget(backend: Any, ids: List[str]) -> None:
    for task_id in ids:
        backend._cache.pop(task_id, None)
    backend.layout.forget(ids)
