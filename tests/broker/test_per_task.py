"""The layout ``per-task`` on RabbitMQ: Celery 4 on the wire, with non-destructive reads.

``CELERY4_PYTHON`` names a Python that has Celery 4.4; without it, tests with a real Celery 4 are
skipped. Messages recorded from it are compared in any case.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
import uuid
from typing import Any, Callable, Dict, Iterator, List, Tuple

import amqp
import pytest
from amqp import exceptions as amqp_errors
from celery import Celery, states
from celery.app.task import Context
from celery.exceptions import TimeoutError
from celery.result import GroupResult
from kombu.exceptions import ContentDisallowed

from celery_amqp_results import errors
from celery_amqp_results.per_task.lookups import STILL_EMPTY_SECONDS
from celery_amqp_results.toolkit import retry
from tests import subprocess_jobs, subprocesses
from tests.conftest import PATIENCE, PATIENT, Apps, raw_connection
from tools import rabbitmq

#: Seconds after which a wait counts as hanging.
LONG = PATIENCE

CELERY4 = """
import json, sys, warnings
warnings.simplefilter("ignore")
from celery import Celery
from celery.app.task import Context
job = json.load(sys.stdin)
app = Celery("celery4", broker=job["url"], backend="amqp://")
app.conf.update(job["conf"])
task_id = job["id"]
request = Context(job["request"]) if job.get("request") else None
out = None
if job["do"] == "store":
    result = KeyError("gone") if job["state"] == "FAILURE" else job["result"]
    app.backend.store_result(task_id, result, job["state"], traceback=job.get("traceback"),
                             request=request)
elif job["do"] == "state":
    out = app.backend.get_task_meta(task_id)["status"]
elif job["do"] == "get":
    out = app.AsyncResult(task_id).get(timeout=60)
