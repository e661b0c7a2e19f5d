"""Polls of web processes behind a load balancer: each asks for tasks that another one has sent.

Several web processes send tasks at a rate and poll them; two more processes store the results. The
broker's part is the processor time of RabbitMQ and Redis together. The messages of the tasks are
left out: all backends share their cost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
import uuid
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

from bench.figures import LESS, OURS, Figures, Row
from bench.journal import Poll, Verdict, judge
from bench.place import Place
from bench.programs import Assistant
from bench.schedule import Timetable

#: Processes that store.
STORING = 2

#: Seconds before a round begins, so that all processes have got their commands.
AHEAD = 0.7

#: Seconds of a round.
SECONDS = 4.0

#: Seconds of the first round of new processes, which is not counted: it builds shard views.
WARM_UP = 20.0
#: The same for Redis, whose processes learn nothing that makes them faster.
SHORT_WARM_UP = 4.0

#: Web processes and tasks a second, unless the command line says otherwise.
FULL = ((8, 50), (8, 150), (16, 50), (16, 150))
QUICK = FULL[:1]

#: Quorum queues are measured with at most this many processes.
FEWEST = 8


def measure(place: Place) -> Iterator[Row]:
    """Yield latencies of polls, processor time of the broker for each task, and stale answers."""
    pairs = place.fleet or (QUICK if place.quick else FULL)
    for processes in dict.fromkeys(processes for processes, _ in pairs):
        names = place.chosen("amqp", "redis")
        if not place.quick and processes <= FEWEST:
            names = place.chosen("amqp", "amqp, quorum", "redis")
        rates = [rate for each, rate in pairs if each == processes]
        with contextlib.ExitStack() as stack:
            fleets = {
                name: stack.enter_context(Fleet.running(place, name, processes)) for name in names
            }
            for name, fleet in fleets.items():
                seconds = WARM_UP if name.startswith(OURS) else SHORT_WARM_UP
                fleet.round(rates[0], seconds / 2 if place.quick else seconds)
            for rate in rates:
                yield from _at_rate(place, fleets, processes, rate)


def _at_rate(place: Place, fleets: Mapping[str, Fleet], processes: int, rate: int) -> Iterator[Row]:
    found = place.alternate(
        {name: functools.partial(fleet.round, rate) for name, fleet in fleets.items()},
        rounds=3 if place.quick else 5,
        warm_up=False,
    )
    where = f"{processes} processes, {rate} tasks a second"

    def row(name: str, title: str, unit: str, absolute: bool = False) -> Row:
        figures: Figures = found[name]
        key = f"fleet.{processes}x{rate}.{name}"
        return Row(key, f"{title}, {where}", unit, LESS, figures, absolute=absolute)

    yield row("p50", "poll on another process, median", "ms")
    yield row("p99", "poll on another process, 99th percentile", "ms")
    yield row("broker", "processor time of RabbitMQ and Redis, each task polled", "µs")
    yield row("client", "processor time of web processes, each task polled", "µs", True)
    yield row("stale", "answers older than a store that had returned", "answers", True)
    yield row("late", "largest delay of a step of the load generator", "ms", True)


@dataclasses.dataclass
class Fleet:
    """The processes of one peer."""

    place: Place
    name: str
    web: List[Assistant]
    storing: List[Assistant]
    senders: List[Dict[str, str]]

    @classmethod
    @contextlib.contextmanager
    def running(
        cls, place: Place, name: str, processes: int, options: Optional[Mapping[str, Any]] = None
    ) -> Iterator[Fleet]:
        """Run *processes* web processes, and those that store, during a ``with`` block."""
        queue = f"bench-{uuid.uuid4().hex[:8]}"
        with contextlib.ExitStack() as stack:

            def start() -> Assistant:
                return stack.enter_context(place.assistant(name, queue, "bench.fleet_member"))

            web = [start() for _ in range(processes)]
            storing = [start() for _ in range(STORING)]
            yield cls(place, name, web, storing, [one.ask("origin") for one in web])

    def round(self, rate: int, seconds: float = SECONDS) -> Dict[str, float]:
        """Run one round and return its figures."""
        table = Timetable(uuid.uuid4().hex, len(self.web), len(self.storing), rate, seconds)
        arguments = {
            "start": time.monotonic() + AHEAD,
            "timetable": dataclasses.asdict(table),
        }
        for number, one in enumerate(self.storing):
            one.tell("store_on_time", number=number, senders=self.senders, **arguments)
        for number, one in enumerate(self.web):
            one.tell("browse", number=number, **arguments)
        time.sleep(AHEAD)
        broker, client = self.place.broker_seconds(self.name), self._client_seconds()
        verdict, late = self._answers()
        broker = self.place.broker_seconds(self.name) - broker
        client = self._client_seconds() - client
        return {
            "p50": verdict.percentile(50),
            "p99": verdict.percentile(99),
            "broker": broker / table.tasks * 1e6,
            "client": client / table.tasks * 1e6,
            "stale": verdict.stale + verdict.back,
            "late": late * 1e3,
        }

    def _client_seconds(self) -> float:
        return sum(one.cpu_seconds() for one in self.web)

    def _answers(self) -> Tuple[Verdict, float]:
        polls: List[Poll] = []
        stored: Dict[int, float] = {}
        late = 0.0
        for one in self.storing:
            answer = one.answer()
            stored.update(answer["stored"])
            late = max(late, answer["late"])
        for one in self.web:
            answer = one.answer()
            polls += [Poll(*poll) for poll in answer["polls"]]
            late = max(late, answer["late"])
        return judge(polls, stored), late
