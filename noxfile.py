"""Runs the tests on every supported pair of Python and Celery.

    nox --list                                    the pairs
    nox                                           all that this machine has a Python for
    nox -s "tests(python3.9-celery5.3)"           one pair
    nox -t newest -- tests/unit -k fold           marked ones; what follows -- is for pytest
    nox -s oldest                                 the lowest versions of all dependencies

Tags are ``newest`` and ``oldest``, for CI, and one for each Celery, such as ``celery-5.3``. A
RabbitMQ is found as by ``make test``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nox

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tools import pythons

nox.needs_version = ">=2024.4.15"
nox.options.error_on_missing_interpreters = False
nox.options.default_venv_backend = "venv"

PYTHONS = ("3.9", "3.10", "3.11", "3.12", "3.13")

#: For each version of Celery, the first and the last Python that it is tested on. Celery 5.3 uses
#: what Python 3.12 warns of, and in the tests a warning is an error. Celery 5.7 does not install on
#: Python 3.9.
CELERIES = {
    "5.3": ("3.9", "3.11"),
    "5.4": ("3.9", "3.13"),
    "5.5": ("3.9", "3.13"),
    "5.6": ("3.9", "3.13"),
    "5.7": ("3.10", "3.13"),
}

#: Pairs that run in CI: the newest and the oldest of each.
NEWEST = {("3.13", "5.7"), ("3.9", "5.6")}
OLDEST = {("3.9", "5.3"), ("3.11", "5.3")}

# The Pythons of pyenv are on no path, and its stand-ins work for the selected ones alone.
os.environ["PATH"] = os.pathsep.join(
    [str(Path(path).parent) for path in pythons.supported().values()] + [os.environ["PATH"]]
)


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _pairs() -> list[nox.param]:
    found = []
    for python in PYTHONS:
        for celery, (first, last) in CELERIES.items():
            if _number(first) <= _number(python) <= _number(last):
                tags = [f"celery-{celery}"]
                tags += ["newest"] * ((python, celery) in NEWEST)
                tags += ["oldest"] * ((python, celery) in OLDEST)
                name = f"python{python}-celery{celery}"
                found.append(nox.param(python, celery, id=name, tags=tags))
    return found


def _test(session: nox.Session) -> None:
    session.run("python", "-m", "pip", "list")
    # As `make test` does: in several processes, each with a RabbitMQ of its own.
    processes = ("--numprocesses", "4", "--dist", "loadgroup")
    chosen = session.posargs or ["tests/unit", "tests/broker", "tests/worker"]
    session.run("python", "-m", "pytest", *processes, *chosen)


@nox.session
@nox.parametrize(["python", "celery"], _pairs())
def tests(session: nox.Session, celery: str) -> None:
    """All but the fault tests with the last release of one version of Celery."""
    session.install("--editable", ".[test]", f"celery=={celery}.*")
    _test(session)


@nox.session(python="3.9", tags=["oldest"])
def oldest(session: nox.Session) -> None:
    """All but the fault tests with the lowest versions that pyproject.toml allows."""
    session.install("--requirement", "tools/oldest.txt", "--editable", ".[test]")
    _test(session)
