"""What a watcher sees: the rule alone, and on a transport that needs no broker."""

from __future__ import annotations

import threading
import uuid
from typing import Any, Dict, List

import pytest
from celery import Celery, states
from celery.exceptions import TimeoutError
from hypothesis import given
from hypothesis import strategies as st

from celery_amqp_results import errors
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.ranking import fold, supersedes
from celery_amqp_results.waiting.progress import Newest, Update
from celery_amqp_results.waiting.watch import read_target

#: Seconds after which a wait counts as hanging.
LONG = 30.0

messages = st.builds(
    StateMessage,
    id=st.sampled_from(["a", "b"]),
    state=st.sampled_from(["STARTED", "PROGRESS", "RETRY", "ABORTED", "FAILURE", "SUCCESS"]),
    published=st.integers(1, 12),
    body=st.just(b"{}"),
    content_type=st.just("application/json"),
    content_encoding=st.just("utf-8"),
)


@st.composite
def updates(draw: st.DrawFn) -> List[Update]:
    """Updates that a follower could deliver: states in any order and grouping, pushed or read."""
    found = []
    for piece in draw(st.lists(st.lists(messages, min_size=1, max_size=4), max_size=10)):
        for task_id in ("a", "b"):
            new = sorted((m for m in piece if m.id == task_id), key=lambda m: m.published)
            if new:
                found.append(Update(task_id, new, None, draw(st.booleans())))
    return found


@given(updates())
def test_each_reported_state_supersedes_the_one_before_and_the_last_is_current(
    brought: List[Update],
) -> None:
    newest, seen = Newest(), []
    for update in brought:
        seen += newest.of_update(update)
    for task_id in ("a", "b"):
        of_task = [state for state in seen if state.id == task_id]
        for before, after in zip(of_task, of_task[1:]):
            assert supersedes(after, before)
        everything = [s for update in brought for s in update.states if s.id == task_id]
        expected = fold(everything)
        if expected is None:
            assert not of_task
        else:
            last = of_task[-1]
            assert not supersedes(expected, last) or expected.published == last.published
            keys = [(state.published, state.state) for state in of_task]
            # If two states have the same microsecond, either may be the later one.
            every = {(state.published, state.state) for state in everything}
            tied = len({published for published, _ in every}) < len(every)
            assert tied or len(set(keys)) == len(keys)


@given(st.lists(messages, max_size=20))
def test_past_states_are_skipped_and_pushed_ones_are_not(states_of_both: List[Any]) -> None:
    mine = sorted((s for s in states_of_both if s.id == "a"), key=lambda s: s.published)
    if not mine:
        return
    assert Newest().of_update(Update("a", mine, None, history=True)) == [fold(mine)]
    assert Newest().of_update(Update("a", mine, None))[0] == mine[0]


def test_tasks_are_forgotten_beyond_the_limit() -> None:
    newest = Newest(limit=2)
    for number in range(5):
        assert newest.accept(StateMessage(str(number), "STARTED", 1, b"", "t", "e"))
    assert len(newest._last) == 2
    assert not newest.accept(StateMessage("4", "STARTED", 1, b"", "t", "e"))
    newest.drop("4")
    assert newest.accept(StateMessage("4", "STARTED", 1, b"", "t", "e"))


@pytest.mark.parametrize("target", [1, object(), [["a"], 1]])
def test_invalid_targets_are_refused(target: Any) -> None:
    with pytest.raises(TypeError, match="cannot be watched"):
        read_target(target)


def test_ids_may_be_bytes_and_duplicates_are_watched_once() -> None:
    assert read_target([b"a", "b", ("a", ["b"])]).ids == ["a", "b"]


def memory_app() -> Celery:
    app = Celery("memory", broker="memory://", backend="amqp://", set_as_current=False)
    app.conf.result_exchange = f"test-{uuid.uuid4().hex[:12]}"
    return app


def test_tasks_are_watched_over_memory() -> None:
    app, task_id = memory_app(), str(uuid.uuid4())
    app.backend.store_result(task_id, None, states.STARTED)
    found: List[Dict[str, Any]] = []
    seen = threading.Semaphore(0)

    def watch() -> None:
        for each in app.backend.watch(task_id, timeout=LONG):
            found.append(each)
            seen.release()

    thread = threading.Thread(target=watch)
    thread.start()
    assert seen.acquire(timeout=LONG)
    for step in range(3):
        app.backend.store_result(task_id, {"current": step}, "PROGRESS")
        assert seen.acquire(timeout=LONG)
    app.backend.store_result(task_id, 3, states.SUCCESS)
    thread.join(LONG)
    assert [each["result"] for each in found] == [None, *({"current": n} for n in range(3)), 3]
    with pytest.raises(TimeoutError):
        list(app.backend.watch([task_id, "unknown"], timeout=0))
    with pytest.raises(errors.Unsupported, match="per-task"):
        app.backend.watch()
