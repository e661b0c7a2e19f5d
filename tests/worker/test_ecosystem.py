"""Flower, celery-progress, celery.contrib.pytest, Prometheus and Compose with this backend."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import pytest
from celery import Celery

from tests.conftest import eventually
from tests.worker.conftest import ROOT, launch_worker
from tests.worker.test_recipes import LONG, check_count, events, free_port, serve
from tools import rabbitmq

httpx = pytest.importorskip("httpx")


@pytest.fixture(scope="module")
def broker(_session_node: Optional[rabbitmq.Node]) -> Iterator[str]:
    """URL of a virtual host of its own."""
    if _session_node is None:
        pytest.skip("the broker of AMQP_URL is not ours to control")
    vhost = f"ecosystem-{uuid.uuid4().hex[:8]}"
    _session_node.ctl("add_vhost", vhost)
    _session_node.ctl("set_permissions", "-p", vhost, "guest", ".*", ".*", ".*")
    yield _session_node.url(vhost=vhost)
    _session_node.ctl("delete_vhost", vhost)


@contextlib.contextmanager
def worker(
    broker: str, folder: Path, module: str, pool: str = "threads", **environment: str
) -> Iterator[None]:
    """Run a worker of an example."""
    app = Celery(broker=broker, backend="amqp://", set_as_current=False)
    running = launch_worker(
        app,
        folder,
        module=module,
        pool=pool,
        args=("--task-events",),
        env={"BROKER_URL": broker, **environment},
    )
    try:
        yield
    finally:
        running.stop()


def needs(*modules: str) -> None:
    """Skip where a package is not installed; in CI that is an error."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            if os.environ.get("CI") and sys.version_info >= (3, 10):
                pytest.fail(f"{module} is not installed")
            pytest.skip(f"{module} is not installed")


def test_flower_shows_tasks_and_their_results(broker: str, tmp_path: Path) -> None:
    needs("flower")
    environment = {**os.environ, "BROKER_URL": broker, "FLOWER_UNAUTHENTICATED_API": "true"}
    command = ("celery", "-A", "examples.tasks", "flower", "--port={port}", "--address=127.0.0.1")
    with (
        worker(broker, tmp_path, "examples.tasks"),
        serve(environment, tmp_path / "log", *command) as address,
        httpx.Client(base_url=f"http://{address}/api/task/", timeout=LONG) as client,
    ):
        # Given a task that was sent by Flower, and one of another process
        sent = client.post("async-apply/examples.tasks.count", json={"args": [3, 0]}).json()
        app = Celery(broker=broker, backend="amqp://", set_as_current=False)
        other = app.send_task("examples.tasks.count", (4, 0)).id
        failed = app.send_task("examples.tasks.count", (-1,)).id
        # Then Flower reads their results

        def ended(task_id: str) -> Any:
            found = client.get(f"result/{task_id}").json()
            return found["state"] in ("SUCCESS", "FAILURE") and found

        for task_id, value in ((sent["task-id"], 3), (other, 4)):
            found = eventually(functools.partial(ended, task_id))
            assert (found["state"], found["result"]) == ("SUCCESS", value)
        found = eventually(functools.partial(ended, failed))
        assert found["state"] == "FAILURE"
        assert "below zero" in found["traceback"]
        # And the state is known by the events as well
        eventually(lambda: client.get(f"info/{other}").status_code == 200)
        assert client.get(f"info/{other}").json()["name"] == "examples.tasks.count"
        app.backend.close()
        app.close()


def test_celery_progress(broker: str, tmp_path: Path) -> None:
    needs("celery_progress", "django")
    environment = {**os.environ, "BROKER_URL": broker}
    command = ("examples.django_progress", "runserver", "--noreload", "{address}")
    with (
        worker(broker, tmp_path, "examples.django_progress"),
        serve(environment, tmp_path / "log", *command) as address,
        httpx.Client(base_url=f"http://{address}", timeout=LONG) as client,
    ):
        assert "progress-bar" in client.get("/").text
        assert "CeleryProgressBar" in client.get("/static/celery_progress/celery_progress.js").text
        headers = {"X-CSRFToken": client.cookies["csrftoken"]}
        url = client.post("/tasks", params={"total": 20}, headers=headers).json()["url"]
        seen: List[Dict[str, Any]] = []

        def over() -> bool:
            seen.append(client.get(url).json())
            return bool(seen[-1]["complete"])

        eventually(over)
        assert seen[-1]["success"] is True, seen[-1]
        assert seen[-1]["result"] == 20
        # It was seen on its way, by a process that polls
        steps = [each["progress"]["current"] for each in seen if each["state"] == "PROGRESS"]
        assert len(set(steps)) >= 3
        assert steps == sorted(steps)


