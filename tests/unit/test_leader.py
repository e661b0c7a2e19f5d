"""The leader of chords, without a broker: events in, actions out."""

from __future__ import annotations

import math
from typing import Any, Iterable, Iterator, List, Optional, Type, TypeVar

import pytest

from celery_amqp_results.chords import leader as leading
from celery_amqp_results.chords import pending
from celery_amqp_results.chords.actions import (
    Acknowledge,
    Bind,
    Fire,
    GiveUp,
    LookUp,
)
from celery_amqp_results.chords.leader import Leader
from celery_amqp_results.chords.open_chord import FIRST_RECHECK, LAST_RECHECK
from celery_amqp_results.chords.pending import RETRY_SECONDS
from celery_amqp_results.chords.plan import Amendment, Nested, Plan, amended, fill, leaves
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.names import plan_number

_A = TypeVar("_A")

#: A wall clock, in microseconds, and the monotonic clock of the same moment.
WALL = 1_000_000_000_000
NOW = 1000.0
LATER = 60_000_000

GROUP = "header"
NUMBER = plan_number(GROUP)


def plan(*results: Any, began: int = WALL + LATER, mark: str = "m", **options: Any) -> Plan:
    return Plan(GROUP, mark, list(results), began, **options)


def end(
    task_id: str,
    published: int = WALL,
    state: str = "SUCCESS",
    body: bytes = b"x",
    amended: Optional[str] = None,
) -> Any:
    return StateMessage(
        task_id, state, published, body, "application/json", "utf-8", amended=amended
    )


def settled(memory: int = 1000) -> Leader:
    """Return a leader whose binding has stood for long."""
    leader = Leader(memory)
    leader.plan_delivered(plan(mark="first"), 0, False, NOW)
    (bind, *_) = leader.take()
    assert bind == Bind(NUMBER)
    leader.bound(NUMBER, NOW, WALL)
    leader.sent("first")
    leader.tick(NOW, WALL)
    leader.take()
    return leader


def ticks(leader: Leader) -> Iterator[float]:
    """Yield the time of each event of the leader when it has been handled, until none is left."""
    for _ in range(1000):
        now = leader.next_event()
        if now == math.inf:
            return
        leader.tick(now, WALL)
        yield now
    raise AssertionError("the events do not come to an end")


def without_timers() -> Leader:
    """Return a leader whose binding has stood for long and that waits for nothing."""
    leader = settled()
    assert not any(leader.take() for _ in ticks(leader))
    return leader


def the(kind: Type[_A], leader: Leader) -> _A:
    """Return the one action of the leader, which is of this *kind*."""
    (action,) = leader.take()
    assert isinstance(action, kind)
    return action


def find_nothing(leader: Leader, now: float, wall: int) -> None:
    """Answer the look-up that is due: the store has nothing."""
    *_, request = leader.take()
    assert isinstance(request, LookUp)
    leader.looked_up(request, {}, {}, now)
    leader.tick(now, wall)


def kinds(actions: Iterable[Any]) -> List[type]:
    return [type(action) for action in actions]


def test_a_chord_is_fired_once_when_all_its_tasks_have_ended() -> None:
    leader = settled()
    leader.plan_delivered(plan("a", "b"), 7, False, NOW)
    leader.state_pushed(end("a"), NOW, WALL)
    leader.state_pushed(end("b", state="STARTED"), NOW, WALL)
    leader.tick(NOW, WALL)
    assert leader.take() == []
    assert leader.progress(GROUP) == (2, ["b"])
    leader.state_pushed(end("b"), NOW, WALL)
    leader.state_pushed(end("b"), NOW, WALL)
    fire = the(Fire, leader)
    assert fire.results == ["a", "b"]
    assert set(fire.ends) == {"a", "b"}
    leader.sent("m")
    assert leader.take() == [Acknowledge((7,))]
    assert (leader.open, leader._ends.bytes) == (0, 0)


def test_ends_that_come_before_the_plan_count() -> None:
    leader = settled()
    leader.state_pushed(end("a"), NOW, WALL)
    leader.plan_delivered(plan("a"), 7, False, NOW)
    assert kinds(leader.take()) == [Fire]


