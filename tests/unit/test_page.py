"""Pages return the packed states, find requested ones, and drop only superseded ones."""

from __future__ import annotations

import hashlib
import struct
from typing import Any, List, Set

import pytest
from celery import states
from hypothesis import given
from hypothesis import strategies as st

from celery_amqp_results import errors
from celery_amqp_results.protocol import expiry, page
from celery_amqp_results.protocol.message import GROUP, STATE, StateMessage
from celery_amqp_results.protocol.ranking import fold, is_final
from tests.unit import fakes

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
    with pytest.raises(errors.ForeignMessage) as caught:
        page.decode(bytes(octets))
    assert str(caught.value) == "a page of 12 bytes says that it has 4294967295 entries"


# -- the format --------------------------------------------------------------------------------


def written(*entries: bytes, ids: str = "ab") -> bytes:
    """Return a page with *entries* for the ids "a" and "b", as docs/wire.md describes it."""
    index, offset = b"", 12 + 16 * len(entries)
    for task_id, entry in zip(ids, entries):
        digest = hashlib.blake2b(task_id.encode(), digest_size=8).digest()
        index += digest + struct.pack(">II", offset, len(entry))
        offset += len(entry)
    return b"CARpage1" + struct.pack(">I", len(entries)) + index + b"".join(entries)


def entry(head: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(head)) + head + body


PLAIN = b'{"i":"a","s":"SUCCESS","p":5,"t":"application/json","e":"utf-8"}'
FULL = (
    b'{"i":"b","s":"GROUP","p":6,"t":"application/json","e":"utf-8","c":"application/x-gzip",'
    b'"x":7,"k":"group","q":"queue","a":"mark"}'
)


def test_the_format_of_a_page_has_not_changed() -> None:
    plain = StateMessage("a", "SUCCESS", 5, b"body", "application/json", "utf-8")
    full = StateMessage(
        "b", "GROUP", 6, b"", "application/json", "utf-8", "application/x-gzip", 7, GROUP, "queue",
        "mark",
    )  # fmt: skip
    octets = written(entry(PLAIN, b"body"), entry(FULL))
    assert page.encode([plain, full]) == octets
    assert page.decode(octets) == [plain, full]
    assert page.encode([]) == b"CARpage1\0\0\0\0"
    assert page.decode(page.encode([])) == []


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"\0\0",
        entry(b"{"),
        entry(b"[]"),
        entry(b"{}"),
        entry(b'{"i":"a"}'),
        entry(PLAIN.replace(b"5", b'"5"')),
        entry(PLAIN[:-1] + b',"k":"plan"}'),
        entry(b"[" * 100_000),
    ],
    ids=range(9),
)
def test_a_damaged_entry_is_reported_and_the_others_are_found(damaged: bytes) -> None:
    good = entry(PLAIN.replace(b'"a"', b'"b"'))
    octets = written(damaged, good)
    reported: List[errors.ForeignMessage] = []
    (found,) = page.decode(octets, reported.append)
    assert found.id == "b"
    assert list(page.find(octets, ["a", "b"], reported.append)) == [found]
    assert len(reported) == 2
    for search in (page.decode, lambda octets: list(page.find(octets, ["a"]))):
        with pytest.raises(errors.ForeignMessage, match=r"^(an entry of a page|a field) is "):
            search(octets)
    # The other entry is found without looking at this one.
    assert list(page.find(octets, ["b"])) == [found]


def test_an_entry_that_ends_behind_the_page_is_damaged() -> None:
    octets = written(entry(PLAIN, b"body"), ids="a")
    with pytest.raises(errors.ForeignMessage) as caught:
        page.decode(octets[:-1])
    end = len(octets)
    assert f"an entry ends at {end} of {end - 1} bytes" in str(caught.value)


def test_a_head_that_ends_behind_its_entry_is_damaged() -> None:
    # Otherwise many entries without a length of their own could share one long head.
    octets = written(struct.pack(">I", len(PLAIN)), PLAIN)
    with pytest.raises(errors.ForeignMessage, match=f"a head of {len(PLAIN)} bytes"):
        list(page.find(octets, ["a"]))
    octets = written(entry(PLAIN), ids="a")
    assert page.decode(octets)[0].body == b""


