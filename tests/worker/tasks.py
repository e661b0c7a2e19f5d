"""Tasks for tests with real workers. The sending side imports them too."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any, List

from celery import Celery, group


def app_from_environment() -> Celery:
    """Return an app with the settings that the test has put into the environment."""
    app = Celery("worker-app")
    app.conf.update(
        broker_url=os.environ.get("TEST_BROKER_URL", "memory://"),
        result_backend=os.environ.get("TEST_RESULT_BACKEND", "amqp://"),
        result_exchange=os.environ.get("TEST_RESULT_EXCHANGE", "celeryresults"),
        task_default_queue=os.environ.get("TEST_TASK_QUEUE", "celery"),
        result_backend_transport_options={
            "shards": int(os.environ.get("TEST_SHARDS", "8")),
            "queue_type": os.environ.get("TEST_QUEUE_TYPE", "classic"),
            "lookup_timeout": 60,
            # A broker that restarts on a busy machine may take long.
            "retry_policy": {"max_retries": 300},
        },
        broker_connection_retry_on_startup=True,
        # The machine may be busy.
        broker_connection_timeout=60,
        worker_hijack_root_logger=True,
    )
    # Settings of a single test, as JSON.
    app.conf.update(json.loads(os.environ.get("TEST_CONF", "{}")))
    return app


app = app_from_environment()


@app.task
def add(x: int, y: int) -> int:
    return x + y


@app.task
def fail(message: str) -> None:
    raise KeyError(message)


@app.task(track_started=True)
def started_for(seconds: float) -> str:
    time.sleep(seconds)
    return "done"


@app.task(bind=True)
def progress(self: Any, steps: int) -> int:
    for step in range(steps):
        self.update_state(state="PROGRESS", meta={"current": step, "total": steps})
    return steps


@app.task(bind=True, max_retries=3)
def retried(self: Any, times: int, countdown: float = 0) -> int:
    if self.request.retries < times:
        raise self.retry(countdown=countdown, exc=ValueError(f"try {self.request.retries}"))
    return int(self.request.retries)


@app.task(bind=True)
def replaced(self: Any, x: int, y: int) -> Any:
    return self.replace(add.s(x, y))


@app.task(ignore_result=True)
def ignored() -> int:
    return 1


@app.task
def spawn_children(n: int) -> List[str]:
    return [add.delay(i, i).id for i in range(n)]


@app.task(bind=True)
def whoami(self: Any) -> Any:
    return {"origin": self.request.origin, "pid": os.getpid()}


@app.task
def unserializable() -> Any:
    return object()


@app.task
def payload(size: int) -> str:
    return "x" * size


@app.task(time_limit=1)
def too_long() -> None:
    time.sleep(60)


@app.task(soft_time_limit=1)
def softly_too_long() -> None:
    time.sleep(60)


@app.task(acks_late=False)
def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(bind=True)
def replaced_by_group(self: Any, n: int) -> Any:
    return self.replace(group([add.s(i, i) for i in range(n)]))


@app.task(bind=True, track_started=True)
def steps(self: Any, count: int) -> int:
    for step in range(count):
        self.update_state(state="PROGRESS", meta={"current": step})
        time.sleep(0.002)
    return count


@app.task(bind=True, max_retries=1)
def retried_then_waited_for(self: Any) -> str:
    if not self.request.retries:
        raise self.retry(countdown=0)
    return "second try"


@app.task
def wait_for(task_id: str) -> Any:
    return app.AsyncResult(task_id).get(timeout=60, disable_sync_subtasks=False)


@app.task(bind=True)
def state_of_itself(self: Any) -> str:
    self.update_state(state="PROGRESS", meta={"current": 1})
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        state = app.AsyncResult(self.request.id).state
        if state != "PENDING":
            return str(state)
    return "PENDING"


@app.task(ignore_result=True)
def ignored_failure() -> None:
    raise KeyError("ignored")


@app.task
def text(size: int) -> str:
    return "x" * size


@app.task(bind=True)
def fail_at_length(self: Any, size: int) -> None:
    raise ValueError("x" * size)


@app.task(bind=True)
def report_at_length(self: Any, size: int) -> str:
    try:
        self.update_state(state="PROGRESS", meta="x" * size)
    except Exception as exc:
        return type(exc).__name__
    return "stored"


@app.task
def lengths(values: List[str]) -> List[int]:
    return [len(value) for value in values]


@app.task(bind=True, result_expires=3600, max_retries=1)
def kept_for_an_hour(self: Any, retried: bool = False) -> str:
    if retried and not self.request.retries:
        raise self.retry(countdown=0)
    return "kept"


@app.task(result_expires="soon")
def kept_for_nonsense() -> str:
    return "kept"
