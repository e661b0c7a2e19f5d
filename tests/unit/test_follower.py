"""Following tasks: each state is delivered once, and a final state is never missed.

The inbox knows what the tests push, and the store is a dict.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import os
import threading
import time
from typing import Any, Deque, Dict, Iterator, List, Optional, Set, Tuple

import pytest
from amqp import exceptions as amqp_errors
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
from celery_amqp_results.chords import sending
from celery_amqp_results.protocol import clock as clock_module
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.ranking import fold, is_final
from celery_amqp_results.waiting import follower as waiting_module
from celery_amqp_results.waiting import rechecks
from celery_amqp_results.waiting.followed import HOLD_SECONDS
from celery_amqp_results.waiting.follower import Follower
from celery_amqp_results.waiting.progress import Update
from tests.unit.fakes import FakeInbox, FakeStore, follower_of, new_id, push, state, timed_out

#: Long enough for a busy machine; expected states arrive much earlier.
LONG = 60.0


@pytest.fixture
def inbox() -> FakeInbox:
    """An inbox with a connection, with no shard bound."""
    table = FakeInbox()
    table.open()
    return table


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def follower(inbox: FakeInbox, store: FakeStore) -> Iterator[Follower]:
    with contextlib.closing(follower_of(inbox, store)) as made:
        yield made


class Clock:
    """A clock that stands still."""

    def __init__(self) -> None:
        #: Seconds, for waiting, and for the times in states.
        self.now = 1000.0
        self.wall = 0.0

    def monotonic(self) -> float:
        return self.now

    def time_ns(self) -> int:
        return int(self.wall * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that waiting uses."""
    made = Clock()
    monkeypatch.setattr(waiting_module, "time", made)
    monkeypatch.setattr(clock_module, "time", made)
    return made


def sent(table: FakeInbox) -> str:
    """Return the id of a task that this process has just sent."""
    task_id = new_id()
    table.note_sent(task_id)
    return task_id


def step(follower: Follower) -> List[Update]:
    """Let *follower* do what it can without waiting."""
    return follower.step(None, 0.0)


def settle(follower: Follower) -> List[Update]:
    """Let *follower* run until it has nothing left to do."""
    updates: List[Update] = []
    for _ in range(4):
        updates += step(follower)
    return updates


# -- delivered states --------------------------------------------------------------------------


def test_a_covered_task_causes_no_look_up(
    inbox: FakeInbox, store: FakeStore, follower: Follower
) -> None:
    task_id = sent(inbox)
    follower.add([task_id])
    assert settle(follower) == []
    started, done = state(task_id, "STARTED"), state(task_id, "SUCCESS")
    push(inbox, started)
    assert step(follower) == [Update(task_id, [started], None)]
    push(inbox, done)
    assert step(follower) == [Update(task_id, [done], done)]
    assert store.asked == []
    # It has finished, and is no longer followed.
    assert follower.pending == {}
    assert not inbox.covers(task_id)


def test_states_that_arrive_together_are_one_update_in_publishing_order(
    inbox: FakeInbox, follower: Follower
) -> None:
    one, other = sent(inbox), sent(inbox)
    follower.add([one, other])
    late, early = state(one, "PROGRESS", 7), state(one, "STARTED", 6)
    done = state(other, "FAILURE", 8)
    push(inbox, late, done, early)
    assert step(follower) == [
        Update(one, [early, late], None),
        Update(other, [done], done),
    ]


def test_a_state_that_arrives_twice_is_delivered_once(inbox: FakeInbox, follower: Follower) -> None:
    task_id = sent(inbox)
    follower.add([task_id])
    started = state(task_id, "STARTED")
    push(inbox, started, started)
    assert step(follower) == [Update(task_id, [started], None)]
    push(inbox, started)
    assert step(follower) == []


