"""``broker_pool_limit`` limits the connections of a process; its threads wait and take turns."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import threading
import time
from typing import Any, Iterator, List, Optional

import pytest
from celery import Celery

from celery_amqp_results import errors
from tests.broker.helpers import Waiting, new_id
from tests.broker.test_publisher import connections_of, in_threads
from tests.conftest import Apps
from tools import rabbitmq


def limited(make_app: Apps, limit: Optional[int]) -> Celery:
    app = make_app(broker_pool_limit=limit)
    app.main = f"limited-{new_id()}"
    return app


@contextlib.contextmanager
def counting(app: Celery, node: rabbitmq.Node) -> Iterator[List[int]]:
    """Count the connections of *app* on the broker, again and again, during a ``with`` block."""
    counted: List[int] = []
    stop = threading.Event()

    def count_once() -> None:
        counted.append(len(connections_of(app, node)))

    def count() -> None:
        while not stop.is_set():
            count_once()

    thread = threading.Thread(target=count)
    thread.start()
    try:
        yield counted
    finally:
        stop.set()
        thread.join()
        # A short block may have ended before the first count.
        count_once()


@pytest.mark.parametrize("limit", [2, 3, 0])
def test_threads_that_store_read_and_wait_respect_the_limit(
    limit: int, make_app: Apps, node: rabbitmq.Node
) -> None:
    # Given a process that may have few connections
    app = limited(make_app, limit)
    ids = [[new_id() for _ in range(4)] for _ in range(12)]

    def work(number: int) -> None:
        for task_id in ids[number]:
            app.backend.store_result(task_id, {}, "STARTED")
            app.backend.store_result(task_id, number, "SUCCESS")
            assert app.AsyncResult(task_id).get(timeout=60) == number
            assert app.backend.layout.stored_state(task_id).state == "SUCCESS"
            assert app.AsyncResult(new_id()).state == "PENDING"

    # When many threads store results, wait for them and look them up
    with counting(app, node) as counted:
        in_threads(12, work)
    # Then they take turns
    assert max(counted) <= (limit or 3), counted


def test_one_connection_is_enough_to_store_and_to_look_up(
    make_app: Apps, node: rabbitmq.Node
) -> None:
    app = limited(make_app, 1)
    with counting(app, node) as counted:
        for number in range(5):
            task_id = new_id()
            app.backend.store_result(task_id, number, "SUCCESS")
            assert app.backend.layout.stored_state(task_id).state == "SUCCESS"
    assert max(counted) == 1


def test_threads_that_store_and_look_up_take_turns_on_one_connection(make_app: Apps) -> None:
    # Given threads that store all the time, and others that look up all the time
    app = limited(make_app, 1)
    end = time.monotonic() + 2.0
    done = [0] * 4

    def work(number: int) -> None:
        while time.monotonic() < end or not done[number]:
            if number % 2:
                app.backend.layout.stored_state(new_id())
            else:
                app.backend.store_result(new_id(), 1, "SUCCESS")
            done[number] += 1

    in_threads(4, work)
    # Then neither starves
    assert all(done), done


def test_waiting_with_one_connection_says_what_it_needs(make_app: Apps) -> None:
    app = limited(make_app, 1)
    task_id = new_id()
    app.backend.store_result(task_id, 1, "STARTED")
    with pytest.raises(errors.BackendUnavailable, match="broker_pool_limit is 1"):
        app.AsyncResult(task_id).get(timeout=60)
    # And the process goes on
    app.backend.store_result(task_id, 1, "SUCCESS")
    assert app.backend.layout.stored_state(task_id).state == "SUCCESS"


def test_a_caller_waits_for_a_connection_until_its_deadline(make_app: Apps) -> None:
    # Given a thread that uses the only connection
    app = limited(make_app, 1)
    layout: Any = app.backend.layout
    with layout._pool.link():
        # When another one needs a connection, and has little time
        started = time.monotonic()
        with pytest.raises(errors.BackendUnavailable, match="1 for lookups"):
            layout.connector.open(0.0, started + 0.5, "publish")
        # Then it gets an error in time
        assert time.monotonic() - started < 20
        storing = Waiting(lambda: app.backend.store_result(new_id(), 1, "SUCCESS"))
        time.sleep(0.3)
        assert storing.thread.is_alive()
    # And a caller with more time gets the connection
    storing.result()


def test_unconfirmed_results_are_not_lost_when_connections_take_turns(make_app: Apps) -> None:
    app = limited(make_app, 1)
    quick = make_app(
        broker_pool_limit=1,
        result_exchange=app.conf.result_exchange,
        result_backend_transport_options={
            **app.conf.result_backend_transport_options,
            "confirm": False,
        },
    )
    ids = [new_id() for _ in range(200)]
    for task_id in ids:
        quick.backend.store_result(task_id, 1, "SUCCESS")
    states = quick.backend.layout.store.read(ids)
    assert all(states[task_id] for task_id in ids)


@pytest.mark.skipif(importlib.util.find_spec("gevent") is None, reason="gevent is not installed")
def test_greenlets_respect_the_limit(make_app: Apps, node: rabbitmq.Node) -> None:
    from tests.broker.test_gevent import run

    app = make_app()
    app.main = f"limited-{new_id()}"
    process = run(
        app,
        node.url(),
        f"""
app.main = {app.main!r}
app.conf.broker_pool_limit = 2
def work(number):
    for _ in range(3):
        task = new_id()
        app.backend.store_result(task, number, "SUCCESS")
        assert app.AsyncResult(task).get(timeout=60) == number
        assert app.backend.layout.stored_state(task).state == "SUCCESS"
    return 1
jobs = [gevent.spawn(work, number) for number in range(40)]
gevent.joinall(jobs)
say(sum(job.value or 0 for job in jobs))
gevent.get_hub().threadpool.apply(sys.stdin.readline)
os._exit(0)
""",
    )
    assert process.stdout is not None
    with counting(app, node) as counted:
        assert json.loads(process.stdout.readline()) == 40
    assert 0 < max(counted) <= 2
    process.communicate("\n")
