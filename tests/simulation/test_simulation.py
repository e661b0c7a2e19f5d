"""The table of tasks and shards in several processes, with everything in any order."""

from __future__ import annotations

import os

import pytest

from celery_amqp_results.feed.table import Table
from tests.simulation.model import Broken, Simulation, run_many

#: `make simulate` runs more, and `make mutants` fewer.
SEEDS = int(os.environ.get("SIMULATION_SEEDS", "100"))


def test_no_answer_is_wrong_in_any_order_of_events() -> None:
    runs = list(run_many(0, SEEDS))
    # The runs are about memory, and not only about look-ups.
    assert sum(run.remembered for run in runs) > sum(run.answered for run in runs) / 20
    assert sum(run.unproved for run in runs) > 0


def test_the_same_seed_gives_the_same_run() -> None:
    assert Simulation(7).run().schedule == Simulation(7).run().schedule


# These seeds find the faults soon; others do as well.
@pytest.mark.parametrize(
    ("fault", "first"),
    [("bindings are relied on at once", 98), ("pushes are lost", 12), ("a proof never ends", 190)],
)
def test_the_simulation_finds_faults(
    monkeypatch: pytest.MonkeyPatch, fault: str, first: int
) -> None:
    if fault == "pushes are lost":
        pushed = Table.pushed
        monkeypatch.setattr(
            Table, "pushed",
            lambda self, state, now: None if state.published % 7 == 0 else pushed(self, state, now),
        )  # fmt: skip
    elif fault == "a proof never ends":
        monkeypatch.setattr(Table, "is_proved", lambda self, now: bool(self.epoch))
    else:
        monkeypatch.setattr("celery_amqp_results.feed.views.STEADY", 0.0)
    with pytest.raises(Broken, match="seed"):
        for _ in run_many(first, 5 * SEEDS):
            pass
