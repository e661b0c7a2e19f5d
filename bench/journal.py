"""The verdict on reads by several processes, from the times at which they asked and were answered.

All times are those of the machine's monotonic clock, which its processes share. Nothing here does
I/O or reads a clock.
"""

from __future__ import annotations

import dataclasses
from typing import Dict, Iterable, List, Mapping, Sequence

from bench.figures import percentile

__all__ = ("Poll", "Verdict", "judge")


@dataclasses.dataclass(frozen=True)
class Poll:
    """One question about a task, and whether the answer was the final state."""

    task: int
    asked: float
    answered: float
    final: bool


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The findings about a round of polls."""

    #: Milliseconds of each poll.
    milliseconds: Sequence[float]
    #: Answers without the result although ``store_result`` had returned before the question.
    stale: int
    #: Answers without the result although another poll had seen it before the question.
    back: int

    def percentile(self, percent: float) -> float:
        """Return a percentile of the milliseconds."""
        return percentile(self.milliseconds, percent)


def judge(polls: Iterable[Poll], stored: Mapping[int, float]) -> Verdict:
    """Return the verdict on *polls*.

    Parameters:
        polls: the polls of all processes, in any order.
        stored: by task, when ``store_result`` returned.
    """
    every = sorted(polls, key=lambda poll: poll.asked)
    seen: Dict[int, float] = {}
    for poll in every:
        if poll.final:
            seen[poll.task] = min(poll.answered, seen.get(poll.task, poll.answered))
    missed: List[Poll] = [poll for poll in every if not poll.final]
    never = float("inf")
    return Verdict(
        [(poll.answered - poll.asked) * 1e3 for poll in every],
        sum(poll.asked > stored.get(poll.task, never) for poll in missed),
        sum(poll.asked > seen.get(poll.task, never) for poll in missed),
    )
