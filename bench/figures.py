"""The figures of a run, their statistics, and the file that keeps them."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

__all__ = ("FORMAT", "LESS", "MORE", "OURS", "Figures", "Row", "Run", "percentile", "ratios")

#: By peer, the figures of the rounds, in the order in which they were measured.
Figures = Dict[str, List[float]]

#: The peer that is this backend with its default options.
OURS = "amqp"

#: What is better of a row.
LESS, MORE = "less", "more"

#: Changes when files of an earlier form cannot be read any more.
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Row:
    """One thing that was measured of some peers."""

    #: Names the measure; the same in all versions of the benchmarks that measure the same.
    key: str
    title: str
    unit: str
    #: :data:`LESS` or :data:`MORE`, whichever is better.
    better: str
    figures: Figures
    #: What plots have on their x axis: the size of a group, or how many results were kept.
    size: Optional[int] = None
    #: Whether a figure says something by itself, and a ratio to another peer nothing.
    absolute: bool = False
    #: Whether the machine had other work, so that figures by the clock say little.
    busy: bool = False

    @property
    def name(self) -> str:
        """The key with the size."""
        return self.key if self.size is None else f"{self.key}.{self.size}"

    @property
    def of_clock(self) -> bool:
        """Whether it was measured by the clock, and not as processor time."""
        return not self.key.endswith((".cpu", ".broker"))

    def medians(self) -> Dict[str, float]:
        """Return the median of each peer."""
        return {peer: statistics.median(values) for peer, values in self.figures.items()}


@dataclasses.dataclass(frozen=True)
class Run:
    """All that was measured at one time, and where."""

    #: Date, versions, size of the machine.
    about: Mapping[str, Any]
    rows: Sequence[Row]

    def row(self, name: str) -> Optional[Row]:
        """Return the row *name*, or ``None``."""
        return next((row for row in self.rows if row.name == name), None)

    @property
    def busy(self) -> bool:
        """Whether the machine had more to do than the benchmarks: the clock says little then."""
        return bool(self.about.get("busy"))

    def to_json(self) -> str:
        """Return the run as text for a file; figures have four digits."""
        rows = [
            dataclasses.asdict(
                dataclasses.replace(
                    row,
                    figures={
                        peer: [float(f"{value:.4g}") for value in values]
                        for peer, values in row.figures.items()
                    },
                )
            )
            for row in self.rows
        ]
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        about = json.dumps(dict(self.about), indent=1).replace("\n", "\n ")
        return f'{{\n "format": {FORMAT},\n "about": {about},\n "rows": [\n{lines}\n ]\n}}\n'

    @classmethod
    def from_json(cls, text: str) -> Run:
        """Return the run that :meth:`to_json` wrote.

        Raises:
            ValueError: when it is something else.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"this is no run of the benchmarks in format {FORMAT}: {text[:60]!r}")
        try:
            return cls(data["about"], [Row(**row) for row in data["rows"]])
        except (KeyError, TypeError) as exc:
            raise ValueError(f"a row of the run is damaged: {exc}") from exc

    @classmethod
    def read(cls, path: Path) -> Run:
        """Return the run in the file *path*.

        Raises:
            OSError: when it cannot be read.
            ValueError: when it is something else.
        """
        return cls.from_json(path.read_text(encoding="utf-8"))


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the least of *values* that *percent* of them do not exceed (nearest rank).

    Raises:
        ValueError: when there are no values, or *percent* is not above 0 and at most 100.
    """
    if not values or not 0 < percent <= 100:
        raise ValueError(f"there is no {percent}th percentile of {len(values)} values")
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


def ratios(row: Row, peer: str, other: str) -> List[float]:
    """Return, round by round, how many times better *peer* was than *other*.

    Rounds alternate, so that the two figures of one round were measured under about the same load:
    their ratio says more than that of two medians.
    """
    pairs = zip(row.figures[peer], row.figures[other])
    if row.better == MORE:
        return [ours / theirs for ours, theirs in pairs if theirs > 0]
    return [theirs / ours for ours, theirs in pairs if ours > 0]
