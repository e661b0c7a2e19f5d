"""The result backends that are measured beside each other, and workers for them."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any, Dict, Iterator, List

from celery import Celery

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

#: Name of a peer to the URL of its result backend; {redis} is the address of a private Redis.
BACKENDS: Dict[str, str] = {
    "amqp": "amqp://",
    "rpc": "rpc://",
    "redis": "redis://{redis}/0",
    "none": "disabled://",
}


@contextlib.contextmanager
def private_redis() -> Iterator[str]:
    """Run a Redis server of our own, without persistence, and yield its address."""
    program = shutil.which("redis-server")
    if not program:
        raise SystemExit("redis-server is not installed; run: sudo apt-get install redis-server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder],
            stdout=subprocess.DEVNULL,
        )
        try:
            deadline = time.monotonic() + 20
            while True:
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                if time.monotonic() > deadline:
                    raise SystemExit("redis-server does not answer")
                time.sleep(0.05)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(20)


def make_app(peer: str, broker: str, redis: str, queue: str) -> Celery:
    """Return an app with the result backend of *peer*."""
    app = Celery("bench", broker=broker, set_as_current=False)
    app.conf.update(
        result_backend=BACKENDS[peer].format(redis=redis),
        result_exchange=f"bench-{queue}",
        task_default_queue=queue,
        task_ignore_result=peer == "none",
        broker_connection_retry_on_startup=True,
        worker_prefetch_multiplier=16,
    )

    @app.task(name="bench.noop", shared=False)
    def noop() -> None:
        return None

    @app.task(name="bench.count", shared=False)
    def count(results: List[Any]) -> int:
        return len(results)

    return app


def app_from_environment() -> Celery:
    """Return the app that a worker process serves."""
    return make_app(
        os.environ["BENCH_PEER"],
        os.environ["BENCH_BROKER"],
        os.environ["BENCH_REDIS"],
        os.environ["BENCH_QUEUE"],
    )


@contextlib.contextmanager
def worker(
    peer: str, broker: str, redis: str, pool: str = "prefork", concurrency: int = 2
) -> Iterator[Celery]:
    """Run a worker process for *peer* and yield the app of the sending side."""
    queue = f"bench-{peer}-{uuid.uuid4().hex[:8]}"
    environment = dict(
        os.environ,
        BENCH_PEER=peer,
        BENCH_BROKER=broker,
        BENCH_REDIS=redis,
        BENCH_QUEUE=queue,
        PYTHONPATH=str(ROOT),
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "celery", "--quiet", "-A", "bench.worker_app", "worker",
         "--pool", pool, "--concurrency", str(concurrency), "--loglevel", "ERROR",
         "--without-gossip",
         "--without-mingle", "--hostname", f"{queue}@localhost"],
        env=environment, cwd=ROOT,
    )  # fmt: skip
    app = make_app(peer, broker, redis, queue)
    try:
        if not _answers(app, process):
            raise SystemExit(f"the worker for {peer} does not start")
        yield app
    finally:
        process.terminate()
        process.wait(30)
        close = getattr(app.backend, "close", None)
        if close is not None:
            close()
        app.close()


def _answers(app: Celery, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if app.control.ping(timeout=0.5):
            return True
    return False
