"""Recording the states of tasks: encodes states and marks, and passes them to the layout.

It may import ``layouts``, ``config`` and what is below them, and knows nothing of Celery's backend
class.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import datetime
import logging
import os
from typing import Any, Callable, Iterable, Iterator, Mapping, Optional, Tuple

import kombu
from celery.app.task import Context
from celery.result import GroupResult

from celery_amqp_results.chords.firing import sends_for_another
from celery_amqp_results.config import BackendConfig
from celery_amqp_results.layouts import KeepsMarks, KeepsParts, Layout, NotesSent
from celery_amqp_results.library_types import App, Meta
from celery_amqp_results.protocol import expiry
from celery_amqp_results.protocol.clock import PublishClock
from celery_amqp_results.protocol.ids import plain_ids
from celery_amqp_results.protocol.message import GROUP, NOT_AN_END, PART, STATE, StateMessage
from celery_amqp_results.protocol.names import ABSENT, BROADCAST, Route, client_word
from celery_amqp_results.protocol.ranking import ABORTED, is_final
from celery_amqp_results.store import marks as tracking
from celery_amqp_results.toolkit.bounded import OnceLogger

__all__ = ("Recorder", "plain_meta", "task_ends", "without_arguments")

logger = logging.getLogger(__name__)

_clock = PublishClock()

_NOT_GIVEN = object()

#: The state of a saved group, in header and body.
GROUP_STATE = "GROUP"

#: The task of a chord's header whose final state was just stored in this thread or greenlet, and
#: the id of the header.
_stored: contextvars.ContextVar[Optional[Tuple[str, Optional[str]]]] = contextvars.ContextVar(
    "celery_amqp_results_stored", default=None
)

#: Whether Celery is reporting in this thread or greenlet that a task has ended.
_ending: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "celery_amqp_results_ending", default=False
)

#: The task of a chord's header that has stored a final state itself in this thread or greenlet.
_unended: contextvars.ContextVar[Optional[str]] = contextvars.ContextVar(
    "celery_amqp_results_unended", default=None
)


@contextlib.contextmanager
def task_ends() -> Iterator[None]:
    """Count the final states that are stored in a ``with`` block as the ends of their tasks.

    A task may store any state of itself while it runs, even SUCCESS, with ``update_state``.
    """
    token = _ending.set(True)
    try:
        yield
    finally:
        _ending.reset(token)


class Recorder:
    """Encodes states and publishes them. Thread-safe.

    Parameters:
        layout: returns the layout of this process.
    """

    def __init__(self, app: App, config: BackendConfig, layout: Callable[[], Layout]) -> None:
        self._app = app
        self._config = config
        self._layout = layout
        self._complaints = OnceLogger(logger)

    def encode(
        self,
        message_id: str,
        state: str,
        meta: Mapping[str, object],
        kind: str,
        expiration: Optional[int],
    ) -> StateMessage:
        """Return *meta* as a message that was published now.

        Raises:
            kombu.exceptions.EncodeError: when the serializer cannot encode it.
            ResultTooLarge: when a result to compress is larger than readers would decompress.
        """
        content_type, content_encoding, compression, body = self._config.codec.encode(meta)
        return StateMessage(
            message_id,
            state,
            _clock.now(),
            body,
            content_type,
            content_encoding,
            compression,
            expiration,
            kind,
        )

    def record(self, task_id: str, state: str, meta: Mapping[str, object], request: object) -> None:
        """Publish a state of a task, which may have a request.

        Raises:
            kombu.exceptions.EncodeError, ResultTooLarge: see :meth:`encode`.
            BackendUnavailable, DeclarationRefused: see :meth:`Layout.publish`.
        """
        layout, config = self._layout(), self._config
        expiration = self._expiration_of(state, request)
        meta = {**meta, "task_id": task_id}
        message = self.encode(task_id, state, config.shape(meta), STATE, expiration)
        route = _route_of(request)
        counts = route.in_chord and is_final(state)
        if counts and not (_ending.get() and _unended.get() != task_id):
            # The task returns later, and may have an earlier state that outranks its end. Its
            # return value is published as a part.
            _unended.set(task_id)
            counts, route = False, dataclasses.replace(route, in_chord=False)
            message = dataclasses.replace(message, amended=NOT_AN_END)
        part = None
        if counts and _shorter(message.expiration, config.expirations.chord):
            part = dataclasses.replace(message, kind=PART, expiration=config.expirations.chord)
        # ABORTED counts as final here, since a client that aborts a task relies on it.
        final = is_final(state) or state == ABORTED
        layout.publish(message, route, final, part)
        if counts:
            _stored.set((task_id, route.group_id))
        if config.options.track_sent and is_final(state):
            # Losing a mark does little harm, so its confirm is not waited for.
            expiration = tracking.ended_expiration(message.expiration)
            self._marks().mark(
                [tracking.mark(task_id, tracking.ENDED, _clock.now(), expiration)], False
            )

    def record_part(self, task_id: str, group_id: str, meta: Mapping[str, Any]) -> None:
        """Publish the return value of a chord's header task, unless its state was just stored.

        Raises:
            kombu.exceptions.EncodeError, ResultTooLarge: see :meth:`encode`.
            BackendUnavailable: when the broker cannot be reached or refuses us.
        """
        stored = _stored.get()
        _stored.set(None)
        if stored == (task_id, group_id):
            return
        layout = self._layout()
        assert isinstance(layout, KeepsParts)
        part = self.encode(task_id, meta["status"], meta, PART, self._config.expirations.chord)
        layout.publish_part(part, group_id)

    def save_group(self, group_id: str, group: GroupResult) -> None:
        """Keep a group: its id and those of its members.

        Raises:
            kombu.exceptions.EncodeError, ResultTooLarge: see :meth:`encode`.
            BackendUnavailable: when the broker cannot be reached or refuses us.
        """
        members = plain_ids(group.as_tuple())
        meta = {"status": GROUP_STATE, "group_id": group_id, "result": members}
        shape, expiration = self._config.shape(meta), self._config.expirations.result
        self._layout().save_group(self.encode(group_id, GROUP_STATE, shape, GROUP, expiration))

    def note_awaited(self, task_id: str) -> None:
        """Have the states of a task pushed to this process, where the layout does. No I/O."""
        layout = self._layout()
        if isinstance(layout, NotesSent):
            layout.note_sent(task_id)

    def note_sent(self, task_id: str, producer: kombu.Producer) -> None:
        """Note that a task is about to be sent by *producer*. Does not wait for the broker."""
        current = self._app.current_worker_task
        # A retried or replaced task keeps its first sender.
        retried = current is not None and current.request.id == task_id
        if not retried and not sends_for_another(task_id):
            self.note_awaited(task_id)
        if self._config.options.track_sent:
            connection = producer.connection
            if self._config.broker.is_that_of(connection):
                self._marks().mark_sent(connection, self._mark(task_id, tracking.SENT))

    def mark_forgotten(self, ids: Iterable[str]) -> None:
        """With ``track_sent``, publish that tasks were forgotten.

        Raises:
            BackendUnavailable, DeclarationRefused: see :meth:`Layout.mark`.
        """
        if self._config.options.track_sent:
            marks = [self._mark(task_id, tracking.FORGOTTEN) for task_id in ids]
            self._marks().mark(marks, True)

    def _marks(self) -> KeepsMarks:
        layout = self._layout()
        # The option 'track_sent' is refused for other layouts.
        assert isinstance(layout, KeepsMarks)
        return layout

    def _mark(self, task_id: str, name: str) -> StateMessage:
        return tracking.mark(task_id, name, _clock.now(), self._config.expirations.result)

    def _expiration_of(self, state: str, request: object) -> Optional[int]:
        """Return the milliseconds after which a state expires, ``None`` for never."""
        for where, seconds in self._own_expiries(request):
            try:
                return expiry.milliseconds(seconds)
            except ValueError as exc:
                text = f"{where} is of no use, and result_expires applies: {exc}"
                self._complaints.log(logging.WARNING, text, "%s", text)
        return self._config.expirations.of(state)

    def _own_expiries(self, request: object) -> Iterator[Tuple[str, object]]:
        """Yield a task's own expiries and their sources, the one with precedence first."""
        if request is None:
            return
        # A header of the message becomes an attribute, except for a task that is called eagerly.
        own = getattr(request, expiry.NAME, _NOT_GIVEN)
        if own is _NOT_GIVEN:
            own = (getattr(request, "headers", None) or {}).get(expiry.NAME, _NOT_GIVEN)
        if own is not _NOT_GIVEN:
            yield f"the header {expiry.NAME!r} of a task", own
        name = getattr(request, "task", None)
        task = self._app.tasks.get(name) if isinstance(name, str) else None
        own = getattr(task, expiry.NAME, _NOT_GIVEN)
        if own is not _NOT_GIVEN:
            yield f"the attribute {expiry.NAME!r} of the task {name}", own


