"""Collecting: a process that sent N tasks waits for the results of all of them.

The process is frozen while another one stores the results. When it continues, all its work is
waiting in sockets and queues, so that a background thread is no advantage. The clock runs from then
until ``join()`` returns.
"""

from __future__ import annotations

import contextlib
import functools
import time
import uuid
from typing import Any, Callable, Dict, Iterator, List, Mapping, Tuple

import kombu

from bench import internals, peers
from bench.figures import LESS, MORE, Row
from bench.place import Place
from bench.programs import Assistant

#: Bytes of the text in each result.
SIZE = 50


def measure(place: Place) -> Iterator[Row]:
    """Yield results per second, and the time and processor time of joins of several sizes."""
    sizes = (1000,) if place.quick else (1000, 10_000)
    with contextlib.ExitStack() as stack:
        pairs: Dict[str, Tuple[Assistant, Assistant]] = {}
        queue = f"bench-{uuid.uuid4().hex[:8]}"
        for name in place.chosen("amqp", "rpc", "redis"):
            # This backend stores the same messages sooner if it does not wait for confirms.
            without_wait = "amqp, confirm=False" if name == "amqp" else name
            pairs[name] = (
                stack.enter_context(place.assistant(name, queue)),
                stack.enter_context(place.assistant(without_wait, queue)),
            )
        for name, (client, storer) in pairs.items():
            # The first wait opens connections; and every shard is there after this.
            for _ in range(2):
                join(name, client, storer, 1000)
        for size in sizes:
            measures: Dict[str, Callable[[], Mapping[str, float]]] = {
                name: functools.partial(join, name, client, storer, size)
                for name, (client, storer) in pairs.items()
            }
            if size == sizes[0]:
                measures["bare py-amqp"] = functools.partial(_bare, place, queue, size)
            rounds = None if size == sizes[0] else 2
            found = place.alternate(measures, rounds, warm_up=False)
            if size == sizes[0]:
                yield Row(
                    "collect", "results collected in one process", "/s", MORE, found["per second"]
                )
                yield Row(
                    "collect.cpu",
                    "processor time of the client, each result collected",
                    "µs",
                    LESS,
                    found["cpu"],
                )
            yield Row("join", f"join of {size:,} results", "ms", LESS, found["ms"], size)


def join(name: str, client: Assistant, storer: Assistant, size: int) -> Dict[str, float]:
    """Have *client* join *size* results that *storer* stores while it is frozen."""
    sent = client.ask("send", count=size)
    client.tell("join")
    client.answer()
    # It has to have asked the broker for what it needs before it is frozen.
    time.sleep(0.3)
    with client.frozen():
        storer.ask("store", size=SIZE, **sent)
    started = time.perf_counter()
    done = client.answer()
    seconds = time.perf_counter() - started
    if done["count"] != size:
        raise RuntimeError(f"{name} has joined {done['count']} of {size} results")
    return {
        "per second": size / seconds,
        "ms": seconds * 1e3,
        "cpu": done["cpu"] / size * 1e6,
    }


def _bare(place: Place, queue: str, size: int) -> Dict[str, float]:
    """Measure py-amqp by itself, with a queue at the same exchange."""
    app = place.app("amqp, confirm=False", queue)
    connection = kombu.Connection(place.node.url()).connection
    try:
        channel = connection.channel()
        name = channel.queue_declare("", exclusive=True).queue
        channel.queue_bind(name, internals.exchange(app), "#")
        bodies: List[Any] = []
        channel.basic_consume(name, no_ack=True, callback=lambda m: bodies.append(m.body))
        for _ in range(size):
            task_id = str(uuid.uuid4())
            request = peers.context(task_id)
            app.backend.store_result(task_id, "x" * SIZE, "SUCCESS", request=request)
        peers.close(app)
        cpu, started = time.process_time(), time.perf_counter()
        while len(bodies) < size:
            connection.drain_events(timeout=60)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    finally:
        connection.close()
    return {"per second": size / seconds, "ms": seconds * 1e3, "cpu": cpu / size * 1e6}
