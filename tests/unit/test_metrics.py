"""Counts of a process's work."""

from __future__ import annotations

import dataclasses

from celery_amqp_results.metrics import GAUGE, Metrics


def test_what_a_closed_layout_has_counted_has_no_gauges() -> None:
    kinds = {field.name: field.metadata["kind"] for field in dataclasses.fields(Metrics)}
    everything = Metrics(**dict.fromkeys(kinds, 7))
    expected = {name: 0 if kind == GAUGE else 7 for name, kind in kinds.items()}
    assert everything.counters().as_dict() == expected
