"""Endurance: memory of all processes while results are stored, confirmed and pushed to one waiter.

All results are kept. At the end a process that did not send the tasks looks all of them up, and the
look-ups are measured as those of the measure *lookup* are.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from typing import Iterator, List

from bench import processes
from bench.figures import LESS, MORE, OURS, Row
from bench.measures import stranger
from bench.place import Place
from bench.programs import Assistant

#: How many results are stored, where nothing else is said.
QUICK, FULL = 4000, 1_000_000

#: Results that are awaited at once, and threads that store them.
WINDOW, THREADS = 1000, 8

#: How often memory is read.
SAMPLES = 20


def measure(place: Place) -> Iterator[Row]:
    """Yield what the processes hold again and again, and then milliseconds of look-ups."""
    for count in place.kept or [QUICK if place.quick else FULL]:
        queue = f"bench-{uuid.uuid4().hex[:8]}"
        options = stranger.shards_for(count)
        ids: List[str] = []
        with contextlib.ExitStack() as stack:
            client, storer = (
                stack.enter_context(place.assistant(OURS, queue, **options)) for _ in range(2)
            )
            for number in range(SAMPLES):
                started = time.monotonic()
                new = stored(client, storer, count * (number + 1) // SAMPLES - len(ids))
                rate = len(new) / (time.monotonic() - started)
                ids += new
                yield from _sample(place, client, storer, rate, len(ids))
            yield from pushed(client, count)
        with place.assistant(OURS, queue, **options) as reader:
            yield from stranger.packing(place, queue, reader, ids)
            yield from stranger.all_found(place, queue, reader, ids)
            yield from stranger.looking_up(place, {OURS: reader}, ids)
        stranger.delete(place, OURS, queue, **options)


def stored(client: Assistant, storer: Assistant, count: int) -> List[str]:
    """Have *storer* store results that *client* waits for; return their ids."""
    ids: List[str] = []
    while len(ids) < count:
        sent = client.ask("send", count=min(WINDOW, count - len(ids)))
        client.tell("join")
        client.answer()
        storer.ask("store_together", threads=THREADS, value="x" * stranger.SIZE, **sent)
        joined = client.answer()["count"]
        if joined != len(sent["ids"]):
            raise RuntimeError(f"{joined} of {len(sent['ids'])} results were joined")
        ids += sent["ids"]
    return ids


def _sample(
    place: Place, client: Assistant, storer: Assistant, rate: float, done: int
) -> Iterator[Row]:
    node, end = place.node, f"{done:,} results stored"
    for key, title, size in (
        ("client", "memory of the waiting process", client.ask("memory")["bytes"]),
        ("storer", "memory of the storing process", storer.ask("memory")["bytes"]),
        ("broker", "memory of RabbitMQ", node.memory()),
        ("used", "memory of RabbitMQ in use", stranger.memory_in_use(node)),
        ("disk", "disk of RabbitMQ", processes.folder_bytes(node.log_path.parent)),
    ):
        figures = {OURS: [size / 1e6]}
        yield Row(f"endurance.{key}", f"{title}, {end}", "MB", LESS, figures, done, absolute=True)
    title = f"results stored, confirmed and joined, {end}"
    yield Row("endurance.rate", title, "/s", MORE, {OURS: [rate]}, done, absolute=True)


def pushed(client: Assistant, count: int) -> Iterator[Row]:
    """Yield how many results the waiting process had to look up, although all were pushed."""
    counted = client.ask("metrics")
    if counted["pushed"] < count:
        raise RuntimeError(f"{counted['pushed']} of {count} results were pushed")
    title = f"ids that the waiting process looked up, {count:,} results pushed"
    figures = {OURS: [float(counted["looked_up"])]}
    yield Row("endurance.looked_up", title, "ids", LESS, figures, count, absolute=True)
