"""Chords as a process sends them and as the tasks of their headers end.

What this process knows of chords belongs to the app: Celery may make several backends.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
import uuid
import weakref
from typing import Any, Callable, Deque, Dict, List, Mapping, Optional, Tuple, Union

from celery import signals
from celery.canvas import _chain, chord, group
from celery.result import ResultSet
from celery.utils.functional import _regen
from celery.utils.nodenames import anon_nodename
from kombu import serialization
from kombu.exceptions import EncodeError

from celery_amqp_results import errors
from celery_amqp_results.chords import plan as plans
from celery_amqp_results.chords.bell import bell
from celery_amqp_results.chords.firing import Firing
from celery_amqp_results.chords.plan import Amendment, Plan
from celery_amqp_results.chords.service import Service
from celery_amqp_results.protocol.clock import PublishClock
from celery_amqp_results.protocol.message import PLAN, StateMessage
from celery_amqp_results.protocol.names import PLAN_QUEUES, Topology, plan_number
from celery_amqp_results.store.publisher import Outgoing, Publisher

__all__ = ("Chords",)

#: State in the message of a plan, and of an amendment.
CHORD_STATE = "CHORD"
AMENDMENT_STATE = "AMENDMENT"

#: At most this many chords are remembered as sent.
MAX_REMEMBERED = 10_000

#: Seconds between two looks whether a plan queue has a leader, in a process that is no part of a
#: worker.
CHECK_SECONDS = 30.0

#: Celery prepares two tasks of a generator before it sends the first, and so on.
LOOK_AHEAD = 2

_clock = PublishClock()


@dataclasses.dataclass
class _Sending:
    """A chord that is being sent."""

    body: Any
    #: The results of the header; a weak reference if they are a generator, whose end may be never
    #: reached.
    results: Any
    plan: Plan


class _Lazy(threading.local):
    """The chords with generators as headers that a thread is sending, innermost last."""

    def __init__(self) -> None:
        self.results: List[Tuple[str, Any]] = []
        self.ready: Dict[str, int] = {}


class Chords:
    """Sends plans, and leads chords where this process is to.

    Parameters:
        app: returns the Celery app, or ``None`` when it is gone.
        publisher: publishes plans.
        topology: names.
        persistent: whether plans survive a restart of the broker.
        service: makes the leader's service, from what reads a plan and what fires it.
        firing: sends bodies.

    Thread-safe. After a fork the child must make a new one.
    """

    def __init__(
        self,
        app: Callable[[], Any],
        publisher: Publisher,
        topology: Topology,
        persistent: bool,
        declare: bool,
    ) -> None:
        self._app = app
        self._publisher = publisher
        self._topology = topology
        self._persistent = persistent
        self._declare = declare
        self._lock = threading.Lock()
        self._sending: collections.OrderedDict[str, _Sending] = collections.OrderedDict()
        self._sent: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._check_at = 0.0
        self.service: Service
        self.firing: Firing

    # -- the sender --------------------------------------------------------------------------------

    def prepare(
        self, group_id: str, results: Any, body: Any, expires: Optional[int], root_id: Optional[str]
    ) -> None:
        """Note a chord whose header is about to be sent. Does no I/O.

        Parameters:
            group_id: id of the header.
            results: the results of the header.
            body: the frozen signature of the body.
            expires: milliseconds without a new result after which the chord is abandoned.
            root_id: id of the first task of the workflow, ``None`` if that is one of the header.
        """
        lazy = isinstance(results, _regen)
        with self._lock:
            again = group_id in self._sent
            _remember(self._sent, group_id, None)
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
            _remember(self._sending, group_id, _Sending(body, held, plan))
        if lazy:
            _follow_generator(group_id, results)

    def publish_plan(self, group_id: str) -> None:
        """Publish the plan of a chord, just before the last task of its header is sent.

        Does nothing for a chord that this process has not prepared.

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
            # the worker that sends it gives its size for that of the whole.
            return
        results = sending.results
        if isinstance(results, weakref.ref):
            results = results()
            _forget_generator(group_id)
            if results is None:
                return
        plan = dataclasses.replace(sending.plan, results=plans.tree(results))
        content = plan.content(sending.body)
        message = self._message(group_id, CHORD_STATE, content, _serializers(sending.body))
        self._publish(message, f"the plan of chord {group_id}")

    def publish_amendment(
        self, group_id: str, result: Any, after: Optional[str], expires: Optional[int]
    ) -> None:
        """Have a chord wait for a task more. To be called by a task of its header.

        Parameters:
            group_id: id of the header.
            result: the result of the task or group that is added.
            after: the task that adds it.
            expires: milliseconds after which it is abandoned where there is no such chord.

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
        message = self._message(group_id, AMENDMENT_STATE, amendment.content(), ())
        self._publish(message, f"an amendment of chord {group_id}")

    def _message(
        self, group_id: str, state: str, content: Mapping[str, Any], serializers: Tuple[str, ...]
    ) -> StateMessage:
        """Return *content* as a message, encoded as the app encodes its tasks.

        A body may have arguments that a result may not have.
        """
        task_serializer = self._app().conf.task_serializer
        names = list(dict.fromkeys((task_serializer, *serializers)))
        while True:
            try:
                content_type, encoding, body = serialization.dumps(content, serializer=names[0])
                break
            except EncodeError:
                if len(names) == 1:
                    raise
                del names[0]
        if isinstance(body, str):
            body = body.encode("utf-8")
        return StateMessage(
            group_id, state, _clock.now(), body, content_type, encoding, kind=PLAN
        )

    def _publish(self, message: StateMessage, what: str) -> None:
        spec = self._topology.plan_queue(plan_number(message.id))
        outgoing = Outgoing(
            spec.name, message.properties(self._persistent), message.body, what=what
        )
        queues = [self._topology.plan_queue(number) for number in range(PLAN_QUEUES)]
        self._publisher.publish_to(queues, outgoing)
        if bell.in_main or bell.in_child:
            self.note_chord(message.id)

    def content(self, message: StateMessage) -> Mapping[str, Any]:
        """Return what the message of a plan or amendment holds.

        Raises:
            Exception: what the serializer raises.
            kombu.exceptions.ContentDisallowed: when its content type is not accepted.
        """
        conf = self._app().conf
        content: Mapping[str, Any] = serialization.loads(
            message.body,
            content_type=message.content_type,
            content_encoding=message.content_encoding,
            accept=serialization.prepare_accept_content(
                {*conf.accept_content, conf.task_serializer, "json"}
            ),
        )
        return content

    def read(self, message: StateMessage) -> Union[Plan, Amendment]:
        """Return the plan or the amendment that *message* holds.

        Raises:
            ForeignMessage: when it holds neither.
            Exception: as :meth:`content`.
        """
        if message.state == AMENDMENT_STATE:
            return Amendment.read(self.content(message), message)
        return Plan.read(self.content(message), message)

    # -- leading -----------------------------------------------------------------------------------

    def note_chord(self, group_id: str) -> None:
        """Have chords led: a part of the chord with this header was stored or sent here."""
        if bell.in_child:
            bell.ring()
        elif bell.in_main:
            self.service.start(met=True)
        elif not self.service.running and time.monotonic() >= self._check_at:
            self._check_at = time.monotonic() + CHECK_SECONDS
            queue = self._topology.plan_queue(plan_number(group_id)).name
            length = self._publisher.publish((), count=queue)
            if length is None or not length.consumers:
                self.service.start(met=True)

    def start_if_needed(self) -> None:
        """Lead chords if there are any. To be called by the main process of a worker."""
        self.service.start(met=False)

    def close(self, wait: bool = True) -> None:
        """Stop to lead, and close the connections."""
        self.service.close(wait)
        self.firing.close()


def expect_body(app: Any, body: Any, note_sent: Callable[[str], None]) -> None:
    """Have the states of a body pushed to this process, although another one will send it.

    A process that waits for a task of its own neither asks the store for it nor binds its shard,
    which would take longer than all else that a small chord takes. A body that has several tasks is
    waited for like the task of somebody else; so is one that a task sends, since what runs that
    task may be somewhere else when it is delivered again.
    """
    body_id = body.options.get("task_id")
    if (
        body_id
        and app.current_worker_task is None
        and not isinstance(body, (_chain, group, chord))
        # Celery 3's messages say nothing of their senders.
        and app.conf.task_protocol != 1
    ):
        # Celery does the same with a task that is retried.
        body.options["origin"] = anon_nodename()
        note_sent(body_id)


# -- generators ------------------------------------------------------------------------------------

_lazy = _Lazy()


def _follow_generator(group_id: str, results: Any) -> None:
    """Have the ids of a generator's tasks fixed before Celery copies the tasks.

    Celery copies each task when it prepares it. The copy has the id of the original only if the
    original was given one before. So each time that a task is published the results are taken a
    few tasks ahead of it, and the generator still runs while its tasks are sent.
    """
    signals.before_task_publish.connect(_take_ahead, weak=False, dispatch_uid=__name__)
    _lazy.results.append((group_id, weakref.ref(results)))
    _lazy.ready[group_id] = 0
    _take_ahead()


def _take_ahead(**kwargs: Any) -> None:
    while _lazy.results:
        group_id, reference = _lazy.results[-1]
        results = reference()
        if results is not None:
            taken = _lazy.ready[group_id] = _lazy.ready[group_id] + 1
            try:
                results[taken + LOOK_AHEAD - 1]
            except IndexError:
                pass
            return
        # The generator has raised an error.
        _forget_generator(group_id)


def _forget_generator(group_id: str) -> None:
    _lazy.results[:] = [entry for entry in _lazy.results if entry[0] != group_id]
    _lazy.ready.pop(group_id, None)


def _serializers(body: Any) -> Tuple[str, ...]:
    """Return the serializers that a body asks for."""
    own = body.options.get("serializer")
    return (own,) if own else ()


def _remember(table: Any, key: str, value: Any) -> None:
    table[key] = value
    table.move_to_end(key)
    while len(table) > MAX_REMEMBERED:
        table.popitem(last=False)
