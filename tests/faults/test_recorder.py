"""The checker finds violations: each test plants one broken promise."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, Callable, List, Optional

import pytest

from tests.faults import recorder
from tests.faults.recorder import Journal, Limits, Verdict, check, load, value
from tools import check_history


class Clock:
    """A clock that the test advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    # Replacing it in the module time would affect all other code too.
    monkeypatch.setattr(recorder, "time", types.SimpleNamespace(monotonic=clock))
    return clock


@pytest.fixture
def judge(tmp_path: Path, clock: Clock) -> Callable[..., Verdict]:
    return lambda **limits: check(load(tmp_path), Limits(**limits))


@pytest.fixture
def storer(tmp_path: Path, clock: Clock) -> Journal:
    return Journal(tmp_path, "storer")


@pytest.fixture
def reader(tmp_path: Path, clock: Clock) -> Journal:
    return Journal(tmp_path, "reader")


@pytest.fixture
def other(tmp_path: Path, clock: Clock) -> Journal:
    return Journal(tmp_path, "other")


def store(journal: Journal, state: str, version: int, task_id: str = "t") -> Any:
    result: Any = value(task_id, version)
    if state == "FAILURE":
        result = ValueError(result)
    with journal.storing(task_id, state, result):
        pass
    return result


def now() -> float:
    """Return the time by the clock of the recorder, which the tests set."""
    return float(vars(recorder)["time"].monotonic())


def look_up(journal: Journal, state: str, result: Any, kind: str = "look-up") -> None:
    journal.read(kind, now(), "t", state, result)


def kinds(verdict: Verdict) -> List[str]:
    return [violation.kind for violation in verdict.violations]


def test_a_faultless_history_has_no_violations(
    storer: Journal, reader: Journal, other: Journal, judge: Callable[..., Verdict]
) -> None:
    number = reader.began_to_wait(["t"], 10)
    look_up(other, "PENDING", None)
    for state, version in (("STARTED", 0), ("PROGRESS", 1), ("FAILURE", 2), ("SUCCESS", 3)):
        result = store(storer, state, version)
        look_up(other, state, result)
        reader.heard(number, "t", state, result)
    # Another run that finishes too late.
    store(storer, "FAILURE", 4)
    look_up(other, "SUCCESS", value("t", 3))
    reader.got(number, "t", "SUCCESS", value("t", 3))
    reader.waited(number)
    verdict = judge()
    assert verdict.violations == [], verdict.text()
    assert (verdict.at_stake, verdict.refused) == (1, 0)


@pytest.mark.parametrize("state", ["SUCCESS", "FAILURE"])
def test_it_finds_a_lost_result(
    storer: Journal, reader: Journal, judge: Callable[..., Verdict], state: str
) -> None:
    store(storer, state, 0)
    look_up(reader, "PENDING", None)
    assert kinds(judge()) == ["lost"]


def test_a_failed_or_unfinished_store_promises_nothing(
    storer: Journal, reader: Journal, judge: Callable[..., Verdict]
) -> None:
    with storer.storing("t", "SUCCESS", value("t", 0)):
        raise OSError("the broker is away")
    look_up(reader, "PENDING", None)
    # A reader may find it nevertheless.
    look_up(reader, "SUCCESS", value("t", 0))
    storer.began_to_store("t", "SUCCESS", value("t", 1))
    verdict = judge()
    assert verdict.violations == []
    assert (verdict.at_stake, verdict.refused) == (0, 1)


def test_a_read_concurrent_with_a_store_may_find_either_state(
    storer: Journal, reader: Journal, judge: Callable[..., Verdict]
) -> None:
    began = now()
    store(storer, "SUCCESS", 0)
    reader.read("look-up", began, "t", "PENDING", None)
    assert kinds(judge()) == []


def test_an_intermediate_state_is_promised_once_a_later_final_one_is(
    storer: Journal, reader: Journal, judge: Callable[..., Verdict]
) -> None:
    store(storer, "PROGRESS", 0)
    look_up(reader, "PENDING", None)
    assert kinds(judge()) == []
    store(storer, "SUCCESS", 0, "another")
    look_up(reader, "PENDING", None)
    assert kinds(judge()) == ["older"]