print(json.dumps(out))
"""


class Broker:
    """A direct view of the broker; it deletes the queues of its ids after the test."""

    def __init__(self, url: str, exchange: str) -> None:
        self.url = url
        self.exchange = exchange
        self.ids: List[str] = []

    def new_id(self) -> str:
        """Return a task id whose queue is deleted after the test."""
        self.ids.append(str(uuid.uuid4()))
        return self.ids[-1]

    def messages(self, task_id: str) -> List[Tuple[Dict[str, Any], bytes]]:
        """Take all messages out of a task's queue: properties and body."""
        found: List[Any] = []
        with raw_connection(self.url) as connection:
            channel = connection.channel()
            channel.auto_decode = False
            while True:
                message = channel.basic_get(task_id.replace("-", ""), no_ack=True)
                if message is None:
                    return found
                found.append((message.properties, bytes(message.body)))

    def count(self, task_id: str) -> Any:
        """Return how many messages a task's queue holds, or ``None`` if there is no queue."""
        with raw_connection(self.url) as connection:
            try:
                return (
                    connection.channel()
                    .queue_declare(task_id.replace("-", ""), passive=True)
                    .message_count
                )
            except amqp_errors.NotFound:
                return None

    def declare(self, task_id: str, **kwargs: Any) -> None:
        """Declare a task's queue; fail if it exists with other arguments."""
        with raw_connection(self.url) as connection:
            name = task_id.replace("-", "")
            channel = connection.channel()
            channel.queue_declare(name, **kwargs)

    def celery4(self, do: str, task_id: str, conf: Dict[str, Any], **job: Any) -> Any:
        """Make a real Celery 4 store, poll or wait; skip the test if there is none."""
        python = os.environ.get("CELERY4_PYTHON")
        if not python:
            pytest.skip("CELERY4_PYTHON names no Python with Celery 4.4")
        conf = {"result_exchange": self.exchange, **PATIENT, **conf}
        done = subprocess.run(
            [python, "-c", CELERY4],
            input=json.dumps({"do": do, "id": task_id, "conf": conf, "url": self.url, **job}),
            capture_output=True,
            text=True,
            timeout=3 * PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def make(make_app: Apps) -> Callable[..., Celery]:
    """Makes apps with the layout ``per-task``."""

    def make(backend: str = "amqp://", **conf: Any) -> Celery:
        options = {"layout": "per-task", **conf.pop("options", {})}
        return make_app(backend, result_backend_transport_options=options, **conf)

    return make


@pytest.fixture
def app(make: Callable[..., Celery]) -> Celery:
    """An app with the layout ``per-task``."""
    return make()


@pytest.fixture
def broker(make_app: Apps) -> Iterator[Broker]:
    """The broker; the queues of its ids are deleted after the test."""
    broker = Broker(make_app.url, make_app.prefix)
    yield broker
    with raw_connection(broker.url) as connection:
        channel = connection.channel()
        for task_id in broker.ids:
            channel.queue_delete(task_id.replace("-", ""))


def request_for(task_id: str) -> Context:
    """Return the request of a task as a worker has it."""
    return Context(
        {
            "id": task_id,
            "task": "tasks.add",
            "correlation_id": task_id,
            "children": [],
            "args": [1],
            "kwargs": {"y": 2},
            "hostname": "worker@host",
            "retries": 0,
            "delivery_info": {"routing_key": "tasks"},
        }
    )


# -- what is written ---------------------------------------------------------------------------


def test_a_result_is_written_as_celery_4_did(app: Celery, broker: Broker) -> None:
    # Recorded from Celery 4.4.7.
    task_id = broker.new_id()
    app.backend.store_result(task_id, 42, states.SUCCESS)
    app.backend.store_result(task_id, 42, states.SUCCESS, request=request_for(task_id))
    properties = {
        "content_type": "application/json",
        "content_encoding": "utf-8",
        "application_headers": {},
        "delivery_mode": 2,
        "priority": 0,
        "correlation_id": task_id,
    }
    body = '{"task_id": "%s", "status": "SUCCESS", "result": 42, "traceback": null, "children": %s}'
    assert broker.messages(task_id) == [
        (properties, (body % (task_id, "null")).encode()),
        (properties, (body % (task_id, "[]")).encode()),
    ]


def test_a_failure_is_written_as_celery_4_did(app: Celery, broker: Broker) -> None:
    task_id = broker.new_id()
    app.backend.store_result(
        task_id, KeyError("gone"), states.FAILURE, traceback="tb", request=request_for(task_id)
    )
    ((_, body),) = broker.messages(task_id)
    assert (
        body
        == (
            f'{{"task_id": "{task_id}", "status": "FAILURE", "result": {{"exc_type": "KeyError", '
            '"exc_message": ["gone"], "exc_module": "builtins"}, "traceback": "tb", "children": []}'
        ).encode()
    )


def test_an_extended_result_is_written_as_celery_4_did(
    make: Callable[..., Celery], broker: Broker
) -> None:
    app = make(result_extended=True)
    task_id = broker.new_id()
    app.backend.store_result(task_id, 1, states.SUCCESS, request=request_for(task_id))
    app.backend.store_result(task_id, 1, states.SUCCESS)
    with_request, without = (json.loads(body) for _, body in broker.messages(task_id))
    assert list(with_request.items())[5:] == [
        ("name", "tasks.add"),
        ("args", [1]),
        ("kwargs", {"y": 2}),
        ("worker", "worker@host"),
        ("retries", 0),
        ("queue", "tasks"),
    ]
    assert list(without)[5:] == ["name", "args", "kwargs", "worker", "retries", "queue"]
    assert set(list(without.values())[5:]) == {None}


def test_exchange_and_queue_are_declared_as_celery_4_did(app: Celery, broker: Broker) -> None:
    task_id = broker.new_id()
    app.backend.store_result(task_id, 1, states.SUCCESS)
    with raw_connection(broker.url) as connection:
        # The broker refuses a declaration that differs from the existing queue.
        channel = connection.channel()
        channel.exchange_declare(broker.exchange, "direct", durable=True, auto_delete=False)
        channel.queue_declare(
            task_id.replace("-", ""),
            durable=True,
            auto_delete=True,
            exclusive=False,
            arguments={"x-expires": 86_400_000},
        )


@pytest.mark.parametrize(
    ("conf", "declared"),
    [
        ({"result_expires": 60}, {"arguments": {"x-expires": 60_000}}),
        ({"result_expires": None}, {"arguments": {}}),
        ({"result_expires": 0}, {"arguments": {}}),
    ],
)
def test_the_queue_expires_as_the_settings_say(
    make: Callable[..., Celery], broker: Broker, conf: Dict[str, Any], declared: Dict[str, Any]
) -> None:
    task_id = broker.new_id()
    make(**conf).backend.store_result(task_id, 1, states.SUCCESS)
    broker.declare(task_id, durable=True, auto_delete=True, **declared)
    with pytest.raises(amqp_errors.PreconditionFailed):
        broker.declare(task_id, durable=True, auto_delete=True, arguments={"x-expires": 1})


def test_parameters_of_the_backend_win_over_the_settings(
    app: Celery, broker: Broker, raw: amqp.Connection
) -> None:
    task_id = broker.new_id()
    exchange = f"{broker.exchange}.topic"
    backend = type(app.backend)(
        app=app,
        exchange=exchange,
        exchange_type="topic",
        serializer="pickle",
        auto_delete=False,
        accept=["pickle"],
    )
    try:
        backend.store_result(task_id, 1, states.SUCCESS)
        raw.channel().exchange_declare(exchange, "topic", durable=True, auto_delete=False)
        broker.declare(
            task_id, durable=True, auto_delete=False, arguments={"x-expires": 86_400_000}
        )
        assert backend.get_task_meta(task_id)["result"] == 1
        ((properties, _),) = broker.messages(task_id)
        assert properties["content_type"] == "application/x-python-serialize"
    finally:
        backend.close()
        raw.channel().exchange_delete(exchange)


def test_a_result_that_its_queue_refuses_is_tried_again(
    make: Callable[..., Celery], broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a queue that takes a single message, and is full
    app, task_id = make(options={"retry_policy": {"max_retries": 3}}), broker.new_id()
    queue, wait = task_id.replace("-", ""), retry.wait_before_retry
    arguments = {"x-max-length": 1, "x-overflow": "reject-publish"}
    with raw_connection(broker.url) as connection:
        connection.channel().queue_declare(queue, auto_delete=False, arguments=arguments)
    app.backend.store_result(task_id, None, states.STARTED)
    refusals: List[BaseException] = []

    def make_room(tries: Any, exc: BaseException, deadline: Any) -> bool:
        refusals.append(exc)
        with raw_connection(broker.url) as connection:
            connection.channel().queue_purge(queue)
        return wait(tries, exc, deadline)

    # When it has room again after the first try
    monkeypatch.setattr(retry, "wait_before_retry", make_room)
    app.backend.store_result(task_id, 1, states.SUCCESS)
    # Then the result is stored
    assert [type(each) for each in refusals] == [amqp_errors.MessageNacked]
    assert app.AsyncResult(task_id).result == 1


def test_a_result_is_confirmed_at_once_after_a_poll_of_an_unknown_task(
    app: Celery, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: List[BaseException] = []

    def give_up(tries: Any, exc: BaseException, deadline: Any) -> bool:
        failures.append(exc)
        return False

    monkeypatch.setattr(retry, "wait_before_retry", give_up)
    for _ in range(2):
        task_id = broker.new_id()
        # The broker closes the channel, since the queue does not exist
        assert app.AsyncResult(task_id).state == states.PENDING
        app.backend.store_result(task_id, 1, states.SUCCESS)
        assert app.AsyncResult(task_id).state == states.SUCCESS
    assert failures == []


def test_a_result_that_its_queue_goes_on_to_refuse_is_an_error(
    make: Callable[..., Celery], broker: Broker
) -> None:
    app, task_id = make(options={"retry_policy": {"max_retries": 1}}), broker.new_id()
    arguments = {"x-max-length": 1, "x-overflow": "reject-publish"}
    with raw_connection(broker.url) as connection:
        queue = task_id.replace("-", "")
        connection.channel().queue_declare(queue, auto_delete=False, arguments=arguments)
    app.backend.store_result(task_id, None, states.STARTED)
    with pytest.raises(errors.NotConfirmed, match="nack"):
        app.backend.store_result(task_id, 1, states.SUCCESS)


def test_compression_has_no_effect(
    make: Callable[..., Celery], broker: Broker, recwarn: pytest.WarningsRecorder
) -> None:
    app = make(result_compression="gzip")
    task_id = broker.new_id()
    app.backend.store_result(task_id, 1, states.SUCCESS)
    # Celery 5.7 and later warn about it.
    assert all("result_compression" in str(w.message) for w in recwarn)
    ((properties, body),) = broker.messages(task_id)
    assert (properties["application_headers"], json.loads(body)["result"]) == ({}, 1)


def test_transient_results_are_transient_where_the_broker_permits(
    make: Callable[..., Celery], broker: Broker
) -> None:
    app = make(result_persistent=False)
    task_id = broker.new_id()
    app.backend.store_result(task_id, 1, states.SUCCESS)
    assert app.AsyncResult(task_id).get(timeout=LONG) == 1
    broker.declare(task_id, durable=False, auto_delete=True, arguments={"x-expires": 86_400_000})
    with raw_connection(broker.url) as connection:
        connection.channel().exchange_declare(
            broker.exchange, "direct", durable=False, auto_delete=False
        )
    ((properties, _),) = broker.messages(task_id)
    assert properties["delivery_mode"] == 1


@pytest.fixture(scope="module")
def strict_node() -> Iterator[rabbitmq.Node]:
    """A node that forbids transient queues."""
    name = os.environ.get("RABBITMQ_DISTRIBUTION", "system")
    try:
        rabbitmq.ensure_installed(name)
        distribution = rabbitmq.distribution(name)
    except rabbitmq.NotAvailable as exc:
        pytest.skip(f"no RabbitMQ: {exc}")
    if int(distribution.version.split(".")[0]) < 4:
        pytest.skip(f"RabbitMQ {distribution.version} permits transient queues in any case")
    refuse = "deprecated_features.permit.transient_nonexcl_queues = false\n"
    with rabbitmq.Node(distribution, config=refuse) as node:
        yield node


def test_transient_results_work_where_the_broker_refuses_transient_queues(
    strict_node: rabbitmq.Node, caplog: pytest.LogCaptureFixture
) -> None:
    apps = Apps(strict_node.url())
    broker = Broker(strict_node.url(), apps.prefix)
    options = {"layout": "per-task"}
    try:
        app = apps(result_persistent=False, result_backend_transport_options=options)
        ids = [broker.new_id() for _ in range(3)]
        for task_id in ids:
            app.backend.store_result(task_id, 1, states.SUCCESS)
            assert app.AsyncResult(task_id).get(timeout=LONG) == 1
        ((properties, _),) = broker.messages(ids[0])
        assert properties["delivery_mode"] == 1
        told = [r for r in caplog.records if "refuses transient queues" in r.message]
        assert len(told) == 1
    finally:
        apps.close()


# -- together with Celery 4 --------------------------------------------------------------------


@pytest.mark.parametrize(
    "conf",
    [
        {},
        {"result_extended": True},
        {"result_expires": 600},
        {"result_expires": None},
        {"result_persistent": False},
    ],
    ids=lambda conf: ",".join(conf) or "defaults",
)
@pytest.mark.parametrize("state", [states.SUCCESS, states.FAILURE, states.STARTED])
@pytest.mark.parametrize("with_request", [True, False])
def test_a_real_celery_4_writes_the_same_into_the_same_queue(
    make: Callable[..., Celery],
    broker: Broker,
    conf: Dict[str, Any],
    state: str,
    with_request: bool,
) -> None:
    task_id = broker.new_id()
    fields = {
        "id": task_id,
        "task": "tasks.add",
        "task_name": "tasks.add",
        "correlation_id": task_id,
        "children": [],
        "args": [1],
        "kwargs": {"y": 2},
        "hostname": "worker@host",
        "retries": 0,
        "delivery_info": {"routing_key": "tasks"},
    }
    broker.celery4(
        "store",
        task_id,
        conf,
        state=state,
        result={"a": [1, None]},
        request=fields if with_request else None,
    )
    app = make(**conf)
    app.backend.store_result(
        task_id,
        KeyError("gone") if state == states.FAILURE else {"a": [1, None]},
        state,
        request=Context(fields) if with_request else None,
    )
    theirs, ours = broker.messages(task_id)
    assert ours == theirs


def test_a_real_celery_4_and_this_backend_read_each_other_s_results(
    app: Celery, broker: Broker
) -> None:
    mine, theirs = broker.new_id(), broker.new_id()
    app.backend.store_result(mine, [1], states.SUCCESS)
    broker.celery4("store", theirs, {}, state="SUCCESS", result=[2])
    for _ in range(2):
        assert broker.celery4("state", mine, {}) == states.SUCCESS
        assert app.AsyncResult(mine).get(timeout=LONG) == [1]
        assert broker.celery4("state", theirs, {}) == states.SUCCESS
        assert app.AsyncResult(theirs).get(timeout=LONG) == [2]
    # A Celery 4 that waits consumes the result.
    assert broker.celery4("get", mine, {}) == [1]
    assert app.AsyncResult(mine).state == states.PENDING


def test_a_policy_cleans_up_queues_that_were_left_behind(
    make: Callable[..., Celery],
    make_app: Apps,
    broker: Broker,
    node: rabbitmq.Node,
    eventually: Callable[..., Any],
) -> None:
    # Given results that never expire, as on the page about moving from Celery 4
    ids = [broker.new_id() for _ in range(3)]
    old, new = make(result_expires=None), make_app()
    for task_id in ids:
        old.backend.store_result(task_id, 1, states.SUCCESS)
    new.backend.store_result(ids[0], 2, states.SUCCESS)
    # When a policy applies to all queues with names that Celery 4 used
    definition = '{"expires": 1000}'
    node.ctl(
        "set_policy", "--apply-to", "queues", "old-results", "^[0-9a-f]{32}$", definition
    )  # fmt: skip
    try:
        # Declaring them passively, to see whether they exist, would count as a use.
        names = {task_id.replace("-", "") for task_id in ids}
        eventually(lambda: not names & set(node.ctl("-q", "list_queues", "name").split()))
    finally:
        node.ctl("clear_policy", "old-results")
    # Then these queues are gone, and no others are.
    assert make_app().AsyncResult(ids[0]).get(timeout=LONG) == 2


# -- reading -----------------------------------------------------------------------------------


def test_polling_an_unknown_task_declares_nothing(app: Celery, broker: Broker) -> None:
    task_id = broker.new_id()
    result = app.AsyncResult(task_id)
    assert (result.state, result.state) == (states.PENDING, states.PENDING)
    with pytest.raises(TimeoutError):
        result.get(timeout=0.05)
    assert broker.count(task_id) is None


def test_a_result_is_read_any_number_of_times(app: Celery, broker: Broker) -> None:
    task_id = broker.new_id()
    app.backend.store_result(task_id, 1, states.SUCCESS)
    for _ in range(30):
        assert app.AsyncResult(task_id).state == states.SUCCESS
        assert app.AsyncResult(task_id).get(timeout=LONG) == 1
    assert broker.count(task_id) == 1


def test_a_queue_that_celery_4_has_declared_is_pending(app: Celery, broker: Broker) -> None:
    task_id = broker.new_id()
    broker.declare(task_id, durable=True, auto_delete=True, arguments={"x-expires": 86_400_000})
    result = app.AsyncResult(task_id)
    assert result.state == states.PENDING
    assert task_id.replace("-", "") in app.backend.layout.lookups._empty
    assert result.state == states.PENDING
    app.backend.store_result(task_id, 1, states.SUCCESS)
    assert result.state == states.SUCCESS
    assert task_id.replace("-", "") not in app.backend.layout.lookups._empty


def test_history_is_fast_forwarded_to_the_current_state(app: Celery, broker: Broker) -> None:
    task_id = broker.new_id()
    for step in range(10):
        app.backend.store_result(task_id, step, "PROGRESS")
    assert app.backend.get_task_meta(task_id)["result"] == 9
    assert broker.count(task_id) == 1
    app.backend.store_result(task_id, 10, states.SUCCESS)
    app.backend.store_result(task_id, None, states.STARTED)
    assert app.backend.get_task_meta(task_id)["result"] == 10
    assert broker.count(task_id) == 1


def test_more_history_than_the_limit_raises(app: Celery, broker: Broker) -> None:
    task_id = broker.new_id()
    app.backend.layout.lookups.limit = 5
    for step in range(6):
        app.backend.store_result(task_id, step, "PROGRESS")
    with pytest.raises(app.backend.BacklogLimitExceeded, match=task_id):
        app.AsyncResult(task_id).state  # noqa: B018
    assert app.AsyncResult(task_id).info == 5


def test_two_ids_that_differ_only_in_dashes_can_share_a_queue(app: Celery, broker: Broker) -> None:
    one = broker.new_id()
    two = one.replace("-", "", 1)
    app.backend.store_result(one, 1, states.SUCCESS)
    app.backend.store_result(two, 2, states.SUCCESS)
    for _ in range(2):
        assert app.AsyncResult(one).get(timeout=LONG) == 1
        assert app.AsyncResult(two).get(timeout=LONG) == 2


def test_a_damaged_message_raises_an_error_and_stays_in_the_queue(
    app: Celery, broker: Broker
) -> None:
    task_id = broker.new_id()
    app.backend.store_result(task_id, 1, states.SUCCESS)
    broker.messages(task_id)
    with raw_connection(broker.url) as connection:
        connection.channel().basic_publish(
            amqp.Message("{", content_type="application/json", content_encoding="utf-8"),
            broker.exchange,
            task_id.replace("-", ""),
        )
    for _ in range(2):
        with pytest.raises(errors.ForeignMessage):
            app.AsyncResult(task_id).state  # noqa: B018
    assert broker.count(task_id) == 1


def test_a_refused_content_type_raises_an_error_and_stays_in_the_queue(
    make: Callable[..., Celery], broker: Broker
) -> None:
    writer = make(result_serializer="pickle", accept_content=["pickle"])
    reader = make()
    task_id = broker.new_id()
    writer.backend.store_result(task_id, {1}, states.SUCCESS)
    for _ in range(2):
        with pytest.raises(ContentDisallowed):
            reader.AsyncResult(task_id).state  # noqa: B018
    with pytest.raises(ContentDisallowed):
        reader.AsyncResult(task_id).get(timeout=LONG)
    assert writer.AsyncResult(task_id).get(timeout=LONG) == {1}


def declare_as(kind: str, broker: Broker, task_id: str) -> None:
    """Declare a task's queue in advance, as a policy or another version would."""
    arguments: Dict[str, Any] = {"x-expires": 86_400_000}
    if kind == "quorum":
        arguments["x-queue-type"] = "quorum"
        arguments["x-delivery-limit"] = 20
    broker.declare(task_id, durable=True, auto_delete=False, arguments=arguments)


@pytest.mark.parametrize("kind", ["classic", "quorum"])
@pytest.mark.parametrize("state", [states.SUCCESS, states.FAILURE, "PROGRESS"])
def test_a_result_survives_any_number_of_polls(
    app: Celery, broker: Broker, kind: str, state: str
) -> None:
    task_id = broker.new_id()
    declare_as(kind, broker, task_id)
    app.backend.store_result(task_id, KeyError("x") if state == "FAILURE" else 1, state)
    for _ in range(70):
        assert app.AsyncResult(task_id).state == state
    assert broker.count(task_id) == 1


def poll_in_process(app: Celery, task_id: str, seconds: float) -> Dict[str, int]:
    """Poll for *seconds*; return how often each state was seen. Runs in another process."""
    seen: Dict[str, int] = {}
    deadline = time.monotonic() + seconds
    subprocesses.say("polling")
    while time.monotonic() < deadline:
        state = app.backend.get_task_meta(task_id, cache=False)["status"]
        seen[state] = seen.get(state, 0) + 1
    return seen


@pytest.mark.parametrize("kind", ["classic", "quorum"])
def test_concurrent_readers_all_see_the_state_while_others_are_killed(
    app: Celery, broker: Broker, kind: str
) -> None:
    task_id = broker.new_id()
    declare_as(kind, broker, task_id)
    app.backend.store_result(task_id, 1, states.SUCCESS)
    job = {"task_id": task_id, "seconds": 4.0}
    with (
        subprocesses.start(app, poll_in_process, **job) as one,
        subprocesses.start(app, poll_in_process, **job) as two,
    ):
        assert (one.readline(), two.readline()) == ("polling", "polling")
        for _ in range(4):
            with subprocesses.start(app, poll_in_process, **job) as victim:
                assert victim.readline() == "polling"
                assert app.AsyncResult(task_id).state == states.SUCCESS
                os.kill(victim.pid, signal.SIGKILL)
        for process in (one, two):
            assert set(process.answer()) == {states.SUCCESS}
    assert app.AsyncResult(task_id).get(timeout=LONG) == 1


def test_readers_in_threads_all_see_the_state(app: Celery, broker: Broker) -> None:
    task_id = broker.new_id()
    app.backend.store_result(task_id, 1, states.SUCCESS)
    seen: List[str] = []

    def read() -> None:
        for _ in range(25):
            seen.append(app.backend.get_task_meta(task_id, cache=False)["status"])

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert seen == [states.SUCCESS] * 200


def test_a_reader_waits_for_another_one_that_holds_the_message(
    app: Celery, broker: Broker, raw: amqp.Connection
) -> None:
    task_id = broker.new_id()
    app.backend.store_result(task_id, 1, states.SUCCESS)
    channel = raw.channel()
    message = channel.basic_get(task_id.replace("-", ""))
    back = threading.Timer(
        5 * STILL_EMPTY_SECONDS, channel.basic_reject, (message.delivery_tag, True)
    )
    back.start()
    try:
        assert app.AsyncResult(task_id).state == states.SUCCESS
    finally:
        back.join()


def test_another_process_can_read_wait_and_forget(app: Celery, broker: Broker) -> None:
    task_id = broker.new_id()
    app.backend.store_result(task_id, 1, states.SUCCESS)
    assert subprocesses.run(app, subprocess_jobs.states, ids=[task_id]) == [states.SUCCESS]
    assert subprocesses.run(app, subprocess_jobs.values, ids=[task_id], times=2) == [1, 1]
    subprocesses.run(app, subprocess_jobs.forget, ids=[task_id])
    assert app.AsyncResult(task_id).state == states.PENDING
    assert broker.count(task_id) is None


# -- waiting -----------------------------------------------------------------------------------


def test_states_are_pushed_to_all_waiters_and_stay_in_the_queue(
    app: Celery, make: Callable[..., Celery], broker: Broker, eventually: Callable[..., Any]
) -> None:
    task_id = broker.new_id()
    other = make()
    seen: List[List[str]] = [[] for _ in range(4)]
    values: List[Any] = []

    def wait(number: int) -> None:
        result = (app, other)[number % 2].AsyncResult(task_id)
        values.append(
            result.get(timeout=LONG, on_message=lambda m: seen[number].append(m["status"]))
        )

    threads = [threading.Thread(target=wait, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    app.backend.store_result(task_id, None, states.STARTED)
    eventually(lambda: all(s == [states.STARTED] for s in seen))
    app.backend.store_result(task_id, 7, states.SUCCESS)
    for thread in threads:
        thread.join(LONG)
    assert values == [7] * 4
    assert seen == [[states.STARTED, states.SUCCESS]] * 4
    # Waiters do not consume the task's own queue. A read message is put back a moment later, so a
    # late reader may have removed the first state, which is superseded.
    eventually(lambda: broker.count(task_id) in (1, 2))
    assert app.AsyncResult(task_id).get(timeout=LONG) == 7


def test_waiting_continues_after_the_connection_is_lost(
    app: Celery, broker: Broker, node: rabbitmq.Node, eventually: Callable[..., Any]
) -> None:
    task_id = broker.new_id()
    seen: List[str] = []
    values: List[Any] = []

    def wait() -> None:
        result = app.AsyncResult(task_id)
        values.append(result.get(timeout=LONG, on_message=lambda m: seen.append(m["status"])))

    thread = threading.Thread(target=wait)
    thread.start()
    app.backend.store_result(task_id, None, states.STARTED)
    eventually(lambda: seen == [states.STARTED])
    node.ctl("close_all_connections", "test")
    app.backend.store_result(task_id, 7, states.SUCCESS)
    thread.join(LONG)
    assert values == [7]


def test_a_wait_that_times_out_leaves_nothing_behind(app: Celery, broker: Broker) -> None:
    task_id = broker.new_id()
    with pytest.raises(TimeoutError):
        app.AsyncResult(task_id).get(timeout=0.3)
    assert broker.count(task_id) is None
    assert app.backend.layout._followers == set()


def test_many_tasks_are_waited_for_while_they_are_stored(
    app: Celery, make: Callable[..., Celery], broker: Broker
) -> None:
    ids = [broker.new_id() for _ in range(40)]
    for task_id in ids[::2]:
        app.backend.store_result(task_id, task_id, states.SUCCESS)
    writer = make()

    def store() -> None:
        for task_id in ids[1::2]:
            writer.backend.store_result(task_id, task_id, states.SUCCESS)

    thread = threading.Thread(target=store)
    thread.start()
    found = dict(app.backend.get_many(ids, timeout=LONG))
    thread.join(LONG)
    assert {task_id: meta["result"] for task_id, meta in found.items()} == {i: i for i in ids}


def test_a_callback_runs_without_a_waiter(
    app: Celery, broker: Broker, eventually: Callable[..., Any]
) -> None:
    task_id = broker.new_id()
    called: List[Any] = []
    result = app.AsyncResult(task_id)
    result.then(lambda r: called.append(r.result))
    app.backend.store_result(task_id, 3, states.SUCCESS)
    eventually(lambda: called == [3])


def test_closing_the_backend_raises_an_error_in_its_waiters(app: Celery, broker: Broker) -> None:
    raised: List[BaseException] = []
    waiting = threading.Event()
    task_id = broker.new_id()

    def wait() -> None:
        try:
            app.AsyncResult(task_id).get(timeout=LONG, on_interval=waiting.set, interval=0.05)
        except errors.BackendUnavailable as exc:
            raised.append(exc)

    thread = threading.Thread(target=wait)
    thread.start()
    assert waiting.wait(LONG)
    app.backend.close()
    thread.join(LONG)
    assert len(raised) == 1


# -- groups and deleting -----------------------------------------------------------------------


def test_a_group_is_saved_restored_in_another_process_and_deleted(
    app: Celery, broker: Broker
) -> None:
    ids = [broker.new_id() for _ in range(3)]
    for task_id in ids:
        app.backend.store_result(task_id, 1, states.SUCCESS)
    group_id = broker.new_id()
    GroupResult(group_id, [app.AsyncResult(i) for i in ids], app=app).save()
    assert subprocesses.run(app, subprocess_jobs.restore_and_join, group_id=group_id) == (
        ids,
        [1, 1, 1],
    )
    subprocesses.run(app, subprocess_jobs.delete_group, group_id=group_id)
    assert GroupResult.restore(group_id, app=app) is None
    assert broker.count(group_id) is None


def test_forgetting_deletes_the_queue(app: Celery, broker: Broker) -> None:
    task_id = broker.new_id()
    app.backend.store_result(task_id, 1, states.SUCCESS)
    app.AsyncResult(task_id).forget()
    assert broker.count(task_id) is None
    assert app.AsyncResult(task_id).state == states.PENDING
    app.AsyncResult(task_id).forget()


def test_a_queue_deleted_just_before_publishing_is_declared_again(
    app: Celery, broker: Broker
) -> None:
    task_id = broker.new_id()
    queues = app.backend.layout.queues
    declare, times = queues._declare, []

    def declare_and_lose(session: Any, declared: str) -> None:
        declare(session, declared)
        times.append(1)
        if len(times) == 1:
            # This happens when the last consumer of Celery 4 stops at this moment.
            session.channel.queue_delete(queues.wire.rkey(declared))

    queues._declare = declare_and_lose
    app.backend.store_result(task_id, 1, states.SUCCESS)
    assert len(times) == 2
    assert app.AsyncResult(task_id).get(timeout=LONG) == 1


def test_a_result_that_is_too_large_for_the_broker_is_refused(
    app: Celery, broker: Broker, node: rabbitmq.Node
) -> None:
    if int(node.distribution.version.split(".")[0]) < 4:
        pytest.skip("its limit of 128 MiB is too much for a test")
    task_id = broker.new_id()
    with pytest.raises(errors.ResultTooLarge):
        app.backend.store_result(task_id, "x" * (17 * 1024 * 1024), states.SUCCESS)
    app.backend.store_result(task_id, "x", states.SUCCESS)
    assert app.AsyncResult(task_id).get(timeout=LONG) == "x"