def test_a_first_plan_is_looked_up_when_the_binding_stands_and_once_more_a_second_later() -> None:
    leader = Leader(1000)
    leader.plan_delivered(plan("a", "b", proofs=("body",)), 7, False, NOW)
    leader.tick(NOW, WALL)
    assert leader.take() == [Bind(NUMBER)]
    leader.bound(NUMBER, NOW, WALL)
    leader.tick(NOW, WALL)
    request = the(LookUp, leader)
    assert request == LookUp(frozenset("ab"), frozenset(["body"]))
    leader.looked_up(request, {"a": end("a")}, {"body": []}, NOW)
    assert leader.take() == []
    assert leader.next_event() == NOW + leading.SETTLE_SECONDS
    later = NOW + leading.SETTLE_SECONDS
    leader.tick(later, WALL)
    request = the(LookUp, leader)
    assert request == LookUp(frozenset("b"), frozenset())
    leader.looked_up(request, {"b": end("b")}, {}, later)
    assert kinds(leader.take()) == [Fire]


def test_a_redelivered_plan_whose_body_was_sent_is_acknowledged() -> None:
    leader = settled()
    leader.plan_delivered(plan("a", proofs=("body",)), 7, True, NOW)
    # Complete, but another leader may have sent the body
    leader.state_pushed(end("a"), NOW, WALL)
    assert leader.take() == []
    leader.tick(NOW, WALL)
    request = the(LookUp, leader)
    started = end("body", WALL + LATER, "STARTED")
    leader.looked_up(request, {}, {"body": [started]}, NOW)
    assert leader.take() == [Acknowledge((7,))]


def test_a_redelivered_plan_whose_body_was_not_sent_is_fired() -> None:
    leader = settled()
    leader.plan_delivered(plan("a", proofs=("body",)), 7, True, NOW)
    leader.state_pushed(end("a"), NOW, WALL)
    leader.tick(NOW, WALL)
    request = the(LookUp, leader)
    leader.looked_up(request, {}, {"body": []}, NOW)
    assert kinds(leader.take()) == [Fire]


def test_a_body_that_replaces_a_started_task_is_sent() -> None:
    leader = settled()
    leader.plan_delivered(plan("a", proofs=("replaced",)), 7, True, NOW)
    leader.state_pushed(end("a"), NOW, WALL)
    leader.tick(NOW, WALL)
    request = the(LookUp, leader)
    started = end("replaced", WALL + LATER - 1, "STARTED")
    leader.looked_up(request, {}, {"replaced": [started]}, NOW)
    assert kinds(leader.take()) == [Fire]


def test_a_chord_that_is_sent_again_is_not_taken_for_the_one_before() -> None:
    leader = settled()
    began = WALL + LATER
    again = plan("a", again=True, began=began, proofs=("body",))
    leader.plan_delivered(again, 7, True, NOW)
    leader.tick(NOW, WALL)
    request = the(LookUp, leader)
    assert request == LookUp(frozenset("a"), frozenset(["body"]))
    old = began - 1
    leader.looked_up(request, {"a": end("a", old)}, {"body": [end("body", old)]}, NOW)
    assert leader.take() == []
    leader.state_pushed(end("a", began + 1), NOW, WALL)
    assert kinds(leader.take()) == [Fire]


@pytest.mark.parametrize("redelivered", [False, True])
def test_the_body_of_a_chord_that_is_sent_again_is_looked_up_only_if_its_plan_is_redelivered(
    redelivered: bool,
) -> None:
    leader = Leader(1000)
    again = plan("a", again=True, proofs=("body",))
    leader.plan_delivered(again, 7, redelivered, NOW)
    leader.bound(NUMBER, NOW, WALL)
    leader.tick(NOW, WALL)
    assert leader.take()[1:] == [LookUp(frozenset("a"), frozenset(["body"] * redelivered))]


def test_an_end_that_was_published_with_the_plan_counts_for_a_chord_that_is_sent_again() -> None:
    leader = settled()
    leader.plan_delivered(plan("a", again=True, began=WALL), 7, False, NOW)
    leader.tick(NOW, WALL)
    request = the(LookUp, leader)
    leader.looked_up(request, {"a": end("a", WALL)}, {}, NOW)
    assert kinds(leader.take()) == [Fire]


def test_a_task_that_is_in_a_header_twice_is_waited_for_once() -> None:
    leader = settled()
    leader.state_pushed(end("a"), NOW, WALL)
    leader.plan_delivered(plan("a", "a", "b"), 7, False, NOW)
    assert leader.progress(GROUP) == (2, ["b"])
    leader.state_pushed(end("b"), NOW, WALL)
    assert the(Fire, leader).results == ["a", "a", "b"]


