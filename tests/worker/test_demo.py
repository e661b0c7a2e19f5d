"""The demo, as ``make demo`` runs it, but smaller."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

#: Seconds within which the demo finishes even on a busy machine.
PATIENCE = 150


def command(*arguments: str) -> List[str]:
    return [sys.executable, "-m", "demo", "--tasks", "20", "--readers", "2", *arguments]


def environment(tmp_path: Path) -> Dict[str, str]:
    """The environment of the demo's processes; the mark identifies them."""
    return dict(os.environ, TMPDIR=str(tmp_path), DEMO_MARK=uuid.uuid4().hex)


def processes_with(mark: str) -> List[str]:
    """Return the command lines of all processes that have *mark* in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def check_readers(output: str, readers: int) -> None:
    # Every reader has seen the same as the sender, and no pending task.
    lines = re.findall(r"^ +(?:pid|thread) \d.* in 2 rounds .*$", output, re.MULTILINE)
    assert len(lines) == readers, output
    for line in lines:
        assert re.search(r" all the same +0 ", line), line
    assert "DIFFERS" not in output
    assert "All as it should be" in output


def test_the_demo_shows_what_readers_saw_and_cleans_up(
    amqp_url: str, raw: Any, tmp_path: Path
) -> None:
    variables = environment(tmp_path)

    done = subprocess.run(
        command("--broker", amqp_url),
        cwd=ROOT,
        env=variables,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
        text=True,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    check_readers(done.stdout, readers=3)
    # Piped output is plain text, without a terminal's control sequences.
    assert "\x1b" not in done.stdout
    assert processes_with(variables["DEMO_MARK"]) == []
    assert list(tmp_path.iterdir()) == []
    # Everything that it declared is deleted.
    (name,) = set(re.findall(r"celery-results-demo-[0-9a-f]{8}", done.stdout))
    for exchange in (f"{name}.states", f"{name}.tasks"):
        assert not exists(raw, "exchange_declare", exchange)
    for queue in (f"{name}.tasks", *(f"{name}.shard.{n}" for n in range(16))):
        assert not exists(raw, "queue_declare", queue)


def exists(connection: Any, method: str, name: str) -> bool:
    from amqp import NotFound

    channel = connection.channel()
    try:
        arguments = (name, "direct") if method == "exchange_declare" else (name,)
        getattr(channel, method)(*arguments, passive=True)
    except NotFound:
        return False
    channel.close()
    return True


def test_the_demo_runs_without_rabbitmq(tmp_path: Path) -> None:
    variables = environment(tmp_path)

    done = subprocess.run(
        command("--memory"),
        cwd=ROOT,
        env=variables,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
        text=True,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    check_readers(done.stdout, readers=2)
    assert "It cannot show" in done.stdout


@pytest.mark.parametrize(
    "moment", ["celery-amqp-results", "Celery", "  failing", "Reading by id", "What ran"]
)
def test_the_demo_cleans_up_after_ctrl_c(
    moment: str, amqp_url: str, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    # Given a demo that has printed a line that begins with this text
    variables = environment(tmp_path)
    demo = subprocess.Popen(
        command("--broker", amqp_url),
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert demo.stdout is not None
        for line in demo.stdout:
            if line.strip().startswith(moment.strip()):
                break

        # When it is interrupted
        demo.send_signal(signal.SIGINT)
        output, complaints = demo.communicate(timeout=PATIENCE)
    finally:
        demo.kill()
        demo.wait()

    # Then it says so and leaves no process and no folder. Near the end it may finish first.
    assert demo.returncode in ((130,) if moment != "What ran" else (130, 0)), output + complaints
    assert "Traceback" not in complaints
    eventually(lambda: not processes_with(variables["DEMO_MARK"]))
    assert list(tmp_path.iterdir()) == []
