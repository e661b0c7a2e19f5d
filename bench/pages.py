"""Writes recorded figures into the tables of README.md and docs/performance.md, and draws plots.

::

    python -m bench.pages            # update the pages and their plots
    python -m bench.pages --check    # fail if a page or a plot differs from bench/recorded

A comment describes a table, and everything from it to ``<!-- end -->`` is written here::

    <!-- figures: rabbitmq-4.3-full | rabbitmq-3.10-full
    columns: this = amqp | Redis = redis | `rpc://` = rpc
    row: stored in one process = store
    row: chord of 10 = chord.10
    word: rpc chord.10 = refused
    plot: store = Results stored in one process
    text: ### A heading or a paragraph in front of the table
    -->

The first of the runs that has one of the rows fills the table. Rows, columns, plots and texts
without figures are left out. With ``peer: amqp`` the columns name rows of the run, and the rows
name their sizes. ``first:`` is the heading of the first column. ``<!-- about: RUN -->`` marks a
line with the versions and the machine.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Match, NamedTuple, Optional, Sequence, Tuple

from bench.drawn import names, stamp
from bench.figures import Row, Run
from bench.report import number

__all__ = ("BLOCK", "NOT_MEASURED", "PAGES", "RECORDED", "Table", "main", "plots", "updated")

ROOT = Path(__file__).resolve().parent.parent
RECORDED = ROOT / "bench" / "recorded"
PLOTS = ROOT / "docs" / "plots"
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")

#: Sizes on the pages that were chosen, not measured.
NOT_MEASURED = ("300 bytes", "1 MB")

#: Units that the first column of a table names.
COUNTS = ("answers", "connections", "queues")

#: A comment, and what was written for it.
BLOCK = re.compile(
    r"(?P<comment><!-- figures: (?P<runs>[^\n]+)\n(?P<fields>[^>]*?)-->\n)"
    r"(?P<body>.*?)(?P<end><!-- end -->)",
    re.DOTALL,
)
_ABOUT = re.compile(r"(?P<comment><!-- about: (?P<run>\S+) -->\n\n)(?P<line>.*)\n")


class Table(NamedTuple):
    """The contents of a comment."""

    #: Labels and names, in their order.
    columns: Sequence[Tuple[str, str]]
    rows: Sequence[Tuple[str, str]]
    plots: Sequence[Tuple[str, str]]
    #: By peer and row, what stands where nothing was measured.
    words: Dict[str, str]
    #: Paragraphs in front of the table.
    texts: Sequence[str] = ()
    first: str = ""
    peer: Optional[str] = None

    @classmethod
    def read(cls, text: str) -> Table:
        """Return what the lines of a comment say.

        Raises:
            ValueError: when a line is none of those that are described above.
        """
        lists: Dict[str, List[Tuple[str, str]]] = {"columns": [], "row": [], "plot": [], "word": []}
        single: Dict[str, str] = {}
        texts: List[str] = []
        for line in text.strip().splitlines():
            name, found, value = line.partition(": ")
            if found and name in lists:
                lists[name] += [_pair(part) for part in value.split(" | ")]
            elif found and name in ("first", "peer"):
                single[name] = value
            elif name == "text":
                texts.append(value)
            else:
                raise ValueError(f"a comment on a page has a line that is not known: {line!r}")
        plots = [(label, name) for name, label in lists["plot"]]
        words = dict(lists["word"])
        return cls(lists["columns"], lists["row"], plots, words, texts, **single)

    def cells(self, run: Run, row: str) -> List[str]:
        """Return the figures of one row, empty where nothing was measured."""
        if self.peer:
            return [_cell(run.row(f"{name}.{row}"), self.peer) for _, name in self.columns]
        return [_cell(run.row(row), name) for _, name in self.columns]

    def recorded(self, run: Run) -> List[Row]:
        """Return the rows of *run* that the table shows."""
        keys = [f"{name}.{row}" for _, row in self.rows for _, name in self.columns]
        found = [run.row(key) for key in (keys if self.peer else [row for _, row in self.rows])]
        return [row for row in found if row is not None]


def _pair(text: str) -> Tuple[str, str]:
    left, found, right = text.rpartition(" = ")
    if not found:
        raise ValueError(f"a comment on a page says {text!r}, without ' = '")
    return left.strip(), right.strip()


def _cell(row: Optional[Row], peer: str) -> str:
    """Return the median of a row with its unit, or nothing if *peer* was not measured."""
    values = row.figures.get(peer) if row else None
    if row is None or not values:
        return ""
    value, unit = statistics.median(values), row.unit
    if unit in COUNTS:
        return number(value)
    if unit == "ms" and value >= 1000:
        value, unit = value / 1000, "s"
    return f"{number(value)}{'' if unit.startswith('/') else ' '}{unit}"


def updated(text: str, folder: Path = RECORDED) -> str:
    """Return the text of a page with all figures as they are recorded in *folder*."""

    def block(match: Match[str]) -> str:
        table, run = _chosen(match, folder)
        return match["comment"] + (_written(table, run) if run else "") + match["end"]

    def about(match: Match[str]) -> str:
        return f"{match['comment']}{_about(Run.read(folder / (match['run'] + '.json')))}\n"

    return _ABOUT.sub(about, BLOCK.sub(block, text))


def _chosen(match: Match[str], folder: Path) -> Tuple[Table, Optional[Run]]:
    """Return the table of a comment, and the first of its runs that has a figure of it."""
    table = Table.read(match["fields"])
    for name in match["runs"].split(" | "):
        path = folder / f"{name.strip()}.json"
        if path.exists():
            run = Run.read(path)
            if any(any(table.cells(run, row)) for _, row in table.rows):
                return table, run
    return table, None


def _written(table: Table, run: Run) -> str:
    rows = [(label, row, table.cells(run, row)) for label, row in table.rows]
    rows = [(label, row, cells) for label, row, cells in rows if any(cells)]
    shown = [n for n in range(len(table.columns)) if any(cells[n] for _, _, cells in rows)]
    shown += [
        n
        for n, (_, peer) in enumerate(table.columns)
        if n not in shown and any(f"{peer} {row}" in table.words for _, row, _ in rows)
    ]
    shown.sort()
    lines = [""]
    for text in (*table.texts, _caption(table, run)):
        lines += [text, ""]
    lines.append(_line([table.first, *(table.columns[n][0] for n in shown)]))
    lines.append("|---" * (len(shown) + 1) + "|")
    for label, row, cells in rows:
        words = [table.words.get(f"{table.columns[n][1]} {row}", "") for n in shown]
        lines.append(_line([label, *(cells[n] or word for n, word in zip(shown, words))]))
    drawn = names(run)
    for label, name in table.plots:
        if name in drawn:
            lines += ["", f"![{label}](plots/bench-{name}.svg)"]
    return "\n".join([*lines, "", ""])


def _line(cells: Sequence[str]) -> str:
    return re.sub(r" +", " ", f"| {' | '.join(cells)} |")


def _caption(table: Table, run: Run) -> str:
    """Return the version and the dates of the rows of a table."""
    dates = {
        name: part["date"] for part in run.about.get("parts", ()) for name in part.get("rows", ())
    }
    rows = table.recorded(run)
    found = sorted({str(dates.get(row.name, run.about["date"])) for row in rows})
    busy = run.busy or any(row.busy for row in rows)
    end = ", while the machine had other work too" if busy else ""
    return f"RabbitMQ {run.about['rabbitmq']}, {' and '.join(found)}{end}:"


def _about(run: Run) -> str:
    about = run.about
    return (
        f"RabbitMQ {about['rabbitmq']}, Celery {about['celery']}, Python {about['python']}, "
        f"{about['cores']} cores, {about['memory']}."
    )


def plots(text: str, folder: Path = RECORDED) -> Iterator[Tuple[str, Run]]:
    """Yield the name of each plot that a page shows, with the run that it is drawn from."""
    for match in BLOCK.finditer(text):
        table, run = _chosen(match, folder)
        for _, name in table.plots:
            if run is not None and name in names(run):
                yield name, run


def _stale_plots() -> Iterator[Tuple[str, Run]]:
    for page in PAGES:
        for name, run in plots(page.read_text(encoding="utf-8")):
            path = PLOTS / f"bench-{name}.svg"
            if not path.exists() or stamp(run, name) not in path.read_text(encoding="utf-8"):
                yield name, run


def _draw(stale: Sequence[Tuple[str, Run]]) -> None:
    if stale:
        # It needs matplotlib.
        from bench.plots import draw
    for name, run in stale:
        for path in draw(run, PLOTS, only=[name]):
            print(f"drew {path.relative_to(ROOT)}")
    shown = {name for page in PAGES for name, _ in plots(page.read_text(encoding="utf-8"))}
    for path in PLOTS.glob("bench-*.svg"):
        if path.stem[len("bench-") :] not in shown:
            path.unlink()
            print(f"removed {path.relative_to(ROOT)}, which no page shows")


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
            different.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(after, encoding="utf-8")
    stale = list(_stale_plots())
    if check:
        different += [f"docs/plots/bench-{name}.svg" for name, _ in stale]
    else:
        _draw(stale)
    for name in different:
        print(f"{name} {'differs from' if check else 'was updated from'} bench/recorded")
    return 1 if check and different else 0


if __name__ == "__main__":
    sys.exit(main())