def test_what_was_fired_here_is_never_fired_again() -> None:
    leader = settled()
    leader.plan_delivered(plan("a"), 7, False, NOW)
    leader.state_pushed(end("a"), NOW, WALL)
    assert kinds(leader.take()) == [Fire]
    # The connection is lost while the body is being sent, and the plan is delivered again
    leader.connection_lost(["m"])
    leader.plan_delivered(plan("a"), 1, True, NOW)
    leader.bound(NUMBER, NOW, WALL)
    leader.sent("m")
    assert leader.take() == [Bind(NUMBER), Acknowledge((1,))]
    # Once more, after it was acknowledged in vain
    leader.plan_delivered(plan("a"), 2, True, NOW)
    assert leader.take() == [Acknowledge((2,))]


def test_fired_chords_are_remembered_in_a_limited_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leading, "MAX_FIRED", 2)
    leader = settled()
    for mark in "xyz":
        leader.plan_delivered(plan("a", mark=mark), 7, False, NOW)
        leader.state_pushed(end("a"), NOW, WALL)
        leader.sent(mark)
    leader.take()
    for mark in "zyx":
        leader.plan_delivered(plan("a", mark=mark), 8, True, NOW)
    assert leader.take() == [Acknowledge((8,))] * 2
    assert leader.open == 1


def test_headers_of_fired_chords_are_remembered_in_a_limited_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leading, "MAX_FIRED", 1)
    leader = without_timers()
    for group in ("one", "two"):
        leader.plan_delivered(Plan(group, f"mark {group}", ["a"], WALL + LATER), 7, False, NOW)
        leader.state_pushed(end("a"), NOW, WALL)
        leader.sent(f"mark {group}")
    assert kinds(leader.take()).count(Fire) == 2
    for group in ("one", "two"):
        late = Amendment(group, after="a", results=["b"], mark=f"late {group}", began=WALL)
        leader.amendment_delivered(late, 8, NOW)
    assert NOW + leading.LAST_AMENDMENT in list(ticks(leader))
    # A plan of the other may still come.
    assert [each.group_id for each in leader.take() if isinstance(each, GiveUp)] == ["two"]


def test_a_body_that_could_not_be_sent_is_tried_again() -> None:
    leader = settled()
    leader.plan_delivered(plan("a"), 7, False, NOW)
    leader.state_pushed(end("a"), NOW, WALL)
    assert kinds(leader.take()) == [Fire]
    leader.not_sent("m", NOW)
    assert leader.next_event() == pytest.approx(NOW + RETRY_SECONDS[0])
    leader.tick(leader.next_event(), WALL)
    fire = the(Fire, leader)
    assert fire.failures == 1
    leader.connection_lost(["m"])
    leader.not_sent("m", NOW)
    # The next leader of the plan sends it
    assert (leader.open, leader.take()) == (0, [])
    leader.plan_delivered(plan("a"), 8, True, NOW)
    assert leader.open == 1


def test_messages_that_were_taken_back_are_acknowledged_by_their_new_deliveries() -> None:
    leader = settled()
    leader.plan_delivered(plan("a"), 7, False, NOW)
    leader.requeued()
    leader.state_pushed(end("a"), NOW, WALL)
    assert kinds(leader.take()) == [Fire]
    leader.plan_delivered(plan("a"), 8, True, NOW)
    leader.sent("m")
    assert leader.take() == [Acknowledge((8,))]


def test_a_delivery_that_was_taken_back_is_not_acknowledged() -> None:
    leader = settled()
    leader.plan_delivered(plan("a"), 7, False, NOW)
    leader.state_pushed(end("a"), NOW, WALL)
    leader.plan_delivered(plan("b", mark="other"), 8, False, NOW)
    leader.state_pushed(end("b"), NOW, WALL)
    leader.sent("m")
    # The shell has not carried out any action.
    leader.requeued()
    assert kinds(leader.take()) == [Fire, Fire]
    leader.plan_delivered(plan("a"), 9, True, NOW)
    assert leader.take() == [Acknowledge((9,))]


def amendment(*results: Any, after: Optional[str] = "a", **options: Any) -> Amendment:
    options = {"mark": "x", "began": WALL + LATER, **options}
    return Amendment(GROUP, after=after, results=list(results), **options)


def test_an_amendment_is_waited_for_and_acknowledged_with_the_plan() -> None:
    leader = settled()
    leader.plan_delivered(plan("a", "b"), 7, False, NOW)
    leader.amendment_delivered(amendment("c"), 8, NOW)
    leader.amendment_delivered(amendment("c"), 9, NOW)
    for task_id in "ab":
        leader.state_pushed(end(task_id), NOW, WALL)
    assert leader.take() == []
    leader.state_pushed(end("c"), NOW, WALL)
    fire = the(Fire, leader)
    assert fire.results == ["a", "c", "b"]
    leader.sent("m")
    assert leader.take() == [Acknowledge((7, 8, 9))]
    leader.amendment_delivered(amendment("d", mark="y"), 10, NOW)
    assert leader.take() == []
    leader.tick(NOW + leading.LAST_AMENDMENT, WALL)
    assert kinds(leader.take()) == [GiveUp, Acknowledge]


