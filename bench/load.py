"""The highest rate at which results are stored, pushed and joined for some minutes, none lost.

    python -m bench.load [--minutes 5] [--storing 2] [--threads 2] [--distribution system|forky]

Processes store results, each confirmed before the next of its thread, and one process, which counts
as the one that has sent the tasks, joins all of them in batches. Those that store are at most some
thousands ahead of it, so that the rate is what all of them, and the broker, can do together on this
machine. At the end every result is looked up by a process that has seen none.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import struct
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

from celery import Celery
from celery.app.task import Context
from celery.result import ResultSet
from celery.utils.nodenames import anon_nodename

from bench import internals
from tools import rabbitmq

_NAMESPACE = uuid.UUID("e5a5f0a9-4d7c-4f8b-8a4d-0a4d6f6c9a11")

#: How many results those that store may be ahead.
WINDOW = 4000
#: How many results are joined at once.
BATCH = 500

#: Content of the file that counts joined results before the join begins, and after the end.
NOT_YET, OVER = -2, -1

CONTEXT = multiprocessing.get_context("spawn")


@dataclasses.dataclass(frozen=True)
class Load:
    """The broker, the names on it, and the file that counts joined results."""

    url: str
    prefix: str
    joined: str

    def app(self) -> Celery:
        """Return an app."""
        app = Celery("load", broker=self.url, backend="amqp://", set_as_current=False)
        app.conf.update(result_exchange=self.prefix)
        return app

    def task_id(self, number: int) -> str:
        """Return an id; it looks like one that Celery makes."""
        name = f"{self.prefix}/{number}"
        return str(uuid.UUID(int=uuid.uuid5(_NAMESPACE, name).int, version=4))

    def write(self, number: int) -> None:
        """Tell all processes how many results are joined."""
        with open(self.joined, "r+b") as file:
            file.write(struct.pack("<q", number))

    def read(self) -> int:
        """Return how many results are joined."""
        with open(self.joined, "rb") as file:
            number: int = struct.unpack("<q", file.read(8))[0]
        return number


def store(load: Load, origin: str, first: int, step: int, threads: int) -> None:
    """Store each *step*-th result from *first* on, in several threads, until the join is over.

    Parameters:
        origin: the sender of the tasks, as their messages name it.
    """
    app = load.app()

    def run(thread: int) -> None:
        number = first + thread
        while (position := load.read()) != OVER:
            if position == NOT_YET or number > position + WINDOW:
                time.sleep(0.002)
                continue
            for _ in range(20):
                task_id = load.task_id(number)
                request = Context(id=task_id, origin=origin)
                app.backend.store_result(task_id, number, "SUCCESS", request=request)
                number += step

    running = [threading.Thread(target=run, args=(n,)) for n in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    app.backend.close()


def join(load: Load, minutes: float, answer: Any) -> None:
    """Join results in batches, and answer with their number, the seconds and the longest batch."""
    app = load.app()
    answer.put(anon_nodename())
    number = sent = 0

    def send() -> None:
        """Do what sending tasks does in the result backend, ahead of the storing processes."""
        nonlocal sent
        while sent < number + 2 * WINDOW:
            app.backend.on_task_call(None, load.task_id(sent))
            sent += 1

    send()
    load.write(0)
    began = time.monotonic()
    end = began + 60 * minutes
    longest = 0.0
    while time.monotonic() < end:
        batch_began = time.monotonic()
        numbers = range(number, number + BATCH)
        results = ResultSet([app.AsyncResult(load.task_id(n)) for n in numbers], app=app)
        values = results.join_native(timeout=60)
        if values != list(numbers):
            raise AssertionError(f"joined {values[:5]}... instead of {numbers}")
        longest = max(longest, time.monotonic() - batch_began)
        number += BATCH
        send()
        load.write(number)
    answer.put((number, time.monotonic() - began, longest))
    # The main process reads the memory of this one first.
    while load.read() != OVER:
        time.sleep(0.05)
    app.backend.close()


def look_up(load: Load, count: int, answer: Any) -> None:
    """Look up all results, and answer how many are lost or wrong."""
    app = load.app()
    # By now shards are long: each is read once.
    shards: Dict[str, Dict[str, int]] = {}
    for number in range(count):
        task_id = load.task_id(number)
        shards.setdefault(internals.shard_queue(app, task_id), {})[task_id] = number
    wrong = 0
    for ids in shards.values():
        found: Dict[str, Any] = {}
        try:
            found.update(app.backend.get_many(ids, timeout=0))
        except Exception as exc:
            print(f"a look-up failed: {exc}", file=sys.stderr)
        wrong += sum(i not in found or found[i]["result"] != n for i, n in ids.items())
    answer.put(wrong)
    app.backend.close()


class Usage:
    """Processor time and memory of a process."""

    def __init__(self, name: str, pid: int) -> None:
        self.name = name
        self.pid = pid
        self.began = time.monotonic()
        self._seconds = self._used()

    def _used(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def text(self) -> str:
        """Return what was used since it was made."""
        share = (self._used() - self._seconds) / (time.monotonic() - self.began)
        status = Path(f"/proc/{self.pid}/status").read_text()
        peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
        return f"{self.name}: {100 * share:.0f} % of a core, at most {peak:.0f} MiB"


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--storing", type=int, default=2, help="processes that store")
    parser.add_argument("--threads", type=int, default=2, help="threads of each")
    parser.add_argument("--distribution", default="system")
    chosen = parser.parse_args(arguments)
    rabbitmq.ensure_installed(chosen.distribution)
    with rabbitmq.Node(rabbitmq.distribution(chosen.distribution)) as node:
        joined = node.log_path.with_name("joined")
        joined.write_bytes(struct.pack("<q", NOT_YET))
        load = Load(node.url(), f"load-{uuid.uuid4().hex[:8]}", str(joined))
        count = _run(load, node, chosen)
        print(f"load average, {os.cpu_count()} cores: {os.getloadavg()[0]:.1f}")
        return _check(load, count)


def _run(load: Load, node: rabbitmq.Node, chosen: argparse.Namespace) -> int:
    """Store and join for the chosen time, print the figures, and return the number of results."""
    answer: Any = CONTEXT.Queue()
    joining = CONTEXT.Process(target=join, args=(load, chosen.minutes, answer))
    joining.start()
    origin = answer.get(timeout=60)
    step = chosen.storing * chosen.threads
    storing = [
        CONTEXT.Process(target=store, args=(load, origin, first, step, chosen.threads))
        for first in range(0, step, chosen.threads)
    ]
    for process in storing:
        process.start()
    usages = [
        Usage("broker", node.pid),
        *(Usage(f"storing process {n}", p.pid or 0) for n, p in enumerate(storing, 1)),
        Usage("joining process", joining.pid or 0),
    ]
    count, seconds, longest = answer.get(timeout=60 * chosen.minutes + 120)
    lines = [usage.text() for usage in usages]
    load.write(OVER)
    for process in (*storing, joining):
        process.join(120)
    print(
        f"RabbitMQ {node.version}: {count} results stored, pushed and joined in {seconds:.0f} s, "
        f"{count / seconds:.0f} a second; the longest batch of {BATCH} took {longest:.1f} s"
    )
    print(*lines, sep="\n")
    return int(count)


def _check(load: Load, count: int) -> int:
    """Look up all results in a new process; return the exit code."""
    answer: Any = CONTEXT.Queue()
    looking = CONTEXT.Process(target=look_up, args=(load, count, answer))
    began = time.monotonic()
    looking.start()
    wrong = answer.get(timeout=600)
    looking.join(60)
    print(f"looked up afterwards in {time.monotonic() - began:.0f} s: {wrong} lost or wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
