"""The table of tasks and shards: its transitions, and what it answers in each state.

There is no broker here, and no clock: the tests say what happens, and when.
"""

from __future__ import annotations

from typing import Any, Iterable, List

import pytest

from celery_amqp_results.feed import bindings, views
from celery_amqp_results.feed import table as table_module
from celery_amqp_results.feed.bindings import ALL, Action
from celery_amqp_results.feed.table import Table, Unread
from celery_amqp_results.protocol import page
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.names import Topology
from celery_amqp_results.protocol.page import Census, number_of
from celery_amqp_results.protocol.ranking import is_lasting
from tests.unit.fakes import new_id, state

SHARDS = 16
TOPOLOGY = Topology("unit", SHARDS, "classic")


def id_in(shard: int) -> str:
    """Return an id that a shard keeps."""
    return next(each for each in iter(new_id, "") if TOPOLOGY.shard(each) == shard)


def known(table: Table, task_id: str, now: float = 100.0, sure: bool = True) -> Any:
    """Return the name of the state, or ``"?"`` where the store has to be asked."""
    try:
        found = table.recall(task_id, now, wall=0, sure=sure)
    except Unread:
        return "?"
    return found and found.state


def bind(table: Table, now: float) -> List[Action]:
    """Do what the table wants done; return it."""
    actions = table.actions(now)
    for action in actions:
        if action.bind:
            table.bound(action.key, now)
    return actions


def count(table: Table, shard: int, now: float, states: Iterable[StateMessage] = ()) -> None:
    """Take a census of a shard that holds *states*, all of them loose."""
    look = table.begin((), now, (shard,))
    census = Census()
    for each in states:
        census.add(each)
    table.end(look, {}, {shard: census}, now)


@pytest.fixture
def table() -> Table:
    """A table with a connection since 0."""
    made = Table(TOPOLOGY, limit=1024 * 1024)
    made.opened(0.0)
    return made


@pytest.fixture
def live(table: Table) -> Table:
    """The same, with the view of shard 3 live since 10."""
    table.cover([id_in(3)])
    bind(table, 5.0)
    count(table, 3, 10.0)
    return table


def test_each_connection_has_a_number_of_its_own() -> None:
    table = Table(TOPOLOGY, limit=1024)
    epochs = [table.epoch]
    for now in (1.0, 2.0):
        table.opened(now)
        epochs.append(table.epoch)
        table.lost()
    assert epochs == [0, 1, 2]
    assert (table.epoch, table.connections) == (0, 2)


# -- from absent to live, and back ----------------------------------------------------------------


def test_one_read_binds_nothing_and_the_second_binds_the_shard(table: Table) -> None:
    task_id = id_in(3)
    table.asked([task_id], 1.0)
    assert bind(table, 1.0) == []
    table.asked([task_id], 2.0)
    assert bind(table, 2.0) == [Action(True, 3)]
    # It is requested once.
    assert bind(table, 2.0) == []


def test_two_reads_bind_their_shard_at_any_time_and_a_bound_one_is_not_bound_again(
    table: Table,
) -> None:
    task_id = id_in(3)
    for now in (1000.0, 1000.0 + table_module.READ_AGAIN):
        table.asked([task_id], now)
    assert bind(table, 1100.0) == [Action(True, 3)]
    assert table.cover([task_id, id_in(4)]) == {4}
    assert bind(table, 1101.0) == [Action(True, 4)]


def test_frequent_reads_of_a_bound_shard_do_not_bind_the_others(live: Table) -> None:
    for number in range(2 * bindings.MANY_READS):
        live.asked([id_in(3)], 10.0 + number / 100)
    assert bind(live, 11.0) == []


