"""What packing a shard writes, and which messages that replaces."""

from __future__ import annotations

from typing import Any, List

import pytest
from celery import states

from celery_amqp_results.protocol import page
from celery_amqp_results.protocol.message import GROUP, StateMessage
from celery_amqp_results.store.packing import Packing, damaged_in
from tests.unit.fakes import state

NOW = 1_000_000


def packing(*messages: List[StateMessage]) -> Packing:
    """Return the packing of *messages*, whose tags count from 1."""
    return Packing(dict(enumerate(messages, start=1)), set(), NOW)


def small_page(*contents: StateMessage) -> List[StateMessage]:
    return list(contents)


@pytest.mark.parametrize(("spare", "sizes"), [(0, [2, 2]), (-1, [1, 1, 1, 1]), (169, [2, 2])])
def test_a_page_has_at_most_the_given_size(spare: int, sizes: List[int]) -> None:
    # Two bodies of 10 bytes, and what one entry has besides.
    size = 10 + page.OVERHEAD + 10 + spare
    made = packing(*([state(name, body=b"x" * 10)] for name in "abcd"))
    assert [len(content) for content in made.pages(size)] == sizes


def test_a_state_that_is_larger_than_a_page_has_a_page_of_its_own() -> None:
    first, second = state("a", body=b"x" * 500), state("b", body=b"x" * 500)
    made = packing([first], [second])
    assert list(made.pages(100)) == [[first], [second]]
    assert not made.is_last([first])
    made.wrote([first])
    assert made.is_last([second])


def test_a_page_holds_only_current_states_of_ended_tasks_and_groups() -> None:
    old, new = state("a", states.FAILURE, 1), state("a", states.FAILURE, 2)
    running = state("b", states.STARTED, 1)
    group = state("c", "GROUP", 1, kind=GROUP)
    made = packing([old], [new], [running], [group])
    assert list(made.pages(10_000)) == [[new, group]]
    # The running task's state is neither packed nor dropped.
    assert made.size == 3


def test_a_message_is_replaced_when_every_state_in_it_is_packed_or_dropped() -> None:
    old, new, other = state("a", published=2), state("a", published=1), state("b")
    made = packing([old], small_page(new, other), [state("c", states.STARTED)])
    assert (made.settled, made.replaced()) == (1, [1])
    made.wrote([new])
    assert (made.settled, made.replaced()) == (2, [1])
    made.wrote([other])
    assert (made.settled, made.replaced()) == (3, [1, 2])


def test_of_two_equal_copies_one_is_dropped_and_the_other_is_replaced_by_its_page() -> None:
    made = packing([state("a")], [state("a")])
    assert (made.size, made.settled, len(made.replaced())) == (2, 1, 1)
    made.wrote([state("a")])
    assert (made.settled, made.replaced()) == (2, [1, 2])


def test_states_that_are_not_credible_displace_none() -> None:
    damaged, good = state("a", states.SUCCESS), state("a", states.FAILURE)
    made = Packing({1: [damaged], 2: [good]}, {damaged}, NOW)
    (content,) = made.pages(1000)
    assert content == [good]
    made.wrote(content)
    assert made.replaced() == [2]


def pointer(task_id: str, published: int, queue: str, **fields: Any) -> StateMessage:
    return state(task_id, published=published, body_queue=queue, **fields)


def test_the_queue_of_a_superseded_large_result_is_an_orphan() -> None:
    made = packing([pointer("a", 1, "first")], [pointer("a", 2, "second")], [state("b")])
    assert made.orphans([1, 2, 3]) == {"second"}
    # Its pointer stays in the shard until the next packing.
    assert made.orphans([1, 3]) == set()


def test_a_queue_that_a_kept_pointer_names_is_no_orphan() -> None:
    # The broker has one of the messages twice.
    made = packing([pointer("a", 1, "queue")], [pointer("a", 1, "queue")])
    assert made.orphans([1, 2]) == set()


def test_a_queue_that_expires_is_no_orphan() -> None:
    made = packing(
        [pointer("a", NOW, "first")],
        [pointer("a", NOW + 1, "second", expiration=60_000)],
    )
    assert made.orphans([1, 2]) == set()


def test_a_damaged_final_state_is_left_out_if_it_could_hide_another() -> None:
    damaged, good = state("a", states.SUCCESS), state("a", states.FAILURE)
    running, alone = state("a", states.STARTED), state("b", states.SUCCESS)
    group, other = (state("c", states.SUCCESS, kind=GROUP) for _ in "12")
    asked: List[List[StateMessage]] = []

    def readable(several: List[StateMessage]) -> List[StateMessage]:
        asked.append(several)
        return several[1:]

    known = [damaged, running, alone, group, good, other]
    assert damaged_in(known, readable) == {damaged}
    # Decoding is slow, and a single state hides none.
    assert asked == [[damaged, good]]
