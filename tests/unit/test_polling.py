"""Polling states: how often the store is read, and that the answer is right."""

from __future__ import annotations

import collections
import logging
from typing import Deque, Dict, List, Optional, Set

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from celery_amqp_results import errors
from celery_amqp_results.feed import inbox as inbox_module
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.ranking import fold
from celery_amqp_results.waiting import follower as waiting_module
from celery_amqp_results.waiting.follower import Waiting
from tests.unit.tables import FakeStore, Table, new_id, push, state, timed_out


@pytest.fixture
def inbox() -> Table:
    """An inbox without a connection."""
    return Table()


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def waiting(inbox: Table, store: FakeStore) -> Waiting:
    return Waiting(inbox, store)  # type: ignore[arg-type]


def poll(waiting: Waiting, task_id: str) -> Optional[str]:
    """Return the name of the state of *task_id*, or ``None``."""
    found = waiting.poll([task_id])
    assert list(found) == [task_id]
    one = found[task_id]
    return None if one is None else one.state


def test_a_single_poll_causes_one_look_up_and_nothing_else(
    inbox: Table, store: FakeStore, waiting: Waiting
) -> None:
    task_id = new_id()
    assert poll(waiting, task_id) is None
    assert store.asked == [[task_id]]
    # No connection was opened, nothing is bound, and no waiter is left.
    assert not inbox._epoch
    assert inbox._wanted == set()
    assert inbox._waiters == {}


def test_a_second_poll_binds_the_shard(inbox: Table, store: FakeStore, waiting: Waiting) -> None:
    task_id = new_id()
    assert poll(waiting, task_id) is None
    store.add(state(task_id, "STARTED"))
    assert poll(waiting, task_id) == "STARTED"
    assert [poll(waiting, task_id) for _ in range(3)] == ["STARTED"] * 3
    assert store.asked == [[task_id]] * 2
    push(inbox, state(task_id, "PROGRESS"))
    assert poll(waiting, task_id) == "PROGRESS"
    push(inbox, state(task_id, "SUCCESS"))
    assert poll(waiting, task_id) == "SUCCESS"
    assert store.asked == [[task_id]] * 2
    assert inbox._waiters == {}


def test_a_finished_task_is_looked_up_at_each_poll(
    inbox: Table, store: FakeStore, waiting: Waiting
) -> None:
    task_id = new_id()
    store.add(state(task_id, "FAILURE"))
    for _ in range(3):
        assert poll(waiting, task_id) == "FAILURE"
    assert store.asked == [[task_id]] * 3
    assert not inbox._epoch
    # Another process has forgotten it.
    store.states.clear()
    assert poll(waiting, task_id) is None


def test_a_looked_up_final_state_is_not_cached(
    inbox: Table, store: FakeStore, waiting: Waiting
) -> None:
    task_id = new_id()
    assert poll(waiting, task_id) is None
    store.add(state(task_id, "SUCCESS"))
    assert poll(waiting, task_id) == "SUCCESS"
    # Another process forgets it, and no push reports that.
    store.states.clear()
    assert poll(waiting, task_id) is None


def test_a_finished_task_is_removed_from_the_pending_ones(
    inbox: Table, store: FakeStore, waiting: Waiting
) -> None:
    task_id = new_id()
    assert poll(waiting, task_id) is None
    store.add(state(task_id, "SUCCESS"))
    assert poll(waiting, task_id) == "SUCCESS"
    inbox.lose()
    # Reading a result again opens no connection.
    assert poll(waiting, task_id) == "SUCCESS"
    assert not inbox._epoch


def test_polling_an_own_task_causes_no_look_up(
    inbox: Table, store: FakeStore, waiting: Waiting
) -> None:
    inbox.open()
    task_id = new_id()
    inbox.note_sent(task_id)
    assert poll(waiting, task_id) is None
    assert store.asked == []


def test_many_tasks_are_read_in_one_look_up(
    inbox: Table, store: FakeStore, waiting: Waiting
) -> None:
    inbox.open()
    mine, begun, unknown = new_id(), new_id(), new_id()
    inbox.note_sent(mine)
    store.add(started := state(begun, "STARTED"))
    for _ in range(3):
        assert waiting.poll([mine, begun, unknown]) == {mine: None, begun: started, unknown: None}
    assert store.asked == [sorted([begun, unknown])] * 2


def test_polling_no_task_does_nothing(store: FakeStore, waiting: Waiting) -> None:
    assert waiting.poll([]) == {}
    assert store.asked == []


def test_the_current_of_several_states_is_returned(store: FakeStore, waiting: Waiting) -> None:
    task_id = new_id()
    store.add(state(task_id, "SUCCESS", 2), state(task_id, "STARTED", 3))
    assert poll(waiting, task_id) == "SUCCESS"


