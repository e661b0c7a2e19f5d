"""Iterating over states, and over tasks as they end; see :mod:`celery_amqp_results.aio`."""

from __future__ import annotations

import asyncio
import collections
import functools
import logging
import time
from typing import (
    Any,
    AsyncIterator,
    Callable,
    Collection,
    Deque,
    Dict,
    FrozenSet,
    Generic,
    Iterable,
    List,
    Optional,
    Set,
    Tuple,
    TypeVar,
    Union,
    overload,
)

from celery import Celery
from celery.states import READY_STATES

from celery_amqp_results.aio import bridge, targets
from celery_amqp_results.backend import AMQPBackend
from celery_amqp_results.errors import WaitTimeout
from celery_amqp_results.library_types import Leaf, Meta
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.ranking import is_final
from celery_amqp_results.toolkit.retry import deadline_after
from celery_amqp_results.waiting import watch as watching
from celery_amqp_results.waiting.progress import Newest, Update
from celery_amqp_results.waiting.results import tasks_in
from celery_amqp_results.waiting.tap import tap_of
from celery_amqp_results.waiting.waits import Patience

__all__ = ("Completed", "Watch", "as_completed", "watch")

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

#: The most states that a watch buffers for a slow reader. Beyond that it drops the oldest: of given
#: tasks only those that are not final, of everything any.
MAX_BUFFERED = 10_000


