"""What is buffered for a coroutine that reads its states too slowly."""

from __future__ import annotations

from typing import List

import pytest
from celery import states

from celery_amqp_results.aio import streams
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.ranking import is_final
from celery_amqp_results.waiting.progress import Update

LIMIT = 100


@pytest.fixture(autouse=True)
def examined(monkeypatch: pytest.MonkeyPatch) -> List[str]:
    """The buffered states that were examined to see whether they may be left out."""
    found: List[str] = []

    def noting(state: str) -> bool:
        found.append(state)
        return is_final(state)

    monkeypatch.setattr(streams, "MAX_BUFFERED", LIMIT)
    monkeypatch.setattr(streams, "is_final", noting)
    return found


def update(task_id: str, state: str, published: int = 1) -> Update:
    message = StateMessage(task_id, state, published, b"{}", "application/json", "utf-8")
    return Update(task_id, [message], message if is_final(state) else None)


def test_buffering_many_final_states_examines_each_only_a_few_times_and_warns_of_nothing(
    examined: List[str], caplog: pytest.LogCaptureFixture
) -> None:
    ids = [str(number) for number in range(20 * LIMIT)]
    feed = streams._Feed(ids, None)
    for task_id in ids:
        feed.take(update(task_id, states.SUCCESS))
    assert [state.id for state in feed.arrived] == ids
    assert len(examined) <= 2 * len(ids)
    assert feed.left_out == 0
    assert not caplog.records


def test_the_limit_applies_again_once_the_final_states_are_read() -> None:
    ids = [str(number) for number in range(10 * LIMIT)]
    feed = streams._Feed([*ids, "running"], None)
    for task_id in ids:
        feed.take(update(task_id, states.SUCCESS))
    feed.arrived.clear()
    for step in range(10 * LIMIT):
        feed.take(update("running", "PROGRESS", step + 1))
        assert len(feed.arrived) <= LIMIT
    assert feed.arrived[-1].published == 10 * LIMIT


def test_one_warning_says_that_states_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    feed = streams._Feed(None, None)
    for step in range(10 * LIMIT):
        feed.take(update("running", "PROGRESS", step + 1))
    assert feed.left_out + len(feed.arrived) == 10 * LIMIT
    (record,) = caplog.records
    assert "the oldest are left out" in record.getMessage()
