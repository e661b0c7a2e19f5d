"""The inbox: states pushed to the process that waits for them.

One thread per process owns one connection with one exclusive queue, reads it, and hands each
state to those who wait for it: no socket is read by two threads, and heartbeats are answered
while the program computes. The queue is bound to the process's own *client* word, so that the
states of every task it sends come by themselves, and to those *shards* in which it waits for
tasks that somebody else sent. There is never a binding per task.

What has to be known of a task before its pushes mean anything is whether a state could have been
missed. A task is *covered* when none could: it was sent, or looked up in the store, after the
binding stood that brings its states, and nothing was lost since. Only of covered tasks the last
state is kept; of all others nothing is, and the store is asked.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import re
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
    Optional,
    Set,
    TypeVar,
)

import amqp

from celery_amqp_results import errors
from celery_amqp_results.amqp import connections
from celery_amqp_results.amqp.declarations import Declarations
from celery_amqp_results.amqp.once import OnceLogger
from celery_amqp_results.amqp.threads import start_thread
from celery_amqp_results.protocol.message import STATE, StateMessage, dated
from celery_amqp_results.protocol.names import BROADCAST, OVERFLOW
from celery_amqp_results.protocol.ranking import fold, is_final, supersedes

__all__ = ("Inbox", "Waiter")

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

#: An id as Celery makes them. Others are somebody's own, and may have been used before.
_NEW_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")

#: Seconds between heartbeats: a connection that died without a word is noticed after twice that.
HEARTBEAT = 15.0

#: States kept of tasks that are covered but that nobody has asked for yet, at most.
MAX_KNOWN = 100_000
#: Bytes of their bodies, at most.
MAX_KNOWN_BYTES = 64 * 1024 * 1024

#: Ids remembered as sent by this process, at most. Without that, a task is taken for somebody
#: else's, which costs a binding to its shard.
MAX_SENT = 100_000

#: The inbox queue holds at most so many messages. The reader takes them as they come, so that
#: this is reached only while the process stands still, for as long as its heartbeat allows.
MAX_QUEUED = 1_000_000


class Waiter:
    """Somebody who waits for states of some tasks.

    The reader thread fills it; the one who waits takes out. Its methods may be called by any
    thread.

    Parameters:
        wake: called, by any thread, whenever there is something to take; ``None`` where
            :meth:`wait` is used.
    """

    def __init__(self, wake: Optional[Callable[[], None]] = None) -> None:
        self._arrived: Deque[StateMessage] = collections.deque()
        self._event = threading.Event()
        self._wake = wake
        #: Tasks whose store has to be asked, since states may have been missed.
        self._uncovered: Deque[str] = collections.deque()
        self._failure: Optional[Exception] = None

    def poke(self) -> None:
        """Wake the one who waits."""
        self._event.set()
        if self._wake is not None:
            self._wake()

    def feed(self, state: StateMessage) -> None:
        """Hand over a state."""
        self._arrived.append(state)
        self.poke()

    def uncover(self, ids: Iterable[str]) -> None:
        """Say that states of *ids* may have been missed."""
        self._uncovered.extend(ids)
        self.poke()

    def fail(self, failure: Exception) -> None:
        """Say that nothing more will come."""
        self._failure = failure
        self.poke()

    def wait(self, timeout: float) -> bool:
        """Wait until there is something to take; return whether there is."""
        return self._event.wait(timeout)

    def take(self) -> List[StateMessage]:
        """Return the states that have come since the last call.

        Raises:
            Exception: what :meth:`fail` was called with.
        """
        self._event.clear()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return list(_popped(self._arrived))

    def take_uncovered(self) -> Set[str]:
        """Return the tasks whose store has to be asked, each once."""
        return set(_popped(self._uncovered))


def _popped(queue: Deque[_T]) -> Iterator[_T]:
    # Others append meanwhile, so that a length taken before would not do.
    with contextlib.suppress(IndexError):
        while True:
            yield queue.popleft()


class Inbox:
    """Receives the states of tasks, and keeps those of covered tasks until asked for.

    Parameters:
        connector: opens the connection.
        declarations: names, and the exchange.
        client: the word of this process in routing keys.

    Thread-safe. Nothing is opened until the first :meth:`cover`. After a fork the child must make
    a new inbox and let go of this one untouched.
    """

    def __init__(
        self, connector: connections.Connector, declarations: Declarations, client: str
    ) -> None:
        self._connector = connector
        self._declarations = declarations
        self._client = client
        # Guards everything below. No I/O is done while holding it.
        self._changed = threading.Condition(threading.RLock())
        self._thread: Optional[threading.Thread] = None
        #: For what is the same at each try to open a connection.
        self._once = OnceLogger(logger)
        self._closing = False
        #: Number of the present connection, counted from 1; 0 while there is none.
        self._epoch = 0
        self._epochs = 0
        #: Why the reader thread gave up, until it is started again.
        self._failure: Optional[Exception] = None
        #: Shards to bind, kept over connections, and those bound on the present one.
        self._wanted: Set[int] = set()
        self._bound: Set[int] = set()
        self._waiters: Dict[str, List[Waiter]] = {}
        #: The covered tasks, with the state that counts or None for none yet.
        self._known: collections.OrderedDict[str, Optional[StateMessage]] = (
            collections.OrderedDict()
        )
        self._known_bytes = 0
        #: What was pushed of tasks that are waited for but not covered yet: it came after the
        #: binding stood, so that :meth:`install` has to add it to what the store said.
        self._early: Dict[str, List[StateMessage]] = {}
        #: Tasks that are waited for and were dropped from the table meanwhile: what somebody has
        #: read of them before, and not installed yet, may be outdated.
        self._outdated: Set[str] = set()
        self._sent: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._wakeup: Optional[socket.socket] = None
        #: What of the present connection is not to be trusted.
        self._suspicion = ""
        #: States received, and messages that were none.
        self.received = 0
        self.rejected = 0
        #: When the latest of those was published, in microseconds since 1970.
        self.latest = 0

    @property
    def waited_for(self) -> int:
        """How many tasks somebody waits for."""
        return len(self._waiters)

    # -- what the process does -------------------------------------------------------------

    def note_sent(self, task_id: str) -> None:
        """Note that this process is about to send a task. Does no I/O."""
        with self._changed:
            again = task_id in self._sent
            self._sent[task_id] = None
            if len(self._sent) > MAX_SENT:
                self._sent.popitem(last=False)
            # Of an id that is not plainly new the store may hold a state.
            if (
                self._epoch
                and not again
                and task_id not in self._known
                and _NEW_ID.fullmatch(task_id)
            ):
                self._remember(task_id, None)

    def note_stored(self, state: StateMessage) -> None:
        """Note a state that this process has published: it is not to wait for its own push."""
        with self._changed:
            self._update(state)

    def watch(self, ids: Iterable[str], waiter: Waiter) -> None:
        """Hand the states of *ids* to *waiter* from now on.

        What is known already is handed over at once; tasks that are not covered are marked so.
        """
        with self._changed:
            uncovered = []
            for task_id in ids:
                self._waiters.setdefault(task_id, []).append(waiter)
                if task_id not in self._known:
                    uncovered.append(task_id)
                    continue
                state = self._known[task_id]
                if state is not None:
                    waiter.feed(state)
            if uncovered:
                waiter.uncover(uncovered)

    def unwatch(self, ids: Iterable[str], waiter: Waiter, consumed: bool = False) -> None:
        """Stop handing the states of *ids* to *waiter*.

        Parameters:
            ids: tasks that it was to watch.
            waiter: who watched them.
            consumed: whether it has their final states. They are then covered no more: a result
                may be forgotten, or expire, which nobody would tell us.
        """
        with self._changed:
            for task_id in ids:
                self._unwait(task_id, waiter)
                if consumed:
                    self._uncover(task_id)

    def _unwait(self, task_id: str, waiter: Waiter) -> None:
        waiters = self._waiters.get(task_id)
        if waiters is None:
            return
        with contextlib.suppress(ValueError):
            waiters.remove(waiter)
        if not waiters:
            del self._waiters[task_id]
            self._early.pop(task_id, None)
            self._outdated.discard(task_id)

    def unbound(self, ids: Collection[str]) -> Set[str]:
        """Return those of *ids* that somebody else has sent and whose shards are not bound."""
        with self._changed:
            topology = self._declarations.topology
            return {
                task_id
                for task_id in ids
                if task_id not in self._sent and topology.shard(task_id) not in self._bound
            }

    def cover(self, ids: Collection[str], deadline: Optional[float]) -> int:
        """Return when the bindings stand that bring the states of *ids*.

        Opens the inbox if it is not. What happened before has then to be looked up in the store,
        and given to :meth:`install`.

        Parameters:
            ids: tasks of this process or of others.
            deadline: time (``time.monotonic``) at which to give up, or ``None``.

        Returns:
            The number of the connection, for :meth:`install`.

        Raises:
            TimeoutError: when *deadline* is over.
            BackendUnavailable: when the broker cannot be reached or refuses us.
            DeclarationRefused: when the exchange exists with other properties.
        """
        with self._changed:
            topology = self._declarations.topology
            needed = {topology.shard(i) for i in ids if i not in self._sent}
            self._wanted |= needed
            self._start()
            self._wake_reader()
            while not (self._epoch and needed <= self._bound):
                if self._failure is not None:
                    raise self._failure
                if self._closing:
                    raise errors.BackendUnavailable("the result backend was closed")
                remaining = connections.time_left(deadline, 3600.0)
                if remaining <= 0.0:
                    raise TimeoutError("the inbox was not bound in time")
                self._changed.wait(remaining)
            return self._epoch

    def install(self, states: Dict[str, List[StateMessage]], epoch: int) -> None:
        """Take *states* as all that happened to these tasks before their bindings stood.

        Somebody has to watch them since before :meth:`cover`. Does nothing when the connection
        *epoch*, that :meth:`cover` returned, is no more, nor for a task whose end somebody else
        has seen meanwhile.
        """
        with self._changed:
            if epoch != self._epoch:
                return
            for task_id, found in states.items():
                if task_id in self._outdated:
                    continue
                known = self._known.get(task_id)
                pushed = self._early.pop(task_id, [])
                self._remember(task_id, fold([*found, *pushed, *([known] if known else [])]))

    def covers(self, task_id: str) -> bool:
        """Return whether no state of the task could have been missed."""
        with self._changed:
            return task_id in self._known

    def known(self, task_id: str) -> Optional[StateMessage]:
        """Return the state of a covered task, or ``None`` for none yet.

        A final state is handed out once: it may be forgotten or expire on the broker later, which
        nobody would tell us. The task is then covered no more.

        Raises:
            KeyError: when the task is not covered.
        """
        with self._changed:
            state = self._known[task_id]
            if state is not None and is_final(state.state):
                self._uncover(task_id)
                if state.expired(time.time_ns() // 1000):
                    raise KeyError(task_id)
            return state

    def discard(self, task_id: str) -> None:
        """Drop what is known of a task."""
        with self._changed:
            self._uncover(task_id)

    def suspect(self, why: str) -> None:
        """Have the connection replaced by another, to another host if there are several.

        For a connection that stands, and on which something did not come: a node that is cut off
        from its cluster, or was, is such. All that was covered is covered no more.

        Parameters:
            why: what did not come, for the log.
        """
        with self._changed:
            if self._epoch:
                self._suspicion = why
                self._wake_reader()

    def close(self, wait: bool = True) -> None:
        """Close the connection and end the thread; who waits gets an error.

        Parameters:
            wait: whether to return only when the thread has ended.
        """
        with self._changed:
            self._closing = True
            thread = self._thread
            self._changed.notify_all()
            self._wake_reader()
        if wait and thread is not None and thread is not threading.current_thread():
            thread.join(5.0)

    # -- the table of covered tasks, under the lock ------------------------------------------

    def _remember(self, task_id: str, state: Optional[StateMessage]) -> None:
        self._known_bytes -= _size(self._known.pop(task_id, None))
        self._known[task_id] = state
        self._known_bytes += _size(state)
        while len(self._known) > MAX_KNOWN or (
            self._known_bytes > MAX_KNOWN_BYTES and len(self._known) > 1
        ):
            self._uncover(next(iter(self._known)))

    def _update(self, state: StateMessage) -> bool:
        """Take in a new state; return whether its task is covered."""
        if state.id not in self._known:
            return False
        known = self._known[state.id]
        if known is None or supersedes(state, known):
            self._remember(state.id, state)
        return True

    def _uncover(self, task_id: str) -> None:
        if task_id in self._known:
            self._known_bytes -= _size(self._known.pop(task_id))
        if task_id in self._waiters:
            self._early.pop(task_id, None)
            self._outdated.add(task_id)

    # -- the reader thread -------------------------------------------------------------------

    def _start(self) -> None:
        if self._thread is None and not self._closing:
            self._failure = None
            self._thread = start_thread(self._run, "inbox")

    def _wake_reader(self) -> None:
        if self._wakeup is not None:
            with contextlib.suppress(OSError):
                self._wakeup.send(b"\0")

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
                lost = isinstance(exc, connections.TRANSIENT)
                refused = isinstance(
                    exc, (errors.BackendUnavailable, errors.DeclarationRefused)
                ) or connections.is_refusal(exc)
                self._lose(exc)
                if session is not None:
                    session.drop()
                    self._connector.leave(session.link)
                if self._closing:
                    break
                attempt += 1
                # Before the first success, what is wrong may well be the URL: give up as the
                # policy says. Later the broker has been seen, and will be back.
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
        """Nothing is known any more: states may be missed until the next connection stands."""
        with self._changed:
            self._epoch = 0
            self._suspicion = ""
            self._bound = set()
            self._known.clear()
            self._known_bytes = 0
            self._early.clear()
            self._outdated.clear()
            if self._wakeup is not None:
                self._wakeup.close()
                self._wakeup = None
            for task_id, waiters in self._waiters.items():
                for waiter in waiters:
                    waiter.uncover((task_id,))
            self._changed.notify_all()
        self._declarations.forget()

    def _give_up(self, exc: Exception, attempts: int) -> None:
        if isinstance(exc, (errors.BackendUnavailable, errors.DeclarationRefused)):
            failure: Exception = exc
        elif connections.is_refusal(exc):
            failure = errors.BackendUnavailable(
                f"the broker at {self._connector.describe()} refuses to push results: {exc}. "
                "Check the user's permissions on the exchange "
                f"{self._declarations.topology.exchange!r} and on queues that the broker names "
                "(amq.gen-*)."
            )
            failure.__cause__ = exc
        elif isinstance(exc, connections.TRANSIENT):
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
            self._fail_waiters(failure)
            self._changed.notify_all()

    def _fail_waiters(self, failure: Exception) -> None:
        for waiters in self._waiters.values():
            for waiter in waiters:
                waiter.fail(failure)

    def _opened(self, wakeup: socket.socket, bound: Set[int]) -> None:
        with self._changed:
            self._epochs += 1
            self._epoch = self._epochs
            self._bound = bound
            self._wakeup = wakeup
            self._changed.notify_all()

    def _receive(self, message: amqp.Message) -> None:
        try:
            state = dated(
                StateMessage.from_properties(message.properties, message.body),
                time.time_ns() // 1000,
            )
            self._declarations.topology.check_body_queue(state)
        except errors.ForeignMessage as exc:
            self.rejected += 1
            level = logging.WARNING if self.rejected == 1 else logging.DEBUG
            logger.log(level, "ignored a foreign or damaged message in the inbox: %s", exc)
            return
        if state.kind != STATE:
            return
        with self._changed:
            self.received += 1
            self.latest = max(self.latest, state.published)
            task_id = state.id
            covered = self._update(state)
            if not covered and task_id in self._waiters and task_id not in self._outdated:
                self._early.setdefault(task_id, []).append(state)
            for waiter in self._waiters.get(task_id, ()):
                waiter.feed(state)


def _size(state: Optional[StateMessage]) -> int:
    return 0 if state is None else len(state.body)


class _Session:
    """One connection of the inbox, with its queue declared, bound and consumed."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
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
        # What falls out of the inbox because it is full is dead-lettered to this queue of length
        # one: its arrival says that states were missed.
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
        with inbox._changed:
            wanted = set(inbox._wanted)
        self._bind(wanted)
        channel.basic_consume(
            self.queue, no_ack=True, callback=inbox._receive, on_cancel=self._on_cancel
        )
        channel.basic_consume(
            spilled, no_ack=True, callback=self._on_overflow, on_cancel=self._on_cancel
        )
        # The reader's end is closed with the session, the other by whoever notices first.
        self._wakeup, theirs = socket.socketpair()
        self._wakeup.setblocking(False)
        theirs.setblocking(False)
        inbox._opened(theirs, wanted)

    def close(self) -> None:
        """Close the connection as the protocol asks."""
        self._wakeup.close()
        self.link.close()

    def drop(self) -> None:
        """Close the connection without a word."""
        self._wakeup.close()
        self.link.drop()

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
                    self._bind_wanted()
                if sock in ready:
                    self.link.drain(0.0)
                # Received together with that: no system call, so that a thread that computes
                # does not get in between.
                while self.link.buffered() and not inbox._closing:
                    self.link.drain(0.0)
                now = time.monotonic()
                if now >= next_tick:
                    self.link.tick()
                    next_tick = now + HEARTBEAT / 4

    def _bind(self, shards: Set[int]) -> None:
        topology = self._inbox._declarations.topology
        with self.link.corked():
            for shard in shards:
                self.channel.queue_bind(
                    self.queue, topology.exchange, topology.shard_binding(shard), nowait=True
                )
        if shards:
            # The answer to this says that all before was done.
            self.channel.queue_declare(self.queue, passive=True)

    def _bind_wanted(self) -> None:
        inbox = self._inbox
        with inbox._changed:
            missing = inbox._wanted - inbox._bound
        self._bind(missing)
        if missing:
            with inbox._changed:
                inbox._bound |= missing
                inbox._changed.notify_all()


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
