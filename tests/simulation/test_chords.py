"""Leaders of chords in several processes, with everything in any order."""

from __future__ import annotations

import os
from typing import Any

import pytest

from celery_amqp_results.chords.leader import Leader
from celery_amqp_results.chords.open_chord import OpenChord
from tests.simulation.chords import ChordSimulation, run_chords
from tests.simulation.model import Broken

#: `make simulate` runs more, and `make mutants` fewer.
SEEDS = int(os.environ.get("SIMULATION_SEEDS", "200"))


def test_every_chord_is_fired_with_all_its_parts_in_any_order_of_events() -> None:
    runs = list(run_chords(0, SEEDS))
    # Some leaders are killed between sending a body and acknowledging the plan.
    assert any(run.repeated for run in runs)


def test_the_same_seed_gives_the_same_run() -> None:
    assert ChordSimulation(7).run().schedule == ChordSimulation(7).run().schedule


FAULTS = [
    "a state that overtakes its amendment counts",
    "a decision that was lost with the connection stands",
    "an end from before the plan is not remembered",
    "a redelivered plan is not looked up",
]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_simulation_finds_faults(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    if fault == FAULTS[0]:
        complete: Any = property(lambda self: not (self.missing or self.unproven or self.sending))
        monkeypatch.setattr(OpenChord, "complete", complete)
    elif fault == FAULTS[1]:
        lost = Leader.connection_lost
        monkeypatch.setattr(
            Leader,
            "connection_lost",
            lambda self, sending: lost(self, {m for m, c in self._chords.items() if c.sending}),
        )
    elif fault == FAULTS[2]:
        monkeypatch.setattr("celery_amqp_results.chords.pending.Ends.take", lambda self, task: None)
        monkeypatch.setattr("celery_amqp_results.chords.open_chord.LAST_RECHECK", 1e9)
        monkeypatch.setattr("celery_amqp_results.chords.open_chord.FIRST_RECHECK", 1e9)
    else:
        monkeypatch.setattr(Leader, "_doubt", lambda self, chord, redelivered: None)
        monkeypatch.setattr(Leader, "_ask", lambda self, chord: None)
    with pytest.raises(Broken, match="seed"):
        for _ in run_chords(0, 3 * SEEDS):
            pass
