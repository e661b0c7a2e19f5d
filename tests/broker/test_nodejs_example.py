"""The wire format is documented well enough: a program in another language reads results."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Dict, List

import pytest
from celery import Celery, states

from tests.broker.helpers import new_id
from tests.conftest import Apps

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "nodejs"

TIMEOUT = 60


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example program, with its dependencies."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("Node.js is not installed")
    folder = tmp_path_factory.mktemp("nodejs")
    for name in ("package.json", "results.js"):
        shutil.copy(EXAMPLE / name, folder)
    command = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--silent"]
    try:
        subprocess.run(command, cwd=folder, check=True, timeout=120, capture_output=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as exc:
        pytest.skip(f"npm could not install amqplib: {exc}")
    return folder / "results.js"


def environment(app: Celery) -> Dict[str, str]:
    return {
        **os.environ,
        "AMQP_URL": app.conf.broker_url,
        "RESULT_EXCHANGE": app.conf.result_exchange,
        "SHARDS": str(app.backend.options.shards),
    }


def get(app: Celery, program: Path, ids: List[str]) -> List[Dict[str, Any]]:
    done = subprocess.run(
        ["node", str(program), "get", *ids],
        env=environment(app),
        check=True,
        timeout=TIMEOUT,
        stdout=subprocess.PIPE,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_the_example_reads_results_from_messages_and_from_pages(
    make_app: Apps, program: Path, queue_type: str
) -> None:
    options = {"shards": 2, "queue_type": queue_type}
    app = make_app(result_backend_transport_options=options)
    ids = [new_id() for _ in range(100)]
    for number, task_id in enumerate(ids):
        app.backend.store_result(task_id, {"number": number}, states.STARTED)
        app.backend.store_result(task_id, {"number": number}, states.SUCCESS)
    app.backend.store_result(ids[0], ValueError("late"), states.FAILURE)
    unknown = new_id()
    for _ in range(2):
        found = {meta["task_id"]: meta for meta in get(app, program, [*ids[:10], unknown])}
        assert [found[i]["status"] for i in ids[:10]] == [states.SUCCESS] * 10
        assert [found[i]["result"]["number"] for i in ids[:10]] == list(range(10))
        assert found[unknown]["status"] == states.PENDING
        # A reader of this package packs the results.
        assert app.AsyncResult(ids[-1]).get(timeout=TIMEOUT) == {"number": 99}
        assert app.AsyncResult(unknown).state == states.PENDING
    # The example removed nothing.
    assert app.backend.get_task_meta(ids[0], cache=False)["status"] == states.SUCCESS


def test_the_example_follows_failures(app: Celery, program: Path) -> None:
    # The exchange has to exist.
    app.backend.store_result(new_id(), 1, states.SUCCESS)
    watcher = subprocess.Popen(
        ["node", str(program), "watch", "FAILURE"],
        env=environment(app),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert watcher.stderr is not None
        assert watcher.stdout is not None
        assert watcher.stderr.readline() == b"watching\n"
        task_id = new_id()
        app.backend.store_result(new_id(), 1, states.SUCCESS)
        app.backend.store_result(task_id, KeyError("gone"), states.FAILURE)
        meta = json.loads(watcher.stdout.readline())
    finally:
        watcher.kill()
        watcher.communicate()
    assert meta["task_id"] == task_id
    assert meta["result"]["exc_type"] == "KeyError"
