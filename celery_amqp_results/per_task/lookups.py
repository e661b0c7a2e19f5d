"""Reading the state of a task without taking it away from its queue.

A message can only be read by taking it out of its queue. Celery 4 took it with ``basic.get`` and
put it back. A second reader in between saw no message and reported PENDING. Here:

- A reader puts a message back at once, before it decodes anything, if it is the only one in the
  queue. The queue then looks empty for about one round trip.
- A reader that finds a queue that *exists* but holds nothing looks again, in short pauses of random
  length, for :data:`EMPTY_SECONDS`, before it reports PENDING. This is rare, since a queue is only
  declared to publish to it. Either another reader holds the message at the moment, or a process of
  Celery 4 has asked for, or waits for, a task without a stored result. The broker does not
  distinguish these cases: it counts the ready messages and the consumers of a queue, and a quorum
  queue counts readers as consumers. After finding a queue empty for that time, a process looks only
  briefly the next time. Usually a missing queue says that nothing is known of a task; polling
  therefore declares nothing.
- The threads of one process read one queue one after the other.
- Readers never consume: the queue of Celery 4 is deleted with its last consumer, and the result in
  it. A Celery 4 process that waits does consume, and so takes the result away.

The broker puts back the message of a reader that dies. A reader that is stopped while it holds a
message keeps it until its heartbeats are missed (ten seconds or so). Until then others can report
PENDING, as the queue tells them nothing more.

**Quorum queues** (the broker's default type, where ``auto_delete`` is off) count how often a
message was put back, and drop it at a limit, which is 20 since RabbitMQ 4.0. They show the count to
the reader. A reader that sees a count publishes a copy, waits for the confirm, and acknowledges the
original, which resets the count. A reader in between sees the state twice, and one that dies there
leaves it twice; the next reader merges the two.

**State history** is compacted: a reader acknowledges every state that a later one supersedes, and
puts back one. Messages of Celery 4 carry no time, so the order in the queue is the order of the
states.
"""

from __future__ import annotations

import random
import threading
import time
from typing import Callable, Collection, Dict, List, NamedTuple, Optional

import kombu
from kombu.exceptions import ContentDisallowed

from celery_amqp_results import errors
from celery_amqp_results.amqp import transports
from celery_amqp_results.per_task.queues import TaskQueues
from celery_amqp_results.per_task.wire import Messages, NoCacheQueue, returns_of
from celery_amqp_results.protocol.message import STATE, StateMessage
from celery_amqp_results.protocol.ranking import is_final, supersedes
from celery_amqp_results.toolkit import retry
from celery_amqp_results.toolkit.bounded import BoundedDict

__all__ = ("BACKLOG_LIMIT", "LookUps")

#: A queue may hold this many states; with more, the read fails.
BACKLOG_LIMIT = 1000

#: How long a queue that exists but looks empty is looked at again, in seconds. If this is too
#: short, a finished task seems to be pending: eight processes that did nothing but read one result,
#: on two busy cores, found it within 0.44 s, so this leaves more than four times the worst case
#: seen. If it is too long, the answer for a pending task comes late: a process waits this long at
#: its first look at a task whose queue Celery 4 has declared and that has no stored result.
EMPTY_SECONDS = 2.0
#: The same, if the queue was found to be empty before.
STILL_EMPTY_SECONDS = 0.05
#: The same on a transport that cannot tell whether a queue exists: there every look at a pending
#: task takes this long.
UNKNOWN_SECONDS = 0.1
#: The longest pause between two looks, in seconds.
EMPTY_PAUSE = 0.005
#: The number of queues that are remembered as empty.
MAX_EMPTY = 10_000

#: A quorum queue's return count at which a final state is published anew.
MAX_RETURNS_FINAL = 1
#: The same for a state that is not final. The copy goes to the end of the queue, possibly behind a
#: newer state that is not final either, so this is done rarely.
MAX_RETURNS = 10

