"""The table of followed tasks, and the times at which the store is read again."""

from __future__ import annotations

import math
from typing import Dict, List

from celery import states

from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.waiting.followed import HOLD_SECONDS, FollowedTasks
from celery_amqp_results.waiting.rechecks import FIRST_RECHECK, SILENCE, Rechecks

NOW = 1000.0


def state(task_id: str, name: str, published: int) -> StateMessage:
    return StateMessage(task_id, name, published, b"1", "application/json", "utf-8")


def found(**by_task: List[StateMessage]) -> Dict[str, List[StateMessage]]:
    return by_task


def following(*ids: str) -> FollowedTasks:
    """Return a table whose tasks have to be looked up."""
    tasks = FollowedTasks()
    tasks.add(ids)
    tasks.missed(ids)
    return tasks


def names(tasks: FollowedTasks) -> Dict[str, List[str]]:
    return {u.task_id: [each.state for each in u.states] for u in tasks.updates()}


def test_a_pushed_state_is_yielded_at_once_if_nothing_was_missed() -> None:
    tasks = FollowedTasks()
    tasks.add("a")
    tasks.arrived([state("other", states.STARTED, 1), state("a", states.STARTED, 1)], NOW)
    assert names(tasks) == {"a": ["STARTED"]}
    assert not tasks.has_news


def test_a_pushed_state_is_held_back_until_the_look_up_ends() -> None:
    tasks = following("a")
    look = tasks.begin(tasks.due, bound=True)
    tasks.arrived([state("a", states.SUCCESS, 2)], NOW)
    assert not tasks.has_news
    assert tasks.end(look, found(a=[state("a", states.STARTED, 1)]))
    (update,) = tasks.updates()
    assert [each.state for each in update.states] == ["STARTED", "SUCCESS"]
    assert update.history
    assert update.final is not None
    assert tasks.pending == {}


def test_a_state_is_held_back_for_a_limited_time() -> None:
    tasks = following("a", "b")
    tasks.arrived([state("a", states.STARTED, 1)], NOW)
    tasks.arrived([state("b", states.STARTED, 1)], NOW + 1)
    assert tasks.held_until() == NOW + HOLD_SECONDS
    tasks.release(NOW)
    assert names(tasks) == {"a": ["STARTED"]}
    tasks.release(math.inf)
    assert names(tasks) == {"b": ["STARTED"]}
    assert tasks.held_until() == math.inf


def test_a_look_up_does_not_count_if_states_were_missed_meanwhile() -> None:
    tasks = following("a", "b")
    look = tasks.begin(tasks.due, bound=True)
    assert tasks.due == set()
    tasks.missed("a")
    assert tasks.end(look, found(a=[state("a", states.STARTED, 1)], b=[]))
    assert names(tasks) == {}
    assert tasks.due == {"a"}


def test_a_look_up_whose_tasks_are_gone_counts_for_nothing() -> None:
    tasks = following("a")
    look = tasks.begin(tasks.due, bound=True)
    tasks.discard("a")
    tasks.add("a")
    assert not tasks.end(look, found(a=[state("a", states.SUCCESS, 1)]))
    assert names(tasks) == {}


def test_a_look_up_without_a_binding_leaves_its_tasks_due() -> None:
    tasks = following("a")
    assert tasks.never_looked_up("a") == {"a"}
    look = tasks.begin("a", bound=False)
    tasks.end(look, found(a=[]))
    assert tasks.never_looked_up("a") == set()
    assert tasks.due == {"a"}


def test_a_failed_look_up_is_repeated() -> None:
    tasks = following("a", "b")
    tasks.end(tasks.begin("ab", bound=True), None)
    assert tasks.due == {"a", "b"}


def test_the_store_is_read_for_tasks_whose_history_memory_may_lack() -> None:
    tasks = following("a", "b")
    tasks.pushed("b")
    assert tasks.begin("ab", bound=True).stored == {"a"}
    tasks.recheck("b")
    assert tasks.begin("ab", bound=True).stored == {"a", "b"}


def test_a_final_state_that_only_the_store_has_is_reported_if_its_push_should_have_come() -> None:
    tasks = FollowedTasks()
    tasks.add("ab")
    tasks.recheck("a")
    end = [state("a", states.SUCCESS, 1)], [state("b", states.SUCCESS, 1)]
    tasks.end(tasks.begin(tasks.due, bound=True), found(a=end[0], b=end[1]))
    assert set(names(tasks)) == {"a", "b"}
    assert tasks.unpushed == end[0]
    assert tasks.updates() == []
    assert tasks.unpushed == []


def test_a_final_state_that_was_pushed_in_the_meantime_is_not_reported_as_missing() -> None:
    tasks = FollowedTasks()
    tasks.add("a")
    tasks.recheck("a")
    # Nothing was missed, so it is not held back.
    tasks.arrived([state("a", states.SUCCESS, 1)], NOW)
    assert names(tasks) == {"a": ["SUCCESS"]}
    assert tasks.unpushed == []


