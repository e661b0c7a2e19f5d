"""The tasks of the examples: ``celery -A examples.tasks worker``."""

from __future__ import annotations

import os
import time
from typing import Any, Dict

from celery import Celery

app = Celery(
    "examples",
    broker=os.environ.get("BROKER_URL", "amqp://guest:guest@localhost//"),
    backend="amqp://",
)


@app.task(bind=True)
def count(self: Any, total: int, pause: float = 0.1) -> int:
    """Count to *total*, and say how far it is."""
    if total < 0:
        raise ValueError(f"{total} is below zero")
    for current in range(total):
        self.update_state(state="PROGRESS", meta={"current": current, "total": total})
        time.sleep(pause)
    return total


def describe(meta: Dict[str, Any]) -> Dict[str, Any]:
    """Return what a browser may see of a state."""
    result = meta["result"]
    if isinstance(result, BaseException):
        # Tell strangers no more than this: a traceback shows your code.
        result = str(result)
    return {"id": meta["task_id"], "state": meta["status"], "result": result}
