"""States that are read from memory after a barrier, by a process that did not send the tasks."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any, Callable, List

import amqp
import pytest
from celery import Celery, states
from celery.exceptions import TimeoutError

from celery_amqp_results import errors
from celery_amqp_results.feed import table as table_module
from celery_amqp_results.feed import views
from celery_amqp_results.feed.barriers import Barrier
from tests.broker.helpers import LONG, Waiting, new_id, open_inbox
from tests.conftest import Apps, eventually, raw_connection


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A binding may be relied on at once: there is one node."""
    monkeypatch.setattr(views, "STEADY", 0.0)


def until_live(reader: Celery, task_id: str) -> None:
    """Have *reader* ask for a task until it knows the task's shard completely."""

    def asked() -> bool:
        before = reader.backend.metrics().remembered
        reader.AsyncResult(task_id).state  # noqa: B018
        return bool(reader.backend.metrics().remembered > before)

    eventually(asked)


@pytest.fixture
def reader(make_app: Apps) -> Celery:
    return make_app(shards=1)


@pytest.fixture
def writer(make_app: Apps) -> Celery:
    return make_app(shards=1)


def test_a_state_is_read_without_a_request_to_the_shard(writer: Celery, reader: Celery) -> None:
    task_id = new_id()
    until_live(reader, task_id)
    before = reader.backend.metrics()
    assert before.views == 1
    for state in (states.STARTED, states.SUCCESS):
        writer.backend.store_result(task_id, 1, state)
        if state == states.SUCCESS:
            assert reader.AsyncResult(task_id).state == state
    assert reader.AsyncResult(new_id()).state == states.PENDING
    after = reader.backend.metrics()
    assert after.shards_read == before.shards_read
    assert after.barriers > before.barriers
    assert after.view_bytes > before.view_bytes


def test_results_from_before_are_known_to_exist(writer: Celery, reader: Celery) -> None:
    # Given results that were packed, and others that were not
    ids = [new_id() for _ in range(100)]
    for number, task_id in enumerate(ids):
        writer.backend.store_result(task_id, number, states.SUCCESS)
    until_live(reader, new_id())
    # Then all are found, and nothing else
    assert dict(reader.backend.get_many(ids, timeout=0)).keys() == set(ids)
    assert [reader.AsyncResult(task_id).get(timeout=LONG) for task_id in ids] == list(range(100))
    assert reader.AsyncResult(new_id()).state == states.PENDING


def test_what_is_forgotten_is_forgotten_in_all_processes(
    writer: Celery, reader: Celery, make_app: Apps
) -> None:
    task_id = new_id()
    until_live(reader, task_id)
    writer.backend.store_result(task_id, 1, states.SUCCESS)
    assert reader.AsyncResult(task_id).state == states.SUCCESS
    make_app(shards=1).AsyncResult(task_id).forget()
    # Then this process may return it for a moment: its last barrier was just now
    eventually(lambda: reader.AsyncResult(task_id).state == states.PENDING)
    assert not reader.backend.task_result_exists(task_id)


@pytest.mark.parametrize(
    ("final", "barriers"), [(states.SUCCESS, 0), (states.FAILURE, 5), (states.REVOKED, 5)]
)
def test_a_success_is_answered_again_without_a_barrier_and_other_final_states_are_not(
    writer: Celery, reader: Celery, final: str, barriers: int
) -> None:
    task_id = new_id()
    until_live(reader, task_id)
    value = 1 if final == states.SUCCESS else ValueError("no")
    writer.backend.store_result(task_id, value, final)
    assert reader.AsyncResult(task_id).state == final
    before = reader.backend.metrics()
    for _ in range(5):
        assert reader.AsyncResult(task_id).state == final
    after = reader.backend.metrics()
    assert after.barriers - before.barriers == barriers
    assert after.remembered - before.remembered == 5


