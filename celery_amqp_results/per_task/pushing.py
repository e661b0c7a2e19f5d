"""Waiting for tasks on AMQP, with a queue that receives their states.

A follower has a connection with an exclusive queue of its own, bound to the result exchange by the
key of each task that it follows. A state published by a Celery 4 or 5 worker goes to the task's
queue and to this one; the task's queue is never consumed. A task is read once after its binding
stands, so that no state falls in between. celery-node and gocelery publish to the task's queue
alone. So the follower also looks into the queues of tasks without pushed states, a few at a time,
for a tenth of the time at most.
"""

from __future__ import annotations

import collections
import logging
import time
from typing import Any, Callable, Collection, Deque, Dict, Iterable, List, Optional, Set

import amqp
import kombu
from amqp import exceptions as amqp_errors
from kombu.exceptions import ContentDisallowed

from celery_amqp_results import errors
from celery_amqp_results.amqp import transports
from celery_amqp_results.amqp.failures import is_refusal
from celery_amqp_results.amqp.link import Link
from celery_amqp_results.per_task.lookups import LookUps
from celery_amqp_results.per_task.polling import LONGEST_PAUSE, PAUSE_SHARE, QueueFollower, identify
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.ranking import by_task
from celery_amqp_results.toolkit.retry import Retry, time_left
from celery_amqp_results.toolkit.sockets import WakeUp
from celery_amqp_results.waiting.progress import Update
from celery_amqp_results.waiting.rechecks import FIRST_RECHECK, LAST_RECHECK

__all__ = ("Bindings", "PushFollower")

logger = logging.getLogger(__name__)

#: Seconds between heartbeats on the connection of a follower.
HEARTBEAT = 15.0

#: A follower starts with a new queue at this number of bindings of ended tasks.
MAX_STALE = 1000

#: The shortest pause between two looks into the queues of tasks without pushed states, in seconds.
SHORTEST_PROBE_PAUSE = 0.05

#: How many such queues a follower looks into at once.
PROBES = 50


class Bindings:
    """Which tasks are read, bound and pushed. Has no clock and does no I/O."""

    def __init__(self) -> None:
        self._read: Set[str] = set()
        self._bound: Set[str] = set()
        #: Bindings of tasks that have ended.
        self._stale = 0
        #: Bound tasks of which nothing was pushed yet, in the order of the next looks.
        self._silent: Deque[str] = collections.deque()

    def unread(self, ids: Collection[str]) -> Set[str]:
        """Return those of *ids* that this method has not returned before."""
        new = set(ids) - self._read
        self._read |= new
        return new

    def unbound(self, ids: Iterable[str]) -> List[str]:
        """Return those of *ids* that are not bound."""
        return [task_id for task_id in ids if task_id not in self._bound]

    def bound(self, task_id: str) -> None:
        """Note that the binding of a task stands."""
        self._bound.add(task_id)
        self._silent.append(task_id)

    def ended(self, task_id: str) -> bool:
        """Forget a task; return whether too many bindings are unused and the queue must go.

        Unbinding takes as long as binding; deleting the queue removes all bindings.
        """
        self._read.discard(task_id)
        if task_id in self._bound:
            self._bound.discard(task_id)
            self._stale += 1
        return self._stale > MAX_STALE

    def pushed(self, ids: Set[str]) -> None:
        """Note tasks whose writers publish to the exchange, and will do so with later states."""
        if not ids.isdisjoint(self._silent):
            self._silent = collections.deque(i for i in self._silent if i not in ids)

    @property
    def has_silent(self) -> bool:
        """Whether there are bound tasks of which nothing was pushed."""
        return bool(self._silent)

    def next_silent(self) -> List[str]:
        """Return the tasks whose queues to look into next, and move them to the end."""
        found = []
        for _ in range(min(PROBES, len(self._silent))):
            task_id = self._silent.popleft()
            if task_id in self._bound:
                self._silent.append(task_id)
                found.append(task_id)
        return found

    def lost(self) -> None:
        """Forget all bindings: the queue is gone."""
        self._silent.clear()
        self._bound.clear()
        self._stale = 0


