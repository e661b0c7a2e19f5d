"""The helper threads of a leader."""

from __future__ import annotations

import threading
from typing import List

import pytest

from celery_amqp_results.chords import helpers
from tests.broker.helpers import fail_once
from tests.conftest import PATIENCE, eventually


def test_a_function_that_no_thread_could_take_is_refused_and_later_ones_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fail_once(monkeypatch, helpers)
    threads = helpers.Helpers()
    ran: List[str] = []
    with pytest.raises(RuntimeError, match="can't start new thread"):
        threads.submit(lambda: ran.append("refused"))
    assert not threads.busy
    threads.submit(lambda: ran.append("later"))
    eventually(lambda: not threads.busy)
    assert ran == ["later"]
    threads.close()


def test_a_function_waits_for_another_thread_if_none_can_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = helpers.Helpers()
    release = threading.Event()
    ran: List[int] = []
    threads.submit(lambda: ran.append(release.wait(PATIENCE)))
    fail_once(monkeypatch, helpers)
    threads.submit(lambda: ran.append(2))
    release.set()
    eventually(lambda: not threads.busy)
    assert ran == [True, 2]
    threads.close()


def test_a_thread_survives_whatever_a_function_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(helpers, "HELPERS", 1)
    threads = helpers.Helpers()
    ran: List[str] = []

    def leave() -> None:
        raise SystemExit(1)

    threads.submit(leave)
    eventually(lambda: not threads.busy)
    threads.submit(lambda: ran.append("later"))
    eventually(lambda: not threads.busy, timeout=PATIENCE / 4)
    assert ran == ["later"]
    threads.close()