@pytest.mark.parametrize("kind", ["look-up", "poll"])
def test_it_finds_a_process_whose_reads_go_back(
    storer: Journal, reader: Journal, judge: Callable[..., Verdict], kind: str
) -> None:
    older, newer = store(storer, "PROGRESS", 0), store(storer, "PROGRESS", 1)
    look_up(reader, "PROGRESS", newer, kind)
    look_up(reader, "PROGRESS", older, kind)
    assert kinds(judge()) == ["older"]


def test_it_finds_a_look_up_older_than_one_of_another_process(
    storer: Journal, reader: Journal, other: Journal, judge: Callable[..., Verdict]
) -> None:
    older, newer = store(storer, "PROGRESS", 0), store(storer, "PROGRESS", 1)
    look_up(reader, "PROGRESS", newer)
    look_up(other, "PROGRESS", older)
    assert kinds(judge()) == ["older"]


def test_a_pushed_state_may_lag_up_to_the_limit(
    storer: Journal, reader: Journal, clock: Clock, judge: Callable[..., Verdict]
) -> None:
    store(storer, "SUCCESS", 0)
    clock.now += 5
    look_up(reader, "PENDING", None, "poll")
    assert kinds(judge(lag=6)) == []
    assert kinds(judge(lag=4)) == ["lost"]


def test_a_look_up_may_lag_while_a_node_is_cut_off(
    storer: Journal, reader: Journal, clock: Clock, judge: Callable[..., Verdict]
) -> None:
    store(storer, "SUCCESS", 0)
    storer.cut()
    clock.now += 5
    look_up(reader, "PENDING", None)
    assert kinds(judge(lag=6)) == []
    assert kinds(judge(lag=4)) == ["lost"]
    storer.cut()
    clock.now += 7
    look_up(reader, "PENDING", None)
    assert kinds(judge(lag=6)) == ["lost"]


def test_it_finds_a_replaced_success(
    storer: Journal, reader: Journal, judge: Callable[..., Verdict]
) -> None:
    store(storer, "SUCCESS", 0)
    failure = store(storer, "FAILURE", 1)
    look_up(reader, "FAILURE", failure)
    assert kinds(judge()) == ["replaced"]


def test_it_finds_a_success_whose_value_changes(
    storer: Journal, reader: Journal, judge: Callable[..., Verdict]
) -> None:
    first, second = store(storer, "SUCCESS", 0), store(storer, "SUCCESS", 1)
    look_up(reader, "SUCCESS", first)
    look_up(reader, "SUCCESS", second)
    assert kinds(judge()) == ["replaced"]


@pytest.mark.parametrize("result", [value("t", 1), {**value("t", 0), "text": "x"}, None])
def test_it_finds_a_state_that_was_never_stored(
    storer: Journal, reader: Journal, judge: Callable[..., Verdict], result: Any
) -> None:
    store(storer, "SUCCESS", 0)
    look_up(reader, "SUCCESS", result)
    assert kinds(judge()) == ["wrong"]


def test_it_finds_a_result_of_an_unknown_task(
    reader: Journal, judge: Callable[..., Verdict]
) -> None:
    look_up(reader, "SUCCESS", value("t", 0))
    assert kinds(judge()) == ["wrong"]


@pytest.mark.parametrize("error", [None, "TimeoutError()"])
def test_it_finds_a_wait_that_exceeds_its_timeout(
    reader: Journal, clock: Clock, judge: Callable[..., Verdict], error: Optional[str]
) -> None:
    number = reader.began_to_wait(["t"], 10)
    reader.got(number, "t", "PENDING", None)
    clock.now += 14
    reader.waited(number, error)
    assert kinds(judge(grace=5)) == []
    assert kinds(judge(grace=3)) == ["late"]


def test_it_finds_a_wait_that_never_ends(
    reader: Journal, clock: Clock, judge: Callable[..., Verdict]
) -> None:
    reader.began_to_wait(["t"], 10)
    clock.now += 9
    assert kinds(judge(grace=5)) == []
    clock.now += 9
    assert kinds(judge(grace=5)) == ["late"]


def test_it_finds_a_look_up_that_raises_too_late(
    reader: Journal, clock: Clock, judge: Callable[..., Verdict]
) -> None:
    began = now()
    clock.now += 30
    reader.failed_to_read(began, 10, "LookupTimeout()")
    assert kinds(judge(grace=15)) == ["late"]
    assert kinds(judge(grace=25)) == []