def test_reads_of_own_tasks_want_an_inbox_if_they_are_frequent_and_there_is_none() -> None:
    table, own = Table(TOPOLOGY, limit=1024 * 1024), new_id()
    table.sent(own, 0.0)
    table.asked([id_in(1)], 1.0)
    table.asked([id_in(2)], 2.0)
    for number in range(1, 4):
        table.asked([own], number * (table_module.READ_AGAIN + 1))
    assert not table.bindings.wants_inbox
    table.asked([own], 3 * (table_module.READ_AGAIN + 1) + 1)
    assert table.bindings.wants_inbox
    # This stays.
    table.asked([own], 1000.0)
    assert table.bindings.wants_inbox


def test_reads_of_own_tasks_want_nothing_while_there_is_an_inbox(table: Table) -> None:
    own = new_id()
    table.sent(own, 1.0)
    for now in (2.0, 3.0):
        table.asked([own], now)
    assert not table.bindings.wants_inbox


def test_reads_that_are_far_apart_bind_nothing(table: Table) -> None:
    task_id = id_in(3)
    for number in range(5):
        table.asked([task_id], number * (table_module.READ_AGAIN + 1))
    assert bind(table, 1000.0) == []


def test_a_bound_shard_is_not_known_before_a_census(table: Table) -> None:
    task_id = id_in(3)
    table.cover([task_id])
    bind(table, 2.0)
    assert known(table, task_id) == "?"
    # One that begins too early does not do.
    count(table, 3, 2.0 + views.STEADY / 2)
    assert known(table, task_id) == "?"
    count(table, 3, 2.0 + views.STEADY)
    assert known(table, task_id) is None
    assert table.memory.live_views == 1


def test_a_live_view_knows_what_was_stored_pushed_and_neither(table: Table) -> None:
    stored, pushed, early, nothing = (id_in(3) for _ in range(4))
    table.cover([stored])
    bind(table, 0.0)
    # Pushed before the census, and not in the shard yet.
    table.pushed(state(early, "STARTED"), 4.0)
    count(table, 3, 5.0, [state(stored, "STARTED"), state(stored, "SUCCESS")])
    table.pushed(state(pushed, "FAILURE"), 6.0)
    found = [known(table, each) for each in (stored, pushed, early, nothing)]
    assert found == ["SUCCESS", "FAILURE", "STARTED", None]


def test_what_is_pushed_during_the_census_counts(live: Table) -> None:
    shard, task_id = 4, id_in(4)
    live.cover([task_id])
    bind(live, 10.0)
    look = live.begin([task_id], 20.0)
    live.pushed(state(task_id, "SUCCESS"), 20.1)
    live.end(look, {task_id: []}, {shard: Census()}, 20.2)
    assert known(live, task_id) == "SUCCESS"


def test_what_is_pushed_of_other_tasks_during_the_census_counts(table: Table) -> None:
    task_id, other = id_in(4), id_in(4)
    table.cover([task_id])
    bind(table, 10.0)
    look = table.begin([task_id], 20.0)
    table.pushed(state(other, "STARTED"), 20.1)
    table.end(look, {task_id: []}, {4: Census()}, 20.2)
    assert [known(table, each) for each in (task_id, other)] == [None, "STARTED"]


def test_a_live_view_follows_the_states_of_a_task(live: Table) -> None:
    task_id, found = id_in(3), []
    for name in ("STARTED", "SUCCESS", "FAILURE"):
        live.pushed(state(task_id, name), 11.0)
        found.append(known(live, task_id))
    assert found == ["STARTED", "SUCCESS", "SUCCESS"]


def test_a_look_up_takes_a_census_of_those_shards_that_are_bound(live: Table) -> None:
    look = live.begin([id_in(1), id_in(3)], 100.0, (0, 2))
    assert look.census == {3}


def test_a_census_that_is_not_due_is_not_taken_in(live: Table) -> None:
    task_id = id_in(3)
    live.pushed(state(task_id), 11.0)
    count(live, 3, 24.0)
    assert known(live, task_id) == "SUCCESS"
    # It is due now, and the state was deleted.
    count(live, 3, 25.0)
    assert known(live, task_id) is None


