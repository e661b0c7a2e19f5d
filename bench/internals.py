"""Everything that the benchmarks know of this backend beyond its public interface."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from typing import (
    Any,
    Callable,
    Collection,
    DefaultDict,
    Dict,
    Iterable,
    Iterator,
    List,
    Sequence,
)

from celery_amqp_results.amqp.confirm_log import Outgoing
from celery_amqp_results.protocol import page
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.store import lookup
from celery_amqp_results.store.packing import split

__all__ = (
    "keep_packed",
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


def keep_packed(app: Any, ids: Sequence[str], store: Callable[[str], Any]) -> None:
    """Keep a result for each of *ids*, in pages, as readers leave a shard after they packed it.

    Parameters:
        app: the app.
        ids: ids of the same length; those of one shard share its pages.
        store: stores the first of them; the others have the same value.
    """
    layout = app.backend.layout
    stored: List[StateMessage] = []
    layout.publish = lambda state, *_: stored.append(state)
    try:
        store(ids[0])
    finally:
        del layout.publish
    (first,) = stored
    shards: DefaultDict[int, List[StateMessage]] = collections.defaultdict(list)
    topology = app.backend.config.topology
    for task_id in ids:
        body = first.body.replace(ids[0].encode(), task_id.encode())
        state = dataclasses.replace(first, id=task_id, body=body)
        shards[topology.shard(task_id)].append(state)
    properties = {"type": page.PAGE, "content_type": page.CONTENT_TYPE, "delivery_mode": 2}
    for shard, states in shards.items():
        queue = topology.shard_queue_name(shard)
        for content in split(states, app.backend.config.options.page_size):
            expires = {"expiration": str(page.expiration(content, first.published))}
            message = Outgoing(queue, {**properties, **expires}, page.encode(content), shard)
            layout.publisher.publish([message])


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
