"""Results over ``inline_limit``: kept out of the shards, readable by many, and cleaned up."""

from __future__ import annotations

import functools
import json
import time
import uuid
from typing import Any, Callable, Iterator, List

import amqp
import pytest
from celery import Celery, states
from celery.exceptions import TimeoutError
from celery.result import GroupResult

from celery_amqp_results import errors
from celery_amqp_results.amqp import declarations
from celery_amqp_results.store import publisher
from tests.broker.helpers import LONG, Waiting, held, new_id, until_watched
from tests.conftest import Apps, raw_connection
from tools import rabbitmq

LIMIT = 4096
BODY = "x" * 20_000
#: Enough loose messages for a reader to pack them.
WORTH_PACKING = 40


class Queues:
    """The body queues that an app has declared; they are deleted after the test."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.names: List[str] = []

    def exists(self, name: str) -> bool:
        """Return whether the queue exists, without using it, which would postpone its expiry."""
        returned: List[Any] = []
        with raw_connection(self.url) as connection:
            channel = connection.channel()
            channel.confirm_select()
            channel.events["basic_return"].add(lambda *args: returned.append(args))
            fence = amqp.Message(b"", type="fence", expiration="0")
            try:
                channel.basic_publish_confirm(fence, routing_key=name, mandatory=True)
            except amqp.exceptions.MessageNacked:
                # It was deleted at this moment.
                return False
        return not returned


@pytest.fixture
def queues(amqp_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Queues]:
    """Records the names of the body queues."""
    queues = Queues(amqp_url)
    apart = publisher.Publisher.publish_apart

    def noted(self: Any, queue: Any, message: Any) -> None:
        queues.names.append(queue.name)
        apart(self, queue, message)

    monkeypatch.setattr(publisher.Publisher, "publish_apart", noted)
    yield queues
    with raw_connection(amqp_url) as connection:
        channel = connection.channel()
        for name in queues.names:
            channel.queue_delete(name)


def make(make_app: Apps, **conf: Any) -> Celery:
    options = {"shards": 1, "inline_limit": LIMIT, **conf.pop("options", {})}
    return make_app(result_backend_transport_options=options, **conf)


def messages_in_shard(app: Celery, url: str) -> List[Any]:
    """Take all messages out of the only shard."""
    found: List[Any] = []
    with raw_connection(url) as connection:
        channel = connection.channel()
        name = f"{app.conf.result_exchange}.shard.0"
        count = channel.queue_declare(name, passive=True).message_count
        channel.basic_consume(name, no_ack=True, callback=found.append)
        while len(found) < count:
            connection.drain_events(timeout=LONG)
    return found


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_a_large_result_has_many_readers_and_only_a_pointer_in_the_shard(
    make_app: Apps, queues: Queues, amqp_url: str, queue_type: str
) -> None:
    # Given a large result
    conf = {"options": {"queue_type": queue_type}}
    app = make(make_app, **conf)
    task_id = new_id()
    app.backend.store_result(task_id, BODY, states.SUCCESS)
    assert len(queues.names) == 1

    # When several processes read it at once, each more than once
    others = [make(make_app, **conf) for _ in range(3)]

    def read(reader: Celery) -> List[Any]:
        return [reader.backend._get_task_meta_for(task_id)["result"] for _ in range(3)]

    readers = [Waiting(functools.partial(read, reader)) for reader in others]

    # Then all of them get it
    for reader in readers:
        assert reader.result() == [BODY] * 3
    # And the message in the shard is small
    (pointer,) = [m for m in messages_in_shard(app, amqp_url) if m.properties["type"] == "state"]
    assert len(pointer.body) == 0
    assert pointer.headers["body-queue"] == queues.names[0]


def test_waiters_get_large_results_and_large_intermediate_states(
    make_app: Apps, queues: Queues
) -> None:
    waiter, worker = make(make_app), make(make_app)
    task_id = new_id()
    seen: List[Any] = []
    waiting = Waiting(lambda: waiter.AsyncResult(task_id).get(timeout=LONG, on_message=seen.append))
    from tests.conftest import eventually

    until_watched(waiter, task_id, eventually)
    worker.backend.store_result(task_id, {"log": BODY}, "PROGRESS")
    worker.backend.store_result(task_id, BODY * 2, states.SUCCESS)
    assert waiting.result() == BODY * 2
    assert [(m["status"], len(m["result"])) for m in seen] == [
        ("PROGRESS", 1),
        ("SUCCESS", len(BODY * 2)),
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_forget_deletes_the_queue(make_app: Apps, queues: Queues, packed: bool) -> None:
    app = make(make_app)
    task_id, other = new_id(), new_id()
    app.backend.store_result(task_id, BODY, states.SUCCESS)
    app.backend.store_result(other, BODY, states.SUCCESS)
    if packed:
        for _ in range(WORTH_PACKING):
            app.backend.store_result(new_id(), None, states.SUCCESS)
        assert app.backend._get_task_meta_for(task_id)["result"] == BODY
        assert app.backend.layout.store.packed >= WORTH_PACKING
        assert app.backend._get_task_meta_for(task_id)["result"] == BODY

    app.backend.forget(task_id)

    assert app.backend._get_task_meta_for(task_id)["status"] == states.PENDING
    assert app.backend._get_task_meta_for(other)["result"] == BODY
    assert [queues.exists(name) for name in queues.names] == [False, True]


def test_the_body_of_a_superseded_state_is_deleted_if_it_never_expires(
    make_app: Apps, queues: Queues
) -> None:
    app = make(make_app, result_expires=None)
    task_id = new_id()
    # Given a task that ran twice, and before that failed with a large error
    app.backend.store_result(task_id, Exception(BODY), states.FAILURE)
    app.backend.store_result(task_id, BODY, states.SUCCESS)
    app.backend.store_result(task_id, BODY + "late", states.SUCCESS)
    for _ in range(WORTH_PACKING):
        app.backend.store_result(new_id(), None, states.SUCCESS)

    # When the shard is packed, and read again
    for _ in range(2):
        assert app.backend._get_task_meta_for(task_id)["result"] == BODY

    # Then only the first success is left
    assert [queues.exists(name) for name in queues.names] == [False, True, False]


def test_a_body_without_a_pointer_expires_and_the_task_stays_pending(
    make_app: Apps, queues: Queues, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    app = make(make_app, result_expires=0.5)
    monkeypatch.setattr("celery_amqp_results.store.large_bodies.LINGER", 1000)
    layout = app.backend.layout
    task_id = new_id()

    class Crash(BaseException):
        pass

    def crash(*args: Any) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        # The body is stored by then, and the pointer is not.
        patch.setattr(layout, "_outgoing", crash)
        with pytest.raises(Crash):
            app.backend.store_result(task_id, BODY, states.SUCCESS)

    assert app.backend._get_task_meta_for(task_id)["status"] == states.PENDING
    (name,) = queues.names
    eventually(lambda: not queues.exists(name))


def test_the_queue_of_a_body_that_is_not_stored_and_never_expires_is_deleted(
    make_app: Apps, queues: Queues, node: rabbitmq.Node, amqp_url: str
) -> None:
    app = make(make_app, result_expires=None, options={"retry_policy": {"max_retries": 0}})
    # Given a broker that refuses to take a body
    full = json.dumps({"max-length-bytes": 1000, "overflow": "reject-publish"})
    pattern = rf"^{make_app.prefix}\.large\."
    node.ctl("set_policy", "--apply-to", "queues", make_app.prefix, pattern, full)
    try:
        with pytest.raises(errors.NotConfirmed, match="nack"):
            app.backend.store_result(new_id(), BODY, states.SUCCESS)
    finally:
        node.ctl("clear_policy", make_app.prefix)
    (name,) = queues.names
    with raw_connection(amqp_url) as connection:
        connection.channel().queue_declare(name, passive=True)
        # When another result is stored
        app.backend.store_result(new_id(), 1, states.SUCCESS)
        # Then the queue is not left
        with pytest.raises(amqp.NotFound):
            connection.channel().queue_declare(name, passive=True)


def test_a_pointer_without_a_body_counts_as_an_expired_result(
    make_app: Apps, queues: Queues, amqp_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = make(make_app)
    task_id, group_id = new_id(), new_id()
    app.backend.store_result(task_id, BODY, states.SUCCESS)
    app.backend.save_group(
        group_id, GroupResult(group_id, [app.AsyncResult(new_id()) for _ in range(200)])
    )
    assert len(app.backend.restore_group(group_id).results) == 200
    with raw_connection(amqp_url) as connection:
        channel = connection.channel()
        for name in queues.names:
            channel.queue_delete(name)

    meta = app.backend._get_task_meta_for(task_id)

    assert meta["status"] == states.PENDING
    assert task_id in caplog.text
    assert app.backend.restore_group(group_id) is None
    # A waiter gets an error, since the value can never arrive
    with pytest.raises(errors.ResultExpired, match=task_id):
        app.AsyncResult(task_id).get(timeout=LONG)


def test_deleting_the_body_queue_does_not_hang_waiting_readers(
    make_app: Apps, queues: Queues, amqp_url: str
) -> None:
    app = make(make_app)
    task_id = new_id()
    app.backend.store_result(task_id, BODY, states.SUCCESS)
    (name,) = queues.names
    # Given a consumer that holds the queue, and readers waiting behind it
    with held(amqp_url, name) as connection:
        readers = [Waiting(lambda: app.backend._get_task_meta_for(task_id)) for _ in range(2)]
        # When it is deleted
        other = connection.channel()
        other.queue_delete(name)
    # Then they do not hang
    for reader in readers:
        assert reader.result()["status"] == states.PENDING


def test_pointers_that_are_not_text_are_foreign() -> None:
    from celery_amqp_results.protocol.message import StateMessage

    with pytest.raises(errors.ForeignMessage, match="body-queue"):
        StateMessage.from_properties(
            {
                "type": "state",
                "correlation_id": str(uuid.uuid4()),
                "content_type": "application/json",
                "content_encoding": "utf-8",
                "application_headers": {"state": "SUCCESS", "published": 1, "body-queue": 7},
            },
            b"",
        )


def test_a_body_queue_that_is_lost_after_its_declaration_is_declared_again(
    make_app: Apps, amqp_url: str, queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make(make_app)
    declare = declarations.declare_queue
    lost: List[str] = []

    def declare_and_lose(channel: Any, queue: Any) -> None:
        declare(channel, queue)
        if len(lost) < 2:
            # As an operator may do in that moment.
            with raw_connection(amqp_url) as connection:
                connection.channel().queue_delete(queue.name)
            lost.append(queue.name)

    monkeypatch.setattr(publisher, "declare_queue", declare_and_lose)
    task_id = new_id()
    app.backend.store_result(task_id, BODY, states.SUCCESS)
    assert lost == queues.names * 2
    assert app.AsyncResult(task_id).get(timeout=LONG) == BODY


@pytest.mark.parametrize(
    "wait",
    [
        lambda result, ids: result.get(timeout=1),
        lambda result, ids: result.get(timeout=1, on_message=print),
        lambda result, ids: GroupResult(new_id(), [result], app=result.app).get(timeout=1),
        lambda result, ids: list(result.backend.watch(ids, timeout=1)),
        lambda result, ids: list(result.backend.get_many(ids, timeout=1)),
        lambda result, ids: result.backend.consume(result.id, timeout=1),
    ],
    ids=["get", "on_message", "group", "watch", "get_many", "consume"],
)
def test_the_timeout_of_a_wait_limits_the_read_of_a_large_result(
    make_app: Apps, queues: Queues, amqp_url: str, wait: Callable[[Any, List[str]], Any]
) -> None:
    app = make(make_app, options={"lookup_timeout": 60})
    task_id = new_id()
    app.backend.store_result(task_id, BODY, states.SUCCESS)
    (name,) = queues.names
    with held(amqp_url, name):
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            wait(app.AsyncResult(task_id), [task_id])
        assert time.monotonic() - started < 30
    assert app.AsyncResult(task_id).get(timeout=LONG) == BODY


def test_a_poll_returns_a_large_result(make_app: Apps, queues: Queues) -> None:
    app = make(make_app)
    task_id = new_id()
    app.backend.store_result(task_id, BODY, states.SUCCESS)
    assert app.AsyncResult(task_id).get(timeout=0) == BODY
    assert GroupResult(new_id(), [app.AsyncResult(task_id)], app=app).get(timeout=0) == [BODY]
    assert [meta["result"] for meta in app.backend.watch(task_id, timeout=0)] == [BODY]
