"""The documentation names what there is, and its examples run."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, List

import pytest

from celery_amqp_results import AMQPBackend, errors, options
from celery_amqp_results.metrics import Metrics

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"


def text(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def rows(page: str) -> List[List[str]]:
    """Return the cells of all tables on a page."""
    lines = [line for line in page.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def as_documented(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


def test_settings_names_every_option_with_its_default() -> None:
    documented = {row[0].strip("`"): row for row in rows(text("settings.md")) if len(row) == 4}

    # Given every option, and every entry of the retry policy
    for cls in (options.Options, options.RetryPolicy):
        for field in dataclasses.fields(cls):
            # Then it has a row, and its default where that is a plain value
            assert field.name in documented, field.name
            default = documented[field.name][1]
            if isinstance(field.default, (bool, int, float)):
                assert default in (as_documented(field.default), str(field.default)), field.name
            elif isinstance(field.default, str):
                assert default == f"`{field.default}`", field.name
    known = {field.name for field in dataclasses.fields(options.Options)}
    known |= {field.name for field in dataclasses.fields(options.RetryPolicy)}
    assert {name for name in documented if name.isidentifier()} - {"option", "entry"} == known


def test_monitoring_has_every_metric_and_every_logger() -> None:
    page = text("monitoring.md")
    documented = {row[0].strip("`"): row[1] for row in rows(page) if len(row) == 3}
    fields = {field.name: field.metadata["kind"] for field in dataclasses.fields(Metrics)}
    assert {name: kind for name, kind in documented.items() if name.isidentifier()} == {
        "metric": "kind",
        **fields,
    }
    for module in (ROOT / "celery_amqp_results").rglob("*.py"):
        if "getLogger(__name__)" in module.read_text():
            name = ".".join(module.relative_to(ROOT).with_suffix("").parts)
            assert f"`{name}`" in page, name


def test_troubleshooting_has_a_section_for_every_error() -> None:
    headings = re.findall(r"^## (\S+)$", text("troubleshooting.md"), re.MULTILINE)
    assert set(errors.__all__) <= set(headings)


def test_the_reference_names_only_what_there_is() -> None:
    page = text("reference.md")
    names = set()
    for row in rows(page[page.index("## `AMQPBackend`") :]):
        for code in re.findall(r"`([^`]+)`", row[0]):
            names.add(code.partition("(")[0])
    assert len(names) > 30
    app = celery_app()
    for name in names:
        assert hasattr(app.backend, name), name


def celery_app() -> Any:
    from celery import Celery

    app = Celery("docs", broker="memory://localhost", backend="amqp://", set_as_current=False)
    assert isinstance(app.backend, AMQPBackend)
    return app


@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md"])
def test_examples_are_python(name: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.M | re.S)
    assert blocks
    for block in blocks:
        if not block.startswith(">>>"):
            ast.parse(block)


def test_the_example_for_tests_without_a_broker_runs(tmp_path: Path) -> None:
    (block,) = [
        block
        for block in re.findall(r"^```python\n(.*?)^```", text("quickstart.md"), re.M | re.S)
        if "memory://" in block
    ]
    example = tmp_path / "example.py"
    example.write_text(block)
    done = subprocess.run(
        [sys.executable, str(example)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_links_between_pages_lead_somewhere() -> None:
    for page in (*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