def test_a_census_during_which_the_shard_was_unbound_is_not_taken_in(table: Table) -> None:
    late = bindings.LEAST_BOUND
    table.cover([id_in(3)])
    bind(table, 0.0)
    look = table.begin((), late, (3,))
    assert look.census == {3}
    for _ in range(bindings.PAYS + 1):
        table.pushed(state(id_in(3)), late)
    assert bind(table, late) == [Action(False, 3)]
    table.end(look, {}, {3: Census()}, late)
    assert table.memory.live_views == 0


def test_what_is_pushed_during_a_look_up_without_a_census_counts(table: Table) -> None:
    task_id = id_in(4)
    table.cover([task_id])
    bind(table, 10.0)
    look = table.begin([task_id], 20.0)
    table.pushed(state(task_id, "STARTED"), 20.1)
    table.end(look, {task_id: []}, {}, 20.2)
    assert known(table, task_id) == "STARTED"


def test_of_a_task_in_a_page_and_outside_only_the_store_knows_the_state(live: Table) -> None:
    packed, loose = id_in(3), id_in(3)
    for task_id in (packed, loose):
        live.pushed(state(task_id, "STARTED"), 29.0)
    look = live.begin((), 30.0, (3,))
    census = Census()
    for task_id in (packed, loose):
        census.add(state(task_id, "RETRY"))
    census.add_page(page.encode([state(packed)]))
    live.end(look, {}, {3: census}, 30.0)
    assert [known(live, each) for each in (packed, loose)] == ["?", "RETRY"]


def test_results_in_pages_are_known_to_be_there_and_looked_up(live: Table) -> None:
    packed, other = id_in(4), id_in(4)
    done = state(packed)
    live.cover([packed])
    bind(live, 10.0)
    look = live.begin((), 20.0, (4,))
    census = Census()
    census.add_page(page.encode([done]))
    live.end(look, {}, {4: census}, 20.0)
    assert known(live, packed) == "?"
    assert known(live, other) is None
    # A later push may count less than what is in the page.
    live.pushed(state(packed, "FAILURE"), 21.0)
    assert known(live, packed) == "?"
    look = live.begin([packed], 22.0)
    live.end(look, {packed: [done]}, {}, 22.0)
    assert known(live, packed) == "SUCCESS"


def test_a_lost_connection_ends_everything_and_the_next_read_binds_again(live: Table) -> None:
    task_id = id_in(3)
    live.pushed(state(task_id), 11.0)
    look = live.begin([task_id], 12.0)
    live.lost()
    assert known(live, task_id) == "?"
    assert (live.memory.size, live.epoch) == (0, 0)
    live.opened(13.0)
    live.end(look, {task_id: [state(task_id)]}, {3: Census()}, 14.0)
    assert known(live, task_id) == "?"
    live.asked([task_id], 15.0)
    assert bind(live, 15.0) == [Action(True, 3)]


def test_a_look_up_of_an_own_task_from_before_the_connection_was_lost_is_ignored(
    table: Table,
) -> None:
    table.sent("mine", 2.0)
    look = table.begin(["mine"], 3.0)
    table.lost()
    table.opened(4.0)
    table.end(look, {"mine": [state("mine", "STARTED")]}, {}, 5.0)
    assert known(table, "mine", sure=False) == "?"


def test_own_tasks_are_unknown_when_the_connection_was_lost(table: Table) -> None:
    own = new_id()
    table.sent(own, 2.0)
    table.lost()
    table.opened(3.0)
    assert known(table, own, 5.0, sure=False) == "?"


