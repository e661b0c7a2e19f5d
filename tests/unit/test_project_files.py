"""Workflows call the make targets that there are, and project files agree."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Dict, Iterator

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))

yaml = pytest.importorskip("yaml")


def steps_of(workflow: Dict[str, Any]) -> Iterator[Dict[str, Any]]:
    for job in workflow["jobs"].values():
        yield from job["steps"]


def targets() -> Dict[str, str]:
    """Return the documented targets of the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    return dict(re.findall(r"^([a-z-]+):.*?## (.+)$", makefile, re.MULTILINE))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_targets_that_exist(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    called = [
        name
        for step in steps_of(workflow)
        for name in re.findall(r"(?:^|\s)make ([a-z-]+)", step.get("run", ""))
    ]
    assert called
    assert set(called) <= targets().keys()
    # Least rights, and no action without a version
    assert workflow["permissions"] == {"contents": "read"}
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())
    for step in steps_of(workflow):
        assert "uses" not in step or re.search(r"@(v\d|release/v\d)", step["uses"])


def test_the_workflows_run_everything_that_ci_runs() -> None:
    tests = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    called = " ".join(step.get("run", "") for step in steps_of(tests))
    steps = re.findall(r"^step ([a-z-]+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    # The newest Python is one of the matrix.
    for name in set(steps) - {"test-newest-python"}:
        assert f"make {name}" in called, name


def test_the_release_uses_no_token() -> None:
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    release = yaml.safe_load(text)
    assert release["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    assert "secrets." not in text
    assert "password" not in text


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_templates_are_forms(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert {"name", "description", "body"} <= form.keys()
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids))
    for field in form["body"]:
        assert field["type"] in ("input", "textarea", "dropdown", "checkboxes", "markdown")
        assert field["attributes"]["label"]


def test_the_development_container_makes_what_there_is() -> None:
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    made = re.findall(r"\.venv/\.(\w+)", container["postCreateCommand"])
    extras = (ROOT / "pyproject.toml").read_text()
    assert made
    for extra in made:
        assert re.search(rf"^{extra} = \[", extras, re.MULTILINE), extra


def test_the_compose_file_has_what_its_services_need() -> None:
    compose = yaml.safe_load((ROOT / "examples" / "compose" / "compose.yaml").read_text())
    services = compose["services"]
    for service in services.values():
        assert ("image" in service) != ("build" in service)
        for needed, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"}
            assert "healthcheck" in services[needed]
        for port in service.get("ports", ()):
            # Nothing is open to other machines, since the password is the default one.
            assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)
    named = {volume.split(":")[0] for s in services.values() for volume in s.get("volumes", ())}
    assert named == compose["volumes"].keys()


def test_the_image_of_the_compose_file_installs_what_there_is() -> None:
    dockerfile = (ROOT / "examples" / "compose" / "Dockerfile").read_text()
    extras = (ROOT / "pyproject.toml").read_text()
    (named,) = re.findall(r'"\.\[(\w+)\]"', dockerfile)
    assert re.search(rf"^{named} = \[", extras, re.MULTILINE)
    # The versions of the web server are those that the tests install
    for requirement in re.findall(r'"([a-z]+>=[\d.]+)"', dockerfile):
        assert f'"{requirement}"' in extras, requirement


def test_the_documentation_names_every_extra() -> None:
    page = (ROOT / "docs" / "reference.md").read_text()
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    for name in re.findall(r"^(\w+) = \[", extras.partition("[tool.")[0], re.MULTILINE):
        assert f"`{name}`" in page, name


def test_relative_links_in_project_files_lead_somewhere() -> None:
    for page in (ROOT / "SECURITY.md", ROOT / "SUPPORT.md"):
        text = page.read_text()
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (ROOT / target).exists(), target
        for target in re.findall(r"`(docs/[^`]+)`", text):
            assert (ROOT / target).exists(), target
