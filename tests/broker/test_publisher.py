"""One publishing connection for all threads of a process."""

from __future__ import annotations

import functools
import json
import threading
import time
from typing import Any, Callable, List

import amqp
import pytest
from celery import Celery

from celery_amqp_results import errors
from celery_amqp_results.amqp import pool
from celery_amqp_results.amqp.declarations import declare_exchange
from celery_amqp_results.store import publisher
from tests import subprocesses
from tests.broker.helpers import Waiting, largest_message, new_id, open_inbox
from tests.conftest import Apps
from tools import rabbitmq
from tools.proxy import Proxy


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run *work* in *count* threads at once; raise what any of them raises."""
    waiting = [Waiting(lambda n=n: work(n)) for n in range(count)]  # type: ignore[misc]
    for each in waiting:
        each.result()


def connections_of(app: Celery, node: rabbitmq.Node) -> List[str]:
    shown = node.ctl("list_connections", "client_properties", "state")
    return [line for line in shown.splitlines() if app.main in line and "running" in line]


@pytest.mark.parametrize("wait", [False, True])
def test_a_process_has_few_connections_whatever_its_threads_do(
    wait: bool, make_app: Apps, node: rabbitmq.Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a slow machine a look-up may count as stuck, which allows one connection more.
    monkeypatch.setattr(pool, "STUCK_SECONDS", 60.0)
    # Given many threads
    app = make_app()
    app.main = f"budget-{new_id()}"
    ids = [[new_id() for _ in range(5)] for _ in range(24)]
    ready = threading.Barrier(24)
    stop = threading.Event()
    counted: List[int] = []

    def work(number: int) -> None:
        ready.wait(60)
        for task_id in ids[number]:
            app.backend.store_result(task_id, {}, "STARTED")
            app.backend.store_result(task_id, "x" * 200_000 if number == 0 else number, "SUCCESS")
            assert app.AsyncResult(new_id()).state == "PENDING"
            if wait:
                assert app.AsyncResult(task_id).get(timeout=60) is not None

    def count() -> None:
        while not stop.is_set():
            counted.append(len(connections_of(app, node)))

    counting = Waiting(count)
    # When all store, look up, and perhaps wait
    in_threads(24, work)
    stop.set()
    counting.result()
    # Then two connections did it, and a third for the inbox
    assert 0 < max(counted) <= 3
    # And everything is stored
    reader = make_app()
    found = reader.backend.layout.poll([i for part in ids for i in part])
    assert all(state is not None and state.state == "SUCCESS" for state in found.values())


def test_a_thread_that_is_interrupted_disturbs_no_other(make_app: Apps) -> None:
    # Given threads that store, and one among them whose stores are interrupted at random
    app = make_app()
    stored: List[str] = []

    class Interrupted(BaseException):
        pass

    def write_half_a_frame(app: Celery) -> None:
        with app.backend.layout.publisher._channel.open(time.monotonic()) as channel:
            channel.link.amqp.transport.write(b"\1\0")
            raise Interrupted

    def work(number: int) -> None:
        for _ in range(40):
            task_id = new_id()
            if number:
                app.backend.store_result(task_id, number, "SUCCESS")
                stored.append(task_id)
                continue
            with pytest.raises(Interrupted):
                write_half_a_frame(app)

    in_threads(6, work)
    # Then whatever was stored is there
    assert len(stored) == 200
    assert {app.AsyncResult(task_id).state for task_id in stored} == {"SUCCESS"}


def test_a_result_that_is_too_large_fails_alone(make_app: Apps, node: rabbitmq.Node) -> None:
    # Given threads that store, one of them more than the broker takes
    with largest_message(node, 50_000):
        app = make_app(shards=4)
        stored: List[str] = []
        failed: List[str] = []

        def work(number: int) -> None:
            for _ in range(10):
                task_id = new_id()
                try:
                    app.backend.store_result(
                        task_id, "x" * (60_000 if number == 0 else 100), "SUCCESS"
                    )
                    stored.append(task_id)
                except errors.ResultTooLarge as exc:
                    failed.append(str(exc))

        in_threads(5, work)
    assert all("takes messages of up to 50000 bytes" in text for text in failed)
    assert (len(stored), len(failed)) == (40, 10)
    assert {app.AsyncResult(task_id).state for task_id in stored} == {"SUCCESS"}


def test_a_shard_is_declared_when_the_first_message_comes_back(
    make_app: Apps, raw: amqp.Connection
) -> None:
    # Given a process that has stored in one shard of many
    app = make_app(shards=64)
    task_id = new_id()
    app.backend.store_result(task_id, 1, "SUCCESS")
    topology = app.backend.config.topology
    # Then only that one is there
    channel = raw.channel()
    for shard in range(64):
        if shard == topology.shard(task_id):
            channel.queue_declare(topology.shard_queue_name(shard), passive=True)
        else:
            with pytest.raises(amqp.exceptions.NotFound):
                channel.queue_declare(topology.shard_queue_name(shard), passive=True)


def test_a_stuck_queue_of_a_third_party_holds_up_a_result_for_a_moment_only(
    make_app: Apps, monkeypatch: Any
) -> None:
    # Given live copies whose confirms never come
    monkeypatch.setattr(publisher, "COPY_SECONDS", 0.05)
    app = make_app(shards=2)
    app.backend.store_result(new_id(), 0, "SUCCESS")
    with app.backend.layout.publisher._channel.present() as channel:
        log = channel.log
        taken: Any = log.acknowledged

        def kept_only(tag: int, multiple: bool) -> None:
            copies = dict(log._copies)
            taken(tag, multiple)
            log._copies.update(copies)
            for publication in copies.values():
                publication.copying = True

        monkeypatch.setattr(log, "acknowledged", kept_only)
    # When results are stored
    ids = [new_id() for _ in range(50)]
    for task_id in ids:
        app.backend.store_result(task_id, 1, "SUCCESS")
    # Then they are stored, and the copies are counted
    assert app.backend.metrics().late_copies >= 50
    assert len(log._copies) <= 200
    assert {make_app(shards=2).AsyncResult(task_id).state for task_id in ids} == {"SUCCESS"}


def test_a_result_that_is_refused_several_times_goes_over_another_connection(
    make_app: Apps, raw: amqp.Connection, monkeypatch: Any, eventually: Callable[..., Any]
) -> None:
    monkeypatch.setattr(publisher, "REFUSED_SECONDS", 0.0)
    # Given a shard that takes one message
    app = make_app(
        result_backend_transport_options={"shards": 1, "retry_policy": {"max_retries": 300}}
    )
    topology = app.backend.config.topology
    channel = raw.channel()
    declare_exchange(channel, topology)
    shard = topology.shard_queue(0)
    channel.queue_declare(
        shard.name,
        durable=True,
        auto_delete=False,
        arguments={**shard.arguments, "x-max-length": 1, "x-overflow": "reject-publish"},
    )
    app.backend.store_result(new_id(), 1, "SUCCESS")
    shared = app.backend.layout.publisher._channel
    with shared.present() as first:
        assert first is not None
    # When a second result is refused
    task_id = new_id()
    storing = Waiting(lambda: app.backend.store_result(task_id, 2, "SUCCESS"))

    def renewed() -> bool:
        with shared.present() as now:
            return now is not None and now is not first

    eventually(renewed)
    # Then it is stored over another connection, as soon as the shard takes it
    channel.queue_purge(shard.name)
    storing.result()
    assert app.AsyncResult(task_id).result == 2


def test_a_closed_idle_connection_loses_no_state(
    make_app: Apps, node: rabbitmq.Node, eventually: Callable[..., Any]
) -> None:
    reader = make_app()
    with Proxy(node.amqp_port) as proxy:
        app = make_app(proxy.url(node.url()))
        app.backend.store_result(new_id(), 0, "SUCCESS")
        # When a load balancer closes the connection, with and without saying so
        for close in (proxy.reset, proxy.halve, proxy.swallow):
            close()
            task_id = new_id()
            # And a state is stored without waiting for its confirm
            app.backend.store_result(task_id, {}, "STARTED")
            if close == proxy.swallow:
                proxy.resume()
                proxy.reset()
            # Then it is there soon, although nothing else is stored
            eventually(lambda task_id=task_id: reader.backend.get_state(task_id) == "STARTED")
        app.backend.close()


def store_and_end_as_a_pool_does(app: Celery, ids: List[str]) -> None:
    from celery import signals

    for task_id in ids:
        app.backend.store_result(task_id, {}, "SKIPPED")
    signals.worker_process_shutdown.send(sender=None, pid=0, exitcode=0)
    import os
    import sys

    sys.stdout.buffer.write(b"done")
    sys.stdout.flush()
    os._exit(0)


def test_the_last_states_of_a_child_are_flushed_when_it_ends(make_app: Apps) -> None:
    app = make_app(result_backend_transport_options={"confirm": False, "shards": 8})
    ids = [new_id() for _ in range(300)]
    with subprocesses.start(app, store_and_end_as_a_pool_does, ids=ids) as process:
        process._process.communicate(timeout=60)
    assert {app.AsyncResult(task_id).state for task_id in ids} == {"SKIPPED"}


def test_a_child_of_a_pool_closes_its_connection_as_the_protocol_wants(
    make_app: Apps, node: rabbitmq.Node, eventually: Callable[..., Any]
) -> None:
    app = make_app(result_backend_transport_options={"shards": 8})
    with subprocesses.start(app, store_and_end_as_a_pool_does, ids=[new_id()]) as process:
        pid = process.pid
        process._process.communicate(timeout=60)

    def closed() -> List[str]:
        # The name of a connection says which process has opened it.
        lines = node.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line for line in lines if f" {pid}@" in line and "closing AMQP" in line]

    # An operator sees no warning
    assert ["[info]" in line for line in eventually(closed)] == [True]


def test_threads_share_one_failure_to_connect(make_app: Apps, node: rabbitmq.Node) -> None:
    # Given a broker that is away, and a policy of a second
    with Proxy(node.amqp_port) as proxy:
        policy = {"max_retries": 2, "interval_start": 0.5, "interval_step": 0}
        app = make_app(
            proxy.url(node.url()),
            result_backend_transport_options={"shards": 2, "retry_policy": policy},
        )
        proxy.refuse()
        failures: List[str] = []

        def work(number: int) -> None:
            with pytest.raises(Exception, match="cannot be reached") as caught:
                app.backend.store_result(new_id(), 1, "SUCCESS")
            failures.append(str(caught.value))

        # When many threads store, then none waits for all the others
        started = time.monotonic()
        in_threads(20, work)
        assert len(failures) == 20
        assert time.monotonic() - started < 15


def test_a_live_copy_is_confirmed_before_the_store_returns(make_app: Apps) -> None:
    # Given a process whose inbox receives everything of one shard
    app, listener = make_app(shards=1), make_app(shards=1)
    open_inbox(listener)
    inbox = listener.backend.layout.inbox
    for _ in range(20):
        task_id = new_id()
        app.backend.store_result(task_id, json.dumps([1]), "SUCCESS")
        with app.backend.layout.publisher._channel.present() as channel:
            assert not channel.log._copies
    assert inbox is listener.backend.layout.inbox


def test_a_pushed_state_is_in_the_store_even_if_its_shard_is_new(make_app: Apps) -> None:
    # Given a client that is pushed the first state of each shard
    app, client = make_app(shards=64), make_app(shards=64)
    for _ in range(60):
        task_id = new_id()
        client.backend.layout.note_sent(task_id)
        waiting = Waiting(functools.partial(client.AsyncResult(task_id).get, timeout=60))
        app.backend.store_result(task_id, 1, "SUCCESS")
        # When it has received that
        assert waiting.result() == 1
        # Then a reader finds it
        assert client.backend.layout.store.read((task_id,))[task_id]


def test_a_connection_that_was_dropped_is_not_opened_again_by_its_use(app: Celery) -> None:
    link = app.backend.layout.connector.open_once(0.0)
    link.drop()
    for use in (lambda: link.amqp.transport, link.amqp.blocking_read, link.channel):
        with pytest.raises((amqp.AMQPError, OSError)):
            use()
    assert not link.alive
