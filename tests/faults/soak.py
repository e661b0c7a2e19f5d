"""Provokes random faults for some minutes while results are stored and waited for.

    python -m tests.faults.soak --minutes 30 [--seed N] [--distribution system|forky] [FAULT ...]

The seed of the random choices is printed first. A table at the end has a row for each fault. The
exit code is 1 if a result was lost, wrong or late.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

from tests.faults import faults, recorder
from tests.faults.load import Load
from tests.faults.recorder import Verdict
from tests.faults.resources import Resources, left
from tools import check_history, rabbitmq


@dataclasses.dataclass
class Row:
    """The statistics of one fault."""

    provoked: int = 0
    at_stake: int = 0
    refused: int = 0
    lost: int = 0
    wrong: int = 0
    late: int = 0
    chords: int = 0
    doubled: int = 0
    longest_wait: float = 0.0
    longest_store: float = 0.0

    def add(self, verdict: Verdict) -> None:
        """Add the verdict of a round."""
        self.provoked += 1
        self.at_stake += verdict.at_stake
        self.refused += verdict.refused
        self.lost += verdict.count("lost", "missed")
        self.wrong += verdict.count("wrong", "older", "replaced", "twice", "unfired")
        self.chords += verdict.chords
        self.doubled += verdict.doubled
        self.late += verdict.count("late")
        self.longest_wait = max(self.longest_wait, verdict.longest_wait)
        self.longest_store = max(self.longest_store, verdict.longest_store)


HEADER = (
    "fault", "provoked", "at stake", "refused", "lost", "wrong", "late", "chords", "doubled",
    "wait s", "store s",
)  # fmt: skip
#: The pools of the workers, and the number of processes that poll.
POOLS, FLEET = ("prefork", "threads", "gevent"), 3


def table(rows: Dict[str, Row]) -> str:
    """Return the rows as text."""
    lines: List[Tuple[str, ...]] = [HEADER]
    for name, row in rows.items():
        lines.append(
            (
                name,
                *map(str, (row.provoked, row.at_stake, row.refused, row.lost, row.wrong, row.late)),
                *map(str, (row.chords, row.doubled)),
                f"{row.longest_wait:.1f}",
                f"{row.longest_store:.1f}",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths))
        )
        for line in lines
    )


@contextlib.contextmanager
def _nodes(kind: str, name: str) -> Iterator[List[rabbitmq.Node]]:
    made_of = rabbitmq.distribution(name)
    if kind == "cluster":
        with rabbitmq.Cluster(made_of, 3, config=CLUSTER_CONFIG) as cluster:
            yield cluster.nodes
    else:
        with rabbitmq.Node(made_of, plugins=["rabbitmq_management"]) as node:
            yield [node]


#: RabbitMQ's recommendation for three nodes. It has no effect on a cluster that keeps its metadata
#: in Khepri, as 4.3 always does.
CLUSTER_CONFIG = "cluster_partition_handling = pause_minority"


def soak(kind: str, options: argparse.Namespace, minutes: float, rows: Dict[str, Row]) -> int:
    """Provoke faults in one kind of place for some minutes; return the number of failed rounds."""
    catalogue = faults.CLUSTER if kind == "cluster" else faults.SINGLE
    chosen = [fault for name, fault in catalogue.items() if _wanted(name, options.faults)]
    if not chosen:
        return 0
    chance = random.Random(options.seed)
    bad = 0
    for fault in chosen:
        rows[fault.name] = Row()
    with _nodes(kind, options.distribution) as nodes:
        end = time.monotonic() + 60 * minutes
        queue: List[faults.Fault] = []
        while time.monotonic() < end:
            # Start a new load now and then: every check reads back all that the load has stored.
            queue_type = "quorum" if kind == "cluster" else chance.choice(["classic", "quorum"])
            seed = chance.getrandbits(32)
            print(f"-- {kind}, {queue_type} queues, seed of the load {seed}", flush=True)
            with faults.place(
                nodes, queue_type=queue_type, seed=seed, workers=POOLS, fleet=FLEET,
                pause=options.pause,
            ) as place:  # fmt: skip
                used = Resources(place)
                for _ in range(options.rounds):
                    if time.monotonic() >= end:
                        break
                    if not queue:
                        # Each fault once before any of them twice.
                        queue = chance.sample(chosen, len(chosen))
                    bad += _round(place, queue.pop(), rows)
                    used.sample()
                bad += _check_history(place.load, options.history)
            print(used.text(), flush=True)
            print(f"left on the broker: {left(nodes)}", flush=True)
    return bad


def _check_history(load: Load, folder: Optional[str]) -> bool:
    """Check all that the load did by the independent checker; keep the history in *folder*."""
    events = recorder.history(load.folder)
    if folder is not None:
        path = Path(folder, f"{load.run}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(event) + "\n" for event in events))
        print(f"the history is in {path}", flush=True)
    found = check_history.check(events)
    print(f"independent checker: {len(events)} events, {len(found)} violations", flush=True)
    for violation in found[:20]:
        print(*violation, flush=True)
    if found:
        print(f"journals are in {load.keep()}", flush=True)
    return bool(found)


def _wanted(name: str, words: Sequence[str]) -> bool:
    return not words or any(word in name for word in words)


def _round(place: faults.Place, fault: faults.Fault, rows: Dict[str, Row]) -> int:
    load = place.load
    began = load.now()
    print(f"{time.strftime('%H:%M:%S')} {fault.name}", end=" ", flush=True)
    for _ in range(fault.times):
        load.until_stored(30)
        if fault.loses:
            load.journal.deleted()
        fault.provoke(place)
        if fault.loses:
            load.journal.deleted()
    if fault.loses:
        # Deleted results are lost by design: only later ones are checked.
        began = load.now()
        load.until_stored(100)
    load.until_stored(30)
    load.until_flowing()
    verdict = load.verdict(began, deleted=began if fault.loses else 0.0)
    rows[fault.name].add(verdict)
    print(
        f"{load.now() - began:.0f} s, {verdict.at_stake} at stake, "
        f"{verdict.chords} chords ({verdict.doubled} doubled), "
        f"{len(verdict.violations)} broken promises, longest wait {verdict.longest_wait:.1f} s",
        flush=True,
    )
    if verdict.violations:
        print(verdict.text(), f"journals are in {load.keep()}", sep="\n", flush=True)
    return bool(verdict.violations)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.soak",
        description="Provoke faults at random while results are stored and waited for.",
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="how long; 10 by default")
    parser.add_argument("--seed", type=int, help="of what is chosen; by default a new one")
    parser.add_argument(
        "--distribution", default="system", help="RabbitMQ of the system, or a Debian suite"
    )
    parser.add_argument(
        "--rounds", type=int, default=12, help="faults until there is a new load; 12 by default"
    )
    parser.add_argument(
        "--pause",
        type=float,
        default=0.002,
        help="seconds between two results of each storing process; 0.002 by default",
    )
    parser.add_argument(
        "--place",
        choices=("single", "cluster", "both"),
        default="both",
        help="one node, or a cluster of three, or one after the other",
    )
    parser.add_argument(
        "--history", metavar="FOLDER", help="keep the histories, for tools/check_history.py"
    )
    parser.add_argument("faults", nargs="*", help="parts of the names of faults; all by default")
    options = parser.parse_args(arguments)
    # Raise SystemExit, so that everything is cleaned up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.seed is None:
        options.seed = random.randrange(2**32)
    rabbitmq.ensure_installed(options.distribution)
    version = rabbitmq.distribution(options.distribution).version
    print(f"RabbitMQ {version}, --seed {options.seed}, {options.minutes:g} minutes", flush=True)
    rows: Dict[str, Row] = {}
    bad = 0
    places = ["single", "cluster"] if options.place == "both" else [options.place]
    shares = {"single": 0.65, "cluster": 0.35} if len(places) == 2 else {places[0]: 1.0}
    try:
        for kind in places:
            try:
                bad += soak(kind, options, shares[kind] * options.minutes, rows)
            except Exception:
                traceback.print_exc()
                bad += 1
    finally:
        # Rounds before Ctrl-C are reported too.
        print()
        print(table(rows))
    if bad:
        print(f"\n{bad} rounds went wrong; --seed {options.seed} chooses the same faults again")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
