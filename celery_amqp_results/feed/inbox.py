"""The inbox: states pushed to this process, and barriers that prove their completeness.

One thread per process owns one connection with one exclusive queue. It reads the queue, and passes
each state to the clients that wait for it: no socket is read by two threads, and heartbeats are
answered while the program computes. The queue is bound to the process's own *client* word, so that
it receives the states of every task that the process sends, and to the shards that the
:class:`~celery_amqp_results.feed.table.Table` requests. There is never a binding per task.

A *barrier* is an empty message that the process publishes to its own queue, through the exchange
of the states, by a key that only this queue is bound with. A queue delivers in order: when the
barrier comes back, all states confirmed before its publication have come. If the exchange was
deleted, and the bindings with it, the broker returns the barrier or closes its channel. The process
then opens another connection and drops everything it knows.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import selectors
import socket
import threading
import time
from typing import (
    Any,
    Callable,
    Collection,
    Deque,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Set,
    TypeVar,
)

import amqp
from amqp import spec

from celery_amqp_results import errors
from celery_amqp_results.amqp import connections, frames
from celery_amqp_results.amqp.declarations import Declarations
from celery_amqp_results.amqp.failures import TRANSIENT, is_refusal
from celery_amqp_results.feed.barriers import Barrier, Barriers
from celery_amqp_results.feed.table import ALL, Look, Table, Unread
from celery_amqp_results.protocol.message import FORGOTTEN, MARK, STATE, StateMessage, dated
from celery_amqp_results.protocol.names import BROADCAST, OVERFLOW, barrier_key
from celery_amqp_results.protocol.page import Census
from celery_amqp_results.toolkit.bounded import OnceLogger
from celery_amqp_results.toolkit.interrupts import raise_if_from_signal_handler
from celery_amqp_results.toolkit.retry import time_left
from celery_amqp_results.toolkit.threads import start_thread

__all__ = ("BARRIER", "Inbox", "Waiter")

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

#: The property ``type`` of a barrier.
BARRIER = "barrier"
#: Seconds after which a read no longer waits for its barrier.
BARRIER_SECONDS = 1.0
#: Seconds after which a barrier that has not come back is lost for certain. The broker returns none
#: that another queue has received: a queue bound with ``#`` receives all.
LOST_SECONDS = 30.0

#: Seconds between heartbeats: a dead connection is noticed after twice that.
HEARTBEAT = 15.0

#: Seconds after which a read restarts an inbox that has given up.
RESTART = 30.0

#: The largest number of messages in the inbox queue. The reader takes them as they come, so that
#: this is reached only while the process stands still, for as long as its heartbeat allows.
MAX_QUEUED = 1_000_000


class Waiter:
    """A waiter: collects the states of the tasks that it watches.

    The reader thread fills it, and the waiting thread empties it. Any thread may call its methods.

    Parameters:
        wake: called, by any thread, whenever there is something to take; ``None`` where
            :meth:`wait` is used.
    """

    def __init__(self, wake: Optional[Callable[[], None]] = None) -> None:
        self._arrived: Deque[StateMessage] = collections.deque()
        self._event = threading.Event()
        self._wake = wake
        #: Tasks to read from the store, since states may have been missed.
        self._uncovered: Deque[str] = collections.deque()
        self._failure: Optional[Exception] = None

    def poke(self) -> None:
        """Wake the waiting thread."""
        self._event.set()
        if self._wake is not None:
            self._wake()

    def feed(self, state: StateMessage) -> None:
        """Add a state."""
        self._arrived.append(state)
        self.poke()

    def uncover(self, ids: Iterable[str]) -> None:
        """Report that states of *ids* may have been missed."""
        self._uncovered.extend(ids)
        self.poke()

    def fail(self, failure: Exception) -> None:
        """Report that no more states will come."""
        self._failure = failure
        self.poke()

    def wait(self, timeout: float) -> bool:
        """Wait until there is something to take; return whether there is."""
        return self._event.wait(timeout)

    def take(self) -> List[StateMessage]:
        """Return the states that have come since the last call.

        Raises:
            Exception: the argument of :meth:`fail`.
        """
        self._event.clear()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return list(_popped(self._arrived))

    def take_uncovered(self) -> Set[str]:
        """Return the tasks to read from the store, each once."""
        return set(_popped(self._uncovered))


def _popped(queue: Deque[_T]) -> Iterator[_T]:
    # Other threads append meanwhile, so a length taken before would be wrong.
    with contextlib.suppress(IndexError):
        while True:
            yield queue.popleft()


class Inbox:
    """Receives the states of tasks, and keeps the knowledge about them in a table.

    Parameters:
        connector: opens the connection.
        declarations: provides the names, and declares the exchange.
        client: the word of this process in routing keys.
        limit: bytes of memory for the table.

    Thread-safe. Nothing is opened until the first :meth:`cover`, or until reads are so frequent
    that an inbox pays. After a fork the child must make a new inbox and never use this one again.
    """

    def __init__(
        self,
        connector: connections.Connector,
        declarations: Declarations,
        client: str,
        limit: int,
    ) -> None:
        self._connector = connector
        self._declarations = declarations
        self._client = client
        # Guards everything below. No I/O is done while holding it.
        self._changed = threading.Condition(threading.RLock())
        self._thread: Optional[threading.Thread] = None
        #: Logs repeated connection failures once.
        self._once = OnceLogger(logger)
        self._closing = False
        #: Why and when the reader thread gave up, until it is started again.
        self._failure: Optional[Exception] = None
        self._failed_at = 0.0
        self._waiters: Dict[str, List[Waiter]] = {}
        #: Those sent by other processes.
        self._strangers: Set[str] = set()
        self._table = Table(declarations.topology, limit)
        self._barriers = Barriers()
        self._session: Optional[_Session] = None
        #: Why the present connection must be replaced, or empty.
        self._suspicion = ""
        #: States received, and messages that were not states.
        self.received = 0
        self.rejected = 0
        #: Barriers that came back.
        self.barriers = 0
        #: When the latest of the states was published, in microseconds since 1970.
        self.latest = 0

    @property
    def waited_for(self) -> int:
        """The number of tasks that clients wait for."""
        return len(self._waiters)

    @property
    def connections(self) -> int:
        """How many connections were opened, one after the other."""
        return self._table.connections

    def is_own(self, task_id: str) -> bool:
        """Whether this process has sent the task."""
        with self._changed:
            return self._table.is_own(task_id)

    @property
    def memory(self) -> int:
        """About how many bytes the table takes."""
        return self._table.memory

    @property
    def live_views(self) -> int:
        """How many shards are known completely."""
        with self._changed:
            return self._table.live_views

    # -- clients ---------------------------------------------------------------------------

    def note_sent(self, task_id: str) -> None:
        """Note that this process is about to send a task. Does no I/O."""
        with self._changed:
            self._table.sent(task_id, time.monotonic())

    def note_stored(self, state: StateMessage) -> None:
        """Note a state that this process has published: it does not wait for its own push."""
        with self._changed:
            self._table.pushed(state, time.monotonic(), own=True)

    def watch(self, ids: Collection[str], waiter: Waiter) -> Set[str]:
        """Hand the states of *ids* to *waiter* from now on.

        The known state of an own task is added at once. The waiter learns which tasks it has to
        look up.

        Returns:
            The tasks whose states are already pushed.
        """
        now, wall = time.monotonic(), _wall()
        with self._changed:
            uncovered = []
            pushed = set(ids) - self.unbound(ids) if self._table.epoch else set()
            for task_id in ids:
                self._waiters.setdefault(task_id, []).append(waiter)
                if task_id in self._strangers or not self._table.is_own(task_id):
                    # It remains a stranger's as long as clients wait, even if this process sends it
                    # later.
                    self._strangers.add(task_id)
                    self._table.watched(task_id, 1)
                    uncovered.append(task_id)
                    continue
                try:
                    state = self._table.recall(task_id, now, wall, sure=False)
                except Unread:
                    uncovered.append(task_id)
                    continue
                if state is not None:
                    waiter.feed(state)
            if uncovered:
                waiter.uncover(uncovered)
            return pushed

    def unwatch(self, ids: Iterable[str], waiter: Waiter, consumed: bool = False) -> None:
        """Stop passing the states of *ids* to *waiter*.

        Parameters:
            ids: tasks that it watches.
            waiter: the waiter.
            consumed: whether it has taken their final states, which then need not be kept.
        """
        with self._changed:
            for task_id in ids:
                self._unwait(task_id, waiter)
                if consumed:
                    self._table.discard(task_id)

    def _unwait(self, task_id: str, waiter: Waiter) -> None:
        waiters = self._waiters.get(task_id)
        if waiters is None or waiter not in waiters:
            return
        waiters.remove(waiter)
        if task_id in self._strangers:
            self._table.watched(task_id, -1)
        if not waiters:
            del self._waiters[task_id]
            self._strangers.discard(task_id)

    def unbound(self, ids: Collection[str]) -> Set[str]:
        """Return the strangers' tasks among *ids* whose shards are not bound."""
        with self._changed:
            table, topology = self._table, self._declarations.topology
            return {
                task_id
                for task_id in ids
                if not table.is_own(task_id) and not table.is_bound(topology.shard(task_id))
            }

    def cover(self, ids: Collection[str], deadline: Optional[float]) -> None:
        """Wait until the bindings for the states of *ids* stand.

        Opens the inbox if necessary. Earlier states must then be looked up in the store.

        Parameters:
            ids: tasks of this process or of others.
            deadline: time (``time.monotonic``) at which to give up, or ``None``.

        Raises:
            TimeoutError: when *deadline* is over.
            BackendUnavailable: when the broker cannot be reached or refuses us.
            DeclarationRefused: when the exchange exists with other properties.
        """
        with self._changed:
            self._start()
            while True:
                self._table.cover(ids)
                self._wake_if_restless()
                if not self._table.cover(ids) and self._table.epoch:
                    return
                if self._failure is not None:
                    raise self._failure
                if self._closing:
                    raise errors.BackendUnavailable("the result backend was closed")
                remaining = time_left(deadline, 3600.0)
                if remaining <= 0.0:
                    raise TimeoutError("the inbox was not bound in time")
                self._changed.wait(remaining)

    def covers(self, task_id: str) -> bool:
        """Return whether no state of the task could have been missed."""
        with self._changed:
            try:
                self._table.recall(task_id, time.monotonic(), _wall(), sure=False)
            except Unread:
                return False
            return True

    # -- reads -----------------------------------------------------------------------------

    def ask(self, ids: Collection[str]) -> bool:
        """Count a read of *ids*; return whether a barrier may make a look-up unnecessary.

        Starts the inbox, or requests a binding, where that pays. Does not wait.
        """
        now, wall = time.monotonic(), _wall()
        with self._changed:
            table = self._table
            table.asked(ids, now)
            if table.wants_inbox and not self._is_hopeless(now):
                self._start()
            self._wake_if_restless()
            return bool(table.epoch) and any(
                self._recall(task_id, now, wall) is not _UNREAD for task_id in ids
            )

    def _is_hopeless(self, now: float) -> bool:
        return self._failure is not None and now - self._failed_at < RESTART

    def _recall(self, task_id: str, now: float, wall: int) -> Any:
        if self._table.is_due(task_id, now):
            return _UNREAD
        try:
            return self._table.recall(task_id, now, wall)
        except Unread:
            return _UNREAD

    def barrier(self, deadline: Optional[float]) -> int:
        """Wait until everything has come that was confirmed before this call.

        Parameters:
            deadline: time (``time.monotonic``) at which to give up, or ``None``.

        Returns:
            The number of the connection; 0 if there is none, or the barrier was late.
        """
        with self._changed:
            session, epoch = self._session, self._table.epoch
            if session is None or not epoch or session.blocked:
                return 0
            if self._barriers.overdue:
                if self._barriers.late_for(time.monotonic()) > LOST_SECONDS:
                    self.suspect(f"a barrier has not come back within {LOST_SECONDS:g} s")
                return 0
            barrier, first = self._barriers.join()
        if first:
            self._publish(session, barrier)
        barrier.wait(time_left(deadline, BARRIER_SECONDS))
        with self._changed:
            if not barrier.returned:
                self._barriers.give_up(barrier)
            return epoch if barrier.returned and epoch == self._table.epoch else 0

    def _publish(self, session: _Session, barrier: Barrier) -> None:
        """Publish a barrier. Reads that begin later need another one."""
        try:
            with session.writing:
                with self._changed:
                    number = self._barriers.publish(barrier, time.monotonic())
                session.publish_barrier(number)
        except TRANSIENT as exc:
            raise_if_from_signal_handler(exc)
            # The connection is about to be lost, or part of a frame has been written.
            self.suspect(f"a barrier could not be published: {exc!r}")
        finally:
            with self._changed:
                # After an interrupt, no read may join a barrier that is never published.
                self._barriers.publish(barrier, time.monotonic())

    def recall(self, ids: Iterable[str], epoch: int) -> Dict[str, Optional[StateMessage]]:
        """Return the states of those of *ids* that are known for certain.

        Parameters:
            ids: the tasks.
            epoch: the return value of :meth:`barrier`.
        """
        now, wall = time.monotonic(), _wall()
        with self._changed:
            if not epoch or epoch != self._table.epoch:
                return {}
            found = {task_id: self._recall(task_id, now, wall) for task_id in ids}
        return {task_id: state for task_id, state in found.items() if state is not _UNREAD}

    def uncounted(self) -> List[int]:
        """Return the shards whose census is due, see :meth:`Table.uncounted`."""
        with self._changed:
            return [] if self._closing else self._table.uncounted(time.monotonic())

    def begin(self, ids: Collection[str], shards: Iterable[int] = ()) -> Look:
        """Begin a look-up, see :meth:`Table.begin`."""
        with self._changed:
            return self._table.begin(ids, time.monotonic(), shards)

    def end(
        self,
        look: Look,
        found: Mapping[str, List[StateMessage]],
        censuses: Mapping[int, Census],
    ) -> None:
        """End a look-up, see :meth:`Table.end`."""
        with self._changed:
            self._table.end(look, found, censuses, time.monotonic(), _wall())
            missed, self._table.missed = self._table.missed, ""
            if missed:
                self.suspect(f"{missed} is stored, and was not pushed")

    def forget(self, task_id: str) -> None:
        """Drop the knowledge of a task that is no longer stored."""
        with self._changed:
            self._table.forgotten(task_id, time.monotonic())

    def suspect(self, why: str) -> None:
        """Replace the connection, by one to another host if there are several.

        For an open connection on which an expected message did not come, for example to a node that
        is or was cut off from its cluster. The table then forgets everything.

        Parameters:
            why: the missing message, for the log.
        """
        with self._changed:
            if self._table.epoch:
                self._suspicion = why
                self._wake_reader()

    def close(self, wait: bool = True) -> None:
        """Close the connection and end the thread. Waiting clients get an error.

        Parameters:
            wait: whether to wait until the thread has ended.
        """
        with self._changed:
            self._closing = True
            thread = self._thread
            self._changed.notify_all()
            self._wake_reader()
        if wait and thread is not None and thread is not threading.current_thread():
            thread.join(5.0)

    # -- the reader thread -------------------------------------------------------------------

    def _start(self) -> None:
        if self._thread is None and not self._closing:
            self._failure = None
            self._thread = start_thread(self._run, "inbox")

    def _wake_if_restless(self) -> None:
        if self._table.restless:
            self._wake_reader()

    def _wake_reader(self) -> None:
        if self._session is not None:
            self._session.wake()

    def _run(self) -> None:
        attempt = 0
        opened = False
        while not self._closing:
            session: Optional[_Session] = None
            try:
                session = _Session(self)
                opened = True
                attempt = 0
                self._once = OnceLogger(logger)
                session.read()
            except Exception as exc:
                lost = isinstance(exc, TRANSIENT)
                refused = isinstance(
                    exc, (errors.BackendUnavailable, errors.DeclarationRefused)
                ) or is_refusal(exc)
                self._lose(exc)
                if session is not None:
                    session.drop()
                    self._connector.leave(session.link)
                if self._closing:
                    break
                attempt += 1
                # Before the first success the URL may well be wrong: give up as the policy says.
                # Later the broker was reachable before, and will be back.
                pause = self._connector.policy.pause(attempt)
                limited = self._connector.is_limited(exc)
                if (opened or limited) and pause is None:
                    pause = self._connector.policy.interval_max
                if refused or not lost or pause is None:
                    self._give_up(exc, attempt)
                    return
                self._once.log(
                    logging.DEBUG if limited else logging.WARNING,
                    type(exc).__name__,
                    "the connection that results are pushed on is lost, opening another in "
                    "%.1f s [%d]: %r",
                    pause,
                    attempt,
                    exc,
                )
                with self._changed:
                    if not self._closing:
                        self._changed.wait(pause)
            else:
                session.close()
        self._lose(errors.BackendUnavailable("the result backend was closed"))
        with self._changed:
            self._thread = None
            self._fail_waiters(errors.BackendUnavailable("the result backend was closed"))

    def _lose(self, exc: Exception) -> None:
        """Forget everything: states may be missed until the next connection stands."""
        with self._changed:
            self._table.lost()
            self._barriers.lost()
            self._suspicion = ""
            self._session = None
            for task_id, waiters in self._waiters.items():
                for waiter in waiters:
                    waiter.uncover((task_id,))
            self._changed.notify_all()
        self._declarations.forget()

    def _give_up(self, exc: Exception, attempts: int) -> None:
        if isinstance(exc, (errors.BackendUnavailable, errors.DeclarationRefused)):
            failure: Exception = exc
        elif is_refusal(exc):
            failure = errors.BackendUnavailable(
                f"the broker at {self._connector.describe()} refuses to push results: {exc}. "
                "Check the user's permissions on the exchange "
                f"{self._declarations.topology.exchange!r} and on queues that the broker names "
                "(amq.gen-*)."
            )
            failure.__cause__ = exc
        elif isinstance(exc, TRANSIENT):
            failure = errors.BackendUnavailable(
                f"the broker at {self._connector.describe()} cannot be reached for results to be "
                f"pushed, after {attempts} tries: {exc!r}. Is RabbitMQ running there, and is the "
                "result backend URL right?"
            )
            failure.__cause__ = exc
        else:
            logger.error("the thread that results are pushed to has failed", exc_info=exc)
            failure = exc
        with self._changed:
            self._thread = None
            self._failure = failure
            self._failed_at = time.monotonic()
            self._fail_waiters(failure)
            self._changed.notify_all()

    def _fail_waiters(self, failure: Exception) -> None:
        for waiters in self._waiters.values():
            for waiter in waiters:
                waiter.fail(failure)

    def _opened(self, session: _Session) -> None:
        with self._changed:
            self._table.opened(time.monotonic())
            self._session = session
            self._changed.notify_all()

    def _bound(self, key: int) -> None:
        with self._changed:
            self._table.bound(key, time.monotonic())
            self._changed.notify_all()

    def _receive(self, message: amqp.Message) -> None:
        properties = message.properties
        if properties.get("type") == BARRIER:
            self._on_barrier(str(properties.get("message_id")))
            return
        try:
            state = dated(StateMessage.from_properties(properties, message.body), _wall())
            self._declarations.topology.check_body_queue(state)
        except errors.ForeignMessage as exc:
            self.rejected += 1
            level = logging.WARNING if self.rejected == 1 else logging.DEBUG
            logger.log(level, "ignored a foreign or damaged message in the inbox: %s", exc)
            return
        if state.kind == MARK and state.state == FORGOTTEN:
            self.forget(state.id)
        if state.kind != STATE:
            return
        with self._changed:
            self.received += 1
            self.latest = max(self.latest, state.published)
            self._table.pushed(state, time.monotonic())
            for waiter in self._waiters.get(state.id, ()):
                waiter.feed(state)

    def _on_barrier(self, number: str) -> None:
        with self._changed:
            if self._barriers.take(number):
                self.barriers += 1


