"""The documented programs in ``examples/``, with real servers and a worker."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import socket
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import pytest
from celery import Celery

from tests.conftest import eventually
from tests.worker.conftest import ROOT, launch_worker
from tools import rabbitmq

# Where these packages can be installed, they must be.
if os.environ.get("CI") and sys.version_info >= (3, 10):
    for name in ("django", "fastapi", "httpx", "uvicorn", "websockets"):
        importlib.import_module(name)
httpx = pytest.importorskip("httpx")
connect = pytest.importorskip("websockets.sync.client").connect
ConnectionClosed = pytest.importorskip("websockets.exceptions").ConnectionClosed
for name in ("django", "fastapi", "uvicorn"):
    pytest.importorskip(name)

#: Seconds after which a request counts as hanging.
LONG = 60.0

FINAL = ("SUCCESS", "FAILURE", "REVOKED")


@pytest.fixture(scope="module")
def environment(
    _session_node: Optional[rabbitmq.Node], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Dict[str, str]]:
    """The environment of the examples, while their worker runs.

    They have their own virtual host, so they can keep their plain names.
    """
    if _session_node is None:
        pytest.skip("the broker of AMQP_URL is not ours to control")
    vhost = f"recipes-{uuid.uuid4().hex[:8]}"
    _session_node.ctl("add_vhost", vhost)
    _session_node.ctl("set_permissions", "-p", vhost, "guest", ".*", ".*", ".*")
    url = _session_node.url(vhost=vhost)
    worker = launch_worker(
        Celery(broker=url, backend="amqp://", set_as_current=False),
        tmp_path_factory.mktemp("worker"),
        module="examples.tasks",
        pool="threads",
        env={"BROKER_URL": url},
    )
    yield {**os.environ, "BROKER_URL": url}
    worker.stop()
    _session_node.ctl("delete_vhost", vhost)


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def serve(environment: Dict[str, str], log: Path, *command: str) -> Iterator[str]:
    """Run a server; yield its address, without the scheme."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    arguments = [each.format(address=address, port=port) for each in command]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )

    def listens() -> bool:
        assert process.poll() is None, log.read_text(errors="replace")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False

    try:
        eventually(listens, LONG)
        yield address
        assert "Traceback" not in log.read_text(errors="replace"), log.read_text(errors="replace")
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)


def events(url: str) -> List[Dict[str, Any]]:
    """Read server-sent events until the server ends the stream."""
    with httpx.stream("GET", url, timeout=LONG) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(re.match("data: |: ", line) for line in lines), lines
    return [json.loads(line[6:]) for line in lines if line.startswith("data: ")]


def check_count(found: List[Dict[str, Any]], total: int) -> None:
    """Check that a task was seen at work: past states are not reported, so it was seen live."""
    assert found[-1]["state"] == "SUCCESS"
    assert found[-1]["result"] == total
    steps = [each["result"]["current"] for each in found[:-1]]
    assert [each["state"] for each in found[:-1]] == ["PROGRESS"] * len(steps)
    assert steps
    assert steps == sorted(set(steps))


def test_fastapi_server_sent_events(environment: Dict[str, str], tmp_path: Path) -> None:
    with (
        serve(
            environment, tmp_path / "log", "uvicorn", "examples.fastapi_sse:api", "--port", "{port}"
        ) as address,
        httpx.Client(base_url=f"http://{address}", timeout=LONG) as client,
    ):
        assert "<progress" in client.get("/").text
        task_id = client.post("/tasks", params={"total": 30}).json()["id"]
        check_count(events(f"http://{address}/tasks/{task_id}/events"), 30)
        assert client.get(f"/tasks/{task_id}").json() == {"value": 30}
        # A client that connects after the end gets the final state.
        (end,) = events(f"http://{address}/tasks/{task_id}/events")
        assert (end["state"], end["result"]) == ("SUCCESS", 30)
        waiting = client.get(f"/tasks/{uuid.uuid4()}", params={"timeout": 0.1})
        assert waiting.status_code == 504
        # A browser that disconnects while nothing happens does not harm the server.
        with client.stream("GET", f"/tasks/{uuid.uuid4()}/events"):
            pass
        assert client.get("/").status_code == 200


