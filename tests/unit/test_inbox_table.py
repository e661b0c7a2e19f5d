"""Which tasks an inbox covers, and when it reports that it does not cover them.

There is no broker: the tests decide what is bound and what is pushed.
"""

from __future__ import annotations

import collections
import itertools
import logging
import time
from typing import Any, Callable, Deque, Dict, List, Optional

import pytest
from amqp.basic_message import Message
from celery import states
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from celery_amqp_results import errors
from celery_amqp_results.feed import inbox as inbox_module
from celery_amqp_results.feed.inbox import Waiter
from celery_amqp_results.protocol.message import GROUP, PART, PLAN, StateMessage
from celery_amqp_results.protocol.ranking import fold
from tests.unit.tables import Table, new_id, push, state


@pytest.fixture
def inbox() -> Table:
    """An inbox with a connection, with no shard bound."""
    table = Table()
    table.open()
    return table


def known(table: Table, task_id: str) -> Any:
    """Return the name of the state that *table* knows, or ``"?"`` if it is not covered."""
    try:
        found = table.known(task_id)
    except KeyError:
        return "?"
    return found and found.state


def watched(table: Table, *ids: str) -> Waiter:
    waiter = Waiter()
    table.watch(ids, waiter)
    return waiter


def covered(table: Table, task_id: str, *found: StateMessage) -> Waiter:
    """Look *task_id* up as a waiter does: watch, cover, read, install."""
    waiter = watched(table, task_id)
    table.install({task_id: list(found)}, table.cover([task_id], None))
    return waiter


# -- covered tasks -----------------------------------------------------------------------------


def test_nothing_is_covered_without_a_connection() -> None:
    table, task_id = Table(), new_id()
    table.note_sent(task_id)
    assert not table.covers(task_id)
    with pytest.raises(KeyError):
        table.known(task_id)


def test_a_new_task_is_covered_from_the_moment_it_is_sent(inbox: Table) -> None:
    task_id = new_id()
    assert not inbox.covers(task_id)
    inbox.note_sent(task_id)
    assert inbox.covers(task_id)
    assert known(inbox, task_id) is None
    push(inbox, state(task_id, "STARTED"))
    assert known(inbox, task_id) == "STARTED"


@pytest.mark.parametrize(
    "task_id",
    [
        "mine",
        "",
        "0f3b2c4e8d1a4a529a4b6f2a1c7d8e90",
        "0F3B2C4E-8D1A-4A52-9A4B-6F2A1C7D8E90",
        # A time-based UUID, and a name-based one.
        "0f3b2c4e-8d1a-1a52-9a4b-6f2a1c7d8e90",
        "0f3b2c4e-8d1a-5a52-9a4b-6f2a1c7d8e90",
        "0f3b2c4e-8d1a-4a52-9a4b-6f2a1c7d8e90\n",
    ],
)
def test_an_id_that_may_have_been_used_before_is_not_covered(inbox: Table, task_id: str) -> None:
    inbox.note_sent(task_id)
    assert not inbox.covers(task_id)
    # But it is an own task: no shard needs to be bound.
    assert inbox.unbound([task_id]) == set()


def test_a_task_sent_again_is_not_new(inbox: Table) -> None:
    task_id = new_id()
    inbox.note_sent(task_id)
    push(inbox, state(task_id, "SUCCESS"))
    assert known(inbox, task_id) == "SUCCESS"
    # The store has that SUCCESS, so the task must not be reported as pending.
    inbox.note_sent(task_id)
    assert known(inbox, task_id) == "?"


def test_a_task_sent_again_keeps_its_known_state(inbox: Table) -> None:
    task_id = new_id()
    inbox.note_sent(task_id)
    push(inbox, state(task_id, "RETRY"))
    inbox.note_sent(task_id)
    assert known(inbox, task_id) == "RETRY"


def test_a_task_sent_again_much_later_keeps_its_known_state(
    inbox: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox_module, "MAX_SENT", 1)
    task_id = new_id()
    inbox.note_sent(task_id)
    push(inbox, state(task_id, "RETRY"))
    # By then the record that it was sent has been dropped.
    inbox.note_sent(new_id())
    inbox.note_sent(task_id)
    assert known(inbox, task_id) == "RETRY"


