"""Waiting for tasks in the layout ``per-task``.

On AMQP a follower has a connection with an exclusive queue of its own, bound to the result exchange
by the key of each task that it follows. A state published by a Celery 4 or 5 worker goes to the
task's queue and to this one; the task's queue is never consumed. A task is read once after its
binding stands, so that no state falls in between. celery-node and gocelery publish to the task's
queue alone. So the follower also looks into the queues of tasks without pushed states, a few at a
time, for a tenth of the time at most.

On the other transports the queues are read again and again, at an interval that grows with the time
waited. A state published in the same process, as with ``memory://``, ends the pause.
"""

from __future__ import annotations

import collections
import logging
import threading
import time
import weakref
from typing import (
    Any,
    ClassVar,
    Collection,
    Deque,
    Dict,
    Iterable,
    List,
    Optional,
    Protocol,
    Set,
    Tuple,
)

import kombu
from amqp import exceptions as amqp_errors
from kombu.exceptions import ContentDisallowed

from celery_amqp_results import errors
from celery_amqp_results.amqp import connections, transports
from celery_amqp_results.amqp.failures import is_refusal
from celery_amqp_results.amqp.link import Link
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.ranking import fold, is_final
from celery_amqp_results.toolkit.retry import Retry, time_left
from celery_amqp_results.toolkit.sockets import WakeUp
from celery_amqp_results.waiting.follower import FIRST_RECHECK, LAST_RECHECK, Update

__all__ = ("PollingFollower", "PushFollower")

logger = logging.getLogger(__name__)

#: Seconds between heartbeats on the connection of a follower.
HEARTBEAT = 15.0

#: A follower starts with a new queue at this number of bindings of ended tasks.
MAX_STALE = 1000

#: Pauses between two looks, in seconds: a share of the time waited so far, within limits.
SHORTEST_PAUSE = 0.01
SHORTEST_PROBE_PAUSE = 0.05
LONGEST_PAUSE = 0.5
PAUSE_SHARE = 0.1

#: How many queues a follower that receives pushed states looks into at once.
PROBES = 50


class Queues(Protocol):
    """The part of the layout that a follower needs: it reads the queues of tasks."""

    sessions: transports.Sessions
    connector: connections.Connector
    #: Whether the backend was closed.
    closed: bool

    @property
    def exchange(self) -> str:
        """Name of the exchange that states are published to."""

    def rkey(self, task_id: str) -> str:
        """Return the name of the queue of a task, which is its routing key as well."""

    def read(
        self, ids: Collection[str], *, settle: bool, deadline: Optional[float]
    ) -> Dict[str, Optional[StateMessage]]:
        """Return the current state of each of *ids*, or ``None`` where nothing is known."""

    def state_of(self, message: kombu.Message) -> StateMessage:
        """Return the state that *message* holds, decoded."""

    def received_again(self, state: StateMessage) -> StateMessage:
        """Return *state* as if it was received now."""

    def declare_exchange(self, session: transports.Session) -> None:
        """Declare the exchange, unless this process has."""

    def closed_follower(self, follower: PushFollower) -> None:
        """Note that *follower* was closed."""


def _key(state: StateMessage) -> Tuple[str, int]:
    return state.state, hash(state.body)


