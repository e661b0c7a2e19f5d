"""Metrics for OpenTelemetry. Needs the extra ``opentelemetry`` (the package opentelemetry-api)."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Callable, Iterator, Mapping, Optional

from celery import Celery
from opentelemetry import metrics as otel

import celery_amqp_results
from celery_amqp_results.metrics import COUNTER, Metrics

__all__ = ("instrument",)

#: Names begin with this.
PREFIX = "celery.results."


def instrument(
    app: Celery,
    meter_provider: Optional[otel.MeterProvider] = None,
    attributes: Optional[Mapping[str, object]] = None,
) -> None:
    """Register the backend's metrics as observable instruments.

    Call it once for an app, in the process whose metrics are wanted. OpenTelemetry's exporters do
    not survive a fork, so in a prefork worker call it in the signal ``worker_process_init``.

    Parameters:
        app: a Celery app with this result backend. It is not kept alive.
        meter_provider: OpenTelemetry's; the global one by default.
        attributes: attributes of all observations; none by default.

    Observing does no I/O.
    """
    meter = otel.get_meter(
        celery_amqp_results.__name__, celery_amqp_results.__version__, meter_provider
    )
    reference = weakref.ref(app)
    for field in dataclasses.fields(Metrics):
        create = (
            meter.create_observable_counter
            if field.metadata["kind"] == COUNTER
            else meter.create_observable_gauge
        )
        unit = field.metadata["unit"]
        create(
            PREFIX + field.name,
            callbacks=[_observer(reference, field.name, attributes)],
            # UCUM's code for bytes; other units are in braces.
            unit="By" if unit == "bytes" else "{" + unit + "}",
            description=field.metadata["description"],
        )


def _observer(
    reference: weakref.ref[Celery], name: str, attributes: Optional[Mapping[str, object]]
) -> Callable[[otel.CallbackOptions], Iterator[otel.Observation]]:
    def observe(options: otel.CallbackOptions) -> Iterator[otel.Observation]:
        app = reference()
        if app is not None:
            yield otel.Observation(getattr(app.backend.metrics(), name), attributes)

    return observe
