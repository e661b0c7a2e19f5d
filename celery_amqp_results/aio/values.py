"""Waiting for the values of tasks and groups; see :mod:`celery_amqp_results.aio`."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from typing import Any, Collection, Dict, Iterable, List, Optional, Tuple, TypeVar, Union, overload

from celery import Celery
from celery import states as celery_states
from celery.result import ResultSet, assert_will_not_block

from celery_amqp_results import errors
from celery_amqp_results.aio import bridge, targets
from celery_amqp_results.aio.targets import checked
from celery_amqp_results.backend import AMQPBackend
from celery_amqp_results.library_types import Leaf
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.ranking import is_final
from celery_amqp_results.waiting import results as trees
from celery_amqp_results.waiting.progress import Update
from celery_amqp_results.waiting.waits import Patience

__all__ = ("gather", "get")

_T = TypeVar("_T")

#: Seconds of decoding after which other coroutines run.
SLICE = 0.005


class _Ends:
    """Collects the final states of some tasks; the failure of one of *failing* ends the wait."""

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
            self.future.set_exception(targets.timed_out(timeout, len(self.missing), total))


async def _ends(
    backend: AMQPBackend, ids: List[str], timeout: Optional[float], failing: Collection[str]
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


@overload
async def get(
    target: targets.Gettable[_T],
    timeout: Optional[float] = None,
    propagate: bool = True,
    *,
    app: Optional[Celery] = None,
    follow_parents: bool = True,
    disable_sync_subtasks: bool = True,
) -> _T: ...


@overload
async def get(
    target: Union[str, bytes, uuid.UUID],
    timeout: Optional[float] = None,
    propagate: bool = True,
    *,
    app: Optional[Celery] = None,
    follow_parents: bool = True,
    disable_sync_subtasks: bool = True,
) -> Any: ...


async def get(
    target: object,
    timeout: Optional[float] = None,
    propagate: bool = True,
    *,
    app: Optional[Celery] = None,
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
    (value,) = await _values((checked(target),), timeout, propagate, app, follow_parents)
    return value


@overload
async def gather(
    *targets: targets.Gettable[_T],
    timeout: Optional[float] = None,
    return_exceptions: bool = False,
    app: Optional[Celery] = None,
    disable_sync_subtasks: bool = True,
) -> List[_T]: ...


@overload
async def gather(
    *targets: object,
    timeout: Optional[float] = None,
    return_exceptions: bool = False,
    app: Optional[Celery] = None,
    disable_sync_subtasks: bool = True,
) -> List[Any]: ...


async def gather(
    *targets: object,
    timeout: Optional[float] = None,
    return_exceptions: bool = False,
    app: Optional[Celery] = None,
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
    nodes = tuple(checked(target) for target in targets)
    return await _values(nodes, timeout, not return_exceptions, app, False)


async def _values(
    nodes: Tuple[Any, ...],
    timeout: Optional[float],
    propagate: bool,
    app: Optional[Celery],
    follow_parents: bool,
) -> List[Any]:
    leaves = [leaf for node in nodes for leaf in trees.leaves(node)]
    known: Dict[str, Tuple[str, Any]] = {}
    waited: Dict[str, List[Leaf]] = {}
    for leaf in leaves:
        if not targets.is_known(leaf):
            waited.setdefault(targets.id_of(leaf), []).append(leaf)
            continue
        known[targets.id_of(leaf)] = targets.known_value(leaf)
        if propagate:
            targets.raise_failure(leaf, *targets.known_value(leaf))
    for task_id in known:
        waited.pop(task_id, None)
    if waited:
        backend = targets.common_backend((leaf for same in waited.values() for leaf in same), app)
        # Only an eager result that has not ended knows of no backend.
        backend = backend or targets.backend_of("", app)
        parents = _unfailed_parents([*nodes, *leaves]) if propagate and follow_parents else {}
        known.update(await _wait_for(backend, waited, timeout, propagate, parents))
    return [_value(node, known) for node in nodes]


def _unfailed_parents(nodes: Iterable[object]) -> Dict[str, Leaf]:
    """Return the tasks before *nodes* in a chain not known to have ended, first to last."""
    unknown: Dict[str, Leaf] = {}
    for node in nodes:
        for parent in trees.parents(node):
            if targets.is_known(parent):
                targets.raise_failure(parent, *targets.known_value(parent))
            else:
                unknown.setdefault(targets.id_of(parent), parent)
    return unknown


async def _wait_for(
    backend: AMQPBackend,
    waited: Dict[str, List[Leaf]],
    timeout: Optional[float],
    propagate: bool,
    parents: Dict[str, Leaf],
) -> Dict[str, Tuple[str, Any]]:
    """Wait for tasks, and return the state and value of each.

    The failure of one of *parents* means that the others will never run.
    """
    patience = Patience(timeout)
    deadline = patience.deadline()
    failing: Dict[str, List[Leaf]] = dict(waited) if propagate else {}
    for task_id, parent in parents.items():
        failing.setdefault(task_id, [parent])
    found, failed = await _ends(backend, list(waited), timeout, failing)
    if failed is not None and failed not in parents and not patience.polls_once:
        # Celery raises the error of the header, not that of the body: the former came first.
        found.update(await _failures(backend, parents, deadline))
    known: Dict[str, Tuple[str, Any]] = {}
    pause_at = time.monotonic() + SLICE
    for task_id, state in found.items():
        if time.monotonic() >= pause_at:
            await asyncio.sleep(0)
            pause_at = time.monotonic() + SLICE
        decoded = await targets.decoded_state(backend, state, deadline)
        for leaf in waited.get(task_id) or failing[task_id]:
            known[task_id] = targets.resolve(backend, leaf, decoded)
    if failed is not None:
        for task_id in (*parents, failed):
            if task_id in known:
                targets.raise_failure(failing[task_id][0], *known[task_id])
    return known


async def _failures(
    backend: AMQPBackend, parents: Dict[str, Leaf], deadline: Optional[float]
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


def _value(node: Any, known: Dict[str, Tuple[str, Any]]) -> Any:
    if isinstance(node, ResultSet):
        return [_value(member, known) for member in node.results]
    return known[targets.id_of(node)][1]
