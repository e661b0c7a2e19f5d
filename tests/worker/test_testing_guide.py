"""The example in docs/guides/testing.md that uses RabbitMQ."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.worker.conftest import ROOT

GUIDE = ROOT / "docs" / "guides" / "testing.md"


def test_the_example_with_rabbitmq_passes(amqp_url: str, tmp_path: Path) -> None:
    (block,) = [
        block
        for block in re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.M | re.S)
        if "pytest.fixture" in block
    ]
    (tmp_path / "test_example.py").write_text(
        block.replace("amqp://guest:guest@localhost//", amqp_url)
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
