"""Firing a chord: sending its body with the results of its header, or reporting its failure.

It does what Celery's Redis backend does. Where that backend leaves a chord hanging or loses its
body, this module completes or fails the chord.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import logging
import threading
import time
from typing import Any, Callable, Deque, Dict, Iterator, List, Mapping, Optional, Set, Tuple, Type

import kombu
from celery import states
from celery.canvas import Signature, _chain, chord, group, maybe_signature
from celery.exceptions import BackendStoreError, ChordError
from celery.utils.nodenames import anon_nodename

from celery_amqp_results import errors
from celery_amqp_results.amqp import transports
from celery_amqp_results.amqp.failures import TRANSIENT
from celery_amqp_results.chords import plan as plans
from celery_amqp_results.chords.actions import Fire
from celery_amqp_results.chords.service import NotSent, read_ends
from celery_amqp_results.library_types import App
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.store.lookup import Store
from celery_amqp_results.toolkit.bounded import BoundedDict

__all__ = ("BodySender", "Firing", "call_errbacks", "last_links", "sends_for_another")

logger = logging.getLogger(__name__)

#: Message of a :class:`ChordError`, the same as in Celery's Redis backend.
DEPENDENCY = "Dependency {} raised {!r}"

#: Errors that are raised while the broker does not answer.
UNAVAILABLE: Tuple[Type[Exception], ...] = (
    errors.BackendUnavailable,
    errors.LookupTimeout,
    *TRANSIENT,
)

#: Errors after which storing the failure of a chord is tried again.
NOT_STORED: Tuple[Type[Exception], ...] = (
    *UNAVAILABLE,
    BackendStoreError,
    errors.DeclarationRefused,
)

#: How many chords are remembered whose failure could not be stored.
MAX_FAILING = 1_000

#: How many times to try sending a body while the broker does not answer.
TRIES = 5

#: A connection that has not sent a body for this many seconds is no longer trusted.
IDLE_SECONDS = 30.0

#: The body that is being sent in this thread or greenlet for a process that waits for it.
_forwarded: contextvars.ContextVar[Optional[str]] = contextvars.ContextVar(
    "celery_amqp_results_forwarded", default=None
)


#: The tasks whose errbacks were called for the chord whose failure is being reported here.
_called: contextvars.ContextVar[Optional[Set[str]]] = contextvars.ContextVar(
    "celery_amqp_results_called", default=None
)


def call_errbacks(task_id: str, call: Callable[[], None]) -> None:
    """Call the errbacks of a task.

    For a chord that fails they are called once, however often its failure must be stored again, and
    none of them keeps the failure from being stored.
    """
    called = _called.get()
    if called is None:
        call()
    elif task_id not in called:
        try:
            call()
        except Exception:
            # Those that are tasks could not be sent: they are sent with the next try.
            raise
        except BaseException:
            logger.exception("an errback of %s ends its thread, which goes on", task_id)
        called.add(task_id)


def sends_for_another(task_id: str) -> bool:
    """Return whether a task is a body whose states go to the process that sent its chord."""
    return _forwarded.get() == task_id


class Firing:
    """Sends the bodies of chords.

    Parameters:
        app: returns the Celery app, or ``None`` when it is gone.
        content: returns the decoded content of a plan's message.

    Thread-safe. After a fork the child must make a new one.
    """

    def __init__(
        self,
        app: Callable[[], Any],
        store: Store,
        content: Callable[[StateMessage], Mapping[str, Any]],
    ) -> None:
        self._app = app
        self._store = store
        self._content = content
        self.bodies = BodySender(app)
        self._lock = threading.Lock()
        #: Marks of the chords whose failure could not be stored yet, and the tasks whose errbacks
        #: were called. They are kept when the connection is lost and the plans are redelivered.
        self._called: BoundedDict[str, Set[str]] = BoundedDict(MAX_FAILING)

    def fire(self, action: Fire) -> None:
        """Send the body of a complete chord, or report the failure of its header.

        Raises:
            NotSent: when the broker does not answer; nothing is decided then.
        """
        app = self._app()
        if app is None:
            raise NotSent("the Celery app is gone")
        # The thread is ours, so set this app for the user's handlers and errbacks.
        app.set_current()
        assert action.plan.message is not None
        content = self._content(action.plan.message)
        signature = maybe_signature(dict(content["body"]), app=app)
        group_id = action.plan.group_id
        try:
            results = self._results(app.backend, action)
        except UNAVAILABLE as exc:
            raise NotSent(f"its results could not be read: {exc}") from exc
        except ChordError as exc:
            logger.error("Chord %r raised: %r", group_id, exc)
            self._fail(app, signature, action.plan.mark, exc)
        except BaseException as exc:
            # User code may raise SystemExit, for example.
            logger.exception("Chord %r raised: %r", group_id, exc)
            self._fail(app, signature, action.plan.mark, _chord_error(f"Join error: {exc!r}", exc))
        else:
            self._send(app, signature, results, action)

    def _send(self, app: App, signature: Signature, results: List[object], action: Fire) -> None:
        origin = signature.options.get("origin")
        forwarded = origin is not None and origin != anon_nodename()
        token = _forwarded.set(signature.options.get("task_id") if forwarded else None)
        try:
            self.bodies.send(signature, results, _ancestors(signature, action))
        except BaseException as exc:
            if isinstance(exc, TRANSIENT) and action.failures + 1 < TRIES:
                raise NotSent(repr(exc)) from exc
            logger.exception("Chord callback for %r raised: %r", action.plan.group_id, exc)
            self._fail(
                app, signature, action.plan.mark, _chord_error(f"Callback error: {exc!r}", exc)
            )
        finally:
            _forwarded.reset(token)

    def _fail(self, app: App, signature: Signature, mark: str, exc: ChordError) -> None:
        with self._lock:
            called = self._called.get(mark) or set()
            self._called[mark] = called
        token = _called.set(called)
        try:
            app.backend.chord_error_from_stack(signature, exc)
        except NOT_STORED as failure:
            raise NotSent(f"its failure could not be stored: {failure}") from failure
        finally:
            _called.reset(token)
        with self._lock:
            self._called.pop(mark, None)

    def _results(self, backend: Any, action: Fire) -> List[object]:
        """Return the results of the header; raise the error of the first task that has failed."""
        ends = dict(action.ends)
        if action.bodiless:
            ends.update(read_ends(self._store, action.bodiless))
        values: Dict[str, object] = {}
        for task_id in plans.leaves(action.results):
            if task_id not in values:
                values[task_id] = self._value(backend, ends[task_id])
        return plans.fill(action.results, values)

    @staticmethod
    def _value(backend: Any, state: StateMessage) -> object:
        content = backend.reader.decode(state)
        if content["status"] in states.PROPAGATE_STATES:
            cause = content["result"]
            raise _chord_error(DEPENDENCY.format(state.id, cause), cause)
        return content["result"]


def _ancestors(signature: Signature, action: Fire) -> Dict[str, str]:
    """Return the ids of the body's parent and root, the same as with Celery's other backends.

    There the header task that ends last sends the body.
    """
    if isinstance(signature, chord) or not action.ends:
        # A chord would use them for its own body.
        return {}
    last = max(action.ends.values(), key=lambda state: state.published).id
    options = signature.options
    return {
        "parent_id": options.get("parent_id") or last,
        "root_id": options.get("root_id") or action.plan.root_id or last,
    }


class BodySender:
    """Sends the bodies of chords, with a confirm where the broker supports it.

    Celery does not wait for confirms by default. Here the plan is acknowledged after the body is
    sent, so on RabbitMQ the body must be confirmed first, whatever the settings. The tasks of a
    body that is itself a chord are sent like any other of the app.

    Thread-safe. After a fork the child must make a new one.
    """

    def __init__(self, app: Callable[[], Any]) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._idle: Deque[Tuple[float, kombu.Producer]] = collections.deque()

    def send(
        self, signature: Signature, results: List[object], options: Mapping[str, object]
    ) -> None:
        """Send *signature* with *results* and additional *options*.

        Raises:
            Exception: the error of Celery, kombu or the serializer when it cannot be published.
        """
        retry_publish = getattr(self._app().amqp, "_retry_publish", _call)
        with self._producer() as producer:
            retry_publish(signature.apply_async, (results,), producer=producer, **options)

    @contextlib.contextmanager
    def _producer(self) -> Iterator[kombu.Producer]:
        """Lend a producer; it is not used again if the block raises."""
        app = self._app()
        producer = None
        with self._lock:
            while self._idle and producer is None:
                since, producer = self._idle.pop()
                if time.monotonic() - since > IDLE_SECONDS:
                    producer.connection.collect()
                    producer = None
        if producer is None:
            connection = app.connection_for_write()
            if transports.is_amqp(connection):
                connection = app.connection_for_write(transport_options={"confirm_publish": True})
            producer = app.amqp.Producer(connection)
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


def last_links(signature: Signature, app: App) -> Iterator[Signature]:
    """Yield the simple signatures whose results stand for the result of *signature*."""
    signature = maybe_signature(signature, app=app)
    if isinstance(signature, chord):
        if signature.body is not None:
            yield from last_links(signature.body, app)
    elif isinstance(signature, group):
        for task in signature.tasks:
            yield from last_links(task, app)
    elif isinstance(signature, _chain):
        if signature.tasks:
            yield from last_links(signature.tasks[-1], app)
    else:
        yield signature


def _call(function: Callable[..., object], *args: object, **kwargs: object) -> object:
    return function(*args, **kwargs)


def _chord_error(message: str, cause: object) -> ChordError:
    error = ChordError(message)
    if isinstance(cause, BaseException):
        error.__cause__ = cause
    return error
