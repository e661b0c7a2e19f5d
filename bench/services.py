"""The servers that the benchmarks need: private ones, on free ports, gone at the end."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from typing import Iterator

from tools import rabbitmq

__all__ = ("private_rabbitmq", "private_redis")

#: Seconds until a server has to answer.
PATIENCE = 30.0


@contextlib.contextmanager
def private_rabbitmq(distribution: str) -> Iterator[rabbitmq.Node]:
    """Run a RabbitMQ node of our own, which is installed where it has to be.

    Parameters:
        distribution: ``system``, or a Debian suite such as ``forky``.

    Raises:
        NotAvailable: when it cannot be had.
    """
    rabbitmq.ensure_installed(distribution)
    with rabbitmq.Node(rabbitmq.distribution(distribution)) as node:
        yield node


@contextlib.contextmanager
def private_redis(lasting: bool = False) -> Iterator[str]:
    """Run a Redis server of our own, and yield its address.

    Parameters:
        lasting: whether what it has confirmed is on the disk; without that it keeps everything in
            memory only.

    Raises:
        NotAvailable: when it cannot be had.
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
            # A client that is frozen on purpose is not to be thrown out meanwhile.
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
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(PATIENCE)