def test_sending_a_task_again_does_not_cover_one_sent_before_the_connection(
    inbox: Table,
) -> None:
    table, task_id = Table(), new_id()
    table.note_sent(task_id)
    table.open()
    table.note_sent(task_id)
    assert not table.covers(task_id)


def test_states_of_uncovered_tasks_are_not_kept(inbox: Table) -> None:
    task_id = new_id()
    push(inbox, state(task_id, "STARTED"))
    assert not inbox.covers(task_id)
    covered(inbox, task_id)
    assert known(inbox, task_id) is None


def test_the_current_state_does_not_depend_on_arrival_order(inbox: Table) -> None:
    task_id = new_id()
    inbox.note_sent(task_id)
    push(inbox, state(task_id, "PROGRESS", 5), state(task_id, "STARTED", 4))
    assert known(inbox, task_id) == "PROGRESS"
    push(inbox, state(task_id, "SUCCESS", 6), state(task_id, "STARTED", 7))
    assert known(inbox, task_id) == "SUCCESS"


def test_an_own_published_state_is_known_without_its_push(inbox: Table) -> None:
    mine, other = new_id(), new_id()
    inbox.note_sent(mine)
    inbox.note_stored(state(mine, "STARTED"))
    assert known(inbox, mine) == "STARTED"
    # Other states of an uncovered task may be missing.
    inbox.note_stored(state(other, "STARTED"))
    assert not inbox.covers(other)


@pytest.mark.parametrize("final", sorted(states.READY_STATES))
def test_a_final_state_is_delivered_once(inbox: Table, final: str) -> None:
    task_id = new_id()
    inbox.note_sent(task_id)
    push(inbox, state(task_id, final))
    assert known(inbox, task_id) == final
    # It may be forgotten from now on, and no push would report that.
    assert known(inbox, task_id) == "?"


def test_other_states_can_be_read_repeatedly(inbox: Table) -> None:
    task_id = new_id()
    inbox.note_sent(task_id)
    push(inbox, state(task_id, "STARTED"))
    assert [known(inbox, task_id) for _ in range(3)] == ["STARTED"] * 3


def test_an_expired_state_is_not_delivered(inbox: Table) -> None:
    now = time.time_ns() // 1000
    old, fresh = new_id(), new_id()
    for task_id, published in ((old, now - 3_600_000_000), (fresh, now)):
        inbox.note_sent(task_id)
        push(inbox, state(task_id, "SUCCESS", published, expiration=3_599_999))
    assert known(inbox, old) == "?"
    assert known(inbox, fresh) == "SUCCESS"


def test_a_discarded_task_is_not_known(inbox: Table) -> None:
    task_id = new_id()
    inbox.note_sent(task_id)
    inbox.discard(task_id)
    assert known(inbox, task_id) == "?"
    inbox.discard(task_id)


# -- watching ----------------------------------------------------------------------------------


def test_a_watcher_of_a_covered_task_gets_its_state_immediately(inbox: Table) -> None:
    begun, silent = new_id(), new_id()
    inbox.note_sent(begun)
    inbox.note_sent(silent)
    started = state(begun, "STARTED")
    push(inbox, started)
    waiter = watched(inbox, begun, silent)
    assert waiter.take() == [started]
    assert waiter.take_uncovered() == set()


def test_a_watcher_learns_that_a_task_is_not_covered(inbox: Table) -> None:
    mine, other = new_id(), new_id()
    inbox.note_sent(mine)
    waiter = watched(inbox, mine, other)
    assert waiter.wait(0)
    assert waiter.take_uncovered() == {other}
    assert waiter.take_uncovered() == set()


def test_exactly_the_watchers_of_a_task_get_its_states(inbox: Table) -> None:
    one, other = new_id(), new_id()
    first, second, stranger = watched(inbox, one), watched(inbox, one), watched(inbox, other)
    started, done = state(one, "STARTED"), state(one, "SUCCESS")
    push(inbox, started)
    inbox.unwatch([one], first)
    push(inbox, done)
    assert first.take() == [started]
    assert second.take() == [started, done]
    assert stranger.take() == []


def test_unwatching_an_unwatched_task_is_no_error(inbox: Table) -> None:
    task_id = new_id()
    waiter = watched(inbox, task_id)
    inbox.unwatch([new_id()], waiter)
    inbox.unwatch([task_id], Waiter())
    push(inbox, state(task_id))
    assert len(waiter.take()) == 1
    inbox.unwatch([task_id], waiter)
    inbox.unwatch([task_id], waiter)


