"""Memory of a process that waits for results of tasks that it has sent."""

from __future__ import annotations

import time
import uuid
from typing import Callable, Dict, Iterator, Mapping

from bench import processes
from bench.figures import LESS, Row
from bench.place import Place


def measure(place: Place) -> Iterator[Row]:
    """Yield bytes for each result that is awaited."""
    count = 2000 if place.quick else 5000
    found = place.alternate(
        {name: _waiting(place, name, count) for name in place.chosen("amqp", "rpc", "redis")},
        rounds=1 if place.quick else 2,
        warm_up=False,
    )
    yield Row(
        "memory.awaited",
        f"memory of the client, each of {count:,} results awaited",
        "bytes",
        LESS,
        found["bytes"],
    )


def _waiting(place: Place, name: str, count: int) -> Callable[[], Mapping[str, float]]:
    def work() -> Dict[str, float]:
        queue = f"bench-{uuid.uuid4().hex[:8]}"
        with place.assistant(name, queue) as client:
            # A first one opens what is opened once.
            for size in (1, count):
                before = client.ask("memory")["bytes"]
                sent = client.ask("send", count=size)
                client.tell("join")
                client.answer()
                _until_quiet(client.pid)
                after = processes.resident_bytes(client.pid)
                storer = "amqp, confirm=False" if name == "amqp" else name
                with place.assistant(storer, queue) as other:
                    other.ask("store", size=10, **sent)
                client.answer()
        return {"bytes": (after - before) / count}

    return work


def _until_quiet(pid: int) -> None:
    """Wait until a process has taken no processor time for a moment."""
    deadline = time.monotonic() + 60
    before = -1.0
    while time.monotonic() < deadline:
        now = processes.cpu_seconds(pid)
        if now == before:
            return
        before = now
        time.sleep(0.5)
