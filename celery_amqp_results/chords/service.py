"""The shell around the leader: one thread, one connection, and helpers for slow work.

The thread consumes the plan queues and the pushed states, and passes both to the
:class:`~celery_amqp_results.chords.leader.Leader`. Helper threads read the store and send bodies,
so that heartbeats continue meanwhile.
"""

from __future__ import annotations

import collections
import functools
import logging
import threading
import time
from typing import Callable, Deque, Dict, Iterable, List, Mapping, Optional, Set, Tuple, Union

import amqp
from kombu.exceptions import ContentDisallowed

from celery_amqp_results import errors
from celery_amqp_results.amqp import connections
from celery_amqp_results.amqp.declarations import Declarations
from celery_amqp_results.amqp.failures import TRANSIENT, is_refusal
from celery_amqp_results.chords import actions, leader
from celery_amqp_results.chords.helpers import Helpers
from celery_amqp_results.chords.plan import Amendment, Plan
from celery_amqp_results.chords.session import Session
from celery_amqp_results.chords.workers import bell
from celery_amqp_results.feed.pushed import PushedStates
from celery_amqp_results.protocol.clock import wall
from celery_amqp_results.protocol.message import NOT_AN_END, PART, PLAN, STATE, StateMessage
from celery_amqp_results.protocol.ranking import fold, is_final
from celery_amqp_results.store.lookup import Store
from celery_amqp_results.toolkit.retry import Retry
from celery_amqp_results.toolkit.sockets import WakeUp
from celery_amqp_results.toolkit.threads import start_thread

__all__ = ("NotSent", "Service", "read_ends")

logger = logging.getLogger(__name__)

#: Bytes of results that a leader of chords keeps in memory. It reads the others when it fires.
MEMORY = 64 * 1024 * 1024

#: Seconds to finish sending bodies when the process ends.
CLOSE_SECONDS = 10.0

#: Seconds between two tries after the broker has refused the connection or a declaration.
REFUSED_SECONDS = 30.0


class NotSent(Exception):
    """Raised when a body could not be sent now, but may be later."""


