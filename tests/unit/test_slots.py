"""The limit on connections: which users wait, and which idle connections make room."""

from __future__ import annotations

import time

import pytest

from celery_amqp_results import errors
from celery_amqp_results.amqp.slots import Slots


class Idle:
    """An idle connection that may be closed."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self.asked = 0
        slots.take("lookups")
        slots.add_giver(self.give_up_idle)

    def give_up_idle(self) -> bool:
        self.asked += 1
        if self.asked == 1:
            self._slots.give_back("lookups")
        return self.asked == 1


def soon() -> float:
    return time.monotonic() + 0.05


def test_an_idle_connection_is_closed_for_one_that_is_needed() -> None:
    slots = Slots(1)
    idle = Idle(slots)
    slots.take("publish", soon())
    assert idle.asked == 1


def test_no_connection_is_closed_for_a_wait_that_only_the_end_of_a_watch_can_end() -> None:
    slots = Slots(3)
    slots.take("inbox")
    slots.take("watch")
    idle = Idle(slots)
    with pytest.raises(errors.BackendUnavailable, match="broker_pool_limit is 3"):
        slots.take("watch", soon())
    assert idle.asked == 0
    assert not slots.wanted
    slots.give_back("watch")
    slots.take("watch", soon())
