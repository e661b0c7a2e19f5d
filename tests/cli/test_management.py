"""The commands on a node that has RabbitMQ's management API."""

from __future__ import annotations

import kombu
import pytest
from celery import states

from celery_amqp_results.cli import management
from celery_amqp_results.cli.common import Exit
from tests.broker.helpers import open_inbox
from tests.cli.conftest import Administrator
from tests.cli.test_commands import findings, lines, run, store
from tests.conftest import Apps


def test_stats_doctor_and_migrate_use_the_management_api(
    managed_apps: Apps, admin: Administrator
) -> None:
    app, url = managed_apps(), admin.url
    old = managed_apps(result_backend_transport_options={"layout": "per-task"})
    task_id, kept = store(old, 5), store(app, 1)
    store(old, None, states.STARTED)
    with admin.policy(f"^{managed_apps.prefix}\\.", {"max-length": 1000}):
        result = run(app, "doctor", "--json", "--management", url)
    assert result.exit_code == Exit.FAILED, result.output
    found = findings(result)
    assert found["policy"] == "error"
    assert found["leftovers"] == "warning"

    with app.backend.layout.tap() as tap:
        # Given a watcher of everything, and a waiting client.
        tap.step(None, 0.0)
        open_inbox(app)
        (counted,) = lines(run(app, "stats", "--json", "--management", url))
    assert counted["management"]["url"] == admin.node.management_url
    assert counted["management"]["inboxes"] == 2
    # The inbox is bound for its own tasks, for tasks of unknown senders, for overflow notices, and
    # for barriers.
    assert counted["management"]["bindings"] == 5

    result = run(app, "migrate", "--yes", "--json", "--management", url)
    outcomes = {line["id"]: line["outcome"] for line in lines(result)}
    assert outcomes.pop(task_id) == "moved"
    assert list(outcomes.values()) == ["not ended"]
    assert run(app, "get", task_id, kept).exit_code == Exit.OK

    elsewhere = admin.node.management_url.replace("127", "x127", 1)
    assert run(app, "stats", "--management", elsewhere).exit_code == Exit.UNAVAILABLE
    assert run(app, "stats", "--management", "nothing").exit_code == Exit.UNAVAILABLE


def test_the_management_api_is_found_on_the_host_of_the_broker(
    managed_apps: Apps, admin: Administrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A private node does not have the usual port.
    monkeypatch.setattr(management, "PORT", admin.port)
    app = managed_apps()
    store(app, 1)
    (counted,) = lines(run(app, "stats", "--json"))
    assert counted["management"]["url"] == admin.node.management_url
    assert findings(run(app, "doctor", "--json", "--no-probe"))["policy"] == "ok"
    assert lines(run(app, "stats", "--json", "--no-management"))[0]["management"] is None
    # A user without access to the API did not ask for it, and sees no complaint
    with admin.user() as user:
        admin.permit(user, {"configure": ".*", "write": ".*", "read": ".*"})
        host = managed_apps.url.rpartition("@")[2]
        other = managed_apps(f"amqp://{user}:{user}@{host}")
        (counted,) = lines(run(other, "stats", "--json"))
        assert counted["management"] is None
        other.backend.close()
    # No process listens
    monkeypatch.setattr(management, "PORT", 1)
    (counted,) = lines(run(app, "stats", "--json"))
    assert counted["management"] is None
    result = run(app, "migrate", "--yes")
    assert result.exit_code == Exit.USAGE
    assert "--management http://" in result.stderr


@pytest.mark.parametrize(
    ("url", "ssl", "guessed"),
    [
        ("amqp://host:5673//", False, "http://host:15672"),
        ("amqp://host//", {"ca_certs": "ca.pem"}, "https://host:15671"),
        ("amqp://[::1]:5672//", False, "http://[::1]:15672"),
    ],
)
def test_the_address_of_the_management_api_is_derived_from_the_broker_url(
    url: str, ssl: object, guessed: str
) -> None:
    # No address is guessed that would receive the broker's password unprotected.
    assert management.guess_url(kombu.Connection(url, ssl=ssl)) == guessed
