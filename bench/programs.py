"""The processes that a run starts: workers and assistants of a peer."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
import uuid
from typing import Any, Dict, Iterator, Mapping, Optional, Sequence

from bench import peers, processes
from bench.peers import ROOT, Servers

__all__ = ("Assistant", "Worker")


class Worker:
    """A worker for a peer, and the app of the process that sends tasks to it.

    Parameters:
        name: the peer.
        servers: where the servers are.
        concurrency: number of processes, threads or greenlets of the pool.
        pool: name of the pool.
        arguments: further arguments of ``celery worker``.
        queue: where its tasks are; names for the results are made from it. A new one by default.

    Starting takes seconds; :meth:`wait` waits for it.
    """

    def __init__(
        self,
        name: str,
        servers: Servers,
        concurrency: int = 2,
        pool: str = "prefork",
        arguments: Sequence[str] = (),
        queue: str = "",
    ) -> None:
        self.name = name
        queue = queue or f"bench-{uuid.uuid4().hex[:8]}"
        self.hostname = f"{queue}@localhost"
        self.queue = queue
        self.app = peers.make_app(name, servers, queue)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "celery", "--quiet", "-A", "bench.worker_app", "worker",
             "--pool", pool, "--concurrency", str(concurrency), "--loglevel", "ERROR",
             "--without-gossip", "--without-mingle", "--hostname", self.hostname, *arguments],
            env=peers.environment(name, servers, queue),
            cwd=ROOT, stdout=subprocess.DEVNULL,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        """Process id of the worker's main process."""
        return self._process.pid

    def wait(self) -> None:
        """Wait until it works.

        Raises:
            RuntimeError: when it does not.
        """
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and self._process.poll() is None:
            if self.app.control.ping([self.hostname], timeout=0.5):
                return
        raise RuntimeError(f"the worker for {self.name} does not start")

    def cpu_seconds(self) -> float:
        """Return the processor time that it and its processes have used so far."""
        family = processes.family(self._process.pid)
        return processes.cpu_seconds(*family) + processes.reaped_cpu_seconds(self._process.pid)

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(30)
        peers.close(self.app)


class Assistant:
    """A process that obeys commands.

    Parameters:
        name: the peer.
        servers: where the servers are.
        queue: names on the broker are made from it.
        module: its program, :mod:`bench.assistant` or one that has more commands.
        options: options of the result backend that replace those of the peer.
    """

    def __init__(
        self,
        name: str,
        servers: Servers,
        queue: str,
        module: str = "bench.assistant",
        options: Optional[Mapping[str, Any]] = None,
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            env=peers.environment(name, servers, queue, options),
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def tell(self, command: str, **arguments: Any) -> None:
        """Give it a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Dict[str, Any]:
        """Return its next answer.

        Raises:
            RuntimeError: when it has ended instead.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("an assistant of the benchmarks has failed, see above")
        answered: Dict[str, Any] = json.loads(line)
        return answered

    def ask(self, command: str, **arguments: Any) -> Dict[str, Any]:
        """Give it a command and return the answer."""
        self.tell(command, **arguments)
        return self.answer()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Freeze it for the duration of a ``with`` block."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def cpu_seconds(self) -> float:
        """Return the processor time that it has used so far."""
        return processes.cpu_seconds(self.pid)

    def stop(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(30)
        self._process.stdout.close()
