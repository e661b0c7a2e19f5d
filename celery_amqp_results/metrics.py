"""Counts of a process's work with results.

Counting happens where a lock is held anyway, so it costs next to nothing and threads lose no
counts. A forked process starts at zero, like any new one.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, Counter, Dict, Iterable

__all__ = ("Metrics",)

#: Kinds of metrics.
COUNTER = "counter"
GAUGE = "gauge"


def _metric(kind: str, unit: str, description: str) -> Any:
    metadata = {"kind": kind, "unit": unit, "description": description}
    return dataclasses.field(default=0, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Counts of one process, for all backends of one app that keep their results in one place."""

    stored: int = _metric(COUNTER, "states", "States and groups that were published")
    confirmed: int = _metric(
        COUNTER, "states", "Those of them for which the broker's confirm was waited for, and came"
    )
    published_bytes: int = _metric(
        COUNTER, "bytes", "Bodies that were published: of states, plans and parts, large results"
    )
    large: int = _metric(COUNTER, "states", "States whose bodies were put in queues of their own")
    retried: int = _metric(
        COUNTER,
        "publishes",
        "Publishing was tried again, since the connection was lost or the broker did not take it",
    )
    refused: int = _metric(
        COUNTER, "publishes", "Publishing was refused by the broker: too large, no permission"
    )
    failed: int = _metric(
        COUNTER,
        "publishes",
        "Publishing was given up, since the broker was away, or did not take it, for too long",
    )
    late_copies: int = _metric(
        COUNTER,
        "states",
        "States whose live copies were not confirmed within 250 ms of their routing",
    )
    pushed: int = _metric(COUNTER, "states", "States that were pushed to the inbox")
    looked_up: int = _metric(COUNTER, "ids", "Ids of tasks and groups that were looked up")
    shards_read: int = _metric(COUNTER, "reads", "Shards that were read, for look-ups and forget()")
    messages_read: int = _metric(COUNTER, "messages", "Messages that were read in shards")
    packed: int = _metric(
        COUNTER, "states", "States that were packed into pages, or dropped while packing"
    )
    rejected: int = _metric(
        COUNTER, "messages", "Foreign or damaged messages, as often as they were met"
    )
    waiting: int = _metric(GAUGE, "tasks", "Tasks that somebody waits for at present")
    remembered: int = _metric(
        COUNTER, "ids", "Ids of tasks that were read from memory, after a barrier"
    )
    barriers: int = _metric(
        COUNTER, "messages", "Barriers that came back: one serves all reads that wait for it"
    )
    views: int = _metric(GAUGE, "shards", "Shards that are known completely at present")
    view_bytes: int = _metric(GAUGE, "bytes", "Memory for what is known of tasks and shards, about")
    chords_fired: int = _metric(COUNTER, "chords", "Chords whose bodies were sent, or failed")
    chords_abandoned: int = _metric(COUNTER, "chords", "Chords that were given up as expired")
    chords_open: int = _metric(GAUGE, "chords", "Chords that this process leads at present")
    chords_led: int = _metric(GAUGE, "queues", "Plan queues that this process leads at present")
    oldest_chord: int = _metric(GAUGE, "seconds", "Age of the oldest of the open chords")

    def as_dict(self) -> Dict[str, int]:
        """Return the numbers by their names."""
        return dict(vars(self))

    @classmethod
    def total(cls, parts: Iterable[Metrics]) -> Metrics:
        """Return the sum of *parts*."""
        sums: Counter[str] = collections.Counter()
        for part in parts:
            sums.update(part.as_dict())
        return cls(**sums)

    def counters(self) -> Metrics:
        """Return a copy without the values that only a running layout has."""
        gauges = [f.name for f in dataclasses.fields(self) if f.metadata["kind"] == GAUGE]
        return dataclasses.replace(self, **dict.fromkeys(gauges, 0))
