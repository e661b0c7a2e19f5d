"""When a connection counts as dead on which a confirm does not come."""

from __future__ import annotations

from celery_amqp_results.amqp import confirms
from celery_amqp_results.amqp.confirms import Patience

SHORT, LONG = confirms.CONFIRM_TIMEOUT, confirms.LONGEST_CONFIRM


def test_patience_ends_when_the_broker_does_nothing_for_long() -> None:
    patience = Patience(100.0)
    assert not patience.is_over(100.0 + SHORT, False, 0)
    assert patience.is_over(101.0 + SHORT, False, 0)


def test_patience_is_renewed_by_the_confirms_of_others_but_not_for_ever() -> None:
    patience = Patience(0.0)
    confirmed, now = 0, 0.0
    while now < LONG:
        confirmed, now = confirmed + 1, now + SHORT
        assert not patience.is_over(now, False, confirmed)
    assert patience.is_over(now + 1, False, confirmed + 1)


def test_patience_begins_anew_at_the_end_of_an_alarm() -> None:
    patience = Patience(0.0)
    for now in range(0, int(3 * LONG), 100):
        assert not patience.is_over(float(now), True, 0)
    ended = float(now)
    assert not patience.is_over(ended + SHORT, False, 0)
    assert patience.is_over(ended + SHORT + 1, False, 0)
