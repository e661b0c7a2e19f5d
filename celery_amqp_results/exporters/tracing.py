"""Spans for OpenTelemetry around storing a result and waiting for one.

Needs the extra ``opentelemetry`` (the package opentelemetry-api). Each span links to the trace in
which the task was sent, so that a slow task can be followed from either end.
"""

from __future__ import annotations

import collections
import collections.abc
import functools
import os
import threading
import uuid
import weakref
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional

from celery import Celery
from celery.result import ResultSet
from celery.signals import before_task_publish
from opentelemetry import propagate
from opentelemetry import trace as otel

import celery_amqp_results
from celery_amqp_results.backend import AMQPBackend
from celery_amqp_results.library_types import TaskResult
from celery_amqp_results.toolkit.bounded import BoundedDict

__all__ = ("trace",)

#: Sent tasks whose trace is remembered by a process; the oldest are dropped.
MAX_REMEMBERED = 10_000

#: Tasks of a group that its span links to, at most.
MAX_LINKS = 100

#: The tracers of the apps.
_tracings: weakref.WeakKeyDictionary[Celery, _Tracing] = weakref.WeakKeyDictionary()
_patched = threading.Lock()
_originals: Dict[str, Callable[..., Any]] = {}


def _after_fork() -> None:
    for tracing in list(_tracings.values()):
        tracing.after_fork()


os.register_at_fork(after_in_child=_after_fork)


def trace(app: Celery, tracer_provider: Optional[otel.TracerProvider] = None) -> None:
    """Make spans around storing results and waiting for them.

    Call it once for an app, before the first task is sent. In a prefork worker call it in the
    signal ``worker_process_init``, after the tracer provider of the child is set up.

    Parameters:
        app: a Celery app with this result backend. It is not kept alive.
        tracer_provider: OpenTelemetry's; the global one by default.

    ``store_result`` makes a span *store result*, ``AsyncResult.get`` a span *wait for result* and
    the ``join`` of a group a span *wait for group*. The coroutines of
    :mod:`celery_amqp_results.aio` make none.
    """
    tracing = _Tracing(
        otel.get_tracer(
            celery_amqp_results.__name__, celery_amqp_results.__version__, tracer_provider
        )
    )
    _tracings[app] = tracing
    # By default Celery tells handlers apart by their address, which one that is gone may have had.
    before_task_publish.connect(tracing.remember, weak=True, dispatch_uid=str(uuid.uuid4()))
    with _patched:
        if not _originals:
            for name, wrap in (
                ("store_result", _around_store),
                ("wait_for_pending", _around_wait),
                ("iter_native", _around_group),
            ):
                _originals[name] = getattr(AMQPBackend, name)
                setattr(AMQPBackend, name, wrap(_originals[name]))


class _Tracing:
    """The tracer of one app, and the traces in which its tasks were sent. Thread-safe."""

    def __init__(self, tracer: otel.Tracer) -> None:
        self.tracer = tracer
        self._lock = threading.Lock()
        self._sent: BoundedDict[str, otel.SpanContext] = BoundedDict(MAX_REMEMBERED)

    def after_fork(self) -> None:
        """Make the lock anew: a thread of the parent may have held it."""
        self._lock = threading.Lock()

    def remember(self, headers: Optional[Mapping[str, Any]] = None, **kwargs: object) -> None:
        """Remember the trace in which a task is sent: a handler of ``before_task_publish``."""
        task_id = (headers or {}).get("id")
        context = _context_in(headers) or otel.get_current_span().get_span_context()
        if task_id and context.is_valid:
            with self._lock:
                self._sent[task_id] = context

    def links(self, ids: Iterator[str]) -> List[otel.Link]:
        """Return links to the traces in which tasks were sent, as far as this process knows."""
        with self._lock:
            found = [self._sent[task_id] for task_id in ids if task_id in self._sent]
        # Tasks of a group are often sent in one span.
        unique = {(context.trace_id, context.span_id): context for context in found}
        return [otel.Link(context) for context in list(unique.values())[:MAX_LINKS]]


def _context_in(headers: object) -> Optional[otel.SpanContext]:
    """Return the span context that the headers of a task carry, as instrumentation sets them."""
    if not isinstance(headers, collections.abc.Mapping):
        return None
    carrier = {key: value for key, value in headers.items() if isinstance(value, str)}
    context = otel.get_current_span(propagate.extract(carrier)).get_span_context()
    return context if context.is_valid and context.is_remote else None


def _attributes(operation: str, task_id: object, **more: object) -> Dict[str, object]:
    return {
        "messaging.system": "rabbitmq",
        "messaging.operation.type": operation,
        "celery.task_id": str(task_id),
        **more,
    }


def _around_store(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def store_result(
        self: AMQPBackend,
        task_id: object,
        result: object,
        state: str,
        *args: object,
        **kwargs: object,
    ) -> Any:
        tracing = _tracings.get(self.app)
        if tracing is None:
            return original(self, task_id, result, state, *args, **kwargs)
        request = args[1] if len(args) > 1 else kwargs.get("request")
        context = _context_in(getattr(request, "headers", None)) or _context_in(
            getattr(request, "__dict__", None)
        )
        links = [otel.Link(context)] if context else tracing.links(iter([str(task_id)]))
        with tracing.tracer.start_as_current_span(
            "store result",
            kind=otel.SpanKind.PRODUCER,
            links=links,
            attributes=_attributes("send", task_id, **{"celery.state": str(state)}),
        ):
            return original(self, task_id, result, state, *args, **kwargs)

    return store_result


def _around_wait(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wait_for_pending(
        self: AMQPBackend, result: TaskResult, *args: object, **kwargs: object
    ) -> object:
        tracing = _tracings.get(self.app)
        if tracing is None:
            return original(self, result, *args, **kwargs)
        with tracing.tracer.start_as_current_span(
            "wait for result",
            kind=otel.SpanKind.CONSUMER,
            links=tracing.links(iter([result.id])),
            attributes=_attributes("receive", result.id),
        ):
            return original(self, result, *args, **kwargs)

    return wait_for_pending


def _around_group(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def iter_native(
        self: AMQPBackend, result: ResultSet, *args: object, **kwargs: object
    ) -> Iterator[Any]:
        tracing = _tracings.get(self.app)
        if tracing is None:
            yield from original(self, result, *args, **kwargs)
            return
        members = list(result.results or ())
        # The caller's code runs between two members, so this is not made the current span.
        span = tracing.tracer.start_span(
            "wait for group",
            kind=otel.SpanKind.CONSUMER,
            links=tracing.links(member.id for member in members),
            attributes=_attributes(
                "receive", getattr(result, "id", ""), **{"celery.group.size": len(members)}
            ),
        )
        try:
            yield from original(self, result, *args, **kwargs)
        except Exception as exc:
            span.record_exception(exc)
            span.set_status(otel.Status(otel.StatusCode.ERROR, str(exc)))
            raise
        finally:
            span.end()

    return iter_native
