"""The number of shards: what it costs to store, to join and to look up.

This backend alone is measured, with several numbers of classic queues and with quorum queues.
Look-ups read the shards: a process that reads often would answer from memory instead.
"""

from __future__ import annotations

import contextlib
import functools
import random
import time
import uuid
from typing import Any, Callable, Dict, Iterator, List, Mapping

from bench.figures import LESS, MORE, Row, percentile
from bench.measures import collect, stranger
from bench.place import Place
from bench.programs import Assistant

PEERS = ("amqp, 16 shards", "amqp, 64 shards", "amqp, 256 shards", "amqp, quorum")

#: Processes that publish at once.
PUBLISHERS = 8

#: How many results are kept for look-ups, unless ``--kept`` says so.
QUICK = (1000,)
FULL = (1000, 100_000)

#: How many results are joined.
JOINED = 1000


def measure(place: Place) -> Iterator[Row]:
    """Yield rates of storing, and times of joins and look-ups, by the number of shards.

    The size of each row is the number of results that are kept meanwhile.
    """
    queues = {name: f"bench-{uuid.uuid4().hex[:8]}" for name in place.chosen(*PEERS)}
    try:
        before = 0
        for kept in place.kept or (QUICK if place.quick else FULL):
            yield from _looking_up(place, queues, kept - before, kept)
            for publishers in (1, PUBLISHERS):
                yield from _storing(place, queues, publishers, kept)
            yield from _joining(place, queues, kept)
            before = kept
    finally:
        for name, queue in queues.items():
            stranger.delete(place, name, queue)


def _storing(place: Place, queues: Mapping[str, str], publishers: int, kept: int) -> Iterator[Row]:
    count = 200 if place.quick else 600

    def work(assistants: List[Assistant]) -> Mapping[str, float]:
        broker, started = place.broker_seconds(), time.perf_counter()
        for one in assistants:
            one.tell("store", ids=[str(uuid.uuid4()) for _ in range(count)], size=stranger.SIZE)
        for one in assistants:
            one.answer()
        seconds, total = time.perf_counter() - started, count * len(assistants)
        return {
            "per second": total / seconds,
            "broker": (place.broker_seconds() - broker) / total * 1e6,
        }

    with contextlib.ExitStack() as stack:
        groups = {
            name: [stack.enter_context(place.assistant(name, queue)) for _ in range(publishers)]
            for name, queue in queues.items()
        }
        found = place.alternate(
            {name: functools.partial(work, group) for name, group in groups.items()}, rounds=3
        )
    key, who = "shards.store", "one publisher"
    if publishers > 1:
        key, who = f"shards.store{publishers}", f"{publishers} publishers"
    end = f"{who}, {kept:,} kept"
    yield Row(key, f"results stored, {end}", "/s", MORE, found["per second"], kept)
    title = f"processor time of RabbitMQ, each result stored, {end}"
    yield Row(f"{key}.broker", title, "µs", LESS, found["broker"], kept)


def _joining(place: Place, queues: Mapping[str, str], kept: int) -> Iterator[Row]:
    with contextlib.ExitStack() as stack:
        measures: Dict[str, Callable[[], Mapping[str, float]]] = {}
        for name, queue in queues.items():
            client, storer = (stack.enter_context(place.assistant(name, queue)) for _ in range(2))
            measures[name] = functools.partial(collect.join, name, client, storer, JOINED)
        found = place.alternate(measures, rounds=3)
    title = f"join of {JOINED:,} results, {kept:,} kept"
    yield Row("shards.join", title, "ms", LESS, found["ms"], kept)


def _looking_up(place: Place, queues: Mapping[str, str], more: int, kept: int) -> Iterator[Row]:
    count = 100 if place.quick else 200
    with contextlib.ExitStack() as stack:
        measures: Dict[str, Callable[[], Mapping[str, float]]] = {}
        for name, queue in queues.items():
            ids = [str(uuid.uuid4()) for _ in range(more)]
            stranger.store(place, name, queue, ids)
            reader = stack.enter_context(place.assistant(name, queue))
            reader.ask("pack", ids=ids)
            measures[name] = functools.partial(_stranger, reader, ids, count)
        found = place.alternate(measures, rounds=3)
    end = f"{kept:,} kept"
    for key, title in (
        ("found", "look-up in the store, median"),
        ("unknown", "look-up of an unknown id in the store, median"),
        ("batch", "look-up of 1,000 ids in the store at once"),
    ):
        yield Row(f"shards.{key}", f"{title}, {end}", "ms", LESS, found[key], kept)


def _stranger(reader: Assistant, ids: List[str], count: int) -> Mapping[str, float]:
    def median(chosen: List[str], **how: Any) -> float:
        answer = reader.ask("read_store", ids=chosen, **how)
        return percentile(answer["milliseconds"], 50)

    return {
        "found": median(random.sample(ids, count)),
        "unknown": median([str(uuid.uuid4()) for _ in range(count)]),
        "batch": median(random.sample(ids, min(1000, len(ids))), at_once=True),
    }
