"""The highest rate at which results are stored, pushed and joined for some minutes, none lost.

    python -m bench.load [--minutes 5] [--storing 2] [--threads 2] [--distribution system|forky]

Processes store results, each confirmed before the next of its thread, and one process, which counts
as the one that has sent the tasks, joins all of them in batches. Those that store are at most some
thousands ahead of it, so that the rate is what all of them, and the broker, can do together on this
machine. At the end every result is looked up by a process that has seen none.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import struct
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

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


def _app(url: str, prefix: str) -> Celery:
    app = Celery("load", broker=url, backend="amqp://", set_as_current=False)
    app.conf.update(result_exchange=prefix)
    return app


def _id(prefix: str, number: int) -> str:
    # An id that Celery could have made: of others the store might know something already.
    return str(uuid.UUID(int=uuid.uuid5(_NAMESPACE, f"{prefix}/{number}").int, version=4))


def _write(path: str, number: int) -> None:
    with open(path, "r+b") as file:
        file.write(struct.pack("<q", number))


def _read(path: str) -> int:
    with open(path, "rb") as file:
        number: int = struct.unpack("<q", file.read(8))[0]
    return number


def store(
    url: str, prefix: str, joined: str, origin: str, first: int, step: int, threads: int
) -> None:
    """Store each *step*-th result from *first* on, in several threads, until told to end.

    Parameters:
        origin: the sender of the tasks, as their messages name it.
    """
    app = _app(url, prefix)

    def run(thread: int) -> None:
        number = first + thread
        while (position := _read(joined)) != OVER:
            if position == NOT_YET or number > position + WINDOW:
                time.sleep(0.002)
                continue
            for _ in range(20):
                task_id = _id(prefix, number)
                request = Context(id=task_id, origin=origin)
                app.backend.store_result(task_id, number, "SUCCESS", request=request)
                number += step

    running = [threading.Thread(target=run, args=(n,)) for n in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    app.backend.close()


def join(url: str, prefix: str, joined: str, minutes: float, answer: Any) -> None:
    """Join results in batches, and answer how many there were in what time."""
    app = _app(url, prefix)
    answer.put(anon_nodename())
    number = sent = 0

    def send() -> None:
        """Do what sending tasks does in the result backend, ahead of those that store."""
        nonlocal sent
        while sent < number + 2 * WINDOW:
            app.backend.on_task_call(None, _id(prefix, sent))
            sent += 1

    send()
    _write(joined, 0)
    began = time.monotonic()
    end = began + 60 * minutes
    longest = 0.0
    while time.monotonic() < end:
        batch_began = time.monotonic()
        numbers = range(number, number + BATCH)
        results = ResultSet([app.AsyncResult(_id(prefix, n)) for n in numbers], app=app)
        values = results.join_native(timeout=60)
        if values != list(numbers):
            raise AssertionError(f"joined {values[:5]}... instead of {numbers}")
        longest = max(longest, time.monotonic() - batch_began)
        number += BATCH
        send()
        _write(joined, number)
    answer.put((number, time.monotonic() - began, longest))
    # Until it was looked at what this process has used.
    while _read(joined) != OVER:
        time.sleep(0.05)
    app.backend.close()


def look_up(url: str, prefix: str, count: int, answer: Any) -> None:
    """Look up all results and answer how many are not what they were."""
    app = _app(url, prefix)
    # Those of one shard together: each is long by now, and read once.
    shards: Dict[str, Dict[str, int]] = {}
    for number in range(count):
        task_id = _id(prefix, number)
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
    context = multiprocessing.get_context("spawn")
    prefix = f"load-{uuid.uuid4().hex[:8]}"
    with rabbitmq.Node(rabbitmq.distribution(chosen.distribution)) as node:
        url = node.url()
        joined = str(node.log_path.with_name("joined"))
        Path(joined).write_bytes(struct.pack("<q", NOT_YET))
        answer: Any = context.Queue()
        step = chosen.storing * chosen.threads
        joining = context.Process(target=join, args=(url, prefix, joined, chosen.minutes, answer))
        joining.start()
        origin = answer.get(timeout=60)
        storing = [
            context.Process(
                target=store,
                args=(url, prefix, joined, origin, n * chosen.threads, step, chosen.threads),
            )
            for n in range(chosen.storing)
        ]
        for process in storing:
            process.start()
        usages: List[Usage] = [
            Usage("broker", node.pid),
            *(Usage(f"storing process {n}", p.pid or 0) for n, p in enumerate(storing, 1)),
            Usage("joining process", joining.pid or 0),
        ]
        count, seconds, longest = answer.get(timeout=60 * chosen.minutes + 120)
        lines = [usage.text() for usage in usages]
        _write(joined, OVER)
        for process in (*storing, joining):
            process.join(120)
        print(
            f"RabbitMQ {node.version}: {count} results stored, pushed and joined in {seconds:.0f} "
            f"s, {count / seconds:.0f} a second; the longest batch of {BATCH} took {longest:.1f} s"
        )
        print(*lines, sep="\n")
        load = os.getloadavg()
        print(f"load average of the machine, {os.cpu_count()} cores: {load[0]:.1f}")
        looking = context.Process(target=look_up, args=(url, prefix, count, answer))
        began = time.monotonic()
        looking.start()
        wrong = answer.get(timeout=600)
        looking.join(60)
        print(f"looked up afterwards in {time.monotonic() - began:.0f} s: {wrong} lost or wrong")
        return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