class _Follower:
    """The common part of both kinds of followers. For one thread; must be closed at the end."""

    def __init__(self, layout: Queues) -> None:
        self._layout = layout
        #: The tasks that have not ended, each with its current state so far.
        self.pending: Dict[str, Optional[StateMessage]] = {}
        # States carry no time and no id: one with the same name and body is the same.
        self._seen: Dict[str, Set[Tuple[str, int]]] = {}

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def add(self, ids: Iterable[str]) -> None:
        """Follow *ids* as well. Does no I/O."""
        for task_id in ids:
            self.pending.setdefault(task_id, None)

    def discard(self, task_id: str) -> None:
        """Stop following *task_id*."""
        self.pending.pop(task_id, None)
        self._seen.pop(task_id, None)

    def close(self) -> None:
        """Stop following all tasks."""
        self.pending.clear()
        self._seen.clear()

    def _read(self, ids: Iterable[str], deadline: Optional[float]) -> List[Update]:
        """Read the queues of *ids* and return the updates."""
        if self._layout.closed:
            raise errors.BackendUnavailable("the result backend was closed while waiting")
        found = self._layout.read(list(ids), settle=False, deadline=deadline)
        return self._news([state for state in found.values() if state is not None])

    def _news(self, states: Iterable[StateMessage]) -> List[Update]:
        """Return the updates in *states*, which are in the order in which they were received."""
        news: Dict[str, List[StateMessage]] = {}
        for state in states:
            if state.id not in self.pending:
                continue
            seen = self._seen.setdefault(state.id, set())
            key = _key(state)
            if key not in seen:
                seen.add(key)
                news.setdefault(state.id, []).append(state)
        updates = []
        for task_id, new in news.items():
            known = self.pending[task_id]
            current = fold(new if known is None else [known, *new])
            self.pending[task_id] = current
            final = current if current is not None and is_final(current.state) else None
            if final is not None:
                self.discard(task_id)
            updates.append(Update(task_id, new, final))
        return updates


class PollingFollower(_Follower):
    """Follows tasks by reading their queues again and again."""

    _all: ClassVar[weakref.WeakSet[PollingFollower]] = weakref.WeakSet()

    def __init__(self, layout: Queues) -> None:
        super().__init__(layout)
        self._event = threading.Event()
        self._since = time.monotonic()
        self._due = 0.0
        self._all.add(self)

    @classmethod
    def wake_all(cls) -> None:
        """Make every follower in the process read its queues, since one has a new state."""
        for follower in list(cls._all):
            follower._due = 0.0
            follower._event.set()

    def add(self, ids: Iterable[str]) -> None:
        """Follow *ids* as well. Does no I/O."""
        super().add(ids)
        self._since = time.monotonic()
        self._due = 0.0

    def poke(self) -> None:
        """Make :meth:`step` return soon. May be called by any thread."""
        self._event.set()

    def pause(self, seconds: float) -> None:
        """Wait for *seconds*, or until poked."""
        self._event.wait(seconds)

    def step(self, deadline: Optional[float], pause: float) -> List[Update]:
        """Wait at most *pause* seconds for updates and return them.

        Parameters:
            deadline: time (``time.monotonic``) after which connecting is given up.

        Raises:
            BackendUnavailable: when the broker cannot be reached or refuses us.
            Exception: whatever :meth:`Queues.poll` raises.
        """
        until = time.monotonic() + time_left(deadline, pause)
        while True:
            poked = self._event.is_set()
            if poked:
                self._event.clear()
            now = time.monotonic()
            if now >= self._due:
                share = PAUSE_SHARE * (now - self._since)
                self._due = now + min(max(share, SHORTEST_PAUSE), LONGEST_PAUSE)
                updates = self._read(self.pending, deadline)
                if updates:
                    self._since = self._due = time.monotonic()
                    return updates
            now = time.monotonic()
            if poked or now >= until:
                return []
            self._event.wait(max(0.0, min(until, self._due) - now))