def test_a_state_that_overtakes_its_amendment_fires_nothing() -> None:
    leader = settled()
    leader.plan_delivered(plan("a"), 7, False, NOW)
    more = amendment("c")
    leader.state_pushed(end("a", amended=more.mark), NOW, WALL)
    leader.tick(NOW + FIRST_RECHECK, WALL)
    assert not any(isinstance(action, Fire) for action in leader.take())
    leader.amendment_delivered(more, 8, NOW)
    assert leader.take() == []
    leader.state_pushed(end("c"), NOW, WALL)
    fire = the(Fire, leader)
    assert fire.results == ["a", "c"]
    leader.sent("m")
    assert leader.take() == [Acknowledge((7, 8))]


def test_a_chord_is_fired_when_its_last_amendment_comes_after_all_states() -> None:
    leader = settled()
    leader.plan_delivered(plan("a"), 7, False, NOW)
    more = amendment("c")
    leader.state_pushed(end("c"), NOW, WALL)
    leader.state_pushed(end("a", amended=more.mark), NOW, WALL)
    assert leader.take() == []
    leader.amendment_delivered(more, 8, NOW)
    assert kinds(leader.take()) == [Fire]


def test_a_chord_is_fired_when_its_plan_comes_after_its_states_and_its_amendment() -> None:
    leader = settled()
    more = amendment("c")
    leader.state_pushed(end("a", amended=more.mark), NOW, WALL)
    leader.state_pushed(end("c"), NOW, WALL)
    leader.amendment_delivered(more, 8, NOW)
    leader.plan_delivered(plan("a"), 7, False, NOW)
    assert the(Fire, leader).results == ["a", "c"]
    leader.sent("m")
    assert leader.take() == [Acknowledge((7, 8))]


def test_a_state_that_comes_after_its_amendment_holds_nothing() -> None:
    leader = settled()
    leader.plan_delivered(plan("a"), 7, False, NOW)
    for more in (amendment("c"), amendment("d", mark="y")):
        leader.amendment_delivered(more, 8, NOW)
    for task_id in "cd":
        leader.state_pushed(end(task_id), NOW, WALL)
    leader.state_pushed(end("a", amended="y"), NOW, WALL)
    assert kinds(leader.take()) == [Fire]


def test_a_chord_that_waits_for_an_amendment_is_compared_with_its_body() -> None:
    leader = settled()
    leader.plan_delivered(plan("a", again=True, proofs=("body",)), 7, False, NOW)
    leader.state_pushed(end("a", WALL + LATER, amended="x"), NOW, WALL)
    later = NOW + FIRST_RECHECK
    leader.tick(later, WALL)
    request = the(LookUp, leader)
    assert request.bodies == {"body"}
    # The plan was published twice, and the body was sent for the other one.
    leader.looked_up(request, {}, {"body": [end("body", WALL + LATER, "STARTED")]}, later)
    assert leader.take() == [Acknowledge((7,))]


def test_a_chord_that_has_waited_for_an_amendment_is_rechecked_for_its_tasks() -> None:
    leader = settled()
    leader.plan_delivered(plan("a"), 7, False, NOW)
    more = amendment("c")
    leader.state_pushed(end("a", amended=more.mark), NOW, WALL)
    later = NOW + FIRST_RECHECK
    leader.tick(later, WALL)
    leader.amendment_delivered(more, 8, later)
    assert leader.take() == []
    leader.tick(later + LAST_RECHECK, WALL)
    assert leader.take() == [LookUp(frozenset("c"), frozenset())]


def test_an_amendment_from_before_the_binding_is_looked_up() -> None:
    leader = settled()
    leader.plan_delivered(plan("a"), 7, False, NOW)
    leader.amendment_delivered(amendment("c", began=WALL), 8, NOW)
    leader.tick(NOW, WALL)
    assert leader.take() == [LookUp(frozenset("c"), frozenset())]


def test_an_amendment_that_is_delivered_again_after_its_chord_is_acknowledged() -> None:
    leader = settled()
    leader.plan_delivered(plan("a"), 7, False, NOW)
    leader.amendment_delivered(amendment("c"), 8, NOW)
    for task in "ac":
        leader.state_pushed(end(task), NOW, WALL)
    leader.requeued()
    leader.sent("m")
    leader.tick(NOW, WALL)
    leader.take()
    leader.amendment_delivered(amendment("c"), 9, NOW)
    assert leader.take() == [Acknowledge((9,))]


