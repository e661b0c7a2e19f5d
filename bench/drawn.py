"""Which rows of a run each plot shows, and a stamp that ties a file to them. No matplotlib here."""

from __future__ import annotations

import hashlib
import json
from typing import Dict, List, Tuple

from bench.figures import Row, Run

__all__ = ("BARS", "LINES", "lines_of", "names", "stamp")

#: Names of files, with the rows that are drawn as bars.
BARS = {
    "store": "store",
    "collect": "collect",
    "roundtrip": "roundtrip",
    "worker": "worker",
    "endtoend": "endtoend",
    "worker8": "worker8",
    "cold": "cold.child",
    "storm": "storm.10",
    "storm-broker": "storm.broker.10",
    "fleet": "fleet.8x50.p50",
    "fleet-broker": "fleet.8x50.broker",
}
#: Names of files, with title, unit, and the rows drawn as lines, over their sizes.
LINES: Dict[str, Tuple[str, str, List[Tuple[str, str]]]] = {
    "chord": ("Chords", "tasks in the chord", [("chord", "")]),
    "join": ("Joins", "results joined", [("join", "")]),
    "lookup": (
        "Look-ups by a process that did not send the task",
        "results kept",
        [("lookup.found", "found"), ("lookup.unknown", "unknown id")],
    ),
    "threads": ("Threads that store at once", "threads", [("storing.threads", "")]),
    "batch": ("Look-ups of 1,000 ids at once", "results kept", [("lookup.batch", "")]),
}


def lines_of(run: Run, name: str) -> List[Tuple[Row, str]]:
    """Return the rows of *run* that the plot *name* draws as lines, with their labels."""
    wanted = LINES[name][2]
    return [(row, label) for key, label in wanted for row in run.rows if row.key == key]


def _rows(run: Run, name: str) -> List[Row]:
    if name in BARS:
        row = run.row(BARS[name])
        return [row] if row else []
    return [row for row, _ in lines_of(run, name)]


def names(run: Run) -> List[str]:
    """Return the names of the plots that *run* has rows for."""
    return [name for name in (*BARS, *LINES) if _rows(run, name)]


def stamp(run: Run, name: str) -> str:
    """Return a text that is the same if, and only if, the plot *name* has the same figures."""
    figures = [(row.name, row.unit, row.figures) for row in _rows(run, name)]
    about = [run.about.get(key) for key in ("date", "rabbitmq", "celery", "cores")]
    return hashlib.sha256(json.dumps([about, figures]).encode()).hexdigest()[:16]