def test_consuming_the_final_state_ends_the_cover(inbox: Table) -> None:
    task_id = new_id()
    inbox.note_sent(task_id)
    waiter = watched(inbox, task_id)
    push(inbox, state(task_id, "SUCCESS"))
    inbox.unwatch([task_id], waiter, consumed=True)
    assert not inbox.covers(task_id)


def test_giving_up_keeps_the_cover(inbox: Table) -> None:
    task_id = new_id()
    inbox.note_sent(task_id)
    inbox.unwatch([task_id], watched(inbox, task_id))
    assert inbox.covers(task_id)


# -- look-ups ----------------------------------------------------------------------------------


def test_a_looked_up_task_is_covered_from_then_on(inbox: Table) -> None:
    task_id = new_id()
    covered(inbox, task_id, state(task_id, "STARTED"))
    assert known(inbox, task_id) == "STARTED"
    push(inbox, state(task_id, "PROGRESS"))
    assert known(inbox, task_id) == "PROGRESS"


@pytest.mark.parametrize(
    ("in_store", "early", "counts"),
    [
        (["STARTED"], ["SUCCESS"], "SUCCESS"),
        (["SUCCESS"], ["STARTED"], "SUCCESS"),
        ([], ["STARTED", "PROGRESS"], "PROGRESS"),
        (["STARTED", "PROGRESS"], [], "PROGRESS"),
        # The same message, by both ways.
        (["STARTED"], ["STARTED"], "STARTED"),
        ([], [], None),
    ],
)
def test_states_pushed_during_the_look_up_are_added(
    inbox: Table, in_store: List[str], early: List[str], counts: Optional[str]
) -> None:
    task_id = new_id()
    waiter = watched(inbox, task_id)
    epoch = inbox.cover([task_id], None)
    found = [state(task_id, name) for name in in_store]
    pushed = [state(task_id, name) for name in early]
    push(inbox, *pushed)
    assert not inbox.covers(task_id)
    inbox.install({task_id: found}, epoch)
    assert waiter.take() == pushed
    assert known(inbox, task_id) == counts


def test_states_pushed_without_a_watcher_are_not_added(inbox: Table) -> None:
    task_id = new_id()
    inbox.unwatch([task_id], watched(inbox, task_id))
    push(inbox, state(task_id, "STARTED"))
    first = watched(inbox, task_id)
    push(inbox, state(task_id, "PROGRESS"))
    inbox.unwatch([task_id], first)
    # A new watcher looks the task up after that, and so finds all of them.
    covered(inbox, task_id, state(task_id, "RETRY", 0))
    assert known(inbox, task_id) == "RETRY"


def test_concurrent_look_ups_do_not_undo_each_other(inbox: Table) -> None:
    task_id = new_id()
    waiters = [watched(inbox, task_id), watched(inbox, task_id)]
    epoch = inbox.cover([task_id], None)
    push(inbox, state(task_id, "PROGRESS"))
    inbox.install({task_id: [state(task_id, "STARTED", 1)]}, epoch)
    push(inbox, state(task_id, "RETRY"))
    # The second look-up was made before any of that.
    inbox.install({task_id: []}, epoch)
    assert known(inbox, task_id) == "RETRY"
    assert [len(waiter.take()) for waiter in waiters] == [2, 2]


def test_a_look_up_overtaken_by_the_final_state_is_ignored(inbox: Table) -> None:
    task_id = new_id()
    slow, quick = watched(inbox, task_id), watched(inbox, task_id)
    epoch = inbox.cover([task_id], None)
    started, done = state(task_id, "STARTED"), state(task_id, "SUCCESS")
    push(inbox, done)
    inbox.install({task_id: [started]}, epoch)
    # A waiter consumes the result, and may forget it, before the slow look-up finishes.
    inbox.unwatch([task_id], quick, consumed=True)
    inbox.install({task_id: [started]}, epoch)
    assert known(inbox, task_id) == "?"
    # The slow one has the pushed state.
    assert slow.take() == [done]
    inbox.unwatch([task_id], slow)
    # And the next look-up is used again.
    covered(inbox, task_id, started, done)
    assert known(inbox, task_id) == "SUCCESS"