def test_states_that_are_missed_after_all_are_held_back() -> None:
    tasks = FollowedTasks()
    tasks.add("ab")
    tasks.pushed("ab")
    tasks.recheck("a")
    assert tasks.due == {"a", "b"}
    tasks.missed("a")
    tasks.missed(["unknown"])
    tasks.arrived([state("a", states.STARTED, 1), state("b", states.STARTED, 1)], NOW)
    assert not tasks.has_news
    # Memory has the states of b, since they were pushed all the time.
    assert tasks.begin("ab", bound=True).stored == {"a"}


def test_nothing_is_left_of_a_task_that_is_not_followed_any_more() -> None:
    tasks = following("a", "b")
    tasks.arrived([state("a", states.STARTED, 1)], NOW)
    tasks.discard("a")
    tasks.discard("unknown")
    assert (tasks.due, tasks.held_until()) == ({"b"}, math.inf)
    assert list(tasks.pending) == ["b"]
    tasks.release(math.inf)
    assert tasks.add(["a", "b", "a"]) == ["a"]
    assert tasks.due == {"b"}
    # The state from before is not among the new ones.
    tasks.missed("a")
    tasks.arrived([state("a", "PROGRESS", 2)], NOW)
    tasks.release(math.inf)
    assert names(tasks) == {"a": ["PROGRESS"]}


def test_states_of_a_task_that_has_ended_are_ignored() -> None:
    tasks = following("a")
    look = tasks.begin("a", bound=True)
    tasks.end(look, found(a=[state("a", states.SUCCESS, 1)]))
    assert names(tasks) == {"a": ["SUCCESS"]}
    tasks.missed("a")
    assert tasks.due == set()
    tasks.arrived([state("a", states.STARTED, 2)], NOW)
    assert not tasks.has_news


def test_the_first_state_held_back_decides_when_all_of_its_task_are_released() -> None:
    tasks = following("a")
    tasks.arrived([state("a", states.STARTED, 1)], NOW)
    tasks.arrived([state("a", "PROGRESS", 2)], NOW + 1)
    assert tasks.held_until() == NOW + HOLD_SECONDS
    tasks.release(NOW - 1)
    assert not tasks.has_news
    tasks.release(NOW)
    assert names(tasks) == {"a": ["STARTED", "PROGRESS"]}


def test_a_look_up_that_failed_releases_nothing() -> None:
    tasks = following("a")
    look = tasks.begin("a", bound=True)
    tasks.arrived([state("a", states.STARTED, 1)], NOW)
    assert tasks.end(look, None)
    assert not tasks.has_news
    assert tasks.held_until() == NOW + HOLD_SECONDS


def test_a_look_up_without_a_binding_yields_what_it_found_and_releases_nothing() -> None:
    tasks = following("a", "b")
    look = tasks.begin("ab", bound=False)
    tasks.arrived([state("a", states.STARTED, 3), state("b", states.STARTED, 3)], NOW)
    assert tasks.end(look, found(a=[state("a", "PROGRESS", 1)], b=[]))
    (update,) = tasks.updates()
    assert [each.state for each in update.states] == ["PROGRESS"]
    assert update.history
    # A later look-up with a binding does not undo that it was looked up.
    tasks.begin("ab", bound=True)
    assert tasks.never_looked_up("ab") == set()


def test_only_states_from_the_store_are_history() -> None:
    tasks = following("a", "b")
    look = tasks.begin("ab", bound=True)
    tasks.arrived([state("b", states.STARTED, 2)], NOW)
    tasks.end(look, found(a=[state("a", states.STARTED, 1)], b=[]))
    assert {update.task_id: update.history for update in tasks.updates()} == {"a": True, "b": False}
    tasks.arrived([state("a", "PROGRESS", 3)], NOW)
    assert [update.history for update in tasks.updates()] == [False]


def test_a_state_that_comes_twice_is_yielded_once_beside_the_news_of_others() -> None:
    tasks = FollowedTasks()
    tasks.add("ab")
    tasks.arrived([state("a", states.STARTED, 1)], NOW)
    assert names(tasks) == {"a": ["STARTED"]}
    tasks.arrived([state("a", states.STARTED, 1), state("b", states.SUCCESS, 1)], NOW)
    assert names(tasks) == {"b": ["SUCCESS"]}
    assert list(tasks.pending) == ["a"]


def test_the_store_is_read_again_when_the_inbox_is_silent() -> None:
    rechecks = Rechecks(NOW)
    assert not rechecks.is_due(NOW, 0)
    assert rechecks.next_at == NOW + FIRST_RECHECK - SILENCE
    assert not rechecks.is_due(rechecks.next_at, 5)
    due = NOW + FIRST_RECHECK
    assert rechecks.next_at == due
    assert rechecks.is_due(due, 5)
    assert rechecks.is_silent(5)
    assert not rechecks.is_silent(6)
    # The next time is twice as far away.
    assert rechecks.next_at == due + 2 * FIRST_RECHECK - SILENCE


def test_a_flow_of_messages_delays_the_read_once() -> None:
    rechecks, received = Rechecks(NOW), 0
    now = NOW
    while not rechecks.is_due(now, received):
        now, received = now + SILENCE / 2, received + 1
    assert now == NOW + 2 * FIRST_RECHECK
    assert not rechecks.is_silent(received)