def test_a_success_needs_a_barrier_once_the_last_one_is_too_long_ago(
    writer: Celery, reader: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_module, "PROOF_SECONDS", 0.0)
    task_id = new_id()
    until_live(reader, task_id)
    writer.backend.store_result(task_id, 1, states.SUCCESS)
    before = reader.backend.metrics()
    for _ in range(5):
        assert reader.AsyncResult(task_id).state == states.SUCCESS
    assert reader.backend.metrics().barriers - before.barriers == 5


def test_what_has_arrived_is_taken_in_before_a_success_is_answered(
    writer: Celery, reader: Celery, make_app: Apps
) -> None:
    # Given a process whose inbox thread gets no chance to run
    task_id, other = new_id(), new_id()
    until_live(reader, task_id)
    writer.backend.store_result(task_id, 1, states.SUCCESS)
    assert reader.AsyncResult(task_id).state == states.SUCCESS
    session = reader.backend.layout.inbox._session
    with session._watch.borrowed() as borrowed:
        assert borrowed
        received = reader.backend.metrics().pushed
        writer.backend.store_result(other, 1, states.SUCCESS)
        eventually(session.link.readable)
        assert reader.backend.metrics().pushed == received
        # When it is asked
        assert reader.AsyncResult(task_id).state == states.SUCCESS
        # Then it has taken in what came
        assert reader.backend.metrics().pushed == received + 1


