"""The layout ``per-task``: one queue for each task, declared and written exactly as Celery 4 did.

So Celery 4 and 5 can share a broker while a fleet moves from one to the other, and results can be
kept on every transport of kombu. ``docs/wire.md`` describes all declarations and messages; only the
way of reading differs from Celery 4.

**Reading without taking away.** A message can only be read by taking it out of its queue. Celery 4
took it with ``basic.get`` and put it back. A second reader in between saw no message and reported
PENDING. Here:

- A reader puts a message back at once, before it decodes anything, if it is the only one in the
  queue. The queue then looks empty for about one round trip.
- A reader that finds a queue that *exists* but holds nothing looks again, in short pauses of random
  length, for :data:`SETTLE_SECONDS`, before it reports PENDING. This is rare, since a queue is only
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

**Transient results** (``result_persistent = False``) made Celery 4 declare a transient queue.
RabbitMQ has deprecated these, and refuses them where they are not permitted: the queue is then
durable, and only the messages are transient. A broker that permits them gets Celery 4's
declarations, since the two must agree on the queue. An existing queue that differs, by another
``result_expires`` or another ``result_persistent``, is used as it is.

The guarantees on other transports depend on the transport. ``memory://`` is exact:
all its users are in the process. With others, such as ``filesystem://``, a process that is killed
while it holds a message loses it, unless the transport restores it; and nothing expires. kombu
writes its files in more than one step, and names those of one millisecond in no order: a reader in
another process can meet half a message, and two states stored at once can change places.

With ``result_serializer = "pickle"`` the bytes are those of kombu's pickle protocol, which was 2 in
Celery 4 and is 4 now: Python 2 cannot read the latter (kombu reads ``PICKLE_PROTOCOL`` from the
environment).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import logging
import os
import random
import threading
import time
from typing import (
    Any,
    Callable,
    Collection,
    Dict,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Set,
    Tuple,
    Type,
    TypeVar,
)

import kombu
from amqp import exceptions as amqp_errors
from kombu.exceptions import ContentDisallowed
from kombu.transport.virtual.base import NotEquivalentError

from celery_amqp_results import errors, options
from celery_amqp_results.amqp import connections, transports
from celery_amqp_results.amqp.failures import is_refusal
from celery_amqp_results.chords.sending import Chords
from celery_amqp_results.metrics import Metrics
from celery_amqp_results.per_task.following import PollingFollower, PushFollower
from celery_amqp_results.protocol.codec import Codec
from celery_amqp_results.protocol.ids import state_name
from celery_amqp_results.protocol.message import GROUP, STATE, StateMessage
from celery_amqp_results.protocol.names import Route
from celery_amqp_results.protocol.ranking import is_final, supersedes
from celery_amqp_results.toolkit import retry
from celery_amqp_results.waiting.following import Following
from celery_amqp_results.waiting.watch import Tap

__all__ = ("BACKLOG_LIMIT", "NoCacheQueue", "PerTaskLayout", "Wire")

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

#: Seconds between heartbeats: a stopped process that holds a message loses it to the others after
#: two to three times that.
HEARTBEAT = 5.0

#: A queue may hold this many states; with more, the read fails.
BACKLOG_LIMIT = 1000

#: How long a queue that exists but looks empty is looked at again, in seconds. If this is too
#: short, a finished task seems to be pending: eight processes that did nothing but read one result,
#: on two busy cores, found it within 0.44 s, so this leaves more than four times the worst case
#: seen. If it is too long, the answer for a pending task comes late: a process waits this long at
#: its first look at a task whose queue Celery 4 has declared and that has no stored result.
SETTLE_SECONDS = 2.0
#: The same, if the queue was found to be empty before.
AGAIN_SETTLE_SECONDS = 0.05
#: The number of warnings that are remembered, to log each only once.
MAX_TOLD = 100
#: The number of queues that are remembered as empty.
MAX_EMPTY = 10_000
#: The same on a transport that cannot tell whether a queue exists: there every look at a pending
#: task takes this long.
BLIND_SETTLE_SECONDS = 0.1
#: The longest pause between two looks, in seconds.
SETTLE_PAUSE = 0.005

#: The fields of a result's meta that are written, and those that ``result_extended`` adds.
FIELDS = ("task_id", "status", "result", "traceback", "children")
EXTENDED_FIELDS = ("name", "args", "kwargs", "worker", "retries", "queue")
#: The same of a saved group, which Celery 4 could not save.
GROUP_FIELDS = ("status", "result", "group_id")

#: The state in the meta of a saved group.
GROUP_STATE = "GROUP"

#: A quorum queue's return count at which a final state is published anew.
MAX_RETURNS_FINAL = 1
#: The same for a state that is not final. The copy goes to the end of the queue, possibly behind a
#: newer state that is not final either, so this is done rarely.
MAX_RETURNS = 10

#: Headers with which quorum queues count; a copy starts without.
COUNT_HEADERS = ("x-delivery-count", "x-acquired-count")


class NoCacheQueue(kombu.Queue):
    """A queue that is declared at every use: it may have expired, or gone with its consumer."""

    can_cache_declaration = False


@dataclasses.dataclass(frozen=True)
class Wire:
    """Celery 4's declarations and messages, as they follow from the settings."""

    #: The setting ``result_exchange``.
    exchange: str = "celeryresults"
    #: The setting ``result_exchange_type``.
    exchange_type: str = "direct"
    #: Whether exchange, queues and messages survive a restart of the broker.
    persistent: bool = True
    #: Whether a queue is deleted with its last consumer.
    auto_delete: bool = True
    #: Seconds without use after which the broker deletes a queue, or ``None``.
    expires: Optional[float] = None
    #: The setting ``result_extended``.
    extended: bool = False

    @property
    def delivery_mode(self) -> int:
        """2 for messages that survive a restart, otherwise 1."""
        return 2 if self.persistent else 1

    @staticmethod
    def rkey(task_id: str) -> str:
        """Return the name of the queue of *task_id*, which is its routing key as well."""
        return task_id.replace("-", "")

    def exchange_entity(self) -> kombu.Exchange:
        """Return the exchange, not bound to a channel."""
        return kombu.Exchange(
            self.exchange,
            self.exchange_type,
            durable=self.persistent,
            auto_delete=False,
            delivery_mode=self.delivery_mode,
        )

    def queue_entity(self, task_id: str, **changes: Any) -> NoCacheQueue:
        """Return the queue of *task_id*, not bound to a channel.

        Parameters:
            **changes: arguments of ``kombu.Queue`` to override.
        """
        name = self.rkey(task_id)
        arguments: Dict[str, Any] = {
            "durable": self.persistent,
            "auto_delete": self.auto_delete,
            "expires": self.expires or None,
            **changes,
        }
        return NoCacheQueue(name, self.exchange_entity(), name, **arguments)

    def shape(self, result_meta: Mapping[str, Any]) -> Dict[str, Any]:
        """Return the written fields of *result_meta*, in Celery 4's order."""
        if result_meta.get("status") == GROUP_STATE and "group_id" in result_meta:
            fields: Tuple[str, ...] = GROUP_FIELDS
        elif self.extended:
            fields = FIELDS + EXTENDED_FIELDS
        else:
            fields = FIELDS
        return {name: result_meta.get(name) for name in fields}