def test_a_decision_to_fire_that_was_lost_with_the_connection_is_taken_again() -> None:
    leader = settled()
    leader.plan_delivered(plan("a"), 7, False, NOW)
    leader.state_pushed(end("a"), NOW, WALL)
    # The shell has not begun to send the body
    leader.connection_lost([])
    assert (leader.open, leader.take()) == (0, [])
    leader.plan_delivered(plan("a"), 1, True, NOW)
    assert kinds(leader.take()) == [Bind]
    leader.bound(NUMBER, NOW, WALL)
    leader.tick(NOW, WALL)
    request = the(LookUp, leader)
    leader.looked_up(request, {"a": end("a")}, {}, NOW)
    assert kinds(leader.take()) == [Fire]


def test_an_amendment_of_a_chord_that_was_sent_again_holds_none_of_both() -> None:
    leader = settled()
    leader.plan_delivered(plan("a"), 7, False, NOW)
    leader.plan_delivered(plan("a", mark="second"), 8, False, NOW)
    more = amendment("c")
    leader.state_pushed(end("a", amended=more.mark), NOW, WALL)
    assert leader.take() == []
    leader.amendment_delivered(more, 9, NOW)
    assert the(Fire, leader).plan.mark == "m"
    leader.state_pushed(end("c"), NOW, WALL)
    assert the(Fire, leader).plan.mark == "second"


def test_a_chord_that_is_sent_again_can_be_amended_after_the_one_before() -> None:
    leader = settled()
    leader.plan_delivered(plan("a"), 7, False, NOW)
    leader.state_pushed(end("a"), NOW, WALL)
    leader.plan_delivered(plan("b", mark="second"), 8, False, NOW)
    leader.sent("m")
    leader.take()
    leader.amendment_delivered(amendment("c", after="b"), 9, NOW)
    assert leader.progress(GROUP) == (2, ["b", "c"])


def test_an_amendment_that_comes_before_its_plan_waits_for_it() -> None:
    leader = settled()
    leader.amendment_delivered(amendment("c", expires=1000), 8, NOW)
    leader.plan_delivered(plan("a"), 7, False, NOW)
    leader.state_pushed(end("a"), NOW, WALL)
    assert leader.take() == []
    leader.state_pushed(end("c"), NOW, WALL)
    assert kinds(leader.take()) == [Fire]
    leader.sent("m")
    assert leader.take() == [Acknowledge((7, 8))]
    other = Amendment("other", "y", None, ["z"], expires=1000)
    leader.amendment_delivered(other, 9, NOW)
    leader.take()
    leader.tick(NOW + 1.1, WALL)
    assert kinds(leader.take()) == [GiveUp, Acknowledge]


def test_a_group_that_is_added_is_pushed_under_its_own_id() -> None:
    leader = settled()
    leader.plan_delivered(plan("a"), 7, False, NOW)
    subgroup = next(name for name in map(str, range(99)) if plan_number(name) != NUMBER)
    leader.amendment_delivered(amendment(["c", "d"], subgroup=subgroup), 8, NOW)
    assert leader.take() == [Bind(plan_number(subgroup))]
    leader.bound(plan_number(subgroup), NOW, WALL)
    leader.tick(NOW, WALL)
    request = the(LookUp, leader)
    assert {"c", "d"} <= request.tasks


def test_an_abandoned_chord_is_given_up_when_nothing_has_come_for_its_expiry() -> None:
    leader = settled()
    leader.plan_delivered(plan("a", "b", began=WALL, expires=10_000), 7, False, NOW)
    leader.state_pushed(end("a", WALL + 5_000_000), NOW + 5, WALL + 5_000_000)
    leader.tick(NOW + 14, WALL + 14_000_000)
    find_nothing(leader, NOW + 14, WALL + 14_000_000)
    assert leader.open == 1
    leader.tick(NOW + 16, WALL + 16_000_000)
    find_nothing(leader, NOW + 16, WALL + 16_000_000)
    assert kinds(leader.take())[:2] == [GiveUp, Acknowledge]
    assert leader.open == 0


