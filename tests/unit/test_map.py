"""The map of the code in CONTRIBUTING.md, compared with the tree in both directions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import List, Set

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "celery_amqp_results"


def _first_cells(heading: str) -> List[str]:
    """Return the names in the first column of the table that begins with *heading*."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text[text.index(f"| {heading} |") :].partition("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def _tree() -> Set[str]:
    folders = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.name for path in PACKAGE.glob("*.py")}
    return folders | modules - {"__init__.py"}


def test_the_map_has_every_folder_and_module_once_and_no_other() -> None:
    names = _first_cells("folder or module")
    assert len(names) == len(set(names))
    assert set(names) == _tree()


def test_the_map_has_every_folder_of_tests() -> None:
    folders = {f"tests/{path.parent.name}" for path in (ROOT / "tests").glob("*/__init__.py")}
    assert set(_first_cells("tests")) == folders


def test_the_map_has_the_floors_of_the_linter_in_the_same_order() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    contract = text[text.index('id = "floors"') :].partition("\n]")[0]
    floors = [
        set(re.split(r"\s*\|\s*", floor)) for floor in re.findall(r'^  "([^"]+)",$', contract, re.M)
    ]
    place = {name: number for number, floor in enumerate(floors) for name in floor}
    names = [name.rstrip("/").replace(".py", "") for name in _first_cells("folder or module")]
    assert set(names) == place.keys()
    assert [place[name] for name in names] == sorted(place[name] for name in names)


def test_every_folder_says_what_it_is_for() -> None:
    for path in PACKAGE.glob("*/__init__.py"):
        assert path.read_text().startswith('"""'), path
