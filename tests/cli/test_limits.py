"""``results doctor`` compares the limits of a live broker with the needs of the app."""

from __future__ import annotations

import contextlib
from typing import Any, Dict, Iterator

import amqp
import pytest
from celery import chord

from celery_amqp_results.cli import management
from celery_amqp_results.protocol.names import PLAN_QUEUES
from tests.cli.conftest import Administrator
from tests.cli.test_commands import new_id, run
from tests.cli.test_doctor import Report, amqp_only, managed
from tests.conftest import Apps, eventually, raw_connection


@contextlib.contextmanager
def limited(admin: Administrator, kind: str, whose: str, name: str, value: int) -> Iterator[None]:
    """Set a limit for the duration of a ``with`` block."""
    admin.ask("PUT", kind, whose, name, body={"value": value})
    try:
        yield
    finally:
        admin.ask("DELETE", kind, whose, name)


def queues(admin: Administrator) -> int:
    """Return how many queues the virtual host has."""
    return len(admin.ask("GET", "queues", "/"))


def test_a_limit_on_queues_is_found_before_anything_is_stored(
    managed_apps: Apps, admin: Administrator
) -> None:
    limit = queues(admin) + 88
    with limited(admin, "vhost-limits", "/", "max-queues", limit):
        report = managed(managed_apps(shards=256), admin, "--no-probe")
        assert "256 shards and 8 plan queues of chords" in report.said("queue-limit", "error")
        assert "amqp://?shards=16'" in report.said("queue-limit", "error")
        # With the advice taken everything is well
        report = managed(managed_apps(shards=16), admin)
        assert report.worst() == []
        assert report["queue-limit"]["severity"] == "info"


def test_a_limit_on_queues_that_is_reached_is_named_without_the_management_api(
    managed_apps: Apps, admin: Administrator
) -> None:
    with limited(admin, "vhost-limits", "/", "max-queues", 0):
        report = amqp_only(managed_apps(shards=256))
        assert "limit" in report["probe"]["text"]
        assert "amqp://?shards=16'" in report["probe"]["advice"]


def test_unknown_limits_are_not_called_fine(managed_apps: Apps) -> None:
    report = amqp_only(managed_apps(shards=256), "--no-probe")
    assert "unknown" in report.said("limits", "info")
    assert "up to 264 queues" in report["limits"]["advice"]


def test_the_management_api_is_found_for_a_user_with_the_tag_management(
    managed_apps: Apps, admin: Administrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(management, "PORT", admin.port)
    with admin.user(tags="management") as user:
        admin.permit(user, {"configure": ".*", "write": ".*", "read": ".*"})
        host = managed_apps.url.rpartition("@")[2]
        app = managed_apps(f"amqp://{user}:{user}@{host}", shards=256)
        with limited(admin, "vhost-limits", "/", "max-queues", queues(admin) + 88):
            report = Report(app, "--no-probe")
        assert "256 shards" in report.said("queue-limit", "error")
        app.backend.close()


def test_a_look_at_a_new_broker_does_not_settle_the_number_of_shards(
    managed_apps: Apps, admin: Administrator
) -> None:
    # Given a doctor that has stored a result on a new broker
    first = managed_apps(shards=256)
    assert amqp_only(first)["probe"]["severity"] == "ok"
    # Then an app with another number, under the same name, finds nothing that differs
    name = first.conf.result_exchange
    assert amqp_only(managed_apps(result_exchange=name, shards=16)).worst() == []


def test_what_an_app_has_stored_is_not_removed_by_the_doctor(managed_apps: Apps) -> None:
    app = managed_apps(shards=2)
    task_id = new_id()
    app.backend.store_result(task_id, 1, "SUCCESS")
    assert amqp_only(app)["probe"]["severity"] == "ok"
    assert app.AsyncResult(task_id).result == 1


def test_limits_on_connections_and_channels_of_a_user(
    managed_apps: Apps, admin: Administrator
) -> None:
    with admin.user(tags="management") as user:
        admin.permit(user, {"configure": ".*", "write": ".*", "read": ".*"})
        host = managed_apps.url.rpartition("@")[2]
        app = managed_apps(f"amqp://{user}:{user}@{host}", worker_concurrency=8)
        url = admin.url.replace("guest:guest", f"{user}:{user}")
        with (
            limited(admin, "user-limits", user, "max-connections", 10),
            limited(admin, "user-limits", user, "max-channels", 20),
        ):
            report = Report(app, "--management", url, "--no-probe")
        text = report.said("connection-limit", "warning")
        assert "the user may have 10 connections" in text
        assert "a worker with 8 child processes" in text
        assert "the user may have 20 channels" in report.said("channel-limit", "warning")
        app.backend.close()


def test_no_connection_is_left_for_the_doctor(managed_apps: Apps, admin: Administrator) -> None:
    with admin.user() as user:
        admin.permit(user, {"configure": ".*", "write": ".*", "read": ".*"})
        host = managed_apps.url.rpartition("@")[2]
        app = managed_apps(f"amqp://{user}:{user}@{host}")
        with limited(admin, "user-limits", user, "max-connections", 0):
            result = run(app, "doctor", "--no-management")
        assert result.exit_code != 0
        assert "limit" in result.stderr
        app.backend.close()


def test_the_advice_on_the_message_store_is_for_classic_queues_of_rabbitmq_4(
    managed_apps: Apps, admin: Administrator
) -> None:
    version = admin.ask("GET", "overview")["rabbitmq_version"]
    newer = int(version.partition(".")[0]) >= 4
    report = amqp_only(managed_apps(), "--no-probe")
    assert ("queue_index_embed_msgs_below" in report.said("message-store", "info")) == newer
    quorum: Dict[str, Any] = {
        "result_backend_transport_options": {"shards": 1, "queue_type": "quorum"}
    }
    assert amqp_only(managed_apps(**quorum), "--no-probe").said("message-store", "info") == ""


@pytest.mark.parametrize("led", [False, True])
def test_plans_of_chords_without_a_leader(managed_apps: Apps, led: bool) -> None:
    app = managed_apps()
    app.backend.store_result(new_id(), 1, "SUCCESS")
    name = f"{managed_apps.prefix}.chords.3"
    with raw_connection(managed_apps.url) as connection:
        channel = connection.channel()
        channel.queue_declare(name, durable=True, auto_delete=False)
        try:
            channel.confirm_select()
            channel.basic_publish_confirm(amqp.Message(b"a plan"), routing_key=name)
            if led:
                channel.basic_qos(0, 1, False)
                channel.basic_consume(name, callback=lambda message: None, on_cancel=print)
            text = amqp_only(app, "--no-probe").said("chords", "warning")
        finally:
            channel.queue_delete(name)
    assert (name in text) == (not led)
    assert ("1 chord in 1 plan queue" in text) == (not led)


def test_a_chord_that_was_sent_while_no_worker_runs(managed_apps: Apps) -> None:
    app = managed_apps()
    part, body = (app.signature(name, app=app) for name in ("some.part", "some.body"))
    chord([part, part], app=app)(body)
    text = eventually(lambda: amqp_only(app, "--no-probe").said("chords", "warning"))
    assert "1 chord in 1 plan queue" in text
    assert "start a worker" in text
    with raw_connection(managed_apps.url) as connection:
        channel = connection.channel()
        for number in range(PLAN_QUEUES):
            channel.queue_delete(app.backend.config.topology.plan_queue(number).name)