class Service:
    """Leads chords in a thread of its own.

    Parameters:
        read: returns the plan or amendment in a message.
        fire: sends the body of a chord; raises :class:`NotSent` to be called again.

    Thread-safe. Does no I/O until it is started. After a fork the child must make a new one.
    """

    def __init__(
        self,
        connector: connections.Connector,
        declarations: Declarations,
        store: Store,
        read: Callable[[StateMessage], Union[Plan, Amendment]],
        fire: Callable[[actions.Fire], None],
    ) -> None:
        self._connector = connector
        self._declarations = declarations
        self._store = store
        self._read = read
        self._fire = fire
        self._leader = leader.Leader(MEMORY)
        self._helpers = Helpers()
        #: Marks of the chords whose bodies helpers are sending. For the thread only.
        self._sending: Set[str] = set()
        #: How many plans of this connection are left to a leader that accepts their content.
        self._left = 0
        #: Finished work of helpers: the thread calls these with the leader.
        self._done: Deque[Callable[[float], None]] = collections.deque()
        # Guards the attributes below. No I/O is done while holding it.
        self._lock = threading.Lock()
        self._thread: Optional[threading.Thread] = None
        self._wake_up: Optional[WakeUp] = None
        #: Whether this process has met a chord: then the plan queues are declared.
        self.met = False
        self._closing = False
        self._close_by = 0.0
        self._pushed = PushedStates(declarations.topology, logger)
        #: Counts of fired chords, of those given up, and of plans that cannot be read.
        self.fired = 0
        self.abandoned = 0
        self.unreadable = 0

    # -- for other threads -------------------------------------------------------------------------

    def start(self, met: bool) -> None:
        """Start to lead, unless already started.

        Unless a chord was *met*, the thread checks whether plan queues exist, and waits if there
        are none.
        """
        with self._lock:
            wake = met and not self.met
            self.met = self.met or met
            if self._thread is None and not self._closing:
                self._thread = start_thread(self._run, "chords")
        if wake:
            self._wake()

    @property
    def running(self) -> bool:
        """Whether the thread was started."""
        return self._thread is not None

    @property
    def rejected(self) -> int:
        """How many messages were neither plans nor states."""
        return self.unreadable + self._pushed.rejected

    @property
    def open(self) -> int:
        """How many chords are open here."""
        return self._leader.open

    @property
    def leads(self) -> int:
        """How many plan queues are led here."""
        return len(self._leader.leads)

    def oldest_age(self) -> float:
        """Return the age of the oldest open chord in seconds; 0 where none is open."""
        try:
            oldest = self._leader.oldest
        except RuntimeError:
            # The thread has changed the table meanwhile.
            return self.oldest_age()
        return 0.0 if oldest is None else max(0.0, time.time() - oldest / 1e6)

    def progress(self, key: str) -> Optional[Tuple[int, List[str]]]:
        """Return what :meth:`Leader.progress` does."""
        try:
            return self._leader.progress(key)
        except RuntimeError:
            return self.progress(key)

    def close(self, wait: bool = True) -> None:
        """End the thread and close the connection; other leaders take over the plans.

        Parameters:
            wait: whether to wait until that is done. Sending bodies may take :data:`CLOSE_SECONDS`
                longer.
        """
        with self._lock:
            self._close_by = time.monotonic() + (CLOSE_SECONDS if wait else 0.0)
            self._closing = True
            thread = self._thread
        self._wake()
        if wait and thread is not None and thread is not threading.current_thread():
            thread.join(CLOSE_SECONDS + 5.0)

    def _wake(self) -> None:
        with self._lock:
            if self._wake_up is not None:
                self._wake_up.ring()

    # -- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        wake_up = WakeUp()
        with self._lock:
            self._wake_up = wake_up
        tries = Retry(self._connector.policy)
        try:
            while not self._closing:
                session: Optional[Session] = None
                self._left = 0
                try:
                    session = Session(
                        self._connector,
                        self._declarations,
                        self.met,
                        self._on_plan,
                        self._on_state,
                    )
                    if session.met:
                        self.met = True
                    tries.succeeded()
                    if session.found:
                        self._lead(session, wake_up)
                    session.close()
                    if self.met and not (session.found or self._declarations.declare):
                        raise self._declarations.missing("queues for the plans of chords")
                except Exception as exc:
                    if session is not None:
                        session.drop()
                    self._leader.connection_lost(self._sending)
                    self._declarations.forget()
                    self._pause(exc, tries, wake_up)
                else:
                    self._leader.connection_lost(self._sending)
                    if not self._closing:
                        self._wait_for_chord(wake_up)
        finally:
            self._helpers.close()
            with self._lock:
                self._wake_up = None
            wake_up.close()

    def _pause(self, exc: Exception, tries: Retry, wake_up: WakeUp) -> None:
        """Wait before the next connection is opened."""
        refused = isinstance(exc, (errors.DeclarationRefused, errors.BackendUnavailable))
        if refused or is_refusal(exc):
            pause = REFUSED_SECONDS
            logger.error("chords cannot be led here, trying again in %.0f s: %s", pause, exc)
        elif isinstance(exc, TRANSIENT):
            pause = tries.after_success(exc, time.monotonic())
            logger.warning(
                "the connection that chords are led on is lost, opening another in %.1f s [%d]: %r",
                pause,
                tries.failed,
                exc,
            )
        else:
            pause = REFUSED_SECONDS
            logger.error("the chord leader has failed, and starts again", exc_info=exc)
        until = time.monotonic() + pause
        while not self._closing and time.monotonic() < until:
            wake_up.wait(max(0.0, until - time.monotonic()))

    def _wait_for_chord(self, wake_up: WakeUp) -> None:
        """Wait until this process, or a child of it, meets a chord."""
        while not self._closing and not self.met:
            reader = bell.reader()
            if reader is None:
                wake_up.wait(3600.0)
            elif wake_up.wait(3600.0, reader):
                self.met = True
                bell.drain()

    def _lead(self, session: Session, wake_up: WakeUp) -> None:
        """Lead until the service is closed or the connection is lost, which raises an error."""
        while not self._closing or (
            # Bodies are still being sent.
            (self._helpers.busy or self._done) and time.monotonic() < self._close_by
        ):
            now = time.monotonic()
            session.receive(self._perform(session, now) - now, wake_up)
            if session.tick(now, self._leader.holds or self._left > 0):
                self._left = 0
                self._leader.requeued()

    def _perform(self, session: Session, now: float) -> float:
        """Carry out the actions of the leader; return when it is due again."""
        while self._done:
            self._done.popleft()(now)
        self._leader.tick(now, wall())
        while True:
            pending = self._leader.take()
            if not pending:
                return self._leader.next_event()
            for action in pending:
                if isinstance(action, actions.Bind):
                    session.bind(action.number)
                    self._leader.bound(action.number, now, wall())
                elif isinstance(action, actions.Acknowledge):
                    session.acknowledge(action.deliveries)
                elif isinstance(action, actions.LookUp):
                    self._helpers.submit(functools.partial(self._look_up, action))
                elif isinstance(action, actions.Fire):
                    self._helpers.submit(functools.partial(self._send, action, session))
                    self._sending.add(action.plan.mark)
                else:
                    self.abandoned += 1
                    logger.error("chord %s is given up: %s", action.group_id, action.why)
            self._leader.tick(now, wall())

    # -- on helper threads -------------------------------------------------------------------------

    def _look_up(self, request: actions.LookUp) -> None:
        try:
            found = read_ends(self._store, request.tasks)
            bodies = self._store.read(request.bodies) if request.bodies else {}
        except BaseException as exc:
            logger.warning("the results of chords could not be looked up: %r", exc)
            self._finish(lambda now: self._leader.look_up_failed(request, now))
        else:
            self._finish(lambda now: self._leader.looked_up(request, found, bodies, now))

    def _send(self, action: actions.Fire, session: Session) -> None:
        mark = action.plan.mark
        try:
            if session.dropped:
                raise NotSent("the connection is lost, and another leader may have its plan")
            self._fire(action)
        except NotSent as exc:
            logger.warning(
                "the body of chord %s was not sent, trying again: %s", action.plan.group_id, exc
            )
            self._finish(lambda now: self._end_sending(mark, now, False))
        except BaseException:
            logger.exception("chord %s could not be fired", action.plan.group_id)
            self._finish(lambda now: self._end_sending(mark, now, True))
        else:
            self.fired += 1
            self._finish(lambda now: self._end_sending(mark, now, True))

    def _end_sending(self, mark: str, now: float, sent: bool) -> None:
        self._sending.discard(mark)
        if sent:
            self._leader.sent(mark)
        else:
            self._leader.not_sent(mark, now)

    def _finish(self, done: Callable[[float], None]) -> None:
        self._done.append(done)
        self._wake()

    # -- deliveries --------------------------------------------------------------------------------

    def _on_plan(self, message: amqp.Message) -> bool:
        """Take in a message of a plan queue; return whether no leader can read it."""
        now = time.monotonic()
        try:
            state = StateMessage.from_properties(message.properties, message.body)
            if state.kind != PLAN:
                raise errors.ForeignMessage(f"property 'type' is {state.kind!r}, not {PLAN!r}")
            plan = self._read(state)
        except Exception as exc:
            # A serializer may raise anything.
            self.unreadable += 1
            logger.error("a plan of a chord cannot be read here: %r", exc)
            for_others = isinstance(exc, ContentDisallowed)
            self._left += for_others
            return not for_others
        redelivered = bool(message.delivery_info.get("redelivered"))
        if isinstance(plan, Plan):
            self._leader.plan_delivered(plan, message.delivery_tag, redelivered, now)
        else:
            self._leader.amendment_delivered(plan, message.delivery_tag, now)
        return False

    def _on_state(self, message: amqp.Message) -> None:
        """Take in a pushed state."""
        state = self._pushed.read(message)
        if state is not None and state.kind in (STATE, PART):
            self._leader.state_pushed(state, time.monotonic(), wall())


def read_ends(store: Store, ids: Iterable[str]) -> Dict[str, StateMessage]:
    """Return the final states or parts of those of the tasks *ids* that have ended.

    Raises:
        LookupTimeout, BackendUnavailable: as every look-up.
    """
    ends: Dict[str, StateMessage] = {}
    for kind in (STATE, PART):
        missing = [task_id for task_id in ids if task_id not in ends]
        if missing:
            ends.update(_ends(store.read(missing, kind=kind)))
    return ends


def _ends(found: Mapping[str, List[StateMessage]]) -> Dict[str, StateMessage]:
    current = {
        task_id: fold(state for state in states if state.amended != NOT_AN_END)
        for task_id, states in found.items()
    }
    return {
        task_id: state
        for task_id, state in current.items()
        if state is not None and is_final(state.state)
    }
