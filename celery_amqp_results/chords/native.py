"""Chords as Celery calls them: sending, parts that return, and firing the body.

How the parts are collected and who fires is the matter of :mod:`~celery_amqp_results.chords.parts`.
This module does what Celery's Redis backend does with them. Where that backend leaves a chord
hanging or loses its body, this module ends the chord.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import dataclasses
import logging
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, ClassVar, Deque, Dict, Iterator, List, Optional, Tuple

from celery import signals, states
from celery.app.task import Context
from celery.backends.base import Backend
from celery.canvas import _chain, chord, group, maybe_signature
from celery.exceptions import ChordError
from celery.result import GroupResult, ResultSet, allow_join_result, result_from_tuple
from celery.utils.functional import _regen
from celery.utils.nodenames import anon_nodename
from kombu.exceptions import EncodeError

from celery_amqp_results import errors
from celery_amqp_results.amqp import transports
from celery_amqp_results.chords.parts import MAX_QUORUM_PARTS, Gathered, Part, Receipt
from celery_amqp_results.protocol.message import PART, PLAN, StateMessage
from celery_amqp_results.protocol.names import Route

if TYPE_CHECKING:
    from celery_amqp_results.layouts import Layout
    from celery_amqp_results.options import Options

__all__ = ("BodySender", "NativeChords", "Returning")

logger = logging.getLogger(__name__)

Meta = Dict[str, Any]

#: Key of a body's signature that tells the tasks of the header how many they are. Celery 4 had it.
SIZE_KEY = "chord_size"

#: State of a plan.
CHORD_STATE = "CHORD"

#: Chords that this process remembers between sending them and knowing their size, and those whose
#: body it may wait for, at most.
MAX_REMEMBERED = 10_000


@dataclasses.dataclass(frozen=True)
class _Sent:
    """A chord that is being sent."""

    body: Any
    #: The size that its tasks are told; ``None`` where it is not known yet.
    size: Optional[int]
    #: The nesting of the results, where they are not a plain list.
    results: Optional[List[Any]]
    #: The plan, where it was published with the declaration.
    receipt: Optional[Receipt] = None


class Returning:
    """A task of a header that returns: its part goes out together with its state.

    Parameters:
        task_id: the task.
        group_id: id of the header.
        group_index: place in the header.
        size: number of tasks in the header, as far as the task was told.
    """

    def __init__(
        self, task_id: str, group_id: str, group_index: Optional[int], size: Optional[int]
    ) -> None:
        self.task_id = task_id
        self.group_id = group_id
        self.group_index = group_index
        self.size = size
        #: Whether the part is published, and whether the chord may be complete then.
        self.published = False
        self.complete = False


#: The task that is returning in this thread or greenlet.
_returning: contextvars.ContextVar[Optional[Returning]] = contextvars.ContextVar(
    "celery_amqp_results_returning", default=None
)


#: The body that is being sent in this thread or greenlet for a process that waits for it.
_forwarded: contextvars.ContextVar[Optional[str]] = contextvars.ContextVar(
    "celery_amqp_results_forwarded", default=None
)


class NativeChords(Backend):
    """The part of the backend that Celery calls for chords.

    Falls back to what Celery's base class does, a task that polls, where the layout has no chords
    of its own.
    """

    if TYPE_CHECKING:
        options: Options
        _lock: threading.Lock
        _chord_expiration: Optional[int]

        @property
        def layout(self) -> Layout: ...  # noqa: D102

        def _encode_state(
            self, message_id: str, state: str, meta: Any, kind: str, expiration: Optional[int]
        ) -> StateMessage: ...

        def _decode_state(self, state: StateMessage) -> Meta: ...

    #: Messages of :class:`ChordError`; those of Celery's Redis backend.
    DEPENDENCY: ClassVar[str] = "Dependency {} raised {!r}"

    def _reset_chords(self) -> None:
        """Start afresh, as a new process that has opened nothing."""
        self._sent_chords: collections.OrderedDict[str, _Sent] = collections.OrderedDict()
        self._body_groups: collections.OrderedDict[str, str] = collections.OrderedDict()
        self._bodies = BodySender(self.app)

    # -- the sender ----------------------------------------------------------------------------

    def apply_chord(self, header_result_args: Tuple[str, Any], body: Any, **kwargs: Any) -> None:
        """Prepare for the parts of a chord, before its header is sent.

        The size is told to the tasks of the header where it is known: in the body's signature,
        which travels with them. Of a generator nothing is taken.

        Raises:
            ChordError: when a quorum queue cannot hold so many parts.
            DeclarationRefused: when the chord's queue exists with other properties.
            BackendUnavailable: when the broker cannot be reached or refuses us.
        """
        chords = self.layout.chords
        if chords is None:
            super().apply_chord(header_result_args, body, **kwargs)
            return
        self.ensure_chords_allowed()
        group_id, results = header_result_args
        body.pop(SIZE_KEY, None)
        self._expect(body)
        sent = _Sent(body, None, None)
        plan = None
        if not isinstance(results, _regen):
            size = sum(map(_count, results))
            if self.options.queue_type == "quorum" and size > MAX_QUORUM_PARTS:
                raise ChordError(
                    f"a chord of {size} tasks does not fit a quorum queue, which can be read up "
                    f"to {MAX_QUORUM_PARTS} messages at once; split the header, or use the "
                    "option queue_type 'classic'"
                )
            body[SIZE_KEY] = size
            nested = any(isinstance(result, ResultSet) for result in results)
            sent = _Sent(
                body,
                size,
                [result.as_tuple() for result in results] if nested else None,
            )
            if not nested:
                # How many parts a group in the header returns is Celery's to say, later.
                plan = self._encode_plan(group_id, sent)
        while True:
            receipt = chords.declare(group_id, self._chord_expiration, plan, sent.size)
            if receipt is not None:
                break
            self._settle(group_id, body)
        sent = dataclasses.replace(sent, receipt=receipt)
        with self._lock:
            _remember(self._sent_chords, group_id, sent)

    def _expect(self, body: Any) -> None:
        """Have the states of a body pushed to this process, although another one will send it.

        Who waits for a task of its own neither asks the store for it nor binds its shard, which
        would take longer than all else that a small chord takes. A body that has several tasks is
        waited for like the task of somebody else; and so is one that a task sends, since what runs
        it may be somewhere else when it is delivered again.
        """
        body_id = body.options.get("task_id")
        if (
            body_id
            and self.app.current_worker_task is None
            and not isinstance(body, (_chain, group, chord))
            # Celery 3's messages say nothing of their senders.
            and self.app.conf.task_protocol != 1
        ):
            # Celery does the same with a task that is retried.
            body.options["origin"] = anon_nodename()
            self.layout.note_sent(body_id)

    def set_chord_size(self, group_id: str, chord_size: int) -> None:
        """Say how many parts a chord has, just before the last task of its header is sent.

        Does nothing for a chord that this process has not prepared by :meth:`apply_chord`.

        Raises:
            BackendUnavailable: when the broker cannot be reached or refuses us.
        """
        chords = self.layout.chords
        if chords is None:
            super().set_chord_size(group_id, chord_size)
            return
        with self._lock:
            sent = self._sent_chords.pop(group_id, None)
            if sent is None:
                # Before Celery 5.7 a group at the end of a chain in a header has the header's id,
                # and the worker that sends it gives its size for that of the whole.
                logger.debug("chord %s was sent by another process, which gives its size", group_id)
                return
            body_id = sent.body.options.get("task_id")
            if body_id:
                _remember(self._body_groups, body_id, group_id)
        if sent.receipt is not None and sent.receipt.messages and chord_size == sent.size:
            # It cannot be complete: a task is yet to be sent.
            chords.confirm_plan(group_id, sent.receipt)
            return
        plan = self._encode_plan(group_id, sent)
        if chords.publish_plan(plan, chord_size, sent.size):
            self._settle(group_id, sent.body)

    def _encode_plan(self, group_id: str, sent: _Sent) -> StateMessage:
        for known in (dict(sent.body), None):
            content = {
                "status": CHORD_STATE,
                "result": {"body": known, "results": sent.results},
            }
            try:
                return self._encode_state(group_id, CHORD_STATE, content, PLAN, None)
            except (EncodeError, TypeError, ValueError):
                # The body has arguments that tasks may have and results may not. Every part comes
                # with the body; only a waiting client could not take over.
                if known is None:
                    raise
        raise AssertionError("unreachable")  # pragma: no cover

    def add_to_chord(self, chord_id: str, result: Any) -> None:
        """Have the chord wait for one task more. To be called by a task of its header.

        Raises:
            BackendUnavailable: when the broker cannot be reached or refuses us.
        """
        chords = self.layout.chords
        if chords is None:
            super().add_to_chord(chord_id, result)
            return
        chords.publish_more(chord_id)

    # -- the worker: parts ---------------------------------------------------------------------

    def mark_as_done(
        self,
        task_id: str,
        result: Any,
        request: Any = None,
        store_result: bool = True,
        state: str = states.SUCCESS,
    ) -> None:
        """Store a result, together with the part of a chord; fire the chord if that completes it.

        Raises:
            ResultTooLarge: when the broker refuses a message of this size. The chord fails.
            BackendUnavailable: when the broker did not confirm it; it may be stored or not.
        """
        with self._return_with_state(task_id, request):
            super().mark_as_done(task_id, result, request, store_result, state)

    def mark_as_failure(
        self,
        task_id: str,
        exc: BaseException,
        traceback: Any = None,
        request: Any = None,
        store_result: bool = True,
        call_errbacks: bool = True,
        state: str = states.FAILURE,
    ) -> None:
        """Store a failure like :meth:`mark_as_done`, and call what is to be called on errors."""
        with self._return_with_state(task_id, request):
            super().mark_as_failure(
                task_id, exc, traceback, request, store_result, call_errbacks, state
            )

    def mark_as_revoked(
        self,
        task_id: str,
        reason: str = "",
        request: Any = None,
        store_result: bool = True,
        state: str = states.REVOKED,
    ) -> None:
        """Store that a task was revoked, like :meth:`mark_as_done`."""
        with self._return_with_state(task_id, request):
            super().mark_as_revoked(task_id, reason, request, store_result, state)

    @contextlib.contextmanager
    def _return_with_state(self, task_id: str, request: Any) -> Iterator[None]:
        returning = self._returning_of(request)
        if returning is None or returning.task_id != task_id:
            yield
            return
        token = _returning.set(returning)
        try:
            yield
        except errors.ResultTooLarge as exc:
            # What the task returned will never get here: the chord must not wait for it.
            if not returning.published:
                self.on_chord_part_return(request, states.FAILURE, exc)
            raise
        finally:
            _returning.reset(token)

    def _returning_of(self, request: Any) -> Optional[Returning]:
        if not request or not request.chord or self.layout.chords is None:
            return None
        if not request.id or not request.group:
            return None
        size = request.chord.get(SIZE_KEY) if isinstance(request.chord, dict) else None
        return Returning(request.id, request.group, request.group_index, size)

    def _publish_with_part(
        self, task_id: str, part: StateMessage, state: StateMessage, route: Route
    ) -> bool:
        """Publish a final state together with the part that the task returns, if it returns one.

        Returns ``False`` where it does not; nothing is published then.

        Parameters:
            task_id: the task.
            part: what the task returns.
            state: its state, which is *part* or a pointer to it.
            route: the route of the state.
        """
        returning = _returning.get()
        if returning is None or returning.task_id != task_id or returning.published:
            return False
        self._publish_part(returning, part, (state, route))
        return True

    def _publish_part(
        self,
        returning: Returning,
        part: StateMessage,
        state: Optional[Tuple[StateMessage, Route]] = None,
    ) -> None:
        chords = self.layout.chords
        assert chords is not None
        returning.complete = chords.publish_part(
            returning.group_id,
            dataclasses.replace(part, kind=PART, expiration=None),
            returning.group_index,
            returning.size,
            state,
        )
        returning.published = True

    def on_chord_part_return(self, request: Any, state: str, result: Any, **kwargs: Any) -> None:
        """Add what a task of a header returned to its chord; fire the chord if it is complete.

        May be called any number of times for a task; the first call counts.

        Raises:
            kombu.exceptions.EncodeError: when the serializer cannot encode the result.
            ResultTooLarge: when the broker refuses a message of this size.
            BackendUnavailable: when the broker cannot be reached or refuses us.
        """
        if self.layout.chords is None:
            super().on_chord_part_return(request, state, result, **kwargs)
            return
        returning = _returning.get()
        if returning is None or returning.task_id != request.id or not returning.published:
            returning = self._returning_of(request)
            if returning is None:
                return
            content = {
                "status": state,
                "result": self.encode_result(result, state),
                "task_id": returning.task_id,
            }
            self._publish_part(
                returning, self._encode_state(returning.task_id, state, content, PART, None)
            )
        if returning.complete:
            # Once is enough.
            returning.complete = False
            self._settle(returning.group_id, request.chord)

    # -- firing --------------------------------------------------------------------------------

    def _settle(self, group_id: str, body: Any) -> bool:
        """Fire a chord if it is complete; return whether it was fired here.

        Parameters:
            group_id: id of the header.
            body: signature of the body; ``None`` for the one in the plan.
        """
        chords = self.layout.chords
        assert chords is not None

        def fire(gathered: Gathered) -> None:
            self._fire(group_id, body, gathered)

        try:
            return chords.settle(group_id, fire)
        except errors.BackendUnavailable:
            logger.exception("chord %s was not fired, though it may be complete", group_id)
            raise

    def is_sent_body(self, task_id: str) -> bool:
        """Return whether a task is the body of a chord that this process sent. Does no I/O."""
        return task_id in self._body_groups

    def settle_body(self, body_id: str) -> None:
        """Look whether a chord that this process sent is complete and was left by its last worker.

        What a waiting process calls now and then, after a long time without an answer. Does
        nothing for anything but the body of such a chord. Raises nothing.
        """
        group_id = self._body_groups.get(body_id)
        if group_id is None or self.layout.chords is None:
            return
        try:
            if self._settle(group_id, None):
                logger.warning(
                    "chord %s was complete, and is fired by the waiting process",
                    group_id,
                )
        except Exception:
            logger.exception("chord %s could not be looked at", group_id)

    def _settle_after_reading(self, content: Meta) -> None:
        """Look whether the chord of a finished task was left by a worker that died.

        When a child of a worker is killed, or a task is delivered a second time, Celery reads the
        task's state; finding that it has succeeded it does nothing more. The part of that task
        may have been the last one, and the one who was to fire the chord may be the one who was
        killed. So here the chord is looked at, but only by workers, and not while they run a
        task: nobody else reads states for that reason. Raises nothing.
        """
        group_id = content.get("group_id")
        if (
            not _worker_processes
            or not group_id
            or content["status"] != states.SUCCESS
            or self.layout.chords is None
            or self.app.current_worker_task is not None
        ):
            return
        try:
            if self.layout.chords.is_open(group_id) and self._settle(group_id, None):
                logger.warning(
                    "chord %s was complete, and is fired for a process that died", group_id
                )
        except Exception:
            logger.exception("chord %s could not be looked at", group_id)

    def _fire(self, group_id: str, body: Any, gathered: Gathered) -> None:
        try:
            known, nesting = self._read_plan(gathered.plan)
        except errors.BackendUnavailable:
            raise
        except Exception as exc:
            unreadable = f"its plan, a message in its queue, cannot be read: {exc!r:.300}"
            if body is None:
                raise ChordError(f"chord {group_id} cannot be fired here: {unreadable}") from exc
            # The nesting of the results is not known: better none than wrong ones.
            logger.error("Chord %r fails: %s", group_id, unreadable)
            self.chord_error_from_stack(
                _signature(body, self.app), _chord_error(f"Plan error: {exc!r:.300}", exc)
            )
            return
        signature = _signature(body if body is not None else known, self.app)
        if signature is None:
            raise ChordError(f"chord {group_id}: nobody here knows its body")
        if gathered.attempted and self._has_run(signature):
            logger.info("chord %s: its body was sent by a process that has died since", group_id)
            return
        try:
            results = self._results(gathered.parts, nesting, group_id)
        except ChordError as exc:
            logger.exception("Chord %r raised: %r", group_id, exc)
            self.chord_error_from_stack(signature, exc)
            return
        except Exception as exc:
            logger.exception("Chord %r raised: %r", group_id, exc)
            self.chord_error_from_stack(signature, _chord_error(f"Join error: {exc!r}", exc))
            return
        origin = signature.options.get("origin")
        forwarded = origin is not None and origin != anon_nodename()
        token = _forwarded.set(signature.options.get("task_id") if forwarded else None)
        try:
            self._bodies.send(signature, results)
        except Exception as exc:
            logger.exception("Chord callback for %r raised: %r", group_id, exc)
            self.chord_error_from_stack(signature, _chord_error(f"Callback error: {exc!r}", exc))
        finally:
            _forwarded.reset(token)

    @staticmethod
    def _sends_for_another(task_id: str) -> bool:
        """Return whether a task is a body whose states go to the process that sent its chord."""
        return _forwarded.get() == task_id

    def chord_error_from_stack(self, callback: Any, exc: Optional[BaseException] = None) -> Any:
        """Fail the body of a chord, whose header or whose sending has failed.

        Celery stops there. A body may be a task of the header of another chord, which would then
        wait for ever: here that one gets its part.
        """
        if exc is None:
            exc = sys.exc_info()[1]
        info = super().chord_error_from_stack(callback, exc)
        if self.layout.chords is not None:
            for signature in _last_links(callback, self.app):
                options = signature.options
                if options.get("chord"):
                    request = Context(
                        id=options.get("task_id"),
                        group=options.get("group_id"),
                        group_index=options.get("group_index"),
                        chord=options["chord"],
                    )
                    self.on_chord_part_return(request, states.FAILURE, exc)
        return info

    def _has_run(self, signature: Any) -> bool:
        body_id = signature.options.get("task_id")
        # Not that it was sent: that is noted before it is true.
        return bool(body_id) and self.layout.poll((body_id,))[body_id] is not None

    def _read_plan(self, plan: StateMessage) -> Tuple[Any, Optional[List[Any]]]:
        """Return the body of a chord, where the plan has it, and the nesting of its results.

        Raises:
            Exception: of many kinds, when the message is not what a sender of ours writes.
        """
        content = self._decode_state(plan)["result"]
        return content["body"], content["results"]

    def _results(self, parts: List[Part], nesting: Optional[List[Any]], group_id: str) -> List[Any]:
        """Return what the parts returned, in the order and nesting of the header.

        Raises:
            ChordError: when one of them failed; of several the first in order.
        """
        if nesting is None:
            return [self._value(part) for part in parts]
        by_id = {part.task_id: part for part in parts}
        results = [result_from_tuple(node, app=self.app) for node in nesting]
        try:
            return [self._nested(node, by_id) for node in results]
        except KeyError:
            # A part came from a task that stands for another: the results themselves are asked.
            group = GroupResult(group_id, results, app=self.app)
            with allow_join_result():
                joined: List[Any] = group.join_native(
                    timeout=self.app.conf.result_chord_join_timeout, propagate=True
                )
            return joined

    def _nested(self, node: Any, by_id: Dict[str, Part]) -> Any:
        if isinstance(node, ResultSet):
            return [self._nested(child, by_id) for child in node.results]
        return self._value(by_id[node.id])

    def _value(self, part: Part) -> Any:
        content = self._decode_state(part.state)
        if content["status"] in states.PROPAGATE_STATES:
            cause = content["result"]
            raise _chord_error(self.DEPENDENCY.format(part.task_id, cause), cause)
        return content["result"]


class BodySender:
    """Sends the bodies of chords, and knows that the broker has them where it can say so.

    Celery does not wait for confirms unless told to. Here the queue with all results is deleted
    after the body is sent, so that on RabbitMQ the body is confirmed before, whatever the
    settings say. The tasks of a body that is itself a chord are sent like any other of the app.

    Parameters:
        app: the Celery app.

    Thread-safe. After a fork the child must make a new one.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._idle: Deque[Tuple[float, Any]] = collections.deque()

    def send(self, signature: Any, results: List[Any]) -> None:
        """Send *signature* with *results*.

        Raises:
            Exception: what Celery, kombu or the serializer raises when it cannot be published.
        """
        app = self._app
        retry_publish = getattr(app.amqp, "_retry_publish", _call)
        with self._producer() as producer:
            retry_publish(signature.apply_async, (results,), producer=producer)

    @contextlib.contextmanager
    def _producer(self) -> Iterator[Any]:
        """Lend a producer; one on which the block raises is not used again."""
        producer = None
        with self._lock:
            while self._idle and producer is None:
                since, producer = self._idle.pop()
                if time.monotonic() - since > IDLE_SECONDS:
                    producer.connection.collect()
                    producer = None
        if producer is None:
            connection = self._app.connection_for_write()
            if transports.is_amqp(connection):
                connection = self._app.connection_for_write(
                    transport_options={"confirm_publish": True}
                )
            producer = self._app.amqp.Producer(connection)
        try:
            yield producer
        except BaseException:
            with contextlib.suppress(Exception):
                producer.connection.collect()
            raise
        with self._lock:
            self._idle.append((time.monotonic(), producer))

    def close(self) -> None:
        """Close the connections."""
        with self._lock:
            idle, self._idle = self._idle, collections.deque()
        for _, producer in idle:
            with contextlib.suppress(Exception):
                producer.connection.release()