def test_a_look_up_overtaken_by_forget_is_ignored(inbox: Table) -> None:
    task_id = new_id()
    waiter = watched(inbox, task_id)
    epoch = inbox.cover([task_id], None)
    push(inbox, state(task_id, "STARTED"))
    inbox.discard(task_id)
    # The pushed states will not be added to any finding.
    assert inbox._early == {}
    inbox.install({task_id: [state(task_id, "SUCCESS")]}, epoch)
    assert known(inbox, task_id) == "?"
    push(inbox, state(task_id, "STARTED"))
    assert len(waiter.take()) == 2


# -- connections -------------------------------------------------------------------------------


def test_a_lost_connection_ends_all_cover(inbox: Table) -> None:
    mine, other, early = new_id(), new_id(), new_id()
    inbox.note_sent(mine)
    waiters = [covered(inbox, other), watched(inbox, mine), watched(inbox, early)]
    waiters[2].take_uncovered()
    push(inbox, state(early, "STARTED"))
    for waiter in waiters:
        waiter.take()
        waiter.take_uncovered()
    inbox.lose()
    assert not any(map(inbox.covers, (mine, other, early)))
    # Watchers are notified, of uncovered tasks too.
    assert [waiter.take_uncovered() for waiter in waiters] == [{other}, {mine}, {early}]
    assert all(waiter.wait(0) for waiter in waiters)
    # Pushes from the old connection do not reveal what was missed between the two.
    inbox.install({early: []}, inbox.cover([early], None))
    assert known(inbox, early) is None


def test_a_look_up_on_a_lost_connection_is_ignored(inbox: Table) -> None:
    task_id = new_id()
    waiter = watched(inbox, task_id)
    old = inbox.cover([task_id], None)
    inbox.lose()
    inbox.install({task_id: []}, old)
    assert not inbox.covers(task_id)
    new = inbox.cover([task_id], None)
    assert new > old
    inbox.install({task_id: []}, old)
    assert not inbox.covers(task_id)
    inbox.install({task_id: []}, new)
    assert inbox.covers(task_id)
    assert waiter.take() == []


def test_drops_on_a_lost_connection_do_not_affect_the_next(inbox: Table) -> None:
    task_id = new_id()
    waiter = watched(inbox, task_id)
    inbox.discard(task_id)
    inbox.lose()
    inbox.install({task_id: []}, inbox.cover([task_id], None))
    assert inbox.covers(task_id)
    inbox.unwatch([task_id], waiter)


def test_a_task_sent_without_a_connection_is_not_covered_by_the_next(
    inbox: Table,
) -> None:
    task_id = new_id()
    inbox.lose()
    inbox.note_sent(task_id)
    inbox.open()
    assert not inbox.covers(task_id)


def test_shards_are_bound_again_on_the_next_connection(inbox: Table) -> None:
    task_id = new_id()
    assert inbox.unbound([task_id]) == {task_id}
    inbox.cover([task_id], None)
    assert inbox.unbound([task_id]) == set()
    inbox.lose()
    assert inbox.unbound([task_id]) == {task_id}
    inbox.cover([], None)
    assert inbox.unbound([task_id]) == set()


def test_only_tasks_of_other_senders_need_a_shard_binding(inbox: Table) -> None:
    mine, other = new_id(), new_id()
    inbox.note_sent(mine)
    assert inbox.unbound([mine, other]) == {other}
    inbox.cover([mine], None)
    near = next(i for i in iter(new_id, "") if inbox.shard(i) == inbox.shard(mine))
    assert inbox.unbound([near, other]) == {near, other}
    inbox.cover([mine, other], None)
    assert inbox.unbound([mine, other]) == set()
    # One binding covers every task of its shard.
    same = next(i for i in iter(new_id, "") if inbox.shard(i) == inbox.shard(other))
    assert inbox.unbound([same]) == set()


@pytest.mark.parametrize("late", [0.0, 3600.0])
def test_a_task_that_cannot_be_covered_in_time_is_reported(late: float) -> None:
    table = Table()
    table.reachable = False
    with pytest.raises(TimeoutError):
        table.cover([new_id()], time.monotonic() - late)
    # An existing binding needs no time.
    table.reachable = True
    assert table.cover([], time.monotonic() - late) == 1


def test_a_closed_inbox_covers_nothing() -> None:
    table = Table()
    table.reachable = False
    table.close()
    with pytest.raises(errors.BackendUnavailable, match="closed"):
        table.cover([new_id()], None)


