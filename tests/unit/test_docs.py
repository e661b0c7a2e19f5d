"""The documentation names only what exists, and its examples run."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, List, Set

import pytest

from celery_amqp_results import AMQPBackend, errors, options
from celery_amqp_results.metrics import Metrics

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


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
            # Then it has a row, with its default if that is a plain value
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


def test_the_reference_names_only_existing_things() -> None:
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


def python_blocks(page: Path) -> List[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_are_python(page: Path) -> None:
    for block in python_blocks(page):
        if not block.startswith(">>>"):
            # Code inside a coroutine is shown without its "async def".
            compile(block, str(page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)


def test_the_example_for_tests_without_a_broker_runs(tmp_path: Path) -> None:
    (block,) = [
        block for block in python_blocks(DOCS / "guides" / "testing.md") if "memory://" in block
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


def anchors(page: Path) -> Set[str]:
    """Return the anchors of a page's headings, as MkDocs and GitHub make them."""
    outside_code = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found: Set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", outside_code, re.M):
        plain = re.sub(r"[^\w\s-]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading))
        slug = re.sub(r"[\s-]+", "-", plain.strip().lower())
        found.add(slug if slug not in found else f"{slug}_1")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_work(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#: ]*)(?:#([^) ]*))?\)", text):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(path), f"{page.name} links to {target}#{anchor}"


def test_included_files_are_marked_as_mkdocs_expects() -> None:
    # Formatters turn the marker into an expression, and the page then shows the marker.
    for page in DOCS.rglob("*.md"):
        for line in page.read_text(encoding="utf-8").splitlines():
            if re.match(r"\W*8\s*<", line):
                included = re.fullmatch(r'--8<-- "([^"]+)"', line)
                assert included, f"{page.name}: {line}"
                assert (ROOT / included[1]).exists(), f"{page.name}: {line}"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2]
    named = set(re.findall(r": (\S+\.md)$", navigation, re.M))
    assert named == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
