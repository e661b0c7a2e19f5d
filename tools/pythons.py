"""Finds the Python interpreters of this machine, for the Makefile. Standard library only.

python tools/pythons.py check     whether this interpreter can create a virtual environment
python tools/pythons.py oldest    path of the oldest supported interpreter on this machine
python tools/pythons.py newest    path of the newest one
python tools/pythons.py 3.9       path of that version
python tools/pythons.py pairs     pairs of Python and Celery to test, such as 3.9-5.3, one a line
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
import sys
from typing import Dict, Iterable, Iterator, List, Tuple

#: The oldest version that the project supports.
OLDEST = (3, 9)

Version = Tuple[int, int]

#: The first and the last Python on which each version of Celery is tested. Celery 5.3 uses what
#: Python 3.12 warns about, and in the tests a warning is an error. Celery 5.7 does not install on
#: Python 3.9.
CELERIES = {
    "5.3": ((3, 9), (3, 11)),
    "5.4": ((3, 9), (3, 13)),
    "5.5": ((3, 9), (3, 13)),
    "5.6": ((3, 9), (3, 13)),
    "5.7": ((3, 10), (3, 13)),
}


def check() -> int:
    """Report what a virtual environment would need; return an exit code."""
    if sys.version_info < OLDEST:
        print(f"Python {OLDEST[0]}.{OLDEST[1]} or newer is needed, {sys.version}", file=sys.stderr)
        return 2
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        print(
            "This Python cannot make virtual environments. On Debian and Ubuntu run:\n"
            "    sudo apt-get install python3-venv",
            file=sys.stderr,
        )
        return 2
    return 0


def _candidates() -> Iterator[str]:
    yield sys.executable
    for minor in range(OLDEST[1], 30):
        found = shutil.which(f"python3.{minor}")
        if found:
            yield found
    # pyenv's python3.x on the PATH works only for the selected versions.
    root = os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
    yield from sorted(glob.glob(os.path.join(root, "versions", "*", "bin", "python3")))


def supported() -> Dict[Version, str]:
    """Return the supported interpreters that work and can create virtual environments."""
    found: Dict[Version, str] = {}
    for path in _candidates():
        done = subprocess.run(
            [path, "-c", "import ensurepip, ssl, venv, sys; print(*sys.version_info[:2])"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=False,
        )
        match = re.fullmatch(rb"(\d+) (\d+)\s*", done.stdout)
        if done.returncode == 0 and match:
            version = (int(match.group(1)), int(match.group(2)))
            if version >= OLDEST:
                found.setdefault(version, path)
    return found


def main(what: str) -> int:
    """Run the command line."""
    if what == "check":
        return check()
    found = supported()
    if not found:
        return check() or 2
    if what == "pairs":
        print("\n".join(pairs(found)))
        return 0
    named = {f"{major}.{minor}": path for (major, minor), path in found.items()}
    path = named.get(what) or (found[min(found) if what == "oldest" else max(found)])
    if what[0].isdigit() and what not in named:
        print(f"Python {what} is not here; these are: {', '.join(named)}", file=sys.stderr)
        return 2
    print(path)
    return 0


def pairs(found: Iterable[Version]) -> List[str]:
    """Return the supported pairs of Python and Celery for which there is an interpreter."""
    return [
        f"{version[0]}.{version[1]}-{celery}"
        for version in sorted(found)
        for celery, (first, last) in CELERIES.items()
        if first <= version <= last
    ]


if __name__ == "__main__":
    if len(sys.argv) != 2 or not re.fullmatch(r"check|oldest|newest|pairs|\d\.\d+", sys.argv[1]):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
