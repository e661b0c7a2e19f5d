"""Tasks of the chord tests, for the worker's app and for the sender's alike."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace
from typing import Any, List

from celery import Celery, chord, group

from tests.worker.tasks import app_from_environment


def note(path: str, what: str) -> None:
    """Append a line to a file atomically."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(handle, f"{what}\n".encode())
    finally:
        os.close(handle)


def register(app: Celery) -> SimpleNamespace:
    """Create the tasks for *app* and return them by name."""

    def task(**options: Any) -> Any:
        def decorate(function: Any) -> Any:
            # Shared tasks would be created for every app of the process.
            name = f"chords.{function.__name__}"
            return app.task(name=name, shared=False, **options)(function)

        return decorate

    @task()
    def add(x: int, y: int) -> int:
        return x + y

    @task()
    def same(x: Any) -> Any:
        return x

    @task(bind=True)
    def claim(self: Any, x: Any) -> Any:
        """Store SUCCESS before the end."""
        self.update_state(state="SUCCESS", meta={"claimed": x})
        return x

    @task()
    def total(numbers: List[int]) -> int:
        return sum(numbers)

    @task(bind=True)
    def record(self: Any, results: Any, path: str) -> Any:
        """Body: record that it has run, and return its argument."""
        note(path, self.request.id)
        return results

    @task(bind=True)
    def record_delivery(self: Any, results: Any, path: str) -> Any:
        """Record that it has run, and whether the broker has delivered it again."""
        again = bool(self.request.delivery_info["redelivered"])
        note(path, f"{self.request.id} {again}")
        return results

    # A task that was acknowledged is lost with its worker.
    @task(bind=True, acks_late=True)
    def late_record(self: Any, results: Any, path: str) -> Any:
        """Body like ``record`` that survives its worker."""
        note(path, self.request.id)
        return results

    @task()
    def fail(message: str = "broken") -> None:
        raise KeyError(message)

    @task()
    def fail_with(results: Any) -> None:
        raise KeyError("body")

    @task()
    def on_error(request: Any, exc: Exception, traceback: Any, path: str) -> None:
        note(path, f"{request.id} {type(exc).__name__}")

    @task()
    def old_on_error(task_id: str, path: str) -> None:
        note(path, task_id)

    @task()
    def linked(result: Any, path: str) -> None:
        note(path, repr(result))

    @task(ignore_result=True)
    def ignored(x: int) -> int:
        return x

    @task(bind=True, max_retries=5)
    def retried(self: Any, x: int, times: int) -> int:
        if self.request.retries < times:
            raise self.retry(countdown=0, exc=ValueError("again"))
        return x

    @task(bind=True, autoretry_for=(ValueError,), max_retries=3, retry_backoff=False,
          default_retry_delay=0)  # fmt: skip
    def autoretried(self: Any, x: int, times: int) -> int:
        if self.request.retries < times:
            raise ValueError("again")
        return x

    @task(bind=True)
    def replaced_by_task(self: Any, x: int) -> Any:
        return self.replace(add.s(x, 100))

    @task(bind=True)
    def replaced_by_group(self: Any, x: int) -> Any:
        return self.replace(group([add.s(x, 1), add.s(x, 2)]))

    @task(bind=True)
    def replaced_by_chain(self: Any, x: int) -> Any:
        return self.replace(add.s(x, 1) | add.s(10))

    @task(bind=True)
    def replaced_by_chord(self: Any, x: int) -> Any:
        return self.replace(chord([add.s(x, 1), add.s(x, 2)], total.s()))

    @task(bind=True, track_started=True)
    def started_and_replaced(self: Any, x: int) -> Any:
        return self.replace(chord([add.s(x, 1), add.s(x, 2)], total.s()))

    @task(bind=True)
    def adds(self: Any, x: int, more: int) -> int:
        """Header task that adds tasks to its chord."""
        for number in range(more):
            self.add_to_chord(add.s(1000, number))
        return x

    @task(bind=True)
    def adds_a_group(self: Any, more: int) -> int:
        """Add a group to the chord of this header task."""
        self.add_to_chord(group(add.s(1000, number) for number in range(more)))
        return more

    @task(bind=True)
    def adds_one_that_adds(self: Any, depth: int) -> int:
        if depth:
            self.add_to_chord(adds_one_that_adds.s(depth - 1))
        return depth

    @task(bind=True)
    def stamps(self: Any, results: Any) -> Any:
        return self.request.stamps

    @task(acks_late=True)
    def late(x: Any) -> Any:
        return x

    @task(acks_late=True)
    def late_and_slow(x: Any, seconds: float) -> Any:
        time.sleep(seconds)
        return x

    # The worker of the leader may be running the body when it is killed: it is delivered again.
    @task(bind=True, acks_late=True)
    def mortal(self: Any, results: Any, path: str, point: str, once: str) -> Any:
        """Body like ``record``; the process that fires it is killed at *point*, once."""
        note(path, self.request.id)
        return results

    @task()
    def slow(x: Any, seconds: float) -> Any:
        time.sleep(seconds)
        return x

    @task()
    def payload(size: int) -> str:
        return "x" * size

    @task()
    def length(results: Any) -> int:
        return sum(map(len, results))

    @task()
    def unserializable() -> Any:
        return object()

    @task()
    def killed() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    return SimpleNamespace(**{name: value for name, value in locals().items() if name not in (
        "app", "task")})  # fmt: skip


app = app_from_environment()
tasks = register(app)
