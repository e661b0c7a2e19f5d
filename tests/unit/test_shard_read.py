"""What a look-up and a removal do with each message of a shard, on a model of the queue."""

from __future__ import annotations

import logging
from typing import Any, Collection, Dict, List, Optional
from unittest import mock

import pytest
from amqp.exceptions import AccessRefused
from celery import states

from celery_amqp_results import errors
from celery_amqp_results.amqp.confirm_log import Status
from celery_amqp_results.options import Options
from celery_amqp_results.protocol import clock, page
from celery_amqp_results.protocol.message import GROUP, MAX_AHEAD, STATE, StateMessage
from celery_amqp_results.protocol.names import Topology
from celery_amqp_results.store import checkout, shard_read
from celery_amqp_results.store import lookup as store
from celery_amqp_results.store.shard_read import PACK_AT, LookUp, Removal
from celery_amqp_results.toolkit import retry
from tests.unit.broker_model import Clock, Link, Queue

ONE_SHARD = Topology("x", 1, "classic")


class QueueChannel:
    """A channel on which queues are deleted."""

    def __init__(self, link: ShardLink) -> None:
        self._link = link

    def queue_delete(self, queue: str) -> None:
        if self._link.refuses:
            raise AccessRefused(f"access to queue '{queue}' refused")
        self._link.deleted[queue] = len(self._link.queue.consumers[0].held)

    def close(self) -> None:
        self._link.closed += 1


class ShardLink(Link):
    """A connection that notes which queues were deleted."""

    def __init__(self, queue: Queue) -> None:
        super().__init__(queue, lambda: None)
        self.refuses = False
        #: With the number of messages that the reader held then.
        self.deleted: Dict[str, int] = {}
        self.closed = 0

    def channel(self) -> QueueChannel:
        return QueueChannel(self)


