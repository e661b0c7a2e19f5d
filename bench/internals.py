"""Everything that the benchmarks know of this backend beyond its public interface."""

from __future__ import annotations

import contextlib
from typing import Any, Collection, Dict, Iterable, Iterator, List

from celery_amqp_results.store import lookup

__all__ = (
    "one_id_a_shard",
    "packing_everything",
    "remembered",
    "shard_queue",
    "shard_queues",
    "shards",
)


def shards(app: Any) -> int:
    """Return the number of shards."""
    return int(app.backend.config.topology.shards)


def shard_queue(app: Any, task_id: str) -> str:
    """Return the name of the queue that keeps the states of a task."""
    topology = app.backend.config.topology
    return str(topology.shard_queue_name(topology.shard(task_id)))


def shard_queues(app: Any) -> List[str]:
    """Return the names of all shard queues."""
    topology = app.backend.config.topology
    return [topology.shard_queue_name(shard) for shard in range(topology.shards)]


def one_id_a_shard(app: Any, ids: Iterable[str]) -> List[str]:
    """Return one of *ids* for each shard that has any."""
    chosen: Dict[int, str] = {
        app.backend.config.topology.shard(task_id): task_id for task_id in ids
    }
    return list(chosen.values())


def exchange(app: Any) -> str:
    """Return the name of the exchange for live copies."""
    return str(app.backend.config.topology.exchange)


def read_store(app: Any, ids: Collection[str]) -> int:
    """Read *ids* from the shards, and never from memory; return how many were found."""
    found = app.backend.layout.store.read(ids)
    return sum(1 for states in found.values() if states)


def remembered(app: Any) -> int:
    """Return how many look-ups of this process were answered from memory; 0 for other backends."""
    metrics = getattr(app.backend, "metrics", None)
    return 0 if metrics is None else int(metrics().remembered)


@contextlib.contextmanager
def packing_everything() -> Iterator[None]:
    """Let each look-up pack all that it reads, instead of stopping after some milliseconds.

    The shards are the same in the end, after fewer look-ups.
    """
    limit, lookup.PACK_SECONDS = lookup.PACK_SECONDS, 60.0
    try:
        yield
    finally:
        lookup.PACK_SECONDS = limit
