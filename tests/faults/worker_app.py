"""The app of a worker whose children, and which itself, are killed. Not for the tests' own process.

Its tasks are acknowledged late, so that what a killed process was doing is done again.
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
    # Its exclusive queue has a name: on a killed node of a cluster it may still be locked when the
    # worker comes back, which ends the worker.
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
    # It is sent when the backend has returned.
    journal().stored(sender.request.id, "SUCCESS", result)
