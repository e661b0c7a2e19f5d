"""Spans of OpenTelemetry around storing and waiting, with links to the trace of the task."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any, List

import pytest
from celery import Celery, states
from celery.app.task import Context
from celery.result import AsyncResult, GroupResult

from tests.broker.helpers import LONG, new_id
from tests.conftest import Apps

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from celery_amqp_results.exporters import tracing
from celery_amqp_results.exporters.tracing import trace


class Traces:
    """A provider of tracers that keeps all spans."""

    def __init__(self) -> None:
        self.provider = TracerProvider()
        self._spans = InMemorySpanExporter()
        self.provider.add_span_processor(SimpleSpanProcessor(self._spans))
        self.tracer = self.provider.get_tracer("test")

    def named(self, name: str) -> List[Any]:
        return [span for span in self._spans.get_finished_spans() if span.name == name]


@pytest.fixture
def traces() -> Traces:
    return Traces()


def test_storing_and_waiting_link_to_the_trace_in_which_the_task_was_sent(
    app: Celery, traces: Traces
) -> None:
    trace(app, traces.provider)
    with traces.tracer.start_as_current_span("request") as request:
        result = app.send_task("some.task")
    timer = threading.Timer(0.1, app.backend.store_result, (result.id, 7, states.SUCCESS))
    timer.start()
    assert result.get(timeout=LONG) == 7
    timer.join()
    (stored,), (waited,) = traces.named("store result"), traces.named("wait for result")
    for span in (stored, waited):
        (link,) = span.links
        assert link.context.trace_id == request.get_span_context().trace_id
        assert span.attributes["celery.task_id"] == result.id
    assert stored.attributes["celery.state"] == states.SUCCESS


def test_a_worker_knows_the_trace_by_the_headers_of_the_task(app: Celery, traces: Traces) -> None:
    trace(app, traces.provider)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    for request in (Context(headers={"traceparent": parent}), Context(traceparent=parent)):
        app.backend.store_result(new_id(), 1, states.SUCCESS, request=request)
    first, second = traces.named("store result")
    for span in (first, second):
        (link,) = span.links
        assert f"{link.context.trace_id:032x}" == parent.split("-")[1]


def test_a_wait_that_fails_is_an_error(app: Celery, traces: Traces) -> None:
    trace(app, traces.provider)
    with pytest.raises(Exception, match="time"):
        AsyncResult(new_id(), app=app).get(timeout=0.05)
    (span,) = traces.named("wait for result")
    assert not span.status.is_ok
    assert span.events[0].name == "exception"


def test_a_group_is_one_span(app: Celery, traces: Traces) -> None:
    trace(app, traces.provider)
    with traces.tracer.start_as_current_span("request"):
        results = [app.send_task("some.task") for _ in range(3)]
    for number, result in enumerate(results):
        app.backend.store_result(result.id, number, states.SUCCESS)
    assert GroupResult(new_id(), results, app=app).join_native(timeout=LONG) == [0, 1, 2]
    (span,) = traces.named("wait for group")
    assert span.attributes["celery.group.size"] == 3
    # They were sent in one span, so that there is one link.
    assert len(span.links) == 1


def test_another_app_has_no_spans(make_app: Apps, traces: Traces) -> None:
    app, other = make_app(), make_app()
    trace(app, traces.provider)
    other.backend.store_result(new_id(), 1, states.SUCCESS)
    assert traces.named("store result") == []


# Python 3.12 and later warn of a fork in a process with threads.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_while_a_thread_remembers_a_trace_does_not_hang(
    app: Celery, traces: Traces
) -> None:
    trace(app, traces.provider)
    with tracing._tracings[app]._lock:
        child = os.fork()
        if not child:
            signal.alarm(int(LONG))
            try:
                tracing._tracings[app].remember({"id": new_id()})
                with tracing._tracings[app]._lock:
                    os._exit(0)
            finally:
                os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