class _Locks:
    """A lock for each name in use."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all locks: after a fork, their holders are not in this process."""
        self._guard = threading.Lock()
        self._entries: Dict[str, List[Any]] = {}

    @contextlib.contextmanager
    def hold(self, name: str, timeout: float) -> Iterator[None]:
        """Hold the lock *name*.

        Raises:
            LookupTimeout: when it is not free within *timeout* seconds.
        """
        with self._guard:
            entry = self._entries.setdefault(name, [threading.Lock(), 0])
            entry[1] += 1
        try:
            if not entry[0].acquire(timeout=max(0.0, timeout)):
                raise errors.LookupTimeout(
                    f"the result queue {name} is being read by another thread for more than "
                    f"{timeout:g} seconds"
                )
            try:
                yield
            finally:
                entry[0].release()
        finally:
            with self._guard:
                entry[1] -= 1
                if not entry[1]:
                    self._entries.pop(name, None)


#: By queue name. Per process, since two apps in it may read the same queue, for example a test and
#: the worker that it runs in a thread.
_locks = _Locks()
os.register_at_fork(after_in_child=_locks.reset)


#: Errors about the content of a queue.
_FINDINGS = (ContentDisallowed, errors.BacklogLimitExceeded, errors.ForeignMessage)


class _TransientQueueRefused(Exception):
    """Raised when the broker does not permit transient queues; it has closed the connection."""


