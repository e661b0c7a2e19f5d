"""A load for faults to hit: processes that store, and others that wait, join, poll and look up.

With *workers* there are also Celery workers, and processes that send tasks and chords to them.

with Load(app) as load:
    since = load.now()
    break_something()
    load.until_flowing()
    verdict = load.verdict(since)
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from celery import Celery

from tests import subprocesses
from tests.faults import load_clients, recorder
from tests.faults.recorder import Journal, Limits, Verdict

__all__ = ("Load",)


class Load:
    """Two processes that store results, and others that read them in different ways.

    Parameters:
        storing: the app of the storing processes.
        reading: the app of the reading processes; *storing* by default.
        timeout: seconds that each wait may take.
        pause: seconds between two tasks of a storing process.
        forks: whether a waiting process forks now and then.
        workers: the pools of Celery workers: ``prefork``, ``threads`` or ``gevent``.
        fleet: how many processes poll.
    """

    def __init__(
        self,
        storing: Celery,
        reading: Optional[Celery] = None,
        *,
        timeout: float = 60.0,
        pause: float = 0.002,
        forks: bool = True,
        workers: Sequence[str] = (),
        fleet: int = 1,
    ) -> None:
        self.storing = storing
        self.reading = reading or storing
        self.run = uuid.uuid4().hex[:8]
        self.folder = Path(tempfile.mkdtemp(prefix="load-"))
        self.journal = Journal(self.folder, "harness")
        self._timeout = timeout
        self._pause = pause
        self._forks = forks
        self._lives = [0, 0]
        self.pools = tuple(workers)
        self._fleet = fleet
        self._workers: Dict[str, subprocess.Popen[bytes]] = {}
        self._common: Dict[str, Any] = {"run": self.run, "folder": str(self.folder)}
        #: The processes by role.
        self.processes: Dict[str, subprocesses.Process] = {}

    def __enter__(self) -> Load:
        try:
            for slot in (0, 1):
                self._start_storing(slot)
            for pool in self.pools:
                self.start_worker(pool)
            timeout = {"timeout": self._timeout}
            jobs: Dict[str, Tuple[Callable[..., Any], Dict[str, Any]]] = {
                "wait": (load_clients.wait, {**timeout, "forks": self._forks}),
                "join": (load_clients.join, timeout),
                "look": (load_clients.look_up, {}),
            }
            for number in range(self._fleet):
                jobs[f"poll{number}"] = (load_clients.poll, {"number": number})
            if self.pools:
                jobs["send"] = (load_clients.send, timeout)
                jobs["chord"] = (load_clients.send_chords, timeout)
            for role, (function, options) in jobs.items():
                self.processes[role] = subprocesses.Process(
                    self.reading, function, {**self._common, **options}
                )
            self.until_flowing()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, kind: Any, *exc_info: object) -> None:
        try:
            if kind is None:
                self.stop()
        finally:
            self.kill()

    def _start_storing(self, slot: int) -> None:
        self.processes[f"store{slot}"] = subprocesses.Process(
            self.storing,
            load_clients.store,
            {**self._common, "slot": slot, "life": self._lives[slot], "pause": self._pause},
        )

    @staticmethod
    def now() -> float:
        """Return the current time on the clock of the journals."""
        return time.monotonic()

    def position(self, slot: int) -> int:
        """Return the number of tasks stored in a slot."""
        return load_clients.read_number(self.folder / f"position-{slot}")

    def progress(self) -> Dict[str, int]:
        """Return the number of operations that each process has finished."""
        return {
            role: load_clients.read_number(self.folder / f"progress-{role}")
            for role in self.processes
        }

    def until_stored(self, count: int, timeout: float = 120.0) -> None:
        """Return when each storing process has stored *count* more results."""
        before = [self.position(slot) for slot in (0, 1)]
        self._until(
            lambda: all(self.position(slot) >= before[slot] + count for slot in (0, 1)),
            timeout,
            lambda: f"{count} more results were not stored",
        )

    def until_flowing(self, timeout: float = 180.0, without: Sequence[str] = ()) -> None:
        """Return when each process has finished a new operation.

        Parameters:
            timeout: seconds until that is an error.
            without: roles of processes that need not.
        """
        before = {role: n for role, n in self.progress().items() if role not in without}

        def stuck() -> List[str]:
            now = self.progress()
            # Operations that began before the fault was over may end once; the next one is new.
            return [role for role, count in before.items() if now[role] < count + 2]

        self._until(lambda: not stuck(), timeout, lambda: f"nothing goes on in {stuck()}")

    def _until(
        self, condition: Callable[[], bool], timeout: float, what: Callable[[], str]
    ) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            self.check_processes()
            if time.monotonic() > deadline:
                raise AssertionError(f"{what()} within {timeout:g} s; logs are in {self.keep()}")
            time.sleep(0.05)

    def check_processes(self) -> None:
        """Raise an error if one of the processes has exited by itself."""
        for role, process in list(self.processes.items()):
            if process.ended:
                del self.processes[role]
                process.answer()
                raise AssertionError(f"{role} has ended")

    def keep(self) -> Path:
        """Keep the journals and logs, and return their folder."""
        kept = self.folder.with_name(f"kept-{self.folder.name}")
        shutil.copytree(self.folder, kept, dirs_exist_ok=True)
        return kept

    # -- controlling the processes ---------------------------------------------------------------

    def kill_storing(self, slot: int) -> None:
        """Kill a storing process with SIGKILL, and start another in its place."""
        self.processes.pop(f"store{slot}").kill()
        self._lives[slot] += 1
        self._start_storing(slot)

    def pids(self) -> Dict[str, int]:
        """Return the processes by role, with the main processes of the workers."""
        found = {role: process.pid for role, process in self.processes.items()}
        return {**found, **{f"worker, {pool}": w.pid for pool, w in self._workers.items()}}

    def start_worker(self, pool: str) -> None:
        """Start the Celery worker with that pool."""
        conf = self.storing.conf
        command = [
            sys.executable, "-m", "celery", "-A", "tests.faults.worker_app", "worker",
            "--pool", pool, "--concurrency", "2" if pool == "prefork" else "4",
            "--loglevel", "INFO", "--without-gossip", "--without-mingle",
            "--hostname", f"w-{uuid.uuid4().hex[:8]}@localhost",
        ]  # fmt: skip
        with (self.folder / f"worker-{pool}.log").open("ab") as log:
            self._workers[pool] = subprocess.Popen(
                command,
                cwd=subprocesses.ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=dict(
                    os.environ,
                    PYTHONPATH=os.pathsep.join(sys.path),
                    FAULTS_FOLDER=str(self.folder),
                    TEST_BROKER_URL=str(conf.broker_url),
                    TEST_RESULT_BACKEND=str(conf.result_backend),
                    TEST_RESULT_EXCHANGE=str(conf.result_exchange),
                    TEST_TASK_QUEUE=str(conf.task_default_queue),
                    TEST_CONF=json.dumps(
                        {
                            name: conf[name]
                            for name in (
                                "result_backend_transport_options",
                                "task_default_queue_type",
                            )
                        }
                    ),
                ),
            )

    def kill_children(self) -> int:
        """Kill the children of the prefork worker with SIGKILL; return their number."""
        parent = self._workers["prefork"].pid
        listed = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        for pid in listed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        return len(listed)

    def kill_worker(self, pool: str) -> None:
        """Kill the main process of a worker with SIGKILL, and then its orphans."""
        worker = self._workers.pop(pool)
        worker.kill()
        worker.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)

    @contextlib.contextmanager
    def frozen(self, role: str) -> Any:
        """Freeze a process with SIGSTOP for the duration of a ``with`` block."""
        process = self.processes[role]
        process.signal(signal.SIGSTOP)
        try:
            yield process
        finally:
            process.signal(signal.SIGCONT)

    # -- the verdict ---------------------------------------------------------------------------

    def verdict(
        self,
        since: float = 0.0,
        limits: Limits = recorder.LIMITS,
        patience: float = 60.0,
        deleted: float = 0.0,
    ) -> Verdict:
        """Read everything stored since then back in a new process, and check all journals."""
        record = recorder.load(self.folder)
        ids = record.promised(since)
        subprocesses.run(
            self.reading, load_clients.read_back, **self._common, ids=ids, patience=patience
        )
        until = time.monotonic()
        return recorder.check(recorder.load(self.folder), limits, since, until, deleted=deleted)

    def stop(self) -> None:
        """Stop all processes in order: waiting ones first, so that all awaited results arrive."""
        (self.folder / load_clients.STOP_WAITING).touch()
        storing = [role for role in self.processes if role.startswith("store")]
        for role in [*(role for role in self.processes if role not in storing), *storing]:
            if role in storing:
                (self.folder / load_clients.STOP_STORING).touch()
            self.processes.pop(role).answer(2 * self._timeout + 60)

    def kill(self) -> None:
        """Kill all processes and remove the journals."""
        for pool in list(self._workers):
            self.kill_worker(pool)
        while self.processes:
            _, process = self.processes.popitem()
            with contextlib.suppress(ProcessLookupError):
                process.signal(signal.SIGCONT)
            process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