def test_fastapi_websocket(environment: Dict[str, str], tmp_path: Path) -> None:
    with serve(
        environment,
        tmp_path / "log",
        "uvicorn",
        "examples.fastapi_websocket:api",
        "--port",
        "{port}",
    ) as address:
        with connect(f"ws://{address}/count", open_timeout=LONG) as client:
            client.send("30")
            check_count([json.loads(message) for message in client], 30)
        # Wrong input closes the connection with a reason, and the next one works.
        for wrong in ("many", "", b"\x00\xff", "9" * 5000):
            with connect(f"ws://{address}/count", open_timeout=LONG) as client:
                client.send(wrong)
                with pytest.raises(ConnectionClosed):
                    client.recv(LONG)
                assert client.close_code == 1003
                assert "number" in str(client.close_reason)
        # A client may go before it has said anything, or in the middle.
        with connect(f"ws://{address}/count", open_timeout=LONG):
            pass
        with connect(f"ws://{address}/count", open_timeout=LONG) as client:
            client.send("20")
            client.recv(LONG)
            client.send(b"something else")
        with connect(f"ws://{address}/failures", open_timeout=LONG) as failures:
            # There is no event for a watch that is ready, so tasks fail until one failure is seen.
            found: List[Dict[str, Any]] = []

            def seen() -> bool:
                with connect(f"ws://{address}/count", open_timeout=LONG) as client:
                    client.send("-1")
                    assert json.loads(client.recv(LONG))["state"] == "FAILURE"
                with contextlib.suppress(TimeoutError):
                    found.append(json.loads(failures.recv(0.2)))
                return bool(found)

            eventually(seen, LONG)
            assert (found[0]["state"], "below zero" in found[0]["result"]) == ("FAILURE", True)


@pytest.mark.parametrize(
    ("command", "path"),
    [
        (("uvicorn", "examples.django_views:application", "--port", "{port}"), "events"),
        (("examples.django_views", "runserver", "--noreload", "{address}"), "events-by-threads"),
    ],
    ids=["asynchronous", "threaded"],
)
def test_django(
    environment: Dict[str, str],
    tmp_path: Path,
    command: List[str],
    path: str,
) -> None:
    with (
        serve(environment, tmp_path / "log", *command) as address,
        httpx.Client(base_url=f"http://{address}", timeout=LONG) as client,
    ):
        # A POST without the token is refused, as by any project of Django.
        assert client.post("/tasks", params={"total": 30}).status_code == 403
        assert "<progress" in client.get("/").text
        headers = {"X-CSRFToken": client.cookies["csrftoken"]}

        def start(total: str) -> Any:
            return client.post("/tasks", params={"total": total}, headers=headers)

        task_id = start("30").json()["id"]
        check_count(events(f"http://{address}/tasks/{task_id}/{path}"), 30)
        assert client.get(f"/tasks/{task_id}").json() == {"value": 30}
        # Wrong input is answered, and so is a task that fails.
        assert [start(text).status_code for text in ("x", "", "1" * 9)] == [400] * 3
        assert client.get("/tasks", params={"total": "1"}).status_code == 405
        failed = client.get(f"/tasks/{start('-1').json()['id']}")
        assert (failed.status_code, failed.json()) == (422, {"error": "-1 is below zero"})


def test_flask(environment: Dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("flask")
    command = ("flask", "--app", "examples.flask_views", "run", "--port", "{port}")
    with (
        serve(environment, tmp_path / "log", *command) as address,
        httpx.Client(base_url=f"http://{address}", timeout=LONG) as client,
    ):
        assert "<progress" in client.get("/").text
        task_id = client.post("/tasks", params={"total": 30}).json()["id"]
        check_count(events(f"http://{address}/tasks/{task_id}/events"), 30)
        assert client.get(f"/tasks/{task_id}").json() == {
            "id": task_id,
            "state": "SUCCESS",
            "result": 30,
        }
