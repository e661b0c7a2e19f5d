"""The app of a worker that is killed, alone or with its children. For subprocesses only.

Its tasks are acknowledged late, so a killed process's task is run again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Dict

from celery import signals

from tests.faults.recorder import Journal, value
from tests.worker.tasks import app_from_environment

app = app_from_environment()
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=2,
    # Its exclusive queue has a fixed name: when a cluster node is killed, the queue may still be
    # locked at the worker's reconnect, which ends the worker.
    worker_enable_remote_control=False,
)

_journals: Dict[int, Journal] = {}


def journal() -> Journal:
    """Return the journal of this process."""
    pid = os.getpid()
    if pid not in _journals:
        _journals[pid] = Journal(Path(os.environ["FAULTS_FOLDER"]), "worker")
    return _journals[pid]


@app.task(bind=True, name="faults.compute")
def compute(self: Any) -> Any:
    result = value(self.request.id, 0)
    journal().began_to_store(self.request.id, "SUCCESS", result)
    return result


@signals.task_success.connect(weak=False)
def _stored(sender: Any, result: Any, **_: Any) -> None:
    # Celery sends this signal after the backend has returned.
    journal().stored(sender.request.id, "SUCCESS", result)
