"""A follower that looks tasks up in the background, in any order of events."""

from __future__ import annotations

import collections
from typing import Any, Callable, Deque, List, Set, Tuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test

from celery_amqp_results import errors
from celery_amqp_results.waiting.background import MAX_LOOKS, BackgroundFollower
from celery_amqp_results.waiting.follower import Update
from tests.unit.fakes import FakeInbox, FakeStore, new_id, push, reads_of, state, timed_out
from tests.unit.test_follower import Events, Followed, ids


class Later:
    """The other thread: what it is given to do is done when the test says so."""

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


def background(inbox: FakeInbox, store: FakeStore, later: Later) -> BackgroundFollower:
    return BackgroundFollower(inbox, reads_of(inbox, store), store.lookup_timeout, later)


def step(follower: BackgroundFollower) -> List[Update]:
    return follower.step(None, 0.0)


def settle(follower: BackgroundFollower, later: Later) -> List[Update]:
    updates = []
    for _ in range(4):
        updates += step(follower)
        later.run()
    return updates + step(follower)


def test_pushes_are_handed_out_while_another_task_is_looked_up(inbox: FakeInbox) -> None:
    # Given a task that is covered, and one whose look-up is not answered.
    store, later = FakeStore(), Later()
    follower = background(inbox, store, later)
    mine, other = new_id(), new_id()
    inbox.note_sent(mine)
    follower.add([mine, other])
    assert step(follower) == []
    assert len(later.jobs) == 1
    # When both are published, then the one is handed out, and the other when it was looked up.
    done, others = state(mine), state(other)
    push(inbox, done)
    assert step(follower) == [Update(mine, [done], done)]
    store.add(others)
    later.run()
    assert step(follower) == [Update(other, [others], others)]
    follower.close()


def test_what_was_pushed_before_the_look_up_ends_is_put_behind_what_it_finds(
    inbox: FakeInbox,
) -> None:
    store, later = FakeStore(), Later()
    follower = background(inbox, store, later)
    task_id = new_id()
    first, second, third = (state(task_id, "PROGRESS") for _ in range(3))
    store.add(first)
    follower.add([task_id])
    assert settle(follower, later) == [Update(task_id, [first], None)]
    # Given that the connection was lost: it is looked up again, and pushes come meanwhile.
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


def test_a_look_up_is_done_again_if_states_may_have_been_missed_meanwhile(inbox: FakeInbox) -> None:
    store, later = FakeStore(), Later()
    follower = background(inbox, store, later)
    task_id = new_id()
    inbox.cover([task_id], None)
    follower.add([task_id])
    step(follower)
    later.run()
    # Given that it has found nothing, and the connection is lost before that is taken in.
    inbox.lose()
    inbox.open()
    done = state(task_id)
    store.add(done)
    assert settle(follower, later) == [Update(task_id, [done], done)]
    follower.close()


def test_no_more_look_ups_are_begun_than_there_may_be(inbox: FakeInbox) -> None:
    store, later = FakeStore(), Later()
    follower = background(inbox, store, later)
    wanted = [new_id() for _ in range(20)]
    for task_id in wanted:
        follower.add([task_id])
        step(follower)
    assert len(later.jobs) <= MAX_LOOKS
    assert settle(follower, later) == []
    assert all(map(inbox.covers, wanted))
    # Nor is anything looked up once more when it is known.
    step(follower)
    assert not later.jobs
    follower.close()


@pytest.mark.parametrize("where", ["cover", "read"])
def test_what_trying_again_does_not_change_is_raised_and_the_rest_is_not(
    inbox: FakeInbox, where: str
) -> None:
    store, later = FakeStore(), Later()
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
        inbox._closing = True
        inbox.lose()
        inbox.reachable = False
        expected = "closed"
    with pytest.raises((errors.DeclarationRefused, errors.BackendUnavailable), match=expected):
        settle(follower, later)
    # What fails for somebody who has gone is nobody's matter.
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
    """The same, with look-ups that end some time later, if at all."""

    def __init__(self) -> None:
        super().__init__()
        self.later = Later()

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


def test_no_end_is_missed_after_any_events() -> None:
    run_state_machine_as_test(
        BackgroundEvents, settings=settings(max_examples=60, stateful_step_count=40)
    )