def test_the_error_of_the_reader_is_raised_in_all_waiters() -> None:
    table = Table()
    table.reachable = False
    waiter = watched(table, new_id())
    refusal = errors.DeclarationRefused("differs")
    table._give_up(refusal, attempts=1)
    with pytest.raises(errors.DeclarationRefused, match="differs"):
        table.cover([new_id()], None)
    with pytest.raises(errors.DeclarationRefused, match="differs"):
        waiter.take()


# -- limits ------------------------------------------------------------------------------------


def test_the_least_recently_updated_tasks_are_dropped_first(
    inbox: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox_module, "MAX_KNOWN", 3)
    ids = [new_id() for _ in range(3)]
    for task_id in ids:
        inbox.note_sent(task_id)
    assert all(map(inbox.covers, ids))
    push(inbox, state(ids[0], "STARTED"))
    inbox.note_sent(new_id())
    assert [inbox.covers(task_id) for task_id in ids] == [True, False, True]
    inbox.note_sent(new_id())
    assert [inbox.covers(task_id) for task_id in ids] == [True, False, False]


def test_the_oldest_states_are_dropped_if_they_take_too_many_bytes(
    inbox: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox_module, "MAX_KNOWN_BYTES", 100)
    ids = [new_id() for _ in range(3)]
    for task_id in ids:
        inbox.note_sent(task_id)
    push(inbox, *(state(task_id, body=b"x" * 50) for task_id in ids[:2]))
    assert all(map(inbox.covers, ids))
    # A longer state of the same task counts by its growth, and one byte is too many.
    push(inbox, state(ids[2], "STARTED", body=b"x"))
    assert [inbox.covers(task_id) for task_id in ids] == [False, True, True]
    push(inbox, state(ids[2], "PROGRESS", body=b"x" * 50))
    assert [inbox.covers(task_id) for task_id in ids] == [False, True, True]
    # Consuming a state makes room.
    assert known(inbox, ids[1]) == "SUCCESS"
    late = new_id()
    inbox.note_sent(late)
    push(inbox, state(late, body=b"x" * 50))
    assert known(inbox, ids[2]) == "PROGRESS"
    # A single state that is too large is kept nevertheless, since it has a waiter.
    push(inbox, state(late, "SUCCESS", 0, body=b"x" * 1000))
    assert not inbox.covers(ids[2])
    assert known(inbox, late) == "SUCCESS"


def test_a_waiter_for_a_dropped_task_gets_its_states(
    inbox: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox_module, "MAX_KNOWN", 1)
    task_id = new_id()
    inbox.note_sent(task_id)
    waiter = watched(inbox, task_id)
    inbox.note_sent(new_id())
    assert not inbox.covers(task_id)
    done = state(task_id)
    push(inbox, done)
    assert waiter.take() == [done]


def test_a_look_up_from_before_the_task_was_dropped_is_ignored(
    inbox: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox_module, "MAX_KNOWN", 1)
    task_id = new_id()
    inbox.note_sent(task_id)
    watched(inbox, task_id)
    epoch = inbox.cover([task_id], None)
    push(inbox, state(task_id, "STARTED"))
    inbox.note_sent(new_id())
    inbox.install({task_id: []}, epoch)
    # It would report a started task as pending.
    assert known(inbox, task_id) == "?"


def test_the_oldest_of_too_many_sent_tasks_count_as_foreign(
    inbox: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox_module, "MAX_SENT", 2)
    ids = [new_id() for _ in range(3)]
    for task_id in ids:
        inbox.note_sent(task_id)
    assert inbox.unbound(ids) == {ids[0]}
    # Their known states are still right.
    assert inbox.covers(ids[0])


# -- pushes ------------------------------------------------------------------------------------


def test_messages_that_are_no_task_states_change_nothing(inbox: Table) -> None:
    task_id = new_id()
    inbox.note_sent(task_id)
    waiter = watched(inbox, task_id)
    for kind in (GROUP, PART, PLAN):
        push(inbox, state(task_id, kind=kind))
    assert known(inbox, task_id) is None
    assert waiter.take() == []
    assert (inbox.received, inbox.rejected) == (0, 0)