class PushFollower(_Follower):
    """Follows tasks by a queue of its own that receives their states as well.

    The connection is opened when the first task turns out not to have ended already, and is closed
    at the end.
    """

    def __init__(self, layout: Queues) -> None:
        super().__init__(layout)
        self._link: Optional[Link] = None
        self._channel: Any = None
        self._queue = ""
        #: The tasks whose binding stands and that were read since.
        self._covered: Set[str] = set()
        #: Bindings of tasks that have ended.
        self._stale = 0
        self._looked_at: Set[str] = set()
        self._arrived: List[StateMessage] = []
        #: Tasks whose queues must be checked, in turn, and when that is due.
        self._unpushed: Deque[str] = collections.deque()
        self._probe_at = 0.0
        self._probing: Any = None
        self._waiting_since = time.monotonic()
        #: Why a pushed message cannot be read, by the task that it is about.
        self._failures_of: Dict[str, Exception] = {}
        self._tries = Retry(layout.connector.policy)
        self._pause = FIRST_RECHECK
        self._recheck_at = time.monotonic() + FIRST_RECHECK
        self._wake_up = WakeUp()

    def discard(self, task_id: str) -> None:
        """Stop following *task_id*."""
        super().discard(task_id)
        self._failures_of.pop(task_id, None)
        self._looked_at.discard(task_id)
        if task_id in self._covered:
            self._covered.discard(task_id)
            # Unbinding takes as long as binding; deleting the queue at the end removes all
            # bindings.
            self._stale += 1
            if self._stale > MAX_STALE:
                self._drop()

    def close(self) -> None:
        """Stop following all tasks, and close the connection."""
        self._covered.clear()
        super().close()
        link, self._link, self._channel = self._link, None, None
        if link is not None:
            link.close()
        self._layout.closed_follower(self)
        self._wake_up.close()

    def poke(self) -> None:
        """Make :meth:`step` return soon. May be called by any thread."""
        self._wake_up.ring()

    def pause(self, seconds: float) -> None:
        """Wait for *seconds*, or until poked or pushed to."""
        self._wake_up.wait(seconds)

    def step(self, deadline: Optional[float], pause: float) -> List[Update]:
        """Wait at most *pause* seconds for updates and return them.

        Parameters:
            deadline: time (``time.monotonic``) after which connecting is given up.

        Raises:
            BackendUnavailable: when the broker cannot be reached or refuses us.
            Exception: whatever :meth:`Queues.poll` raises.
        """
        until = time.monotonic() + time_left(deadline, pause)
        try:
            if time.monotonic() >= self._recheck_at:
                # A push is a hint, the queue is the truth.
                self._pause = min(2 * self._pause, LAST_RECHECK)
                self._recheck_at = time.monotonic() + self._pause
                updates = self._read(self.pending, deadline)
                if updates:
                    return updates
            new = self.pending.keys() - self._looked_at
            if new:
                # An ended task needs no binding.
                self._looked_at |= new
                updates = self._read(new, deadline)
                if updates:
                    return updates
            updates = self._cover(deadline)
            if updates:
                return updates
            if self._link is not None and time.monotonic() >= self._probe_at:
                updates = self._probe(self._link, deadline)
                if updates:
                    return updates
            if self._link is not None:
                updates = self._receive(self._link, until)
                self._tries.succeeded()
                return updates
        except errors.BackendUnavailable:
            raise
        except self._layout.sessions.errors as exc:
            seconds = self._tries.after(exc, time.monotonic())
            self._drop()
            if seconds is None or is_refusal(exc):
                raise errors.BackendUnavailable(
                    f"the connection to the broker at {self._layout.connector.describe()} was "
                    f"lost while waiting for {len(self.pending)} tasks: {exc!r}"
                ) from exc
            logger.warning("waiting goes on with a new connection: %r", exc)
            self._wake_up.wait(time_left(until, seconds))
            return []
        self._wake_up.wait(time_left(until, pause))
        return []

    def _read(self, ids: Iterable[str], deadline: Optional[float]) -> List[Update]:
        """Read the queues of *ids* and return the updates, together with pushed states.

        A state in a queue may be newer than pushed states that have not been received yet. If those
        came after it, a task would seem to go backwards.
        """
        if self._link is None:
            return super()._read(ids, deadline)
        if self._layout.closed:
            raise errors.BackendUnavailable("the result backend was closed while waiting")
        found = self._layout.read(list(ids), settle=False, deadline=deadline)
        # The answer to this comes after all states pushed before.
        self._channel.queue_declare(self._queue, passive=True)
        arrived, self._arrived = self._arrived, []
        states: List[StateMessage] = []
        for task_id, state in found.items():
            pushed = [each for each in arrived if each.id == task_id]
            if state is not None:
                keys = [_key(each) for each in pushed]
                if _key(state) in keys:
                    # Pushed states up to this one are older.
                    newer = len(keys) - keys[::-1].index(_key(state))
                    pushed = pushed[newer:]
                states.append(state)
            states += map(self._layout.received_again, pushed)
        self._arrived = [each for each in arrived if each.id not in found]
        return self._news(states)

    def _probe(self, link: Link, deadline: Optional[float]) -> List[Update]:
        """Read the non-empty queues among tasks without pushed states."""
        begun = time.monotonic()
        filled = []
        for _ in range(min(PROBES, len(self._unpushed))):
            task_id = self._unpushed.popleft()
            if task_id in self._covered:
                self._unpushed.append(task_id)
                if self._has_messages(link, task_id):
                    filled.append(task_id)
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
            found = self._probing.queue_declare(self._layout.rkey(task_id), passive=True)
        except amqp_errors.NotFound:
            return False
        return bool(found.message_count)

    def _drop(self) -> None:
        link, self._link, self._channel, self._probing = self._link, None, None, None
        self._unpushed.clear()
        self._covered.clear()
        self._stale = 0
        if link is not None:
            link.drop()

    def _cover(self, deadline: Optional[float]) -> List[Update]:
        """Bind the tasks without a binding, and read them once more."""
        new = [task_id for task_id in self.pending if task_id not in self._covered]
        if not new:
            return []
        if self._link is None:
            self._open(deadline)
        for task_id in new:
            self._channel.queue_bind(self._queue, self._layout.exchange, self._layout.rkey(task_id))
            self._covered.add(task_id)
        self._unpushed.extend(new)
        self._waiting_since = time.monotonic()
        return self._read(new, deadline)

    def _open(self, deadline: Optional[float]) -> None:
        link = self._layout.connector.open(HEARTBEAT, deadline)
        try:
            channel = link.amqp.channel(1)
            self._layout.declare_exchange(_Channel(channel))
            self._queue = channel.queue_declare("", exclusive=True, auto_delete=True).queue
            channel.basic_qos(0, 0, False)
            channel.basic_consume(self._queue, no_ack=True, callback=self._on_message)
        except BaseException:
            link.drop()
            raise
        self._link, self._channel = link, channel

    def _on_message(self, raw: Any) -> None:
        message: kombu.Message = self._channel.message_to_python(raw)
        try:
            self._arrived.append(self._layout.state_of(message))
        except (ContentDisallowed, errors.ForeignMessage) as exc:
            # An error here is raised to the waiting caller, and not while the connection is being
            # read.
            key = message.delivery_info.get("routing_key")
            for task_id in self.pending:
                if self._layout.rkey(task_id) == key:
                    self._failures_of[task_id] = exc

    def _receive(self, link: Link, until: float) -> List[Update]:
        """Wait for pushes until *until*, or until other work is due."""
        if not self._arrived and not self._failures_of:
            link.tick()
            probe_at = self._probe_at if self._unpushed else until
            link.wait(min(until, self._recheck_at, probe_at), self._wake_up)
        while not self._failures_of and link.readable():
            link.drain(0.001)
        if self._layout.closed:
            raise errors.BackendUnavailable("the result backend was closed while waiting")
        if self._failures_of:
            _, failure = self._failures_of.popitem()
            raise failure
        arrived, self._arrived = self._arrived, []
        pushed = {state.id for state in arrived}
        if not pushed.isdisjoint(self._unpushed):
            # Its writer publishes to the exchange, and so will later states.
            self._unpushed = collections.deque(i for i in self._unpushed if i not in pushed)
        return self._news(arrived)


class _Channel(transports.Session):
    """A session of one channel."""

    def __init__(self, channel: Any) -> None:
        self._open = channel

    @property
    def channel(self) -> Any:
        return self._open
