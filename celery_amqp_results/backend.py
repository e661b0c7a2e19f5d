"""The result backend, as Celery calls it."""

from __future__ import annotations

import dataclasses
import functools
import logging
import operator
import sys
import time
from typing import (
    Any,
    Callable,
    ClassVar,
    ContextManager,
    Dict,
    Generator,
    Iterable,
    Iterator,
    List,
    Optional,
    Tuple,
    Union,
)

import celery
from celery import states
from celery.app.task import Context
from celery.backends.base import Backend
from celery.exceptions import TimeoutError
from celery.result import ResultSet

from celery_amqp_results import errors
from celery_amqp_results.amqp.failures import TRANSIENT, is_refusal
from celery_amqp_results.celery4.api import Celery4API
from celery_amqp_results.chords import remote, workers
from celery_amqp_results.chords.firing import last_links
from celery_amqp_results.chords.sending import expect_body
from celery_amqp_results.config import (
    BackendConfig,
    Expirations,
    Location,
    codec_of,
    expiry_of,
)
from celery_amqp_results.errors import BacklogLimitExceeded
from celery_amqp_results.groups import SavedGroups
from celery_amqp_results.layouts import Layout
from celery_amqp_results.metrics import Metrics
from celery_amqp_results.options import Options
from celery_amqp_results.per_task.layout import Wire
from celery_amqp_results.protocol.ids import id_text, state_name
from celery_amqp_results.protocol.names import Topology
from celery_amqp_results.protocol.ranking import is_final
from celery_amqp_results.reading import Reader
from celery_amqp_results.recording import Recorder, plain_meta, without_arguments
from celery_amqp_results.registry import OwnLayout
from celery_amqp_results.store import marks as tracking
from celery_amqp_results.waiting import results as trees
from celery_amqp_results.waiting.groups import ask_in_one_pass
from celery_amqp_results.waiting.waits import DEFAULT_INTERVAL, Patience, Waits

__all__ = ("AMQPBackend", "BacklogLimitExceeded")

logger = logging.getLogger(__name__)

#: Celery before 5.5 stores the end time of a task in UTC.
DATES_IN_ZONE_OF_APP = celery.VERSION >= (5, 5)

Meta = Dict[str, Any]


