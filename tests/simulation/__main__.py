"""``make simulate SEEDS=n``: run many seeds, and print the schedule of the first that fails."""

from __future__ import annotations

import argparse
import sys
import time

from tests.simulation.chords import run_chords
from tests.simulation.followers import run_followers
from tests.simulation.model import Broken, run_many

#: Runs of chords and of clients take longer than runs of reads, so these shares are run.
CHORDS_SHARE = 4
FOLLOWERS_SHARE = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    chosen = parser.parse_args()
    started, answers, remembered = time.monotonic(), 0, 0
    try:
        for simulation in run_many(chosen.first, chosen.seeds):
            answers += simulation.answered
            remembered += simulation.remembered
        sent = sum(run.sent for run in run_chords(chosen.first, chosen.seeds // CHORDS_SHARE))
        ended = sum(
            run.ended for run in run_followers(chosen.first, chosen.seeds // FOLLOWERS_SHARE)
        )
    except Broken as exc:
        print(exc)
        return 1
    seconds = time.monotonic() - started
    print(
        f"{chosen.seeds:,} seeds in {seconds:.0f} s: {answers:,} answers, "
        f"{remembered:,} of them from memory, all right; "
        f"{sent:,} bodies of chords sent, {ended:,} waits ended"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
