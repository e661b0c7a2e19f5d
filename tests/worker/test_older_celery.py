"""A worker with an older minor version of Celery beside a newer one, on one broker.

``OLDER_PYTHON`` names a Python with the older Celery and this package. By default it is the one
that ``make test-oldest`` makes. Without it the tests are skipped.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List

import amqp
import celery
import pytest
from celery import Celery, group
from celery.result import GroupResult

from celery_amqp_results.chords.remote import COMMAND
from tests.conftest import LOAD, PATIENCE, Apps
from tests.worker.conftest import ROOT, Worker, environment_of, launch_worker
from tests.worker.mixed_tasks import LONG, collect, register

PYTHON = os.environ.get("OLDER_PYTHON", str(ROOT / ".venv-oldest" / "bin" / "python"))

MODULE = "tests.worker.mixed_tasks"


def version_of(python: str) -> str:
    """Return the version of Celery that *python* imports, or nothing."""
    command = [python, "-c", "import celery, celery_amqp_results; print(celery.__version__)"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip()


@pytest.fixture(scope="module")
def older() -> str:
    found = version_of(PYTHON)
    if found in ("", celery.__version__):
        pytest.skip("OLDER_PYTHON names no Python with another version of Celery")
    return found


@pytest.fixture
def queues(make_app: Apps, raw: amqp.Connection, older: str) -> Iterator[Dict[str, str]]:
    """The queue of each worker, by its version of Celery. It also consumes the default queue."""
    made = {each: f"{make_app.prefix}-{each}" for each in (older, celery.__version__)}
    yield made
    channel = raw.channel()
    for queue in made.values():
        channel.queue_delete(queue)


def collect_with(python: str, app: Celery, *arguments: str) -> Dict[str, Any]:
    """Return what a sender in *python* gets."""
    done = subprocess.run(
        [python, "-m", MODULE, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment_of(app)},
        capture_output=True,
        text=True,
        timeout=10 * LONG,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    collected: Dict[str, Any] = json.loads(done.stdout)
    return collected


@pytest.mark.parametrize("leader", ["older", "newer"] if LOAD else ["older"])
@pytest.mark.parametrize("queue_type", ["classic", "quorum"] if LOAD else ["classic"])
def test_workers_with_two_versions_of_celery_share_tasks_groups_and_chords(
    make_app: Apps, tmp_path: Path, older: str, queues: Dict[str, str], queue_type: str, leader: str
) -> None:
    app = make_app(result_backend_transport_options={"shards": 8, "queue_type": queue_type})
    app.set_current()
    t = register(app)
    pythons = {older: PYTHON, celery.__version__: sys.executable}
    newer = celery.__version__
    first, second = (older, newer) if leader == "older" else (newer, older)
    workers: List[Worker] = []

    def start(version: str) -> None:
        names = f"{queues[version]},{app.conf.task_default_queue}"
        workers.append(
            launch_worker(app, tmp_path, MODULE, args=("-Q", names), python=pythons[version])
        )

    def expected(restored: Any) -> Dict[str, Any]:
        header = [[version, n] for n in (1, 2) for version in queues]
        each = {
            version: [
                f"KeyError {version}", [version, header], "ChordError", 5, [version, header]
            ]
            for version in queues
        }  # fmt: skip
        return {"restored": restored, "group": header, **each}

    try:
        # Given a worker that leads chords, and another one that started later
        start(first)
        chorded = group(t.version.s(n).set(queue=queues[first]) for n in range(3)) | t.same.s()
        assert chorded.delay().get(timeout=LONG) == [[first, n] for n in range(3)]
        start(second)
        led = app.control.inspect(timeout=5, limit=2)._request(COMMAND)
        assert sorted(bool(answer["led"]) for answer in led.values()) == [False, True]
        # When a sender of each version sends tasks to both workers
        saved = group(t.version.s(n).set(queue=queues[second]) for n in range(3)).apply_async()
        saved.save()
        theirs = [[second, n] for n in range(3)]
        sender = functools.partial(collect_with, PYTHON, app, json.dumps(queues))
        by_older = sender(saved.id)
        by_newer = collect(t, queues, by_older["saved"])
        # Then each gets everything, also what the other one has saved
        assert GroupResult.restore(by_newer.pop("saved"), app=app).get(timeout=LONG)
        assert by_older.pop("saved")
        assert by_older == expected(theirs)
        assert by_newer == expected(by_older["group"])
    finally:
        for worker in workers:
            worker.stop()
