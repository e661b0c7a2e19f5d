"""Real Celery workers, as processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any, Callable, Iterator, List

import pytest
from celery import Celery
from celery.contrib.testing.worker import start_worker as start_in_thread

from tests.conftest import PATIENCE, Apps, eventually

ROOT = Path(__file__).resolve().parent.parent.parent


class Worker:
    """A running ``celery worker`` process."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log

    @property
    def pid(self) -> int:
        """The parent process of the worker."""
        return self.process.pid

    def output(self) -> str:
        """The worker's log so far."""
        return self.log.read_text(errors="replace")

    def stop(self) -> None:
        """Stop the worker warmly, or kill it if it does not stop."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """Kill the worker and its children with SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)


def environment_of(app: Celery) -> dict[str, str]:
    """Return the environment for :func:`tests.worker.tasks.app_from_environment` to copy *app*."""
    return {
        "TEST_BROKER_URL": str(app.conf.broker_url),
        "TEST_RESULT_BACKEND": str(app.conf.result_backend),
        "TEST_RESULT_EXCHANGE": str(app.conf.result_exchange),
        "TEST_TASK_QUEUE": str(app.conf.task_default_queue),
        "TEST_SHARDS": str(app.backend.options.shards),
        "TEST_QUEUE_TYPE": app.backend.options.queue_type,
    }


def launch_worker(
    app: Celery,
    tmp_path: Path,
    module: str = "tests.worker.tasks",
    pool: str = "prefork",
    concurrency: int = 2,
    args: tuple[str, ...] = (),
    env: dict[str, str] | None = None,
    python: str = sys.executable,
    options: tuple[str, ...] = (),
) -> Worker:
    """Start ``celery worker`` for the tasks of *module* with the settings of *app*.

    The module creates its app with :func:`tests.worker.tasks.app_from_environment`. Returns when
    the worker is ready.
    """
    log = tmp_path / f"worker-{uuid.uuid4().hex[:8]}.log"
    environment = dict(
        os.environ,
        **environment_of(app),
        PYTHONWARNINGS="default",
        PYTHONUNBUFFERED="1",
        **(env or {}),
    )
    command = [
        python, "-m", "celery", *options, "-A", module, "worker", "--pool", pool,
        "--concurrency", str(concurrency), "--loglevel", "INFO", "--without-gossip",
        "--without-mingle", "--hostname", f"w-{uuid.uuid4().hex[:8]}@localhost", *args,
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    worker = Worker(process, log)

    def ready() -> bool:
        if process.poll() is not None:
            pytest.fail(f"the worker has ended:\n{worker.output()}")
        return " ready." in worker.output()

    eventually(ready, 120)
    return worker


@contextlib.contextmanager
def worker_in_process(app: Celery) -> Iterator[None]:
    """Run a worker for *app* in a thread of this process."""
    # Without events of its own, an idle worker sleeps for up to 10 seconds, and Celery waits for
    # its end just as long. With heartbeats it wakes up every 2 seconds.
    with start_in_thread(
        app,
        perform_ping_check=False,
        pool="solo",
        without_heartbeat=False,
        shutdown_timeout=PATIENCE,
    ):
        yield


@pytest.fixture
def start_worker(make_app: Apps, tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Starts ``celery worker`` processes, see :func:`launch_worker`; stops them after the test."""
    workers: List[Worker] = []

    def start(app: Celery, **kwargs: Any) -> Worker:
        worker = launch_worker(app, tmp_path, **kwargs)
        workers.append(worker)
        return worker

    yield start
    for worker in workers:
        worker.stop()