def test_a_state_known_before_is_delivered(inbox: FakeInbox, follower: Follower) -> None:
    task_id = sent(inbox)
    done = state(task_id, "SUCCESS")
    push(inbox, done)
    follower.add([task_id])
    assert step(follower) == [Update(task_id, [done], done)]


def test_superseded_state_is_delivered_but_does_not_become_current(
    inbox: FakeInbox, follower: Follower
) -> None:
    task_id = sent(inbox)
    follower.add([task_id])
    aborted, late = state(task_id, "ABORTED", 5), state(task_id, "PROGRESS", 6)
    push(inbox, aborted)
    step(follower)
    push(inbox, late)
    assert step(follower) == [Update(task_id, [late], None)]
    assert follower.pending == {task_id: aborted}


def test_states_after_the_final_one_are_not_delivered(inbox: FakeInbox, follower: Follower) -> None:
    task_id, other = sent(inbox), sent(inbox)
    follower.add([task_id, other])
    done = state(task_id, "FAILURE")
    push(inbox, done)
    assert step(follower) == [Update(task_id, [done], done)]
    push(inbox, state(task_id, "SUCCESS"))
    assert settle(follower) == []
    assert follower.pending == {other: None}


def test_states_that_arrive_with_the_final_one_are_delivered_with_it(
    inbox: FakeInbox, follower: Follower
) -> None:
    task_id = sent(inbox)
    follower.add([task_id])
    first, second = state(task_id, "REVOKED"), state(task_id, "SUCCESS")
    push(inbox, first, second)
    assert step(follower) == [Update(task_id, [first, second], second)]


def test_a_task_that_is_added_twice_is_followed_once(inbox: FakeInbox, follower: Follower) -> None:
    task_id = sent(inbox)
    follower.add([task_id, task_id])
    follower.add(iter([task_id]))
    done = state(task_id)
    push(inbox, done)
    assert step(follower) == [Update(task_id, [done], done)]
    assert inbox.waited_for == 0


def test_a_discarded_task_is_no_longer_reported(inbox: FakeInbox, follower: Follower) -> None:
    task_id = sent(inbox)
    follower.add([task_id])
    follower.discard(task_id)
    follower.discard(task_id)
    push(inbox, state(task_id))
    assert settle(follower) == []
    assert inbox.waited_for == 0
    # Its result is still available to the next reader.
    assert inbox.covers(task_id)


def test_a_task_that_is_followed_again_starts_over(
    inbox: FakeInbox, store: FakeStore, follower: Follower
) -> None:
    task_id = new_id()
    store.add(done := state(task_id))
    for _ in range(2):
        follower.add([task_id])
        # Each time, the look-up comes before the binding.
        assert step(follower) == [Update(task_id, [done], done)]
    assert store.asked == [[task_id]] * 2


def test_held_back_states_of_a_discarded_task_are_dropped(
    inbox: FakeInbox, follower: Follower
) -> None:
    task_id = "an id of my own"
    inbox.note_sent(task_id)
    # A task of another sender is looked up first.
    follower.add([task_id, new_id()])
    push(inbox, state(task_id, "STARTED"))
    assert step(follower) == []
    follower.discard(task_id)
    # It is forgotten, and the id is used again.
    follower.add([task_id])
    assert settle(follower) == []


def test_a_discarded_task_causes_no_look_up(store: FakeStore, follower: Follower) -> None:
    task_id, other = new_id(), new_id()
    follower.add([task_id])
    follower.discard(task_id)
    assert settle(follower) == []
    assert store.asked == []
    # A postponed look-up is dropped as well.
    follower.add([task_id, other])
    step(follower)
    follower.discard(task_id)
    assert settle(follower) == []
    assert store.asked == [sorted([task_id, other]), [other]]


def test_closing_a_follower_leaves_nothing_behind(inbox: FakeInbox, store: FakeStore) -> None:
    with contextlib.closing(follower_of(inbox, store)) as follower:
        follower.add([sent(inbox), new_id()])
        assert inbox.waited_for == 2
    assert inbox.waited_for == 0
    assert follower.pending == {}


