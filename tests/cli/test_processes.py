"""``celery -A ... results`` as a process, as a user runs it."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
from celery import Celery, states

from tests.conftest import PATIENCE, Apps
from tests.worker.conftest import environment_of

ROOT = Path(__file__).resolve().parent.parent.parent


def _registered() -> bool:
    found: Any = metadata.entry_points()
    if hasattr(found, "select"):
        return bool(found.select(group="celery.commands", name="results"))
    return any(e.name == "results" for e in found.get("celery.commands", ()))


pytestmark = pytest.mark.skipif(
    not _registered() and not os.environ.get("CI"),
    reason="installed before there was an entry point: pip install -e . again",
)


def command(*arguments: str) -> List[str]:
    return [sys.executable, "-m", "celery", "-A", "tests.worker.tasks", "results", *arguments]


def environment(app: Celery, **more: str) -> Dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
    return dict(clean, **environment_of(app), PYTHONWARNINGS="default", **more)


def test_a_pipe_gets_plain_text_and_an_exit_code(app: Celery) -> None:
    task_id = str(uuid.uuid4())
    app.backend.store_result(task_id, ValueError("bad"), states.FAILURE)
    done = subprocess.run(
        command("get", task_id),
        cwd=ROOT,
        env=environment(app),
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "ValueError('bad')" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_terminal_gets_colour_unless_no_color_is_set(app: Celery, no_color: str) -> None:
    pytest.importorskip("rich")
    task_id = str(uuid.uuid4())
    app.backend.store_result(task_id, {"sum": 3}, states.SUCCESS)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command("watch", task_id),
        cwd=ROOT,
        env=environment(app, NO_COLOR=no_color, TERM="xterm-256color", COLUMNS="100"),
        stdout=theirs,
        stderr=subprocess.STDOUT,
    )
    os.close(theirs)
    output = b""
    try:
        while chunk := os.read(ours, 65536):
            output += chunk
    except OSError:
        # The kernel reports EIO once no process has the terminal open.
        pass
    finally:
        os.close(ours)
    assert process.wait(PATIENCE) == 0, output
    text = output.decode()
    assert task_id in text
    assert "SUCCESS" in text
    assert ("╭" in text) == (not no_color)
    assert ("\x1b[" in text) == (not no_color)


def test_ctrl_c_ends_a_watch_of_everything_cleanly(
    make_app: Apps, eventually: Callable[..., Any], tmp_path: Path
) -> None:
    app = make_app()
    out = tmp_path / "out"
    with out.open("wb") as stdout, (tmp_path / "err").open("wb") as stderr:
        process = subprocess.Popen(
            command("watch", "--json"),
            cwd=ROOT,
            env=environment(app),
            stdout=stdout,
            stderr=stderr,
            # SIGINT is ignored if a shell runs the tests in the background.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def seen() -> bool:
        # States published before the queue is bound do not reach it.
        app.backend.store_result(str(uuid.uuid4()), 1, states.SUCCESS)
        return out.read_bytes().count(b"\n") > 2

    try:
        eventually(seen, 2 * PATIENCE)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    assert all(json.loads(line)["state"] == "SUCCESS" for line in out.read_text().splitlines())
    assert (tmp_path / "err").read_text() == ""
