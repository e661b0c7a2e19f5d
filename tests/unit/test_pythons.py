"""The version matrix of ``make test-matrix``."""

from __future__ import annotations

import sys

from tools import pythons


def test_pairs_are_limited_to_supported_versions() -> None:
    assert pythons.pairs([(3, 9), (3, 13)]) == [
        "3.9-5.3", "3.9-5.4", "3.9-5.5", "3.9-5.6",
        "3.13-5.4", "3.13-5.5", "3.13-5.6", "3.13-5.7",
    ]  # fmt: skip
    assert pythons.pairs([]) == []


def test_interpreters_are_found_by_version() -> None:
    found = pythons.supported()
    assert sys.version_info[:2] in found
    assert all(version >= pythons.OLDEST for version in found)
