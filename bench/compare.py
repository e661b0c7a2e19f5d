"""The regression check: ratios to the other peers now, beside those of a recorded run.

Absolute times are never compared: they are those of a machine and of its load. The peers are
measured in the same run, round by round beside us, and a machine that is slow today is slow for
all of them.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import Iterator, List

from bench.figures import OURS, Run, ratios

__all__ = ("TOLERANCE", "Change", "changes", "regressions")

#: A ratio is worse when it is less than this part of the recorded one.
TOLERANCE = 0.7


@dataclasses.dataclass(frozen=True)
class Change:
    """A ratio to a peer, recorded and now; above 1 means that we are better than the peer."""

    name: str
    title: str
    ours: str
    peer: str
    recorded: List[float]
    now: List[float]

    @property
    def factor(self) -> float:
        """The ratio of now, in terms of the recorded one; below 1 is worse."""
        return statistics.median(self.now) / statistics.median(self.recorded)

    def worse(self, tolerance: float = TOLERANCE) -> bool:
        """Return whether it became worse than noise explains.

        The median has to be below *tolerance* times the recorded one, and every round of now below
        the worst round that was recorded.
        """
        return self.factor < tolerance and max(self.now) < min(self.recorded)


def changes(recorded: Run, now: Run) -> Iterator[Change]:
    """Yield the ratios that are in both runs.

    Of each row, every variant of this backend (``amqp``, ``amqp, ...``) is put beside every other
    peer. If the machine was busy with other things in one of the runs, only processor time is
    compared: by the clock, a peer that waits more often then loses more than others.
    """
    busy = recorded.busy or now.busy
    for row in now.rows:
        old = recorded.row(row.name)
        if old is None or row.absolute:
            continue
        if row.of_clock and (busy or old.busy or row.busy):
            continue
        common = [peer for peer in row.figures if peer in old.figures]
        for ours in filter(_is_ours, common):
            for peer in common:
                if _is_ours(peer):
                    continue
                before, after = ratios(old, ours, peer), ratios(row, ours, peer)
                if before and after:
                    yield Change(row.name, row.title, ours, peer, before, after)


def regressions(recorded: Run, now: Run, tolerance: float = TOLERANCE) -> List[Change]:
    """Return the ratios that became worse, the worst first."""
    worse = [change for change in changes(recorded, now) if change.worse(tolerance)]
    return sorted(worse, key=lambda change: change.factor)


def _is_ours(peer: str) -> bool:
    # The layout per-task is measured as one of the others: its price is that of its layout.
    return peer == OURS or (peer.startswith(f"{OURS}, ") and "per-task" not in peer)
