"""Single faults of a broker and its operators, and what exactly a user sees."""

from __future__ import annotations

import contextlib
import json
import threading
from typing import Any, Dict, Iterator, List

import pytest
from celery import states

from celery_amqp_results import errors
from celery_amqp_results.amqp import confirm_log, confirms, declarations
from celery_amqp_results.store import lookup as store_module
from tests import subprocesses
from tests.conftest import Apps, eventually, raw_connection
from tests.faults import fault_jobs
from tests.faults.faults import alarm
from tests.faults.test_store_faults import WORTH_PACKING, new_ids, read_from_store
from tools import rabbitmq
from tools.proxy import Proxy

#: Seconds after which a call counts as hanging.
LONG = 60.0


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_an_alarm_delays_stores_and_is_named_by_look_ups(
    make_app: Apps, node: rabbitmq.Node, kind: str
) -> None:
    conf: Dict[str, Any] = {
        "result_backend_transport_options": {"shards": 1, "lookup_timeout": 1.5}
    }
    app, worker, waiting = (make_app(**conf) for _ in range(3))
    first, second, third = new_ids(3)
    worker.backend.store_result(first, 1, states.SUCCESS)
    got: List[Any] = []
    waiter = threading.Thread(
        target=lambda: got.extend(
            waiting.AsyncResult(i).get(timeout=LONG) for i in (second, third)
        ),
        daemon=True,
    )
    waiter.start()
    eventually(lambda: waiting.backend.layout.inbox.covers(second))

    def store() -> None:
        for number, task_id in enumerate((second, third), 2):
            worker.backend.store_result(task_id, number, states.SUCCESS)

    def look_up() -> None:
        for _ in range(20):
            app.backend._get_task_meta_for(first)

    storing = threading.Thread(target=store, daemon=True)
    with alarm(node, kind):
        storing.start()
        # Then a look-up times out with an error that names the alarm
        with pytest.raises(errors.LookupTimeout, match="memory or disk alarm"):
            look_up()
        # And the storing and waiting threads continue to block
        assert storing.is_alive()
        assert waiter.is_alive()
    # And when the alarm is over, everything continues
    storing.join(LONG)
    waiter.join(LONG)
    assert got == [2, 3]
    assert [read_from_store(app, [i])[i]["result"] for i in (first, second, third)] == [1, 2, 3]


