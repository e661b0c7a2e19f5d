"""Metrics for Prometheus. Needs the extra ``prometheus`` (the package prometheus_client)."""

from __future__ import annotations

import dataclasses
from typing import Iterator, Mapping, Optional

from celery import Celery
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from celery_amqp_results.metrics import COUNTER, Metrics

__all__ = ("ResultsCollector",)

#: Names begin with this.
PREFIX = "celery_results_"


class ResultsCollector(Collector):
    """Provides the backend's metrics to a registry of prometheus_client at each scrape.

    ::

        from prometheus_client import REGISTRY
        REGISTRY.register(ResultsCollector(app))

    Parameters:
        app: a Celery app with this result backend.
        labels: names and values of labels for all metrics; none by default.

    Thread-safe. Collecting does no I/O. After a fork it reports the child's metrics.
    """

    def __init__(self, app: Celery, labels: Optional[Mapping[str, str]] = None) -> None:
        self._app = app
        self._labels = dict(labels or {})

    def describe(self) -> Iterator[Metric]:
        """Yield the metrics without their values."""
        return self._families(None)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        return self._families(self._app.backend.metrics())

    def _families(self, metrics: Optional[Metrics]) -> Iterator[Metric]:
        for field in dataclasses.fields(Metrics):
            kind = CounterMetricFamily if field.metadata["kind"] == COUNTER else GaugeMetricFamily
            family = kind(
                PREFIX + field.name, field.metadata["description"], labels=list(self._labels)
            )
            if metrics is not None:
                family.add_metric(list(self._labels.values()), getattr(metrics, field.name))
            yield family
