"""What packing writes and what it replaces, without a broker."""

from __future__ import annotations

import dataclasses
from typing import List, Optional

from celery import states

from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.store.packing import Packing, damaged_in

#: Larger than all states together.
LARGE = 1_000_000
#: Microseconds since 1970.
NOW = 1_000


def ended(
    task_id: str, state: str = states.SUCCESS, body: bytes = b"{}", queue: Optional[str] = None
) -> StateMessage:
    """Return a final state that does not expire."""
    return StateMessage(task_id, state, 1, body, "application/json", "utf-8", body_queue=queue)


def pack(packing: Packing) -> List[List[StateMessage]]:
    """Write all pages; return their contents."""
    pages = []
    for content in packing.pages(LARGE):
        packing.wrote(content)
        pages.append(content)
    return pages


def test_of_two_equal_copies_one_is_dropped_and_the_other_replaced_once_its_page_is_written() -> (
    None
):
    state = ended("a")
    packing = Packing({1: [state], 2: [dataclasses.replace(state)]}, set(), NOW)
    assert packing.size == 2
    assert len(packing.replaced()) == 1
    assert pack(packing) == [[state]]
    assert packing.replaced() == [1, 2]
    assert packing.settled == 2


def test_a_message_is_replaced_when_the_page_with_its_last_state_is_written() -> None:
    a, b, c = ended("a"), ended("b"), ended("c")
    packing = Packing({1: [a, c], 2: [b]}, set(), NOW)
    first, second, third = packing.pages(1)
    for content in (first, second):
        assert not packing.is_last(content)
        packing.wrote(content)
    assert packing.replaced() == [1]
    assert packing.is_last(third)
    packing.wrote(third)
    assert packing.replaced() == [1, 2]


def test_a_message_with_a_damaged_state_stays() -> None:
    damaged, whole = ended("a", states.FAILURE), ended("a")
    found = damaged_in([damaged, whole, ended("b")], lambda several: [whole])
    assert found == {damaged}
    packing = Packing({1: [damaged, ended("b")], 2: [whole]}, found, NOW)
    pack(packing)
    assert packing.replaced() == [2]


def test_the_queue_of_a_dropped_pointer_is_deleted_unless_another_pointer_names_it() -> None:
    older, newer = (
        dataclasses.replace(ended("a", queue="q1"), state=states.FAILURE),
        ended("a", queue="q2"),
    )
    packing = Packing({1: [older], 2: [newer]}, set(), NOW)
    pack(packing)
    assert packing.orphans(packing.replaced()) == {"q1"}
    assert packing.orphans([2]) == set()
    again = ended("b", queue="q1")
    packing = Packing({1: [older], 2: [newer], 3: [again]}, set(), NOW)
    pack(packing)
    assert packing.orphans(packing.replaced()) == set()
