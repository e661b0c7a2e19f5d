"""Pages return the packed states, find requested ones, and drop only superseded ones."""

from __future__ import annotations

from typing import Any, List, Set

import pytest
from celery import states
from hypothesis import given
from hypothesis import strategies as st

from celery_amqp_results import errors
from celery_amqp_results.protocol import expiry, page
from celery_amqp_results.protocol.message import GROUP, STATE, StateMessage
from celery_amqp_results.protocol.ranking import fold, is_final

# Few ids, so that several states share one.
ids = st.sampled_from(["a", "b", "c.d#*", "ü \ud800", "x" * 1000]) | st.text(min_size=1)
state_messages = st.builds(
    StateMessage,
    id=ids,
    state=st.sampled_from([*states.ALL_STATES, "PROGRESS", "ABORTED"]),
    published=st.integers(0, 2**62),
    body=st.binary(max_size=80),
    content_type=st.sampled_from(["application/json", "application/x-python-serialize"]),
    content_encoding=st.sampled_from(["utf-8", "binary"]),
    compression=st.none() | st.just("application/x-gzip"),
    expiration=st.none() | st.integers(1, 2**31),
    kind=st.sampled_from([STATE, GROUP]),
)
lists = st.lists(state_messages, max_size=12)


@given(lists)
def test_packed_states_are_restored(given_states: List[StateMessage]) -> None:
    assert page.decode(page.encode(given_states)) == given_states


@given(lists, ids)
def test_find_returns_all_states_of_an_id_and_no_others(
    given_states: List[StateMessage], wanted: str
) -> None:
    found = list(page.find(page.encode(given_states), [wanted]))
    assert found == [state for state in given_states if state.id == wanted]


@pytest.mark.parametrize("others", [0, 2 * page.MANY])
@given(lists, st.sets(ids))
def test_finding_many_ids_equals_finding_each(
    others: int, given_states: List[StateMessage], wanted: Set[str]
) -> None:
    encoded = page.encode(given_states)
    wanted_ids = page.Wanted([*wanted, *(f"no such task {number}" for number in range(others))])
    for _ in range(2):
        found = list(page.find(encoded, wanted_ids))
        assert len(found) == sum(state.id in wanted for state in given_states)
        for one in wanted:
            assert [s for s in found if s.id == one] == [s for s in given_states if s.id == one]


@given(st.binary(max_size=200) | lists.map(page.encode), st.data())
def test_a_damaged_page_is_foreign_without_other_errors(octets: bytes, data: Any) -> None:
    if octets:
        at = data.draw(st.integers(0, len(octets) - 1))
        octets = octets[:at] + data.draw(st.binary(max_size=3)) + octets[at + 1 :]
    try:
        for state in page.decode(octets):
            assert isinstance(state, StateMessage)
    except errors.ForeignMessage:
        pass


@given(lists, st.integers(0, 2**62))
def test_selecting_keeps_the_current_state(given_states: List[StateMessage], now: int) -> None:
    kept, dropped = page.select(enumerate(given_states), now)
    keep, drop = [s for _, s in kept], [s for _, s in dropped]
    gone = {place for place, _ in dropped}
    rest = [s for place, s in enumerate(given_states) if place not in gone]
    for kind in (STATE, GROUP):
        for task_id in {s.id for s in given_states}:
            before = fold(s for s in given_states if (s.kind, s.id) == (kind, task_id))
            after = fold(s for s in rest if (s.kind, s.id) == (kind, task_id))
            if before is not None and not before.expired(now):
                assert after == before
    # Unfinished tasks are neither packed nor dropped before they expire, since a watcher may want
    # their history.
    for state in (*keep, *(s for s in drop if not s.expired(now))):
        current = fold(s for s in given_states if (s.kind, s.id) == (state.kind, state.id))
        assert current is not None
        assert state.kind == GROUP or is_final(current.state)


@given(st.lists(state_messages, min_size=1, max_size=12), st.integers(0, 2**62))
def test_a_page_does_not_expire_before_its_states(
    given_states: List[StateMessage], now: int
) -> None:
    milliseconds = page.expiration(given_states, now)
    if milliseconds is None:
        assert any(state.expiration is None for state in given_states)
    else:
        # RabbitMQ accepts no more; a state from the far future has no date in a shard.
        longest = milliseconds == expiry.MAX_MILLISECONDS
        assert longest or all(state.expired(now + milliseconds * 1000) for state in given_states)


def test_a_page_with_an_impossible_size_is_foreign() -> None:
    octets = bytearray(page.encode([]))
    octets[8:12] = b"\xff\xff\xff\xff"
    with pytest.raises(errors.ForeignMessage, match="4294967295 entries"):
        page.decode(bytes(octets))
