"""The processes of a load, see :mod:`tests.faults.load`. Imports no test machinery.

Ids and states of tasks are derived from a name and a number. Waiting processes therefore need no
message from storing ones: they read from a small file which number is being stored.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import struct
import threading
import time
import uuid
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from celery import Celery, chord, states
from celery.app.task import Context
from celery.exceptions import TimeoutError
from celery.result import ResultSet

from tests.faults.recorder import Journal, value

_NAMESPACE = uuid.UUID("6f1b4b0e-43a0-4f5e-9f0b-0d8f6f1d5a77")
_POSITION = struct.Struct("<q")

#: Files whose existence stops the waiting processes, and the storing ones.
STOP_WAITING = "stop-waiting"
STOP_STORING = "stop-storing"

#: The states that are stored, by the last hexadecimal digit of a task's number; else SUCCESS.
_STATES: Dict[int, Tuple[str, ...]] = {
    1: ("STARTED", "PROGRESS", "SUCCESS"),
    2: ("FAILURE",),
    3: ("FAILURE", "SUCCESS"),
    # It never finishes.
    5: ("PROGRESS", "PROGRESS"),
    # Later runs of the same task finish too late.
    6: ("SUCCESS", "FAILURE", "STARTED", "SUCCESS"),
    9: ("STARTED", "PROGRESS", "SUCCESS"),
    11: ("REVOKED",),
}


def task_id(run: str, slot: int, number: int) -> str:
    """Return the id of task *number* of the storing process in *slot*."""
    return str(uuid.uuid5(_NAMESPACE, f"{run}/{slot}/{number}"))


def ends(number: int) -> bool:
    """Return whether the task finishes."""
    return number % 16 != 5


def is_forgotten(number: int) -> bool:
    """Return whether the task is forgotten at some point."""
    return number % 32 == 7


class LoadProcess:
    """State of a process of the load: its journal, its progress, its random choices."""

    def __init__(self, role: str, run: str, folder: str) -> None:
        self.run = run
        self.folder = Path(folder)
        self.role = role
        self.journal = Journal(self.folder, role)
        self.random = random.Random(f"{run} {role} {os.getpid()}")
        logging.basicConfig(
            filename=self.folder / f"{self.journal.process}.log",
            format="%(asctime)s %(threadName)s %(name)s %(levelname)s %(message)s",
            level=logging.INFO,
            force=True,
        )
        self._parent = os.getppid()
        self._progress = 0
        self._lock = threading.Lock()

    def stopped(self, name: str = STOP_WAITING) -> bool:
        """Return whether the process must stop: it was asked to, or its parent has gone."""
        return (self.folder / name).exists() or os.getppid() != self._parent

    def made_progress(self) -> None:
        """Report a finished operation."""
        with self._lock:
            self._progress += 1
            write_number(self.folder / f"progress-{self.role}", self._progress)

    def position(self, slot: int) -> int:
        """Return the number of the task that is being stored in *slot*."""
        return read_number(self.folder / f"position-{slot}")

    def tasks(self, before: int, after: int, end: bool = True) -> List[str]:
        """Return the ids of tasks around the number that is being stored in a random slot."""
        slot = self.random.randrange(2)
        here = self.position(slot)
        return [
            task_id(self.run, slot, number)
            for number in range(max(0, here - before), here + after)
            if (ends(number) or not end) and not is_forgotten(number)
        ]

    def threads(self, *works: Callable[[], None]) -> None:
        """Repeat all *works* in threads until asked to stop; raise the first error of any."""
        failures: List[BaseException] = []

        def run(work: Callable[[], None]) -> None:
            try:
                while not self.stopped() and not failures:
                    work()
            except BaseException as exc:
                logging.exception("a process has failed")
                failures.append(exc)

        running = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        if failures:
            raise failures[0]

    @contextlib.contextmanager
    def waiting(self, ids: List[str], timeout: float) -> Iterator[int]:
        """Record a wait and its outcome. Swallows errors of the backend, but not of the tests."""
        number = self.journal.began_to_wait(ids, timeout)
        try:
            yield number
        except Exception as exc:
            self.journal.waited(number, repr(exc))
            if isinstance(exc, (AssertionError, TypeError, KeyError, AttributeError)):
                raise
            if not isinstance(exc, TimeoutError):
                # The broker is down: pause before the next attempt, as any program would.
                time.sleep(0.2)
        else:
            self.journal.waited(number)
            self.made_progress()

    @contextlib.contextmanager
    def reading(self, timeout: float) -> Iterator[float]:
        """Record a read that raises; swallows its error."""
        began = time.monotonic()
        try:
            yield began
        except Exception as exc:
            self.journal.failed_to_read(began, timeout, repr(exc))
            if isinstance(exc, (AssertionError, TypeError, KeyError, AttributeError)):
                raise
            time.sleep(0.2)
        else:
            self.made_progress()


def write_number(path: Path, number: int) -> None:
    """Write a number that other processes read concurrently."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(file, _POSITION.pack(number), 0)
    finally:
        os.close(file)