def plain_meta(state: str, result: object, traceback: object, request: object, app: App) -> Meta:
    """Return the meta of a state, without what ``result_extended`` adds, except its children.

    It equals the one of Celery 5.5 and newer, and takes a third of the time: Celery reads
    ``result_extended`` for every state, and converts between time zones by way of a third one.
    """
    done = datetime.datetime.now(app.timezone).isoformat() if is_final(state) else None
    meta = {
        "status": state,
        "result": result,
        "traceback": traceback,
        "children": None,
        "date_done": done,
    }
    for name, key in (("group", "group_id"), ("parent_id", "parent_id")):
        value = getattr(request, name, None)
        if request and value:
            meta[key] = value
    return meta


def without_arguments(meta: Mapping[str, object]) -> Mapping[str, object]:
    """Return *meta* without the arguments of the task, which may be long."""
    return {k: None if k in ("args", "kwargs") else value for k, value in meta.items()}


def _route_of(request: object) -> Route:
    """Return the route of the states of the task of *request*."""
    group_id = getattr(request, "group", None)
    return Route(_client_of(request), group_id, bool(group_id and getattr(request, "chord", None)))


def _client_of(request: object) -> str:
    """Return the routing key's word for the process that sent the task of *request*."""
    origin = getattr(request, "origin", None)
    if origin and not getattr(request, "replaced_task_nesting", 0):
        return client_word(origin)
    if isinstance(request, Context) and request.hostname and not origin:
        # The message does not name its sender, which therefore cannot rely on pushed states.
        return ABSENT
    # There is no request, it was constructed, or another process has replaced the task. The sender
    # is unknown, but may be waiting.
    return BROADCAST


def _shorter(expiration: Optional[float], other: Optional[float]) -> bool:
    """Return whether an expiration (``None`` for never) is before another."""
    return expiration is not None and (other is None or expiration < other)


os.register_at_fork(after_in_child=_clock.after_fork_in_child)