def test_a_chord_that_expired_before_it_was_delivered_is_given_up_only_after_a_look_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pending, "MAX_LOOK_UP", 1)
    leader = Leader(1000)
    leader.plan_delivered(plan("a", "b", began=WALL, expires=1_000), 7, True, NOW)
    leader.bound(NUMBER, NOW, WALL + LATER)
    leader.tick(NOW, WALL + LATER)
    now = NOW + 60
    leader.tick(now, WALL + 2 * LATER)
    (_, request) = leader.take()
    assert isinstance(request, LookUp)
    leader.look_up_failed(request, now)
    for _ in range(2):
        assert leader.open == 1
        now += 1
        leader.tick(now, WALL + 2 * LATER)
        request = the(LookUp, leader)
        assert len(request.tasks) == 1
        leader.looked_up(request, {}, {}, now)
    leader.tick(now, WALL + 2 * LATER)
    assert kinds(leader.take())[:2] == [GiveUp, Acknowledge]


def test_an_end_that_the_last_look_up_finds_keeps_a_chord_open() -> None:
    leader = settled()
    leader.plan_delivered(plan("a", "b", began=WALL, expires=10_000), 7, False, NOW)
    leader.tick(NOW + 11, WALL + 11_000_000)
    request = the(LookUp, leader)
    leader.looked_up(request, {"a": end("a", WALL + 9_000_000)}, {}, NOW + 11)
    leader.tick(NOW + 11, WALL + 11_000_000)
    assert (leader.take(), leader.progress(GROUP)) == ([], (2, ["b"]))


def test_a_complete_chord_that_could_not_be_sent_is_not_given_up() -> None:
    leader = settled()
    leader.plan_delivered(plan("a", began=WALL, expires=10_000), 7, False, NOW)
    leader.state_pushed(end("a"), NOW, WALL)
    assert kinds(leader.take()) == [Fire]
    leader.not_sent("m", NOW + 60)
    leader.tick(NOW + 60, WALL + LATER)
    assert leader.open == 1
    leader.take()
    leader.tick(NOW + 61, WALL + 2 * LATER)
    assert kinds(leader.take()) == [Fire]


def test_a_chord_of_which_nothing_is_heard_is_looked_up_less_and_less_often() -> None:
    leader = settled()
    leader.plan_delivered(plan("a"), 7, False, NOW)
    asked = []
    for now in ticks(leader):
        if now > NOW + 1000:
            break
        for action in leader.take():
            asked.append(now - NOW)
            assert isinstance(action, LookUp)
            leader.looked_up(action, {}, {}, now)
    assert asked[:4] == [15, 30, 60, 120]
    assert max(b - a for a, b in zip(asked, asked[1:])) <= LAST_RECHECK


def test_a_look_up_that_failed_is_repeated() -> None:
    leader = settled()
    leader.plan_delivered(plan("a"), 7, True, NOW)
    leader.tick(NOW, WALL)
    request = the(LookUp, leader)
    leader.look_up_failed(request, NOW)
    assert leader.next_event() > NOW
    leader.tick(leader.next_event(), WALL)
    assert leader.take() == [request]


def test_a_leader_tells_what_it_holds() -> None:
    leader = Leader(1000)
    assert (leader.open, leader.holds, leader.oldest) == (0, False, None)
    assert (leader.leads, leader.next_event()) == (frozenset(), math.inf)
    leader.amendment_delivered(amendment("c"), 8, NOW)
    # It is acknowledged together with its plan, so it is held.
    assert (leader.open, leader.holds, leader.oldest) == (0, True, None)
    assert leader.leads == {NUMBER}
    leader.plan_delivered(plan("a", began=WALL + 2), 7, False, NOW)
    leader.plan_delivered(plan("a", began=WALL + 1, mark="n"), 9, False, NOW)
    assert (leader.open, leader.holds, leader.oldest) == (2, True, WALL + 1)


def test_progress_is_found_by_the_id_of_the_header_and_of_the_body() -> None:
    leader = settled()
    leader.plan_delivered(plan("c", "a", "b", proofs=("body",)), 7, False, NOW)
    leader.state_pushed(end("a"), NOW, WALL)
    for key in (GROUP, "body"):
        assert leader.progress(key) == (3, ["b", "c"])
    assert leader.progress("a") is None


def test_the_message_about_an_expired_chord_tells_how_many_tasks_have_not_ended() -> None:
    leader = settled()
    leader.plan_delivered(plan("a", "b", began=WALL, expires=10_000), 7, False, NOW)
    leader.state_pushed(end("a", WALL + 5_000_000), NOW + 5, WALL + 5_000_000)
    leader.tick(NOW + 16, WALL + 16_000_000)
    find_nothing(leader, NOW + 16, WALL + 16_000_000)
    assert leader.take()[0] == GiveUp(GROUP, "1 of 2 tasks have not ended")