class PushFollower(QueueFollower):
    """Follows tasks by a queue of its own that receives their states as well.

    The connection is opened when the first task turns out not to have ended already, and is closed
    at the end.

    Parameters:
        on_close: called with the follower when it is closed.
    """

    def __init__(self, lookups: LookUps, on_close: Callable[[PushFollower], None]) -> None:
        super().__init__(lookups)
        self._queues = lookups.queues
        self._on_close = on_close
        self.bindings = Bindings()
        self._link: Optional[Link] = None
        self._channel: Any = None
        self._queue = ""
        self._arrived: List[StateMessage] = []
        #: When to look into the queues of silent tasks, and the channel for that.
        self._probe_at = 0.0
        self._probing: Any = None
        self._waiting_since = time.monotonic()
        #: Why a pushed message cannot be read, by the task that it is about.
        self._unreadable: Dict[str, Exception] = {}
        self._tries = Retry(self._queues.connector.policy)
        self._pause = FIRST_RECHECK
        self._recheck_at = time.monotonic() + FIRST_RECHECK
        self._wake_up = WakeUp()

    def discard(self, task_id: str) -> None:
        """Stop following *task_id*."""
        super().discard(task_id)
        self._ended(task_id)

    def _ended(self, task_id: str) -> None:
        self._unreadable.pop(task_id, None)
        if self.bindings.ended(task_id):
            self._drop()

    def close(self) -> None:
        """Stop following all tasks, and close the connection."""
        super().close()
        link, self._link, self._channel = self._link, None, None
        if link is not None:
            link.close()
        self._on_close(self)
        self._wake_up.close()

    def poke(self) -> None:
        """Make :meth:`step` return soon. May be called by any thread."""
        self._wake_up.ring()

    def pause(self, seconds: float) -> None:
        """Wait for *seconds*, or until poked or pushed to."""
        self._wake_up.wait(seconds)

    def step(self, deadline: Optional[float], pause: float) -> List[Update]:
        """Wait at most *pause* seconds for updates and return them."""
        until = time.monotonic() + time_left(deadline, pause)
        try:
            updates = self._read_if_due(deadline)
            if updates:
                return updates
            if self._link is not None:
                updates = self._receive(self._link, until)
                self._tries.succeeded()
                return updates
        except errors.BackendUnavailable:
            raise
        except self._queues.sessions.errors as exc:
            pause = self._lose(exc)
        self._wake_up.wait(time_left(until, pause))
        return []

    def _lose(self, exc: Exception) -> float:
        """Close the connection; return the seconds after which to open another."""
        seconds = self._tries.after(exc, time.monotonic())
        self._drop()
        if seconds is None or is_refusal(exc):
            raise errors.BackendUnavailable(
                f"the connection to the broker at {self._queues.connector.describe()} was lost "
                f"while waiting for {len(self.pending)} tasks: {exc!r}"
            ) from exc
        logger.warning("waiting goes on with a new connection: %r", exc)
        return seconds

    # -- reading the queues of tasks ---------------------------------------------------------------

    def _read_if_due(self, deadline: Optional[float]) -> List[Update]:
        """Read the queues that may hold news, and bind the tasks without a binding."""
        if time.monotonic() >= self._recheck_at:
            # A push is a hint, the queue is the truth.
            self._pause = min(2 * self._pause, LAST_RECHECK)
            self._recheck_at = time.monotonic() + self._pause
            updates = self._read(self.pending, deadline)
            if updates:
                return updates
        new = self.bindings.unread(self.pending)
        if new:
            # An ended task needs no binding.
            updates = self._read(new, deadline)
            if updates:
                return updates
        unbound = self.bindings.unbound(self.pending)
        if unbound:
            updates = self._bind(unbound, deadline)
            if updates:
                return updates
        if self._link is not None and time.monotonic() >= self._probe_at:
            return self._probe(self._link, deadline)
        return []

    def _read(self, ids: Collection[str], deadline: Optional[float]) -> List[Update]:
        """Read the queues of *ids* and return the updates, together with pushed states.

        A state in a queue may be newer than pushed states that have not been received yet. If those
        came after it, a task would seem to go backwards.
        """
        if self._link is None:
            return self._end_tasks(super()._read(ids, deadline))
        self._check_open()
        found = self._lookups.glance(list(ids), deadline)
        # The answer to this comes after all states pushed before.
        self._channel.queue_declare(self._queue, passive=True)
        arrived, self._arrived = self._arrived, []
        states: List[StateMessage] = []
        pushed_of = by_task(arrived)
        for task_id, state in found.items():
            pushed = pushed_of.get(task_id, [])
            if state is not None:
                keys = [identify(each) for each in pushed]
                if identify(state) in keys:
                    # Pushed states up to this one are older.
                    newer = len(keys) - keys[::-1].index(identify(state))
                    pushed = pushed[newer:]
                states.append(state)
            states += map(self._lookups.messages.received_again, pushed)
        self._arrived = [each for each in arrived if each.id not in found]
        return self._updates(states)

    def _updates(self, states: Iterable[StateMessage]) -> List[Update]:
        return self._end_tasks(self._progress.updates(states))

    def _end_tasks(self, updates: List[Update]) -> List[Update]:
        for update in updates:
            if update.final is not None:
                self._ended(update.task_id)
        return updates

    def _probe(self, link: Link, deadline: Optional[float]) -> List[Update]:
        """Read the non-empty queues among tasks without pushed states."""
        begun = time.monotonic()
        filled = [i for i in self.bindings.next_silent() if self._has_messages(link, i)]
        updates = self._read(filled, deadline) if filled else []
        now = time.monotonic()
        if updates:
            self._waiting_since = now
        patience = PAUSE_SHARE * (now - self._waiting_since)
        pause = min(max(patience, SHORTEST_PROBE_PAUSE), LONGEST_PAUSE)
        self._probe_at = now + max(pause, (now - begun) / PAUSE_SHARE)
        return updates

    def _has_messages(self, link: Link, task_id: str) -> bool:
        if self._probing is None:
            self._probing = link.amqp.channel()
        try:
            # If the queue does not exist the broker closes the channel, and py-amqp reopens it.
            found = self._probing.queue_declare(self._queues.wire.rkey(task_id), passive=True)
        except amqp_errors.NotFound:
            return False
        return bool(found.message_count)

    # -- the queue of the follower -----------------------------------------------------------------

    def _bind(self, ids: List[str], deadline: Optional[float]) -> List[Update]:
        """Bind *ids*, and read them once more."""
        if self._link is None:
            self._open(deadline)
        wire = self._queues.wire
        for task_id in ids:
            self._channel.queue_bind(self._queue, wire.exchange, wire.rkey(task_id))
            self.bindings.bound(task_id)
        self._waiting_since = time.monotonic()
        return self._read(ids, deadline)

    def _open(self, deadline: Optional[float]) -> None:
        link = self._queues.connector.open(HEARTBEAT, deadline, "push")
        try:
            session = transports.AMQPSession(link)
            channel = session.channel
            self._queues.declare_exchange(session)
            self._queue = channel.queue_declare("", exclusive=True, auto_delete=True).queue
            channel.basic_qos(0, 0, False)
            channel.basic_consume(self._queue, no_ack=True, callback=self._on_message)
        except BaseException:
            link.drop()
            raise
        self._link, self._channel = link, channel

    def _drop(self) -> None:
        link, self._link, self._channel, self._probing = self._link, None, None, None
        self.bindings.lost()
        if link is not None:
            link.drop()

    def _on_message(self, raw: amqp.Message) -> None:
        message: kombu.Message = self._channel.message_to_python(raw)
        try:
            self._arrived.append(self._lookups.messages.state_of(message))
        except (ContentDisallowed, errors.ForeignMessage) as exc:
            # An error here is raised to the waiting caller, and not while the connection is being
            # read.
            key = message.delivery_info.get("routing_key")
            for task_id in self.pending:
                if self._queues.wire.rkey(task_id) == key:
                    self._unreadable[task_id] = exc

    def _receive(self, link: Link, until: float) -> List[Update]:
        """Wait for pushes until *until*, or until other work is due."""
        if not self._arrived and not self._unreadable:
            link.tick()
            probe_at = self._probe_at if self.bindings.has_silent else until
            link.wait(min(until, self._recheck_at, probe_at), self._wake_up)
        while not self._unreadable and link.readable():
            link.drain(0.001)
        self._check_open()
        if self._unreadable:
            _, failure = self._unreadable.popitem()
            raise failure
        arrived, self._arrived = self._arrived, []
        self.bindings.pushed({state.id for state in arrived})
        return self._updates(arrived)
