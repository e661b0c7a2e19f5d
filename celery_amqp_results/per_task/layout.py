"""The layout ``per-task``: one queue for each task, declared and written exactly as Celery 4 did.

So Celery 4 and 5 can share a broker while a fleet moves from one to the other, and results can be
kept on every transport of kombu. ``docs/wire.md`` describes all declarations and messages; only the
way of reading differs from Celery 4, see :mod:`~celery_amqp_results.per_task.lookups`.
"""

from __future__ import annotations

import threading
from typing import Any, Callable, Collection, Dict, Mapping, Optional, Sequence, Set

from celery_amqp_results import errors, options
from celery_amqp_results.amqp import connections, transports
from celery_amqp_results.chords.sending import Chords
from celery_amqp_results.metrics import Metrics
from celery_amqp_results.per_task.lookups import LookUps
from celery_amqp_results.per_task.polling import PollingFollower
from celery_amqp_results.per_task.pushing import PushFollower
from celery_amqp_results.per_task.queues import TaskQueues
from celery_amqp_results.per_task.wire import Messages, Wire
from celery_amqp_results.protocol.codec import Codec
from celery_amqp_results.protocol.message import GROUP, StateMessage
from celery_amqp_results.protocol.names import Route
from celery_amqp_results.toolkit.forks import Process
from celery_amqp_results.waiting.following import Following
from celery_amqp_results.waiting.tap import Tap

__all__ = ("HEARTBEAT", "PerTaskLayout")

#: Seconds between heartbeats: a stopped process that holds a message loses it to the others after
#: two to three times that.
HEARTBEAT = 5.0


class PerTaskLayout:
    """Keeps each result in a queue of its own.

    Parameters:
        sessions: channels to the broker.
        connector: opens the connections of waiting clients, where the broker speaks AMQP.
        wire: the declarations and messages.
        codec: decodes metas.
        settings: the backend's options.

    Thread-safe. Does no I/O until it is used. After a fork the child must make a new one and never
    use this one again.
    """

    #: Celery's polling task completes chords: other transports cannot lock a queue.
    chords: Optional[Chords] = None

    def __init__(
        self,
        sessions: transports.Sessions,
        connector: connections.Connector,
        wire: Wire,
        codec: Codec,
        settings: options.Options,
    ) -> None:
        self.connector = connector
        self.queues = TaskQueues(sessions, connector, wire, settings)
        self.lookups = LookUps(self.queues, Messages(codec))
        self._process = Process()
        self._lock = threading.Lock()
        self._followers: Set[PushFollower] = set()
        self._stored = 0
        self._published_bytes = 0

    # -- writing -----------------------------------------------------------------------------------

    def shape(self, result_meta: Mapping[str, Any]) -> Dict[str, Any]:
        """Return the fields of a meta that are written."""
        return self.queues.wire.shape(result_meta)

    def note_sent(self, task_id: str) -> None:
        """Do nothing: the process that stores a state declares the queue."""

    def mark_sent(self, connection: Any, sent: StateMessage) -> None:
        """Do nothing: a task's queue has no place for marks."""

    def mark(self, marks: Sequence[StateMessage], confirm: bool) -> None:
        """Do nothing, as :meth:`mark_sent`."""

    def last_mark(self, task_id: str) -> Optional[StateMessage]:
        """Return ``None``."""
        return None

    def detach(self, state: StateMessage) -> StateMessage:
        """Return *state*: every task has a queue of its own anyway."""
        return state

    def fetch(self, pointer: StateMessage) -> Optional[StateMessage]:
        """Return *pointer*: this layout has no pointers."""
        return pointer

    def publish_part(self, part: StateMessage, group_id: str) -> None:
        """Raise: this layout has no chords of its own."""
        raise errors.Unsupported("the layout 'per-task' has no parts of chords")

    def publish(
        self,
        state: StateMessage,
        route: Route,
        final: bool,
        part: Optional[StateMessage] = None,
    ) -> None:
        """Publish a state, and return when the broker has confirmed it.

        This also waits for states that are not final: two states of a task must not overtake each
        other, as Celery 4 uses the last one as the current one.

        Raises:
            BackendUnavailable: when the broker cannot be reached, or does not confirm it.
            DeclarationRefused: when the broker refuses the queue.
            ResultTooLarge: when the broker refuses a message of this size.
        """
        self._store(state)
        with self._lock:
            self._stored += 1
            self._published_bytes += len(state.body)

    def save_group(self, group: StateMessage) -> None:
        """Keep a group, in a queue that is named like a task's."""
        self._store(group)

    def _store(self, state: StateMessage) -> None:
        self.queues.store(state)
        if self.queues.sessions.local:
            PollingFollower.wake_all()

    # -- reading -----------------------------------------------------------------------------------

    def poll(
        self, ids: Collection[str], backlog_limit: Optional[int] = None
    ) -> Dict[str, Optional[StateMessage]]:
        """Return the current state of each of *ids*, or ``None`` where nothing is known.

        Parameters:
            ids: the tasks.
            backlog_limit: how many states of one task may be skipped.

        Raises:
            Exception: as :meth:`LookUps.read`.
        """
        return self.lookups.read(ids, limit=backlog_limit)

    def stored_state(self, task_id: str, besides: Collection[str] = ()) -> Optional[StateMessage]:
        """Return the state that the broker keeps of a task; no body is in another queue here."""
        return self.poll((task_id,))[task_id]

    def read_group(self, group_id: str) -> Optional[StateMessage]:
        """Return a group that was kept, or ``None``."""
        return self.lookups.read((group_id,), GROUP)[group_id]

    def follower(self, submit: Optional[Callable[..., Any]] = None) -> Following:
        """Return a follower without tasks.

        Parameters:
            submit: not used; the following thread reads queues itself.
        """
        if not self.queues.sessions.amqp:
            return PollingFollower(self.lookups)
        follower = PushFollower(self.lookups, self._drop_follower)
        with self._lock:
            self._followers.add(follower)
        return follower

    def _drop_follower(self, follower: PushFollower) -> None:
        with self._lock:
            self._followers.discard(follower)

    def tap(self, wanted: Optional[Collection[str]] = None) -> Tap:
        """Raise: this layout publishes states only by the key of their task.

        Raises:
            Unsupported: always.
        """
        raise errors.Unsupported(
            "the layout 'per-task' has no place where the states of all tasks come by; watch given "
            "tasks, or use the layout 'shared' on RabbitMQ"
        )

    def metrics(self) -> Metrics:
        """Return the counts so far. Does no I/O; this counts less than the layout ``shared``."""
        with self._lock:
            return Metrics(
                stored=self._stored,
                confirmed=self._stored,
                published_bytes=self._published_bytes,
                waiting=len({task_id for f in self._followers for task_id in list(f.pending)}),
                rejected=self.queues.rejected,
            )

    # -- deleting and closing ----------------------------------------------------------------------

    def forget(self, ids: Collection[str]) -> None:
        """Delete the queues of *ids*."""
        for task_id in ids:
            self.queues.delete(self.queues.wire.rkey(task_id))

    def forget_group(self, group_id: str) -> None:
        """Delete the queue of a group."""
        self.forget((group_id,))

    def flush(self) -> None:
        """Do nothing: every publish waits for its confirm."""

    def close(self, wait: bool = True) -> None:
        """Close all connections; waiting calls raise an error."""
        if not self._process.is_current:
            # Forked: the connections are the parent's.
            return
        self.queues.closed = True
        self.queues.sessions.close()
        with self._lock:
            followers = list(self._followers)
        for follower in followers:
            follower.poke()
        PollingFollower.wake_all()