def test_entries_together_cannot_have_more_bytes_than_their_page() -> None:
    one = written(entry(PLAIN, b"x" * 1000), ids="a")
    index, rest = one[12:28], one[28:]
    offset, length = struct.unpack(">II", index[8:])
    copies = [index[:8] + struct.pack(">II", offset + 16, length)] * 2
    octets = one[:8] + struct.pack(">I", 2) + b"".join(copies) + rest
    for search in (page.decode, lambda octets: list(page.find(octets, ["a"]))):
        with pytest.raises(errors.ForeignMessage) as caught:
            search(octets)
        assert str(caught.value) == f"entries of a page of {len(octets)} bytes overlap"


@pytest.mark.parametrize(
    "octets", [b"", b"CARpage1", b"CARpage1\0\0\0", b"CARpage2\0\0\0\0", b"x" * 17]
)
def test_what_does_not_begin_as_a_page_is_foreign(octets: bytes) -> None:
    for search in (page.decode, page.digests, lambda octets: list(page.find(octets, ["a"]))):
        with pytest.raises(errors.ForeignMessage) as caught:
            search(octets)
        assert str(caught.value) == f"a page does not begin as one, but with {octets[:16]!r}"


def test_two_ids_may_have_the_same_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "digest", lambda task_id: b"8 bytes.")
    one, other = fakes.state("a"), fakes.state("b")
    octets = page.encode([one, other])
    assert list(page.find(octets, ["b"])) == [other]
    assert list(page.find(octets, page.Wanted(["a", "b"]))) == [one, other]
    assert list(page.find(octets, ["c"])) == []


def test_only_the_index_of_a_page_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    # The digest of "b" lies everywhere in the body of "a".
    octets = page.encode([fakes.state("a", body=(page.digest("b") + b"1234567") * 16)])
    assert list(page.find(octets, ["b"])) == []
    # And here between two digests of the index.
    between = octets[20:28]
    monkeypatch.setattr(page, "digest", lambda task_id: between)
    assert list(page.find(octets, ["b"])) == []


# -- the content of a shard ----------------------------------------------------------------------


def test_the_digests_of_a_page_are_those_of_its_ids() -> None:
    octets = page.encode([fakes.state(task_id) for task_id in "abc"])
    assert list(page.digests(octets)) == [page.number_of(task_id) for task_id in "abc"]
    assert len({page.number_of(task_id) for task_id in "abc"}) == 3


def test_a_census_has_loose_states_and_the_digests_of_everything_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = 10 + page.OVERHEAD
    monkeypatch.setattr(page, "MAX_CENSUS_BYTES", 2 * size)
    census = page.Census()
    assert (census.loose, census.digests) == ([], set())
    loose = [fakes.state(task_id, body=b"x" * 10) for task_id in "abc"]
    census.add(fakes.state("g", "GROUP", kind=GROUP, body=b"x" * 1000))
    for each in loose:
        census.add(each)
    assert census.loose == loose[:2]
    assert census.digests == {page.number_of("c")}
    census.add_page(page.encode([fakes.state("d"), fakes.state("e")]))
    census.add_page(page.encode([fakes.state("f")]))
    assert census.digests == {page.number_of(task_id) for task_id in "cdef"}


def test_superseded_and_expired_states_are_dropped() -> None:
    now = 10_000_000
    old, current = fakes.state("a", states.FAILURE, 1), fakes.state("a", states.FAILURE, 2)
    expired = fakes.state("b", published=now - 5_000_000, expiration=5_000)
    started = fakes.state("c", states.STARTED, now)
    outdated = fakes.state("c", states.STARTED, now - 5_000_000, expiration=5_000)
    lasting = fakes.state("d", published=now - 5_000_000, expiration=5_001)
    placed = enumerate([old, expired, started, current, outdated, lasting])
    keep, drop = page.select(placed, now)
    assert keep == [(3, current), (5, lasting)]
    assert drop == [(0, old), (1, expired), (4, outdated)]


@pytest.mark.parametrize(
    ("left", "milliseconds"),
    [(-5, 1), (0, 1), (1, 1), (999, 1), (1000, 1), (1001, 2), (5_000_000, 5000)],
)
def test_a_page_expires_in_the_millisecond_in_which_its_last_state_does(
    left: int, milliseconds: int
) -> None:
    now = 50_000_000
    last = fakes.state("a", published=now + left - 3_000_000, expiration=3000)
    first = fakes.state("b", published=0, expiration=3000)
    assert page.expiration([first, last, first], now) == milliseconds
    assert page.expiration([first, last, fakes.state("c")], now) is None
    assert page.expiration([fakes.state("a", published=now, expiration=10**12)], now) == (
        expiry.MAX_MILLISECONDS
    )