def read_number(path: Path) -> int:
    """Return the number that :func:`write_number` has written; 0 before the first."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return 0
    number: int = _POSITION.unpack(raw)[0] if len(raw) == _POSITION.size else 0
    return number


def store(app: Celery, run: str, folder: str, slot: int, life: int, pause: float) -> None:
    """Store the results of one task after another.

    Parameters:
        slot: the number of the storing process.
        life: how many earlier processes in this slot were killed.
        pause: seconds between two tasks.
    """
    process = LoadProcess(f"store{slot}", run, folder)
    path = process.folder / f"position-{slot}"
    # A task whose process was killed during the store is run again.
    number = read_number(path)
    while not process.stopped(STOP_STORING):
        write_number(path, number)
        this = task_id(run, slot, number)
        # Half of them name a sender that does not exist, so they are pushed by shard.
        request = (
            Context(
                id=this, correlation_id=this, reply_to="", hostname="storer", children=[],
                origin="gen1@elsewhere", delivery_info={},
            )
            if number % 2
            else None
        )  # fmt: skip
        for step, state in enumerate(_STATES.get(number % 16, ("SUCCESS",))):
            version = 100 * life + step
            result: Any = value(this, version, 20_000 if number % 64 == 10 else 60)
            if state in states.EXCEPTION_STATES:
                result = ValueError(result)
            with process.journal.storing(this, state, result):
                app.backend.store_result(this, result, state, request=request)
        number += 1
        process.made_progress()
        time.sleep(pause)


def wait(app: Celery, run: str, folder: str, timeout: float, forks: bool = True) -> None:
    """Wait for single tasks in several threads; now and then fork, and wait in the child too."""
    process = LoadProcess("wait", run, folder)

    def get(process: LoadProcess, before: int, after: int) -> None:
        ids = process.tasks(before, after)
        if not ids:
            time.sleep(0.01)
            return
        this = process.random.choice(ids)
        result = app.AsyncResult(this)
        with process.waiting([this], timeout) as number:
            result.get(timeout=timeout, propagate=False, on_message=_hear(process, number))
            process.journal.got(number, this, result.state, result.result)

    def fork() -> None:
        # In step with the other threads, which are in a wait most of the time.
        get(process, 0, 40)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            code = 1
            try:
                own = LoadProcess("forked", run, folder)
                for _ in range(2):
                    get(own, 10, 5)
                code = 0
            finally:
                os._exit(code)
        deadline = time.monotonic() + 3 * timeout
        ended, code = os.waitpid(child, os.WNOHANG)
        while not ended and time.monotonic() < deadline:
            time.sleep(0.05)
            ended, code = os.waitpid(child, os.WNOHANG)
        if not ended:
            os.kill(child, 9)
            os.waitpid(child, 0)
        assert ended, "a forked process hangs"
        assert code == 0, f"a forked process has failed: {code}"
        time.sleep(0.5)

    works = [lambda: get(process, 0, 40), lambda: get(process, 20, 20), lambda: get(process, 0, 5)]
    process.threads(*works, *([fork] if forks else []))


def join(app: Celery, run: str, folder: str, timeout: float) -> None:
    """Wait for many tasks at once, half of which have finished before."""
    process = LoadProcess("join", run, folder)

    def get() -> None:
        ids = process.tasks(100, 100)
        results = {i: app.AsyncResult(i) for i in ids}
        if not ids:
            return
        with process.waiting(ids, timeout) as number:
            ResultSet(list(results.values()), app=app).get(
                timeout=timeout,
                propagate=False,
                on_message=_hear(process, number),
                callback=lambda i, _: process.journal.got(
                    number, i, results[i].state, results[i].result
                ),
            )

    def iterate() -> None:
        ids = process.tasks(100, 100)
        if not ids:
            return
        with process.waiting(ids, timeout) as number:
            together = ResultSet([app.AsyncResult(i) for i in ids], app=app)
            for this, meta in together.iter_native(timeout=timeout):
                process.journal.got(number, this, meta["status"], meta["result"])

    process.threads(get, iterate)


def poll(app: Celery, run: str, folder: str, number: int) -> None:
    """Poll the states of tasks until they are final, as the process *number* of a web server."""
    process = LoadProcess(f"poll{number}", run, folder)
    budget = app.backend.options.lookup_timeout

    def watch() -> None:
        ids = process.tasks(5, 15, end=False)
        deadline = time.monotonic() + 3
        while ids and time.monotonic() < deadline:
            for this in list(ids):
                with process.reading(budget) as began:
                    meta = app.backend.get_task_meta(this, cache=False)
                    process.journal.read("poll", began, this, meta["status"], meta["result"])
                    if meta["status"] in states.READY_STATES:
                        ids.remove(this)
            time.sleep(0.02)

    process.threads(watch)


def look_up(app: Celery, run: str, folder: str) -> None:
    """Look up tasks that this process never read before, in batches, and forget some."""
    process = LoadProcess("look", run, folder)
    asked: Dict[str, None] = {}
    lock = threading.Lock()

    def read() -> None:
        ids = process.tasks(process.random.choice((10, 100, 1000)), 0, end=False)
        with lock:
            # A task that was pending at the first read would be covered by the inbox at the second.
            ids = [i for i in process.random.sample(ids, min(60, len(ids))) if i not in asked]
            asked.update(dict.fromkeys(ids))
        if ids:
            read_batch(app, process, ids)
        time.sleep(0.01)

    done: Dict[int, int] = {}

    def forget() -> None:
        for slot in (0, 1):
            until = process.position(slot) - 64
            for number in range(done.get(slot, max(0, until)), until):
                if not is_forgotten(number):
                    continue
                this = task_id(run, slot, number)
                process.journal.began_to_forget(this)
                with process.reading(app.backend.options.lookup_timeout):
                    app.AsyncResult(this).forget()
            done[slot] = max(until, 0)
        time.sleep(0.1)

    process.threads(read, read, forget)


def send(app: Celery, run: str, folder: str, timeout: float) -> None:
    """Send tasks to a worker and wait for them together."""
    process = LoadProcess("send", run, folder)

    def work() -> None:
        ids = [str(uuid.uuid4()) for _ in range(10)]
        with process.waiting(ids, timeout) as number:
            results = {i: app.send_task("faults.compute", task_id=i) for i in ids}
            ResultSet(list(results.values()), app=app).get(
                timeout=timeout,
                propagate=False,
                callback=lambda i, _: process.journal.got(
                    number, i, results[i].state, results[i].result
                ),
            )
        time.sleep(0.02)

    process.threads(work)


def send_chords(app: Celery, run: str, folder: str, timeout: float) -> None:
    """Send chords to the workers, and wait for the results of their bodies."""
    process = LoadProcess("chord", run, folder)

    def work() -> None:
        header, body = [str(uuid.uuid4()) for _ in range(5)], str(uuid.uuid4())
        tasks = [app.signature("faults.compute").set(task_id=i) for i in header]
        end = app.signature("faults.combine", kwargs={"header": header}).set(task_id=body)
        process.journal.sends_chord(body, header)
        try:
            result = chord(tasks, app=app)(end)
        except Exception:
            logging.exception("a chord was not sent")
            time.sleep(0.2)
            return
        with process.waiting([body], timeout) as number:
            result.get(timeout=timeout, propagate=False)
            process.journal.got(number, body, result.state, result.result)
        time.sleep(0.05)

    process.threads(work, work)


def read_batch(app: Celery, process: LoadProcess, ids: List[str]) -> Optional[int]:
    """Look up many tasks at once; return how many had a state, or ``None`` after an error."""
    found: Dict[str, Dict[str, Any]] = {}
    with process.reading(app.backend.options.lookup_timeout) as began:
        with contextlib.suppress(TimeoutError):
            # It raises if some have not finished.
            for _ in app.backend.get_many(
                ids, timeout=0, on_message=lambda meta: found.update({meta["task_id"]: meta})
            ):
                pass
        for this in ids:
            meta = found.get(this, {"status": states.PENDING, "result": None})
            process.journal.read("look-up", began, this, meta["status"], meta["result"])
        return len(found)
    return None


def read_back(app: Celery, run: str, folder: str, ids: List[str], patience: float) -> int:
    """Look up *ids* in a new process that has no memory of them; return how many had a state."""
    process = LoadProcess("back", run, folder)
    deadline = time.monotonic() + patience
    total = 0
    for start in range(0, len(ids), 400):
        while True:
            count = read_batch(app, process, ids[start : start + 400])
            if count is not None:
                total += count
                break
            assert time.monotonic() < deadline, "what was stored cannot be looked up"
    return total


def _hear(process: LoadProcess, number: int) -> Callable[[Dict[str, Any]], None]:
    return lambda meta: process.journal.heard(
        number, meta["task_id"], meta["status"], meta["result"]
    )
