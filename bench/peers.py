"""The result backends that are measured beside each other, workers for them, and assistants."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import mmap
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional

from celery import Celery
from celery.app.task import Context

from bench import processes

__all__ = (
    "PEERS",
    "WITH_WORKER",
    "Assistant",
    "Peer",
    "Servers",
    "Ticks",
    "Worker",
    "available",
    "close",
    "close_backend",
    "context",
    "make_app",
    "ticking",
)

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Peer:
    """A result backend."""

    name: str
    #: URL of the result backend; ``{redis}`` is the address of a private Redis that keeps
    #: everything in memory, ``{lasting}`` that of one which writes it to the disk.
    backend: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    conf: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    #: Whether it declares a queue for each task: it is then measured with fewer of them.
    queue_per_task: bool = False
    #: Whether any process can read a result.
    anybody_reads: bool = True
    #: Whether ``task_ignore_result`` is set.
    ignored: bool = False
    #: Whether it is left out where there is little time.
    thorough: bool = False
    #: Module that has to be there.
    module: Optional[str] = None


#: In the order of tables.
PEERS: Dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("amqp", "amqp://"),
        Peer("amqp, confirm=False", "amqp://", {"confirm": False}),
        # Confirmed, but gone with the broker: as lasting as what the other peers keep.
        Peer("amqp, transient", "amqp://", conf={"result_persistent": False}),
        Peer("amqp, per-task", "amqp://", {"layout": "per-task"}, queue_per_task=True),
        Peer("rpc", "rpc://", anybody_reads=False),
        Peer("redis", "redis://{redis}/0", module="redis"),
        # As lasting as what RabbitMQ has confirmed of persistent messages.
        Peer("redis, lasting", "redis://{lasting}/0", module="redis", thorough=True),
        Peer(
            "celery-amqp-backend",
            "celery_amqp_backend.AMQPBackend://",
            queue_per_task=True,
            module="celery_amqp_backend",
        ),
        Peer("ignored", "disabled://", anybody_reads=False, ignored=True),
    )
}

#: Those that are measured with a worker that stores results, and waits until they are kept.
WITH_WORKER = tuple(name for name in PEERS if name not in ("amqp, confirm=False", "ignored"))


def available(name: str) -> bool:
    """Return whether what the peer *name* needs is installed."""
    module = PEERS[name].module
    return module is None or importlib.util.find_spec(module) is not None


@dataclasses.dataclass(frozen=True)
class Servers:
    """Where the servers are.

    Parameters:
        broker: URL of RabbitMQ.
        redis: address of a Redis that keeps everything in memory.
        lasting: address of a Redis that writes to the disk what it confirms.
    """

    broker: str
    redis: str
    lasting: str


def make_app(name: str, servers: Servers, queue: str, **conf: Any) -> Celery:
    """Return an app with the result backend of the peer *name*.

    Parameters:
        name: of :data:`PEERS`.
        servers: where the servers are.
        queue: name of the queue of tasks; names for the results are made from it.
        **conf: further settings.
    """
    peer = PEERS[name]
    app = Celery("bench", broker=servers.broker, set_as_current=False)
    app.conf.update(
        result_backend=peer.backend.format(redis=servers.redis, lasting=servers.lasting),
        result_backend_transport_options=dict(peer.options),
        result_exchange=f"results-{queue}",
        result_exchange_type="direct",
        task_default_queue=queue,
        task_ignore_result=peer.ignored,
        broker_connection_retry_on_startup=True,
        worker_prefetch_multiplier=16,
    )
    app.conf.update(peer.conf)
    app.conf.update(conf)

    @app.task(name="bench.noop", shared=False)
    def noop() -> None:
        return None

    @app.task(name="bench.tick", shared=False)
    def tick(path: str) -> None:
        _ticks(path).add()

    @app.task(name="bench.count", shared=False)
    def count(results: List[Any]) -> int:
        return len(results)

    return app


def context(task_id: str, reply_to: str = "", origin: str = "gen1@bench") -> Context:
    """Return the request of a task as a worker has it when it stores the result."""
    return Context(
        id=task_id, correlation_id=task_id, reply_to=reply_to, hostname="bench",
        origin=origin, children=[], delivery_info={},
    )  # fmt: skip


class Ticks:
    """Counts in a file that several processes map, each in a place of its own."""

    SLOTS = 4096
    SLOT = struct.Struct("=Q")

    def __init__(self, path: str) -> None:
        with open(path, "r+b") as file:
            file.truncate(self.SLOTS * self.SLOT.size)
            self._map = mmap.mmap(file.fileno(), 0)
        self.path = path
        # Of two processes with the same place one would not be counted: they start at about the
        # same time, so that their numbers differ by less.
        self._at = os.getpid() % self.SLOTS * self.SLOT.size

    def add(self) -> None:
        """Count one more."""
        (count,) = self.SLOT.unpack_from(self._map, self._at)
        self.SLOT.pack_into(self._map, self._at, count + 1)

    def total(self) -> int:
        """Return what all have counted."""
        return sum(count for (count,) in self.SLOT.iter_unpack(self._map))


_opened: Dict[str, Ticks] = {}


def _ticks(path: str) -> Ticks:
    if path not in _opened:
        # Made in the process that counts: the pool has forked by then.
        _opened[path] = Ticks(path)
    return _opened[path]


class Worker:
    """A worker process for a peer, and the app of the sending side.

    Parameters:
        name: of :data:`PEERS`.
        servers: where the servers are.
        concurrency: how many processes work.

    Starting is not waited for: :meth:`wait` does.
    """

    def __init__(self, name: str, servers: Servers, concurrency: int = 2) -> None:
        self.name = name
        queue = f"bench-{uuid.uuid4().hex[:8]}"
        self.hostname = f"{queue}@localhost"
        self.queue = queue
        self.app = make_app(name, servers, queue)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "celery", "--quiet", "-A", "bench.worker_app", "worker",
             "--pool", "prefork", "--concurrency", str(concurrency), "--loglevel", "ERROR",
             "--without-gossip", "--without-mingle", "--hostname", self.hostname],
            env=_environment(name, servers, queue),
            cwd=ROOT, stdout=subprocess.DEVNULL,
        )  # fmt: skip

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
        return processes.cpu_seconds(*processes.family(self._process.pid))

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(30)
        close(self.app)


class Assistant:
    """A process that stores results, or waits for them, as it is told.

    Parameters:
        name: of :data:`PEERS`.
        servers: where the servers are.
        queue: what names for the results are made from.
    """

    def __init__(self, name: str, servers: Servers, queue: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.assistant"],
            env=_environment(name, servers, queue),
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

    def stop(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(30)


@contextlib.contextmanager
def ticking() -> Iterator[Ticks]:
    """Yield a counter in a file that goes away."""
    with tempfile.NamedTemporaryFile(prefix="bench-") as file:
        yield Ticks(file.name)


def close(app: Celery) -> None:
    """Close an app and what its result backend has opened."""
    close_backend(app)
    app.close()


def close_backend(app: Celery) -> None:
    """Close what the result backend of an app has opened; it may be used again."""
    shut = getattr(app.backend, "close", None)
    if shut is not None:
        shut()


def _environment(name: str, servers: Servers, queue: str) -> Dict[str, str]:
    return dict(
        os.environ,
        PYTHONPATH=f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        BENCH_PEER=name,
        BENCH_QUEUE=queue,
        **{f"BENCH_{key.upper()}": value for key, value in dataclasses.asdict(servers).items()},
    )


def app_from_environment() -> Celery:
    """Return the app that a process serves that was started here."""
    servers = {
        field.name: os.environ[f"BENCH_{field.name.upper()}"]
        for field in dataclasses.fields(Servers)
    }
    return make_app(os.environ["BENCH_PEER"], Servers(**servers), os.environ["BENCH_QUEUE"])
