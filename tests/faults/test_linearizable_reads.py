"""Reads by processes that did not send the tasks: no answer is older than it may be."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import uuid
from typing import Any, Callable, Dict, List, Tuple

import pytest
from celery import Celery, states

from tests import subprocesses
from tests.conftest import Apps, eventually
from tests.faults import linearizability
from tests.faults.linearizability import FINAL, FORGOTTEN, GRACE, Event, check
from tools import rabbitmq
from tools.proxy import Proxy

#: Seconds that the processes read and store, and how many tasks are stored each second.
SECONDS = 8.0
RATE = 40.0
READERS = 3


class Load:
    """Processes that store, and processes that read what they store."""

    def __init__(self, storing: Celery, reading: Celery, seconds: float = SECONDS) -> None:
        self._stack = contextlib.ExitStack()
        run = uuid.uuid4().hex
        self._storers = [
            self._launch(
                storing, linearizability.store,
                run=run, first=first, step=2, rate=RATE / 2,
            )
            for first in range(2)
        ]  # fmt: skip
        self.readers = [
            self._launch(
                reading, linearizability.read,
                run=run, rate=RATE,
            )
            for _ in range(READERS)
        ]  # fmt: skip
        everybody = [*self._storers, *self.readers]
        for process in everybody:
            assert process.readline() == "ready"
        start = time.monotonic()
        self.end = start + seconds
        for process in everybody:
            process.write_line(f"{start} {self.end}")

    def _launch(
        self, app: Celery, function: Callable[..., Any], **kwargs: Any
    ) -> subprocesses.Process:
        return self._stack.enter_context(subprocesses.start(app, function, **kwargs))

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._stack.close()

    def result(self) -> Tuple[List[Event], List[Dict[str, Any]]]:
        """Return what was stored, and what each reader has to tell."""
        stores = [event for process in self._storers for event in process.answer()]
        return stores, [process.answer() for process in self.readers]


def judge(load: Load, seen_counts: bool = True) -> None:
    """Assert that no answer was wrong, and that memory was used."""
    stores, readers = load.result()
    reads = [event for reader in readers for event in reader["events"]]
    assert stores
    assert reads
    assert check(stores, reads, seen_counts) == []
    assert sum(reader["remembered"] for reader in readers) > 0


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_no_answer_is_older_than_what_was_stored_or_seen(make_app: Apps, queue_type: str) -> None:
    options = {"shards": 4, "queue_type": queue_type}
    app = make_app(result_backend_transport_options=options)
    with Load(app, app) as load:
        judge(load)


def test_no_answer_is_too_old_while_connections_are_reset(
    make_app: Apps, node: rabbitmq.Node
) -> None:
    app = make_app(shards=4)
    with Proxy(node.amqp_port) as proxy:
        reading = make_app(shards=4)
        reading.conf.broker_url = proxy.url(node.url())
        with Load(app, reading) as load:
            while time.monotonic() < load.end - 4.0:
                time.sleep(1.0)
                proxy.reset()
            judge(load)


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_no_answer_is_too_old_while_a_slow_connection_carries_results(
    make_app: Apps, node: rabbitmq.Node, queue_type: str
) -> None:
    options = {"shards": 1, "queue_type": queue_type}
    reader = make_app(result_backend_transport_options=options)
    with Proxy(node.amqp_port) as proxy:
        storer = make_app(proxy.url(node.url()), result_backend_transport_options=options)
        # Given a process that answers from memory
        started = [str(uuid.uuid4()) for _ in range(4)]
        for task_id in started:
            storer.backend.store_result(task_id, None, states.STARTED)

        def is_remembered() -> bool:
            reader.AsyncResult(started[0]).state  # noqa: B018
            return bool(reader.backend.metrics().remembered)

        eventually(is_remembered)
        # When each copy of a result needs half a second
        proxy.slow(6_000)
        # Then its state is known as soon as it is stored
        for task_id in started:
            storer.backend.store_result(task_id, os.urandom(1_250).hex(), states.SUCCESS)
            assert reader.AsyncResult(task_id).state == states.SUCCESS
        assert storer.backend.metrics().late_copies == 0
        proxy.resume()
        storer.backend.close()


def test_no_answer_is_too_old_after_inboxes_were_deleted(
    make_app: Apps, node: rabbitmq.Node
) -> None:
    app = make_app(shards=4)
    with Load(app, app) as load:
        time.sleep(max(0.0, load.end - 5.0 - time.monotonic()))
        # AMQP lets only the owner delete an exclusive queue.
        node.eval(
            '[catch rabbit_amqqueue:delete(Q, false, false, <<"operator">>) || Q <- '
            "rabbit_amqqueue:list(), amqqueue:get_exclusive_owner(Q) =/= none]"
        )
        judge(load)


def test_no_answer_is_too_old_after_a_reader_was_frozen(make_app: Apps) -> None:
    app = make_app(shards=4)
    with Load(app, app) as load:
        time.sleep(max(0.0, load.end - 5.0 - time.monotonic()))
        load.readers[0].signal(signal.SIGSTOP)
        time.sleep(2.0)
        load.readers[0].signal(signal.SIGCONT)
        judge(load)


def test_no_answer_is_too_old_after_the_node_was_killed(
    make_app: Apps, node: rabbitmq.Node
) -> None:
    app = make_app(shards=4)
    with Load(app, app, seconds=30.0) as load:
        time.sleep(max(0.0, load.end - 25.0 - time.monotonic()))
        node.kill()
        node.start()
        judge(load, seen_counts=False)


def fork_and_read(app: Celery, task_id: str) -> List[str]:
    """Read a task with a live view, then in a forked child, then again."""

    def state() -> str:
        return str(app.AsyncResult(task_id).state)

    found = []
    while not app.backend.metrics().remembered:
        found.append(state())
        time.sleep(0.3)
    inbox, out = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(out, state().encode())
        os._exit(0)
    os.waitpid(pid, 0)
    before = app.backend.metrics().shards_read
    found += [os.read(inbox, 100).decode(), state()]
    assert app.backend.metrics().shards_read == before
    assert app.backend.layout.inbox.connections == 1
    return found


def test_a_forked_reader_reads_on_its_own_and_its_parent_goes_on(make_app: Apps) -> None:
    app, task_id = make_app(shards=4), str(uuid.uuid4())
    app.backend.store_result(task_id, 1, states.STARTED)
    app.backend.store_result(str(uuid.uuid4()), 1, states.SUCCESS)
    assert set(subprocesses.run(app, fork_and_read, task_id=task_id)) == {states.STARTED}


@pytest.mark.parametrize(
    ("reads", "complaints"),
    [
        ([Event(0, 1, 1.5, 1.6), Event(0, FINAL, 3.0, 3.1), Event(0, FINAL, 4.0, 4.1)], 0),
        # It was seen, and then not.
        ([Event(0, 1, 1.5, 1.6), Event(0, 0, 1.7, 1.8)], 1),
        # While one reads the old state, another sees the new one: that is allowed.
        ([Event(0, 1, 1.5, 1.9), Event(0, 0, 1.6, 1.95)], 0),
        # It was stored, and not found.
        ([Event(0, 1, 3.0, 3.1)], 1),
        # It was not stored yet.
        ([Event(0, FINAL, 0.1, 0.2)], 1),
    ],
)
def test_the_checker_finds_what_is_not_linearizable(reads: List[Event], complaints: int) -> None:
    stores = [Event(0, 1, 1.0, 1.1), Event(0, FINAL, 2.0, 2.1)]
    assert len(check(stores, reads)) == complaints


@pytest.mark.parametrize(
    ("reads", "complaints"),
    [
        ([Event(0, FINAL, 2.2, 2.3), Event(0, 0, 3.05, 3.2), Event(0, FINAL, 3.3, 3.4)], 0),
        # It was forgotten too long ago.
        ([Event(0, FINAL, 3.2 + GRACE, 3.3 + GRACE)], 1),
        # It was not forgotten yet.
        ([Event(0, 0, 2.5, 2.9)], 1),
    ],
)
def test_the_checker_finds_what_was_not_forgotten(reads: List[Event], complaints: int) -> None:
    stores = [Event(0, FINAL, 2.0, 2.1), Event(0, FORGOTTEN, 3.0, 3.1)]
    assert len(check(stores, reads)) == complaints