class AMQPBackend(Celery4API, Backend):
    """Stores task results in RabbitMQ, and pushes them to waiting clients.

    Parameters:
        app: the Celery app.
        connection: not used; the connection is made from the URL.
        exchange: first part of all names, and in the layout ``per-task`` the exchange's name; the
            setting ``result_exchange`` by default.
        exchange_type: type of the exchange in the layout ``per-task``; the setting
            ``result_exchange_type`` by default. Not used by the layout ``shared``.
        persistent: whether results survive a restart of the broker; the setting
            ``result_persistent`` by default, and otherwise true.
        serializer: kombu's name of a serializer; the setting ``result_serializer`` by default.
        auto_delete: whether a task's queue goes with its last consumer in the layout
            ``per-task``. Not used by the layout ``shared``.
        url: the result backend URL; ``None`` or ``amqp://`` for the app's broker.
        **kwargs: for Celery's base class.

    Raises:
        InvalidOption: when an option is unknown or its value is not allowed.

    Thread-safe: one instance serves all threads and greenlets of a process. Fork-safe: the child
    opens connections of its own, whatever the parent was doing. Nothing is opened before it is
    needed.
    """

    #: Results are pushed, so ``GroupResult.get`` can wait for all members at once.
    supports_native_join = True
    #: The broker drops expired results, so no periodic task is needed.
    supports_autoexpire = True
    supports_result_compression = True
    supports_failure_expires = True
    persistent = True

    retry_policy: ClassVar[Dict[str, Any]] = {
        "max_retries": 20,
        "interval_start": 0,
        "interval_step": 1,
        "interval_max": 1,
    }

    def __init__(
        self,
        app: Any,
        connection: Any = None,
        exchange: Optional[str] = None,
        exchange_type: Optional[str] = None,
        persistent: Optional[bool] = None,
        serializer: Optional[str] = None,
        auto_delete: bool = True,
        **kwargs: Any,
    ) -> None:
        location = Location.read(app, kwargs.get("url"), kwargs.pop("options", None))
        purpose = kwargs.pop("purpose", "")
        # Celery 4's format has no place for either; Celery warns if they are set.
        self.supports_result_compression = location.layout == "shared"
        self.supports_failure_expires = location.layout == "shared"
        super().__init__(app, serializer=serializer, **kwargs)
        self._arguments = dict(
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
        self.expires: Optional[float] = expiry_of(
            "result_expires", self.prepare_expires(kwargs.get("expires"))
        )
        conf = app.conf
        prefix = exchange or conf.result_exchange
        wire = Wire(
            prefix,
            exchange_type or conf.result_exchange_type,
            self.persistent,
            auto_delete,
            self.expires,
            bool(conf.find_value_for_key("extended", "result")),
        )
        #: Everything that was read from the settings, the URL and the arguments.
        self.config = BackendConfig(
            location,
            Topology(prefix, location.options.shards, location.options.queue_type),
            wire,
            # Celery before 5.7 leaves the setting to the backends.
            codec_of(location, self.serializer, self.accept, conf.result_compression),
            Expirations.read(conf, self.expires),
            tuple(sorted(self.accept or ())),
            purpose,
        )
        self._layout = OwnLayout(app, self.config)
        #: Stores the states of tasks.
        self.recorder = Recorder(app, self.config, self._layout)
        #: Reads them.
        self.reader = Reader(self.config, self._layout, self.meta_from_decoded)
        #: Waits for tasks.
        self.waits = Waits(self._layout, self.reader)
        self._groups = SavedGroups(app, self._layout, self.recorder, self.reader)
        self._layout.reset_after_fork(self.reader, self.waits)
        ask_in_one_pass(app)

    @property
    def options(self) -> Options:
        """The options of the backend."""
        return self.config.options

    @property
    def layout_name(self) -> str:
        """``shared`` or ``per-task``."""
        return self.config.layout_name

    def clone(self, purpose: str, **options: Any) -> AMQPBackend:
        """Return a backend like this one, with connections of its own and other options.

        Parameters:
            purpose: what it is for; clones with the same purpose and options share connections.
            **options: options that differ, as in ``result_backend_transport_options``.

        Raises:
            InvalidOption: when an option is unknown or its value is not allowed.
        """
        known = {f.name: getattr(self.options, f.name) for f in dataclasses.fields(Options)}
        known = {name: value for name, value in known.items() if value is not None}
        return type(self)(
            self.app,
            purpose=purpose,
            options=Options.read({**known, **options}),
            **self._arguments,
        )

    @property
    def layout(self) -> Layout:
        """Where the results are kept. Making it does no I/O."""
        return self._layout()

    # -- identity ----------------------------------------------------------------------------

    def as_uri(self, include_password: bool = True) -> str:
        """Return the result backend URL.

        Parameters:
            include_password: whether to show it; ``**`` stands for it otherwise.
        """
        return self.config.url.complete() if include_password else self.config.url.sanitized()

    def __reduce__(self, args: Tuple[Any, ...] = (), kwargs: Optional[Meta] = None) -> Any:
        """Pickle as its arguments; the app is the one of the unpickling process."""
        return super().__reduce__(args, dict(self._arguments, url=self.url, **(kwargs or {})))

    def metrics(self) -> Metrics:
        """Return counts of what this process has done, for all equal backends of the app.

        Costs some microseconds, and no I/O. Closing the backend does not reset the counts.
        """
        return self._layout.metrics()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.as_uri(include_password=False)}>"

    # -- storing -----------------------------------------------------------------------------

    def on_task_call(self, producer: Any, task_id: str) -> Meta:
        """Note that a task is about to be sent.

        With ``track_sent`` this publishes a mark on the connection that sends the task, and does
        not wait for a confirm. Otherwise this does no I/O.
        """
        self.recorder.note_sent(id_text(task_id), producer)
        return {}

    def _store_result(
        self,
        task_id: str,
        result: Any,
        state: str,
        traceback: Any = None,
        request: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Publish a state.

        Raises:
            kombu.exceptions.EncodeError: when the serializer cannot encode the result.
            ResultTooLarge: when the broker refuses a message of this size.
            BackendUnavailable: when the broker did not confirm it; it may be stored or not.
            DeclarationRefused: when something on the broker exists with other properties.
        """
        task_id, state = id_text(task_id), state_name(state)
        meta = self._get_result_meta(result, state, traceback, request)
        try:
            self.recorder.record(task_id, state, meta, request)
        except errors.ResultTooLarge as exc:
            # Celery turns a SUCCESS into a FAILURE with this error. For a FAILURE that is too large
            # itself, a short state must be stored, or waiting clients would wait for ever.
            if not is_final(state) or state == states.SUCCESS:
                raise
            logger.error("task %s ended with %s, which is stored without details", task_id, exc)
            meta = self._get_result_meta(self.encode_result(exc, state), state, None, request)
            self.recorder.record(task_id, state, without_arguments(meta), request)
        return result

    def _get_result_meta(
        self,
        result: Any,
        state: str,
        traceback: Any,
        request: Any,
        format_date: bool = True,
        encode: bool = False,
    ) -> Meta:
        if self.config.wire.extended or not format_date or not DATES_IN_ZONE_OF_APP:
            complete: Meta = super()._get_result_meta(
                result, state, traceback, request, format_date, encode
            )
            return complete
        meta = plain_meta(state, result, traceback, request, self.app)
        meta["children"] = self.current_task_children(request)
        return meta

    def exception_safe_to_retry(self, exc: BaseException) -> bool:
        """Return whether a retry may help: the broker is unreachable, but has not refused."""
        cause = exc.__cause__ or exc
        return isinstance(exc, (errors.BackendUnavailable, *TRANSIENT)) and not is_refusal(cause)

    # -- reading -----------------------------------------------------------------------------

    def is_cached(self, task_id: str) -> bool:
        """Return whether this process knows how a task has ended.

        Celery's polling chord task uses this to find the failed task of a header. Failures are not
        in the cache itself, as a redelivered task may still succeed.
        """
        task_id = id_text(task_id)
        return task_id in self._cache or self.reader.knows_failed(task_id)

    def _get_task_meta_for(self, task_id: str) -> Meta:
        """Return the meta of a task; a pending one if nothing is known of it.

        Raises:
            LookupTimeout: when the store could not be read in time.
            BackendUnavailable: when the broker cannot be reached or refuses us.
            kombu.exceptions.ContentDisallowed: when the meta is of a content type that is not
                accepted.
            ForeignMessage: when the meta is damaged.
        """
        return self.reader.meta(id_text(task_id))

    def one_pass(self, group: ResultSet) -> ContextManager[None]:
        """Read all members of *group* at once, and serve reads in a ``with`` block from that.

        Raises:
            LookupTimeout, BackendUnavailable: as every look-up.
        """
        return self.reader.in_one_pass(trees.leaves(group))

    def task_result_exists(self, task_id: str) -> bool:
        """Return whether a state of the task is kept or, with ``track_sent``, whether it was sent.

        Raises:
            LookupTimeout, BackendUnavailable: as every look-up.
        """
        return self.fate(task_id).status in ("stored", "sent")

    def fate(self, task_id: str) -> tracking.Fate:
        """Return what is known of a task; with ``track_sent`` this includes tasks without a state.

        Raises:
            LookupTimeout, BackendUnavailable: as every look-up.
        """
        return self.reader.fate(id_text(task_id))

    def forget(self, task_id: Any) -> None:
        """Delete everything kept of a task.

        Raises:
            LookupTimeout, BackendUnavailable: as every look-up.
        """
        super().forget(id_text(task_id))

    def _forget(self, task_id: str) -> None:
        self.reader.forget(task_id)
        self.layout.forget((task_id,))
        self.recorder.mark_forgotten(task_id)

    def cleanup(self) -> None:
        """Do nothing: the broker drops what has expired."""

    def process_cleanup(self) -> None:
        """Do nothing: Celery calls this after every task, and connections are kept."""

    # -- waiting -----------------------------------------------------------------------------

    @property
    def is_async(self) -> bool:
        """True: a group tells its callbacks when its last member is ready."""
        return True

    def watch(
        self,
        target: Any = None,
        *,
        states: Union[str, Iterable[str], None] = None,
        timeout: Optional[float] = None,
    ) -> Generator[Meta, None, None]:
        """Watch tasks: yield the meta of every state as it happens.

        A meta is what :meth:`get_task_meta` returns, with the ``task_id``. The current state of
        each task comes first, then each state that becomes current, once; an older state never
        comes after a newer one. It ends when all the tasks have ended.

        Parameters:
            target: a task id, a result object, a group or another result set, a list of these, or
                ``None`` for every state of every task from now on, which does not end. Such a watch
                misses states published while the connection is lost, and logs a warning. Given
                tasks are looked up again after that, so only states before the current one are
                missed.
            states: names of the states to yield, or one name; ``None`` for all.
            timeout: seconds in total; ``None`` for no end, 0 for the current states alone.

        Raises:
            celery.exceptions.TimeoutError: when *timeout* is over and a given task has not ended.
                A watch of everything just ends.
            Unsupported: for a watch of everything in the layout ``per-task``.
            BackendUnavailable: when the broker cannot be reached at the beginning, refuses us, or
                when the backend was closed.
            LookupTimeout: when *timeout* is 0 and the store could not be read in time.
            kombu.exceptions.ContentDisallowed, ForeignMessage: when a state of a given task cannot
                be decoded. A watch of everything leaves it out and logs a warning.
            TypeError, ValueError: when *target* or *states* are invalid, at once.
            RuntimeError: when the watch was begun before a fork and goes on in the child.

        The generator is for one thread at a time; it opens nothing before the first meta is
        requested. Closing or dropping it removes all its bindings. After an error it has ended;
        watching again is safe.
        """
        return self.waits.watch(target, states, timeout)

    def wait_for(
        self,
        task_id: str,
        timeout: Optional[float] = None,
        cache: bool = True,
        no_ack: bool = True,
        on_interval: Optional[Callable[[], Any]] = None,
        READY_STATES: Any = states.READY_STATES,
        PROPAGATE_STATES: Any = states.PROPAGATE_STATES,
        interval: Optional[float] = None,
        **kwargs: Any,
    ) -> Any:
        """Wait for a task and return its result, or raise its exception.

        Parameters:
            task_id: the task.
            timeout: seconds to wait; ``None`` for no end, 0 to poll once.
            cache: whether a cached result is acceptable.
            no_ack: accepted for compatibility; reading never removes a result.
            on_interval: called about every *interval* seconds while waiting.
            interval: seconds, 0.5 by default.

        Raises:
            celery.exceptions.TimeoutError: when *timeout* is over.
            Exception: the exception of the task, if it failed.
        """
        task_id = id_text(task_id)
        meta = self._cache.get(task_id) if cache else None
        if not meta or meta["status"] not in READY_STATES:
            patience = Patience(timeout, interval, on_interval)
            ((_, state),) = self.waits.follow((task_id,), patience)
            meta = self.reader.decode(state)
        if meta["status"] in PROPAGATE_STATES:
            raise self.exception_to_python(meta["result"])
        return meta["result"]

    def wait_for_pending(
        self,
        result: Any,
        timeout: Optional[float] = None,
        interval: Optional[float] = None,
        no_ack: bool = True,
        on_message: Optional[Callable[[Meta], Any]] = None,
        on_interval: Optional[Callable[[], Any]] = None,
        callback: Optional[Callable[[str, Any], Any]] = None,
        propagate: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Wait until *result* is ready and return its value, for ``AsyncResult.get``.

        Raises:
            celery.exceptions.TimeoutError: when *timeout* seconds are over.
            Exception: the exception of the task, if it failed and *propagate* is true.
        """
        self._ensure_not_eager()
        if on_interval is not None and result.parent is not None:
            on_interval = functools.partial(self._ask_parents, result, on_interval)
        patience = Patience(timeout, interval, on_interval)
        for _, state in self.waits.follow((id_text(result.id),), patience, on_message):
            self.waits.resolve(result, state)
        return result.maybe_throw(callback=callback, propagate=propagate)

    def _ask_parents(self, result: Any, on_interval: Callable[[], Any]) -> None:
        """Call *on_interval*, in which Celery asks for each parent, with one read of them all."""
        with self.reader.in_one_pass(trees.parents(result)):
            on_interval()

    def iter_native(
        self,
        result: Any,
        timeout: Optional[float] = None,
        interval: Optional[float] = None,
        no_ack: bool = True,
        on_message: Optional[Callable[[Meta], Any]] = None,
        on_interval: Optional[Callable[[], Any]] = None,
        **kwargs: Any,
    ) -> Iterator[Tuple[str, Union[Meta, List[Any]]]]:
        """Wait for the members of a result set; yield each as it becomes ready.

        Yields:
            ``(id, meta)``, and for a member that is a group itself ``(id, members)`` when all of
            its members are ready.

        Raises:
            celery.exceptions.TimeoutError: when *timeout* seconds are over.
            Exception: the exception of a task before the group in its chain, when that has failed:
                the members will never run.
        """
        self._ensure_not_eager()
        patience = Patience(timeout, interval, on_interval)
        return self.waits.members(result, patience, on_message)

    def get_many(
        self,
        task_ids: Iterable[str],
        timeout: Optional[float] = None,
        no_ack: bool = True,
        on_message: Optional[Callable[[Meta], Any]] = None,
        on_interval: Optional[Callable[[], Any]] = None,
        now: Callable[[], float] = time.monotonic,
        getfields: Callable[[Meta], Tuple[str, str]] = operator.itemgetter("status", "task_id"),
        READY_STATES: Any = states.READY_STATES,
        PROPAGATE_STATES: Any = states.PROPAGATE_STATES,
        interval: Optional[float] = None,
        max_iterations: Optional[int] = None,
        **kwargs: Any,
    ) -> Iterator[Tuple[str, Meta]]:
        """Wait for tasks; yield ``(id, meta)`` of each as it becomes ready.

        Parameters:
            task_ids: the tasks.
            timeout: seconds for all of them; ``None`` for no end, 0 to poll once.
            interval: seconds between calls of *on_interval*, 0.5 by default.
            no_ack, now, getfields, PROPAGATE_STATES: accepted for compatibility; reading never
                removes a result, and deadlines are monotonic.
            READY_STATES: states in which a cached result is acceptable.
            on_message: called with the meta of every state.
            on_interval: called periodically while waiting.
            max_iterations: how many intervals to wait; then the iteration ends. 1 polls once.

        Raises:
            celery.exceptions.TimeoutError: when *timeout* is over.
        """
        self._ensure_not_eager()
        ids = [id_text(task_id) for task_id in task_ids]
        missing = []
        for task_id in ids:
            meta = self._cache.get(task_id)
            if meta and meta["status"] in READY_STATES:
                yield task_id, meta
            else:
                missing.append(task_id)
        if max_iterations is not None:
            timeout = (max_iterations - 1) * (interval or DEFAULT_INTERVAL)
        patience = Patience(timeout, interval, on_interval)
        try:
            for task_id, state in self.waits.follow(missing, patience, on_message):
                meta = self.reader.decode(state)
                if meta["status"] == states.SUCCESS:
                    self._cache[task_id] = meta
                yield task_id, meta
        except TimeoutError:
            if max_iterations is None:
                raise

    def add_pending_result(self, result: Any, weak: Optional[bool] = None) -> Any:
        """Register a result. Does no I/O.

        Parameters:
            result: a result object.
            weak: ``False`` for a callback (``AsyncResult.then``), which is called when the task
                ends even if no thread waits for it. For a member of a group (``True``) and a result
                that is waited for (not given), the waiting thread calls the callbacks.
        """
        if weak is False:
            self.waits.add_callback(result)
        return result

    def add_pending_results(self, results: Iterable[Any], weak: bool = False) -> List[Any]:
        """Register several results, see :meth:`add_pending_result`."""
        return [self.add_pending_result(result, weak=weak) for result in results]

    def remove_pending_result(self, result: Any) -> Any:
        """Unregister a result. Safe within garbage collection: no lock, no I/O."""
        self.waits.remove_callback(result)
        return result

    # -- groups ------------------------------------------------------------------------------

    def get_group_meta(self, group_id: Any, cache: bool = True) -> Optional[Meta]:
        """Return the meta of a group that was saved, or ``None``."""
        found: Optional[Meta] = super().get_group_meta(id_text(group_id), cache)
        return found

    def delete_group(self, group_id: Any) -> Any:
        """Delete a group that was saved; its members are kept."""
        return super().delete_group(id_text(group_id))

    def _save_group(self, group_id: Any, result: Any) -> Any:
        self._groups.save(id_text(group_id), result)
        return result

    def _restore_group(self, group_id: str) -> Optional[Meta]:
        return self._groups.restore(group_id)

    def _delete_group(self, group_id: str) -> None:
        self._groups.delete(group_id)

    # -- chords ------------------------------------------------------------------------------

    def apply_chord(self, header_result_args: Tuple[str, Any], body: Any, **kwargs: Any) -> None:
        """Note a chord whose header is about to be sent. Does no I/O, and keeps no task of it.

        In a layout without chords of its own, this and the methods below fall back to Celery's base
        class, which polls with a task.
        """
        chords = self.layout.chords
        if chords is None:
            super().apply_chord(header_result_args, body, **kwargs)
            return
        self.ensure_chords_allowed()
        expect_body(self.app, body, self.layout.note_sent)
        current = self.app.current_worker_task
        root_id = None if current is None else current.request.root_id or current.request.id
        group_id, results = header_result_args
        chords.prepare(group_id, results, body, self.config.expirations.chord, root_id)

    def set_chord_size(self, group_id: str, chord_size: int) -> None:
        """Publish the plan of a chord, just before the last task of its header is sent.

        Does nothing for a chord that was not prepared by :meth:`apply_chord` in this process.

        Raises:
            kombu.exceptions.EncodeError: when the body cannot be encoded.
            ResultTooLarge: when the broker refuses a message of this size.
            DeclarationRefused: when a plan queue exists with other properties.
            BackendUnavailable: when the broker cannot be reached or refuses us.
        """
        chords = self.layout.chords
        if chords is None:
            super().set_chord_size(group_id, chord_size)
            return
        chords.publish_plan(group_id)

    def add_to_chord(self, chord_id: str, result: Any) -> None:
        """Add one task or group to a chord. A task of its header must call this.

        Raises:
            BackendUnavailable: when the broker cannot be reached or refuses us.
        """
        chords = self.layout.chords
        if chords is None:
            super().add_to_chord(chord_id, result)
            return
        current = self.app.current_worker_task
        after = None if current is None else current.request.id
        chords.publish_amendment(chord_id, result, after, self.config.expirations.chord)

    def on_chord_part_return(self, request: Any, state: str, result: Any, **kwargs: Any) -> None:
        """Tell the leader of a chord what a task of its header returned.

        Publishes nothing if the stored state says so and is kept long enough. May be called any
        number of times for a task.

        Raises:
            kombu.exceptions.EncodeError: when the serializer cannot encode the result.
            ResultTooLarge: when the broker refuses a message of this size.
            BackendUnavailable: when the broker cannot be reached or refuses us.
        """
        if self.layout.chords is None:
            super().on_chord_part_return(request, state, result, **kwargs)
        elif request.id and request.group:
            result = self.encode_result(result, state)
            meta = {"status": state, "result": result, "task_id": request.id}
            self.recorder.record_part(request.id, request.group, meta)

    def chord_error_from_stack(self, callback: Any, exc: Optional[BaseException] = None) -> Any:
        """Fail the body of a chord whose header failed, or that could not be sent.

        Celery stops there. A body may be a task of the header of another chord, which would then
        wait for ever: this method also reports the failure to that chord.
        """
        if exc is None:
            exc = sys.exc_info()[1]
        info = super().chord_error_from_stack(callback, exc)
        if self.layout.chords is not None:
            for signature in last_links(callback, self.app):
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

    # -- the end -----------------------------------------------------------------------------

    def close(self) -> None:
        """Close all connections and end all threads; waiting calls raise an error.

        This includes equal backends of the same app, which share them. The backend can be used
        again, and then reconnects.
        """
        self.waits.close()
        self._layout.close()


def _on_worker_ready(app: Any) -> None:
    """Start leading chords in the main process of a worker."""
    backend = app.backend
    if isinstance(backend, AMQPBackend) and backend.layout.chords is not None:
        remote.register()
        backend.layout.chords.start_if_needed()


workers.on_ready(_on_worker_ready)
