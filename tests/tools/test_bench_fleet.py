"""The load generator of the benchmarks: its timetable, its verdict, and counting connections."""

from __future__ import annotations

import os
import socket
import sys
import threading
import uuid
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import processes
from bench.journal import Poll, judge
from bench.schedule import JITTER, POLL, POLLS, SEND, STORED_AFTER, Timetable
from bench.ticks import Ticks, ticking

TABLES = st.builds(
    Timetable,
    seed=st.text(),
    processes=st.integers(2, 8),
    storing=st.integers(1, 4),
    rate=st.integers(1, 200).map(float),
    seconds=st.floats(0.1, 0.5),
)

# -- timetable -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(TABLES)
def test_every_task_is_sent_once_and_stored_once(table: Timetable) -> None:
    steps = [step for number in range(table.processes) for step in table.steps(number)]
    sent = Counter(step.task for step in steps if step.action == SEND)
    stored = Counter(task for number in range(table.storing) for _, task in table.stores(number))
    assert sent == stored == Counter(range(table.tasks))


@settings(deadline=None, max_examples=30)
@given(TABLES)
def test_each_poll_is_on_another_process_than_the_sender(table: Timetable) -> None:
    polls = Counter(
        step.task
        for number in range(table.processes)
        for step in table.steps(number)
        if step.action == POLL and number != table.sender(step.task)
    )
    assert polls == Counter({task: len(POLLS) for task in range(table.tasks)})


@settings(deadline=None, max_examples=30)
@given(TABLES)
def test_steps_are_in_order_and_end_in_time(table: Timetable) -> None:
    for number in range(table.processes):
        times = [step.at for step in table.steps(number)]
        assert times == sorted(times)
        assert all(0 <= at <= table.length for at in times)


def test_one_poll_comes_just_after_the_result_is_stored() -> None:
    table = Timetable("seed", 4, 1, 10.0, 1.0)
    (first,) = [
        step.at
        for number in range(4)
        for step in table.steps(number)
        if step.task == 0 and step.action == POLL and 0 <= step.at - STORED_AFTER <= JITTER
    ]
    assert first > STORED_AFTER


def test_ids_differ_between_rounds_and_are_uuids_of_version_four() -> None:
    ids = [Timetable(seed, 2, 1, 10.0, 1.0).task_id(n) for seed in "ab" for n in range(50)]
    assert len(set(ids)) == 100
    assert {uuid.UUID(text).version for text in ids} == {4}


# -- verdict ---------------------------------------------------------------------------------------


def test_an_answer_without_a_result_that_was_stored_before_the_question_is_stale() -> None:
    polls = [Poll(1, asked=2.0, answered=2.1, final=False)]
    assert judge(polls, {1: 1.9}).stale == 1
    # The store returned after the question: both answers are right.
    assert judge(polls, {1: 2.05}).stale == 0
    # It never returned.
    assert judge(polls, {}).stale == 0


def test_a_result_that_another_process_has_seen_must_not_disappear() -> None:
    seen = Poll(1, asked=1.0, answered=1.2, final=True)
    for asked, back in ((1.1, 0), (1.3, 1)):
        assert judge([seen, Poll(1, asked, asked + 0.1, False)], {}).back == back
    assert judge([seen, Poll(2, 1.3, 1.4, False)], {}).back == 0


def test_milliseconds_of_polls_count_from_question_to_answer() -> None:
    verdict = judge([Poll(1, 1.0, 1.002, True), Poll(1, 2.0, 2.004, True)], {})
    assert verdict.percentile(50) == pytest.approx(2.0)
    assert verdict.percentile(99) == pytest.approx(4.0)


# -- processes -------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_connections_of_a_process_to_a_port_are_counted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert processes.connections(os.getpid(), port) == 0
        # The accepted end has the port as its own, so that it does not count.
        with socket.create_connection(("127.0.0.1", port)), server.accept()[0]:
            assert processes.connections(os.getpid(), port) == 1
        assert processes.connections(os.getpid(), port) == 0


def test_a_process_that_has_ended_has_no_connections_and_no_processor_time() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert processes.connections(child, 1) == 0
    assert processes.cpu_seconds(child) == 0


def test_ticks_of_several_threads_are_all_counted() -> None:
    with ticking() as ticks:
        mine = Ticks(ticks.path)

        def work() -> None:
            for _ in range(500):
                mine.add()

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ticks.total() == 4000
