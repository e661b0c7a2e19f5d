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
import logging
import threading
import time
from typing import Collection, Dict, Iterable, List, Mapping, Optional, Set

import amqp

from celery_amqp_results import errors
from celery_amqp_results.amqp import connections
from celery_amqp_results.amqp.declarations import Declarations
from celery_amqp_results.feed.bindings import Action
from celery_amqp_results.feed.keeper import Keeper
from celery_amqp_results.feed.pushed import PushedStates
from celery_amqp_results.feed.session import Session
from celery_amqp_results.feed.table import Table, Unread
from celery_amqp_results.feed.views import Look
from celery_amqp_results.feed.waiter import Waiter, Waiters
from celery_amqp_results.protocol.clock import wall
from celery_amqp_results.protocol.message import FORGOTTEN, MARK, STATE, StateMessage
from celery_amqp_results.protocol.page import Census
from celery_amqp_results.protocol.ranking import is_lasting
from celery_amqp_results.toolkit.retry import time_left

__all__ = ("Inbox",)

logger = logging.getLogger(__name__)

#: Seconds after which a read no longer waits for its barrier.
BARRIER_SECONDS = 1.0


class Inbox:
    """Receives the states of tasks, and keeps the knowledge about them in a table.

    Parameters:
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
        self._declarations = declarations
        self.client = client
        # Guards everything below. No I/O is done while holding it.
        self._changed = threading.Condition(threading.RLock())
        self._keeper = Keeper(self, self._changed, connector, declarations, client)
        self._waiters = Waiters()
        #: Those of the tasks that other processes have sent.
        self._sent_by_others: Set[str] = set()
        self._table = Table(declarations.topology, limit)
        self._session: Optional[Session] = None
        self._pushed = PushedStates(declarations.topology, logger)
        #: States received.
        self.received = 0
        #: Barriers that came back.
        self.barriers = 0
        #: When the latest of the states was published, in microseconds since 1970.
        self.latest = 0

    @property
    def waited_for(self) -> int:
        """The number of tasks that clients wait for."""
        return len(self._waiters)

    @property
    def rejected(self) -> int:
        """How many messages were not states."""
        return self._pushed.rejected

    @property
    def connections(self) -> int:
        """How many connections were opened, one after the other."""
        return self._table.connections

    @property
    def memory(self) -> int:
        """About how many bytes the table takes."""
        return self._table.memory.size

    @property
    def live_views(self) -> int:
        """How many shards are known completely."""
        with self._changed:
            return self._table.memory.live_views

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
        look up. Returns the tasks whose states are already pushed.
        """
        now, present = time.monotonic(), wall()
        with self._changed:
            uncovered = []
            pushed = set(ids) - self.unbound(ids) if self._table.epoch else set()
            for task_id in ids:
                self._waiters.add(task_id, waiter)
                if task_id in self._sent_by_others or not self._table.is_own(task_id):
                    # It stays one of these while clients wait, even if this process sends it.
                    self._sent_by_others.add(task_id)
                    self._watched(task_id, 1)
                    uncovered.append(task_id)
                    continue
                try:
                    state = self._table.recall(task_id, now, present, sure=False)
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
            consumed: whether it has taken their final states, which then need not be kept.
        """
        with self._changed:
            for task_id in ids:
                if self._waiters.remove(task_id, waiter) and task_id in self._sent_by_others:
                    self._watched(task_id, -1)
                if task_id not in self._waiters:
                    self._sent_by_others.discard(task_id)
                if consumed:
                    self._table.discard(task_id)

    def _watched(self, task_id: str, count: int) -> None:
        self._table.bindings.watched(self._declarations.topology.shard(task_id), count)

    def unbound(self, ids: Collection[str]) -> Set[str]:
        """Return the tasks of other processes among *ids* whose shards are not bound."""
        with self._changed:
            table, topology = self._table, self._declarations.topology
            return {
                task_id
                for task_id in ids
                if not table.is_own(task_id) and topology.shard(task_id) not in table.bindings
            }

    def cover(self, ids: Collection[str], deadline: Optional[float]) -> None:
        """Wait until the bindings for the states of *ids* stand.

        Opens the inbox if necessary. Earlier states must then be looked up in the store.

        Parameters:
            deadline: time (``time.monotonic``) at which to give up, or ``None``.

        Raises:
            TimeoutError: when *deadline* is over.
            BackendUnavailable: when the broker cannot be reached or refuses us.
            DeclarationRefused: when the exchange exists with other properties.
        """
        with self._changed:
            self._keeper.start()
            while True:
                self._table.cover(ids)
                self._wake_if_restless()
                if not self._table.cover(ids) and self._table.epoch:
                    return
                if self._keeper.failure is not None:
                    raise self._keeper.failure
                if self._keeper.closing:
                    raise errors.BackendUnavailable("the result backend was closed")
                remaining = time_left(deadline, 3600.0)
                if remaining <= 0.0:
                    raise TimeoutError("the inbox was not bound in time")
                self._changed.wait(remaining)

    def covers(self, task_id: str) -> bool:
        """Return whether no state of the task could have been missed."""
        with self._changed:
            try:
                self._table.recall(task_id, time.monotonic(), wall(), sure=False)
            except Unread:
                return False
            return True

    # -- reads -----------------------------------------------------------------------------

    def answer(
        self, ids: Collection[str], deadline: Optional[float]
    ) -> Dict[str, Optional[StateMessage]]:
        """Return the current states of those of *ids* that are known for certain.

        Counts a read. Starts the inbox, or requests bindings, where that pays. Stops waiting for a
        barrier at *deadline* (``time.monotonic``).
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
        if not session.pass_barrier(time_left(deadline, BARRIER_SECONDS)):
            return {}
        with self._changed:
            return self._recall(ids, epoch)

    def _ask(self, ids: Collection[str]) -> Dict[str, Optional[StateMessage]]:
        now = time.monotonic()
        table = self._table
        table.asked(ids, now)
        if table.bindings.wants_inbox and not self._keeper.is_hopeless(now):
            self._keeper.start()
        self._wake_if_restless()
        return self._recall(ids, table.epoch)

    def _is_lasting(self, known: Mapping[str, Optional[StateMessage]]) -> bool:
        return self._table.is_proved(time.monotonic()) and all(map(is_lasting, known.values()))

    def _recall(self, ids: Iterable[str], epoch: int) -> Dict[str, Optional[StateMessage]]:
        """Return the states of those of *ids* that are known without the store."""
        found: Dict[str, Optional[StateMessage]] = {}
        table = self._table
        if not epoch or epoch != table.epoch:
            return found
        now, present = time.monotonic(), wall()
        for task_id in ids:
            with contextlib.suppress(Unread):
                if not table.is_due(task_id, now):
                    found[task_id] = table.recall(task_id, now, present)
        return found

    def uncounted(self) -> List[int]:
        """Return the shards whose census is due, see :meth:`Table.uncounted`."""
        with self._changed:
            return [] if self._keeper.closing else self._table.uncounted(time.monotonic())

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
            self._table.end(look, found, censuses, time.monotonic(), wall())
            missed, self._table.missed = self._table.missed, ""
            if missed:
                self.suspect(f"{missed} is stored, and was not pushed")

    def doubt(self, look: Look, why: str) -> None:
        """Forget everything if *look* was to check a live view, and the store did not answer.

        The node may be cut off from its cluster. It would still answer barriers, but receives no
        pushes.
        """
        with self._changed:
            if self._table.checks(look):
                self.suspect(f"a shard view could not be checked ({why})")

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
            if self._session is not None:
                self._session.replace(why)

    def close(self, wait: bool = True) -> None:
        """End the connection and the thread, and *wait* for that. Waiting clients get an error."""
        with self._changed:
            self._keeper.closing = True
            self._changed.notify_all()
            self._wake_reader()
        if wait:
            self._keeper.join()

    def _wake_if_restless(self) -> None:
        if self._table.bindings.restless:
            self._wake_reader()

    def _wake_reader(self) -> None:
        if self._session is not None:
            self._session.wake()

    # -- what the keeper and its session report ----------------------------------------------

    def on_lost(self) -> None:
        """Forget everything: states may be missed until the next connection stands."""
        with self._changed:
            self._table.lost()
            self._session = None
            self._waiters.uncover()
            self._changed.notify_all()
        self._declarations.forget()

    def on_end(self, failure: Exception) -> None:
        """Note that there will be no other connection until the keeper is started again."""
        with self._changed:
            self._waiters.fail(failure)
            self._changed.notify_all()

    @property
    def closing(self) -> bool:
        """Whether to stop reading."""
        return self._keeper.closing

    @property
    def restless(self) -> bool:
        """Whether :meth:`actions` has something to do."""
        return self._table.bindings.restless

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
        state = self._pushed.read(message)
        if state is None:
            return
        if state.kind == MARK and state.state == FORGOTTEN:
            self.forget(state.id)
        if state.kind != STATE:
            return
        with self._changed:
            self.received += 1
            self.latest = max(self.latest, state.published)
            self._table.pushed(state, time.monotonic())
            self._waiters.feed(state)

    def on_proof(self, at: float) -> None:
        """Note that everything has come that was confirmed before a time."""
        with self._changed:
            self.barriers += 1
            self._table.proved(at)
