"""The result backend, as Celery calls it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any, ClassVar, Dict, List, Optional, Tuple, Type, Union

import celery
import kombu
from celery import states
from celery.app.task import Context
from celery.backends.base import Backend
from celery.canvas import Signature

from celery_amqp_results import errors
from celery_amqp_results.amqp.failures import TRANSIENT, was_refused
from celery_amqp_results.celery4.api import Celery4API
from celery_amqp_results.celery4.consumer import Consumer
from celery_amqp_results.celery4.producer import Exchange, Producer
from celery_amqp_results.chords.firing import call_errbacks
from celery_amqp_results.chords.hooks import ChordHooks
from celery_amqp_results.config import BackendConfig, Location, Own, expiry_of
from celery_amqp_results.errors import BacklogLimitExceeded
from celery_amqp_results.layouts import Layout
from celery_amqp_results.library_types import Meta, TaskResult
from celery_amqp_results.metrics import Metrics
from celery_amqp_results.per_task.lookups import BACKLOG_LIMIT
from celery_amqp_results.per_task.wire import NoCacheQueue
from celery_amqp_results.protocol.ids import id_text, state_name
from celery_amqp_results.protocol.ranking import is_final
from celery_amqp_results.reading import Reader
from celery_amqp_results.recording import Recorder, plain_meta, task_ends, without_arguments
from celery_amqp_results.registry import OwnLayout
from celery_amqp_results.store.marks import Fate
from celery_amqp_results.toolkit.delegation import delegated
from celery_amqp_results.waiting.groups import ask_in_one_pass
from celery_amqp_results.waiting.waits import Patience, Waits

__all__ = ("AMQPBackend", "BacklogLimitExceeded")

logger = logging.getLogger(__name__)

#: Celery before 5.5 stores the end time of a task in UTC.
DATES_IN_ZONE_OF_APP = celery.VERSION >= (5, 5)

OnMessage = Callable[[Meta], object]
OnInterval = Callable[[], object]


class AMQPBackend(Backend):
    """Stores task results in RabbitMQ, and pushes them to waiting clients.

    Parameters:
        app: the Celery app.
        connection: not used; the connection is made from the URL.
        exchange: first part of all names, and in the layout ``per-task`` the exchange's name; the
            setting ``result_exchange`` by default.
        exchange_type: type of that exchange; the setting ``result_exchange_type`` by default.
        persistent: whether results survive a restart of the broker; the setting
            ``result_persistent`` by default, and otherwise true.
        serializer: kombu's name of a serializer; the setting ``result_serializer`` by default.
        auto_delete: whether a task's queue in that layout goes with its last consumer.
        **kwargs: ``url``, the result backend URL (``None`` or ``amqp://`` for the app's broker),
            and others of Celery's base class.

    Raises:
        InvalidOption: when an option is unknown or its value is not allowed.

    One instance serves all threads and greenlets of a process. After a fork, the child opens
    connections of its own. Nothing is opened before it is needed.
    """

    supports_native_join = True
    supports_autoexpire = True
    supports_result_compression = True
    supports_failure_expires = True
    persistent = True
    #: A group calls its callbacks when its last member is ready.
    is_async = True

    retry_policy: ClassVar[Dict[str, Any]] = {
        "max_retries": 20,
        "interval_start": 0,
        "interval_step": 1,
        "interval_max": 1,
    }

    def __init__(
        self,
        app: celery.Celery,
        connection: object = None,
        exchange: Optional[str] = None,
        exchange_type: Optional[str] = None,
        persistent: Optional[bool] = None,
        serializer: Optional[str] = None,
        auto_delete: bool = True,
        **kwargs: Any,
    ) -> None:
        location = Location.read(app, kwargs.get("url"), kwargs.pop("options", None))
        purpose = kwargs.pop("purpose", "")
        shared = location.layout_name == "shared"
        # Celery 4's format has no place for either; Celery warns if they are set.
        self.supports_result_compression = self.supports_failure_expires = shared
        super().__init__(app, serializer=serializer, **kwargs)
        self._arguments: Dict[str, Any] = dict(
            kwargs,
            exchange=exchange,
            exchange_type=exchange_type,
            persistent=persistent,
            serializer=serializer,
            auto_delete=auto_delete,
        )
        #: One instance serves all threads, whatever the setting says.
        self.thread_safe = True
        self.persistent = self.prepare_persistent(persistent)
        self.expires = expiry_of("result_expires", self.prepare_expires(kwargs.get("expires")))
        own = Own(exchange, exchange_type, self.persistent, auto_delete, self.expires, purpose)
        #: Everything that was read from the settings, the URL and the arguments.
        self.config = BackendConfig.complete(app.conf, location, own, self.serializer, self.accept)
        self.options, self.layout_name = location.options, location.layout_name
        self._layout = OwnLayout(app, self.config)
        #: Stores the states of tasks.
        self.recorder = Recorder(app, self.config, self._layout)
        #: Reads them.
        self.reader = Reader(self.config, self._layout, self.meta_from_decoded)
        #: Waits for tasks.
        self.waits = Waits(self._layout, self.reader)
        #: Sends chords and completes them.
        self.chords = ChordHooks(
            app, lambda: self._layout().chords, self.recorder, self.config.expirations.chord
        )
        ask_in_one_pass(app)
        self._layout.reset_after_fork(self.reader, self.waits)
        #: Does what Celery 4's methods did.
        self.celery4 = Celery4API(self)
        self.exchange = self.celery4.exchange()
        self.delivery_mode, self.auto_delete = self.config.wire.delivery_mode, auto_delete

    def clone(self, purpose: str, **options: object) -> AMQPBackend:
        """Return a backend like this one, with connections of its own and other options.

        Clones with the same *purpose* and options share connections. The options are named and
        checked as in ``result_backend_transport_options``.
        """
        changed = self.options.changed(options)
        return type(self)(self.app, purpose=purpose, options=changed, **self._arguments)

    @property
    def layout(self) -> Layout:
        """Where the results are kept. Making it does no I/O."""
        return self._layout()

    def metrics(self) -> Metrics:
        """Return counts of this process, of all equal backends of the app. Does no I/O."""
        return self._layout.metrics()

    def as_uri(self, include_password: bool = True) -> str:
        """Return the result backend URL, with ``**`` for the password unless that is included."""
        return self.config.url.complete() if include_password else self.config.url.sanitized()

    def __reduce__(self, args: Tuple[Any, ...] = (), kwargs: Optional[Meta] = None) -> Any:
        """Pickle as its arguments; the app is the one of the unpickling process."""
        return super().__reduce__(args, dict(self._arguments, url=self.url, **(kwargs or {})))

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.as_uri(include_password=False)}>"

    def close(self) -> None:
        """Close all connections and end all threads; waiting calls raise an error.

        Equal backends of the app share them. The backend can be used again, and then reconnects.
        """
        self.waits.close()
        self._layout.close()

    # -- storing -----------------------------------------------------------------------------

    def on_task_call(self, producer: kombu.Producer, task_id: str) -> Meta:
        """Note that a task is about to be sent; with ``track_sent``, publish a mark with it."""
        self.recorder.note_sent(id_text(task_id), producer)
        return {}

    def _store_result(
        self,
        task_id: str,
        result: Any,
        state: str,
        traceback: object = None,
        request: object = None,
        **kwargs: object,
    ) -> Any:
        task_id, name = id_text(task_id), state_name(state)
        meta = self._get_result_meta(result, state, traceback, request)
        try:
            self.recorder.record(task_id, name, meta, request)
        except errors.ResultTooLarge as exc:
            # Celery turns a SUCCESS into a FAILURE with this error. For a FAILURE that is too large
            # itself, a short state must be stored, or waiting clients would wait for ever.
            if not is_final(state) or state == states.SUCCESS:
                raise
            logger.error("task %s ended with %s, which is stored without details", task_id, exc)
            meta = self._get_result_meta(self.encode_result(exc, state), state, None, request)
            self.recorder.record(task_id, name, without_arguments(meta), request)
        return result

    def _get_result_meta(self, result: Any, state: str, traceback: object, request: object) -> Any:
        if self.config.wire.extended or not DATES_IN_ZONE_OF_APP:
            return super()._get_result_meta(result, state, traceback, request)
        meta = plain_meta(state, result, traceback, request, self.app)
        meta["children"] = self.current_task_children(request)
        return meta

    def mark_as_done(self, *args: Any, **kwargs: Any) -> None:
        """Store what a task has returned, and count it as its end."""
        with task_ends():
            super().mark_as_done(*args, **kwargs)

    def mark_as_failure(self, *args: Any, **kwargs: Any) -> None:
        """Store the failure of a task, and count it as its end."""
        with task_ends():
            super().mark_as_failure(*args, **kwargs)

    def mark_as_revoked(self, *args: Any, **kwargs: Any) -> None:
        """Store that a task was revoked, and count it as its end."""
        with task_ends():
            super().mark_as_revoked(*args, **kwargs)

    def exception_safe_to_retry(self, exc: BaseException) -> bool:
        """Return whether a retry may help: the broker is unreachable, but has not refused."""
        return isinstance(exc, TRANSIENT) and not was_refused(exc)

    # -- reading -----------------------------------------------------------------------------

    def get_task_meta(
        self, task_id: str, backlog_limit: int = BACKLOG_LIMIT, cache: bool = True
    ) -> Any:
        """Return the current meta of a task; a pending one if nothing is known of it.

        The second parameter is *backlog_limit* in Celery 4, and *cache* in Celery 5, which passes
        it by name. A second positional argument that is true or false is treated as *cache*.

        Raises:
            LookupTimeout, BackendUnavailable: when the store could not be read.
            kombu.exceptions.ContentDisallowed, ForeignMessage: when the state cannot be decoded.

        Reading changes nothing: after an error it is safe to ask again.
        """
        if isinstance(backlog_limit, bool):
            cache, backlog_limit = backlog_limit, BACKLOG_LIMIT
        task_id = id_text(task_id)
        if backlog_limit != BACKLOG_LIMIT:
            return self.celery4.get_task_meta(task_id, backlog_limit, cache)
        return super().get_task_meta(task_id, cache=cache)

    def _get_task_meta_for(self, task_id: str) -> Meta:
        return self.reader.meta(id_text(task_id))

    def is_cached(self, task_id: str) -> bool:
        """Return whether this process knows how a task has ended, for Celery's polling chords."""
        task_id = id_text(task_id)
        return task_id in self._cache or self.reader.knows_failed(task_id)

    def task_result_exists(self, task_id: str) -> bool:
        """Return whether a state is kept or, with ``track_sent``, whether the task was sent."""
        return self.fate(task_id).status in ("stored", "sent")

    def fate(self, task_id: str) -> Fate:
        """Return what is known of a task; with ``track_sent``, also of one without a state."""
        return self.reader.fate(id_text(task_id))

    def forget(self, task_id: object) -> None:
        """Delete everything kept of a task. After an error, forgetting again is safe."""
        super().forget(id_text(task_id))

    def _forget(self, task_id: str) -> None:
        self.forget_all((task_id,))

    def forget_all(self, ids: Collection[str]) -> None:
        """Delete everything kept of several tasks, as :meth:`forget` does, with fewer look-ups."""
        for task_id in ids:
            self._cache.pop(task_id, None)
            self.reader.forget(task_id)
        self.layout.forget(ids)
        self.recorder.mark_forgotten(ids)

    # -- waiting -----------------------------------------------------------------------------

    watch = delegated("waits", Waits.watch)

    def wait_for_pending(
        self,
        result: TaskResult,
        timeout: Optional[float] = None,
        interval: Optional[float] = None,
        no_ack: bool = True,
        on_message: Optional[OnMessage] = None,
        on_interval: Optional[OnInterval] = None,
        callback: Optional[Callable[[str, Any], object]] = None,
        propagate: bool = True,
        **kwargs: object,
    ) -> Any:
        """Wait until *result* is ready and return its value, for ``AsyncResult.get``."""
        self._ensure_not_eager()
        # The promise of AsyncResult.get has a function where Celery asks for the parents with it.
        asks = on_interval is not None and getattr(on_interval, "fun", None) is not None
        if on_interval is not None and asks:
            on_interval = self.reader.without_parents(result, on_interval)
        self.waits.wait_for(result, Patience(timeout, interval, on_interval), on_message, asks)
        return result.maybe_throw(callback=callback, propagate=propagate)

    def iter_native(
        self,
        result: TaskResult,
        timeout: Optional[float] = None,
        interval: Optional[float] = None,
        no_ack: bool = True,
        on_message: Optional[OnMessage] = None,
        on_interval: Optional[OnInterval] = None,
        **kwargs: object,
    ) -> Iterator[Tuple[str, Union[Meta, List[Any]]]]:
        """Wait for the members of a result set; yield each as it becomes ready."""
        self._ensure_not_eager()
        patience = Patience(timeout, interval, on_interval)
        return self.waits.members(result, patience, on_message)

    def add_pending_result(self, result: TaskResult, weak: Optional[bool] = None) -> TaskResult:
        """Register a result. Does no I/O.

        Only ``AsyncResult.then`` passes ``weak=False``: its callback must be called even if no
        thread waits for the task. Otherwise the waiting thread calls the callbacks.
        """
        if weak is False:
            self.waits.add_callback(result)
        return result

    def remove_pending_result(self, result: TaskResult) -> TaskResult:
        """Unregister a result. Safe within garbage collection: no lock, no I/O."""
        self.waits.remove_callback(result)
        return result

    # -- groups ------------------------------------------------------------------------------

    def get_group_meta(self, group_id: object, cache: bool = True) -> Any:
        """Return the meta of a group that was saved, or ``None``."""
        return super().get_group_meta(id_text(group_id), cache)

    def delete_group(self, group_id: object) -> Any:
        """Delete a group that was saved; its members are kept."""
        return super().delete_group(id_text(group_id))

    def _save_group(self, group_id: object, result: Any) -> Any:
        self.recorder.save_group(id_text(group_id), result)
        return result

    def _restore_group(self, group_id: str) -> Optional[Meta]:
        return self.reader.read_group(group_id, self.app)

    def _delete_group(self, group_id: str) -> None:
        self.layout.forget_group(group_id)

    # -- chords ------------------------------------------------------------------------------

    def apply_chord(
        self, header_result_args: Tuple[str, Any], body: Signature, **kwargs: object
    ) -> None:
        """Note a chord whose header is about to be sent. Does no I/O."""
        if not self.chords.supported:
            super().apply_chord(header_result_args, body, **kwargs)
        else:
            self.ensure_chords_allowed()
            self.chords.apply(header_result_args, body)

    def set_chord_size(self, group_id: str, chord_size: int) -> None:
        """Publish the plan of a chord, just before the last task of its header is sent."""
        if not self.chords.supported:
            super().set_chord_size(group_id, chord_size)
        else:
            self.chords.publish_plan(group_id)

    def add_to_chord(self, chord_id: str, result: Any) -> None:
        """Add one task or group to a chord. A task of its header must call this."""
        if not self.chords.supported:
            super().add_to_chord(chord_id, result)
        else:
            self.chords.add(chord_id, result)

    def on_chord_part_return(
        self, request: object, state: str, result: Any, **kwargs: object
    ) -> None:
        """Tell the leader of a chord what a task of its header returned."""
        if not self.chords.supported:
            super().on_chord_part_return(request, state, result, **kwargs)
        else:
            self.chords.part_returned(request, state, self.encode_result(result, state))

    def chord_error_from_stack(
        self, callback: Signature, exc: Optional[BaseException] = None
    ) -> Any:
        """Fail the body of a chord, and report that to a chord whose header has this body."""
        if exc is None:
            exc = sys.exc_info()[1]
        info = super().chord_error_from_stack(callback, exc)
        if self.chords.supported:
            for request in self.chords.enclosing(callback):
                self.on_chord_part_return(request, states.FAILURE, exc)
        return info

    def _call_task_errbacks(self, request: Context, exc: object, traceback: object) -> None:
        call = super()._call_task_errbacks
        call_errbacks(request.id, lambda: call(request, exc, traceback))

    # -- what Celery 4.3 documents, and Celery 5 does not call -----------------------------------

    BacklogLimitExceeded = BacklogLimitExceeded
    Consumer: ClassVar[Type[Consumer]] = Consumer
    Exchange: ClassVar[Type[Exchange]] = Exchange
    Producer: ClassVar[Type[Producer]] = Producer
    #: The queue class that declares a queue at every use.
    Queue: ClassVar[Type[NoCacheQueue]] = NoCacheQueue

    consume = delegated("celery4", Celery4API.consume)
    destination_for = delegated("celery4", Celery4API.destination_for)
    drain_events = delegated("celery4", Celery4API.drain_events)
    get_many = delegated("celery4", Celery4API.get_many)
    on_reply_declare = delegated("celery4", Celery4API.on_reply_declare)
    poll = delegated("celery4", Celery4API.poll)
    reload_group_result = delegated("celery4", Celery4API.reload_group_result)
    reload_task_result = delegated("celery4", Celery4API.reload_task_result)
    revive = delegated("celery4", Celery4API.revive)
    rkey = delegated("celery4", Celery4API.rkey)
    wait_for = delegated("celery4", Celery4API.wait_for)