def test_a_foreign_message_is_counted_and_logged_once(
    inbox: Table, caplog: pytest.LogCaptureFixture
) -> None:
    task_id = new_id()
    inbox.note_sent(task_id)
    with caplog.at_level(logging.DEBUG, inbox_module.__name__):
        for _ in range(3):
            inbox._receive(Message(b"x", correlation_id=task_id, type="somebody's"))
    assert [record.levelno for record in caplog.records] == [
        logging.WARNING,
        logging.DEBUG,
        logging.DEBUG,
    ]
    assert "somebody's" in caplog.text
    push(inbox, state(task_id, "STARTED"))
    assert (inbox.received, inbox.rejected) == (1, 3)
    assert known(inbox, task_id) == "STARTED"


# -- a waiter ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wake",
    [
        Waiter.poke,
        lambda waiter: waiter.feed(state("t")),
        lambda waiter: waiter.uncover(["t"]),
        lambda waiter: waiter.fail(OSError("lost")),
    ],
    ids=["poke", "feed", "uncover", "fail"],
)
def test_a_waiter_is_woken_by_each_of_its_events(wake: Callable[[Waiter], None]) -> None:
    calls: List[None] = []
    waiter = Waiter(lambda: calls.append(None))
    assert not waiter.wait(0)
    wake(waiter)
    assert waiter.wait(0)
    assert len(calls) == 1


def test_taking_the_states_empties_the_waiter() -> None:
    waiter = Waiter()
    one, other = state("t", "STARTED"), state("t")
    waiter.feed(one)
    waiter.feed(other)
    assert waiter.take() == [one, other]
    assert not waiter.wait(0)
    assert waiter.take() == []


def test_a_failure_is_raised_once_and_keeps_earlier_states() -> None:
    waiter = Waiter()
    done = state("t")
    waiter.feed(done)
    failure = OSError("lost")
    waiter.fail(failure)
    with pytest.raises(OSError, match="lost") as caught:
        waiter.take()
    assert caught.value is failure
    assert waiter.take() == [done]


# -- any order of events -----------------------------------------------------------------------

IDS = [*(f"0f3b2c4e-8d1a-4a52-9a4b-6f2a1c7d8e{n}" for n in range(90, 94)), "own"]
ids = st.sampled_from(IDS)
sets_of_ids = st.sets(ids, min_size=1)
names = st.sampled_from(["STARTED", "PROGRESS", "ABORTED", "RETRY", "FAILURE", "SUCCESS"])


class LookUp:
    """A process that looks tasks up to have them covered, step by step."""

    def __init__(self, wanted: List[str]) -> None:
        self.wanted = wanted
        self.waiter = Waiter()
        self.epoch: Optional[int] = None
        self.found: Optional[Dict[str, List[StateMessage]]] = None
        #: The states that it must receive, since it was watching.
        self.due: List[StateMessage] = []


# Named, since old versions of Hypothesis look for the source of a lambda at every step.
def something_is_under_way(events: Events) -> bool:
    return bool(events.under_way)


def has_watchers(events: Events) -> bool:
    return bool(events.look_ups)


