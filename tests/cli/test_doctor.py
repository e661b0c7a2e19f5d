"""``results doctor``: every finding that can be provoked on a live broker."""

from __future__ import annotations

import time
import uuid
from typing import Any, Dict, List, Optional

import amqp
import pytest
from celery import Celery, states

from celery_amqp_results.cli.common import Exit
from celery_amqp_results.protocol.message import STATE, StateMessage
from tests.cli.conftest import Administrator
from tests.cli.test_commands import lines, new_id, run, store
from tests.conftest import Apps, eventually, raw_connection

DAY = 86_400_000


class Report:
    """The findings of one run of the doctor."""

    def __init__(self, app: Celery, *arguments: str) -> None:
        result = run(app, "doctor", "--json", *arguments)
        self.exit_code = result.exit_code
        assert result.stdout, result.stderr
        (found,) = lines(result)
        self.findings: List[Dict[str, str]] = found["findings"]
        for finding in self.findings:
            # Every finding other than "ok" says what to do.
            assert finding["severity"] == "ok" or finding["advice"], finding
        failed = any(finding["severity"] == "error" for finding in self.findings)
        assert self.exit_code == (Exit.FAILED if failed else Exit.OK)

    def __getitem__(self, check: str) -> Dict[str, str]:
        """Return the finding of a check that has exactly one."""
        found = [finding for finding in self.findings if finding["check"] == check]
        assert len(found) == 1, self.findings
        return found[0]

    def said(self, check: str, severity: str) -> str:
        """Return all findings of a check with that severity."""
        return " ".join(
            f"{finding['text']} -> {finding['advice']}"
            for finding in self.findings
            if (finding["check"], finding["severity"]) == (check, severity)
        )

    def worst(self) -> List[str]:
        """Return the checks with a warning or an error."""
        return [f["check"] for f in self.findings if f["severity"] in ("warning", "error")]


def amqp_only(app: Celery, *arguments: str) -> Report:
    return Report(app, "--no-management", *arguments)


def publish(
    url: str, queue: str, published: float, expiration: Optional[int] = DAY, count: int = 1
) -> None:
    """Publish states into a shard as a process with another clock would.

    Parameters:
        published: seconds since 1970.
        expiration: milliseconds, ``None`` for never.
        count: how many tasks.
    """
    with raw_connection(url) as connection:
        channel = connection.channel()
        channel.confirm_select()
        for _ in range(count - 1):
            channel.basic_publish(message(published, expiration), routing_key=queue)
        # When this one is confirmed, all before it have arrived.
        channel.basic_publish_confirm(message(published, expiration), routing_key=queue)


def message(published: float, expiration: Optional[int]) -> amqp.Message:
    state = StateMessage(
        id=new_id(),
        state=states.SUCCESS,
        published=int(published * 1e6),
        body=b'{"status": "SUCCESS", "result": 1}',
        content_type="application/json",
        content_encoding="utf-8",
        expiration=expiration,
        kind=STATE,
    )
    return amqp.Message(state.body, **state.properties(True))


# -- AMQP alone ----------------------------------------------------------------------------------


def test_a_new_installation_causes_no_warning(make_app: Apps) -> None:
    # Before any result was stored
    app = make_app(shards=256)
    report = amqp_only(app, "--no-probe")
    assert report.worst() == []
    assert "nothing was stored so far" in report["exchange"]["text"]
    assert "0 of 256 classic shards are there; each is declared when" in report.said(
        "declarations", "ok"
    )
    # And after some results, while most shards do not exist
    for n in range(3):
        store(app, n)
    report = amqp_only(app)
    assert report.worst() == []
    assert report["declarations"]["severity"] == "ok"
    assert (
        "of 256 classic shards are there; each is declared when" in report["declarations"]["text"]
    )
    assert "open an inbox" in report["probe"]["text"]