# -- look-ups ----------------------------------------------------------------------------------


def test_a_result_of_another_sender_is_found_without_a_binding(
    inbox: FakeInbox, store: FakeStore, follower: Follower
) -> None:
    task_id = new_id()
    started, done = state(task_id, "STARTED"), state(task_id, "SUCCESS")
    store.add(done, started)
    follower.add([task_id])
    assert step(follower) == [Update(task_id, [started, done], done)]
    assert store.asked == [[task_id]]
    assert inbox.unbound([task_id]) == {task_id}


def test_a_task_of_another_sender_is_looked_up_again_once_it_is_covered(
    inbox: FakeInbox, store: FakeStore, follower: Follower
) -> None:
    task_id = new_id()
    follower.add([task_id])
    assert step(follower) == []
    assert inbox.unbound([task_id]) == {task_id}
    # A state published between the look-up and the binding is not pushed.
    started = state(task_id, "STARTED")
    store.add(started)
    assert step(follower) == [Update(task_id, [started], None)]
    assert inbox.covers(task_id)
    assert store.asked == [[task_id]] * 2
    # From here on there are no more look-ups.
    assert settle(follower) == []
    assert store.asked == [[task_id]] * 2


def test_an_own_uncovered_task_is_looked_up_once(
    inbox: FakeInbox, store: FakeStore, follower: Follower
) -> None:
    task_id = "an id of my own"
    inbox.note_sent(task_id)
    store.add(started := state(task_id, "STARTED"))
    follower.add([task_id])
    assert settle(follower) == [Update(task_id, [started], None)]
    assert store.asked == [[task_id]]
    assert inbox.covers(task_id)


def test_a_push_waits_for_an_older_state_with_a_higher_rank(
    inbox: FakeInbox, store: FakeStore, follower: Follower
) -> None:
    task_id = "an id of my own"
    inbox.note_sent(task_id)
    done, late = state(task_id, "SUCCESS", 5), state(task_id, "FAILURE", 6)
    store.add(done)
    # A task of another sender is looked up first.
    follower.add([task_id, new_id()])
    # A second run of the task fails.
    push(inbox, late)
    assert step(follower) == []
    assert step(follower) == [Update(task_id, [done, late], done)]


def test_missed_states_are_looked_up_after_a_lost_connection(
    inbox: FakeInbox, store: FakeStore, follower: Follower
) -> None:
    mine, other = sent(inbox), new_id()
    follower.add([mine, other])
    started = state(mine, "STARTED")
    store.add(started)
    push(inbox, started)
    assert settle(follower) == [Update(mine, [started], None)]
    inbox.lose()
    missed = [state(mine, "SUCCESS"), state(other, "FAILURE")]
    store.add(*missed)
    found = {update.task_id: update for update in settle(follower)}
    # Delivered states are not delivered again.
    assert found == {each.id: Update(each.id, [each], each) for each in missed}


def test_waiting_continues_without_a_connection(
    inbox: FakeInbox, store: FakeStore, follower: Follower
) -> None:
    task_id = sent(inbox)
    follower.add([task_id])
    inbox.reachable = False
    inbox.lose()
    done = state(task_id)
    store.add(done)
    assert settle(follower) == []
    inbox.reachable = True
    assert settle(follower) == [Update(task_id, [done], done)]