def _wall() -> int:
    """Return microseconds since 1970."""
    return time.time_ns() // 1000


_UNREAD: Any = object()


class _Session:
    """One connection of the inbox, with its queue declared, bound and consumed."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        #: Held during every write and read on the connection.
        self.writing = threading.Lock()
        self._refused = False
        self.link = inbox._connector.open_once(HEARTBEAT, purpose="inbox")
        try:
            self._set_up()
        except BaseException:
            self.link.drop()
            inbox._connector.leave(self.link)
            raise

    def _set_up(self) -> None:
        inbox = self._inbox
        declarations = inbox._declarations
        topology = declarations.topology
        self.channel = channel = self.link.channel()
        declarations.ensure_exchange(channel)
        # A message dropped from the full inbox is dead-lettered to this queue of length one: its
        # arrival reports that states were missed.
        overflow = f"{OVERFLOW}.{inbox._client}-{id(self):x}"
        spilled = _declare(channel, {"x-max-length": 1})
        channel.queue_bind(spilled, topology.exchange, overflow)
        self.queue = _declare(
            channel,
            {
                "x-max-length": MAX_QUEUED,
                "x-overflow": "drop-head",
                "x-dead-letter-exchange": topology.exchange,
                "x-dead-letter-routing-key": overflow,
            },
        )
        for client in (inbox._client, BROADCAST):
            channel.queue_bind(self.queue, topology.exchange, topology.client_binding(client))
        self._barrier_key = barrier_key()
        channel.queue_bind(self.queue, topology.exchange, self._barrier_key)
        # Brokers other than RabbitMQ limit consumers by default.
        channel.basic_qos(0, 0, False)
        channel.basic_consume(
            self.queue, no_ack=True, callback=inbox._receive, on_cancel=self._on_cancel
        )
        channel.basic_consume(
            spilled, no_ack=True, callback=self._on_overflow, on_cancel=self._on_cancel
        )
        #: Requested binding keys, in order.
        self._binding: Deque[int] = collections.deque()
        # The answers come in order, and no thread waits for them.
        channel._callbacks[spec.Queue.BindOk] = self._on_bind_ok
        # A broker that refuses barriers closes this channel alone.
        self._barrier_channel = self.link.channel_nowait(self._on_barriers_refused)
        self._barrier_channel.events["basic_return"].add(self._on_barrier_returned)
        # The reader's end is closed with the session, the other end by either thread.
        self._wakeup, self._theirs = socket.socketpair()
        self._wakeup.setblocking(False)
        self._theirs.setblocking(False)
        inbox._opened(self)
        self._bind_and_unbind()

    def wake(self) -> None:
        """Make :meth:`read` carry out the pending requests. May be called by any thread."""
        with contextlib.suppress(OSError):
            self._theirs.send(b"\0")

    def close(self) -> None:
        """Close the connection with the protocol's handshake."""
        self._wakeup.close()
        self._theirs.close()
        self.link.close()

    def drop(self) -> None:
        """Close the socket without a handshake."""
        self._wakeup.close()
        self._theirs.close()
        self.link.drop()

    @property
    def blocked(self) -> bool:
        """Whether barriers do not work: an alarm stops publishers, or the broker refuses them."""
        return self._refused or bool(self.link.blocked)

    def _on_barriers_refused(self, code: int, text: str, class_id: int, method_id: int) -> None:
        exchange = self._inbox._declarations.topology.exchange
        if code == amqp.exceptions.NotFound.code:
            raise amqp.exceptions.RecoverableConnectionError(
                f"the exchange {exchange!r} was deleted, and the inbox's bindings with it"
            )
        self._refused = True
        logger.warning(
            "the broker refuses barriers, and every read of a state looks into the store: (%s) %s. "
            "Check the user's write permission on the exchange %r, and its topic permissions",
            code,
            text,
            exchange,
        )

    def _on_barrier_returned(self, *arguments: Any) -> None:
        raise amqp.exceptions.RecoverableConnectionError(
            "the inbox's bindings are gone: the exchange "
            f"{self._inbox._declarations.topology.exchange!r} was deleted and declared again"
        )

    def publish_barrier(self, number: str) -> None:
        """Publish a barrier. The caller holds :attr:`writing`."""
        connection = self.link.amqp
        if connection.transport is None:
            raise amqp.exceptions.RecoverableConnectionError("the connection is closed")
        connection.transport.write(
            frames.publish_frames(
                self._barrier_channel.channel_id,
                self._inbox._declarations.topology.exchange,
                self._barrier_key,
                True,
                {"type": BARRIER, "message_id": number, "delivery_mode": 1},
                b"",
                connection.frame_max,
            )
        )
        # py-amqp's heartbeats count these bytes.
        connection.bytes_sent += 1

    def _on_cancel(self, consumer_tag: str) -> None:
        raise amqp.exceptions.ConsumerCancelled("the inbox queue was deleted", (60, 30))

    def _on_overflow(self, message: Any) -> None:
        raise amqp.exceptions.RecoverableConnectionError(
            f"the inbox overflowed: more than {MAX_QUEUED} states came while this process stood "
            "still"
        )

    def read(self) -> None:
        """Read until the inbox is closed or the connection is lost, which raises."""
        inbox = self._inbox
        sock = self.link.socket
        # gevent and eventlet replace DefaultSelector.
        with selectors.DefaultSelector() as selector:
            selector.register(sock, selectors.EVENT_READ)
            selector.register(self._wakeup, selectors.EVENT_READ)
            next_tick = 0.0
            while not inbox._closing:
                ready = {key.fileobj for key, _ in selector.select(self.link.idle_time())}
                if self._wakeup in ready:
                    with contextlib.suppress(BlockingIOError):
                        while self._wakeup.recv(4096):
                            pass
                    if inbox._suspicion:
                        raise amqp.exceptions.RecoverableConnectionError(inbox._suspicion)
                if sock in ready:
                    self._drain()
                # These messages were received together: no system call, so that a computing thread
                # cannot take the GIL in between.
                while self.link.buffered() and not inbox._closing:
                    self._drain()
                if inbox._table.restless:
                    self._bind_and_unbind()
                now = time.monotonic()
                if now >= next_tick:
                    with self.writing:
                        self.link.tick()
                    next_tick = now + HEARTBEAT / 4

    def _drain(self) -> None:
        # A TLS socket must not be read and written at once.
        with self.writing:
            self.link.drain(0.0)

    def _bind_and_unbind(self) -> None:
        """Send the bindings and unbindings that the table requests; the answers come later."""
        inbox = self._inbox
        with inbox._changed:
            actions = inbox._table.actions(time.monotonic())
        topology = inbox._declarations.topology
        with self.writing, self.link.corked():
            for bind, key in actions:
                pattern = topology.every_binding() if key == ALL else topology.shard_binding(key)
                where = (self.queue, topology.exchange, pattern)
                if bind:
                    self._binding.append(key)
                    self.channel.send_method(spec.Queue.Bind, "BsssbF", (0, *where, False, None))
                else:
                    self.channel.send_method(spec.Queue.Unbind, "BsssF", (0, *where, None))

    def _on_bind_ok(self, *arguments: Any) -> None:
        self._inbox._bound(self._binding.popleft())


def _declare(channel: Any, arguments: Dict[str, Any]) -> str:
    """Declare an exclusive queue named by the broker and return its name."""
    return str(
        channel.queue_declare(
            "",
            durable=False,
            exclusive=True,
            auto_delete=True,
            arguments={"x-queue-type": "classic", **arguments},
        ).queue
    )