def test_an_amendment_to_a_finished_chord_is_given_up_when_it_expires() -> None:
    leader = without_timers()
    leader.plan_delivered(plan("a"), 7, False, NOW)
    leader.state_pushed(end("a"), NOW, WALL)
    leader.sent("m")
    leader.take()
    leader.amendment_delivered(amendment("b", expires=3_000), 8, NOW)
    assert leader.next_event() == NOW + 3.0
    leader.tick(NOW + 2.9, WALL)
    assert leader.take() == []
    leader.tick(NOW + 3.0, WALL)
    why = GiveUp(GROUP, "a task was added to it when it was over")
    assert leader.take() == [why, Acknowledge((8,))]
    assert not leader.holds
    leader.amendment_delivered(amendment("d", mark="z", expires=3_600_000), 10, NOW)
    leader.tick(NOW + leading.LAST_AMENDMENT - 0.1, WALL)
    assert leader.take() == []
    leader.tick(NOW + leading.LAST_AMENDMENT, WALL)
    assert leader.take() == [why, Acknowledge((10,))]


def test_an_amendment_that_never_expires_waits_for_its_plan() -> None:
    leader = without_timers()
    leader.amendment_delivered(Amendment("other", "y", None, ["z"]), 9, NOW)
    leader.take()
    assert leader.next_event() == math.inf
    leader.tick(NOW + 1e9, WALL)
    assert leader.take() == []
    assert leader.holds


def test_a_chord_that_was_bound_late_is_given_up_at_the_moment_of_its_expiry() -> None:
    leader = Leader(1000)
    leader.plan_delivered(plan("a", began=WALL, expires=500), 7, False, NOW)
    leader.bound(NUMBER, NOW, WALL)
    leader.tick(NOW, WALL)
    find_nothing(leader, NOW, WALL)
    assert leader.next_event() == NOW + 0.5
    leader.tick(NOW + 0.5, WALL + 500_000)
    find_nothing(leader, NOW + 0.5, WALL + 500_000)
    assert kinds(leader.take()) == [GiveUp, Acknowledge]


def test_nothing_is_left_of_a_chord_that_is_over() -> None:
    leader = settled()
    leader.plan_delivered(
        plan("a", "b", began=WALL, expires=10_000, proofs=("body",)), 7, True, NOW
    )
    leader.state_pushed(end("a"), NOW, WALL)
    leader.tick(NOW, WALL)
    request = the(LookUp, leader)
    leader.looked_up(request, {}, {"body": []}, NOW)
    leader.tick(NOW + 11, WALL + 11_000_000)
    request = the(LookUp, leader)
    leader.looked_up(request, {}, {}, NOW + 11)
    leader.tick(NOW + 11, WALL + 11_000_000)
    assert kinds(leader.take()) == [GiveUp, Acknowledge]
    # Another answer, and states of its tasks, come when it was given up.
    leader.looked_up(request, {"b": end("b")}, {"body": []}, NOW + 11)
    for task_id in "ab":
        leader.state_pushed(end(task_id), NOW + 11, WALL + 11_000_000)
    assert (leader.take(), leader.open, leader.holds) == ([], 0, False)


def test_an_answer_to_a_look_up_from_before_the_connection_was_lost_is_ignored() -> None:
    leader = settled()
    leader.plan_delivered(plan("a"), 7, True, NOW)
    leader.tick(NOW, WALL)
    request = the(LookUp, leader)
    leader.connection_lost([])
    leader.plan_delivered(plan("a"), 1, True, NOW)
    leader.take()
    leader.looked_up(request, {"a": end("a")}, {}, NOW)
    assert leader.take() == []
    assert leader.progress(GROUP) == (1, ["a"])


def test_a_binding_that_stands_after_the_connection_was_lost_is_ignored() -> None:
    leader = settled()
    leader.connection_lost([])
    leader.bound(NUMBER, NOW, WALL)
    assert leader.leads == frozenset()


def test_a_success_replaces_a_failure_while_the_chord_is_open() -> None:
    leader = settled()
    leader.plan_delivered(plan("a", "b"), 7, False, NOW)
    leader.state_pushed(end("a", WALL, "FAILURE", b"xxx"), NOW, WALL)
    assert leader._ends.bytes == 3
    leader.state_pushed(end("a", WALL + 1, "SUCCESS", b"xxxxx"), NOW, WALL)
    # A failure that comes later changes nothing.
    leader.state_pushed(end("a", WALL + 2, "FAILURE", b"x"), NOW, WALL)
    assert leader._ends.bytes == 5
    leader.state_pushed(end("b", body=b"y"), NOW, WALL)
    fire = the(Fire, leader)
    assert {task_id: each.state for task_id, each in fire.ends.items()} == {
        "a": "SUCCESS",
        "b": "SUCCESS",
    }
    leader.sent("m")
    assert leader._ends.bytes == 0


