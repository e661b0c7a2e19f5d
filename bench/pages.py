"""Writes recorded figures into the tables of README.md and docs/performance.md.

::

    python -m bench.pages            # update the pages
    python -m bench.pages --check    # fail if a page differs from bench/recorded

A comment in front of a table says where its cells come from::

    <!-- figures: rabbitmq-3.10-full
    columns: amqp | rpc | redis
    rows: store | chord.10
    -->

    | | this | ...

Each row names a row of the recorded run and each column a peer. The first column of the table keeps
its text. With ``peer: amqp`` the columns name rows of the run and the rows name their sizes.
``<!-- about: rabbitmq-3.10-full -->`` marks a line with the date, the versions and the machine.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from pathlib import Path
from typing import Dict, List, Match, Optional, Sequence

from bench.figures import Run
from bench.report import number

__all__ = ("NOT_MEASURED", "PAGES", "TABLE", "cell", "main", "updated")

ROOT = Path(__file__).resolve().parent.parent
RECORDED = ROOT / "bench" / "recorded"
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")

#: Sizes on the pages that were chosen, not measured.
NOT_MEASURED = ("300 bytes",)

#: Units that the first column of a table names.
COUNTS = ("answers", "connections", "queues")

#: A table with its comment.
TABLE = re.compile(
    r"(?P<comment><!-- figures: (?P<run>\S+)\n(?P<fields>[^>]*?)-->\n+)"
    r"(?P<head>\|.*\n\|[-|: ]+\n)(?P<body>(?:\|.*\n)+)"
)
_ABOUT = re.compile(r"(?P<comment><!-- about: (?P<run>\S+) -->\n\n)(?P<line>.*)\n")


def cell(run: Run, name: str, peer: str) -> str:
    """Return the median of a recorded row with its unit, or nothing if *peer* was not measured.

    Raises:
        ValueError: when the run has no row *name*.
    """
    row = run.row(name)
    if row is None:
        raise ValueError(f"the recorded run has no row {name!r}; it is named on a page")
    values = row.figures.get(peer)
    if not values:
        return ""
    value, unit = statistics.median(values), row.unit
    if unit in COUNTS:
        return number(value)
    if unit == "ms" and value >= 1000:
        value, unit = value / 1000, "s"
    return f"{number(value)}{'' if unit.startswith('/') else ' '}{unit}"


def updated(text: str, folder: Path = RECORDED) -> str:
    """Return the text of a page with all figures as they are recorded in *folder*."""

    def load(match: Match[str]) -> Run:
        return Run.read(folder / f"{match['run']}.json")

    def table(match: Match[str]) -> str:
        return match["comment"] + match["head"] + _body(match, load(match))

    def about(match: Match[str]) -> str:
        return f"{match['comment']}{_about(load(match))}\n"

    return _ABOUT.sub(about, TABLE.sub(table, text))


def _body(match: Match[str], run: Run) -> str:
    fields = _fields(match["fields"])
    columns, peer = fields["columns"], fields.get("peer")
    lines = match["body"].splitlines()
    if len(lines) != len(fields["rows"]):
        raise ValueError(f"a table has {len(lines)} rows and names {len(fields['rows'])} of them")
    made = []
    for line, row in zip(lines, fields["rows"]):
        label, *before = [part.strip() for part in line.strip("|").split("|")]
        if peer:
            cells = [cell(run, f"{column}.{row}", peer[0]) for column in columns]
        else:
            cells = [cell(run, row, column) for column in columns]
        # A word such as "refused" stands where nothing was measured; a number may not.
        words = [text if not re.search(r"\d", text) else "" for text in before]
        cells = [text or word for text, word in zip(cells, words)]
        made.append(re.sub(r" +", " ", f"| {' | '.join([label, *cells])} |") + "\n")
    return "".join(made)


def _fields(text: str) -> Dict[str, List[str]]:
    fields = {}
    for line in text.strip().splitlines():
        name, _, value = line.partition(": ")
        fields[name] = [part.strip() for part in value.split(" | ")]
    return fields


def _about(run: Run) -> str:
    about = run.about
    return (
        f"{about['date']}, RabbitMQ {about['rabbitmq']}, Celery {about['celery']}, "
        f"Python {about['python']}, {about['cores']} cores, {about['memory']}."
    )


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.pages", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, fail on differences")
    check = parser.parse_args(arguments).check
    different = []
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = updated(before)
        if after != before:
            different.append(page)
            if not check:
                page.write_text(after, encoding="utf-8")
    for page in different:
        print(
            f"{page.relative_to(ROOT)} {'differs from' if check else 'was updated from'} recorded"
        )
    return 1 if check and different else 0


if __name__ == "__main__":
    sys.exit(main())
