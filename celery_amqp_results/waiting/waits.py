"""Waiting for tasks as Celery's result objects do: with timeouts, intervals, parents, callbacks.

A :class:`Waits` object turns the updates of followers into metas and ready result objects. It knows
nothing of Celery's backend class.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import (
    Any,
    Callable,
    Collection,
    Dict,
    Generator,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Protocol,
    Set,
    Tuple,
    Union,
)

from celery import states
from celery.exceptions import TimeoutError
from celery.result import ResultSet

from celery_amqp_results import errors
from celery_amqp_results.amqp.failures import was_refused
from celery_amqp_results.protocol.ids import id_text
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.ranking import is_final
from celery_amqp_results.toolkit.forks import Process
from celery_amqp_results.toolkit.retry import deadline_after, is_over
from celery_amqp_results.waiting import results as trees
from celery_amqp_results.waiting import watch as watching
from celery_amqp_results.waiting.callbacks import PendingResults
from celery_amqp_results.waiting.following import Following
from celery_amqp_results.waiting.progress import Update
from celery_amqp_results.waiting.tap import tap_of

__all__ = ("DEFAULT_INTERVAL", "Patience", "Waits")

#: How often ``on_interval`` is called where no interval is given, in seconds.
DEFAULT_INTERVAL = 0.5
SHORTEST_INTERVAL = 0.01

#: The longest single wait of a watcher, in seconds.
WATCH_INTERVAL = 5.0

#: Errors of reading the parents of a task that has ended.
_NOT_READ = (
    *watching.UNREADABLE,
    errors.BackendUnavailable,
    errors.BacklogLimitExceeded,
    errors.DeclarationRefused,
    TimeoutError,
)

logger = logging.getLogger(__name__)

Meta = Dict[str, Any]


class Readable(Protocol):
    """The part of a layout that waiting needs."""

    def poll(
        self, ids: Collection[str], deadline: Optional[float] = None
    ) -> Dict[str, Optional[StateMessage]]:
        """Return the current state of each of *ids*, or ``None`` where nothing is known."""

    def follower(self) -> Following:
        """Return a follower without tasks."""


class Decoder(Protocol):
    """Decodes states."""

    def decode(self, state: StateMessage, deadline: Optional[float] = None) -> Meta:
        """Return the meta that *state* holds."""

    def decode_if_kept(
        self, state: StateMessage, deadline: Optional[float] = None
    ) -> Optional[Meta]:
        """Return the meta of *state*, or ``None`` if its body is gone."""


class Patience(NamedTuple):
    """How long to wait, and what to do meanwhile."""

    #: Seconds in total; ``None`` for no end, 0 to poll once.
    timeout: Optional[float] = None
    #: Seconds between calls of *on_interval*, 0.5 by default.
    interval: Optional[float] = None
    #: Called periodically while waiting, and once more when all have ended.
    on_interval: Optional[Callable[[], Any]] = None

    @property
    def polls_once(self) -> bool:
        """Whether to poll once instead of waiting."""
        return self.timeout is not None and self.timeout <= 0

    def deadline(self) -> Optional[float]:
        """Return when a wait that begins now ends (``time.monotonic``); ``None`` for no end.

        A poll has none, so that it returns a large result: each of its reads takes up to
        ``lookup_timeout``.

        Raises:
            ValueError: when the timeout is not a number.
        """
        return None if self.polls_once else deadline_after(self.timeout)

    def timed_out(self, missing: int, total: int) -> TimeoutError:
        """Return the error for tasks that have not ended in time."""
        what = "The task is" if total == 1 else f"{missing} of {total} tasks are"
        return TimeoutError(
            f"The operation timed out: {what} not ready after {self.timeout:g} seconds."
        )


class Waits:
    """Waits for tasks. Thread-safe. After a fork the child calls :meth:`reset`."""

    def __init__(self, layout: Callable[[], Readable], decoder: Decoder) -> None:
        self._layout = layout
        self._decoder = decoder
        self.reset()

    def reset(self) -> None:
        """Start afresh, like a new process that waits for nothing."""
        self._resolving = threading.Lock()
        #: The results with callbacks.
        self.pending = self._no_callbacks()

    def _no_callbacks(self) -> PendingResults:
        return PendingResults(lambda: self._layout().follower(), self.resolve)

    def updates(
        self, ids: Iterable[str], patience: Patience, parents: Collection[str] = ()
    ) -> Generator[Update, None, None]:
        """Follow tasks until they end; yield updates of them and of their parents.

        Raises:
            celery.exceptions.TimeoutError: when the timeout is over.
        """
        ids = list(dict.fromkeys(ids))
        if patience.polls_once:
            yield from self._poll_once(ids, patience, parents)
        else:
            yield from self._updates_until(ids, patience, parents)
        if patience.on_interval is not None:
            patience.on_interval()

    def _poll_once(
        self, ids: List[str], patience: Patience, parents: Collection[str]
    ) -> Iterator[Update]:
        missing = 0
        found = self._layout().poll(list(dict.fromkeys((*parents, *ids))))
        for task_id, state in found.items():
            final = state if state is not None and is_final(state.state) else None
            if final is None and task_id not in parents:
                missing += 1
            if state is not None:
                yield Update(task_id, [state], final)
        if missing:
            raise patience.timed_out(missing, len(ids))

    def _updates_until(
        self, ids: List[str], patience: Patience, parents: Collection[str]
    ) -> Iterator[Update]:
        deadline, on_interval = patience.deadline(), patience.on_interval
        interval = max(SHORTEST_INTERVAL, patience.interval or DEFAULT_INTERVAL)
        follower, process = self._layout().follower(), Process()
        missing = set(ids)
        try:
            follower.add((*parents, *ids))
            next_interval = time.monotonic() + interval
            while missing:
                now = time.monotonic()
                if deadline is not None and now >= deadline:
                    raise patience.timed_out(len(missing), len(ids))
                try:
                    updates = follower.step(deadline, max(0.0, next_interval - now))
                except errors.BackendUnavailable as exc:
                    if was_refused(exc) or not is_over(deadline):
                        raise
                    # Connecting has used up the timeout.
                    raise patience.timed_out(len(missing), len(ids)) from exc
                missing.difference_update(u.task_id for u in updates if u.final is not None)
                yield from updates
                if missing and time.monotonic() >= next_interval:
                    next_interval = time.monotonic() + interval
                    if on_interval is not None:
                        on_interval()
        finally:
            # A generator may be carried into a forked child, where its follower belongs to the
            # parent and has locks that will never be released.
            if process.is_current:
                follower.close()

    def follow(
        self,
        ids: Iterable[str],
        patience: Patience,
        on_message: Optional[Callable[[Meta], Any]] = None,
        parents: Collection[Any] = (),
    ) -> Iterator[Tuple[str, StateMessage]]:
        """Wait for tasks; yield the final state of each as it comes.

        Parameters:
            on_message: called with the meta of every state, in the order of publishing.
            parents: result objects of tasks before these in a chain. The wait ends when one of the
                parents fails.

        Raises:
            celery.exceptions.TimeoutError: when the timeout is over.
            Exception: the exception of a parent that failed.
        """
        ids = list(dict.fromkeys(ids))
        before = {id_text(parent.id): parent for parent in parents}
        before = {task_id: before[task_id] for task_id in before if task_id not in ids}
        deadline = patience.deadline()
        with contextlib.closing(self.updates(ids, patience, before)) as updates:
            for update in updates:
                parent = before.get(update.task_id)
                if parent is not None:
                    if update.final is not None:
                        self._end_parent(parent, update.final, deadline)
                    continue
                if on_message is not None:
                    self._report(update, on_message, deadline)
                if update.final is not None:
                    yield update.task_id, update.final

    def _end_parent(self, parent: Any, final: StateMessage, deadline: Optional[float]) -> None:
        """Give a parent its final state, and raise its exception if it has failed."""
        failed = final.state in states.PROPAGATE_STATES
        # Another value is not needed here: a large one is not fetched, an unreadable one no error.
        if failed or final.body_queue is None:
            with contextlib.suppress(*() if failed else watching.UNREADABLE):
                self.resolve(parent, final, deadline)
        if failed:
            parent.maybe_throw()

    def _report(
        self, update: Update, on_message: Callable[[Meta], Any], deadline: Optional[float]
    ) -> None:
        for state in update.states:
            meta = self._decoder.decode_if_kept(state, deadline)
            if meta is not None:
                on_message(meta)

    def resolve(self, result: Any, state: StateMessage, deadline: Optional[float] = None) -> None:
        """Give a result object its final state and call its callbacks, once.

        Raises:
            celery.exceptions.TimeoutError: when the body could not be read before *deadline*.
        """
        if result._cache is not None:
            return
        # Decoding may need a look-up, so it is done without the lock.
        meta = self._decoder.decode(state, deadline)
        with self._resolving:
            if result._cache is not None:
                return
            result._set_cache(meta)
        result.on_ready(result)

    def wait_for(
        self,
        result: Any,
        patience: Patience,
        on_message: Optional[Callable[[Meta], Any]],
        follow_parents: bool,
    ) -> None:
        """Wait for one task, and give its result object the final state.

        Raises:
            celery.exceptions.TimeoutError: when the timeout is over.
            Exception: with *follow_parents*, the exception of a task before this one in a chain or
                chord, when that has failed.
        """
        deadline = patience.deadline()
        parents = _unfailed_parents(result) if follow_parents else []
        for _, state in self.follow((id_text(result.id),), patience, on_message, parents):
            self.resolve(result, state, deadline)
        if result._cache["status"] in states.PROPAGATE_STATES and not patience.polls_once:
            self._raise_failure_before(result, parents, deadline)

    def _raise_failure_before(
        self, result: Any, parents: Iterable[Any], deadline: Optional[float]
    ) -> None:
        """Raise the exception of a parent of *result*, which has failed itself, if one is found.

        The failure of a header is stored before that of its body, but may be pushed after it.
        """
        unknown = {id_text(parent.id): parent for parent in parents if parent._cache is None}
        if not unknown or is_over(deadline):
            return
        try:
            for task_id, state in self._layout().poll(unknown, deadline).items():
                if state is not None and state.state in states.PROPAGATE_STATES:
                    self.resolve(unknown[task_id], state, deadline)
        except _NOT_READ as exc:
            logger.warning(
                "%s has failed, and the tasks before it could not be read: %s", result.id, exc
            )
        for parent in unknown.values():
            if parent._cache is not None:
                parent.maybe_throw()

    def members(
        self,
        result: Any,
        patience: Patience,
        on_message: Optional[Callable[[Meta], Any]] = None,
    ) -> Iterator[Tuple[str, Union[Meta, List[Any]]]]:
        """Wait for the members of a result set; yield each as it becomes ready.

        Yields:
            ``(id, meta)``, and for a member that is a group itself ``(id, members)`` when all of
            its members are ready.

        Raises:
            celery.exceptions.TimeoutError: when the timeout is over.
            Exception: the exception of a task before the group in its chain, when that has failed:
                the members will never run.
        """
        missing = _Missing(result)
        yield from missing.ready
        parents = _unfailed_parents(result) if missing.leaves else []
        deadline = patience.deadline()
        for task_id, state in self.follow(list(missing.leaves), patience, on_message, parents):
            for leaf in missing.leaves[task_id]:
                self.resolve(leaf, state, deadline)
            yield from missing.end(task_id)

    def watch(
        self,
        target: Any = None,
        *,
        states: Union[str, Iterable[str], None] = None,
        timeout: Optional[float] = None,
    ) -> Generator[Meta, None, None]:
        """Watch tasks: yield the meta of every state as it happens.

        A meta is what ``get_task_meta`` returns, with the ``task_id``. The current state of each
        task comes first, then each state that becomes current, once; an older state never comes
        after a newer one. It ends when all the tasks have ended.

        Parameters:
            target: a task id, a result object, a group or another result set, a list of these, or
                ``None`` for every state of every task from now on, which does not end. Such a watch
                misses states published while the connection is lost, and logs a warning. Given
                tasks are looked up again after that, so only states before the current one are
                missed.
            states: names of the states to yield, or one name; ``None`` for all.
            timeout: seconds in total; ``None`` for no end, 0 for the current states alone.

        Raises:
            celery.exceptions.TimeoutError: when *timeout* is over and a given task has not ended.
                A watch of everything just ends.
            Unsupported: for a watch of everything in the layout ``per-task``.
            BackendUnavailable: when the broker cannot be reached at the beginning, refuses us, or
                when the backend was closed.
            LookupTimeout: when *timeout* is 0 and the store could not be read in time.
            kombu.exceptions.ContentDisallowed, ForeignMessage: when a state of a given task cannot
                be decoded. A watch of everything leaves it out and logs a warning, also if it is
                large and cannot be fetched for the moment.
            TypeError, ValueError: when *target* or *states* are invalid, at once.
            ValueError: when *timeout* is nan, at the beginning of the iteration.
            RuntimeError: when the watch was begun before a fork and goes on in the child.

        The generator is for one thread at a time; it opens nothing before the first meta is
        requested. Closing or dropping it removes all its bindings. After an error it has ended;
        watching again is safe.
        """
        wanted = watching.read_states(states)
        if target is None:
            tap = tap_of(self._layout(), wanted)
            return watching.watch_everything(tap, self._decoder.decode, timeout)
        found = watching.read_target(target)
        patience = Patience(timeout, WATCH_INTERVAL)
        updates = self.updates(found.ids, patience)
        decode = self._decoder.decode
        return watching.watch_ids(updates, found.ended, decode, wanted, patience.deadline)

    def add_callback(self, result: Any) -> None:
        """Call the callbacks of *result* when its task ends. Does no I/O."""
        self.pending.add(result)

    def remove_callback(self, result: Any) -> None:
        """Stop calling callbacks of *result*. Safe within garbage collection: no lock, no I/O."""
        self.pending.remove(result)

    def close(self) -> None:
        """Stop calling callbacks."""
        pending, self.pending = self.pending, self._no_callbacks()
        pending.close()


class _Missing:
    """The members of a result set that have not ended yet."""

    def __init__(self, result: Any) -> None:
        #: Items to yield for members that are ready already.
        self.ready: List[Tuple[str, Any]] = []
        #: The result objects of each awaited task.
        self.leaves: Dict[str, List[Any]] = {}
        self._members: Dict[str, Any] = {}
        self._groups: List[Tuple[Any, Set[str]]] = []
        for node in result.results:
            unready = [leaf for leaf in trees.leaves(node) if not _is_ready(leaf)]
            for leaf in unready:
                self.leaves.setdefault(id_text(leaf.id), []).append(leaf)
            if isinstance(node, ResultSet):
                self._groups.append((node, {id_text(leaf.id) for leaf in unready}))
            else:
                self._members[id_text(node.id)] = node
                if not unready:
                    self.ready.append((node.id, _meta_of(node)))
        self.ready += [(node.id, node.results) for node, missing in self._groups if not missing]

    def end(self, task_id: str) -> Iterator[Tuple[str, Any]]:
        """Yield the members that became ready when a task ended."""
        member = self._members.get(task_id)
        if member is not None:
            yield member.id, _meta_of(member)
        for node, missing in self._groups:
            if task_id in missing:
                missing.discard(task_id)
                if not missing:
                    yield node.id, node.results


def _unfailed_parents(result: Any) -> List[Any]:
    """Return the tasks before *result* in a chain that are not known to have ended."""
    unknown = []
    for parent in trees.parents(result):
        if parent._cache is None:
            unknown.append(parent)
        else:
            parent.maybe_throw()
    return unknown


def _is_ready(node: Any) -> bool:
    return node._cache is not None or node.ignored


def _meta_of(node: Any) -> Meta:
    # A task that ignores its result is not waited for: like AsyncResult.get, which returns None.
    meta: Meta = node._cache or {"status": states.SUCCESS, "result": None, "task_id": node.id}
    return meta
