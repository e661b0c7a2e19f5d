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

import contextlib
import functools
import logging
import threading
import time
from typing import Collection, Dict, Iterable, List, Mapping, Optional, Set

import amqp

from celery_amqp_results import errors
from celery_amqp_results.amqp import connections
from celery_amqp_results.amqp.declarations import Declarations
from celery_amqp_results.amqp.failures import TRANSIENT, is_refusal
from celery_amqp_results.feed.barriers import Barrier, Barriers
from celery_amqp_results.feed.bindings import Action
from celery_amqp_results.feed.session import Session
from celery_amqp_results.feed.table import Table, Unread
from celery_amqp_results.feed.views import Look
from celery_amqp_results.feed.waiter import Waiter
from celery_amqp_results.protocol.message import FORGOTTEN, MARK, STATE, StateMessage, dated
from celery_amqp_results.protocol.page import Census
from celery_amqp_results.protocol.ranking import is_lasting
from celery_amqp_results.toolkit.bounded import OnceLogger
from celery_amqp_results.toolkit.interrupts import raise_if_from_signal_handler
from celery_amqp_results.toolkit.retry import time_left
from celery_amqp_results.toolkit.threads import start_thread

__all__ = ("Inbox",)

logger = logging.getLogger(__name__)

#: Seconds after which a read no longer waits for its barrier.
BARRIER_SECONDS = 1.0
#: Seconds after which a barrier that has not come back is lost for certain. The broker returns none
#: that another queue has received: a queue bound with ``#`` receives all.
LOST_SECONDS = 30.0

#: Seconds after which a read restarts an inbox that has given up.
RESTART = 30.0


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
        self._session: Optional[Session] = None
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

    def answer(
        self, ids: Collection[str], deadline: Optional[float]
    ) -> Dict[str, Optional[StateMessage]]:
        """Return the current states of those of *ids* that are known for certain.

        Counts a read. Starts the inbox, or requests bindings, where that pays.

        Parameters:
            ids: the tasks.
            deadline: time (``time.monotonic``) at which to stop waiting for a barrier.
        """
        with self._changed:
            known = self._ask(ids)
            session, epoch = self._session, self._table.epoch
            lasting = len(known) == len(ids) and self._is_lasting(known)
        if not known or session is None:
            return {}
        if lasting and session.take_in():
            with self._changed:
                known = self._recall(ids, epoch)
                if len(known) == len(ids) and self._is_lasting(known):
                    return known
        if not self._pass_barrier(session, deadline):
            return {}
        with self._changed:
            return self._recall(ids, epoch)

    def _ask(self, ids: Collection[str]) -> Dict[str, Optional[StateMessage]]:
        now = time.monotonic()
        table = self._table
        table.asked(ids, now)
        if table.wants_inbox and not self._is_hopeless(now):
            self._start()
        self._wake_if_restless()
        return self._recall(ids, table.epoch)

    def _is_hopeless(self, now: float) -> bool:
        return self._failure is not None and now - self._failed_at < RESTART

    def _is_lasting(self, known: Mapping[str, Optional[StateMessage]]) -> bool:
        return self._table.is_proved(time.monotonic()) and all(map(is_lasting, known.values()))

    def _recall(self, ids: Iterable[str], epoch: int) -> Dict[str, Optional[StateMessage]]:
        """Return the states of those of *ids* that are known without the store."""
        found: Dict[str, Optional[StateMessage]] = {}
        table = self._table
        if not epoch or epoch != table.epoch:
            return found
        now, wall = time.monotonic(), _wall()
        for task_id in ids:
            with contextlib.suppress(Unread):
                if not table.is_due(task_id, now):
                    found[task_id] = table.recall(task_id, now, wall)
        return found

    def _pass_barrier(self, session: Session, deadline: Optional[float]) -> bool:
        """Wait until everything has come that was confirmed before this call.

        Returns ``False`` if that is not certain: the barrier was late, or there can be none.
        """
        with self._changed:
            if session is not self._session or session.blocked:
                return False
            if self._barriers.overdue:
                if self._barriers.late_for(time.monotonic()) > LOST_SECONDS:
                    self.suspect(f"a barrier has not come back within {LOST_SECONDS:g} s")
                return False
            barrier, first = self._barriers.join()
        publish = functools.partial(self._publish, session, barrier) if first else None
        session.wait_for(barrier, time_left(deadline, BARRIER_SECONDS), publish)
        with self._changed:
            if not barrier.returned:
                self._barriers.give_up(barrier)
            return barrier.returned

    def _publish(self, session: Session, barrier: Barrier) -> None:
        """Publish a barrier. Reads that begin later need another one."""
        try:
            with session.io:
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
                self._barriers.withdraw(barrier)

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
            session: Optional[Session] = None
            try:
                session = Session(self, self._connector, self._declarations, self._client)
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

    # -- what the session reports ------------------------------------------------------------

    @property
    def closing(self) -> bool:
        """Whether to stop reading."""
        return self._closing

    @property
    def suspicion(self) -> str:
        """Why the connection must be replaced, or empty."""
        return self._suspicion

    @property
    def restless(self) -> bool:
        """Whether :meth:`actions` has something to do."""
        return self._table.restless

    def actions(self) -> List[Action]:
        """Return the bindings to add and to remove, each once."""
        with self._changed:
            return self._table.actions(time.monotonic())

    def on_open(self, session: Session) -> None:
        """Note that the connection stands."""
        with self._changed:
            self._table.opened(time.monotonic())
            self._session = session
            self._changed.notify_all()

    def on_bound(self, key: int) -> None:
        """Note that a binding stands."""
        with self._changed:
            self._table.bound(key, time.monotonic())
            self._changed.notify_all()

    def on_message(self, message: amqp.Message) -> None:
        """Take in a pushed message."""
        try:
            state = dated(StateMessage.from_properties(message.properties, message.body), _wall())
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

    def on_barrier(self, number: int) -> None:
        """Take in a barrier that came back."""
        with self._changed:
            barrier = self._barriers.take(number)
            if barrier is not None:
                self.barriers += 1
                self._table.proved(barrier.published)


def _wall() -> int:
    """Return microseconds since 1970."""
    return time.time_ns() // 1000
