"""Asking for states once in a while: how often the store is asked, and that the answer is right."""

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
from tests.unit.tables import Kept, Table, new_id, push, state, timed_out


@pytest.fixture
def inbox() -> Table:
    """An inbox that has no connection yet."""
    return Table()


@pytest.fixture
def store() -> Kept:
    return Kept()


@pytest.fixture
def waiting(inbox: Table, store: Kept) -> Waiting:
    return Waiting(inbox, store)  # type: ignore[arg-type]


def poll(waiting: Waiting, task_id: str) -> Optional[str]:
    """Return the name of the state of *task_id*, or ``None``."""
    found = waiting.poll([task_id])
    assert list(found) == [task_id]
    one = found[task_id]
    return None if one is None else one.state


def test_who_asks_once_causes_nothing_but_one_look_up(
    inbox: Table, store: Kept, waiting: Waiting
) -> None:
    task_id = new_id()
    assert poll(waiting, task_id) is None
    assert store.asked == [[task_id]]
    # No connection was opened, nothing is bound, and nobody is left waiting.
    assert not inbox._epoch
    assert inbox._wanted == set()
    assert inbox._waiters == {}


def test_who_asks_again_is_pushed_from_then_on(inbox: Table, store: Kept, waiting: Waiting) -> None:
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


def test_a_task_that_has_ended_is_looked_up_each_time(
    inbox: Table, store: Kept, waiting: Waiting
) -> None:
    task_id = new_id()
    store.add(state(task_id, "FAILURE"))
    for _ in range(3):
        assert poll(waiting, task_id) == "FAILURE"
    assert store.asked == [[task_id]] * 3
    assert not inbox._epoch
    # It was forgotten by somebody else.
    store.states.clear()
    assert poll(waiting, task_id) is None


def test_an_end_that_was_looked_up_is_not_kept_and_handed_out_again(
    inbox: Table, store: Kept, waiting: Waiting
) -> None:
    task_id = new_id()
    assert poll(waiting, task_id) is None
    store.add(state(task_id, "SUCCESS"))
    assert poll(waiting, task_id) == "SUCCESS"
    # Somebody else forgets it, which nobody tells us.
    store.states.clear()
    assert poll(waiting, task_id) is None


def test_a_task_that_has_ended_is_no_more_one_that_was_pending(
    inbox: Table, store: Kept, waiting: Waiting
) -> None:
    task_id = new_id()
    assert poll(waiting, task_id) is None
    store.add(state(task_id, "SUCCESS"))
    assert poll(waiting, task_id) == "SUCCESS"
    inbox.lose()
    # For looking at a result again no connection is opened.
    assert poll(waiting, task_id) == "SUCCESS"
    assert not inbox._epoch


def test_of_an_own_task_nobody_is_asked(inbox: Table, store: Kept, waiting: Waiting) -> None:
    inbox.open()
    task_id = new_id()
    inbox.note_sent(task_id)
    assert poll(waiting, task_id) is None
    assert store.asked == []


def test_many_are_asked_for_at_once(inbox: Table, store: Kept, waiting: Waiting) -> None:
    inbox.open()
    mine, begun, unknown = new_id(), new_id(), new_id()
    inbox.note_sent(mine)
    store.add(started := state(begun, "STARTED"))
    for _ in range(3):
        assert waiting.poll([mine, begun, unknown]) == {mine: None, begun: started, unknown: None}
    assert store.asked == [sorted([begun, unknown])] * 2


def test_nothing_asked_for_is_nothing_done(store: Kept, waiting: Waiting) -> None:
    assert waiting.poll([]) == {}
    assert store.asked == []


def test_which_of_several_states_counts_is_told(store: Kept, waiting: Waiting) -> None:
    task_id = new_id()
    store.add(state(task_id, "SUCCESS", 2), state(task_id, "STARTED", 3))
    assert poll(waiting, task_id) == "SUCCESS"


def test_a_push_between_binding_and_answer_is_not_lost(
    inbox: Table, store: Kept, waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = new_id()
    poll(waiting, task_id)
    read = store.read

    def read_and_push(ids: Set[str], deadline: Optional[float] = None) -> object:
        found = read(ids, deadline)
        push(inbox, state(task_id, "STARTED"))
        return found

    monkeypatch.setattr(store, "read", read_and_push)
    # What was read then is no lie.
    assert poll(waiting, task_id) is None
    assert poll(waiting, task_id) == "STARTED"
    assert store.asked == [[task_id]] * 2


def test_without_pushes_each_time_the_store_is_asked(
    inbox: Table, store: Kept, waiting: Waiting, caplog: pytest.LogCaptureFixture
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


def test_after_a_lost_connection_the_store_is_asked_again(
    inbox: Table, store: Kept, waiting: Waiting
) -> None:
    task_id = new_id()
    for _ in range(3):
        poll(waiting, task_id)
    inbox.lose()
    store.add(state(task_id, "SUCCESS"))
    assert poll(waiting, task_id) == "SUCCESS"


@pytest.mark.parametrize("times", [0, 1, 2])
def test_a_look_up_that_fails_is_never_a_state(
    inbox: Table, store: Kept, waiting: Waiting, times: int
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


def test_what_is_forgotten_is_not_known_any_more(
    inbox: Table, store: Kept, waiting: Waiting
) -> None:
    task_id = new_id()
    store.add(state(task_id, "STARTED"))
    for _ in range(3):
        assert poll(waiting, task_id) == "STARTED"
    store.states.clear()
    waiting.discard(task_id)
    assert poll(waiting, task_id) is None
    # It is asked for as if for the first time: nothing is bound for it.
    assert not inbox.covers(task_id)


def test_only_so_many_pending_tasks_are_remembered(
    inbox: Table, waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting_module, "MAX_POLLED", 2)
    ids = [new_id() for _ in range(3)]
    for task_id in ids:
        poll(waiting, task_id)
    poll(waiting, ids[0])
    assert not inbox.covers(ids[0])
    # That moved the second out.
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
    """Tasks that go on and end while they are asked for, and connections that are lost."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(inbox_module, "MAX_KNOWN", 3)
        self.patch.setattr(waiting_module.logger, "disabled", True)
        self.table = Table(shards=2)
        self.store = Kept()
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
            # Nothing is missing but what is still on its way.
            assert fold([*([known] if known else []), *coming]) == self.store.current(task_id)

    @rule()
    def lose(self) -> None:
        self.under_way.clear()
        self.table.lose()

    @rule(reachable=st.booleans())
    def cut_or_mend(self, reachable: bool) -> None:
        self.table.reachable = reachable

    @rule(answers=st.booleans())
    def have_look_ups_fail_or_not(self, answers: bool) -> None:
        self.store.failure = None if answers else timed_out()

    @invariant()
    def nobody_is_left_waiting(self) -> None:
        assert self.table._waiters == {}
        assert self.table._early == {}
        assert self.table._outdated == set()


def test_no_answer_is_wrong_after_any_events() -> None:
    run_state_machine_as_test(Events, settings=settings(stateful_step_count=40))
