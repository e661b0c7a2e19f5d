"""Reading the states of tasks: looks them up in the layout, and decodes them.

It may import ``layouts``, ``config`` and what is below them, and knows nothing of Celery's backend
class.
"""

from __future__ import annotations

import logging
from typing import Any, Callable, Collection, ContextManager, Iterable, Optional

from celery import states
from celery.exceptions import SecurityError, TimeoutError
from celery.result import result_from_tuple
from kombu.exceptions import ContentDisallowed
from kombu.utils.functional import LRUCache

from celery_amqp_results import errors
from celery_amqp_results.amqp.failures import was_refused
from celery_amqp_results.config import BackendConfig
from celery_amqp_results.layouts import KeepsBodies, KeepsMarks, Layout, LimitsBacklog
from celery_amqp_results.library_types import App, Meta
from celery_amqp_results.protocol.ids import plain_ids
from celery_amqp_results.protocol.message import STATE, StateMessage
from celery_amqp_results.protocol.ranking import is_final
from celery_amqp_results.store.marks import Fate
from celery_amqp_results.toolkit.retry import is_over
from celery_amqp_results.waiting import results as trees
from celery_amqp_results.waiting.groups import Pass

__all__ = ("Reader",)

logger = logging.getLogger(__name__)

#: The number of failed tasks that are remembered.
MAX_FAILED = 1000