def test_the_thread_that_asks_reads_the_answer(
    writer: Celery, reader: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    until_live(reader, new_id())
    inbox = reader.backend.layout.inbox
    threads = set()
    prove = inbox.on_proof

    def on_proof(at: float) -> None:
        threads.add(threading.current_thread())
        prove(at)

    monkeypatch.setattr(inbox, "on_proof", on_proof)
    for _ in range(20):
        assert reader.AsyncResult(new_id()).state == states.PENDING
    assert threads == {threading.current_thread()}
    # And the inbox's own thread reads what comes between two questions
    before = reader.backend.metrics().pushed
    writer.backend.store_result(new_id(), 1, states.SUCCESS)
    eventually(lambda: reader.backend.metrics().pushed == before + 1)


def test_a_thread_that_is_interrupted_while_it_reads_makes_the_inbox_connect_again(
    writer: Celery, reader: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = new_id()
    until_live(reader, task_id)
    inbox = reader.backend.layout.inbox

    def interrupt(at: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(inbox, "on_proof", interrupt)
        with pytest.raises(KeyboardInterrupt):
            reader.AsyncResult(task_id).state  # noqa: B018
    writer.backend.store_result(task_id, 1, states.SUCCESS)
    assert reader.AsyncResult(task_id).state == states.SUCCESS
    eventually(lambda: inbox.connections == 2)
    until_live(reader, task_id)


@pytest.mark.parametrize("when", ["before the barrier is written", "before it is back"])
def test_a_connection_that_is_lost_between_question_and_answer_hides_no_state(
    writer: Celery, reader: Celery, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    task_id = new_id()
    until_live(reader, task_id)
    inbox = reader.backend.layout.inbox
    session = inbox._session
    publish = session._publish

    def lose(barrier: Barrier) -> None:
        # Given a state of which the inbox is not told, since the connection is lost before
        if when == "before it is back":
            publish(barrier)
        session.link.socket.shutdown(socket.SHUT_RDWR)
        writer.backend.store_result(task_id, ValueError("no"), states.FAILURE)
        if when == "before the barrier is written":
            publish(barrier)

    monkeypatch.setattr(session, "_publish", lose)
    # The answer is what was there when the question was asked, or newer
    assert reader.AsyncResult(task_id).state in (states.PENDING, states.FAILURE)
    assert reader.AsyncResult(task_id).state == states.FAILURE
    eventually(lambda: inbox.connections == 2)
    until_live(reader, task_id)
    assert reader.AsyncResult(task_id).state == states.FAILURE


def test_a_result_that_has_expired_is_not_read_from_memory(make_app: Apps, reader: Celery) -> None:
    task_id = new_id()
    until_live(reader, task_id)
    writer = make_app(shards=1, result_expires=0.5)
    writer.backend.store_result(task_id, 1, states.SUCCESS)
    assert reader.AsyncResult(task_id).state == states.SUCCESS
    eventually(lambda: reader.AsyncResult(task_id).state == states.PENDING)


def test_a_large_result_is_read_through_its_pointer(writer: Celery, reader: Celery) -> None:
    task_id, value = new_id(), "x" * 300_000
    until_live(reader, task_id)
    writer.backend.store_result(task_id, value, states.SUCCESS)
    assert reader.AsyncResult(task_id).get(timeout=LONG) == value
    assert reader.AsyncResult(task_id).result == value


def test_a_batch_is_read_after_one_barrier(writer: Celery, reader: Celery) -> None:
    ids = [new_id() for _ in range(200)]
    until_live(reader, ids[0])
    for task_id in ids[:100]:
        writer.backend.store_result(task_id, 1, states.SUCCESS)
    before = reader.backend.metrics()
    assert len(list(reader.backend.get_many(ids, max_iterations=1))) == 100
    after = reader.backend.metrics()
    assert after.barriers == before.barriers + 1
    assert after.shards_read == before.shards_read


def test_a_wait_in_a_live_shard_ends_with_a_push(writer: Celery, reader: Celery) -> None:
    finished, other = new_id(), new_id()
    until_live(reader, other)
    writer.backend.store_result(finished, 1, states.SUCCESS)
    before = reader.backend.metrics().shards_read
    assert reader.AsyncResult(finished).get(timeout=LONG) == 1
    assert reader.backend.metrics().shards_read == before
    waiting = Waiting(lambda: reader.AsyncResult(other).get(timeout=LONG))
    writer.backend.store_result(other, 2, states.SUCCESS)
    assert waiting.result() == 2


def test_threads_share_barriers(writer: Celery, reader: Celery) -> None:
    task_id = new_id()
    until_live(reader, task_id)
    found: List[str] = []

    def ask() -> None:
        for _ in range(30):
            found.append(reader.AsyncResult(task_id).state)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    before = reader.backend.metrics()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert found == [states.PENDING] * 240
    after = reader.backend.metrics()
    assert after.remembered - before.remembered == 240
    assert after.barriers - before.barriers < 240


def test_a_purged_shard_is_noticed_when_the_view_is_checked(
    writer: Celery, reader: Celery, raw: amqp.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "FIRST_CHECK", 0.0)
    monkeypatch.setattr(views, "SETTLED", 0.0)
    task_id = new_id()
    writer.backend.store_result(task_id, 1, states.SUCCESS)
    eventually(lambda: reader.backend.metrics().views or not reader.AsyncResult(task_id).state)
    raw.channel().queue_purge(reader.backend.config.topology.shard_queue_name(0))
    eventually(lambda: reader.AsyncResult(task_id).state == states.PENDING)


def test_a_view_that_cannot_be_checked_is_not_used_again(
    make_app: Apps, writer: Celery, amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "FIRST_CHECK", 3.0)
    options = {"shards": 1, "lookup_timeout": 2}
    reader = make_app(result_backend_transport_options=options)
    task_id = new_id()
    writer.backend.store_result(task_id, 1, states.STARTED)
    until_live(reader, task_id)
    # Given a reader whose node still answers barriers, but does not reach the node of the shard
    inbox = reader.backend.layout.inbox
    opened = inbox.connections
    with raw_connection(amqp_url) as holder:
        queue = reader.backend.config.topology.shard_queue_name(0)
        holder.channel().basic_consume(queue, callback=lambda message: None)

        def check_fails() -> bool:
            try:
                reader.AsyncResult(task_id).state  # noqa: B018
            except errors.LookupTimeout:
                return True
            return False

        eventually(check_fails)
        # Then it gives up that connection, and with it everything that it remembers
        eventually(lambda: inbox.connections > opened and not reader.backend.metrics().views)
    assert reader.AsyncResult(task_id).state == states.STARTED


def test_a_view_survives_a_check_that_a_short_timeout_ends(
    writer: Celery, reader: Celery, amqp_url: str
) -> None:
    task_id = new_id()
    writer.backend.store_result(task_id, 1, states.STARTED)
    until_live(reader, task_id)
    inbox = reader.backend.layout.inbox
    opened = inbox.connections
    inbox._table.memory.view(0).check_at = 0.0
    # Given another reader that has the shard
    with raw_connection(amqp_url) as holder:
        queue = reader.backend.config.topology.shard_queue_name(0)
        holder.channel().basic_consume(queue, callback=lambda message: None)
        # When clients with short timeouts read it
        for _ in range(3):
            with pytest.raises(TimeoutError):
                reader.AsyncResult(task_id).get(timeout=0.2)
    # Then the process stays connected, and remembers what it knew
    assert reader.AsyncResult(task_id).state == states.STARTED
    assert (inbox.connections, reader.backend.metrics().views) == (opened, 1)


def test_where_barriers_are_refused_the_store_is_read(
    writer: Celery, reader: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = new_id()
    until_live(reader, task_id)
    session = reader.backend.layout.inbox._session
    session._on_barriers_refused(403, "ACCESS_REFUSED", 60, 40)
    writer.backend.store_result(task_id, ValueError("no"), states.FAILURE)
    before = reader.backend.metrics().remembered
    assert reader.AsyncResult(task_id).state == states.FAILURE
    assert reader.backend.metrics().remembered == before


def test_a_barrier_that_does_not_come_back_is_not_waited_for_twice(
    writer: Celery, reader: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = new_id()
    until_live(reader, task_id)
    inbox = reader.backend.layout.inbox
    session = inbox._session
    take: Callable[[int], Any] = session._on_barrier
    monkeypatch.setattr(session, "_on_barrier", lambda number: None)
    writer.backend.store_result(task_id, ValueError("no"), states.FAILURE)
    for _ in range(3):
        assert reader.AsyncResult(task_id).state == states.FAILURE
    # When it comes after all, barriers are used again.
    (number,) = session._barriers._under_way
    monkeypatch.setattr(session, "_on_barrier", take)
    take(number)
    until_live(reader, task_id)


def test_very_short_timeouts_find_a_result_in_the_end(writer: Celery, reader: Celery) -> None:
    task_id = new_id()
    writer.backend.store_result(task_id, 1, states.SUCCESS)
    end = time.monotonic() + LONG
    while time.monotonic() < end:
        try:
            assert reader.AsyncResult(task_id).get(timeout=0.001) == 1
            return
        except TimeoutError:
            continue
    pytest.fail("it was never found")


def test_a_wait_that_is_over_keeps_the_look_up_s_connection(
    writer: Celery, reader: Celery, raw: amqp.Connection
) -> None:
    task_id = new_id()
    writer.backend.store_result(task_id, 1, states.SUCCESS)
    # Given a shard that another reader holds
    channel = raw.channel()
    channel.basic_consume(
        reader.backend.config.topology.shard_queue_name(0), callback=lambda m: None
    )
    for _ in range(5):
        with pytest.raises(TimeoutError):
            reader.AsyncResult(task_id).get(timeout=0.01)
    pool = reader.backend.layout.store._pool
    assert len(pool._idle) == 1
    channel.close()
    assert reader.AsyncResult(task_id).get(timeout=LONG) == 1


def test_an_inbox_is_not_opened_for_reads_that_are_rare(writer: Celery, reader: Celery) -> None:
    reader.AsyncResult(new_id()).state  # noqa: B018
    assert reader.backend.layout.inbox._keeper.thread is None


def test_own_tasks_are_read_from_memory(reader: Celery) -> None:
    open_inbox(reader)
    result = reader.send_task("tests.nothing")
    assert result.state == states.PENDING
    assert reader.backend.metrics().remembered == 1
    assert reader.backend.metrics().shards_read == 0