def test_a_binding_pays_for_a_number_of_states_after_each_read(live: Table) -> None:
    late = 10.0 + bindings.LEAST_BOUND
    for _ in range(2):
        live.asked([id_in(3)], late)
        for _ in range(bindings.PAYS):
            live.pushed(state(id_in(3)), late)
        assert bind(live, late) == []
    # What this process has published was not pushed.
    live.pushed(state(id_in(3)), late, own=True)
    assert bind(live, late) == []
    live.asked([id_in(5)], late)
    live.pushed(state(id_in(3)), late)
    assert bind(live, late) == [Action(False, 3)]
    # The next read counts as the first one again, but not in other shards.
    live.asked([id_in(3), id_in(5)], late)
    assert bind(live, late) == [Action(True, 5)]
    live.asked([id_in(3)], late)
    assert bind(live, late) == [Action(True, 3)]


def test_a_view_that_nobody_reads_is_dropped_when_it_costs_more_than_reads(live: Table) -> None:
    late = 10.0 + bindings.LEAST_BOUND
    for number in range(bindings.PAYS + 1):
        live.pushed(state(id_in(3)), 10.0 + number / 1000)
    # This happens later, so that bindings do not churn.
    assert bind(live, 11.0) == []
    live.pushed(state(id_in(3)), late)
    assert bind(live, late) == [Action(False, 3)]
    assert live.memory.live_views == 0
    assert live.memory.size == 0


@pytest.mark.parametrize("why", ["read", "watched"])
def test_a_view_that_is_used_is_kept(live: Table, why: str) -> None:
    task_id = id_in(3)
    if why == "watched":
        live.bindings.watched(TOPOLOGY.shard(task_id), 1)
    for number in range(3 * bindings.PAYS):
        if why == "read" and number % 50 == 0:
            live.asked([task_id], 100.0)
        live.pushed(state(id_in(3)), 100.0)
    assert bind(live, 100.0) == []
    assert live.memory.live_views == 1


