"""The layout ``per-task``: one queue for each task, declared and written exactly as Celery 4 did.

So Celery 4 and 5 can share a broker while a fleet moves from one to the other, and results can be
kept on every transport of kombu. ``docs/wire.md`` describes all declarations and messages; only the
way of reading differs from Celery 4, see :mod:`~celery_amqp_results.per_task.lookups`.
"""

from __future__ import annotations

import threading
from typing import Callable, Collection, Dict, Optional, Set

from celery_amqp_results.chords.sending import Chords
from celery_amqp_results.metrics import Metrics
from celery_amqp_results.per_task.lookups import LookUps
from celery_amqp_results.per_task.polling import PollingFollower
from celery_amqp_results.per_task.pushing import PushFollower
from celery_amqp_results.per_task.queues import TaskQueues
from celery_amqp_results.per_task.wire import Messages
from celery_amqp_results.protocol.codec import Codec
from celery_amqp_results.protocol.message import GROUP, StateMessage
from celery_amqp_results.protocol.names import Route
from celery_amqp_results.toolkit.forks import Process
from celery_amqp_results.waiting.following import Following

__all__ = ("HEARTBEAT", "PerTaskLayout")

#: Seconds between heartbeats: a stopped process that holds a message loses it to the others after
#: two to three times that.
HEARTBEAT = 5.0


class PerTaskLayout:
    """Keeps each result in a queue of its own.

    Thread-safe. Does no I/O until it is used. After a fork the child must make a new one and never
    use this one again.
    """

    #: Celery's polling task completes chords: other transports cannot lock a queue.
    chords: Optional[Chords] = None

    def __init__(self, queues: TaskQueues, codec: Codec) -> None:
        self.queues = queues
        self.lookups = LookUps(queues, Messages(codec))
        self._process = Process()
        self._lock = threading.Lock()
        self._followers: Set[PushFollower] = set()
        self._stored = 0
        self._published_bytes = 0

    # -- writing -----------------------------------------------------------------------------------

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
        self, ids: Collection[str], deadline: Optional[float] = None
    ) -> Dict[str, Optional[StateMessage]]:
        """Return the current state of each of *ids*, or ``None`` where nothing is known."""
        return self.lookups.read(ids, deadline=deadline)

    def poll_within(self, task_id: str, backlog_limit: int) -> Optional[StateMessage]:
        """Return the current state of a task if that skips at most *backlog_limit* states."""
        return self.lookups.read((task_id,), limit=backlog_limit)[task_id]

    def read_group(self, group_id: str) -> Optional[StateMessage]:
        """Return a group that was kept, or ``None``."""
        return self.lookups.read((group_id,), GROUP)[group_id]

    def follower(self, submit: Optional[Callable[..., object]] = None) -> Following:
        """Return a follower without tasks, which reads queues itself."""
        if not self.queues.sessions.amqp:
            return PollingFollower(self.lookups)
        follower = PushFollower(self.lookups, self._drop_follower)
        with self._lock:
            self._followers.add(follower)
        return follower

    def _drop_follower(self, follower: PushFollower) -> None:
        with self._lock:
            self._followers.discard(follower)

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
