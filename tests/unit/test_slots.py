"""The limit on connections: which users wait, and which idle connections make room."""

from __future__ import annotations

import time

import pytest

from celery_amqp_results import errors
from celery_amqp_results.amqp.slots import Slot, Slots
from tests import interrupts


class Idle:
    """An idle connection that may be closed."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self.asked = 0
        self.open()
        slots.add_giver(self.give_up_idle)

    def open(self) -> None:
        self._slot = Slot("lookups")
        self._slots.take(self._slot)

    def give_up_idle(self) -> bool:
        self.asked += 1
        was_open = self._slot.taken
        self._slots.give_back(self._slot)
        return was_open


def soon() -> float:
    return time.monotonic() + 0.05


def test_an_idle_connection_is_closed_for_one_that_is_needed() -> None:
    slots = Slots(1)
    idle = Idle(slots)
    slots.take(Slot("publish"), soon())
    assert idle.asked == 1


def test_no_connection_is_closed_for_a_wait_that_only_the_end_of_a_watch_can_end() -> None:
    slots = Slots(3)
    slots.take(Slot("inbox"))
    watch = Slot("watch")
    slots.take(watch)
    idle = Idle(slots)
    with pytest.raises(errors.BackendUnavailable, match="broker_pool_limit is 3"):
        slots.take(Slot("watch"), soon())
    assert idle.asked == 0
    assert not slots.wanted
    slots.give_back(watch)
    slots.take(Slot("watch"), soon())


@pytest.mark.parametrize("waits", [False, True])
def test_a_caller_that_is_interrupted_at_any_line_keeps_no_place(waits: bool) -> None:
    slots = Slots(1)
    idle = Idle(slots)

    def take() -> None:
        slot = Slot("publish")
        try:
            slots.take(slot, soon())
        finally:
            slots.give_back(slot)

    lines = []
    if not waits:
        idle.give_up_idle()
    for line in interrupts.at_each_line(Slots.take, take):
        # Then another caller gets one at once
        idle.give_up_idle()
        take()
        lines.append(line)
        if waits:
            idle.open()
    assert len(lines) >= 4


def test_a_place_is_given_back_once() -> None:
    slots, first, second = Slots(1), Slot("publish"), Slot("publish")
    slots.take(first)
    slots.give_back(first)
    slots.take(second)
    slots.give_back(first)
    with pytest.raises(errors.BackendUnavailable):
        slots.take(Slot("publish"), soon())
