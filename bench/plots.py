"""Plots of a run as SVG files, drawn by matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Collection, Dict, Iterator, List, Optional, Tuple

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot

from bench.drawn import BARS, LINES, lines_of, names, stamp
from bench.figures import OURS, Row, Run

__all__ = ("draw",)

#: Each peer has the same colour in all plots of a page.
COLOURS = {
    OURS: "#e8590c",
    "amqp, confirm=False": "#ffa94d",
    "amqp, transient": "#74c0fc",
    "amqp, per-task": "#b197fc",
    "amqp, quorum": "#f08c00",
    "amqp, tuned broker": "#94d82d",
    "rpc": "#4dabf7",
    "redis": "#e03131",
    "redis, lasting": "#a51111",
    "celery-amqp-backend": "#845ef7",
    "ignored": "#868e96",
}
OTHER = "#adb5bd"


def draw(run: Run, folder: Path, only: Optional[Collection[str]] = None) -> Iterator[Path]:
    """Write the plots of *run* into *folder*, or those named in *only*, and yield their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    style: Any = {
        "svg.fonttype": "none",
        # The same run gives the same file.
        "svg.hashsalt": "bench",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with pyplot.rc_context(style):
        for name in names(run):
            if only is None or name in only:
                yield _save(_figure(run, name), run, name, folder)


def _figure(run: Run, name: str) -> Any:
    row = run.row(BARS.get(name, ""))
    if row is not None:
        return _bars(row)
    title, axis, _ = LINES[name]
    return _lines(title, axis, lines_of(run, name))


def _bars(row: Row) -> Any:
    medians = row.medians()
    peers = list(reversed(list(medians)))
    figure, axes = pyplot.subplots(figsize=(7, 0.4 * len(peers) + 1.1))
    values = [medians[peer] for peer in peers]
    below = [medians[peer] - min(row.figures[peer]) for peer in peers]
    above = [max(row.figures[peer]) - medians[peer] for peer in peers]
    axes.barh(
        peers,
        values,
        xerr=[below, above],
        color=[COLOURS.get(peer, OTHER) for peer in peers],
        error_kw={"ecolor": "#495057", "elinewidth": 1},
    )
    axes.set_xlabel(row.unit.replace("/s", "per second") + f" ({row.better} is better)")
    axes.set_title(row.title[:1].upper() + row.title[1:], loc="left")
    return figure


def _lines(title: str, axis: str, rows: List[Tuple[Row, str]]) -> Any:
    figure, axes = pyplot.subplots(figsize=(7, 3.4))
    lines: Dict[Tuple[str, str], List[Tuple[int, float, float, float]]] = {}
    for row, label in rows:
        for peer, median in row.medians().items():
            values = row.figures[peer]
            point = (row.size or 0, median, min(values), max(values))
            lines.setdefault((peer, label), []).append(point)
    for (peer, label), points in lines.items():
        points.sort()
        sizes = [point[0] for point in points]
        axes.errorbar(
            sizes,
            [point[1] for point in points],
            yerr=[[p[1] - p[2] for p in points], [p[3] - p[1] for p in points]],
            label=f"{peer}, {label}" if label else peer,
            color=COLOURS.get(peer, OTHER),
            linestyle="--" if label == "unknown id" else "-",
            marker="o",
            markersize=4,
            capsize=2,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(axis)
    first = rows[0][0]
    axes.set_ylabel(first.unit.replace("/s", "per second") + f" ({first.better} is better)")
    axes.grid(True, which="major", color="#dee2e6", linewidth=0.6)
    axes.legend(frameon=False)
    axes.set_title(title, loc="left")
    return figure


def _save(figure: Any, run: Run, name: str, folder: Path) -> Path:
    path = folder / f"bench-{name}.svg"
    about = run.about
    figure.text(
        0.99,
        0.01,
        f"RabbitMQ {about['rabbitmq']}, Celery {about['celery']}, {about['cores']} cores, "
        f"{about['date']}; median, least and largest of the rounds",
        ha="right",
        fontsize=6,
        color="#868e96",
    )
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    # A test compares the stamp with the recorded run.
    metadata = {"Date": None, "Creator": None, "Description": f"figures {stamp(run, name)}"}
    figure.savefig(path, metadata=metadata, transparent=False)
    pyplot.close(figure)
    return path
