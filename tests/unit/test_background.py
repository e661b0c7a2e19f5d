"""A follower that looks tasks up in the background, with events in any order."""

from __future__ import annotations

import collections
from typing import Any, Callable, Deque, List, Set, Tuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test

from celery_amqp_results import errors
from celery_amqp_results.waiting.background import MAX_LOOKS, BackgroundFollower
from celery_amqp_results.waiting.progress import Update
from tests.unit.fakes import FakeInbox, FakeStore, new_id, push, reads_of, state, timed_out
from tests.unit.test_follower import Events, Followed, ids


class ManualExecutor:
    """The other thread: runs its jobs when the test says so."""

    def __init__(self) -> None:
        self.jobs: Deque[Tuple[Callable[..., Any], Tuple[Any, ...]]] = collections.deque()

    def __call__(self, function: Callable[..., Any], *args: Any) -> None:
        self.jobs.append((function, args))

    def run(self, count: int = 1_000) -> None:
        while self.jobs and count:
            function, args = self.jobs.popleft()
            function(*args)
            count -= 1


@pytest.fixture
def inbox() -> FakeInbox:
    table = FakeInbox()
    table.open()
    return table


def background(inbox: FakeInbox, store: FakeStore, later: ManualExecutor) -> BackgroundFollower:
    return BackgroundFollower(inbox, reads_of(inbox, store), store.lookup_timeout, later)


def step(follower: BackgroundFollower) -> List[Update]:
    return follower.step(None, 0.0)


def settle(follower: BackgroundFollower, later: ManualExecutor) -> List[Update]:
    updates = []
    for _ in range(4):
        updates += step(follower)
        later.run()
    return updates + step(follower)


def test_pushes_are_delivered_while_another_task_is_looked_up(inbox: FakeInbox) -> None:
    # Given a task that is covered, and one whose look-up has not been answered.
    store, later = FakeStore(), ManualExecutor()
    follower = background(inbox, store, later)
    mine, other = new_id(), new_id()
    inbox.note_sent(mine)
    follower.add([mine, other])
    assert step(follower) == []
    assert len(later.jobs) == 1
    # When both are published, then one is delivered now, and the other after its look-up.
    done, others = state(mine), state(other)
    push(inbox, done)
    assert step(follower) == [Update(mine, [done], done)]
    store.add(others)
    later.run()
    assert step(follower) == [Update(other, [others], others)]
    follower.close()


def test_states_pushed_during_a_look_up_follow_its_findings(inbox: FakeInbox) -> None:
    store, later = FakeStore(), ManualExecutor()
    follower = background(inbox, store, later)
    task_id = new_id()
    first, second, third = (state(task_id, "PROGRESS") for _ in range(3))
    store.add(first)
    follower.add([task_id])
    assert settle(follower, later) == [Update(task_id, [first], None)]
    # Given that the connection was lost: the task is looked up again, with pushes meanwhile.
    inbox.lose()
    inbox.open()
    store.add(second)
    assert step(follower) == []
    push(inbox, third)
    assert step(follower) == []
    later.run()
    (update,) = step(follower)
    assert update.states == [second, third]
    follower.close()


def test_a_look_up_is_repeated_if_states_may_have_been_missed(inbox: FakeInbox) -> None:
    store, later = FakeStore(), ManualExecutor()
    follower = background(inbox, store, later)
    task_id = new_id()
    inbox.cover([task_id], None)
    follower.add([task_id])
    step(follower)
    later.run()
    # Given that it has found nothing, and the connection is lost before the answer is processed.
    inbox.lose()
    inbox.open()
    done = state(task_id)
    store.add(done)
    assert settle(follower, later) == [Update(task_id, [done], done)]
    follower.close()


def test_the_number_of_concurrent_look_ups_is_limited(inbox: FakeInbox) -> None:
    store, later = FakeStore(), ManualExecutor()
    follower = background(inbox, store, later)
    wanted = [new_id() for _ in range(20)]
    for task_id in wanted:
        follower.add([task_id])
        step(follower)
    assert len(later.jobs) <= MAX_LOOKS
    assert settle(follower, later) == []
    assert all(map(inbox.covers, wanted))
    # And known tasks are not looked up again.
    step(follower)
    assert not later.jobs
    follower.close()


@pytest.mark.parametrize("where", ["cover", "read"])
def test_only_permanent_errors_are_raised(inbox: FakeInbox, where: str) -> None:
    store, later = FakeStore(), ManualExecutor()
    follower = background(inbox, store, later)
    task_id = new_id()
    inbox.cover([task_id], None)
    follower.add([task_id])
    store.failure = timed_out()
    assert settle(follower, later) == []
    if where == "read":
        store.failure = errors.DeclarationRefused("differs")
        expected = "differs"
    else:
        inbox._keeper.closing = True
        inbox.lose()
        inbox.reachable = False
        expected = "closed"
    with pytest.raises((errors.DeclarationRefused, errors.BackendUnavailable), match=expected):
        settle(follower, later)
    # A failed look-up for a follower that was closed affects no other.
    follower.add([new_id()])
    step(follower)
    for task_id in list(follower.pending):
        follower.discard(task_id)
    later.run()
    assert step(follower) == []
    follower.close()


# Named, since old versions of Hypothesis look for the source of a lambda at every step.
def something_is_looked_up(events: BackgroundEvents) -> bool:
    return bool(events.later.jobs)


class BackgroundEvents(Events):
    """The same events, with look-ups that end later, or never."""

    def __init__(self) -> None:
        super().__init__()
        self.later = ManualExecutor()

    @rule(wanted=st.sets(ids, min_size=1))
    def follow(self, wanted: Set[str]) -> None:
        if len(self.all) < 3:
            follower = background(self.table, self.store, self.later)
            followed = Followed(follower)
            followed.follower.add(sorted(wanted))
            self.all.append(followed)

    @precondition(something_is_looked_up)
    @rule(count=st.integers(1, 3))
    def look_up(self, count: int) -> None:
        if self.table.reachable or self.table.table.epoch:
            self.later.run(count)

    def everything_is_known_in_the_end(self) -> None:
        self.store.failure = None
        self.table.reachable = True
        for _ in range(5):
            self.later.run()
            for followed in self.all:
                followed.step()
        self.later.run()
        super().everything_is_known_in_the_end()


def test_no_final_state_is_missed_after_any_events() -> None:
    run_state_machine_as_test(
        BackgroundEvents, settings=settings(max_examples=60, stateful_step_count=40)
    )