#: Errors about the content of a message, and of a queue.
_UNREADABLE = (ContentDisallowed, errors.ForeignMessage)
_FINDINGS = (*_UNREADABLE, errors.BacklogLimitExceeded)


class _Wanted(NamedTuple):
    """The task or group to look up."""

    task_id: str
    kind: str
    #: How many states may be skipped.
    limit: int

    def is_met_by(self, state: StateMessage) -> bool:
        """Return whether *state* is of the task, since two ids can differ in dashes only."""
        return state.id == self.task_id and state.kind == self.kind


class LookUps:
    """Reads the states of tasks from their queues. Thread-safe."""

    def __init__(self, queues: TaskQueues, messages: Messages) -> None:
        self.queues = queues
        self.messages = messages
        self.limit = BACKLOG_LIMIT
        self._lock = threading.Lock()
        #: Queues that exist but stayed empty as long as the process looked.
        self._empty: BoundedDict[str, bool] = BoundedDict(MAX_EMPTY)

    def read(
        self,
        ids: Collection[str],
        kind: str = STATE,
        limit: Optional[int] = None,
        deadline: Optional[float] = None,
    ) -> Dict[str, Optional[StateMessage]]:
        """Return the current state of each of *ids*, or ``None`` where nothing is known.

        Looks again where a queue exists but is empty.

        Parameters:
            kind: that of tasks or of groups.
            limit: how many states of one task may be skipped, :attr:`limit` by default.
            deadline: time (``time.monotonic``) after which connecting is given up, and an empty
                queue is not looked at again.

        Raises:
            BacklogLimitExceeded: when a queue holds more states. The states already read are
                skipped, so that a retry gets further.
            LookupTimeout: when another thread reads a queue for too long.
            BackendUnavailable: when the broker cannot be reached or refuses us.
            kombu.exceptions.ContentDisallowed: when a state is of a content type that is not
                accepted. It stays in its queue.
            ForeignMessage: when a queue holds a message that is damaged, or not a state. It stays
                in its queue.
        """

        def read(session: transports.Session, task_id: str) -> Optional[StateMessage]:
            most = self.limit if limit is None else limit
            return self._read_patiently(session, _Wanted(task_id, kind, most), deadline)

        return self._each(ids, read, deadline)

    def glance(
        self, ids: Collection[str], deadline: Optional[float]
    ) -> Dict[str, Optional[StateMessage]]:
        """Return the states that one look finds: for a caller that looks again anyway."""

        def read(session: transports.Session, task_id: str) -> Optional[StateMessage]:
            try:
                return self._look(session, _Wanted(task_id, STATE, self.limit)).read()
            except self.queues.missing:
                return None

        return self._each(ids, read, deadline)

    def _each(
        self,
        ids: Collection[str],
        read: Callable[[transports.Session, str], Optional[StateMessage]],
        deadline: Optional[float],
    ) -> Dict[str, Optional[StateMessage]]:
        found: Dict[str, Optional[StateMessage]] = {}

        def read_missing(session: transports.Session) -> Optional[Exception]:
            for task_id in ids:
                if task_id in found:
                    continue
                try:
                    name = self.queues.wire.rkey(task_id)
                    with self.queues.hold(name):
                        state = found[task_id] = read(session, task_id)
                    if state is not None:
                        with self._lock:
                            self._empty.pop(name, None)
                except _FINDINGS as exc:
                    # The error is not about the connection.
                    return exc
            return None

        finding = self.queues.run(f"{len(ids)} results cannot be read", read_missing, deadline)
        if finding is not None:
            raise finding
        return found

    def _look(self, session: transports.Session, wanted: _Wanted) -> _Look:
        queue = NoCacheQueue(self.queues.wire.rkey(wanted.task_id))(session.channel)
        if self.queues.sessions.local:
            # In memory:// a basic.get from a missing queue would create it.
            queue.queue_declare(passive=True)
        return _Look(self, session, queue, wanted)

    def _read_patiently(
        self, session: transports.Session, wanted: _Wanted, deadline: Optional[float]
    ) -> Optional[StateMessage]:
        name = self.queues.wire.rkey(wanted.task_id)
        until = time.monotonic() + retry.time_left(deadline, self._patience(name))
        while True:
            try:
                look = self._look(session, wanted)
                state = look.read()
            except self.queues.missing:
                return None
            if state is not None:
                return state
            if time.monotonic() >= until:
                with self._lock:
                    self._empty[name] = True
                return None
            if look.others:
                return None
            time.sleep(random.uniform(0.0, EMPTY_PAUSE))

    def _patience(self, name: str) -> float:
        """Return the seconds for which the queue *name* may look empty."""
        if self.queues.sessions.local:
            return 0.0
        if name in self._empty:
            return STILL_EMPTY_SECONDS
        return EMPTY_SECONDS if self.queues.sessions.amqp else UNKNOWN_SECONDS


