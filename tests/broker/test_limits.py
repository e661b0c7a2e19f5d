"""Brokers that allow few connections, channels or queues, as small hosted plans do."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
import uuid
from typing import Any, Dict, Iterator, List, Optional

import pytest
from celery import Celery

from celery_amqp_results import errors
from celery_amqp_results.amqp import declarations
from tests.broker.helpers import Waiting, few_channels, flush, largest_message, new_id
from tests.conftest import PATIENT_OPTIONS, Apps, connect, eventually
from tools import rabbitmq


class Tenant:
    """A virtual host with a user of its own, both of which may be limited."""

    def __init__(self, node: rabbitmq.Node) -> None:
        self.node = node
        self.name = f"tenant-{uuid.uuid4().hex[:8]}"
        node.ctl("add_vhost", self.name)
        node.ctl("add_user", self.name, "secret")
        node.ctl("set_permissions", "-p", self.name, self.name, ".*", ".*", ".*")
        address = node.url().rpartition("@")[2].partition("/")[0]
        self.url = f"amqp://{self.name}:secret@{address}/{self.name}"

    def limit(self, **limits: int) -> None:
        """Limit the virtual host: ``max_connections`` or ``max_queues``."""
        named = {name.replace("_", "-"): value for name, value in limits.items()}
        self.node.ctl("set_vhost_limits", "-p", self.name, json.dumps(named))

    def limit_user(self, **limits: int) -> None:
        """Limit the user: ``max_connections`` or ``max_channels``."""
        named = {name.replace("_", "-"): value for name, value in limits.items()}
        self.node.ctl("set_user_limits", self.name, json.dumps(named))

    def unlimit(self) -> None:
        """Take all limits away."""
        # Clearing what was not set is an error on some versions.
        with contextlib.suppress(rabbitmq.CtlError):
            self.node.ctl("clear_vhost_limits", "-p", self.name)
        with contextlib.suppress(rabbitmq.CtlError):
            self.node.ctl("clear_user_limits", self.name, "all")

    @contextlib.contextmanager
    def connections(self, count: int) -> Iterator[None]:
        """Keep *count* connections open."""
        made = [connect(self.url) for _ in range(count)]
        try:
            for connection in made:
                connection.connection  # noqa: B018
            yield
        finally:
            for connection in made:
                connection.release()


@pytest.fixture(scope="module")
def tenant(_session_node: Optional[rabbitmq.Node]) -> Iterator[Tenant]:
    """A virtual host that goes away again."""
    if _session_node is None:
        pytest.skip("the broker of AMQP_URL is not ours to control")
    tenant = Tenant(_session_node)
    yield tenant
    _session_node.ctl("delete_vhost", tenant.name)
    _session_node.ctl("delete_user", tenant.name)


@pytest.fixture
def tenant_apps(tenant: Tenant) -> Iterator[Apps]:
    """Makes apps of the tenant, and takes its limits away afterwards."""
    apps = Apps(tenant.url)
    yield apps
    tenant.unlimit()
    apps.close()


def options(**more: Any) -> Any:
    return {"shards": 4, **PATIENT_OPTIONS, **more}


@pytest.mark.parametrize("whose", ["host", "user"])
def test_a_limit_on_connections_delays_a_result_and_loses_none(
    whose: str, tenant: Tenant, tenant_apps: Apps, caplog: Any
) -> None:
    # Given a virtual host in which no further connection is allowed
    patient = options(retry_policy={"max_retries": 300})
    app, reader = (tenant_apps(result_backend_transport_options=patient) for _ in range(2))
    task_id = new_id()
    (tenant.limit if whose == "host" else tenant.limit_user)(max_connections=2)
    with tenant.connections(2):
        # When a result is stored, looked up and waited for
        storing = Waiting(lambda: app.backend.store_result(task_id, 1, "SUCCESS"))
        waiting = Waiting(lambda: reader.AsyncResult(task_id).get(timeout=60))
        asking = Waiting(lambda: reader.AsyncResult(new_id()).state)
        time.sleep(4)
        assert storing.thread.is_alive()
    # Then that is done as soon as there is a connection again
    tenant.unlimit()
    storing.result()
    assert waiting.result() == 1
    assert asking.result() == "PENDING"
    # And the limit was logged, and not at each try
    logged = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert any("connection limit (2) is reached" in r.getMessage() for r in logged)
    assert len(logged) < 10, [r.getMessage() for r in logged]


def test_an_error_names_the_limit_on_connections(tenant: Tenant, tenant_apps: Apps) -> None:
    app = tenant_apps(result_backend_transport_options=options(retry_policy={"max_retries": 1}))
    tenant.limit(max_connections=1)
    with tenant.connections(1):
        with pytest.raises(errors.BackendUnavailable, match=r"connection limit \(1\) is reached"):
            app.backend.store_result(new_id(), 1, "SUCCESS")
        with pytest.raises(errors.BackendUnavailable, match=r"connection limit \(1\) is reached"):
            app.backend.get_state(new_id())


def test_a_limit_on_queues_is_named_with_the_way_out(
    tenant: Tenant, tenant_apps: Apps, monkeypatch: Any
) -> None:
    # Given a virtual host with 20 queues at most, and an app with more shards
    monkeypatch.setattr(declarations, "LIMIT_PAUSE", 60.0)
    tenant.limit(max_queues=20)
    app = tenant_apps(shards=64)
    # When results are stored
    failures: List[BaseException] = []
    stored: List[str] = []
    for _ in range(100):
        task_id = new_id()
        try:
            app.backend.store_result(task_id, 1, "SUCCESS")
            stored.append(task_id)
        except errors.BackendUnavailable as exc:
            failures.append(exc)
    # Then those fail whose queue is not allowed, and the error says why and what to do
    assert failures
    for failure in failures:
        assert "allows 20 queues" in str(failure)
        assert "?shards=" in str(failure)
        assert "queue_type" not in str(failure)
    # And those that were stored are found
    reader = tenant_apps(shards=64)
    assert {reader.AsyncResult(task_id).state for task_id in stored} == {"SUCCESS"}
    # And a queue that becomes free is left to the tasks
    with connect(tenant.url) as connection:
        channel = connection.channel()
        topology = app.backend.config.topology
        channel.queue_delete(topology.shard_queue_name(topology.shard(stored[0])))
        for _ in range(100):
            with contextlib.suppress(errors.BackendUnavailable):
                app.backend.store_result(new_id(), 1, "SUCCESS")
        channel.queue_declare(app.conf.task_default_queue, durable=True, auto_delete=False)


@pytest.mark.parametrize("limit", [20, 100])
def test_results_leave_a_share_of_a_limit_on_queues_to_the_workers(
    limit: int, tenant: Tenant, tenant_apps: Apps
) -> None:
    # Given a broker with a limit, and four processes with more shards than that
    tenant.limit(max_queues=limit)
    apps = [tenant_apps(shards=256) for _ in range(4)]
    # When they store many more results
    stored, failures = [], []
    for number in range(3 * limit):
        task_id = new_id()
        try:
            apps[number % len(apps)].backend.store_result(task_id, number, "SUCCESS")
            stored.append(task_id)
        except errors.BackendUnavailable as exc:
            failures.append(str(exc))
    assert failures
    assert all(f"allows {limit} queues" in text and "?shards=" in text for text in failures)
    assert len(stored) >= limit / 2
    # Then a worker can still declare its queues, for tasks, remote control and events
    with connect(tenant.url) as connection:
        for _ in range(4):
            connection.channel().queue_declare(new_id(), exclusive=True)
    # And nothing that was used to find out is left behind
    names = tenant.node.ctl("list_queues", "-p", tenant.name, "name")
    assert ".room." not in names
    # And what was stored is found
    reader = tenant_apps(shards=256)
    assert {reader.AsyncResult(task_id).state for task_id in stored} == {"SUCCESS"}


def test_a_user_who_may_not_declare_other_queues_stores_results(
    tenant: Tenant, tenant_apps: Apps
) -> None:
    names = rf"^{tenant_apps.prefix}\.(states|shard|unrouted).*"
    tenant.node.ctl("set_permissions", "-p", tenant.name, tenant.name, names, ".*", ".*")
    try:
        app = tenant_apps(shards=64)
        app.backend.store_result(new_id(), 1, "SUCCESS")
    finally:
        tenant.node.ctl("set_permissions", "-p", tenant.name, tenant.name, ".*", ".*", ".*")


def test_an_app_with_fewer_shards_keeps_to_a_limit_on_queues(
    tenant: Tenant, tenant_apps: Apps
) -> None:
    tenant.limit(max_queues=20)
    app = tenant_apps(shards=16)
    ids = [new_id() for _ in range(100)]
    for task_id in ids:
        app.backend.store_result(task_id, 1, "SUCCESS")
    assert {app.AsyncResult(task_id).state for task_id in ids} == {"SUCCESS"}


@pytest.mark.parametrize(
    ("shards", "refused"), [(8, "limit"), (8, "permission"), (64, "permission")]
)
def test_a_state_whose_shard_the_broker_refuses_is_not_published_for_ever(
    shards: int, refused: str, tenant: Tenant, tenant_apps: Apps, caplog: Any
) -> None:
    app = tenant_apps(shards=shards)
    topology, ids = app.backend.config.topology, [new_id() for _ in range(2000)]
    here = [task_id for task_id in ids if topology.shard(task_id) == 0]
    there = next(task_id for task_id in ids if topology.shard(task_id) == 1)
    app.backend.store_result(here[0], 1, "SUCCESS")
    # Given a broker that refuses a further shard
    if refused == "limit":
        tenant.limit(max_queues=1)
    else:
        names = rf"^{tenant_apps.prefix}\.(states|unrouted|shard\.0$)"
        tenant.node.ctl("set_permissions", "-p", tenant.name, tenant.name, names, ".*", ".*")
    try:
        # When a state is stored there, and no process waits for its confirm
        app.backend.store_result(there, {}, "PROGRESS")
        # Then it is given up, which the log says
        eventually(lambda: app.backend.metrics().failed == 1)
        assert f"the PROGRESS of {there} is lost" in caplog.text
        # And nothing is left to be published again
        flush(app)
        assert not app.backend.layout.publisher._unwaited._has_strays()
        # And other results are stored
        app.backend.store_result(here[1], 2, "SUCCESS")
        assert app.backend.layout.stored_state(here[1]).state == "SUCCESS"
    finally:
        tenant.node.ctl("set_permissions", "-p", tenant.name, tenant.name, ".*", ".*", ".*")


def look_up_all_shards(app: Celery) -> None:
    ids = [new_id() for _ in range(200)]
    for task_id in ids[:100]:
        app.backend.store_result(task_id, 1, "SUCCESS")
    found = dict(app.backend.get_many(ids[:100], timeout=60))
    assert len(found) == 100
    states = app.backend.layout.store.read(ids, time.monotonic() + 60)
    assert sum(map(bool, states.values())) == 100
    app.backend.layout.forget(ids[:50])
    states = app.backend.layout.store.read(ids, time.monotonic() + 60)
    assert sum(map(bool, states.values())) == 50


@pytest.mark.parametrize("number", [5, 8])
def test_a_user_with_few_channels_looks_many_shards_up(
    number: int, tenant: Tenant, tenant_apps: Apps
) -> None:
    tenant.limit_user(max_channels=number)
    look_up_all_shards(tenant_apps(shards=64))


@pytest.mark.parametrize("number", [2, 3, 8])
def test_a_connection_with_few_channels_looks_many_shards_up(
    number: int, make_app: Apps, node: rabbitmq.Node
) -> None:
    with few_channels(node, number):
        look_up_all_shards(make_app(shards=64))


def store_evenly(app: Celery, each: int, value: str) -> List[str]:
    """Store *value* for *each* tasks of each shard; return the ids."""
    topology = app.backend.config.topology
    ids: Dict[int, List[str]] = {shard: [] for shard in range(topology.shards)}
    while any(len(part) < each for part in ids.values()):
        task_id = new_id()
        if len(ids[topology.shard(task_id)]) < each:
            ids[topology.shard(task_id)].append(task_id)
            app.backend.store_result(task_id, value, "SUCCESS")
    return [task_id for part in ids.values() for task_id in part]


def test_a_broker_with_a_small_limit_on_messages_gets_small_pages(
    make_app: Apps, node: rabbitmq.Node, caplog: Any
) -> None:
    # Given results that fill pages larger than the messages that the broker takes
    app, reader = make_app(shards=4), make_app(shards=4)
    with largest_message(node, 20_000):
        ids = store_evenly(app, 40, "x" * 2_000)
        # When several shards are read
        store = reader.backend.layout.store
        # Then each read finds everything
        assert all(store.read(ids).values())
        # And results are packed: of 40 in each shard, at most 31 are left
        eventually(lambda: all(store.read(ids).values()) and store.packed >= 36)
        assert all(reader.backend.layout.poll(ids).values())
    # And the broker has refused one page only
    assert caplog.text.count("pages of up to 10000 bytes from now on") == 1
    assert caplog.text.count("from now on") == 1


def test_a_result_in_a_page_over_the_limit_on_messages_is_forgotten(
    make_app: Apps, node: rabbitmq.Node
) -> None:
    # Given a page that is larger than the messages that the broker takes by now
    app, reader = make_app(shards=1), make_app(shards=1)
    ids = store_evenly(app, 40, "x" * 2_000)
    store = reader.backend.layout.store
    eventually(lambda: store.read(ids) and store.packed >= len(ids))
    with largest_message(node, 20_000):
        # When one of its results is forgotten
        reader.backend.forget(ids[0])
        # Then that one is gone, and all others are kept
        kept = [task_id for task_id, found in store.read(ids).items() if found]
    assert sorted(kept) == sorted(ids[1:])


def test_small_frames_carry_large_results(make_app: Apps, node: rabbitmq.Node) -> None:
    before = node.eval("{ok, N} = application:get_env(rabbit, frame_max), N")
    node.eval("application:set_env(rabbit, frame_max, 8192)")
    try:
        app, reader = make_app(), make_app()
        values = ["x" * size for size in (8_000, 8_192, 100_000, 400_000)]
        ids = [new_id() for _ in values]
        for task_id, value in zip(ids, values):
            app.backend.store_result(task_id, value, "SUCCESS")
        assert [reader.AsyncResult(task_id).get(timeout=60) for task_id in ids] == values
    finally:
        node.eval(f"application:set_env(rabbit, frame_max, {before})")


def test_threads_that_meet_a_limit_on_connections_store_all(
    tenant: Tenant, tenant_apps: Apps
) -> None:
    # Given few connections for many threads
    app = tenant_apps()
    tenant.limit(max_connections=3)
    ids = [new_id() for _ in range(40)]

    def store(part: List[str]) -> None:
        for task_id in part:
            app.backend.store_result(task_id, 1, "SUCCESS")

    # When all of them store
    threads = [threading.Thread(target=store, args=(ids[n::8],)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    # Then nothing is lost
    assert {app.AsyncResult(task_id).state for task_id in ids} == {"SUCCESS"}