class PerTaskLayout:
    """Keeps each result in a queue of its own.

    Parameters:
        sessions: channels to the broker.
        connector: opens the connections of waiting clients, where the broker speaks AMQP.
        wire: the declarations and messages.
        codec: decodes metas.
        settings: the backend's options.
        backlog_limit: how many states of one task may be skipped.

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
        backlog_limit: int = BACKLOG_LIMIT,
    ) -> None:
        self.sessions = sessions
        self.connector = connector
        self.wire = wire
        self.backlog_limit = backlog_limit
        self.closed = False
        self._codec = codec
        self._settings = settings
        self._pid = os.getpid()
        # Messages carry no time, so the order in which they are received is used instead.
        self._received = itertools.count(1)
        self._exchange_declared = False
        self._transient_queues = not wire.persistent
        self._told: Set[str] = set()
        #: Damaged or foreign messages, counted at each encounter.
        self.rejected = 0
        self._guard = threading.Lock()
        self._followers: Set[PushFollower] = set()
        self._stored = 0
        self._published_bytes = 0
        #: Queues that exist but stayed empty as long as the process looked.
        self._empty: collections.OrderedDict[str, None] = collections.OrderedDict()

    @property
    def exchange(self) -> str:
        """Name of the exchange that states are published to."""
        return self.wire.exchange

    def rkey(self, task_id: str) -> str:
        """Return the name of the queue of a task, which is its routing key as well."""
        return self.wire.rkey(task_id)

    # -- writing -------------------------------------------------------------------------------

    def shape(self, result_meta: Mapping[str, Any]) -> Dict[str, Any]:
        """Return the fields of a meta that are written."""
        return self.wire.shape(result_meta)

    def note_sent(self, task_id: str) -> None:
        """Do nothing: the process that stores a state declares the queue."""

    def mark_sent(self, connection: Any, sent: StateMessage) -> None:
        """Do nothing: a task's queue has no place for marks."""

    def mark(self, marks: Sequence[StateMessage], confirm: bool) -> None:
        """Do nothing, as :meth:`mark_sent`."""

    def last_mark(self, task_id: str) -> Optional[StateMessage]:
        """Return ``None``."""
        return None

    def kept(self, task_id: str) -> Optional[StateMessage]:
        """Return the state that the broker keeps of a task, regardless of pushed states."""
        return self.poll((task_id,))[task_id]

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
        self._put(state)
        with self._guard:
            self._stored += 1
            self._published_bytes += len(state.body)

    def metrics(self) -> Metrics:
        """Return the counts so far. Does no I/O; this counts less than the layout ``shared``."""
        with self._guard:
            return Metrics(
                stored=self._stored,
                confirmed=self._stored,
                published_bytes=self._published_bytes,
                waiting=len({task_id for f in self._followers for task_id in list(f.pending)}),
            )

    def save_group(self, group: StateMessage) -> None:
        """Keep a group, in a queue that is named like a task's."""
        self._put(group)

    def _put(self, state: StateMessage) -> None:
        name = self.wire.rkey(state.id)

        def put(session: transports.Session) -> None:
            queue = self._declare(session, state.id)
            self._publish(
                session,
                queue,
                state.body,
                exchange=self.wire.exchange,
                routing_key=name,
                content_type=state.content_type,
                content_encoding=state.content_encoding,
                delivery_mode=self.wire.delivery_mode,
                correlation_id=state.id,
            )

        # On other transports a message that is put back goes to the end of its queue, and must not
        # end up behind a newer one.
        order = contextlib.nullcontext() if self.sessions.amqp else self._hold(name)
        with order:
            self._run(f"the {state.state} of {state.id} cannot be stored", put)
        if self.sessions.local:
            PollingFollower.wake_all()

    def _publish(
        self,
        session: transports.Session,
        queue: kombu.Queue,
        body: bytes,
        exchange: str,
        **properties: Any,
    ) -> bool:
        """Publish and wait for the confirm; return whether a queue took it."""
        channel = session.channel
        producer = kombu.Producer(channel, auto_declare=False)
        if not self.sessions.amqp:
            producer.publish(body, exchange=exchange, **properties)
            return True
        returned: List[str] = []
        channel.events["basic_return"] = {lambda exc, *_: returned.append(str(exc))}
        if self._settings.confirm:
            channel.basic_publish = channel.basic_publish_confirm
        try:
            # Mandatory: the queue may go with a consumer of Celery 4 that ends after our
            # declaration.
            producer.publish(body, exchange=exchange, mandatory=True, **properties)
        except amqp_errors.PreconditionFailed as exc:
            raise errors.ResultTooLarge(
                f"the broker refuses a message of {len(body)} bytes for the queue {queue.name}: "
                f"{exc}. Its limit is the setting max_message_size."
            ) from exc
        except amqp_errors.MessageNacked as exc:
            raise errors.NotConfirmed(
                f"the broker did not take a message for the queue {queue.name}"
            ) from exc
        if returned and exchange:
            raise amqp_errors.RecoverableChannelError(f"no queue took the message: {returned[0]}")
        return not returned

    # -- declaring -----------------------------------------------------------------------------

    def queue(self, task_id: str) -> NoCacheQueue:
        """Return the queue of *task_id* as it is declared on this broker."""
        if self._transient_queues or self.wire.persistent:
            return self.wire.queue_entity(task_id)
        return self.wire.queue_entity(task_id, durable=True)

    def _declare(self, session: transports.Session, task_id: str) -> NoCacheQueue:
        self.declare_exchange(session)
        queue = self.queue(task_id)
        try:
            queue(session.channel).queue_declare()
        except amqp_errors.PreconditionFailed as exc:
            try:
                queue(session.channel).queue_declare(passive=True)
            except amqp_errors.NotFound:
                raise errors.DeclarationRefused(
                    f"the broker refuses the result queue {queue.name}: {exc}. Check the settings "
                    "result_expires and result_persistent."
                ) from exc
            self._tell_once(
                "queue",
                "result queues exist that differ from the ones wanted here, and are used as they "
                "are; give all apps the same result_expires and result_persistent: %s",
                exc,
            )
        except amqp_errors.InternalError as exc:
            if queue.durable:
                raise
            self._transient_queues = False
            self._tell_once(
                "transient",
                "the broker refuses transient queues: results that need not be kept "
                "(result_persistent = False) are transient messages in durable queues: %s",
                exc,
            )
            raise _TransientQueueRefused from exc
        queue(session.channel).queue_bind()
        return queue

    def declare_exchange(self, session: transports.Session) -> None:
        """Declare the exchange, unless this process has."""
        if self._exchange_declared:
            return
        try:
            self.wire.exchange_entity()(session.channel).declare()
        except (amqp_errors.PreconditionFailed, NotEquivalentError) as exc:
            self._tell_once(
                "exchange",
                "the exchange %r differs from the one wanted here, and is used as it is; give all "
                "apps the same result_exchange_type and result_persistent: %s",
                self.wire.exchange,
                exc,
            )
        self._exchange_declared = True

    def note_damage(self, queue: str, why: Exception) -> None:
        """Count a message that is damaged or not ours; log it unless the same was logged."""
        self.rejected += 1
        text = f"ignored a foreign or damaged message in {queue}: {why}"
        if len(self._told) < MAX_TOLD:
            self._tell_once(text, "%s", text)

    def _tell_once(self, about: str, message: str, *arguments: Any) -> None:
        if about not in self._told:
            self._told.add(about)
            logger.warning(message, *arguments)

    # -- reading -------------------------------------------------------------------------------

    def poll(
        self, ids: Collection[str], backlog_limit: Optional[int] = None
    ) -> Dict[str, Optional[StateMessage]]:
        """Return the current state of each of *ids*, or ``None`` where nothing is known.

        Parameters:
            ids: the tasks.
            backlog_limit: how many states of one task may be skipped, the layout's own limit by
                default.

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
        return self.read(ids, backlog_limit=backlog_limit)

    def read(
        self,
        ids: Collection[str],
        kind: str = STATE,
        settle: bool = True,
        backlog_limit: Optional[int] = None,
        deadline: Optional[float] = None,
    ) -> Dict[str, Optional[StateMessage]]:
        """Return the current state of each of *ids*, see :meth:`poll`.

        Parameters:
            kind: :data:`~celery_amqp_results.protocol.message.STATE` or
                :data:`~celery_amqp_results.protocol.message.GROUP`.
            settle: whether to look again where a queue exists but is empty. A caller that polls
                repeatedly does not need that.
            deadline: time (``time.monotonic``) after which connecting is given up.
        """
        limit = self.backlog_limit if backlog_limit is None else backlog_limit
        found: Dict[str, Optional[StateMessage]] = {}

        def read(session: transports.Session) -> Optional[Exception]:
            for task_id in ids:
                if task_id in found:
                    continue
                try:
                    with self._hold(self.wire.rkey(task_id)):
                        found[task_id] = self._read_one(session, task_id, kind, settle, limit)
                except _FINDINGS as exc:
                    # The error is not about the connection.
                    return exc
            return None

        finding = self._run(f"{len(ids)} results cannot be read", read, deadline)
        if finding is not None:
            raise finding
        return found

    def _read_one(
        self, session: transports.Session, task_id: str, kind: str, settle: bool, limit: int
    ) -> Optional[StateMessage]:
        queue = NoCacheQueue(self.wire.rkey(task_id))
        seconds = 0.0
        if settle and not self.sessions.local:
            seconds = SETTLE_SECONDS if self.sessions.amqp else BLIND_SETTLE_SECONDS
            if queue.name in self._empty:
                seconds = AGAIN_SETTLE_SECONDS
        until = time.monotonic() + seconds
        while True:
            try:
                if self.sessions.local:
                    # In memory:// a basic.get from a missing queue would create it.
                    queue(session.channel).queue_declare(passive=True)
                reader = _Reader(self, session, queue, task_id, kind, limit)
                state = reader.read()
                if state is not None:
                    self._empty.pop(queue.name, None)
                    return state
                if time.monotonic() >= until:
                    if settle:
                        self._note_empty(queue.name)
                    return None
                if reader.others:
                    return None
            except self._missing():
                return None
            time.sleep(random.uniform(0.0, SETTLE_PAUSE))

    def _note_empty(self, name: str) -> None:
        with self._guard:
            self._empty[name] = None
            if len(self._empty) > MAX_EMPTY:
                self._empty.popitem(last=False)

    def _missing(self) -> Tuple[Type[Exception], ...]:
        if self.sessions.amqp:
            return (amqp_errors.NotFound,)
        return (amqp_errors.ChannelError,)

    def received_again(self, state: StateMessage) -> StateMessage:
        """Return *state* as received now: all states read meanwhile are older."""
        return dataclasses.replace(state, published=next(self._received))

    def state_of(self, message: kombu.Message) -> StateMessage:
        """Return the state that *message* holds, decoded.

        Raises:
            kombu.exceptions.ContentDisallowed: when its content type is not accepted.
            ForeignMessage: when it is damaged, or not a state.
        """
        body = message.body
        bare = StateMessage(
            # Unknown before decoding.
            "",
            "message",
            next(self._received),
            body.encode("utf-8", "surrogatepass") if isinstance(body, str) else bytes(body or b""),
            message.content_type or "application/data",
            message.content_encoding or "utf-8",
        )
        decoded = self._codec.decode(bare)
        status = state_name(decoded["status"])
        group_id = decoded.get("group_id")
        if status == GROUP_STATE and isinstance(group_id, str):
            return dataclasses.replace(bare, id=group_id, state=status, kind=GROUP, decoded=decoded)
        task_id = decoded.get("task_id")
        if not isinstance(task_id, str):
            raise errors.ForeignMessage(f"a meta without task_id and status: {decoded!r:.200}")
        return dataclasses.replace(bare, id=task_id, state=status, decoded=decoded)

    def put_back(
        self, session: transports.Session, queue_name: str, message: kombu.Message, final: bool
    ) -> None:
        """Put *message* back into its queue so that it can be read any number of times."""
        if not self.sessions.amqp or returns_of(message) < (
            MAX_RETURNS_FINAL if final else MAX_RETURNS
        ):
            message.requeue()
            return
        # A quorum queue, which drops messages that are put back too often.
        properties = {
            name: value
            for name, value in message.properties.items()
            if name not in ("application_headers", "content_type", "content_encoding")
        }
        headers = {k: v for k, v in message.headers.items() if k not in COUNT_HEADERS}
        self._publish(
            session,
            kombu.Queue(queue_name),
            message.body,
            exchange="",
            routing_key=queue_name,
            content_type=message.content_type,
            content_encoding=message.content_encoding,
            headers=headers,
            **properties,
        )
        # If no queue took the copy, the queue is gone, and so is the original.
        message.ack()

    def follower(self, submit: Optional[Callable[..., Any]] = None) -> Following:
        """Return a follower without tasks.

        Parameters:
            submit: not used; the following thread reads queues itself.
        """
        if not self.sessions.amqp:
            return PollingFollower(self)
        follower = PushFollower(self)
        with self._guard:
            self._followers.add(follower)
        return follower

    def tap(self, wanted: Optional[Collection[str]] = None) -> Tap:
        """Raise: this layout publishes states only by the key of their task.

        Raises:
            Unsupported: always.
        """
        raise errors.Unsupported(
            "the layout 'per-task' has no place where the states of all tasks come by; watch given "
            "tasks, or use the layout 'shared' on RabbitMQ"
        )

    def closed_follower(self, follower: PushFollower) -> None:
        """Note that *follower* was closed."""
        with self._guard:
            self._followers.discard(follower)

    def read_group(self, group_id: str) -> Optional[StateMessage]:
        """Return a group that was kept, or ``None``."""
        return self.read((group_id,), kind=GROUP)[group_id]

    # -- deleting ------------------------------------------------------------------------------

    def forget(self, ids: Collection[str]) -> None:
        """Delete the queues of *ids*."""

        def delete(session: transports.Session) -> None:
            for task_id in ids:
                name = self.wire.rkey(task_id)
                with self._hold(name):
                    self._delete(session, name)

        self._run("results cannot be deleted", delete)

    def forget_group(self, group_id: str) -> None:
        """Delete the queue of a group."""
        self.forget((group_id,))

    def _delete(self, session: transports.Session, name: str) -> None:
        if not self.sessions.amqp:
            try:
                session.channel.queue_declare(queue=name, passive=True)
            except self._missing():
                return
            # Deleting deletes only what this process has bound.
            session.channel.queue_purge(name)
        session.channel.queue_delete(queue=name)
        if self.sessions.local:
            # The routing table of the exchange would keep the queue.
            session.channel.queue_unbind(name, self.wire.exchange, name)

    # -- in common -----------------------------------------------------------------------------

    def _hold(self, name: str) -> contextlib.AbstractContextManager[None]:
        return _locks.hold(name, self._settings.lookup_timeout)

    def _run(
        self,
        failure: str,
        operation: Callable[[transports.Session], _T],
        deadline: Optional[float] = None,
    ) -> _T:
        """Run an operation with a channel, and retry as the policy says.

        Raises:
            BackendUnavailable: when the broker cannot be reached, or refuses us.
        """
        tries = retry.Retry(self._settings.retry_policy)
        while True:
            try:
                with self.sessions.session(deadline) as session:
                    return operation(session)
            except _TransientQueueRefused:
                continue
            except (errors.BackendUnavailable, errors.DeclarationRefused):
                raise
            except self.sessions.errors as exc:
                # The broker may have restarted without the exchange.
                self._exchange_declared = False
                if is_refusal(exc) or not retry.wait_before_retry(tries, exc, deadline):
                    raise errors.BackendUnavailable(
                        f"{failure}, after {max(1, tries.failed)} tries at "
                        f"{self.connector.describe()}: {exc!r}"
                    ) from exc

    def flush(self) -> None:
        """Do nothing: every publish waits for its confirm."""

    def close(self, wait: bool = True) -> None:
        """Close all connections; waiting calls raise an error."""
        if self._pid != os.getpid():
            # Forked: the connections are the parent's.
            return
        self.closed = True
        self.sessions.close()
        with self._guard:
            followers = list(self._followers)
        for follower in followers:
            follower.poke()
        PollingFollower.wake_all()


def returns_of(message: kombu.Message) -> int:
    """Return a quorum queue's count of how often *message* was put back."""
    count = message.headers.get(COUNT_HEADERS[0])
    return count if isinstance(count, int) else 0


