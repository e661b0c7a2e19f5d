"""Celery 4 and this backend side by side: each one's workers with the other one's senders.

``CELERY4_PYTHON`` names a Python with Celery 4.4; without it these tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest
from celery import Celery, chord, group

from tests.conftest import PATIENCE, PATIENT_OPTIONS, Apps
from tests.worker.chord_tasks import register
from tests.worker.conftest import ROOT, Worker, environment_of, launch_worker

PYTHON = os.environ.get("CELERY4_PYTHON", "")

pytestmark = pytest.mark.skipif(not PYTHON, reason="CELERY4_PYTHON names no Python with Celery 4.4")

CONF: Dict[str, Any] = {
    "result_backend_transport_options": {"layout": "per-task", **PATIENT_OPTIONS},
    "result_expires": 600,
    # Celery 4 declares a transient queue for events, which the newest RabbitMQ may refuse.
    "worker_enable_remote_control": False,
}

#: A sender with Celery 4.
SENDER = """
import json, warnings
warnings.simplefilter("ignore")
import celery
from celery import chord, group
from tests.worker.per_task_tasks import app, tasks as t
assert celery.__version__.startswith("4.")
assert type(app.backend).__module__ == "celery.backends.amqp"
told = {"value": t.add.delay(2, 3).get(timeout=60)}
try:
    t.fail.delay("gone").get(timeout=60)
except KeyError as exc:
    told["failure"] = exc.args[0]
several = group(t.add.s(n, n) for n in range(10)).apply_async()
told["group"] = several.get(timeout=60)
told["chord"] = chord([t.add.s(n, n) for n in range(3)], t.total.s()).delay().get(timeout=60)
steps = app.send_task("tests.worker.tasks.steps", (20,))
seen = set()
while not steps.ready():
    seen.add(steps.state)
others = seen - {"PENDING", "STARTED", "PROGRESS", "SUCCESS"}
told["steps"] = [steps.get(timeout=60), sorted(others)]
print(json.dumps(told))
"""


def start(app: Celery, tmp_path: Path, **kwargs: Any) -> Worker:
    return launch_worker(
        app,
        tmp_path,
        module="tests.worker.per_task_tasks",
        env={"TEST_CONF": json.dumps(CONF)},
        **kwargs,
    )


def test_a_celery_4_worker_with_a_sender_that_uses_this_backend(
    make_app: Apps, tmp_path: Path
) -> None:
    app = make_app(**CONF)
    app.set_current()
    worker = start(app, tmp_path, python=PYTHON)
    t: SimpleNamespace = register(app)
    seen: List[Any] = []
    try:
        value = t.add.delay(2, 3)
        # Repeatedly, since reading removes nothing.
        assert [value.get(timeout=PATIENCE) for _ in range(2)] == [5, 5]
        with pytest.raises(KeyError, match="gone"):
            t.fail.delay("gone").get(timeout=PATIENCE)
        assert group(t.add.s(n, n) for n in range(10)).apply_async().get(timeout=PATIENCE) == [
            2 * n for n in range(10)
        ]
        body = chord([t.add.s(n, n) for n in range(3)], t.total.s()).delay()
        assert body.get(timeout=PATIENCE) == 6
        steps = app.send_task("tests.worker.tasks.steps", (20,))
        assert steps.get(timeout=PATIENCE, on_message=lambda m: seen.append(m["status"])) == 20
        assert seen == sorted(seen, key=["STARTED", "PROGRESS", "SUCCESS"].index)
    finally:
        worker.stop()


def test_a_worker_that_uses_this_backend_with_a_celery_4_sender(
    make_app: Apps, tmp_path: Path
) -> None:
    app = make_app(**CONF)
    worker = start(app, tmp_path)
    try:
        sender = subprocess.run(
            [PYTHON, "-c", SENDER],
            cwd=ROOT,
            env={**os.environ, **environment_of(app), "TEST_CONF": json.dumps(CONF)},
            capture_output=True,
            text=True,
            timeout=5 * PATIENCE,
            check=False,
        )
        assert sender.returncode == 0, sender.stderr
        assert json.loads(sender.stdout) == {
            "value": 5,
            "failure": "gone",
            "group": [2 * n for n in range(10)],
            "chord": 6,
            "steps": [20, []],
        }
        # The result of the task that fails.
        assert worker.output().count("Traceback") == 1
    finally:
        worker.stop()