def test_it_finds_a_wait_that_is_given_a_result_twice(
    storer: Journal, reader: Journal, judge: Callable[..., Verdict]
) -> None:
    number = reader.began_to_wait(["t"], 10)
    result = store(storer, "SUCCESS", 0)
    reader.got(number, "t", "SUCCESS", result)
    reader.got(number, "t", "SUCCESS", result)
    reader.waited(number)
    assert kinds(judge()) == ["twice"]


def test_it_finds_a_wait_that_is_given_a_state_twice(
    storer: Journal, reader: Journal, judge: Callable[..., Verdict]
) -> None:
    number = reader.began_to_wait(["t"], 10)
    result = store(storer, "PROGRESS", 0)
    reader.heard(number, "t", "PROGRESS", result)
    reader.heard(number, "t", "PROGRESS", result)
    assert kinds(judge()) == ["twice"]


def test_two_waits_may_get_the_same_result(
    storer: Journal, reader: Journal, judge: Callable[..., Verdict]
) -> None:
    result = store(storer, "SUCCESS", 0)
    for _ in range(2):
        number = reader.began_to_wait(["t"], 10)
        reader.got(number, "t", "SUCCESS", result)
        reader.waited(number)
    assert kinds(judge()) == []


def test_it_finds_a_wait_that_misses_a_stored_result(
    storer: Journal, reader: Journal, clock: Clock, judge: Callable[..., Verdict]
) -> None:
    number = reader.began_to_wait(["t"], 60)
    store(storer, "SUCCESS", 0)
    clock.now += 60
    reader.waited(number, "TimeoutError()")
    assert kinds(judge(lag=45)) == ["missed"]
    assert kinds(judge(lag=65)) == []


def test_it_finds_a_wait_that_returns_without_its_result(
    storer: Journal, reader: Journal, judge: Callable[..., Verdict]
) -> None:
    store(storer, "SUCCESS", 0)
    reader.waited(reader.began_to_wait(["t"], 60))
    assert kinds(judge()) == ["missed"]


def test_a_deleted_result_is_not_missed(
    storer: Journal, reader: Journal, clock: Clock, tmp_path: Path
) -> None:
    store(storer, "SUCCESS", 0)
    deleted = clock()
    store(storer, "SUCCESS", 0, "later")
    number = reader.began_to_wait(["t", "later"], 60)
    clock.now += 60
    reader.waited(number, "TimeoutError()")
    verdict = check(load(tmp_path), since=deleted, deleted=deleted)
    assert [violation.task_id for violation in verdict.violations] == ["later"]


def test_a_forgotten_or_expired_result_is_not_missed(
    storer: Journal, reader: Journal, clock: Clock, judge: Callable[..., Verdict]
) -> None:
    store(storer, "SUCCESS", 0)
    look_up(reader, "SUCCESS", value("t", 0))
    clock.now += 10
    look_up(reader, "PENDING", None)
    assert kinds(judge()) == ["lost"]
    assert kinds(judge(expires=5)) == []
    assert kinds(judge(expires=15)) == ["lost"]


def test_a_forgotten_result_is_not_lost(
    storer: Journal, reader: Journal, judge: Callable[..., Verdict]
) -> None:
    store(storer, "SUCCESS", 0)
    storer.began_to_forget("t")
    look_up(reader, "PENDING", None)
    assert kinds(judge()) == []


def test_an_unconfirmed_state_may_disappear_when_the_broker_is_killed(
    storer: Journal, reader: Journal, other: Journal, judge: Callable[..., Verdict]
) -> None:
    storer.began_to_store("t", "SUCCESS", value("t", 0))
    look_up(reader, "SUCCESS", value("t", 0))
    storer.crashed()
    look_up(reader, "PENDING", None)
    look_up(other, "PENDING", None)
    assert kinds(judge()) == []
    # Once it is found again, it counts again.
    look_up(reader, "SUCCESS", value("t", 0))
    look_up(reader, "PENDING", None)
    assert kinds(judge()) == ["lost"]


def test_a_confirmed_state_must_survive_a_killed_broker(
    storer: Journal, reader: Journal, judge: Callable[..., Verdict]
) -> None:
    store(storer, "SUCCESS", 0)
    look_up(reader, "SUCCESS", value("t", 0))
    for _ in range(2):
        storer.crashed()
    look_up(reader, "PENDING", None, "poll")
    assert kinds(judge()) == ["lost"]


def wait_for_body(reader: Journal, clock: Clock) -> None:
    reader.sends_chord("body", ["t", "u"])
    number = reader.began_to_wait(["body"], 60)
    clock.now += 60
    reader.waited(number, "TimeoutError()")


