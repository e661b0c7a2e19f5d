"""The wheel, installed into an empty environment, and the first example of the README."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import eventually
from tools import rabbitmq

ROOT = Path(__file__).resolve().parents[2]


def run(*command: object, cwd: Path = ROOT) -> str:
    """Run a command and return its output; fail where it fails."""
    done = subprocess.run(
        [str(each) for each in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT)
    (made,) = folder.glob("*.whl")
    return made


def test_the_wheel_is_the_same_every_time(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, ROOT)
    (again,) = tmp_path.glob("*.whl")
    assert again.read_bytes() == wheel.read_bytes()


def test_the_wheel_has_the_package_its_types_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        text = archive.read(metadata).decode()
    assert "celery_amqp_results/py.typed" in names
    assert {name.partition("/")[0].split("-")[0] for name in names} == {"celery_amqp_results"}
    assert not any("__pycache__" in name for name in names)
    for link in ("Documentation", "Source", "Issues", "Changelog"):
        assert f"Project-URL: {link}, https://" in text
    # PyPI shows the README beside no other file: relative links lead nowhere there.
    readme = text.partition("\n\n")[2]
    assert not re.findall(r"\]\((?!https?://|#)[^)]*\)", readme)


def test_the_first_example_of_the_readme_runs_in_an_empty_environment(
    wheel: Path, tmp_path: Path, node: rabbitmq.Node
) -> None:
    # Given an environment with the wheel and what it needs
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    run(programs / "python", "-m", "pip", "install", "--quiet", wheel)
    # And the module of the README, on a broker of its own
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.M | re.S)
    module, session = blocks[0], next(block for block in blocks if block.startswith(">>>"))
    url = node.url()
    (tmp_path / "proj.py").write_text(module.replace("amqp://guest:guest@localhost//", url))
    # A comment behind a line is no part of a session.
    lines = [re.sub(r"\s+# .*$", "", line) for line in session.splitlines()]
    (tmp_path / "session.txt").write_text("\n".join(lines) + "\n")
    # When the worker runs, then the session goes as the README shows it
    log = tmp_path / "worker.log"
    with log.open("wb") as output:
        worker = subprocess.Popen(
            [programs / "celery", "-A", "proj", "worker", "--concurrency", "1"],
            cwd=tmp_path,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": ""},
        )
    try:
        eventually(lambda: "celery" in node.ctl("list_queues", "name").split())
        run(programs / "python", "-m", "doctest", "session.txt", cwd=tmp_path)
        # And the commands work without any extra
        report = run(programs / "celery", "-A", "proj", "results", "doctor", cwd=tmp_path)
        assert "0 errors" in report
    finally:
        worker.terminate()
        assert worker.wait(60) == 0, log.read_text()
    assert "Traceback" not in log.read_text()