def test_a_push_between_binding_and_answer_is_not_lost(
    inbox: Table, store: FakeStore, waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = new_id()
    poll(waiting, task_id)
    read = store.read

    def read_and_push(ids: Set[str], deadline: Optional[float] = None) -> object:
        found = read(ids, deadline)
        push(inbox, state(task_id, "STARTED"))
        return found

    monkeypatch.setattr(store, "read", read_and_push)
    # The state that was read then is still correct.
    assert poll(waiting, task_id) is None
    assert poll(waiting, task_id) == "STARTED"
    assert store.asked == [[task_id]] * 2


def test_without_pushes_each_poll_reads_the_store(
    inbox: Table, store: FakeStore, waiting: Waiting, caplog: pytest.LogCaptureFixture
) -> None:
    task_id = new_id()
    inbox.reachable = False
    store.lookup_timeout = 0.0
    with caplog.at_level(logging.WARNING, waiting_module.__name__):
        assert [poll(waiting, task_id) for _ in range(3)] == [None] * 3
    assert store.asked == [[task_id]] * 3
    assert "cannot be pushed" in caplog.text
    assert inbox._waiters == {}
    inbox.reachable = True
    assert [poll(waiting, task_id) for _ in range(3)] == [None] * 3
    assert store.asked == [[task_id]] * 4


def test_the_store_is_read_again_after_a_lost_connection(
    inbox: Table, store: FakeStore, waiting: Waiting
) -> None:
    task_id = new_id()
    for _ in range(3):
        poll(waiting, task_id)
    inbox.lose()
    store.add(state(task_id, "SUCCESS"))
    assert poll(waiting, task_id) == "SUCCESS"


@pytest.mark.parametrize("times", [0, 1, 2])
def test_a_failed_look_up_never_returns_a_state(
    inbox: Table, store: FakeStore, waiting: Waiting, times: int
) -> None:
    task_id = new_id()
    for _ in range(times):
        poll(waiting, task_id)
    inbox.lose()
    store.failure = timed_out()
    with pytest.raises(errors.LookupTimeout):
        poll(waiting, task_id)
    assert inbox._waiters == {}
    store.failure = None
    store.add(state(task_id, "STARTED"))
    assert poll(waiting, task_id) == "STARTED"


def test_a_forgotten_task_is_no_longer_known(
    inbox: Table, store: FakeStore, waiting: Waiting
) -> None:
    task_id = new_id()
    store.add(state(task_id, "STARTED"))
    for _ in range(3):
        assert poll(waiting, task_id) == "STARTED"
    store.states.clear()
    waiting.discard(task_id)
    assert poll(waiting, task_id) is None
    # The next poll is like the first: nothing is bound for it.
    assert not inbox.covers(task_id)


def test_the_number_of_remembered_pending_tasks_is_limited(
    inbox: Table, waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting_module, "MAX_POLLED", 2)
    ids = [new_id() for _ in range(3)]
    for task_id in ids:
        poll(waiting, task_id)
    poll(waiting, ids[0])
    assert not inbox.covers(ids[0])
    # That displaced the second one.
    poll(waiting, ids[2])
    assert inbox.covers(ids[2])
    poll(waiting, ids[1])
    assert not inbox.covers(ids[1])


# -- any order of events -----------------------------------------------------------------------

IDS = [f"0f3b2c4e-8d1a-4a52-9a4b-6f2a1c7d8e{n}" for n in range(90, 94)]
ids = st.sampled_from(IDS)
names = st.sampled_from(["STARTED", "PROGRESS", "ABORTED", "RETRY", "FAILURE", "SUCCESS"])


# Named, since old versions of Hypothesis look for the source of a lambda at every step.
def something_is_under_way(events: Events) -> bool:
    return bool(events.under_way)


class Events(RuleBasedStateMachine):
    """Tasks that change and finish while they are polled, and connections that are lost."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(inbox_module, "MAX_KNOWN", 3)
        self.patch.setattr(waiting_module.logger, "disabled", True)
        self.table = Table(shards=2)
        self.store = FakeStore()
        self.store.lookup_timeout = 0.0
        self.waiting = Waiting(self.table, self.store)  # type: ignore[arg-type]
        self.ours: Set[str] = set()
        self.under_way: Deque[StateMessage] = collections.deque()

    def teardown(self) -> None:
        self.patch.undo()

    @rule(task_id=ids)
    def send(self, task_id: str) -> None:
        if not self.store.states.get(task_id):
            self.ours.add(task_id)
            self.table.note_sent(task_id)

    @rule(task_id=ids, name=names, here=st.booleans())
    def publish(self, task_id: str, name: str, here: bool) -> None:
        new = state(task_id, name)
        self.store.add(new)
        if self.table.brings(task_id, task_id in self.ours):
            self.under_way.append(new)
        if here:
            self.table.note_stored(new)

    @precondition(something_is_under_way)
    @rule()
    def bring(self) -> None:
        push(self.table, self.under_way.popleft())

    @rule(wanted=st.sets(ids, min_size=1))
    def poll(self, wanted: Set[str]) -> None:
        try:
            found: Dict[str, Optional[StateMessage]] = self.waiting.poll(sorted(wanted))
        except errors.LookupTimeout:
            assert self.store.failure is not None
            return
        assert found.keys() == wanted
        for task_id, known in found.items():
            coming: List[StateMessage] = [each for each in self.under_way if each.id == task_id]
            # Only states in flight are missing.
            assert fold([*([known] if known else []), *coming]) == self.store.current(task_id)

    @rule()
    def lose(self) -> None:
        self.under_way.clear()
        self.table.lose()

    @rule(reachable=st.booleans())
    def cut_or_mend(self, reachable: bool) -> None:
        self.table.reachable = reachable

    @rule(answers=st.booleans())
    def make_look_ups_fail_or_work(self, answers: bool) -> None:
        self.store.failure = None if answers else timed_out()

    @invariant()
    def no_waiter_is_left(self) -> None:
        assert self.table._waiters == {}
        assert self.table._early == {}
        assert self.table._outdated == set()


def test_no_answer_is_wrong_after_any_events() -> None:
    run_state_machine_as_test(Events, settings=settings(stateful_step_count=40))