@pytest.mark.parametrize(
    ("ended", "fired", "expected"),
    [("tu", False, ["unfired"]), ("t", False, []), ("tu", True, [])],
)
def test_a_body_must_be_sent_when_its_header_has_ended(
    ended: str,
    fired: bool,
    expected: List[str],
    storer: Journal,
    reader: Journal,
    judge: Callable[..., Verdict],
    clock: Clock,
    tmp_path: Path,
) -> None:
    for task_id in ended:
        store(storer, "SUCCESS", 0, task_id)
    if fired:
        storer.fired("body")
    wait_for_body(reader, clock)
    verdict = judge(lag=45)
    assert kinds(verdict) == expected
    assert [v.rule for v in check_history.check(recorder.history(tmp_path))] == expected
    assert (verdict.chords, verdict.doubled) == (int(fired), 0)


def test_a_body_may_be_sent_long_after_its_header_has_ended(
    storer: Journal, reader: Journal, judge: Callable[..., Verdict], clock: Clock, tmp_path: Path
) -> None:
    for task_id in "tu":
        store(storer, "SUCCESS", 0, task_id)
    wait_for_body(reader, clock)
    assert kinds(judge(lag=61)) == []
    assert check_history.check(recorder.history(tmp_path), lag=61) == []


def test_a_body_that_was_sent_twice_is_counted(
    storer: Journal, reader: Journal, judge: Callable[..., Verdict], clock: Clock
) -> None:
    wait_for_body(reader, clock)
    storer.fired("body")
    assert (judge().chords, judge().doubled) == (1, 0)
    storer.fired("body")
    verdict = judge()
    assert (verdict.violations, verdict.chords, verdict.doubled) == ([], 1, 1)


def test_the_journal_of_a_killed_process_is_read_up_to_its_last_line(
    tmp_path: Path, storer: Journal, reader: Journal, judge: Callable[..., Verdict]
) -> None:
    store(storer, "SUCCESS", 0)
    with next(tmp_path.glob("storer*")).open("ab") as journal:
        journal.write(b'["store", "u", "SUCC')
    look_up(reader, "PENDING", None)
    assert kinds(judge()) == ["lost"]


def test_a_task_that_ran_twice_was_stored_at_its_first_store(
    storer: Journal, reader: Journal, other: Journal, judge: Callable[..., Verdict]
) -> None:
    # The journals are read in the order of their names.
    store(storer, "SUCCESS", 0)
    look_up(reader, "SUCCESS", value("t", 0))
    store(other, "SUCCESS", 0)
    assert kinds(judge()) == []


def test_only_operations_within_the_given_times_are_checked(
    tmp_path: Path, storer: Journal, reader: Journal, clock: Clock
) -> None:
    store(storer, "SUCCESS", 0)
    look_up(reader, "PENDING", None)
    between = clock.now
    clock.now += 1
    store(storer, "SUCCESS", 0, "u")
    record = load(tmp_path)
    assert kinds(check(record, until=between)) == ["lost"]
    assert kinds(check(record, since=between)) == []
    assert record.promised(since=between) == ["u"]


def test_the_history_for_the_independent_checker_agrees(
    storer: Journal, reader: Journal, judge: Callable[..., Verdict], tmp_path: Path, clock: Clock
) -> None:
    number = reader.began_to_wait(["t"], 10)
    look_up(reader, "PENDING", None)
    for state, version in (("PROGRESS", 0), ("SUCCESS", 1)):
        result = store(storer, state, version)
        reader.heard(number, "t", state, result)
        look_up(reader, state, result)
    reader.got(number, "t", "SUCCESS", value("t", 1))
    reader.waited(number)
    storer.crashed()
    assert judge().violations == []
    assert check_history.check(recorder.history(tmp_path)) == []
    look_up(reader, "PENDING", None)
    assert kinds(judge()) == [v.rule for v in check_history.check(recorder.history(tmp_path))]
    storer.deleted()
    reader.began_to_forget("t")
    reader.failed_to_read(clock(), 1, "TimeoutError()")
    reader.sends_chord("b", ["t"])
    storer.fired("b")
    assert {event["f"] for event in recorder.history(tmp_path)} == {
        "store", "read", "wait", "deliver", "crash", "delete", "forget", "chord", "fire"
    }  # fmt: skip
