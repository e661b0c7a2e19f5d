"""Runs functions in separate processes: fresh interpreters that share nothing with the test.

::

    subprocesses.run(app, states, ids=["a", "b"])              # returns what the function returns
    with subprocesses.start(app, watch, ids=["a"]) as process:
        ...
        process.answer()

The child process imports the function by its module and name. It calls the function with an app
of the same settings, which becomes the current app, and with the keyword arguments. Arguments and
return value must be picklable.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

from celery import Celery
from celery.app.defaults import DEFAULTS

ROOT = Path(__file__).resolve().parent.parent


def settings(app: Celery) -> Dict[str, Any]:
    """Return the settings from which another process can make an equal app."""
    chosen = {
        name: value
        for name, value in app.conf.changes.items()
        if name in DEFAULTS and value != DEFAULTS[name]
    }
    return {**chosen, "broker_url": app.conf.broker_url}


class Process:
    """A function that runs in another process."""

    def __init__(self, app: Celery, function: Callable[..., Any], kwargs: Dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "tests.subprocesses"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        job = (function.__module__, function.__qualname__, settings(app), kwargs)
        assert self._process.stdin is not None
        self._process.stdin.write(pickle.dumps(job))
        self._process.stdin.flush()
        self._answered = False

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether it has ended and :meth:`answer` will not block."""
        return self._process.poll() is not None

    def signal(self, number: int) -> None:
        """Send a signal to the process, unless it has ended."""
        self._process.send_signal(number)

    def readline(self) -> str:
        """Return the next line that the function writes with :func:`say`."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().decode().rstrip("\n")

    def write_line(self, text: str) -> None:
        """Send the function a line, for :func:`hear`."""
        assert self._process.stdin is not None
        self._process.stdin.write(text.encode() + b"\n")
        self._process.stdin.flush()

    def answer(self, timeout: float = 120.0) -> Any:
        """Wait for the function and return its value; fail if it raised."""
        self._answered = True
        try:
            out, err = self._process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError("the other process has not ended in time") from None
        assert self._process.returncode == 0, err.decode(errors="replace")
        return pickle.loads(out)

    def kill(self) -> None:
        """Kill the process."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def start(app: Celery, function: Callable[..., Any], **kwargs: Any) -> Iterator[Process]:
    """Start *function* in another process, which is killed at the end of the block."""
    process = Process(app, function, kwargs)
    try:
        yield process
    finally:
        process.kill()


def run(app: Celery, function: Callable[..., Any], **kwargs: Any) -> Any:
    """Run *function* in another process and return its value."""
    with start(app, function, **kwargs) as process:
        return process.answer()


def run_many(app: Celery, function: Callable[..., Any], kwargs: List[Dict[str, Any]]) -> List[Any]:
    """Run *function* concurrently in one process for each of *kwargs*."""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(start(app, function, **each)) for each in kwargs]
        return [process.answer() for process in processes]


def say(text: str) -> None:
    """In the function: write a line for :meth:`Process.readline`."""
    sys.stdout.buffer.write(text.encode() + b"\n")
    sys.stdout.flush()


def hear() -> str:
    """In the function: wait for a line of :meth:`Process.write_line`."""
    return sys.stdin.buffer.readline().decode().rstrip("\n")


def _main() -> None:
    module, name, conf, kwargs = pickle.load(sys.stdin.buffer)
    app = Celery("elsewhere", set_as_current=True)
    app.conf.update(conf)
    function: Any = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    answer = function(app, **kwargs)
    app.backend.close()
    app.close()
    sys.stdout.buffer.write(pickle.dumps(answer))
    sys.stdout.flush()


if __name__ == "__main__":
    _main()