def test_long_shards_are_reported(make_app: Apps, amqp_url: str) -> None:
    app = make_app(shards=1)
    store(app, 1)
    queue = app.backend.config.topology.shard_queue(0).name
    publish(amqp_url, queue, time.time(), count=4000)
    report = amqp_only(app, "--no-probe")
    assert report["shards"]["severity"] == "warning"
    assert "4,001 messages" in report["shards"]["text"]
    assert "or use 2 shards" in report["shards"]["advice"]


def test_a_rate_too_high_for_the_expiry_is_reported(make_app: Apps, amqp_url: str) -> None:
    app = make_app(shards=1)
    store(app, 1)
    queue = app.backend.config.topology.shard_queue(0).name
    # 300 in 601 seconds are 43,000 a day
    publish(amqp_url, queue, time.time() - 601, count=300)
    report = amqp_only(app, "--no-probe")
    assert report["growth"]["severity"] == "warning"
    assert "0.5 results a second" in report["growth"]["text"]
    assert "result_expires" in report["growth"]["advice"]
    # With fewer, no warning appears
    run(app, "purge", "--yes")
    publish(amqp_url, queue, time.time() - 601, count=200)
    assert amqp_only(app, "--no-probe").worst() == []


def test_damaged_never_expiring_and_future_messages_are_reported(
    make_app: Apps, amqp_url: str
) -> None:
    app = make_app(shards=1)
    store(app, 1)
    queue = app.backend.config.topology.shard_queue(0).name
    publish(amqp_url, queue, time.time() + 90, expiration=None)
    with raw_connection(amqp_url) as connection:
        channel = connection.channel()
        channel.confirm_select()
        channel.basic_publish_confirm(amqp.Message(b"not ours"), routing_key=queue)
    report = amqp_only(app, "--no-probe")
    assert report["foreign"]["severity"] == "warning"
    assert "1 message in 1 shard" in report["foreign"]["text"]
    assert report["clock"]["severity"] == "warning"
    assert "1.5 min ahead" in report["clock"]["text"]
    assert report["everlasting"]["severity"] == "info"
    assert "1 state in 1 shard" in report["everlasting"]["text"]


def test_a_shard_held_by_another_consumer_is_reported(make_app: Apps, amqp_url: str) -> None:
    app = make_app(result_backend_transport_options={"shards": 1, "lookup_timeout": 1})
    for n in range(3):
        store(app, n)
    queue = app.backend.config.topology.shard_queue(0).name
    with raw_connection(amqp_url) as connection:
        # The first consumer is the single active consumer, until it leaves.
        channel = connection.channel()
        channel.basic_qos(0, 1, False)
        channel.basic_consume(queue, callback=lambda message: None)
        report = amqp_only(app, "--no-probe")
        assert report.exit_code == Exit.FAILED
        assert repr(queue) in report["contents"]["text"]
        assert "within 1 s" in report["contents"]["text"]
    assert eventually(lambda: "contents" not in amqp_only(app, "--no-probe").worst())


def test_risky_settings_are_reported(make_app: Apps) -> None:
    app = make_app(
        result_expires=None,
        result_persistent=False,
        accept_content=["json", "pickle"],
        result_backend_transport_options={"shards": 1, "confirm": False},
    )
    report = amqp_only(app)
    assert {name: report[name]["severity"] for name in ("expiry", "persistence", "confirms")} == {
        "expiry": "warning",
        "persistence": "info",
        "confirms": "info",
    }
    assert report["pickle"]["severity"] == "warning"


def test_missing_declarations_are_reported_if_declaring_is_turned_off(make_app: Apps) -> None:
    apart: Dict[str, Any] = {"result_backend_transport_options": {"shards": 2, "declare": False}}
    app, other = make_app(**apart), make_app(shards=2)
    report = amqp_only(app)
    assert "is not there" in report.said("exchange", "error")
    assert "celery_amqp_results.definitions" in report.said("exchange", "error")
    other.backend.store_result(new_id(), 1, states.SUCCESS)
    report = amqp_only(app)
    assert "1 of 2 classic shards are there, and the option 'declare'" in report.said(
        "declarations", "error"
    )