class Reader:
    """Looks up states and decodes them.

    Parameters:
        layout: returns the layout of this process.
        convert: converts a decoded body to a meta; the result of a failure to an exception.

    Thread-safe. After a fork the child calls :meth:`reset`.
    """

    def __init__(
        self,
        config: BackendConfig,
        layout: Callable[[], Layout],
        convert: Callable[[Meta], Meta],
    ) -> None:
        self._config = config
        self._layout = layout
        self.convert = convert
        self.reset()

    def reset(self) -> None:
        """Start afresh, like a new process that has read nothing."""
        self._failed = LRUCache(limit=MAX_FAILED)
        self._pass = Pass()

    # -- decoding ----------------------------------------------------------------------------------

    def content(
        self,
        state: StateMessage,
        deadline: Optional[float] = None,
        besides: Collection[str] = (),
    ) -> Meta:
        """Return the decoded body of *state*, which may have to be fetched.

        Parameters:
            deadline: time (``time.monotonic``) at which the caller's timeout is over.
            besides: queues with bodies that cannot be decoded.

        Raises:
            ResultExpired: when the body is gone.
            LookupTimeout, BackendUnavailable: when it could not be read.
            celery.exceptions.TimeoutError: when it could not be read before *deadline*.
            kombu.exceptions.ContentDisallowed, ForeignMessage: when it cannot be decoded.
        """
        if state.body_queue is None:
            return self._config.codec.decode(state)
        layout = self._layout()
        complete = None
        if isinstance(layout, KeepsBodies):
            try:
                complete = layout.fetch(state, deadline)
            except errors.BackendUnavailable as exc:
                if was_refused(exc) or not is_over(deadline):
                    raise
                raise TimeoutError(
                    f"The operation timed out: the large result of {state.id!r} is not read yet."
                ) from exc
        if complete is None:
            raise errors.ResultExpired(
                f"the {state.state} of {state.id!r} is gone from the queue {state.body_queue!r}: "
                "it has expired or was forgotten, or somebody deleted the queue"
            )
        try:
            return self._config.codec.decode(complete)
        except (ContentDisallowed, errors.ForeignMessage):
            if (
                state.kind != STATE
                or not is_final(state.state)
                or not isinstance(layout, KeepsBodies)
            ):
                raise
            # Only now it is known that the body cannot be decoded. It must not hide another final
            # state, of another run of the task.
            besides = (*besides, state.body_queue)
            other = layout.stored_besides(state.id, besides)
            if other is None or not is_final(other.state):
                raise
            return self.content(other, deadline, besides)

    def decode(self, state: StateMessage, deadline: Optional[float] = None) -> Meta:
        """Return the meta that *state* holds.

        Parameters and errors are those of :meth:`content`.
        """
        content = self.content(state, deadline)
        try:
            meta = self.convert(content)
        except SecurityError:
            # Celery's own check: the named exception is some other callable.
            raise
        except Exception as exc:
            raise errors.ForeignMessage(
                f"the {state.state} of {state.id!r} has no exception as its result: {exc!r:.300}"
            ) from exc
        if meta["status"] in states.PROPAGATE_STATES:
            self._failed[state.id] = None
        return meta

    def decode_if_kept(
        self, state: StateMessage, deadline: Optional[float] = None
    ) -> Optional[Meta]:
        """Return the meta of *state*, or ``None`` if its body is gone."""
        return _unless_expired(self.decode, state, deadline)

    # -- look-ups ----------------------------------------------------------------------------------

    def meta(self, task_id: str, backlog_limit: Optional[int] = None) -> Meta:
        """Return the current meta of a task; a pending one if nothing is known of it.

        Parameters:
            backlog_limit: how many states may be skipped, where the layout limits that.

        Raises:
            Exception: as :meth:`content`, and BacklogLimitExceeded when there are more states.
        """
        unused = self._pass.unused()
        state = unused.pop(task_id) if task_id in unused else self._look_up(task_id, backlog_limit)
        found = None if state is None else self.decode_if_kept(state)
        return {"status": states.PENDING, "result": None} if found is None else found

    def _look_up(self, task_id: str, backlog_limit: Optional[int]) -> Optional[StateMessage]:
        layout = self._layout()
        if backlog_limit is not None and isinstance(layout, LimitsBacklog):
            return layout.poll_within(task_id, backlog_limit)
        return layout.poll((task_id,))[task_id]

    def in_one_pass(self, tasks: Iterable[Any]) -> ContextManager[None]:
        """Read the states of result objects at once, and answer from that in a ``with`` block."""
        return self._pass.over(self._layout().poll, tasks)

    def without_parents(self, result: Any, function: Callable[[], Any]) -> Callable[[], Any]:
        """Return *function*, which asks for all the parents of *result*, without a look-up.

        They are followed: *function* gets the states of those that are known to have failed, and
        nothing of the others.
        """

        def call() -> Any:
            with self._pass.over(dict.fromkeys, trees.parents(result)):
                return function()

        return call

    def fate(self, task_id: str) -> Fate:
        """Return what is known of a task; with ``track_sent`` this includes tasks without a state.

        Raises:
            LookupTimeout, BackendUnavailable: as every look-up.
        """
        layout = self._layout()
        state = layout.poll((task_id,))[task_id]
        mark = None
        if state is None and isinstance(layout, KeepsMarks) and self._config.options.track_sent:
            mark = layout.last_mark(task_id)
            # A new state may still be on its way to the inbox, which poll() asks once it follows
            # the task. Look after reading the mark: a task that has ended had its state before
            # that.
            state = layout.stored_state(task_id)
        return Fate.read(state, mark)

    def read_group(self, group_id: str, app: App) -> Optional[Meta]:
        """Return the meta of a group that was saved with its result object, or ``None``.

        Raises:
            ForeignMessage: when the message holds no group.
            LookupTimeout, BackendUnavailable: as every look-up.
        """
        group = self._layout().read_group(group_id)
        meta = None if group is None else _unless_expired(self.content, group)
        if meta is None:
            return None
        try:
            meta["result"] = result_from_tuple(plain_ids(meta["result"]), app)
        except Exception as exc:
            raise errors.ForeignMessage(
                f"the group {group_id!r} has no members as its result: {exc!r:.300}"
            ) from exc
        return meta

    # -- failed tasks ------------------------------------------------------------------------------

    def knows_failed(self, task_id: str) -> bool:
        """Return whether this process has read that a task has failed.

        Celery's polling chord task finds the failed task of a header by that. Failures are not in
        the backend's cache, as a redelivered task may still succeed.
        """
        return task_id in self._failed

    def forget(self, task_id: str) -> None:
        """Forget what this process has read of a task. Does no I/O."""
        self._failed.pop(task_id, None)


def _unless_expired(
    read: Callable[[StateMessage, Optional[float]], Meta],
    state: StateMessage,
    deadline: Optional[float] = None,
) -> Optional[Meta]:
    try:
        return read(state, deadline)
    except errors.ResultExpired as exc:
        logger.warning("taken for expired: %s", exc)
        return None
