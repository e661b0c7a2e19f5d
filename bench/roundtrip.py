"""Time from ``delay()`` to ``get()`` for one task, beside other backends in the same run.

    python bench/roundtrip.py [--rounds 5] [--tasks 200] [--distribution system|forky]

The rounds of the peers alternate; the figures are medians over all rounds, with the least and the
largest median of a round.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from pathlib import Path
from typing import Dict, List

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import peers
from tools import rabbitmq


def round_trips(app: object, tasks: int) -> List[float]:
    """Send *tasks* tasks one after the other and return the seconds each took."""
    noop = app.tasks["bench.noop"]  # type: ignore[attr-defined]
    taken = []
    for _ in range(tasks):
        started = time.perf_counter()
        noop.delay().get(timeout=30)
        taken.append(time.perf_counter() - started)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--distribution", default="system")
    options = parser.parse_args()
    names = ["amqp", "rpc", "redis"]
    taken: Dict[str, List[List[float]]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        node = stack.enter_context(rabbitmq.Node(rabbitmq.distribution(options.distribution)))
        redis = stack.enter_context(peers.private_redis())
        apps = {
            name: stack.enter_context(peers.worker(name, node.url(), redis, "prefork", 1))
            for name in names
        }
        for app in apps.values():
            round_trips(app, 30)
        for _ in range(options.rounds):
            for name, app in apps.items():
                taken[name].append(round_trips(app, options.tasks))
        print(f"RabbitMQ {node.version}, {options.rounds} rounds of {options.tasks} tasks")
        for name, rounds in taken.items():
            medians = [statistics.median(r) * 1e3 for r in rounds]
            every = sorted(x * 1e3 for r in rounds for x in r)
            print(
                f"{name:6} median {statistics.median(every):6.2f} ms "
                f"({min(medians):.2f} to {max(medians):.2f})   "
                f"99th percentile {every[int(len(every) * 0.99)]:6.2f} ms"
            )


if __name__ == "__main__":
    main()
