"""The wire format is documented well enough: a program in another language reads results."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import IO, Any, Dict, Iterator, List, Optional

import pytest
from celery import Celery, states

from tests.broker.helpers import new_id
from tests.conftest import Apps, raw_connection

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


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_the_example_reads_large_and_compressed_results(
    make_app: Apps, program: Path, queue_type: str, compression: Optional[str]
) -> None:
    options = {"shards": 1, "queue_type": queue_type}
    app = make_app(result_backend_transport_options=options, result_compression=compression)
    # Random digits, so that the result stays large when it is compressed
    large, small = "".join(random.choices("0123456789abcdef", k=400_000)), "small"
    ids = [new_id(), new_id(), new_id()]
    for task_id, value in zip(ids, (large, small, large)):
        app.backend.store_result(task_id, value, states.SUCCESS)
    # More than one read, since reading must remove nothing
    for _ in range(2):
        found = {meta["task_id"]: meta["result"] for meta in get(app, program, ids)}
        assert found == dict(zip(ids, (large, small, large)))
    assert app.backend.get_task_meta(ids[0], cache=False)["result"] == large


def test_the_example_tells_of_bodies_that_it_cannot_read(make_app: Apps, program: Path) -> None:
    app = make_app(shards=1)
    gone, bz2, good = (new_id() for _ in range(3))
    app.backend.store_result(gone, "x" * 200_000, states.SUCCESS)
    (pointer,) = app.backend.layout.store.read((gone,))[gone]
    with raw_connection(make_app.url) as connection:
        connection.channel().queue_delete(pointer.body_queue)
    compressed = make_app(shards=1, result_compression="bzip2")
    compressed.backend.store_result(bz2, "y" * 1000, states.SUCCESS)
    app.backend.store_result(good, 1, states.SUCCESS)
    found = {meta["task_id"]: meta for meta in get(app, program, [gone, bz2, good])}
    assert "expired" in found[gone]["unreadable"]
    assert "x-bz2" in found[bz2]["unreadable"]
    assert found[good]["result"] == 1


def test_the_example_goes_on_watching_after_large_and_compressed_results(
    make_app: Apps, program: Path
) -> None:
    # Given a program that watches everything
    app, compressed = make_app(shards=1), make_app(shards=1, result_compression="zlib")
    app.backend.store_result(new_id(), 1, states.SUCCESS)
    with watching(app, program) as output:
        # When a large result, a compressed one and a small one are stored
        ids = [new_id(), new_id(), new_id()]
        app.backend.store_result(ids[0], "x" * 200_000, states.SUCCESS)
        compressed.backend.store_result(ids[1], "y" * 5000, states.SUCCESS)
        app.backend.store_result(ids[2], 3, states.SUCCESS)
        # Then it tells of all of them, in that order
        metas = [json.loads(output.readline()) for _ in ids]
    assert [meta["task_id"] for meta in metas] == ids
    assert [meta["result"] for meta in metas] == ["x" * 200_000, "y" * 5000, 3]


@contextlib.contextmanager
def watching(app: Celery, program: Path, *arguments: str) -> Iterator[IO[bytes]]:
    """Run ``watch``; yield what it prints, once it watches."""
    watcher = subprocess.Popen(
        ["node", str(program), "watch", *arguments],
        env=environment(app),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert watcher.stderr is not None
        assert watcher.stdout is not None
        assert watcher.stderr.readline() == b"watching\n"
        yield watcher.stdout
    finally:
        watcher.kill()
        watcher.communicate()


def test_the_example_follows_failures(app: Celery, program: Path) -> None:
    # The exchange has to exist.
    app.backend.store_result(new_id(), 1, states.SUCCESS)
    with watching(app, program, "FAILURE") as output:
        task_id = new_id()
        app.backend.store_result(new_id(), 1, states.SUCCESS)
        app.backend.store_result(task_id, KeyError("gone"), states.FAILURE)
        meta = json.loads(output.readline())
    assert meta["task_id"] == task_id
    assert meta["result"]["exc_type"] == "KeyError"
