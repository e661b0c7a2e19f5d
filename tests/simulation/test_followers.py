"""Clients that wait for tasks, with everything in any order."""

from __future__ import annotations

import os

import pytest

from celery_amqp_results.feed.waiter import Waiters
from celery_amqp_results.waiting.followed import FollowedTasks
from tests.simulation.followers import FollowerSimulation, run_followers
from tests.simulation.model import Broken

#: `make simulate` runs more, and `make mutants` fewer.
SEEDS = int(os.environ.get("SIMULATION_SEEDS", "40"))


def test_every_wait_ends_once_with_the_right_state_in_any_order_of_events() -> None:
    runs = list(run_followers(0, SEEDS))
    assert sum(run.ended for run in runs) > 10 * SEEDS


def test_the_same_seed_gives_the_same_run() -> None:
    assert FollowerSimulation(7).run().schedule == FollowerSimulation(7).run().schedule


FAULTS = [
    "a lost connection uncovers no task",
    "pushed states are not held back until the store is read",
]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_simulation_finds_faults(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    if fault == FAULTS[0]:
        monkeypatch.setattr(Waiters, "uncover", lambda self: None)
        monkeypatch.setattr("celery_amqp_results.waiting.rechecks.FIRST_RECHECK", 1e9)
    else:
        arrived = FollowedTasks.arrived

        def at_once(self: FollowedTasks, states: object, now: float) -> None:
            due, self._due = self._due, set()
            arrived(self, states, now)  # type: ignore[arg-type]
            self._due = due

        monkeypatch.setattr(FollowedTasks, "arrived", at_once)
    with pytest.raises(Broken, match="seed"):
        for _ in run_followers(0, 5 * SEEDS):
            pass