def test_leftovers_are_found_without_the_management_api(make_app: Apps) -> None:
    store(make_app(result_backend_transport_options={"layout": "per-task"}))
    report = amqp_only(make_app(), "--no-probe")
    assert repr(make_app.prefix) in report.said("leftovers", "info")
    assert "results migrate" in report.said("leftovers", "info")
    assert "--management" in report["management"]["advice"]


# -- With the management API ---------------------------------------------------------------------


def managed(app: Celery, admin: Administrator, *arguments: str) -> Report:
    return Report(app, "--management", admin.url, *arguments)


@pytest.mark.parametrize("stored", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("definition", "severity", "what"),
    [
        ({"max-length": 1000}, "error", "max-length = 1000"),
        ({"max-length-bytes": 10**6}, "error", "max-length-bytes"),
        ({"expires": 10**7}, "error", "expires"),
        ({"message-ttl": 3_600_000}, "warning", "message-ttl = 3600000"),
        ({"dead-letter-exchange": "amq.fanout"}, "warning", "dead-letter-exchange"),
        # Longer than result_expires, and without effect on these queues
        ({"message-ttl": 2 * DAY}, None, ""),
        ({"queue-leader-locator": "balanced"}, None, ""),
    ],
    ids=str,
)
def test_policies_that_affect_results_are_reported(
    managed_apps: Apps,
    admin: Administrator,
    definition: Dict[str, Any],
    severity: Optional[str],
    what: str,
    stored: bool,
) -> None:
    app = managed_apps(shards=1)
    if stored:
        store(app)
    pattern = f"^{managed_apps.prefix}\\."
    with admin.policy(pattern, definition, **{"apply-to": "queues"}) as name:

        def found() -> Optional[Report]:
            report = managed(app, admin, "--no-probe")
            # The management API sees it a few moments later.
            told = [finding["severity"] for finding in report.findings]
            return report if severity is None or severity in told else None

        report = eventually(found)
        if severity is None:
            assert report["policy"]["severity"] == "ok"
            return
        text = report.said("policy", severity)
        assert what in text
        assert name in text
        assert f"'{managed_apps.prefix}.'" in text


@pytest.mark.parametrize("stored", [False, True], ids=["before", "after"])
def test_operator_policies_are_reported(
    managed_apps: Apps, admin: Administrator, stored: bool
) -> None:
    app = managed_apps(shards=1)
    if stored:
        store(app)
    pattern = f"^{managed_apps.prefix}\\."
    with admin.policy(
        pattern, {"max-length": 1000}, "operator-policies", **{"apply-to": "queues"}
    ) as name:
        told = eventually(lambda: managed(app, admin, "--no-probe").said("policy", "error"))
        assert "max-length = 1000" in told
        assert name in told


def test_a_delivery_limit_is_reported_for_quorum_queues_only(
    managed_apps: Apps, admin: Administrator
) -> None:
    quorum: Dict[str, Any] = {
        "result_backend_transport_options": {"shards": 1, "queue_type": "quorum"}
    }
    pattern = f"^{managed_apps.prefix}\\."
    with admin.policy(pattern, {"delivery-limit": 5}, **{"apply-to": "queues"}):
        report = managed(managed_apps(**quorum), admin, "--no-probe")
        assert "delivery-limit = 5" in report.said("policy", "error")
        report = managed(managed_apps(), admin, "--no-probe")
        assert report["policy"]["severity"] == "ok"


def test_the_probe_notices_results_that_a_policy_drops(
    managed_apps: Apps, admin: Administrator
) -> None:
    app = managed_apps(shards=1)
    store(app)
    pattern = f"^{managed_apps.prefix}\\.shard"
    with admin.policy(pattern, {"message-ttl": 0}, **{"apply-to": "queues"}):
        report = eventually(lambda: r if (r := amqp_only(app)).exit_code == Exit.FAILED else None)
        assert "not found any more" in report["probe"]["text"]
        assert "message-ttl" in report["probe"]["advice"]