class Events(RuleBasedStateMachine):
    """A store with all states, an inbox that receives some of them later, and its answers."""

    MAX_KNOWN = 3
    MAX_BYTES = 25

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(inbox_module, "MAX_KNOWN", self.MAX_KNOWN)
        self.patch.setattr(inbox_module, "MAX_KNOWN_BYTES", self.MAX_BYTES)
        self.patch.setattr(inbox_module, "MAX_SENT", 3)
        self.table = Table(shards=2)
        self.times = itertools.count(100)
        self.store: Dict[str, List[StateMessage]] = {task_id: [] for task_id in IDS}
        self.ours: set[str] = set()
        #: States in flight to the inbox.
        self.under_way: Deque[StateMessage] = collections.deque()
        self.look_ups: List[LookUp] = []

    def teardown(self) -> None:
        self.patch.undo()

    @initialize(opened=st.booleans())
    def begin(self, opened: bool) -> None:
        if opened:
            self.table.open()

    @rule(task_id=ids)
    def send(self, task_id: str) -> None:
        # Tasks of other senders are not sent here too, but own tasks may be sent again.
        if task_id in self.ours or not self.store[task_id]:
            # Celery does not reuse an id after so long that it was dropped from the own tasks.
            if task_id in self.ours and task_id not in self.table._sent:
                return
            self.ours.add(task_id)
            self.table.note_sent(task_id)

    @rule(
        task_id=ids,
        name=names,
        late=st.integers(0, 60),
        size=st.integers(0, 12),
        here=st.booleans(),
    )
    def publish(self, task_id: str, name: str, late: int, size: int, here: bool) -> None:
        # Clocks differ: a state published later may carry an earlier time.
        published = next(self.times) * 60 - late * 60
        new = state(task_id, name, published, b"x" * size)
        self.store[task_id].append(new)
        if self.table.brings(task_id, task_id in self.ours):
            self.under_way.append(new)
        if here:
            self.table.note_stored(new)

    @precondition(something_is_under_way)
    @rule(count=st.integers(1, 4))
    def bring(self, count: int) -> None:
        for _ in range(min(count, len(self.under_way))):
            brought = self.under_way.popleft()
            for look_up in self.look_ups:
                if brought.id in look_up.wanted:
                    look_up.due.append(brought)
            push(self.table, brought)

    @rule(wanted=sets_of_ids)
    def watch(self, wanted: set[str]) -> None:
        look_up = LookUp(sorted(wanted))
        for task_id in look_up.wanted:
            found = self.table._known.get(task_id)
            if found is not None:
                look_up.due.append(found)
        self.table.watch(look_up.wanted, look_up.waiter)
        uncovered = {task_id for task_id in wanted if not self.table.covers(task_id)}
        assert look_up.waiter.take_uncovered() == uncovered
        self.look_ups.append(look_up)

    @precondition(has_watchers)
    @rule(data=st.data())
    def continue_a_look_up(self, data: st.DataObject) -> None:
        look_up = data.draw(st.sampled_from(self.look_ups))
        if look_up.epoch is None:
            look_up.epoch = self.table.cover(look_up.wanted, None)
            assert self.table.unbound(look_up.wanted) == set()
        elif look_up.found is None:
            look_up.found = {task_id: list(self.store[task_id]) for task_id in look_up.wanted}
        else:
            self.table.install(look_up.found, look_up.epoch)
            look_up.epoch = look_up.found = None

    @precondition(has_watchers)
    @rule(data=st.data(), consumed=st.booleans())
    def stop_watching(self, data: st.DataObject, consumed: bool) -> None:
        look_up = data.draw(st.sampled_from(self.look_ups))
        self.look_ups.remove(look_up)
        self.table.unwatch(look_up.wanted, look_up.waiter, consumed)
        assert look_up.waiter.take() == look_up.due

    @rule(task_id=ids)
    def ask(self, task_id: str) -> None:
        try:
            self.table.known(task_id)
        except KeyError:
            assert not self.table.covers(task_id)

    @rule(task_id=ids)
    def discard(self, task_id: str) -> None:
        self.table.discard(task_id)
        assert not self.table.covers(task_id)

    @rule()
    def lose(self) -> None:
        self.under_way.clear()
        for look_up in self.look_ups:
            look_up.waiter.take_uncovered()
        self.table.lose()
        for look_up in self.look_ups:
            assert look_up.waiter.take_uncovered() == set(look_up.wanted)

    @invariant()
    def nothing_is_missing_of_what_is_covered(self) -> None:
        for task_id, found in self.table._known.items():
            under_way = [each for each in self.under_way if each.id == task_id]
            # Together with the states in flight, it equals the store.
            assert fold([*([found] if found else []), *under_way]) == fold(self.store[task_id])

    @invariant()
    def the_table_is_bounded_and_counted(self) -> None:
        kept = self.table._known
        size = sum(len(found.body) for found in kept.values() if found is not None)
        assert size == self.table._known_bytes
        assert len(kept) <= self.MAX_KNOWN
        assert size <= self.MAX_BYTES or len(kept) == 1

    @invariant()
    def nothing_is_kept_for_former_watchers(self) -> None:
        watched_ids = {task_id for look_up in self.look_ups for task_id in look_up.wanted}
        assert set(self.table._waiters) == watched_ids
        assert set(self.table._early) <= watched_ids
        assert self.table._outdated <= watched_ids
        # Nor for look-ups whose findings will be ignored.
        assert not self.table._outdated & self.table._early.keys()


def test_covered_states_are_right_after_any_events() -> None:
    run_state_machine_as_test(Events, settings=settings(stateful_step_count=40))