class _Reader:
    """One look into the queue of one task."""

    def __init__(
        self,
        layout: PerTaskLayout,
        session: transports.Session,
        queue: kombu.Queue,
        task_id: str,
        kind: str,
        limit: int,
    ) -> None:
        self._layout = layout
        self._session = session
        self._queue = queue(session.channel)
        self._task_id = task_id
        self._kind = kind
        self._limit = limit
        #: Messages about other ids: two ids can differ in dashes only.
        self.others: List[kombu.Message] = []

    def read(self) -> Optional[StateMessage]:
        """Take all states, put back the current one, and return it."""
        layout = self._layout
        message = self._queue.get(no_ack=False)
        if message is None:
            return None
        if message.delivery_info.get("message_count") == 0 and not returns_of(message):
            # Alone in its queue: other readers need not wait for the decoding.
            message.requeue()
            try:
                state = layout.state_of(message)
            except (ContentDisallowed, errors.ForeignMessage) as exc:
                layout.note_damage(self._queue.name, exc)
                raise
            if self._is_other(state):
                self.others.append(message)
                return None
            return state
        held: Optional[kombu.Message] = None
        current: Optional[StateMessage] = None
        damage: Optional[Exception] = None
        count = 0
        try:
            while message is not None:
                self.others.append(message)
                found: Optional[StateMessage] = None
                try:
                    found = layout.state_of(message)
                except (ContentDisallowed, errors.ForeignMessage) as exc:
                    # It stays in the queue, and must not hide a good one behind it.
                    layout.note_damage(self._queue.name, exc)
                    damage = exc
                    if len(self.others) > self._limit:
                        break
                if found is not None and not self._is_other(found):
                    self.others.pop()
                    old: Optional[kombu.Message] = message
                    if current is None or supersedes(found, current):
                        old, held, current = held, message, found
                    if old is not None:
                        old.ack()
                    count += 1
                    # On transports that put back at the end, the current state must be last.
                    if count > self._limit and layout.sessions.amqp:
                        break
                message = self._queue.get(no_ack=False)
        finally:
            for kept in self.others:
                kept.requeue()
            if held is not None and current is not None:
                layout.put_back(self._session, self._queue.name, held, is_final(current.state))
        if count > self._limit:
            raise errors.BacklogLimitExceeded(
                f"more than {self._limit} states of {self._task_id} are to be fast-forwarded; "
                "asking again goes on with the rest"
            )
        if damage is not None and (current is None or not is_final(current.state)):
            # It may be the final state, and the task would seem to run for ever.
            raise damage
        return current

    def _is_other(self, state: StateMessage) -> bool:
        return state.id != self._task_id or state.kind != self._kind
