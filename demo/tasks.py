"""The tasks of the demo, for an app made from the environment, see :func:`demo.processes.settings`.

The worker, the sender and the readers import them.
"""

from __future__ import annotations

import os
import time
from typing import Any, List

from celery import Celery


def _make_app() -> Celery:
    name = os.environ.get("DEMO_NAME", "celery-results-demo")
    broker = os.environ.get("DEMO_BROKER", "memory://localhost")
    app = Celery("demo", broker=broker, backend="amqp://")
    app.conf.update(
        result_exchange=name,
        result_expires=600,
        task_default_queue=f"{name}.tasks",
        task_default_exchange=f"{name}.tasks",
        task_default_routing_key=f"{name}.tasks",
        # On the user's own broker the demo's worker must not answer other control messages.
        worker_enable_remote_control=False,
        worker_prefetch_multiplier=16,
        broker_connection_retry_on_startup=True,
    )
    if broker.startswith("memory"):
        # Seconds between two polls of the worker's queue; the default is one second.
        app.conf.broker_transport_options = {"polling_interval": 0.01}
    else:
        app.conf.result_backend_transport_options = {
            "shards": int(os.environ.get("DEMO_SHARDS", "16"))
        }
    return app


app = _make_app()


@app.task
def add(x: int, y: int) -> int:
    return x + y


@app.task
def divide(x: float, y: float) -> float:
    return x / y


@app.task(bind=True)
def render(self: Any, frames: int, seconds: float) -> str:
    """Report progress after each frame, *seconds* apart."""
    for frame in range(1, frames + 1):
        time.sleep(seconds)
        self.update_state(state="PROGRESS", meta={"current": frame, "total": frames})
    return f"{frames} frames"


@app.task
def square(x: int) -> int:
    return x * x


@app.task
def total(numbers: List[int]) -> int:
    return sum(numbers)
