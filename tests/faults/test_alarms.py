"""Results that are stored during an alarm of the broker are there when it ends."""

from __future__ import annotations

import functools
import logging
import socket
import threading
import time
from typing import Any, Callable, Dict, List, Mapping

import pytest
from celery import Celery, states

from celery_amqp_results.amqp import confirms, link
from celery_amqp_results.feed import session
from celery_amqp_results.store import publisher
from tests.broker.helpers import flush
from tests.conftest import Apps, eventually
from tests.faults.faults import alarm
from tests.faults.test_store_faults import new_ids, read_from_store
from tools import rabbitmq

#: Seconds after which a call counts as hanging.
LONG = 60.0

#: One lost connection is one try too many.
ONE_TRY: Dict[str, Any] = {"retry_policy": {"max_retries": 0}}


class Calls:
    """Calls that take until an alarm ends, each in a thread."""

    def __init__(self, *calls: Callable[[], Any]) -> None:
        self.errors: List[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(c,), daemon=True) for c in calls]
        for thread in self._threads:
            thread.start()

    def _run(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except BaseException as exc:
            self.errors.append(exc)

    def waits(self) -> bool:
        return not self.errors and all(thread.is_alive() for thread in self._threads)

    def end(self) -> None:
        for thread in self._threads:
            thread.join(LONG)
            assert not thread.is_alive()
        assert not self.errors


def store_in_alarm(app: Celery, node: rabbitmq.Node, results: Mapping[str, str]) -> None:
    """Store results at once in an alarm that outlasts the kernel's patience; return at its end."""
    with alarm(node, "memory"):
        store = app.backend.store_result
        storing = Calls(
            *(functools.partial(store, i, r, states.SUCCESS) for i, r in results.items())
        )
        time.sleep(link.IO_TIMEOUT + 2)
        # Results that are larger than the buffers of the sockets wait
        assert storing.waits()
    # And are stored in one try when it ends
    storing.end()


def test_large_results_are_stored_when_an_alarm_ends(make_app: Apps, node: rabbitmq.Node) -> None:
    app = make_app(result_backend_transport_options={"shards": 1, **ONE_TRY})
    first, second, third = new_ids(3)
    app.backend.store_result(third, 1, states.SUCCESS)
    results = {first: "x" * 1_000_000, second: "y" * 8_000_000}
    store_in_alarm(app, node, results)
    found = read_from_store(app, [first, second])
    assert {i: found[i]["result"] for i in results} == results


def test_a_thread_that_declares_shards_in_an_alarm_costs_no_other_thread_its_connection(
    make_app: Apps, node: rabbitmq.Node, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(link, "IO_TIMEOUT", 3.0)
    app = make_app(result_backend_transport_options={"shards": 64, **ONE_TRY})
    warm, final, *others = new_ids(20)
    app.backend.store_result(warm, 1, states.SUCCESS)
    layout = app.backend.layout

    def report() -> None:
        for number, task_id in enumerate(others):
            app.backend.store_result(task_id, number, "PROGRESS")

    with caplog.at_level(logging.WARNING), alarm(node, "memory"):
        storing = Calls(lambda: app.backend.store_result(final, 2, states.SUCCESS))
        # When a thread waits for the end of an alarm, and another one needs answers of the broker
        eventually(lambda: layout.publisher._channel._channel.link.blocked)
        reporting = Calls(report)
        time.sleep(link.IO_TIMEOUT + 2)
        # Then both wait, without another connection
        assert storing.waits()
        assert reporting.waits()
        assert "not published" not in caplog.text
    storing.end()
    reporting.end()
    flush(app)
    found = read_from_store(app, [final, *others])
    assert [found[i]["result"] for i in (final, *others)] == [2, *range(len(others))]


def test_a_connection_that_is_lost_in_an_alarm_is_no_failed_try(
    make_app: Apps, node: rabbitmq.Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "ALARM_SECONDS", 0.1)
    app = make_app(result_backend_transport_options={"shards": 1, **ONE_TRY})
    warm, final = new_ids(2)
    app.backend.store_result(warm, 1, states.SUCCESS)
    channel = app.backend.layout.publisher._channel

    def is_lost(cut: Any) -> bool:
        return channel._channel is not cut

    with alarm(node, "memory"):
        storing = Calls(lambda: app.backend.store_result(final, 2, states.SUCCESS))
        for _ in range(3):
            # When the connections that it blocks are cut, one after the other
            blocked = eventually(lambda: channel._channel and channel._channel.link.blocked)
            assert blocked
            cut = channel._channel
            cut.link.socket.shutdown(socket.SHUT_RDWR)
            eventually(functools.partial(is_lost, cut))
        assert storing.waits()
    # Then the result is stored all the same
    storing.end()
    assert read_from_store(app, [final])[final]["result"] == 2


def test_a_large_result_in_the_layout_per_task_is_stored_when_an_alarm_ends(
    make_app: Apps, node: rabbitmq.Node
) -> None:
    app = make_app(result_backend_transport_options={"layout": "per-task", **ONE_TRY})
    first, second = new_ids(2)
    results = {first: "x", second: "y" * 8_000_000}
    store_in_alarm(app, node, results)
    assert {i: app.backend._get_task_meta_for(i)["result"] for i in results} == results
    for task_id in results:
        app.AsyncResult(task_id).forget()


def test_a_shard_that_confirms_nothing_costs_other_shards_no_connection(
    make_app: Apps, node: rabbitmq.Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confirms, "CONFIRM_TIMEOUT", 3.0)
    app = make_app(result_backend_transport_options={"shards": 2, **ONE_TRY})
    topology = app.backend.config.topology
    ids: Dict[int, List[str]] = {0: [], 1: []}
    for task_id in new_ids(60):
        ids[topology.shard(task_id)].append(task_id)
    for of_shard in ids.values():
        app.backend.store_result(of_shard[0], 0, states.SUCCESS)
    channel = app.backend.layout.publisher._channel
    before = channel._channel
    name = topology.shard_queue_name(0)
    found = (
        f'rabbit_amqqueue:with(rabbit_misc:r(<<"/">>, queue, <<"{name}">>), '
        "fun(Q) -> {ok, amqqueue:get_pid(Q)} end)"
    )
    stop = threading.Event()

    def store_in_the_other_shard() -> None:
        while not stop.is_set():
            app.backend.store_result(ids[1][1], 1, states.SUCCESS)

    # Given results that are stored in one shard
    others = Calls(store_in_the_other_shard)
    # When the other shard stands still
    node.eval(f"sys:suspend(element(2, {found}))")
    try:
        storing = Calls(lambda: app.backend.store_result(ids[0][1], 1, states.SUCCESS))
        time.sleep(confirms.CONFIRM_TIMEOUT + 2)
        # Then the confirms show that the connection is not dead
        assert storing.waits()
        assert channel._channel is before
    finally:
        node.eval(f"sys:resume(element(2, {found}))")
    storing.end()
    stop.set()
    others.end()
    assert channel._channel is before


def test_the_first_read_after_an_alarm_keeps_the_connection_of_the_inbox(
    make_app: Apps, node: rabbitmq.Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app(shards=1)
    inbox = app.backend.layout.inbox
    (task_id,) = new_ids(1)
    waiting = Calls(lambda: app.AsyncResult(task_id).get(timeout=2 * LONG))
    opened = eventually(lambda: inbox._session)
    kept: List[bool] = []

    def unblocked() -> None:
        opened.link._on_unblocked()
        with monkeypatch.context() as patch:
            patch.setattr(session, "LOST_SECONDS", 1.0)
            opened.pass_barrier(0.0)
        kept.append(opened._failure is None)

    reasons: List[str] = []
    opened.link.amqp.on_blocked = reasons.append
    # Given a barrier that was published before the process knew of an alarm
    with alarm(node, "memory"):
        eventually(lambda: not opened.pass_barrier(0.2) and reasons)
        opened.link._on_blocked(reasons[0])
        time.sleep(1.5)
        # When a read begins at the moment when the alarm ends
        opened.link.amqp.on_unblocked = unblocked
    assert eventually(lambda: kept) == [True]
    # Then the barrier comes back on the same connection
    assert eventually(lambda: opened.pass_barrier(LONG))
    assert inbox._session is opened
    app.backend.store_result(task_id, 1, states.SUCCESS)
    waiting.end()
