"""Whether memory, descriptors and connections stay the same however often connections are lost.

::

    python -m bench.flat --reconnects 1000 [--broker amqp://...]

All connections of a process that stores, waits and looks up are reset, again and again. Each time
it stores a result, waits for it, and looks it up. ``python -m bench endurance`` shows memory while
many results pass.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import threading
import time
import uuid
from typing import Callable, Iterator, NamedTuple, Optional

import kombu
from celery import Celery, states

from tools import rabbitmq
from tools.proxy import Proxy


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


@contextlib.contextmanager
def a_broker(url: Optional[str], distribution: str) -> Iterator[str]:
    """Yield the URL of a broker: *url*, or that of a private node."""
    if url:
        yield url
        return
    rabbitmq.ensure_installed(distribution)
    with rabbitmq.Node(rabbitmq.distribution(distribution)) as node:
        yield node.url()


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
    parser = argparse.ArgumentParser(
        description="Memory and descriptors over many reconnects, MiB."
    )
    parser.add_argument("--reconnects", type=int, default=1000)
    parser.add_argument("--distribution", default="system", help="of the private node")
    parser.add_argument("--broker", help="URL; a private node by default")
    options = parser.parse_args()
    with a_broker(options.broker, options.distribution) as url:
        print(*Held._fields)
        for held in reconnect(options.reconnects, url):
            print(*(round(number, 1) for number in held), flush=True)


if __name__ == "__main__":
    main()
