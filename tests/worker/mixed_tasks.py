"""Tasks that tell the version of Celery they run with, and a sender of them.

Run by two versions of Celery: ``python -m tests.worker.mixed_tasks QUEUES GROUP`` prints what
:func:`collect` returns.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any, Dict, List

import celery
from celery import Celery, chain, chord, group
from celery.result import GroupResult

from tests.worker import chord_tasks
from tests.worker.tasks import app_from_environment

#: Seconds to wait for each result.
LONG = 60


def register(app: Celery) -> SimpleNamespace:
    """Create the tasks for *app*, and those of chords, and return them by name."""

    @app.task(name="mixed.version", shared=False)
    def version(x: Any) -> List[Any]:
        return [celery.__version__, x]

    @app.task(name="mixed.broken", shared=False)
    def broken(x: Any) -> None:
        raise KeyError(celery.__version__)

    return SimpleNamespace(version=version, broken=broken, **vars(chord_tasks.register(app)))


def collect(t: SimpleNamespace, queues: Dict[str, str], saved: str) -> Dict[str, Any]:
    """Send tasks to both workers, and return what they return.

    Parameters:
        t: the tasks.
        queues: by the version of Celery, the queue of its worker.
        saved: id of a group that another process has saved.
    """
    got: Dict[str, Any] = {
        "restored": GroupResult.restore(saved, app=t.version.app).get(timeout=LONG)
    }
    header = [t.version.s(n).set(queue=queue) for n in (1, 2) for queue in queues.values()]
    joined = group(task.clone() for task in header).apply_async()
    got["group"] = joined.get(timeout=LONG)
    for version, queue in queues.items():
        here: List[Any] = []
        failed = t.broken.s(0).set(queue=queue).delay().get(timeout=LONG, propagate=False)
        here.append(f"{type(failed).__name__} {failed.args[0]}")
        body = t.version.s().set(queue=queue)
        here.append(chord([task.clone() for task in header], body).delay().get(timeout=LONG))
        failing = chord([header[0].clone(), t.broken.s(0).set(queue=queue)], body.clone())
        here.append(type(failing.delay().get(timeout=LONG, propagate=False)).__name__)
        # A worker sends a chord, whose tasks either worker may run.
        here.append(t.replaced_by_chord.s(1).set(queue=queue).delay().get(timeout=LONG))
        steps = chain(group(task.clone() for task in header), body.clone(), t.same.s())
        here.append(steps.delay().get(timeout=LONG))
        got[version] = here
    joined.save()
    got["saved"] = joined.id
    return got


app = app_from_environment()
tasks = register(app)

if __name__ == "__main__":
    print(json.dumps(collect(tasks, json.loads(sys.argv[1]), sys.argv[2])))