def test_a_success_replaces_a_failure_that_came_before_the_plan() -> None:
    leader = settled()
    leader.state_pushed(end("a", WALL, "FAILURE"), NOW, WALL)
    leader.plan_delivered(plan("a", "b"), 7, False, NOW)
    for task_id in "ab":
        leader.state_pushed(end(task_id, WALL + 1), NOW, WALL)
    assert the(Fire, leader).ends["a"].state == "SUCCESS"


def test_all_bodies_being_sent_count_as_memory_when_the_connection_is_lost() -> None:
    leader = settled()
    leader.plan_delivered(plan("a"), 7, False, NOW)
    leader.plan_delivered(plan("b", mark="other"), 8, False, NOW)
    leader.state_pushed(end("a", body=b"xx"), NOW, WALL)
    leader.state_pushed(end("b", body=b"xxx"), NOW, WALL)
    leader.connection_lost(["m", "other"])
    assert (leader.open, leader._ends.bytes) == (2, 5)


def test_a_body_being_sent_is_kept_in_memory_when_the_connection_is_lost() -> None:
    leader = settled()
    leader.plan_delivered(plan("a", "b"), 7, False, NOW)
    leader.plan_delivered(plan("c", mark="other"), 8, False, NOW)
    leader.state_pushed(end("a", body=b"xx"), NOW, WALL)
    leader.state_pushed(end("b", body=b"xxx"), NOW, WALL)
    assert kinds(leader.take()) == [Fire]
    leader.connection_lost(["m"])
    assert (leader.open, leader._ends.bytes, leader.next_event()) == (1, 5, math.inf)
    leader.sent("m")
    # The plan was not delivered here again, and is acknowledged when it is.
    assert (leader.open, leader._ends.bytes, leader.take()) == (0, 0, [])


def test_the_failed_sending_of_an_unknown_chord_changes_nothing() -> None:
    leader = without_timers()
    leader.not_sent("unknown", NOW)
    leader.sent("unknown")
    assert (leader.take(), leader.next_event()) == ([], math.inf)


def test_each_failed_sending_waits_longer() -> None:
    leader = without_timers()
    leader.plan_delivered(plan("a"), 7, False, NOW)
    leader.state_pushed(end("a"), NOW, WALL)
    tried = [NOW]
    assert the(Fire, leader).failures == 0
    leader.not_sent("m", NOW)
    for now in ticks(leader):
        if len(tried) > len(RETRY_SECONDS):
            break
        for action in leader.take():
            assert isinstance(action, Fire)
            assert action.failures == len(tried)
            tried.append(now)
            leader.not_sent("m", now)
    assert [b - a for a, b in zip(tried, tried[1:])] == pytest.approx(list(RETRY_SECONDS))


def test_results_over_the_memory_are_kept_without_their_bodies() -> None:
    leader = settled(memory=10)
    leader.plan_delivered(plan("a", "b"), 7, False, NOW)
    leader.state_pushed(end("a", body=b"x" * 9), NOW, WALL)
    leader.state_pushed(end("b", body=b"x" * 9), NOW, WALL)
    fire = the(Fire, leader)
    assert fire.bodiless == {"b"}
    assert leader._ends.bytes == 9


def test_what_no_plan_waits_for_makes_room() -> None:
    leader = settled(memory=10)
    leader.state_pushed(end("a", body=b"x" * 9), NOW, WALL + LATER)
    leader.state_pushed(end("b", body=b"x" * 9), NOW, WALL + LATER)
    assert leader._ends.bytes == 9
    # The forgotten end is looked up
    leader.plan_delivered(plan("a"), 7, False, NOW)
    leader.tick(NOW, WALL)
    assert leader.take() == [LookUp(frozenset("a"), frozenset())]


def test_results_are_put_together_in_the_order_and_nesting_of_the_header() -> None:
    nested: List[Nested] = ["a", ["b", ["c"]], "b"]
    assert list(leaves(nested)) == ["a", "b", "c", "b"]
    assert fill(nested, {"a": 1, "b": 2, "c": 3}) == [1, [2, [3]], 2]
    more = [amendment("d", after="c"), amendment("e", ["f"], after="d"), amendment("g", after="?")]
    assert amended(nested, more) == ["a", ["b", ["c", "d", "e", "f"]], "b", "g"]