def test_many_bound_shards_are_bound_by_one_key(table: Table) -> None:
    for shard in range(SHARDS // 4 + 1):
        table.cover([id_in(shard)])
    actions = bind(table, 0.0)
    assert Action(True, ALL) in actions
    assert table.cover([id_in(shard) for shard in range(SHARDS)]) == set()
    # The others go when they have stood long enough, and what is known stays.
    count(table, 0, 5.0)
    actions = bind(table, bindings.LEAST_BOUND)
    assert {action.bind for action in actions} == {False}
    assert table.memory.live_views == 1
    assert len(table.uncounted(40.0)) == SHARDS - 1


def test_no_census_is_taken_unasked_before_the_binding_of_all_shards_is_steady(
    table: Table,
) -> None:
    table.cover([id_in(3)])
    bind(table, 0.0)
    assert table.uncounted(5.0) == []
    table.cover([id_in(shard) for shard in range(SHARDS)])
    bind(table, 10.0)
    assert table.uncounted(10.0 + views.STEADY / 2) == []
    assert table.uncounted(10.0 + views.STEADY) == list(range(SHARDS))


def test_frequent_reads_of_different_shards_bind_all(table: Table) -> None:
    for number in range(bindings.MANY_READS):
        table.asked([id_in(number % SHARDS)], number * 0.1)
    assert Action(True, ALL) in bind(table, 3.0)


def test_the_key_for_all_shards_is_dropped_when_it_does_not_pay(table: Table) -> None:
    for number in range(bindings.MANY_READS):
        table.asked([id_in(number % SHARDS)], number * 0.1)
    bind(table, 3.0)
    bind(table, 40.0)
    count(table, 0, 41.0)
    assert table.memory.live_views == 1
    late = 50.0 + bindings.LEAST_BOUND
    table.asked([id_in(shard) for shard in range(SHARDS)], late)
    for _ in range(bindings.PAYS * SHARDS + 1):
        table.pushed(state(new_id()), late)
    assert Action(False, ALL) in bind(table, late)
    assert 0 not in table.bindings
    assert table.memory.live_views == 0
    # The next read of each shard counts as the first one again.
    table.asked([id_in(shard) for shard in range(SHARDS)], late)
    assert bind(table, late) == []


def test_a_live_view_is_checked_ever_more_seldom(live: Table) -> None:
    task_id, now, pauses = id_in(3), 10.0, []
    for _ in range(7):
        before = now
        while not live.is_due(task_id, now):
            now += 1.0
        pauses.append(now - before)
        count(live, 3, now)
    assert pauses == [15, 30, 60, 120, 240, 300, 300]


def test_only_a_live_view_is_checked(table: Table) -> None:
    assert not table.is_due(id_in(3), 50.0)
    table.cover([id_in(3)])
    bind(table, 5.0)
    assert not table.is_due(id_in(3), 50.0)
    look = table.begin((), 50.0, (3,))
    assert not table.checks(look)
    table.end(look, {}, {3: Census()}, 50.0)
    look = table.begin((), 100.0, (3,))
    assert table.checks(look)
    assert not table.checks(table.begin([id_in(4)], 100.0))
    table.lost()
    table.opened(101.0)
    assert not table.checks(look)


def test_views_that_are_due_together_are_checked_one_after_the_other(table: Table) -> None:
    table.asked([id_in(shard) for shard in range(SHARDS)] * 2, 0.0)
    table.asked([id_in(shard) for shard in range(SHARDS)], 0.5)
    bind(table, 1.0)
    for shard in range(SHARDS):
        count(table, shard, 3.0)
    due = [shard for shard in range(SHARDS) if table.is_due(id_in(shard), 50.0)]
    assert due == [0]
    # Other tasks of the same shard belong to the same check.
    assert table.is_due(id_in(0), 50.0)
    count(table, 0, 50.0)
    later = 50.0 + table_module.CHECK_PAUSE
    assert [shard for shard in range(SHARDS) if table.is_due(id_in(shard), later)] == [1]


def test_a_check_drops_what_was_deleted_and_takes_in_what_was_missed(live: Table) -> None:
    deleted, fresh, missed = (id_in(3) for _ in range(3))
    live.pushed(state(deleted), 11.0)
    live.pushed(state(fresh), 29.0)
    look = live.begin((), 30.0, (3,))
    census = Census()
    census.add(state(missed, published=1))
    live.end(look, {}, {3: census}, 30.0, wall=table_module.LATE + 2)
    found = [known(live, each) for each in (deleted, fresh, missed)]
    assert found == [None, "SUCCESS", "SUCCESS"]
    assert missed in live.missed
    live.lost()
    assert live.missed == ""


def test_a_state_that_was_pushed_or_may_still_be_pushed_was_not_missed(live: Table) -> None:
    pushed, young = state(id_in(3), published=1), state(id_in(3), published=3)
    live.pushed(pushed, 11.0)
    look = live.begin((), 30.0, (3,))
    census = Census()
    for each in (pushed, young):
        census.add(each)
    live.end(look, {}, {3: census}, 30.0, wall=table_module.LATE + 2)
    assert known(live, young.id) == "SUCCESS"
    assert live.missed == ""


# -- tasks ----------------------------------------------------------------------------------------


def test_an_own_task_is_known_since_it_was_sent(table: Table) -> None:
    early, task_id = new_id(), new_id()
    table.sent(early, 0.5)
    table.sent(task_id, 2.0)
    assert known(table, task_id) is None
    # A waiter may rely on the other one too.
    assert known(table, early) == "?"
    with pytest.raises(Unread):
        table.recall(early, 2.0, 0)
    assert known(table, early, sure=False) is None
    table.pushed(state(task_id, "STARTED"), 3.0)
    assert known(table, task_id) == "STARTED"


def test_an_own_task_is_relied_on_when_the_connection_has_stood_for_a_moment() -> None:
    table, early, late = Table(TOPOLOGY, limit=1024 * 1024), new_id(), new_id()
    table.opened(100.0)
    table.sent(early, 100.0 + views.STEADY / 2)
    table.sent(late, 100.0 + views.STEADY)
    assert [known(table, each, 105.0) for each in (early, late)] == ["?", None]
    look = table.begin([early], 100.0 + views.STEADY / 2)
    table.end(look, {early: [state(early, "STARTED")]}, {}, 102.0)
    assert known(table, early, 105.0) == "?"
    assert known(table, early, 105.0, sure=False) == "STARTED"


def test_what_was_looked_up_of_an_own_task_is_known_for_a_while(table: Table) -> None:
    table.sent("mine", 2.0)
    look = table.begin(["mine"], 5.0)
    table.end(look, {"mine": [state("mine")]}, {}, 5.0)
    assert known(table, "mine", 5.0 + table_module.KEEP_FINAL) == "SUCCESS"
    assert known(table, "mine", 6.0 + table_module.KEEP_FINAL) == "?"


def test_a_state_that_was_just_pushed_may_not_lie_in_the_store_yet(table: Table) -> None:
    own = new_id()
    table.sent(own, 2.0)
    table.pushed(state(own, "STARTED"), 5.0)
    look = table.begin([own], 6.0)
    table.end(look, {own: []}, {}, 6.0)
    assert known(table, own) == "STARTED"
    # Later the store is right: the state has expired, or was deleted.
    look = table.begin([own], 7.0 + views.SETTLED)
    table.end(look, {own: []}, {}, 17.0)
    assert known(table, own) is None


def test_the_tasks_that_this_process_has_sent_are_remembered_in_a_limited_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(table_module, "MAX_SENT", 2)
    table = Table(TOPOLOGY, limit=1024)
    for task_id in "abc":
        table.sent(task_id, 1.0)
    assert [table.is_own(task_id) for task_id in "abc"] == [False, True, True]


def test_what_was_pushed_just_before_a_look_up_may_not_lie_in_the_store_yet(table: Table) -> None:
    task_id = id_in(3)
    table.cover([task_id])
    bind(table, 5.0)
    table.pushed(state(task_id, "STARTED"), 5.1)
    look = table.begin([task_id], 5.2)
    table.end(look, {task_id: []}, {}, 5.2)
    assert known(table, task_id, sure=False) == "STARTED"
    # A state that was pushed long ago lies there, or was removed.
    late = 6.0 + views.SETTLED
    look = table.begin([task_id], late)
    table.end(look, {task_id: []}, {}, late)
    assert known(table, task_id) is None


@pytest.mark.parametrize("task_id", ["mine", "0F3B2C4E-8D1A-4A52-9A4B-6F2A1C7D8E90"])
def test_an_id_that_may_have_been_used_before_is_looked_up(table: Table, task_id: str) -> None:
    table.sent(task_id, 2.0)
    assert known(table, task_id) == "?"
    assert table.is_own(task_id)
    assert table.cover([task_id]) == set()


def test_a_task_that_is_sent_again_is_not_new(table: Table) -> None:
    task_id = new_id()
    table.sent(task_id, 2.0)
    table.discard(task_id)
    table.sent(task_id, 3.0)
    assert known(table, task_id) == "?"


def test_own_tasks_stay_known_when_the_view_of_their_shard_is_dropped(live: Table) -> None:
    # The ids may have been used before, so that only the view tells of them.
    mine = [f"mine-{number}" for number in range(1000)]
    pushed, gone, counted, *_ = (each for each in mine if TOPOLOGY.shard(each) == 3)
    late = 10.0 + bindings.LEAST_BOUND
    for task_id in (pushed, gone, counted):
        live.sent(task_id, 11.0)
    count(live, 3, late, [state(counted, "STARTED")])
    live.forgotten(gone, late)
    live.pushed(state(pushed, "STARTED"), late)
    for _ in range(bindings.PAYS):
        live.pushed(state(id_in(3)), late)
    assert bind(live, late) == [Action(False, 3)]
    assert [known(live, each) for each in (pushed, gone, counted)] == ["STARTED", None, "STARTED"]


def test_a_final_state_outside_a_live_view_is_known_for_a_while(table: Table) -> None:
    task_id = new_id()
    table.sent(task_id, 2.0)
    table.pushed(state(task_id), 3.0)
    assert known(table, task_id, 3.0 + table_module.KEEP_FINAL) == "SUCCESS"
    assert known(table, task_id, 4.0 + table_module.KEEP_FINAL) == "?"


def test_a_state_that_has_expired_is_looked_up(live: Table) -> None:
    task_id = id_in(3)
    live.pushed(state(task_id, published=1_000_000, expiration=1000), 11.0)
    assert live.recall(task_id, 11.0, 1_999_999) is not None
    with pytest.raises(Unread):
        live.recall(task_id, 11.0, 2_000_000)


def test_what_is_forgotten_is_known_to_be_gone(live: Table) -> None:
    task_id, own = id_in(3), id_in(5)
    live.sent(own, 11.0)
    for each in (task_id, own):
        live.pushed(state(each), 11.0)
        live.forgotten(each, 12.0)
    assert known(live, task_id) is None
    # Of this one only the store can tell.
    assert known(live, own, 12.0) == "?"


def test_forgetting_a_task_keeps_what_was_pushed_of_others(table: Table) -> None:
    gone, other = id_in(3), id_in(3)
    table.cover([gone])
    bind(table, 0.0)
    for task_id in (gone, other):
        table.pushed(state(task_id), 4.0)
    table.forgotten(gone, 4.5)
    # Neither lies in the shard yet.
    count(table, 3, 5.0)
    assert [known(table, each) for each in (gone, other)] == [None, "SUCCESS"]


def test_what_a_live_view_knows_is_not_discarded(live: Table) -> None:
    task_id, own = id_in(3), id_in(5)
    live.sent(own, 11.0)
    live.pushed(state(task_id, "STARTED"), 11.0)
    for each in (task_id, own, new_id()):
        live.discard(each)
    assert [known(live, each) for each in (task_id, own)] == ["STARTED", "?"]


def test_a_look_up_that_forgetting_has_overtaken_is_not_taken_in(live: Table) -> None:
    task_id = id_in(3)
    look = live.begin([task_id], 30.0)
    census = Census()
    census.add(state(task_id))
    live.forgotten(task_id, 30.1)
    live.end(look, {task_id: [state(task_id)]}, {3: census}, 30.2)
    assert known(live, task_id) is None


@pytest.mark.parametrize("bound", [False, True])
def test_what_was_looked_up_is_kept_where_the_next_states_will_be_pushed(
    table: Table, bound: bool
) -> None:
    task_id = id_in(3)
    if bound:
        table.cover([task_id])
        bind(table, 1.0)
    look = table.begin([task_id], 5.0)
    table.end(look, {task_id: [state(task_id, "STARTED")]}, {}, 5.1)
    assert known(table, task_id) == ("STARTED" if bound else "?")
    assert known(table, task_id, sure=False) == ("STARTED" if bound else "?")


def test_what_was_looked_up_just_after_the_binding_is_only_for_those_that_wait(
    table: Table,
) -> None:
    task_id = id_in(3)
    table.cover([task_id])
    bind(table, 5.0)
    look = table.begin([task_id], 5.0 + views.STEADY / 2)
    table.end(look, {task_id: [state(task_id, "STARTED")]}, {}, 6.0)
    assert known(table, task_id) == "?"
    assert known(table, task_id, sure=False) == "STARTED"


# -- memory ---------------------------------------------------------------------------------------


def test_memory_is_limited_and_what_is_dropped_is_looked_up() -> None:
    table = Table(TOPOLOGY, limit=10_000)
    table.opened(0.0)
    table.cover([id_in(3)])
    bind(table, 0.0)
    count(table, 3, 5.0)
    ids = [id_in(3) for _ in range(100)]
    for task_id in ids:
        table.pushed(state(task_id, body=b"x" * 300), 6.0)
        assert table.memory.size <= 10_000
    assert [known(table, task_id, 7.0) for task_id in (ids[0], ids[-1])] == ["?", "SUCCESS"]
    assert known(table, id_in(3), 7.0) is None


def test_a_census_that_does_not_fit_the_memory_knows_which_tasks_to_look_up() -> None:
    table = Table(TOPOLOGY, limit=10_000)
    table.opened(0.0)
    table.cover([id_in(3)])
    bind(table, 0.0)
    ids = [id_in(3) for _ in range(100)]
    count(table, 3, 5.0, [state(task_id, body=b"x" * 300) for task_id in ids])
    assert table.memory.size <= 10_000 + len(ids) * views.DIGEST_SIZE
    assert {known(table, task_id, 7.0) for task_id in ids} == {"SUCCESS", "?"}
    assert known(table, id_in(3), 7.0) is None


def test_digests_that_are_too_many_end_the_view_that_was_not_read_for_longest() -> None:
    table = Table(TOPOLOGY, limit=10_000)
    table.opened(0.0)
    for shard in (3, 4):
        table.cover([id_in(shard)])
    bind(table, 0.0)
    table.asked([id_in(4)], 1.0)
    for shard in (3, 4):
        look = table.begin((), 5.0, (shard,))
        census = Census()
        census.digests.update(range(shard * 10_000, shard * 10_000 + 700))
        table.end(look, {}, {shard: census}, 5.0)
        table.pushed(state(id_in(shard)), 6.0)
    assert table.memory.live_views == 1
    assert known(table, id_in(4), 7.0) is None
    # It is not counted again at once.
    assert not table.begin((), 8.0, (3,)).census


def test_states_pushed_lately_are_limited_in_bytes(table: Table) -> None:
    table.cover([id_in(3)])
    bind(table, 0.0)
    for number in range(100):
        table.pushed(state(id_in(3), body=b"x" * 10_000), number / 100)
    # States pushed before the last of them are unknown, so the view cannot be live.
    count(table, 3, 1.0)
    assert table.memory.live_views == 0
    count(table, 3, 3.0)
    assert table.memory.live_views == 1


def test_digests_are_found_among_sorted_and_added_ones() -> None:
    numbers = [number_of(new_id()) for _ in range(2000)]
    digests = views.Digests(numbers[:500])
    for number in numbers[500:1500]:
        digests.add(number)
        digests.add(number)
    assert len(digests) == 1500
    assert all(number in digests for number in numbers[:1500])
    assert not any(number in digests for number in numbers[1500:])


def test_a_look_up_that_began_before_the_binding_is_not_taken_in(table: Table) -> None:
    # Found by the simulation: a state is stored between the look-up and the binding.
    task_id = id_in(3)
    look = table.begin([task_id], 1.0)
    table.cover([task_id])
    bind(table, 2.0)
    count(table, 3, 5.0, [state(task_id, "STARTED")])
    table.end(look, {task_id: []}, {}, 6.0)
    assert known(table, task_id) == "STARTED"


def test_a_proof_lasts_for_a_second_and_ends_with_the_connection(table: Table) -> None:
    assert not table.is_proved(0.5)
    table.proved(3.0)
    assert table.is_proved(3.9)
    assert not table.is_proved(4.1)
    # A barrier that was published earlier and came back later adds nothing.
    table.proved(5.0)
    table.proved(4.0)
    assert table.is_proved(5.9)
    table.lost()
    assert not table.is_proved(5.9)
    table.opened(5.9)
    assert not table.is_proved(5.9)


def test_a_lost_connection_proves_nothing_even_just_after_the_start(table: Table) -> None:
    table.lost()
    table.opened(1.0)
    assert not table.is_proved(1.0)


@pytest.mark.parametrize(
    ("name", "lasting"),
    [("SUCCESS", True), ("FAILURE", False), ("REVOKED", False), ("STARTED", False)],
)
def test_only_a_success_lasts(name: str, lasting: bool) -> None:
    assert is_lasting(state(new_id(), name)) is lasting
    assert not is_lasting(None)