#: A connection that has not sent a body for so many seconds is not trusted any more.
IDLE_SECONDS = 30.0


#: Says that this is a worker: the process id of its main process. Its children inherit it.
_worker_processes: List[int] = []


def _note_worker(**kwargs: Any) -> None:
    _worker_processes.append(os.getpid())


signals.worker_init.connect(_note_worker, weak=False)


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _remember(table: Any, key: str, value: Any) -> None:
    table[key] = value
    table.move_to_end(key)
    while len(table) > MAX_REMEMBERED:
        table.popitem(last=False)


def _count(result: Any) -> int:
    """Return how many parts come back for one element of a header."""
    if isinstance(result, ResultSet):
        return sum(map(_count, result.results))
    return 1


def _signature(body: Any, app: Any) -> Any:
    if body is None:
        return None
    # Celery does not know the key, and would take it for an option.
    plain = {key: value for key, value in dict(body).items() if key != SIZE_KEY}
    return maybe_signature(plain, app=app)


def _chord_error(message: str, cause: Any) -> ChordError:
    error = ChordError(message)
    if isinstance(cause, BaseException):
        error.__cause__ = cause
    return error


def _last_links(signature: Any, app: Any) -> Iterator[Any]:
    """Yield the simple signatures whose results stand for the result of *signature*."""
    signature = maybe_signature(signature, app=app)
    if isinstance(signature, chord):
        if signature.body is not None:
            yield from _last_links(signature.body, app)
    elif isinstance(signature, group):
        for task in signature.tasks:
            yield from _last_links(task, app)
    elif isinstance(signature, _chain):
        if signature.tasks:
            yield from _last_links(signature.tasks[-1], app)
    else:
        yield signature
