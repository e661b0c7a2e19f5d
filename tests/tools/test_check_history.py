"""The checker of histories finds violations: each test plants one of each kind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest

from tools import check_history

Value = Tuple[str, int, str]

STARTED: Value = ("STARTED", 0, "s")
PROGRESS: Value = ("PROGRESS", 1, "p")
FAILURE: Value = ("FAILURE", 2, "f")
SUCCESS: Value = ("SUCCESS", 3, "r")
AGAIN: Value = ("SUCCESS", 103, "other")
PENDING: Value = ("PENDING", -1, "")


class Script:
    """Writes a history, one second for each step."""

    def __init__(self) -> None:
        self.events: List[Dict[str, Any]] = []
        self.time = 0.0
        self._op = 0

    def event(self, process: str, type: str, f: str, **more: Any) -> None:
        """Append an event."""
        self.time += 1
        self.events.append({"time": self.time, "process": process, "type": type, "f": f, **more})

    def store(self, value: Value, outcome: str = "ok", process: str = "w") -> None:
        """Store a state of the task."""
        self.event(process, "invoke", "store", task="t", value=value)
        if outcome:
            self.event(process, outcome, "store", task="t", value=value)

    def read(self, value: Value, process: str = "r", kind: str = "look-up") -> None:
        """Read the task."""
        self._op += 1
        read = {"task": "t", "op": self._op, "kind": kind}
        self.event(process, "invoke", "read", **read)
        self.event(process, "ok", "read", value=value, **read)

    def wait(
        self, *delivered: Value, outcome: str = "ok", seconds: float = 0.0, by: str = "return"
    ) -> None:
        """Wait for the task for at most 10 seconds."""
        self.event("c", "invoke", "wait", op=1, tasks=["t"], timeout=10.0)
        self.time += seconds
        for value in delivered:
            self.event("c", "info", "deliver", op=1, task="t", value=value, by=by)
        if outcome:
            self.event("c", outcome, "wait", op=1)

    def broken(self, lag: float = 5.0) -> List[str]:
        """Return the rules that the checker says were broken."""
        return [v.rule for v in check_history.check(self.events, lag=lag, grace=2.0)]


@pytest.fixture
def script() -> Script:
    return Script()


def test_a_faultless_history_has_no_violations(script: Script) -> None:
    script.read(PENDING)
    for value in (STARTED, PROGRESS, FAILURE, SUCCESS):
        script.store(value)
        script.read(value)
    script.store(AGAIN)
    script.read(SUCCESS, "other")
    script.wait(SUCCESS)
    assert script.broken() == []


def test_a_state_that_was_never_stored_is_invented(script: Script) -> None:
    script.store(FAILURE)
    script.read(SUCCESS)
    assert script.broken() == ["invented"]


def test_a_state_read_before_its_store_began_is_invented(script: Script) -> None:
    script.read(SUCCESS)
    script.store(SUCCESS)
    assert script.broken() == ["invented"]


@pytest.mark.parametrize("value", [SUCCESS, FAILURE])
def test_a_confirmed_final_state_that_is_not_found_is_lost(script: Script, value: Value) -> None:
    script.store(value)
    script.read(PENDING)
    assert script.broken() == ["lost"]


@pytest.mark.parametrize("outcome", ["info", ""])
def test_a_store_without_an_answer_promises_nothing(script: Script, outcome: str) -> None:
    script.store(SUCCESS, outcome)
    script.read(PENDING)
    script.read(SUCCESS)
    assert script.broken() == []


def test_a_state_that_was_read_once_must_be_found_again(script: Script) -> None:
    script.store(SUCCESS, "")
    script.read(SUCCESS)
    script.read(PENDING, "other")
    assert script.broken() == ["lost"]


def test_a_crash_may_undo_a_state_that_was_not_confirmed(script: Script) -> None:
    script.store(SUCCESS, "")
    script.read(SUCCESS)
    script.event("h", "info", "crash")
    script.read(PENDING, "other")
    assert script.broken() == []


def test_a_crash_must_not_undo_a_confirmed_state(script: Script) -> None:
    script.store(SUCCESS)
    script.event("h", "info", "crash")
    script.read(PENDING)
    assert script.broken() == ["lost"]


def test_an_intermediate_state_is_durable_once_a_later_final_state_is(script: Script) -> None:
    script.store(PROGRESS)
    script.read(PENDING)
    assert script.broken() == []
    script.store(FAILURE)
    script.read(STARTED)
    assert script.broken() == ["invented"]
    script.events.insert(0, {"time": 0.0, "process": "w", "type": "invoke", "f": "store",
                             "task": "t", "value": STARTED})  # fmt: skip
    assert script.broken() == ["stale"]


def test_a_read_older_than_an_earlier_read_is_stale(script: Script) -> None:
    script.store(STARTED)
    script.store(PROGRESS)
    script.read(PROGRESS)
    script.read(STARTED, "other")
    assert script.broken() == ["stale"]


def test_a_poll_may_lag_up_to_the_limit(script: Script) -> None:
    script.store(SUCCESS)
    script.read(PENDING, kind="poll")
    assert script.broken(lag=5) == []
    script.time += 5
    script.read(PENDING, kind="poll")
    assert script.broken(lag=5) == ["lost"]


def test_a_look_up_may_lag_while_a_node_is_cut_off(script: Script) -> None:
    script.store(SUCCESS)
    script.event("h", "info", "cut")
    script.read(PENDING)
    assert script.broken(lag=5) == []
    script.event("h", "info", "cut")
    script.time += 6
    script.read(PENDING)
    assert script.broken(lag=5) == ["lost"]


def test_a_success_that_changes_is_found(script: Script) -> None:
    script.store(SUCCESS)
    script.store(AGAIN)
    script.read(SUCCESS)
    script.read(AGAIN)
    assert script.broken() == ["changed"]


def test_a_success_that_is_replaced_is_found(script: Script) -> None:
    script.store(FAILURE)
    script.store(SUCCESS)
    script.read(FAILURE)
    assert script.broken() == ["changed"]


@pytest.mark.parametrize("by", ["return", "message"])
def test_a_state_delivered_twice_to_a_wait_is_found(script: Script, by: str) -> None:
    script.store(SUCCESS)
    script.wait(SUCCESS, SUCCESS, outcome="", by=by)
    assert script.broken() == ["twice"]


def test_message_callbacks_may_get_superseded_states_but_no_invented_ones(script: Script) -> None:
    script.store(FAILURE)
    script.store(SUCCESS)
    script.wait(FAILURE, SUCCESS, outcome="", by="message")
    assert script.broken() == []
    script.wait(PROGRESS, outcome="", by="message")
    assert script.broken() == ["invented"]


@pytest.mark.parametrize("outcome", ["fail", ""])
def test_a_wait_that_exceeds_its_timeout_is_late(script: Script, outcome: str) -> None:
    script.wait(outcome=outcome, seconds=20)
    script.read(PENDING)
    assert script.broken() == ["late"]


def test_a_read_that_fails_after_its_timeout_is_late(script: Script) -> None:
    script.event("r", "invoke", "read", op=1, kind="look-up", timeout=1.0)
    script.time += 5
    script.event("r", "fail", "read", op=1, kind="look-up")
    assert script.broken() == ["late"]


def test_a_wait_that_returns_without_its_result_has_missed_it(script: Script) -> None:
    script.wait()
    assert script.broken() == ["missed"]


def test_a_wait_that_times_out_long_after_the_store_has_missed_it(script: Script) -> None:
    script.store(SUCCESS)
    script.wait(outcome="fail", seconds=8)
    assert script.broken() == ["missed"]


@pytest.mark.parametrize("event", ["forget", "delete"])
def test_forgotten_and_deleted_results_are_not_lost(script: Script, event: str) -> None:
    script.store(SUCCESS)
    script.event("h", "info", event, task="t")
    script.read(PENDING)
    script.wait(outcome="fail", seconds=8)
    assert script.broken() == []


def test_the_command_reads_a_file_and_needs_nothing_of_the_project(
    script: Script, tmp_path: Path
) -> None:
    script.store(SUCCESS)
    script.read(PENDING)
    path = tmp_path / "history.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in script.events))
    done = subprocess.run(
        [sys.executable, "-I", check_history.__file__, str(path)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "lost t" in done.stdout
    assert done.stdout.endswith("4 events, 1 violations\n")
