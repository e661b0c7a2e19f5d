"""``make simulate SEEDS=n``: run many seeds, and print the schedule of the first that fails."""

from __future__ import annotations

import argparse
import sys
import time

from tests.simulation.model import Broken, run_many


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
    except Broken as exc:
        print(exc)
        return 1
    seconds = time.monotonic() - started
    print(
        f"{chosen.seeds:,} seeds in {seconds:.0f} s: {answers:,} answers, "
        f"{remembered:,} of them from memory, all right"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
