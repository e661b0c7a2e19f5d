"""Whether memory, descriptors and connections stay the same however many results pass.

::

    python -m bench.flat --results 1000000 [--broker amqp://...]
    python -m bench.flat --reconnects 1000

One process stores results, another sends the ids and waits for each, in windows; every tenth of
the way the memory of both and of the broker (of a node of its own, if none is given) is printed.
Results expire after a minute, so that what is kept stays the same as well.

With ``--reconnects`` all connections of a process that stores, waits and looks up are reset, again
and again, and each time it stores a result, waits for it, and looks it up.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import threading
import time
import uuid
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Tuple

import kombu
from celery import Celery, states

from tools import rabbitmq
from tools.proxy import Proxy

#: Results that are awaited at once.
WINDOW = 200


def make_app(broker: str, prefix: str) -> Celery:
    """Return an app whose results expire after a minute."""
    app = Celery("flat", broker=broker, backend="amqp://", set_as_current=False)
    app.conf.update(
        result_exchange=prefix,
        result_expires=60,
        result_backend_transport_options={"shards": 16},
    )
    return app


def memory(pid: int) -> float:
    """Return the resident memory of a process, in MiB."""
    with open(f"/proc/{pid}/status") as status:
        for line in status:
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
    return 0.0


def descriptors(pid: int) -> int:
    """Return how many descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def store(broker: str, prefix: str) -> None:
    """Store a result for each id that comes on standard input."""
    app = make_app(broker, prefix)
    for line in sys.stdin:
        app.backend.store_result(line.strip(), "x" * 200, states.SUCCESS)
    app.backend.close()


@contextlib.contextmanager
def a_broker(url: Optional[str], distribution: str) -> Iterator[Tuple[str, Optional[int]]]:
    """Yield the URL of a broker and, of one that is ours, the process."""
    if url:
        yield url, None
        return
    rabbitmq.ensure_installed(distribution)
    with rabbitmq.Node(rabbitmq.distribution(distribution)) as node:
        yield node.url(), node.pid


def measure(results: int, broker: str, pid: Optional[int]) -> None:
    """Store *results* results, wait for them, and print memory and descriptors meanwhile."""
    prefix = f"flat-{uuid.uuid4().hex[:8]}"
    app = make_app(broker, prefix)
    child = subprocess.Popen(
        [sys.executable, "-m", "bench.flat", "--store", prefix, "--broker", broker],
        stdin=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    started = time.monotonic()
    done = 0
    print(
        f"{'results':>9} {'seconds':>8} {'client':>7} {'fds':>4} {'storing':>8} {'fds':>4} broker"
    )
    report_at = 0
    while done < results:
        ids = [str(uuid.uuid4()) for _ in range(WINDOW)]
        for task_id in ids:
            app.backend.on_task_call(None, task_id)
        waiting: List[Any] = [app.AsyncResult(task_id) for task_id in ids]
        child.stdin.write("".join(f"{task_id}\n" for task_id in ids))
        child.stdin.flush()
        for result in waiting:
            assert result.get(timeout=120) == "x" * 200
        done += WINDOW
        if done >= report_at:
            report_at += max(WINDOW, results // 10)
            ours, theirs = os.getpid(), child.pid
            print(
                f"{done:9} {time.monotonic() - started:8.1f} {memory(ours):7.1f} "
                f"{descriptors(ours):4} {memory(theirs):8.1f} {descriptors(theirs):4} "
                + (f"{memory(pid):6.1f}" if pid else "-"),
                flush=True,
            )
    child.stdin.close()
    child.wait()
    app.backend.close()


class Held(NamedTuple):
    """What a process that reconnects again and again holds."""

    reconnects: int
    seconds: float
    #: Resident memory, in MiB.
    memory: float
    descriptors: int
    threads: int
    #: At the proxy, which are all to the broker.
    connections: int


def reconnect(
    count: int, broker: str, close: Optional[Callable[[], None]] = None
) -> Iterator[Held]:
    """Close all connections *count* times, and yield ten times what this process holds.

    Each time one result is stored, and waited for and looked up by apps that did not store it.

    Parameters:
        count: how often; the first tenth is not measured, since it opens what is opened once.
        broker: URL of a broker on this machine.
        close: closes all connections; by default they are reset.
    """
    port = kombu.Connection(broker).port or 5672
    with Proxy(port) as proxy:
        close = close or proxy.reset
        prefix = f"flat-{uuid.uuid4().hex[:8]}"
        apps = [make_app(proxy.url(broker), prefix) for _ in range(3)]
        waiting, storing, looking = apps
        started = time.monotonic()
        step = max(1, count // 10)
        for number in range(1, count + 1):
            task_id = str(uuid.uuid4())
            waiting.backend.on_task_call(None, task_id)
            close()
            storing.backend.store_result(task_id, number, states.SUCCESS)
            assert waiting.AsyncResult(task_id).get(timeout=120) == number
            assert looking.AsyncResult(task_id).state == states.SUCCESS
            if number % step == 0:
                yield Held(
                    number,
                    time.monotonic() - started,
                    memory(os.getpid()),
                    descriptors(os.getpid()),
                    threading.active_count(),
                    proxy.open,
                )
        for app in apps:
            app.backend.close()
            app.close()


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description="Memory and descriptors over many results, MiB.")
    parser.add_argument("--results", type=int, default=1_000_000)
    parser.add_argument("--reconnects", type=int, help="reset connections so often instead")
    parser.add_argument("--distribution", default="system", help="of the private node")
    parser.add_argument("--broker", help="URL; a private node by default")
    parser.add_argument("--store", metavar="PREFIX", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.store:
        store(options.broker, options.store)
        return
    with a_broker(options.broker, options.distribution) as (url, pid):
        if options.reconnects:
            print(*Held._fields)
            for held in reconnect(options.reconnects, url):
                print(*(round(number, 1) for number in held), flush=True)
        else:
            measure(options.results, url, pid)


if __name__ == "__main__":
    main()