def test_celery_contrib_pytest(broker: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "celery.contrib.pytest", "-p", "no:cacheprovider",
         "-q", "-n", "0", "-o", "filterwarnings=default", "examples/testing"],
        cwd=ROOT,
        env={**os.environ, "BROKER_URL": broker},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout


def test_prometheus_scrapes_the_children_of_a_worker(broker: str, tmp_path: Path) -> None:
    needs("prometheus_client")
    port = free_port()
    with worker(
        broker, tmp_path, "examples.monitoring.exporter", pool="prefork", METRICS_PORT=str(port)
    ):
        app = Celery(broker=broker, backend="amqp://", set_as_current=False)
        app.send_task("examples.tasks.count", (3, 0)).get(timeout=LONG)
        app.backend.close()
        app.close()

        def stored() -> float:
            found = 0.0
            for number in range(port, port + 5):
                with contextlib.suppress(httpx.HTTPError):
                    text = httpx.get(f"http://127.0.0.1:{number}/metrics", trust_env=False).text
                    for value in re.findall(r"^celery_results_stored_total (\S+)$", text, re.M):
                        found += float(value)
            return found

        # Three states of progress and the result, whichever child has run the task
        assert eventually(lambda: stored() == 4)


def test_the_commands_of_the_compose_file_work(broker: str, tmp_path: Path) -> None:
    needs("yaml", "fastapi", "uvicorn")
    import yaml

    compose = yaml.safe_load((ROOT / "examples" / "compose" / "compose.yaml").read_text())
    services = compose["services"]
    assert services.keys() == {"rabbitmq", "worker", "web"}
    for name in ("worker", "web"):
        build = services[name]["build"]
        context = (ROOT / "examples" / "compose" / build["context"]).resolve()
        assert context == ROOT
        assert (context / build["dockerfile"]).exists()
        assert services[name]["environment"]["BROKER_URL"].startswith("amqp://guest:guest@rabbitmq")
    # The page is the only thing that needs another address here.
    web = [{"0.0.0.0": "127.0.0.1", "8000": "{port}"}.get(w, w) for w in services["web"]["command"]]
    environment = {**os.environ, "BROKER_URL": broker}
    log = tmp_path / "worker.log"
    with log.open("wb") as output:
        running = subprocess.Popen(
            [sys.executable, "-m", *services["worker"]["command"]],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        with (
            serve(environment, tmp_path / "log", *web) as address,
            httpx.Client(base_url=f"http://{address}", timeout=LONG) as client,
        ):
            eventually(lambda: b" ready." in log.read_bytes())
            assert "<progress" in client.get("/").text
            task_id = client.post("/tasks", params={"total": 20}).json()["id"]
            check_count(events(f"http://{address}/tasks/{task_id}/events"), 20)
    finally:
        running.terminate()
        assert running.wait(60) == 0


def check_types(folder: Path, *files: Path) -> Any:
    """Run mypy in strict mode over *files*."""
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    config = folder / "mypy.ini"
    config.write_text("[mypy]\nstrict = true\n[mypy-celery.*,kombu.*,amqp.*,vine.*]\n"
                      "ignore_missing_imports = true\nfollow_imports = skip\n")  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(config), "--cache-dir",
         str(folder / "cache"), "--follow-imports", "silent", *map(str, files)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )  # fmt: skip


def test_typed_code_passes_mypy_in_strict_mode(tmp_path: Path) -> None:
    done = check_types(tmp_path, Path("examples/typed.py"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_coroutines_return_values_of_the_type_that_stubs_give_a_result(tmp_path: Path) -> None:
    # Given code that treats the number of a result object as text
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from typing import Any\n"
        "from celery_amqp_results import aio\n"
        "class Number:\n"
        "    def get(self, timeout: float = 1) -> int: ...  # type: ignore[empty-body]\n"
        "async def use(result: Number, untyped: Any) -> None:\n"
        "    one: str = await aio.get(result)\n"
        "    many = await aio.gather(result, result)\n"
        "    first: str = many[0]\n"
        "    async for _, each in aio.as_completed([result]):\n"
        "        last: str = each\n"
        "    other: str = await aio.get(untyped)\n"
        "    by_id: str = await aio.get('an id')\n"
    )
    # When it is checked
    done = check_types(tmp_path, wrong)
    # Then the three uses whose type is known are errors, and no other
    lines = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert [line.split(":")[1] for line in lines] == ["6", "8", "10"], done.stdout


def test_typed_code_passes_pyright() -> None:
    pyright = shutil.which("pyright")
    if pyright is None:
        pytest.skip("pyright is not installed: npm install --global pyright")
    done = subprocess.run(
        [pyright, "--pythonpath", sys.executable, "examples/typed.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
