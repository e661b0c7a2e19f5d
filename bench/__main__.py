"""Measures the backend beside others on this machine, in one run.

    python -m bench [--quick] [--distribution system|forky] [--json FILE] [SCENARIO ...]

The rounds of the peers alternate, so that a machine that gets slower gets slower for all; given
are medians over the rounds, with the least and the largest. A private RabbitMQ and a private Redis
without persistence are started and stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import time
import uuid
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence

import amqp
import celery
import kombu
from celery import Celery, chord, group
from celery.app.task import Context

from bench import peers
from tools import rabbitmq


class Place(NamedTuple):
    """Where a scenario runs."""

    node: rabbitmq.Node
    redis: str
    quick: bool

    def rounds(self) -> int:
        """How many rounds of each peer are measured."""
        return 2 if self.quick else 5

    def apps(self, names: Sequence[str], stack: contextlib.ExitStack) -> Dict[str, Celery]:
        """Return an app for each peer, with a prefork worker of two processes."""
        return {
            name: stack.enter_context(peers.worker(name, self.node.url(), self.redis))
            for name in names
        }


#: By peer, the figures of the rounds.
Figures = Dict[str, List[float]]


def alternate(
    place: Place, apps: Dict[str, Any], measure: Callable[[Any], float], warm_up: bool = True
) -> Figures:
    """Measure each of *apps* in turn, as often as there are rounds."""
    if warm_up:
        for app in apps.values():
            measure(app)
    figures: Figures = {name: [] for name in apps}
    for _ in range(place.rounds()):
        for name, app in apps.items():
            figures[name].append(measure(app))
    return figures


def per_second(count: int, work: Callable[[], Any]) -> float:
    """Return how many of *count* are done in a second."""
    started = time.perf_counter()
    work()
    return count / (time.perf_counter() - started)


# -- scenarios: each yields (title, unit, figures) -----------------------------------------------

Row = Any


def scenario_roundtrip(place: Place) -> Iterator[Row]:
    """One task after the other, from delay() to get()."""
    count = 100 if place.quick else 300
    samples: Dict[str, List[float]] = {}

    with contextlib.ExitStack() as stack:
        apps = place.apps(["amqp", "rpc", "redis"], stack)
        names = {id(app): name for name, app in apps.items()}

        def measure(app: Celery) -> float:
            taken = []
            for _ in range(count):
                started = time.perf_counter()
                app.tasks["bench.noop"].delay().get(timeout=30)
                taken.append((time.perf_counter() - started) * 1e3)
            samples.setdefault(names[id(app)], []).extend(taken)
            return statistics.median(taken)

        # Until every shard queue was used by every process: that costs once in a broker's life.
        for app in apps.values():
            group(app.signature("bench.noop") for _ in range(1500)).apply_async().get(timeout=120)
        figures = alternate(place, apps, measure)
    yield "delay() to get(), one task, median", "ms", figures
    yield (
        "delay() to get(), one task, 99th percentile",
        "ms",
        {name: [sorted(taken)[int(len(taken) * 0.99)]] for name, taken in samples.items()},
    )


def scenario_store(place: Place) -> Iterator[Row]:
    """store_result in one process, nobody waiting."""
    count = 1000 if place.quick else 3000
    queue = f"bench-{uuid.uuid4().hex[:8]}"
    url = place.node.url()
    confirmed, unconfirmed, rpc, redis = (
        peers.make_app(name, url, place.redis, f"{queue}-{number}")
        for number, name in enumerate(["amqp", "amqp", "rpc", "redis"])
    )
    unconfirmed.conf.result_backend_transport_options = {"confirm": False}
    connection = kombu.Connection(url).connection
    channel = connection.channel()
    channel.queue_declare(queue, durable=True, auto_delete=False)
    sure = connection.channel()
    sure.confirm_select()

    def bare(method: Callable[..., Any]) -> Callable[[], float]:
        def measure() -> float:
            def work() -> None:
                for _ in range(count):
                    message = amqp.Message(
                        b"x" * 200, delivery_mode=2, content_type="application/json"
                    )
                    method(message, routing_key=queue)

            return per_second(count, work)

        return measure

    def through(app: Celery) -> Callable[[], float]:
        def measure() -> float:
            def work() -> None:
                for _ in range(count):
                    task_id = str(uuid.uuid4())
                    request = Context(
                        id=task_id, correlation_id=task_id, reply_to=queue, hostname="bench",
                        origin="gen1@bench", children=[], delivery_info={},
                    )  # fmt: skip
                    app.backend.store_result(task_id, 42, "SUCCESS", request=request)

            return per_second(count, work)

        return measure

    measures = {
        "amqp": through(confirmed),
        "amqp, confirm=False": through(unconfirmed),
        "rpc": through(rpc),
        "redis": through(redis),
        "bare py-amqp, confirmed": bare(sure.basic_publish_confirm),
        "bare py-amqp": bare(channel._basic_publish),
    }
    yield "results stored in one process", "/s", alternate(place, measures, lambda m: m())
    for app in (confirmed, unconfirmed):
        app.backend.close()
    connection.close()


def scenario_join(place: Place) -> Iterator[Row]:
    """A group of no-op tasks, from apply_async() to the last result."""
    for count in (100, 1000) if place.quick else (1000, 10000):
        with contextlib.ExitStack() as stack:
            apps = place.apps(["amqp", "rpc", "redis"], stack)

            def measure(app: Celery, count: int = count) -> float:
                tasks = group(app.signature("bench.noop") for _ in range(count))
                return per_second(count, lambda: tasks.apply_async().get(timeout=300))

            figures = alternate(place, apps, measure)
            if count >= 10000:
                queues = place.node.queue_count()
        yield f"tasks end to end, group of {count:,}", "/s", figures
        if count >= 10000:
            yield f"queues on the broker after groups of {count:,}", "", {"all": [queues]}


def scenario_chord(place: Place) -> Iterator[Row]:
    """A chord of no-op tasks, from apply_async() to the result of the body."""
    for count in (10, 100) if place.quick else (10, 100, 1000):
        with contextlib.ExitStack() as stack:
            apps = place.apps(["amqp", "redis"], stack)

            def measure(app: Celery, count: int = count) -> float:
                header = [app.signature("bench.noop") for _ in range(count)]
                started = time.perf_counter()
                chord(header, app.signature("bench.count")).apply_async().get(timeout=120)
                return (time.perf_counter() - started) * 1e3

            yield f"chord of {count:,}", "ms", alternate(place, apps, measure)


def scenario_lookup(place: Place) -> Iterator[Row]:
    """Look-ups by a process that did not send the tasks."""
    for kept in (1000, 10000) if place.quick else (1000, 10000, 100000):
        queue = f"bench-{uuid.uuid4().hex[:8]}"
        apps = {
            name: peers.make_app(name, place.node.url(), place.redis, f"{queue}-{name}")
            for name in ("amqp", "redis")
        }
        apps["amqp"].conf.result_backend_transport_options = {"confirm": False}
        ids = [str(uuid.uuid4()) for _ in range(kept)]
        before = place.node.memory()
        for app in apps.values():
            for task_id in ids:
                app.backend.store_result(task_id, {"value": "x" * 150}, "SUCCESS")
        # From here on a stranger: nothing is open, nothing is known.
        apps["amqp"].backend.close()

        def found(app: Celery, ids: List[str] = ids) -> float:
            return look_up(app, [ids[(n * 7919) % len(ids)] for n in range(200)])

        def missing(app: Celery) -> float:
            return look_up(app, [str(uuid.uuid4()) for _ in range(200)])

        def many(app: Celery, ids: List[str] = ids) -> float:
            started = time.perf_counter()
            dict(app.backend.get_many(ids[:1000], timeout=60))
            return (time.perf_counter() - started) * 1e3

        # The first reader of a shard packs it.
        for _ in range(3):
            many(apps["amqp"])
            apps["amqp"].backend.layout.poll(ids)
        yield f"look-up by a stranger, {kept:,} kept", "ms", alternate(place, apps, found)
        yield f"look-up of an unknown id, {kept:,} kept", "ms", alternate(place, apps, missing)
        yield f"1,000 ids at once, {kept:,} kept", "ms", alternate(place, apps, many)
        yield (
            f"memory of the broker, growth per result kept, {kept:,} kept",
            "bytes",
            {"amqp": [(place.node.memory() - before) / kept]},
        )
        apps["amqp"].backend.close()


def look_up(app: Celery, ids: List[str]) -> float:
    """Return the median of the milliseconds that one look-up takes."""
    taken = []
    for task_id in ids:
        started = time.perf_counter()
        app.backend._get_task_meta_for(task_id)
        taken.append((time.perf_counter() - started) * 1e3)
    return statistics.median(taken)


SCENARIOS: Dict[str, Callable[[Place], Iterator[Row]]] = {
    name[len("scenario_") :]: function
    for name, function in list(globals().items())
    if name.startswith("scenario_")
}


def number(value: float) -> str:
    """Return *value* with about three digits."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("scenarios", nargs="*", choices=[[], *SCENARIOS], metavar="SCENARIO",
                        help=f"of {', '.join(SCENARIOS)}; all by default")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="smaller and fewer rounds")
    parser.add_argument("--distribution", default="system", help="system, or a Debian suite")
    parser.add_argument("--json", type=Path, help="write the figures into this file as well")
    options = parser.parse_args()
    rows = []
    with contextlib.ExitStack() as stack:
        rabbitmq.ensure_installed(options.distribution)
        made_of = rabbitmq.distribution(options.distribution)
        node = stack.enter_context(rabbitmq.Node(made_of))
        redis = stack.enter_context(peers.private_redis())
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "rabbitmq": node.version,
            "celery": celery.__version__,
            "kombu": kombu.__version__,
            "python": platform.python_version(),
            "cores": os.cpu_count(),
        }
        print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
        place = Place(node, redis, options.quick)
        for name in options.scenarios or SCENARIOS:
            for title, unit, figures in SCENARIOS[name](place):
                rows.append({"title": title, "unit": unit, "figures": figures})
                print(f"\n{title}", flush=True)
                for peer, values in figures.items():
                    spread = f"({number(min(values))} to {number(max(values))})"
                    median = number(statistics.median(values))
                    print(f"  {peer:26}{median:>10} {unit:6}{spread if len(values) > 1 else ''}")
                sys.stdout.flush()
    if options.json:
        options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