def test_an_alarm_is_reported_with_and_without_the_management_api(
    managed_apps: Apps, admin: Administrator
) -> None:
    app = managed_apps()
    store(app)
    admin.node.ctl("set_disk_free_limit", str(10**15))
    try:
        report = amqp_only(app)
        text = report.said("alarm", "error")
        assert "blocks publishers" in text
        assert "free memory or disk space" in text
        # Checks that would hang are skipped
        assert report.said("probe", "ok") == report.said("shards", "ok") == ""
        # The node's own alarm reaches the management API a few seconds later
        eventually(
            lambda: (
                f"{admin.node.name} has a disk alarm" in managed(app, admin).said("alarm", "error")
            )
        )
    finally:
        admin.node.ctl("set_disk_free_limit", "50MB")
    eventually(lambda: managed(app, admin).worst() == [])


def test_leftovers_and_large_results_that_never_expire_are_reported(
    managed_apps: Apps, admin: Administrator
) -> None:
    old = managed_apps(result_backend_transport_options={"layout": "per-task"})
    for _ in range(2):
        store(old)
    store(managed_apps(result_expires=None), "x" * 200_000)
    going, staying = str(uuid.uuid4()), str(uuid.uuid4())
    with raw_connection(managed_apps.url) as connection:
        channel = connection.channel()
        # As Celery's rpc:// backend declares them
        channel.queue_declare(going, durable=False, auto_delete=True, arguments={"x-expires": DAY})
        channel.queue_declare(staying, durable=True, auto_delete=False)
        try:
            report = managed(managed_apps(), admin, "--no-probe")
        finally:
            for name in (going, staying):
                channel.queue_delete(name)
    warnings = report.said("leftovers", "warning")
    assert "2 queues of single tasks" in warnings
    assert f"delete_queue {staying}" in warnings
    assert "1 queue that nobody reads, named as rpc://" in report.said("leftovers", "info")
    assert "1 of 1 queues of large results never expire" in report["large"]["text"]


def test_a_user_with_little_access_to_the_management_api_gets_a_partial_report(
    managed_apps: Apps, admin: Administrator
) -> None:
    with admin.user(tags="management") as user:
        admin.permit(user, {"configure": ".*", "write": ".*", "read": ".*"})
        url = admin.url.replace("guest:guest", f"{user}:{user}")
        report = Report(managed_apps(), "--management", url, "--no-probe")
        text = report.said("management", "info")
        assert "may not see that" in text or "lacks a tag" in text
        assert "monitoring policymaker" in text


# -- Permissions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "check", "text"),
    [
        ({"configure": "^$", "write": "^$", "read": "^$"}, "permissions", "amq.default"),
        ({"configure": "^$", "read": "^$"}, "permissions", ".shard.0"),
        ({"configure": "^$"}, "probe", "amq.gen"),
        ({"write": "^amq\\.(default|gen-.*)$"}, "probe", ".states"),
    ],
    ids=["none", "write", "no configure", "no write"],
)
def test_missing_permissions_are_named(
    managed_apps: Apps, admin: Administrator, patterns: Dict[str, str], check: str, text: str
) -> None:
    store(managed_apps(shards=1))
    with admin.user() as user:
        admin.permit(user, {"configure": ".*", "write": ".*", "read": ".*", **patterns})
        host = managed_apps.url.rpartition("@")[2]
        app = managed_apps(f"amqp://{user}:{user}@{host}", shards=1)
        report = amqp_only(app)
        assert text in report.said(check, "error")
        assert "configure and read on" in report.said(check, "error")
        # Comparisons that failed for lack of permissions are reported too
        compared = "configure" not in patterns
        assert ("was not compared" in report.said("exchange", "info")) == (not compared)
        app.backend.close()
