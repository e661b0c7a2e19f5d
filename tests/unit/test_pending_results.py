"""The thread that calls callbacks, with a follower without a broker."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, Dict, Iterable, List, Optional

import pytest

from celery_amqp_results import errors
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.waiting.callbacks import PendingResults
from celery_amqp_results.waiting.progress import Update
from tests.conftest import PATIENCE
from tests.unit.fakes import state


class EndedTasks:
    """A follower of tasks that have all ended."""

    def __init__(self) -> None:
        self.pending: Dict[str, Optional[StateMessage]] = {}
        self.pauses = 0
        self._poked = threading.Event()

    def add(self, ids: Iterable[str]) -> None:
        self.pending.update(dict.fromkeys(ids))

    def discard(self, task_id: str) -> None:
        self.pending.pop(task_id, None)

    def poke(self) -> None:
        self._poked.set()

    def pause(self, seconds: float) -> None:
        self.pauses += 1

    def step(self, deadline: Optional[float], pause: float) -> List[Update]:
        if not self.pending:
            self._poked.wait(pause)
            self._poked.clear()
        finals = [state(task_id) for task_id in self.pending]
        self.pending.clear()
        return [Update(final.id, [final], final) for final in finals]

    def close(self) -> None:
        self.pending.clear()


def result_of(task_id: str) -> Any:
    on_ready = SimpleNamespace(listeners=[print])
    return SimpleNamespace(id=task_id, on_ready=on_ready, _cache=None)


def test_a_result_that_could_not_be_fetched_is_fetched_again_after_a_pause() -> None:
    follower, ended = EndedTasks(), threading.Event()
    resolved: List[Any] = []
    failures: List[Exception] = [
        errors.LookupTimeout("too slow"),
        errors.BackendUnavailable("gone"),
    ]

    def resolve(result: Any, final: StateMessage) -> None:
        if failures and result is second:
            raise failures.pop()
        resolved.append(result)
        if result is third:
            ended.set()

    pending = PendingResults(lambda: follower, resolve)
    first, second, third = (result_of("task") for _ in range(3))
    with pending._lock:
        pending._results["task"] = [first, second]
    pending.add(third)
    assert ended.wait(PATIENCE)
    assert [id(result) for result in resolved] == [id(first), id(second), id(third)]
    assert follower.pauses == 2
    pending.close()


@pytest.mark.parametrize("error", [SystemExit, errors.BackendUnavailable])
def test_a_callback_that_raises_anything_does_not_affect_other_results(error: Any) -> None:
    follower, ended = EndedTasks(), threading.Event()

    def resolve(result: Any, final: StateMessage) -> None:
        result._cache = {}
        if result is second:
            ended.set()
            return
        raise error("of the callback")

    pending = PendingResults(lambda: follower, resolve)
    first, second = result_of("task"), result_of("task")
    with pending._lock:
        pending._results["task"] = [first]
    pending.add(second)
    assert ended.wait(PATIENCE)
    assert follower.pauses == 0
    pending.close()
