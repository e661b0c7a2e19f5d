"""The sender's part of chords, and the part of the header's tasks as they end.

A process's knowledge of chords belongs to the app: Celery may make several backends.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
import uuid
import weakref
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Union

from celery import signals
from celery.canvas import Signature, _chain, chord, group
from celery.result import ResultSet
from celery.utils.functional import _regen
from celery.utils.nodenames import anon_nodename
from kombu import serialization
from kombu.exceptions import EncodeError

from celery_amqp_results.chords import plan as plans
from celery_amqp_results.chords.plan import Amendment, Plan
from celery_amqp_results.chords.service import Service
from celery_amqp_results.chords.workers import bell
from celery_amqp_results.library_types import App
from celery_amqp_results.protocol.clock import PublishClock
from celery_amqp_results.protocol.message import PLAN, StateMessage
from celery_amqp_results.protocol.names import PLAN_QUEUES, QueueSpec, Topology, plan_number
from celery_amqp_results.protocol.ranking import is_final
from celery_amqp_results.store.publisher import Outgoing, Publisher
from celery_amqp_results.toolkit.bounded import BoundedDict
from celery_amqp_results.toolkit.interrupts import raise_if_from_signal_handler

__all__ = ("Chords", "Plans", "expect_body")

logger = logging.getLogger(__name__)

#: State in the message of a plan, and of an amendment.
CHORD_STATE = "CHORD"
AMENDMENT_STATE = "AMENDMENT"

#: The most chords that are remembered as sent.
MAX_REMEMBERED = 10_000

#: The most running tasks of one process that are remembered as having amended a chord.
MAX_AMENDING = 10_000

#: Seconds between two checks whether a plan queue has a leader, in a process outside of a worker.
CHECK_SECONDS = 30.0

#: Celery prepares this many tasks of a generator ahead of the task that it sends.
LOOK_AHEAD = 2

_clock = PublishClock()
os.register_at_fork(after_in_child=_clock.after_fork_in_child)


@dataclasses.dataclass
class _Sending:
    """A chord that is being sent."""

    body: Signature
    #: The results of the header; a weak reference if they are a generator, which may never be
    #: exhausted.
    results: Any
    plan: Plan


@dataclasses.dataclass
class _Generator:
    """A generator as the header of a chord that is being sent."""

    results: weakref.ref[Any]
    #: The number of published tasks.
    published: int = 0
    #: Whether it runs at the moment.
    running: bool = False
    #: The error that it has raised.
    failure: Optional[Exception] = None


class _Lazy(threading.local):
    """The generators of the chords that a thread is sending, by header, innermost last."""

    def __init__(self) -> None:
        self.headers: Dict[str, _Generator] = {}


class Plans:
    """Writes and reads the messages in plan queues. Thread-safe, does no I/O.

    Parameters:
        app: returns the Celery app, or ``None`` when it is gone.
        persistent: whether plans survive a restart of the broker.
    """

    def __init__(self, app: Callable[[], Any], topology: Topology, persistent: bool) -> None:
        self._app = app
        self._topology = topology
        self._persistent = persistent

    @property
    def queues(self) -> List[QueueSpec]:
        """All plan queues."""
        return [self._topology.plan_queue(number) for number in range(PLAN_QUEUES)]

    def queue(self, group_id: str) -> str:
        """Return the name of the queue for the plan of the chord with the header *group_id*."""
        return self._topology.plan_queue(plan_number(group_id)).name

    def write(
        self,
        group_id: str,
        state: str,
        content: Mapping[str, object],
        serializer: Optional[str] = None,
    ) -> Outgoing:
        """Return the message of a plan or amendment, encoded like the app's tasks.

        The arguments of a body may include types that results may not.

        Parameters:
            serializer: another serializer to try.

        Raises:
            kombu.exceptions.EncodeError: when no serializer can encode it.
        """
        usual = self._app().conf.task_serializer
        try:
            kind, encoding, body = serialization.dumps(content, serializer=usual)
        except EncodeError:
            if serializer in (None, "", usual):
                raise
            kind, encoding, body = serialization.dumps(content, serializer=serializer)
        if isinstance(body, str):
            body = body.encode("utf-8")
        message = StateMessage(group_id, state, _clock.now(), body, kind, encoding, kind=PLAN)
        return Outgoing(
            self.queue(group_id),
            message.properties(self._persistent),
            body,
            what=f"the {state} of the header {group_id}",
        )

    def content(self, message: StateMessage) -> Mapping[str, Any]:
        """Return the content of the message of a plan or amendment.

        Raises:
            Exception: the error of the serializer.
            kombu.exceptions.ContentDisallowed: when its content type is not accepted.
        """
        conf = self._app().conf
        content: Mapping[str, Any] = serialization.loads(
            message.body,
            content_type=message.content_type,
            content_encoding=message.content_encoding,
            accept=serialization.prepare_accept_content(
                {*conf.accept_content, conf.task_serializer}
            ),
        )
        return content

    def read(self, message: StateMessage) -> Union[Plan, Amendment]:
        """Read the plan or the amendment from *message*.

        Raises:
            ForeignMessage: when it contains neither.
            Exception: as :meth:`content`.
        """
        if message.state == AMENDMENT_STATE:
            return Amendment.read(self.content(message), message)
        return Plan.read(self.content(message), message)


class Chords:
    """Publishes plans, and starts leading chords.

    Thread-safe. After a fork the child must make a new one.
    """

    def __init__(self, publisher: Publisher, messages: Plans, service: Service) -> None:
        self._publisher = publisher
        self._messages = messages
        self.service = service
        self._lock = threading.Lock()
        self._sending: BoundedDict[str, _Sending] = BoundedDict(MAX_REMEMBERED)
        self._sent: BoundedDict[str, None] = BoundedDict(MAX_REMEMBERED)
        #: Tasks that have added others to their chords in this process, with the last amendment.
        self._amended: BoundedDict[str, str] = BoundedDict(MAX_AMENDING)
        self._check_at = 0.0

    # -- the sender --------------------------------------------------------------------------------

    def prepare(
        self,
        group_id: str,
        results: Iterable[object],
        body: Signature,
        expires: Optional[int],
        root_id: Optional[str],
    ) -> None:
        """Note a chord whose header is about to be sent. Does no I/O.

        Parameters:
            expires: milliseconds without a new result after which the chord is abandoned.
            root_id: id of the first task of the workflow, ``None`` if that is a task of the header.
        """
        lazy = isinstance(results, _regen)
        with self._lock:
            again = group_id in self._sent
            self._sent[group_id] = None
            plan = Plan(
                group_id,
                uuid.uuid4().hex,
                [],
                _clock.now(),
                expires,
                again,
                plans.proofs(body),
                root_id,
            )
            held = weakref.ref(results) if lazy else list(results)
            self._sending[group_id] = _Sending(body, held, plan)
        if lazy:
            _follow_generator(group_id, results)

    def publish_plan(self, group_id: str) -> None:
        """Publish the plan of a chord, just before the last task of its header is sent.

        Does nothing for a chord that was not prepared in this process.

        Raises:
            kombu.exceptions.EncodeError: when the body cannot be encoded.
            ResultTooLarge: when the broker refuses a message of this size.
            DeclarationRefused: when a plan queue exists with other properties.
            BackendUnavailable: when the broker cannot be reached or refuses us.
        """
        with self._lock:
            sending = self._sending.pop(group_id, None)
        if sending is None:
            # Before Celery 5.7 a group at the end of a chain in a header has the header's id, and
            # the worker that sends it passes its size as that of the whole header.
            return
        results = sending.results
        if isinstance(results, weakref.ref):
            results = results()
            failure = _forget_generator(group_id)
            if failure is not None:
                raise failure
            if results is None:
                return
        plan = dataclasses.replace(sending.plan, results=plans.tree(results))
        content, own = plan.content(sending.body), sending.body.options.get("serializer")
        self._publish(self._messages.write(group_id, CHORD_STATE, content, own), group_id)

    def publish_amendment(
        self, group_id: str, result: object, after: Optional[str], expires: Optional[int]
    ) -> None:
        """Add one task or group to a chord. A task of its header must call this.

        Parameters:
            after: the task that adds it.
            expires: milliseconds after which it is abandoned if there is no such chord.

        Raises:
            DeclarationRefused, BackendUnavailable: as :meth:`publish_plan`.
        """
        amendment = Amendment(
            group_id,
            uuid.uuid4().hex,
            after,
            plans.tree([result]),
            result.id if isinstance(result, ResultSet) else None,
            expires=expires,
        )
        content = amendment.content()
        self._publish(self._messages.write(group_id, AMENDMENT_STATE, content), group_id)
        if after is not None:
            with self._lock:
                self._amended[after] = amendment.mark

    def with_amendment(self, state: StateMessage) -> StateMessage:
        """Return a state or part with the mark of the last amendment that its task has made.

        A leader that receives the state before the amendment then waits for the amendment.
        """
        if not is_final(state.state):
            return state
        with self._lock:
            mark = self._amended.get(state.id)
        return state if mark is None else dataclasses.replace(state, amended=mark)

    def _publish(self, message: Outgoing, group_id: str) -> None:
        self._publisher.publish_to(self._messages.queues, message)
        if bell.in_main or bell.in_child:
            self.note_chord(group_id)

    # -- leading -----------------------------------------------------------------------------------

    def note_chord(self, group_id: str) -> None:
        """Start leading chords: a part of the chord with this header was stored or sent here.

        Raises nothing, since what was stored counts.
        """
        try:
            self._lead_if_needed(group_id)
        except Exception as exc:
            raise_if_from_signal_handler(exc)
            logger.warning("a leader for the chord %s was not looked for: %s", group_id, exc)

    def _lead_if_needed(self, group_id: str) -> None:
        if bell.in_child:
            bell.ring()
        elif bell.in_main:
            self.service.start(met=True)
        elif not self.service.running and time.monotonic() >= self._check_at:
            self._check_at = time.monotonic() + CHECK_SECONDS
            length = self._publisher.length(self._messages.queue(group_id))
            if length is None or not length.consumers:
                self.service.start(met=True)


def expect_body(app: App, body: Signature, note_sent: Callable[[str], None]) -> None:
    """Have the states of a body pushed to this process, although another one sends it.

    A process that waits for its own task neither reads the store nor binds a shard, which would
    take longer than the rest of a small chord. A body of several tasks is waited for like the task
    of another process. So is a body sent by a task, which may run somewhere else when it is
    redelivered.
    """
    body_id = body.options.get("task_id")
    if (
        body_id
        and app.current_worker_task is None
        and not isinstance(body, (_chain, group, chord))
        # Celery's task protocol 1 has no field for the sender.
        and app.conf.task_protocol != 1
    ):
        # Celery does the same with a retried task.
        body.options["origin"] = anon_nodename()
        note_sent(body_id)


# -- generators ------------------------------------------------------------------------------------

_lazy = _Lazy()


def _follow_generator(group_id: str, results: Any) -> None:
    """Fix the ids of a generator's tasks before Celery copies the tasks.

    Celery copies each task when it prepares it. The copy has the id of the original only if the
    original already had one. So each time a task is published, the results of a few tasks ahead are
    taken, and the generator still runs while its tasks are sent.
    """
    signals.after_task_publish.connect(_take_ahead, weak=False, dispatch_uid=__name__)
    _forget_generator(group_id)
    _lazy.headers[group_id] = _Generator(weakref.ref(results))
    _take_ahead()


def _take_ahead(**kwargs: object) -> None:
    while _lazy.headers:
        group_id, generator = next(reversed(_lazy.headers.items()))
        if generator.running:
            # It has sent a task itself.
            return
        results = generator.results()
        if results is not None:
            generator.published += 1
            generator.running = True
            try:
                results[generator.published + LOOK_AHEAD - 2]
            except IndexError:
                pass
            except Exception as exc:
                # For Celery the generator seems to end there.
                generator.failure = exc
            finally:
                generator.running = False
            return
        # The generator has raised an error.
        _forget_generator(group_id)


def _forget_generator(group_id: str) -> Optional[Exception]:
    """Stop following a generator, and return the error that it has raised, if any."""
    generator = _lazy.headers.pop(group_id, None)
    return None if generator is None else generator.failure