def test_a_look_up_is_answered_even_if_the_broker_blocks_its_packing(
    make_app: Apps, node: rabbitmq.Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, writer = (
        make_app(result_backend_transport_options={"shards": 1, "lookup_timeout": 2})
        for _ in range(2)
    )
    ids = new_ids(WORTH_PACKING)
    for number, task_id in enumerate(ids):
        writer.backend.store_result(task_id, number, states.SUCCESS)
    monkeypatch.setattr(store_module, "PACK_SECONDS", 10.0)
    publish = confirms.ConfirmChannel.publish
    blocked: List[str] = []

    # Given an alarm that starts when a reader has read its shard and is about to pack it
    with contextlib.ExitStack() as stack:

        def publish_blocked(self: Any, publication: Any) -> None:
            stack.enter_context(alarm(node, "memory"))
            monkeypatch.setattr(confirms.ConfirmChannel, "publish", publish)
            # The broker accepts the first message, and then blocks the connection.
            publish(self, confirm_log.Publication(publication.message))
            publish(self, publication)
            eventually(lambda: self.link.drain(0.1) and self.link.blocked)
            blocked.append(self.link.blocked)

        monkeypatch.setattr(confirms.ConfirmChannel, "publish", publish_blocked)
        assert app.backend._get_task_meta_for(ids[5])["result"] == 5
        assert blocked
    found = read_from_store(app, ids)
    assert [found[i]["result"] for i in ids] == list(range(len(ids)))


def test_a_black_hole_connection_delays_results_but_loses_none(
    make_app: Apps, node: rabbitmq.Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A short heartbeat, so that the test need not wait for half a minute.
    monkeypatch.setattr(confirms, "CONFIRM_TIMEOUT", 2.0)
    with Proxy(node.amqp_port) as proxy:
        app = make_app(
            proxy.url(node.url()), result_backend_transport_options={"lookup_timeout": 3}
        )
        first, second = new_ids(2)
        app.backend.store_result(first, 1, states.SUCCESS)
        assert read_from_store(app, [first])[first]["result"] == 1
        app.backend.store_result(first, 1, states.SUCCESS)
        # When nothing that is sent arrives, and no error is reported
        proxy.swallow()
        # Then a look-up times out, and storing blocks
        with pytest.raises(errors.BackendUnavailable):
            app.backend._get_task_meta_for(first)
        storing = threading.Thread(
            target=app.backend.store_result, args=(second, 2, states.SUCCESS), daemon=True
        )
        storing.start()
        proxy.resume()
        storing.join(LONG)
        assert not storing.is_alive()
        assert app.backend._get_task_meta_for(second)["result"] == 2
        app.backend.close()


def test_clients_fail_over_to_another_host_and_stay_there(
    make_app: Apps, node: rabbitmq.Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confirms, "CONFIRM_TIMEOUT", 2.0)
    # Given a node that is cut off from its cluster: connections stay open, and nothing happens
    with Proxy(node.amqp_port) as one, Proxy(node.amqp_port) as two:
        app = make_app(
            ";".join(proxy.url(node.url()) for proxy in (one, two)),
            result_backend_transport_options={"lookup_timeout": 3},
        )
        first, second = new_ids(2)
        app.backend.store_result(first, 1, states.SUCCESS)
        assert app.backend._get_task_meta_for(first)["result"] == 1
        assert (one.accepted, two.accepted) == (2, 0)
        one.swallow()
        # When a storing and a reading client notice that
        app.backend.store_result(second, 2, states.SUCCESS)
        with pytest.raises(errors.LookupTimeout):
            app.backend._get_task_meta_for(second)
        # Then they continue through the other node, without trying the first one again
        assert app.backend._get_task_meta_for(second)["result"] == 2
        assert app.AsyncResult(second).get(timeout=LONG) == 2
        assert one.accepted == 2
        assert two.accepted >= 2
        app.backend.close()


def test_a_look_up_that_receives_nothing_is_followed_by_one_through_another_host(
    make_app: Apps, node: rabbitmq.Node
) -> None:
    with Proxy(node.amqp_port) as one, Proxy(node.amqp_port) as two:
        app = make_app(
            ";".join(proxy.url(node.url()) for proxy in (one, two)),
            result_backend_transport_options={"lookup_timeout": 2, "shards": 1},
        )
        task_id = new_ids(1)[0]
        app.backend.store_result(task_id, 1, states.SUCCESS)
        # Given a node that answers, but does not reach the node of the queue: here another reader
        # has the queue
        queue = app.backend.config.topology.shard_queue(0).name
        with raw_connection(node.url()) as holder:
            holder.channel().basic_consume(queue, callback=lambda message: None)
            with pytest.raises(errors.LookupTimeout):
                app.backend._get_task_meta_for(task_id)
            assert two.accepted == 0
        # When the client looks it up again
        assert app.backend._get_task_meta_for(task_id)["result"] == 1
        # Then it has asked the other node
        assert two.accepted > 0
        app.backend.close()


@contextlib.contextmanager
def limited(node: rabbitmq.Node, **limits: int) -> Iterator[None]:
    """Give the default virtual host limits for the duration of a ``with`` block."""
    node.ctl("set_vhost_limits", "-p", "/", json.dumps(limits))
    try:
        yield
    finally:
        node.ctl("clear_vhost_limits", "-p", "/")


def test_a_refused_queue_declaration_raises_an_error_with_the_reason(
    make_app: Apps, node: rabbitmq.Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(declarations, "LIMIT_PAUSE", 0.0)
    app = make_app()
    task_id = new_ids(1)[0]
    with (
        limited(node, **{"max-queues": 0}),
        pytest.raises(errors.BackendUnavailable, match="queue limit"),
    ):
        app.backend.store_result(task_id, 1, states.SUCCESS)
    # The backend works again once the limit is lifted.
    app.backend.store_result(task_id, 1, states.SUCCESS)
    assert app.AsyncResult(task_id).get(timeout=LONG) == 1


def test_storing_raises_if_a_policy_refuses_the_message(
    make_app: Apps, node: rabbitmq.Node
) -> None:
    app = make_app(
        result_backend_transport_options={"shards": 1, "retry_policy": {"max_retries": 1}}
    )
    first, second = new_ids(2)
    app.backend.store_result(first, 1, states.SUCCESS)
    policy = json.dumps({"max-length": 1, "overflow": "reject-publish"})

    def store_often() -> None:
        # A queue applies its policy a moment later.
        for _ in range(200):
            app.backend.store_result(second, 2, states.SUCCESS)

    node.ctl("set_policy", make_app.prefix, f"^{make_app.prefix}", policy)
    try:
        with pytest.raises(errors.NotConfirmed, match="nack"):
            store_often()
    finally:
        node.ctl("clear_policy", make_app.prefix)


def test_a_full_third_party_queue_never_blocks_storing(make_app: Apps, raw: Any) -> None:
    app = make_app(result_backend_transport_options={"retry_policy": {"max_retries": 0}})
    ids = new_ids(20)
    app.backend.store_result(ids[0], 0, states.SUCCESS)
    # Given a full queue that is bound to all states
    channel = raw.channel()
    full = channel.queue_declare(
        "", exclusive=True, arguments={"x-max-length": 1, "x-overflow": "reject-publish"}
    ).queue
    channel.queue_bind(full, f"{make_app.prefix}.states", "#")
    for number, task_id in enumerate(ids):
        # When states are stored, whose copies that queue refuses
        app.backend.store_result(task_id, number, states.STARTED)
        app.backend.store_result(task_id, number, states.SUCCESS)
    # Then they are stored
    found = read_from_store(app, ids)
    assert [found[i]["result"] for i in ids] == list(range(len(ids)))


def test_results_survive_any_number_of_reads(make_app: Apps, node: rabbitmq.Node) -> None:
    conf: Dict[str, Any] = {
        "result_backend_transport_options": {"shards": 1, "queue_type": "quorum"}
    }
    app = make_app(**conf)
    ids = new_ids(5)
    for task_id in ids:
        app.backend.store_result(task_id, "kept", states.SUCCESS)
    for number in range(300):
        assert app.backend._get_task_meta_for(ids[number % 5])["result"] == "kept"
    # Readers that are killed while they hold the shard return its messages too.
    for _ in range(3):
        with subprocesses.start(app, fault_jobs.hold_shard, shard=0) as process:
            assert process.readline() == "holding"
            process.kill()
    found = read_from_store(app, ids)
    assert {meta["result"] for meta in found.values()} == {"kept"}