class _Look:
    """One look into a queue."""

    def __init__(
        self, lookups: LookUps, session: transports.Session, queue: kombu.Queue, wanted: _Wanted
    ) -> None:
        self._queues = lookups.queues
        self._messages = lookups.messages
        self._session = session
        self._queue = queue
        self._wanted = wanted
        #: Messages that are about other ids, or unreadable.
        self.others: List[kombu.Message] = []
        #: The current state, and its message.
        self._current: Optional[StateMessage] = None
        self._held: Optional[kombu.Message] = None

    def read(self) -> Optional[StateMessage]:
        """Take all states, put back the current one, and return it."""
        message = self._queue.get(no_ack=False)
        if message is None:
            return None
        if message.delivery_info.get("message_count") == 0 and not returns_of(message):
            return self._read_single(message)
        return self._compact(message)

    def _read_single(self, message: kombu.Message) -> Optional[StateMessage]:
        # Alone in its queue: other readers need not wait for the decoding.
        message.requeue()
        state = self._state_of(message)
        if self._wanted.is_met_by(state):
            return state
        self.others.append(message)
        return None

    def _compact(self, message: kombu.Message) -> Optional[StateMessage]:
        damage: Optional[Exception] = None
        limit, count = self._wanted.limit, 0
        try:
            while message is not None:
                self.others.append(message)
                try:
                    state = self._state_of(message)
                except _UNREADABLE as exc:
                    # It stays in the queue, and must not hide a good one behind it.
                    damage = exc
                    if len(self.others) > limit:
                        break
                else:
                    if self._wanted.is_met_by(state):
                        self._acknowledge_older(self.others.pop(), state)
                        count += 1
                    # On transports that put back at the end, the current state must be last.
                    if count > limit and self._queues.sessions.amqp:
                        break
                message = self._queue.get(no_ack=False)
        finally:
            self._put_back()
        if count > limit:
            raise errors.BacklogLimitExceeded(
                f"more than {limit} states of {self._wanted.task_id} are to be fast-forwarded; "
                "asking again goes on with the rest"
            )
        if damage is not None and (self._current is None or not is_final(self._current.state)):
            # It may be the final state, and the task would seem to run for ever.
            raise damage
        return self._current

    def _acknowledge_older(self, message: kombu.Message, state: StateMessage) -> None:
        """Keep the current one of *state* and the state so far, and acknowledge the other."""
        older: Optional[kombu.Message] = message
        if self._current is None or supersedes(state, self._current):
            older, self._held, self._current = self._held, message, state
        if older is not None:
            older.ack()

    def _put_back(self) -> None:
        for other in self.others:
            other.requeue()
        if self._held is None or self._current is None:
            return
        most = MAX_RETURNS_FINAL if is_final(self._current.state) else MAX_RETURNS
        if self._queues.sessions.amqp and returns_of(self._held) >= most:
            # A quorum queue, which drops messages that are put back too often.
            self._queues.replace(self._session, self._queue.name, self._held)
        else:
            self._held.requeue()

    def _state_of(self, message: kombu.Message) -> StateMessage:
        try:
            return self._messages.state_of(message)
        except _UNREADABLE as exc:
            self._queues.note_damage(self._queue.name, exc)
            raise
