"""Messages of the package make sense without the repository."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Iterator

import pytest

PACKAGE = Path(__file__).resolve().parent.parent.parent / "celery_amqp_results"


def texts(module: Path) -> Iterator[ast.Constant]:
    """Yield the string constants of a module that are no docstrings."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    statements = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in statements
        ):
            yield node


@pytest.mark.parametrize(
    "module", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_no_message_names_a_file_that_an_installed_package_lacks(module: Path) -> None:
    for node in texts(module):
        text = str(node.value)
        for missing in ("docs/", "examples/", "README", "CONTRIBUTING", "CHANGELOG"):
            assert missing not in text, f"line {node.lineno}: {text}"
