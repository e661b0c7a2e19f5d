"""The servers that the benchmarks need: private ones, on free ports, gone at the end."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from typing import Iterator

from tools import rabbitmq

__all__ = ("TUNED", "RedisServer", "private_rabbitmq", "private_redis")

#: Keeps small messages out of the index of a classic queue. Without it a queue of RabbitMQ 4 opens
#: and closes a file for each confirm.
TUNED = "queue_index_embed_msgs_below = 0"

#: Seconds until a server has to answer.
PATIENCE = 30.0


@dataclass(frozen=True)
class RedisServer:
    """A private Redis server."""

    #: Host and port.
    address: str
    pid: int


@contextlib.contextmanager
def private_rabbitmq(distribution: str, config: str = "") -> Iterator[rabbitmq.Node]:
    """Run a RabbitMQ node of our own, and install RabbitMQ first if necessary.

    Parameters:
        distribution: ``system``, or a Debian suite such as ``forky``.
        config: more lines for ``rabbitmq.conf``.

    Raises:
        NotAvailable: when it cannot be installed.
    """
    rabbitmq.ensure_installed(distribution)
    with rabbitmq.Node(rabbitmq.distribution(distribution), config=config) as node:
        yield node


@contextlib.contextmanager
def private_redis(lasting: bool = False) -> Iterator[RedisServer]:
    """Run a Redis server of our own.

    Parameters:
        lasting: whether it writes to the disk before it confirms; without that it keeps
            everything in memory only.

    Raises:
        NotAvailable: when it cannot be installed.
    """
    program = shutil.which("redis-server")
    if not program:
        rabbitmq.apt_install("redis-server")
        program = shutil.which("redis-server") or "/usr/bin/redis-server"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            # Measures freeze clients on purpose; Redis must not disconnect them meanwhile.
            [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder,
             "--client-output-buffer-limit", "pubsub 0 0 0",
             "--appendonly", "yes" if lasting else "no", "--appendfsync", "always"],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + PATIENCE
            while True:
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                if process.poll() is not None or time.monotonic() > deadline:
                    raise rabbitmq.NotAvailable("redis-server does not answer")
                time.sleep(0.05)
            yield RedisServer(f"127.0.0.1:{port}", process.pid)
        finally:
            process.terminate()
            process.wait(PATIENCE)