def test_losing_the_connection_during_a_look_up_ends_the_cover(
    inbox: FakeInbox, store: FakeStore, follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = "an id of my own"
    inbox.note_sent(task_id)
    follower.add([task_id])
    read = store.read

    def lose_and_read(*args: Any, **options: Any) -> Any:
        found = read(*args, **options)
        monkeypatch.setattr(store, "read", read)
        inbox.lose()
        store.add(state(task_id))
        return found

    monkeypatch.setattr(store, "read", lose_and_read)
    assert step(follower) == []
    assert not inbox.covers(task_id)
    (update,) = settle(follower)
    assert update.final is not None


def test_a_lost_push_is_found_by_a_look_up(
    inbox: FakeInbox, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rechecks, "FIRST_RECHECK", 0.0)
    monkeypatch.setattr(rechecks, "SILENCE", 0.0)
    task_id = sent(inbox)
    with contextlib.closing(follower_of(inbox, store)) as follower:
        follower.add([task_id])
        done = state(task_id)
        store.add(done)
        assert step(follower) == [Update(task_id, [done], done)]


def test_look_ups_become_less_frequent(inbox: FakeInbox, store: FakeStore, clock: Clock) -> None:
    task_id = sent(inbox)
    asked_at = []
    with contextlib.closing(follower_of(inbox, store)) as follower:
        follower.add([task_id])
        while clock.now < 2000.0:
            before = len(store.asked)
            step(follower)
            if len(store.asked) > before:
                asked_at.append(clock.now - 1000.0)
            clock.now += 1.0
    pauses = [second - first for first, second in zip([0.0, *asked_at], asked_at)]
    assert pauses == [15, 30, 60, 120, 240, 300]


def test_a_final_state_without_a_push_makes_the_inbox_suspect(
    inbox: FakeInbox, store: FakeStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.wall = 20
    suspicions: List[str] = []
    monkeypatch.setattr(inbox, "suspect", suspicions.append)
    pushed, missed, fresh = sent(inbox), sent(inbox), sent(inbox)
    with contextlib.closing(follower_of(inbox, store)) as follower:
        follower.add([pushed, missed, fresh])
        step(follower)
        done = state(pushed, published=1_000_000)
        store.add(done)
        push(inbox, done)
        assert step(follower)
        # Its push may still be in flight.
        store.add(state(fresh, published=19_000_000))
        store.add(state(missed, published=1_000_000))
        clock.now += 15
        assert step(follower) == []
        clock.now += 1
        assert {update.task_id for update in step(follower)} == {missed, fresh}
    (suspicion,) = suspicions
    assert missed in suspicion


@pytest.mark.parametrize("in_order", [True, False])
def test_arriving_pushes_postpone_look_ups(
    inbox: FakeInbox,
    store: FakeStore,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    in_order: bool,
) -> None:
    # Given a process that was frozen, and has a backlog of pushes
    clock.wall = 90
    suspicions: List[str] = []
    monkeypatch.setattr(inbox, "suspect", suspicions.append)
    waited_for = sent(inbox)
    asked_at = []
    with contextlib.closing(follower_of(inbox, store)) as follower:
        follower.add([waited_for])
        clock.now += 20
        store.add(state(waited_for, published=40_000_000))
        while waited_for in follower.pending:
            before = len(store.asked)
            push(inbox, state(new_id(), published=50_000_000 if not in_order else 39_000_000))
            step(follower)
            if len(store.asked) > before:
                asked_at.append(clock.now - 1000.0)
            clock.now += 0.5
    # Then it looks up late, and only once
    assert asked_at == [30.0]
    # And it considers its connection dead only if later pushes have overtaken a missing one
    assert [waited_for in text for text in suspicions] == ([] if in_order else [True])


# -- failing look-ups --------------------------------------------------------------------------


def test_a_failed_look_up_is_retried(
    inbox: FakeInbox, store: FakeStore, follower: Follower, caplog: pytest.LogCaptureFixture
) -> None:
    task_id = new_id()
    follower.add([task_id])
    store.failure = timed_out()
    with caplog.at_level(logging.WARNING, waiting_module.__name__):
        assert settle(follower) == []
    assert "no answer" in caplog.text
    store.failure = None
    store.add(done := state(task_id))
    assert settle(follower) == [Update(task_id, [done], done)]


def test_pushes_are_held_back_only_briefly_while_look_ups_fail(
    inbox: FakeInbox, store: FakeStore, clock: Clock
) -> None:
    one, other = "an id of my own", "another id of my own"
    inbox.note_sent(one)
    inbox.note_sent(other)
    with contextlib.closing(follower_of(inbox, store)) as follower:
        follower.add([one, other])
        store.failure = timed_out()
        assert settle(follower) == []
        done = state(one)
        push(inbox, done)
        assert settle(follower) == []
        clock.now += HOLD_SECONDS - 1
        assert settle(follower) == []
        clock.now += 1
        assert settle(follower) == [Update(one, [done], done)]
        # At the end of the wait they are delivered immediately.
        done = state(other)
        push(inbox, done)
        assert settle(follower) == []
        assert follower.step(clock.now, 0.0) == [Update(other, [done], done)]


@pytest.mark.parametrize("connected", [True, False])
def test_a_long_wait_wakes_up_when_held_back_states_are_due(
    inbox: FakeInbox,
    store: FakeStore,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    connected: bool,
) -> None:
    task_id = "an id of my own"
    inbox.note_sent(task_id)
    monkeypatch.setattr(rechecks, "FIRST_RECHECK", 1e6)

    def sleep(seconds: float) -> bool:
        clock.now += seconds
        return False

    def cover(ids: Any, deadline: float) -> int:
        clock.now = deadline
        raise TimeoutError

    with contextlib.closing(follower_of(inbox, store)) as follower:
        monkeypatch.setattr(follower._waiter, "wait", sleep)
        follower.add([task_id])
        store.failure = timed_out()
        done = state(task_id)
        push(inbox, done)
        assert step(follower) == []
        due = clock.now + HOLD_SECONDS
        if not connected:
            inbox.lose()
            monkeypatch.setattr(inbox, "cover", cover)
        assert follower.step(None, 3600.0) == [Update(task_id, [done], done)]
        assert clock.now == due


def test_periodic_look_ups_do_not_hold_pushes_back(
    inbox: FakeInbox, store: FakeStore, clock: Clock
) -> None:
    # Given a task that has missed no state
    task_id = sent(inbox)
    with contextlib.closing(follower_of(inbox, store)) as follower:
        follower.add([task_id])
        # When nothing arrives for a long time, and look-ups fail
        store.failure = timed_out()
        while not store.asked:
            clock.now += 1
            assert step(follower) == []
        started, done = state(task_id, "STARTED"), state(task_id)
        # Then a push is delivered immediately
        push(inbox, started)
        assert step(follower) == [Update(task_id, [started], None)]
        # Unless the connection is lost meanwhile
        inbox.lose()
        inbox.open()
        push(inbox, done)
        assert settle(follower) == []
        store.failure = None
        assert settle(follower) == [Update(task_id, [done], done)]


@pytest.mark.parametrize("moment", ["waiting", "reading"])
def test_a_reconnect_within_a_step_does_not_reorder_states(
    inbox: FakeInbox,
    store: FakeStore,
    follower: Follower,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    task_id = new_id() if moment == "waiting" else "an id of my own"
    inbox.note_sent(task_id)
    follower.add([task_id])
    first, second = state(task_id, "SUCCESS", 5), state(task_id, "SUCCESS", 6)
    patched: Any = follower._waiter if moment == "waiting" else store
    name = "wait" if moment == "waiting" else "read"
    original = getattr(patched, name)

    def lose_and_push(*arguments: Any, **options: Any) -> Any:
        answer = original(*arguments, **options)
        monkeypatch.setattr(patched, name, original)
        # The first run's state is missed, and another wait reopens the connection.
        inbox.lose()
        store.add(first)
        inbox.open()
        push(inbox, second)
        store.add(second)
        return answer

    monkeypatch.setattr(patched, name, lose_and_push)
    assert step(follower) == []
    (update,) = settle(follower)
    assert update.final == first


def test_a_look_up_that_ends_with_the_wait_logs_nothing(
    store: FakeStore, follower: Follower, caplog: pytest.LogCaptureFixture
) -> None:
    follower.add([new_id()])
    store.failure = timed_out()
    with caplog.at_level(logging.DEBUG, waiting_module.__name__):
        assert follower.step(time.monotonic(), 5.0) == []
    assert caplog.records == []


def refused() -> errors.BackendUnavailable:
    failure = errors.BackendUnavailable("the broker refuses")
    failure.__cause__ = amqp_errors.AccessRefused("no")
    return failure


@pytest.mark.parametrize(
    "failure",
    [refused(), errors.DeclarationRefused("differs"), errors.InvalidOption("wrong")],
    ids=["refused", "differs", "wrong"],
)
def test_permanent_errors_are_raised(
    store: FakeStore, follower: Follower, failure: Exception
) -> None:
    follower.add([new_id()])
    store.failure = failure
    with pytest.raises(type(failure)) as caught:
        step(follower)
    assert caught.value is failure


def test_closing_the_inbox_raises_in_its_waiters(inbox: FakeInbox, follower: Follower) -> None:
    follower.add([sent(inbox)])
    inbox._keeper.give_up(refused(), attempts=3)
    with pytest.raises(errors.BackendUnavailable, match="refuses"):
        step(follower)


# -- time --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("deadline", "pause"), [(0.0, 3600.0), (None, 0.0), (-5.0, 3600.0)])
def test_a_step_does_not_wait_past_its_end(
    inbox: FakeInbox, follower: Follower, deadline: Optional[float], pause: float
) -> None:
    follower.add([sent(inbox)])
    end = None if deadline is None else time.monotonic() + deadline
    # The test is that it returns.
    assert follower.step(end, pause) == []


def test_available_states_are_delivered_after_the_timeout(
    inbox: FakeInbox, store: FakeStore, follower: Follower
) -> None:
    mine, other = sent(inbox), new_id()
    push(inbox, state(mine))
    store.add(state(other))
    follower.add([mine, other])
    updates = follower.step(time.monotonic() - 1, 5.0)
    assert {update.task_id for update in updates} == {mine, other}


@pytest.mark.parametrize("what", ["a state", "a poke", "a loss"])
def test_another_thread_can_wake_a_waiter(inbox: FakeInbox, follower: Follower, what: str) -> None:
    task_id = sent(inbox)
    follower.add([task_id])
    settle(follower)
    about_to_wait = threading.Event()

    def act() -> None:
        about_to_wait.wait(LONG)
        if what == "a state":
            push(inbox, state(task_id))
        elif what == "a poke":
            follower.poke()
        else:
            inbox.lose()

    thread = threading.Thread(target=act)
    thread.start()
    started = time.monotonic()
    about_to_wait.set()
    updates = follower.step(None, 100 * LONG)
    # Far less than the timeout.
    assert time.monotonic() - started < 50 * LONG
    thread.join(LONG)
    assert bool(updates) == (what == "a state")


def test_a_wake_function_is_called(inbox: FakeInbox, store: FakeStore) -> None:
    calls: List[None] = []
    task_id = sent(inbox)
    with contextlib.closing(follower_of(inbox, store, lambda: calls.append(None))) as follower:
        follower.add([task_id])
        assert calls == []
        push(inbox, state(task_id))
        assert len(calls) == 1
        follower.add([new_id()])
        assert len(calls) == 2


# -- any order of events -----------------------------------------------------------------------

IDS = [*(f"0f3b2c4e-8d1a-4a52-9a4b-6f2a1c7d8e{n}" for n in range(90, 94)), "own"]
ids = st.sampled_from(IDS)
names = st.sampled_from(["STARTED", "PROGRESS", "ABORTED", "RETRY", "FAILURE", "SUCCESS"])


class Followed:
    """A follower, and the states that it has delivered."""

    def __init__(self, follower: Follower) -> None:
        self.follower = follower
        self.states: Dict[str, List[StateMessage]] = collections.defaultdict(list)
        self.ended: Set[str] = set()
        #: The states published since it began to follow. The inbox may summarise earlier states by
        #: the last one.
        self.due: Dict[str, List[StateMessage]] = collections.defaultdict(list)
        #: The final states, in the order of delivery.
        self.ends: List[StateMessage] = []

    def step(self) -> None:
        for update in step(self.follower):
            task_id, new, final = update.task_id, update.states, update.final
            assert task_id not in self.ended
            assert new == sorted(new, key=lambda each: each.published)
            handed_out = self.states[task_id]
            assert not any(each in handed_out for each in new)
            handed_out += new
            current = fold(handed_out)
            assert current is not None
            assert final == (current if is_final(current.state) else None)
            if final is not None:
                self.ended.add(task_id)
                self.ends.append(final)

    def forget(self, task_id: str) -> None:
        self.states.pop(task_id, None)
        self.due.pop(task_id, None)
        self.ended.discard(task_id)


# Named, since old versions of Hypothesis look for the source of a lambda at every step.
def something_is_under_way(events: Events) -> bool:
    return bool(events.under_way)


def has_followers(events: Events) -> bool:
    return bool(events.all)


class Events(RuleBasedStateMachine):
    """Tasks that change, followers that come and go, and connections that are lost."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        # The test is that the current state is found without it.
        self.patch.setattr(rechecks, "FIRST_RECHECK", 1e6)
        self.patch.setattr(waiting_module.logger, "disabled", True)
        self.table = FakeInbox(shards=2, limit=2500)
        self.table.before_barrier = self.bring_all
        self.store = FakeStore()
        self.times = itertools.count(100)
        self.ours: Set[str] = set()
        self.under_way: Deque[StateMessage] = collections.deque()
        self.all: List[Followed] = []
        #: Whether states are published in order and every look-up works: then the first final state
        #: delivered is the current one.
        self.tidy = False

    def teardown(self) -> None:
        try:
            self.everything_is_known_in_the_end()
        finally:
            self.patch.undo()

    @initialize(opened=st.booleans(), tidy=st.booleans())
    def begin(self, opened: bool, tidy: bool) -> None:
        self.tidy = tidy
        if opened:
            self.table.open()

    @rule(task_id=ids)
    def send(self, task_id: str) -> None:
        if task_id in self.ours or not self.store.states.get(task_id):
            self.ours.add(task_id)
            self.table.note_sent(task_id)

    @rule(task_id=ids, name=names, late=st.integers(0, 60), here=st.booleans())
    def publish(self, task_id: str, name: str, late: int, here: bool) -> None:
        late = 0 if self.tidy else late
        new = state(task_id, name, next(self.times) * 60 - late * 60 + late)
        known = self.store.states.get(task_id, [])
        if any(each.published == new.published for each in known):
            return
        self.store.add(new)
        for followed in self.all:
            if task_id in followed.follower.pending:
                followed.due[task_id].append(new)
        if self.table.brings(task_id, task_id in self.ours):
            self.under_way.append(new)
        if here:
            self.table.note_stored(new)

    @precondition(something_is_under_way)
    @rule(count=st.integers(1, 4))
    def bring(self, count: int) -> None:
        for _ in range(min(count, len(self.under_way))):
            push(self.table, self.under_way.popleft())

    def bring_all(self) -> None:
        """A barrier comes behind everything."""
        self.bring(len(self.under_way))

    @rule(wanted=st.sets(ids, min_size=1))
    def follow(self, wanted: Set[str]) -> None:
        if len(self.all) < 3:
            followed = Followed(follower_of(self.table, self.store))
            followed.follower.add(sorted(wanted))
            self.all.append(followed)

    @precondition(has_followers)
    @rule(data=st.data(), task_id=ids)
    def follow_one_more(self, data: st.DataObject, task_id: str) -> None:
        followed = data.draw(st.sampled_from(self.all))
        if task_id not in followed.follower.pending:
            followed.forget(task_id)
            followed.follower.add([task_id])

    @precondition(has_followers)
    @rule(data=st.data(), task_id=ids)
    def follow_one_less(self, data: st.DataObject, task_id: str) -> None:
        followed = data.draw(st.sampled_from(self.all))
        if task_id in followed.follower.pending:
            followed.follower.discard(task_id)
            followed.forget(task_id)

    @precondition(has_followers)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.all)).step()

    @precondition(has_followers)
    @rule(data=st.data(), task_id=ids, missed=st.booleans(), reading=st.booleans())
    def lose_within_a_step(
        self, data: st.DataObject, task_id: str, missed: bool, reading: bool
    ) -> None:
        """Lose the connection and reconnect during a wait or a read."""
        followed = data.draw(st.sampled_from(self.all))
        place: Any = self.store if reading else followed.follower._waiter
        name = "read" if reading else "wait"
        function = getattr(place, name)

        def meanwhile(*args: Any, **options: Any) -> Any:
            found = function(*args, **options)
            self.lose()
            if missed:
                self.publish(task_id, "SUCCESS", 0, False)
            if self.table.reachable:
                self.table.open()
            self.publish(task_id, "SUCCESS", 0, False)
            self.bring(1)
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, name, meanwhile)
            followed.step()

    @precondition(has_followers)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        followed = data.draw(st.sampled_from(self.all))
        self.all.remove(followed)
        followed.follower.close()

    @rule()
    def lose(self) -> None:
        self.under_way.clear()
        self.table.lose()

    @rule(reachable=st.booleans())
    def cut_or_mend(self, reachable: bool) -> None:
        self.table.reachable = reachable

    @rule(answers=st.booleans())
    def make_look_ups_fail_or_work(self, answers: bool) -> None:
        self.store.failure = None if answers or self.tidy else timed_out()

    @invariant()
    def the_first_of_several_results_is_delivered(self) -> None:
        if not self.tidy:
            return
        for end in (end for followed in self.all for end in followed.ends):
            if end.state == "SUCCESS":
                assert end == self.store.current(end.id)

    @invariant()
    def a_follower_with_the_final_state_has_stopped(self) -> None:
        for followed in self.all:
            assert not followed.ended & followed.follower.pending.keys()

    @invariant()
    def nothing_is_kept_for_closed_followers(self) -> None:
        wanted = {task_id for each in self.all for task_id in each.follower.pending}
        assert set(self.table._waiters.by_task) == wanted

    def everything_is_known_in_the_end(self) -> None:
        self.store.failure = None
        self.table.reachable = True
        while self.under_way:
            push(self.table, self.under_way.popleft())
        for followed in self.all:
            for _ in range(5):
                followed.step()
            for task_id, known in followed.follower.pending.items():
                # No state was missed, and none was invented.
                assert known == self.store.current(task_id)
                assert known is None or not is_final(known.state)
                assert keys(followed.due[task_id]) <= keys(followed.states[task_id])
            for task_id, handed_out in followed.states.items():
                assert keys(handed_out) <= keys(self.store.states.get(task_id, []))
        for followed in self.all:
            followed.follower.close()
        assert self.table.waited_for == 0


def keys(found: List[StateMessage]) -> Set[Tuple[int, str]]:
    return {(each.published, each.state) for each in found}


def test_no_final_state_is_missed_after_any_events() -> None:
    run_state_machine_as_test(Events, settings=settings(stateful_step_count=40))


@pytest.mark.parametrize("owner", [waiting_module.once, sending._clock], ids=["log", "clock"])
def test_a_forked_child_has_a_free_lock_although_a_thread_of_its_parent_held_it(owner: Any) -> None:
    with owner._lock:
        child = os.fork()
        if not child:
            free = owner._lock.acquire(blocking=False)
            os._exit(0 if free else 1)
    assert os.waitpid(child, 0)[1] == 0
