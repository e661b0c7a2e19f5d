"""The app of workers that are killed, alone or with their children. For subprocesses only.

Its tasks are acknowledged late, so a killed process's task is run again.
"""

from __future__ import annotations

import functools
import itertools
import os
from pathlib import Path
from typing import Any, Dict, List

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

#: Journals that no task uses, by process. Each task has one to itself while it runs: a task that is
#: redelivered may run twice at the same time.
_free: Dict[int, List[Journal]] = {}
_numbers = itertools.count()


def begin(task: Any) -> Any:
    """Record that a task is about to return the value of its id, and return that value."""
    free = _free.setdefault(os.getpid(), [])
    try:
        journal = free.pop()
    except IndexError:
        journal = Journal(Path(os.environ["FAULTS_FOLDER"]), f"worker{next(_numbers)}")
    task.request.journal = journal
    result = value(task.request.id, 0)
    journal.began_to_store(task.request.id, "SUCCESS", result)
    return result


@app.task(bind=True, name="faults.compute")
def compute(self: Any) -> Any:
    return begin(self)


@app.task(bind=True, name="faults.combine")
def combine(self: Any, results: List[Any], header: List[str]) -> Any:
    result = begin(self)
    if results != [value(task_id, 0) for task_id in header]:
        # No process expects a failure.
        raise ValueError(f"the results of the header {header} are {results}")
    return result


@functools.cache
def journal_of_leader(pid: int) -> Journal:
    """Return the journal of the process that leads chords."""
    return Journal(Path(os.environ["FAULTS_FOLDER"]), "leader")


@signals.after_task_publish.connect(weak=False)
def _fired(sender: str, headers: Dict[str, Any], **_: Any) -> None:
    if sender == "faults.combine":
        journal_of_leader(os.getpid()).fired(headers["id"])


@signals.task_success.connect(weak=False)
def _stored(sender: Any, result: Any, **_: Any) -> None:
    # Celery sends this signal after the backend has returned.
    sender.request.journal.stored(sender.request.id, "SUCCESS", result)


@signals.task_postrun.connect(weak=False)
def _end(task: Any, **_: Any) -> None:
    _free[os.getpid()].append(task.request.journal)