class Shard:
    """One shard, in which every id is kept unless the topology says otherwise."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, topology: Topology = ONE_SHARD, **options: Any
    ) -> None:
        self.clock = Clock()
        for module in (store, checkout, shard_read, clock):
            monkeypatch.setattr(module, "time", self.clock)
        self.queue = Queue(self.clock)
        self.link = ShardLink(self.queue)
        declarations: Any = mock.Mock(topology=topology)
        pool: Any = None
        persistent = options.pop("persistent", True)
        given = Options(**{"page_size": 10_000, **options})
        self.store = store.Store(pool, declarations, given, persistent)
        self.rejected: List[str] = []
        self.store.reject = (  # type: ignore[method-assign]
            lambda where, why: self.rejected.append(f"{where}: {why}")
        )

    def state(self, task_id: str, name: str = "SUCCESS", **fields: Any) -> StateMessage:
        given = {"published": self.clock.now(), "body": b"x", **fields}
        return StateMessage(
            task_id, name, content_type="application/json", content_encoding="utf-8", **given
        )

    def keep(self, *messages: StateMessage) -> None:
        for message in messages:
            self.queue.publish(message.properties(True), message.body)

    def keep_page(self, *messages: StateMessage) -> None:
        self.queue.publish({"type": page.PAGE}, page.encode(messages))

    def begin(self, reader: Any, ids: Collection[str], **options: Any) -> Any:
        """Begin a :class:`LookUp` or a :class:`Removal`, and read the whole shard."""
        read = reader(self.store, self.link, 0, set(ids), **{"kind": STATE, **options})
        while not read.done:
            assert self.link.drain(0.0)
        return read

    def finish(self, read: Any, pack_until: float = 1e12, end: float = 1e12) -> None:
        done: List[int] = []
        read.finish(pack_until, end, lambda: done.append(1))
        assert done == [1]
        assert not self.queue.consumers

    def look_up(self, *ids: str, **options: Any) -> Dict[str, List[StateMessage]]:
        """Read the shard, and pack it; return what was found."""
        read = self.begin(LookUp, ids, **options)
        self.finish(read)
        found: Dict[str, List[StateMessage]] = read.found
        return found

    def remove(self, *ids: str, **options: Any) -> int:
        read = self.begin(Removal, ids, **options)
        self.finish(read)
        removed: int = read.removed
        return removed

    def kept(self) -> List[StateMessage]:
        """Return the loose states."""
        return [
            StateMessage.from_properties(entry.properties, entry.body)
            for entry in self.queue.ready
            if entry.properties["type"] in (STATE, GROUP)
        ]

    def pages(self) -> List[List[StateMessage]]:
        return [
            page.decode(entry.body)
            for entry in self.queue.ready
            if entry.properties.get("type") == page.PAGE
        ]


@pytest.fixture
def shard(monkeypatch: pytest.MonkeyPatch) -> Shard:
    return Shard(monkeypatch)


# -- looking up --------------------------------------------------------------------------------


def test_a_look_up_finds_the_wanted_states_loose_and_in_pages(shard: Shard) -> None:
    first, second, other = shard.state("a", "STARTED"), shard.state("a"), shard.state("b")
    shard.keep_page(first, other)
    shard.keep(second, shard.state("c"))
    assert shard.look_up("a", "b", "d") == {"a": [first, second], "b": [other]}
    assert shard.rejected == []


def test_states_of_tasks_and_groups_are_told_apart(shard: Shard) -> None:
    task, group = shard.state("a"), shard.state("a", "GROUP", kind=GROUP)
    shard.keep(task, group)
    shard.keep_page(task, group)
    assert shard.look_up("a") == {"a": [task, task]}
    assert shard.look_up("a", kind=GROUP) == {"a": [group, group]}
    assert shard.remove("a") == 2
    assert (shard.kept(), shard.pages()) == ([group], [[group]])


def test_an_expired_state_is_not_found(shard: Shard) -> None:
    now = shard.clock.microseconds
    expired = shard.state("a", published=now - 2_000_000, expiration=1_000)
    lasting = shard.state("a", published=now - 2_000_000, expiration=5_000)
    shard.keep(expired, lasting)
    shard.keep_page(expired, lasting)
    assert shard.look_up("a") == {"a": [lasting, lasting]}


def test_a_state_from_the_far_future_is_found_without_its_date_and_not_packed(
    shard: Shard,
) -> None:
    ahead = shard.clock.microseconds + 2 * MAX_AHEAD
    # By its date it has not expired, or has expired since 1970.
    undated = shard.state("a", published=ahead, expiration=1_000)
    shard.keep(undated)
    shard.keep_page(shard.state("b", published=ahead))
    many = [shard.state(f"t{number}") for number in range(PACK_AT)]
    shard.keep(*many)
    found = shard.look_up("a", "b")
    assert [state.published for task_id in "ab" for state in found[task_id]] == [0, 0]
    assert shard.kept() == [undated]


@pytest.mark.parametrize("typed", [False, True])
def test_a_foreign_message_is_reported_and_only_removed_without_a_type(
    shard: Shard, typed: bool
) -> None:
    shard.queue.publish({"type": "other"} if typed else {}, b"foreign")
    shard.keep(shard.state("a"))
    assert list(shard.look_up("a")) == ["a"]
    (complaint,) = shard.rejected
    assert complaint.startswith("x.shard.0: property 'type' is ")
    assert any(entry.body == b"foreign" for entry in shard.queue.ready) is typed


def test_a_state_of_another_shard_is_reported_and_not_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    topology = Topology("x", 2, "classic")
    shard = Shard(monkeypatch, topology)
    here, there = (next(i for i in "abcdefgh" if topology.shard(i) == n) for n in (0, 1))
    shard.keep(shard.state(there), shard.state(here))
    assert list(shard.look_up(here, there)) == [here]
    assert shard.rejected == [f"x.shard.0: {there!r} belongs to shard 1"]
    assert len(shard.kept()) == 2


def test_a_pointer_to_another_task_s_queue_is_reported_and_not_found(shard: Shard) -> None:
    wrong = shard.state("a", body=b"", body_queue="x.large.other.mark")
    right = shard.state("a", body=b"", body_queue="x.large.a.mark")
    shard.keep(wrong, right)
    shard.keep_page(wrong, right)
    assert shard.look_up("a") == {"a": [right, right]}
    assert len(shard.rejected) == 2
    assert all("'x.large.other.mark'" in complaint for complaint in shard.rejected)


def test_a_damaged_page_is_reported_and_everything_else_is_found(shard: Shard) -> None:
    # Packing keeps both: another version may be able to read them.
    damaged = page.encode([shard.state("a"), shard.state("b")]).replace(b'"i":"b"', b'"i":500')
    for body in (b"damaged", damaged):
        shard.queue.publish({"type": page.PAGE}, body)
    shard.keep(*(shard.state(f"t{number}") for number in range(PACK_AT)))
    assert sorted(shard.look_up("a", "t0", census=page.Census())) == ["a", "t0"]
    first, second = shard.rejected
    assert first == "x.shard.0: a page does not begin as one, but with b'damaged'"
    assert second.startswith("x.shard.0: a field is not of its type")
    assert [entry.body for entry in shard.queue.ready[:2]] == [b"damaged", damaged]
    assert shard.kept() == []


def check_bodies(shard: Shard) -> None:
    """Let the store check states as a backend does: a body that is b"damaged" is undecodable."""

    def check(state: StateMessage) -> None:
        if state.body == b"damaged":
            raise errors.ForeignMessage(f"{state.id} is damaged")

    shard.store.check = check


def test_a_wanted_entry_of_a_page_that_is_damaged_hides_no_other(shard: Shard) -> None:
    damaged = page.encode([shard.state("a"), shard.state("b")]).replace(b'"i":"a"', b'"i":500')
    shard.queue.publish({"type": page.PAGE}, damaged)
    assert list(shard.look_up("a", "b")) == ["b"]
    (complaint,) = shard.rejected
    assert complaint.startswith("x.shard.0: a field is not of its type")


def test_an_undecodable_end_does_not_displace_another_when_it_is_packed(shard: Shard) -> None:
    check_bodies(shard)
    good, bad = (shard.state("a", "FAILURE", body=body) for body in (b"good", b"damaged"))
    many = [shard.state(f"t{number}") for number in range(PACK_AT)]
    shard.keep(good, bad, *many)
    assert shard.look_up("a") == {"a": [good, bad]}
    assert (shard.kept(), shard.pages()) == ([bad], [[good, *many]])
    assert shard.rejected == ["x.shard.0: a is damaged"]
    assert shard.look_up("a") == {"a": [bad, good]}


def test_a_census_leaves_out_undecodable_ends_that_hide_others(shard: Shard) -> None:
    check_bodies(shard)
    good, bad = (shard.state("a", "FAILURE", body=body) for body in (b"good", b"damaged"))
    only = shard.state("b", "FAILURE", body=b"damaged")
    read = shard.begin(LookUp, ())
    assert read.credible([good, bad, only]) == [good, only]
    known = [good, only]
    assert read.credible(known) is known


def test_a_census_has_everything_that_has_not_expired(shard: Shard) -> None:
    census = page.Census()
    loose = shard.state("a")
    expired = shard.state("b", published=1, expiration=1)
    undated = shard.state("d", published=shard.clock.microseconds + 2 * MAX_AHEAD)
    shard.keep(loose, expired, undated)
    shard.keep_page(shard.state("c"))
    assert shard.look_up(census=census) == {}
    assert [state.id for state in census.loose] == ["a", "d"]
    assert [state.published for state in census.loose] == [loose.published, 0]
    assert census.digests == {page.number_of("c")}


# A reader sets a second fence if a page behind the first one may have what it looks for.
@pytest.mark.parametrize(
    ("kept", "options", "fences"),
    [
        ("SUCCESS", {}, 1),
        ("FAILURE", {}, 2),
        (None, {}, 2),
        ("SUCCESS", {"census": page.Census()}, 2),
        ("SUCCESS", {"kind": GROUP}, 2),
    ],
)
def test_a_reader_that_may_have_missed_a_page_looks_again(
    shard: Shard, kept: Optional[str], options: Dict[str, Any], fences: int
) -> None:
    kind = options.get("kind", STATE)
    shard.keep(shard.state("b", kind=kind), *([shard.state("a", kept, kind=kind)] if kept else []))
    read = shard.begin(LookUp, ["a", "b"], **options)
    assert read.checkout.seen == len(shard.queue.consumers[0].held)
    assert read.checkout.seen - (2 if kept else 1) == fences


@pytest.mark.parametrize(
    ("queue_type", "prefetch", "arguments"),
    [("classic", 0, {}), ("quorum", checkout.PREFETCH, {"x-consumer-timeout": 25_000})],
)
def test_a_reader_takes_all_messages_and_holds_a_quorum_queue_for_a_limited_time(
    monkeypatch: pytest.MonkeyPatch, queue_type: str, prefetch: int, arguments: Dict[str, int]
) -> None:
    shard = Shard(monkeypatch, Topology("x", 1, queue_type), lookup_timeout=5.0)
    shard.begin(LookUp, ["a"])
    (reader,) = shard.queue.consumers
    assert (reader.prefetch, reader.arguments) == (prefetch, arguments)


# -- packing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [PACK_AT - 1, PACK_AT])
def test_a_shard_with_enough_loose_results_is_packed(shard: Shard, count: int) -> None:
    many = [shard.state(f"t{number}") for number in range(count)]
    shard.keep(*many)
    shard.look_up()
    if count < PACK_AT:
        assert (shard.kept(), shard.pages()) == (many, [])
        assert shard.store.packed == 0
    else:
        assert (shard.kept(), shard.pages()) == ([], [many])
        assert shard.store.packed == count
    assert len(shard.look_up(*(state.id for state in many))) == count


def test_states_of_running_tasks_are_not_worth_packing(shard: Shard) -> None:
    running = [shard.state(f"t{number}", "STARTED") for number in range(PACK_AT)]
    ended = [shard.state(f"e{number}") for number in range(PACK_AT - 1)]
    shard.keep(*running, *ended)
    shard.look_up()
    assert shard.kept() == running + ended
    shard.keep(shard.state("one more"))
    shard.look_up()
    assert shard.kept() == running
    assert [len(content) for content in shard.pages()] == [PACK_AT]


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("expiration", [None, 60_000])
def test_a_page_is_as_durable_as_a_state_and_lives_as_long(
    monkeypatch: pytest.MonkeyPatch, persistent: bool, expiration: Optional[int]
) -> None:
    shard = Shard(monkeypatch, persistent=persistent)
    shard.keep(*(shard.state(f"t{n}", expiration=expiration) for n in range(PACK_AT)))
    shard.look_up()
    (entry,) = shard.queue.ready
    properties = dict(entry.properties)
    left = properties.pop("expiration", None)
    assert properties == {
        "type": "page",
        "content_type": "application/x-celery-results-page",
        "delivery_mode": 2 if persistent else 1,
    }
    if expiration is None:
        assert left is None
    else:
        assert 59_000 < int(left) <= 60_000


def test_a_small_page_is_packed_again_and_a_large_one_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shard = Shard(monkeypatch, page_size=20_000)
    large = shard.state("large", body=b"x" * 10_001)
    small = shard.state("small", body=b"x" * 5_000)
    many = [shard.state(f"t{number}") for number in range(PACK_AT)]
    shard.keep_page(large)
    shard.keep_page(small)
    shard.keep(*many)
    shard.look_up()
    assert shard.pages() == [[large], [*many, small]]


def test_a_state_of_half_a_page_is_packed_and_a_larger_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shard = Shard(monkeypatch, page_size=20_000)
    half, more = (shard.state(f"b{size}", body=b"x" * size) for size in (10_000, 10_001))
    many = [shard.state(f"t{number}") for number in range(PACK_AT)]
    shard.keep(half, more, *many)
    shard.look_up()
    assert shard.kept() == [more]


def test_the_memory_for_packing_is_limited(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_read, "MAX_RETAINED", 100 * PACK_AT)
    many = [shard.state(f"t{number}", body=b"x" * 100) for number in range(PACK_AT + 2)]
    shard.keep(*many)
    shard.look_up()
    # The rest is left to the next reader.
    assert (shard.kept(), shard.pages()) == (many[PACK_AT:], [many[:PACK_AT]])


def test_a_shard_is_not_packed_without_time_for_it(shard: Shard) -> None:
    many = [shard.state(f"t{number}") for number in range(PACK_AT)]
    shard.keep(*many)
    now = shard.clock.monotonic()
    shard.finish(shard.begin(LookUp, ()), pack_until=now, end=now + 10.0)
    assert (shard.kept(), shard.pages()) == (many, [])


def test_no_page_is_begun_when_the_time_for_packing_is_over(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [shard.state(f"t{number}", body=b"x" * 1_000) for number in range(PACK_AT)]
    shard.keep(*many)
    read, select = shard.begin(LookUp, ()), page.select
    until = shard.clock.microseconds + 1_000_000

    def slow(*given: Any) -> Any:
        shard.clock.microseconds = until
        return select(*given)

    monkeypatch.setattr(page, "select", slow)
    # A page would have no time to come back.
    shard.finish(read, pack_until=until / 1e6, end=until / 1e6)
    assert (shard.kept(), shard.pages()) == (many, [])


def test_a_page_that_the_broker_does_not_confirm_replaces_nothing(
    shard: Shard, caplog: Any
) -> None:
    many = [shard.state(f"t{number}") for number in range(PACK_AT)]
    shard.keep(*many)
    channel: Any = shard.link.publishing
    waited_until: List[float] = []

    def refuse(publications: Any, end: float) -> None:
        waited_until.append(end)
        for publication in publications:
            publication.status = Status.REFUSED

    channel.wait = refuse
    # A look-up leaves the packing to the next reader
    read = shard.begin(LookUp, ())
    with caplog.at_level(logging.INFO):
        shard.finish(read, end=shard.clock.monotonic() + 5.0)
    assert [each.message for each in caplog.records] == [
        "the broker did not take a page for 'x.shard.0'"
    ]
    assert waited_until == [pytest.approx(shard.clock.monotonic() + 5.0, abs=0.1)]
    assert shard.kept() == many
    # A removal fails
    kept = [shard.state("a"), shard.state("b")]
    shard.keep_page(*kept)
    read = shard.begin(Removal, ["a"])
    with pytest.raises(errors.NotConfirmed, match=r"^'x\.shard\.0' does not take a page$"):
        shard.finish(read)
    shard.link.lose_channels()
    assert kept in shard.pages()


def test_the_pages_before_a_refused_one_replace_their_messages(shard: Shard) -> None:
    many = [shard.state(f"t{number}", body=b"x" * 1_000) for number in range(PACK_AT)]
    shard.keep(*many)
    channel: Any = shard.link.publishing
    answers = iter([Status.CONFIRMED, Status.REFUSED])

    def wait(publications: Any, end: float) -> None:
        (publication,) = publications
        publication.status = next(answers)

    channel.wait = wait
    shard.look_up()
    first = shard.pages()[0]
    assert 0 < len(first) < len(many)
    assert (first, shard.kept()) == (many[: len(first)], many[len(first) :])
    assert shard.store.packed == len(first)


@pytest.mark.parametrize(("left", "waited"), [(0.25, 0.25), (60.0, shard_read.PAGE_SECONDS)])
def test_a_page_that_does_not_come_back_is_waited_for_until_the_end_of_the_time_for_it(
    shard: Shard, monkeypatch: pytest.MonkeyPatch, left: float, waited: float
) -> None:
    monkeypatch.setattr(retry, "time", shard.clock)
    shard.keep_page(shard.state("a"), shard.state("b"))
    read = shard.begin(Removal, ["a"])
    waits: List[float] = []

    def drain(timeout: float) -> bool:
        waits.append(timeout)
        shard.clock.microseconds += round(timeout * 1e6)
        return False

    def wait(publications: Any, end: float) -> None:
        publications[0].status = Status.CONFIRMED

    monkeypatch.setattr(shard.link, "drain", drain)
    monkeypatch.setattr(shard.link.publishing, "wait", wait)
    shard.finish(read, end=shard.clock.monotonic() + left)
    # A timeout that was rounded down may leave a microsecond.
    assert waits[0] == pytest.approx(waited, abs=1e-3)
    assert sum(waits[1:]) < 1e-3


def test_a_removal_divides_a_page_that_is_too_large_by_now(shard: Shard) -> None:
    ids = [f"t{number}" for number in range(10)]
    shard.keep_page(*(shard.state(task_id, body=b"x" * 100) for task_id in ids))
    shard.store.page_size = 1_000
    assert shard.remove("t0") == 1
    found = shard.pages()
    assert len(found) > 1
    assert [state.id for content in found for state in content] == ids[1:]


def test_the_queues_of_superseded_large_results_are_deleted(shard: Shard, caplog: Any) -> None:
    def pointer(mark: str) -> StateMessage:
        return shard.state("a", states.FAILURE, body=b"", body_queue=f"x.large.a.{mark}")

    def pack() -> None:
        shard.keep(*(shard.state(f"t{number}") for number in range(PACK_AT)))
        shard.look_up()

    shard.keep(pointer("first"), pointer("second"))
    pack()
    # The pointers are removed after their queue.
    (held,) = shard.link.deleted.values()
    assert list(shard.link.deleted) == ["x.large.a.first"]
    assert held >= PACK_AT + 2
    assert shard.link.closed == 1
    # A user that only reads may lack the permission.
    shard.link.refuses = True
    shard.keep(pointer("third"))
    with caplog.at_level(logging.INFO):
        pack()
    (record,) = caplog.records
    assert record.message.startswith("superseded large results were not deleted: ")
    assert "'x.large.a.second' refused" in record.message
    assert shard.kept() == []


# -- the time for packing the last shard ---------------------------------------------------------


def test_only_a_long_shard_is_packed_for_longer(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_read, "LONG_SHARD", 4)
    shard.keep(*(shard.state(f"t{number}") for number in range(2)))
    short = shard.begin(LookUp, ["t0", "t1"])
    shard.clock.microseconds += 10_000_000
    # Two states and a fence.
    assert short.long_packing_end(0.0, 1e12) == 0.0
    shard.finish(short)
    shard.keep(shard.state("t2"))
    long = shard.begin(LookUp, ["t0", "t1", "t2"])
    shard.clock.microseconds += 10_000_000
    now = shard.clock.monotonic()
    # A fifth of ten seconds
    assert long.long_packing_end(0.0, 1e12) == pytest.approx(now + 2.0, abs=0.01)
    # Of which one has passed
    assert long.long_packing_end(1.0, 1e12) == pytest.approx(now + 1.8 - 1.0, abs=0.01)
    assert long.long_packing_end(0.0, now + 1.5) == pytest.approx(now + 0.5)


def test_a_shard_from_which_nothing_has_come_is_not_long(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_read, "LONG_SHARD", 0)
    read = shard.begin(LookUp, ["a"])
    assert read.long_packing_end(0.0, 1e12) == 0.0


# -- removing ----------------------------------------------------------------------------------


def test_a_removal_takes_states_out_of_the_shard_and_out_of_pages(shard: Shard) -> None:
    other, third = shard.state("b"), shard.state("c")
    shard.keep_page(shard.state("a"), other)
    shard.keep_page(shard.state("a"))
    shard.keep_page(third)
    shard.keep(shard.state("a"), other)
    assert shard.remove("a", "d") == 3
    assert shard.kept() == [other]
    assert shard.pages() == [[third], [other]]
    assert shard.look_up("a") == {}
    assert shard.remove("a") == 0


def test_an_expired_state_in_a_page_is_not_removed(shard: Shard) -> None:
    now = shard.clock.microseconds
    shard.keep_page(shard.state("a", published=now - 2_000_000, expiration=1_000), shard.state("b"))
    before = shard.pages()
    assert shard.remove("a") == 0
    assert shard.pages() == before


@pytest.mark.parametrize(("ids", "fences"), [("a", 3), ("ab", 2), ("c", 2)])
def test_a_removal_waits_for_the_pages_that_it_has_written(
    shard: Shard, ids: str, fences: int
) -> None:
    shard.keep_page(shard.state("a"), shard.state("b"))
    with mock.patch.object(shard.queue, "publish", wraps=shard.queue.publish) as publish:
        shard.remove(*ids)
    published = [properties.get("type") for (properties, _), _ in publish.call_args_list]
    # One of a reader, and another one that nothing can lie behind.
    assert published.count(checkout.FENCE) == fences
    if fences > 2:
        assert published[-2:] == [page.PAGE, checkout.FENCE]


@pytest.mark.parametrize("reader", [LookUp, Removal])
def test_only_a_removal_waits_until_the_shard_is_released(shard: Shard, reader: Any) -> None:
    read = shard.begin(reader, ["a"])
    with mock.patch.object(read.checkout, "close", wraps=read.checkout.close) as close:
        shard.finish(read)
    close.assert_called_once_with(wait=reader is Removal)


def test_a_removal_deletes_the_queues_of_large_results_before_their_pointers(
    shard: Shard,
) -> None:
    loose, packed = (
        shard.state("a", body=b"", body_queue=f"x.large.a.{mark}") for mark in ("loose", "packed")
    )
    shard.keep(loose, shard.state("a"))
    shard.keep_page(packed, shard.state("a"))
    assert shard.remove("a") == 4
    assert set(shard.link.deleted) == {"x.large.a.loose", "x.large.a.packed"}
    # The loose state without a queue of its own is gone already. The pointer, the page and two
    # fences are not.
    assert set(shard.link.deleted.values()) == {4}
    assert shard.link.closed == 1
    assert (shard.kept(), shard.pages()) == ([], [])


def test_a_removal_reports_a_damaged_entry_of_a_page_and_keeps_the_others(shard: Shard) -> None:
    octets = page.encode([shard.state("a"), shard.state("b"), shard.state("c")])
    shard.queue.publish({"type": page.PAGE}, octets.replace(b'"i":"b"', b'"i":500'))
    assert shard.remove("a") == 1
    assert [[state.id for state in content] for content in shard.pages()] == [["c"]]
    assert len(shard.rejected) == 1
    assert shard.rejected[0].startswith("x.shard.0: a field is not of its type")


def test_a_removal_that_dies_before_its_page_is_kept_has_removed_nothing_from_pages(
    shard: Shard,
) -> None:
    shard.keep_page(shard.state("a"), shard.state("b"))
    read = shard.begin(Removal, ["a"])
    lost = mock.patch.object(shard.link.publishing, "publish", side_effect=OSError("cut"))
    with lost, pytest.raises(OSError, match="cut"):
        shard.finish(read)
    shard.link.lose_channels()
    assert [[state.id for state in content] for content in shard.pages()] == [["a", "b"]]