class _Feed:
    """Buffers states for a coroutine that iterates.

    Parameters:
        ids: the tasks; ``None`` for everything.
        wanted: names of the states to keep; ``None`` for all.
    """

    def __init__(self, ids: Optional[Collection[str]], wanted: Optional[Collection[str]]) -> None:
        self.missing: Optional[Set[str]] = None if ids is None else set(ids)
        self.wanted = wanted
        self.arrived: Deque[StateMessage] = collections.deque()
        self.failure: Optional[Exception] = None
        #: States dropped because too many were waiting.
        self.left_out = 0
        #: Above this length, states are left out. Final states of given tasks stay, so the rest may
        #: be longer than the limit. Doubling keeps the work per state constant.
        self._limit = MAX_BUFFERED
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
        if len(self.arrived) <= MAX_BUFFERED:
            self._limit = MAX_BUFFERED
        elif len(self.arrived) > self._limit:
            self._leave_out()
        self._wake()

    def _leave_out(self) -> None:
        keep = list(self.arrived)[-MAX_BUFFERED // 2 :]
        if self.missing is not None:
            older = list(self.arrived)[: -MAX_BUFFERED // 2]
            keep = [state for state in older if is_final(state.state)] + keep
        left_out = len(self.arrived) - len(keep)
        self.arrived = collections.deque(keep)
        self._limit = max(MAX_BUFFERED, 2 * len(keep))
        if left_out and not self.left_out:
            logger.warning(
                "more than %d states wait for somebody who watches: the oldest are left out",
                MAX_BUFFERED,
            )
        self.left_out += left_out

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
        backend: Optional[AMQPBackend],
        ids: Optional[List[str]],
        timeout: Optional[float],
        wanted: Optional[FrozenSet[str]],
    ) -> None:
        #: ``None`` if there is nothing to wait for.
        self._known_backend = backend
        self._ids = ids
        self._timeout = timeout
        self._wanted = wanted
        self._deadline: Optional[float] = None
        #: When reading a body ends. A poll has no such time.
        self._decode_by: Optional[float] = None
        self._feed: Optional[_Feed] = None
        self._bridge: Optional[bridge.Bridge] = None
        #: Removes the bindings. The loop calls it.
        self._unsubscribe: Optional[Callable[[], None]] = None
        self._loop: Optional[asyncio.AbstractEventLoop] = None
        self._asking = False
        self._ended = False

    @property
    def _backend(self) -> AMQPBackend:
        assert self._known_backend is not None
        return self._known_backend

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
        if self._unsubscribe is not None and self._feed is not None:
            self._unsubscribe()
            # A coroutine may be waiting for the next item now.
            self._feed._wake()

    def __del__(self) -> None:
        # Perhaps on another thread.
        if not getattr(self, "_ended", True) and self._bridge is not None:
            self._bridge.post(self._unsubscribe)

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

    async def _decode(self, state: StateMessage) -> Any:
        """Decode a state."""
        return await targets.decoded_state(self._backend, state, self._decode_by)

    def _item(self, decoded: Any) -> _T:
        """Return the item for a decoded state."""
        raise NotImplementedError

    def _check_loop(self) -> None:
        """Begin on the running event loop, and refuse any other later."""
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            self._deadline = deadline_after(self._timeout)
            self._decode_by = Patience(self._timeout).deadline()
        elif self._loop is not loop:
            raise RuntimeError("this belongs to another event loop: begin it on the running one")

    async def _take_arrived(self, feed: _Feed) -> Optional[Tuple[_T]]:
        """Return the next item of the states that have arrived."""
        while feed.arrived:
            # Removed only after decoding: a coroutine cancelled meanwhile has lost nothing.
            state, decoded = feed.arrived[0], None
            try:
                decoded = await self._decode(state)
            except WaitTimeout:
                await self.aclose()
                if self._ids is None:
                    return None
                raise
            except Exception as exc:
                if self._ids is not None or not watching.concerns_one_state(exc):
                    # The state stays first if the next call may be able to fetch it.
                    if not watching.may_be_fetched_later(exc):
                        await self.aclose()
                    raise
                watching.leave_out(state, exc)
            if feed.arrived and feed.arrived[0] is state:
                feed.arrived.popleft()
            if decoded is not None:
                return (self._item(decoded),)
        return None

    async def _next(self) -> _T:
        if self._ended:
            raise StopAsyncIteration
        self._check_loop()
        item = self._take_known()
        if item is not None:
            return item[0]
        if self._feed is None:
            await self._begin()
        feed = self._feed
        assert feed is not None
        while True:
            item = await self._take_arrived(feed)
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
                raise targets.timed_out(self._timeout, len(feed.missing), len(self._ids))
            await feed.wait(seconds)

    async def _begin(self) -> None:
        feed = _Feed(self._ids, self._wanted)
        if self._ids is not None and not self._ids:
            self._feed = feed
            return
        its_bridge = bridge.bridge_of(self._backend)
        if self._timeout is not None and self._timeout <= 0:
            for task_id, state in (await its_bridge.poll(self._ids or ())).items():
                if state is not None:
                    feed.take(Update(task_id, [state], state if is_final(state.state) else None))
        else:
            self._bridge = its_bridge
            if self._ids is None:
                its_bridge.subscribe_to_everything(self._wanted, feed)
                leave = functools.partial(its_bridge.unsubscribe_from_everything, self._wanted)
            else:
                its_bridge.subscribe(self._ids, feed)
                leave = functools.partial(its_bridge.unsubscribe, self._ids)
            self._unsubscribe = functools.partial(leave, feed)
        self._feed = feed


class Watch(_Stream[Meta]):
    """The metas of states as they happen; made by :func:`watch`."""

    def __init__(
        self,
        target: object,
        states: Union[str, Iterable[str], None],
        timeout: Optional[float],
        app: Optional[Celery],
    ) -> None:
        wanted = watching.read_states(states)
        backend: Optional[AMQPBackend]
        self._ended_before: Deque[Meta] = collections.deque()
        if target is None:
            backend, ids = targets.backend_of("", app), None
            if timeout is None or timeout > 0:
                # Raises at once where that is not supported.
                tap_of(backend.layout, wanted)
        else:
            nodes = list(tasks_in(target))
            found = watching.read_target(nodes)
            self._ended_before.extend(
                meta for meta in found.ended if wanted is None or meta["status"] in wanted
            )
            ids = found.ids
            backend = targets.common_backend(nodes, app)
        super().__init__(backend, ids, timeout, wanted)

    def _take_known(self) -> Optional[Tuple[Meta]]:
        return (self._ended_before.popleft(),) if self._ended_before else None

    async def _decode(self, state: StateMessage) -> Meta:
        decoded = await super()._decode(state)
        return {"task_id": state.id, **self._backend.reader.decode(decoded)}

    def _item(self, decoded: Meta) -> Meta:
        return decoded


def watch(
    target: object = None,
    *,
    states: Union[str, Iterable[str], None] = None,
    timeout: Optional[float] = None,
    app: Optional[Celery] = None,
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
        LookupTimeout, BackendUnavailable: when a large state of a given task cannot be fetched for
            the moment. The next call tries again. A watch of everything leaves the state out and
            logs a warning.
        kombu.exceptions.ContentDisallowed, ForeignMessage: when a state of a given task cannot be
            decoded. A watch of everything leaves it out and logs a warning.
        RuntimeError: when two coroutines iterate over it at once, or another event loop does.
    """
    return Watch(target, states, timeout, app)


class Completed(_Stream[Tuple[str, _T]]):
    """Ids and values of tasks as they end; made by :func:`as_completed`."""

    def __init__(
        self, target: object, timeout: Optional[float], propagate: bool, app: Optional[Celery]
    ) -> None:
        self._propagate = propagate
        self._known: Deque[Leaf] = collections.deque()
        self._leaves: Dict[str, List[Leaf]] = {}
        leaves = list(tasks_in(target))
        for leaf in leaves:
            if targets.is_known(leaf):
                self._known.append(leaf)
            else:
                self._leaves.setdefault(targets.id_of(leaf), []).append(leaf)
        super().__init__(
            targets.common_backend(leaves, app), list(self._leaves), timeout, READY_STATES
        )

    def _take_known(self) -> Optional[Tuple[Tuple[str, _T]]]:
        if not self._known:
            return None
        leaf = self._known.popleft()
        return (self._end(leaf, *targets.known_value(leaf)),)

    def _item(self, decoded: StateMessage) -> Tuple[str, _T]:
        for leaf in self._leaves[decoded.id]:
            known = targets.resolve(self._backend, leaf, decoded)
        return self._end(leaf, *known)

    def _end(self, leaf: Leaf, name: str, value: Any) -> Tuple[str, _T]:
        if self._propagate:
            targets.raise_failure(leaf, name, value)
        return targets.id_of(leaf), value


@overload
def as_completed(
    target: Iterable[targets.Gettable[_T]],
    timeout: Optional[float] = None,
    propagate: bool = True,
    *,
    app: Optional[Celery] = None,
) -> Completed[_T]: ...


@overload
def as_completed(
    target: object,
    timeout: Optional[float] = None,
    propagate: bool = True,
    *,
    app: Optional[Celery] = None,
) -> Completed[Any]: ...


def as_completed(
    target: object,
    timeout: Optional[float] = None,
    propagate: bool = True,
    *,
    app: Optional[Celery] = None,
) -> Completed[Any]:
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
        BackendUnavailable: see :func:`get`. If a large result cannot be fetched for the moment, the
            next call tries again.
    """
    return Completed(target, timeout, propagate, app)
