"""What a leader knows of one open chord."""

from __future__ import annotations

import math
from typing import Any, List

import pytest

from celery_amqp_results.chords.open_chord import FIRST_RECHECK, LAST_RECHECK, OpenChord
from celery_amqp_results.chords.plan import Amendment, Plan
from tests.unit.fakes import state

NOW = 100.0
BEGAN = 50_000_000


def chord(*results: Any, **options: Any) -> OpenChord:
    return OpenChord(Plan("header", "mark", list(results), BEGAN, **options), 7, NOW)


def test_a_chord_is_complete_when_it_waits_for_nothing() -> None:
    opened = chord("a", "b")
    assert opened.complete
    for waits_for in (opened.missing, opened.unamended, opened.unproven):
        waits_for.add("x")
        assert not opened.complete
        waits_for.clear()
    assert opened.complete
    opened.sending = True
    assert not opened.complete


def test_the_watched_tasks_are_those_that_run_and_those_that_have_ended() -> None:
    opened = chord("a", "b")
    opened.missing.add("a")
    opened.ends["b"] = state("b")
    assert opened.watched == {"a", "b"}


def test_firing_takes_a_copy_of_everything_that_may_change() -> None:
    opened = chord("a", "b")
    opened.ends["a"] = ended = state("a")
    opened.bodiless.add("b")
    opened.failures = 3
    opened.amendments.append(Amendment("header", "x", "a", ["c"]))
    assert not opened.sending
    fire = opened.fire()
    assert opened.sending
    opened.ends.clear()
    opened.bodiless.clear()
    assert fire.plan is opened.plan
    assert fire.results == ["a", "c", "b"]
    assert (fire.ends, fire.bodiless, fire.failures) == ({"a": ended}, {"b"}, 3)


def test_a_state_of_the_body_proves_that_another_leader_has_sent_it() -> None:
    opened = chord("a", proofs=("body", "other"))
    assert not opened.was_sent({})
    assert not opened.was_sent({"body": [], "a": [state("a")]})
    assert opened.was_sent({"other": [state("other", published=BEGAN)]})
    opened.sending = True
    assert not opened.was_sent({"other": [state("other")]})


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(("published", "sent"), [(BEGAN - 1, False), (BEGAN, True)])
def test_a_state_of_the_body_from_before_the_chord_proves_nothing(
    published: int, sent: bool, again: bool
) -> None:
    opened = chord("a", proofs=("body",), again=again)
    assert opened.was_sent({"body": [state("body", published=published)]}) is sent


def test_a_chord_expires_that_long_after_its_latest_end() -> None:
    assert chord("a").seconds_left(BEGAN) == math.inf
    opened = chord("a", expires=4_000)
    assert opened.seconds_left(BEGAN + 1_000_000) == 3.0
    opened.latest += 2_000_000
    assert opened.seconds_left(BEGAN + 1_000_000) == 5.0


def test_a_silent_chord_is_rechecked_with_growing_pauses() -> None:
    opened, now = chord("a"), NOW
    pauses: List[float] = []
    assert (opened.recheck_at, opened.heard_at) == (NOW + FIRST_RECHECK, NOW)
    for _ in range(7):
        pauses.append(opened.recheck_at - now)
        now = opened.recheck_at
        assert opened.recheck(now)
    # The first pause counts twice: nothing is known before the first recheck.
    assert pauses == [15.0, 15.0, 30.0, 60.0, 120.0, 240.0, 300.0]
    assert opened.pause == LAST_RECHECK


def test_a_chord_is_not_read_if_something_was_heard_lately() -> None:
    opened = chord("a")
    opened.heard_at = now = opened.recheck_at
    # The first recheck reads in any case: the plan may have come late.
    assert opened.recheck(now)
    now = opened.recheck_at
    opened.heard_at = now - opened.pause / 2 + 1
    assert not opened.recheck(now)
    now = opened.recheck_at
    opened.heard_at = now - opened.pause / 2
    assert opened.recheck(now)


def test_a_new_chord_has_sent_nothing_and_heard_of_nothing() -> None:
    opened = chord("a")
    assert (opened.sending, opened.failures, opened.latest) == (False, 0, BEGAN)
    assert (opened.timer_at, opened.deliveries) == (math.inf, [7])
