"""The commands with RabbitMQ's management API, on a node that has it."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

import pytest
from celery import states

from celery_amqp_results.cli.common import Exit
from tests.cli.test_commands import findings, lines, run, store
from tests.conftest import Apps
from tools import rabbitmq


def test_stats_doctor_and_migrate_ask_the_management_api() -> None:
    name = os.environ.get("RABBITMQ_DISTRIBUTION", "system")
    if os.environ.get("AMQP_URL"):
        pytest.skip("the broker of AMQP_URL is not ours to control")
    made = rabbitmq.Node(rabbitmq.distribution(name), plugins=["rabbitmq_management"])
    with made as node:
        parts = urlsplit(node.url())
        url = node.management_url.replace("http://", f"http://{parts.username}:{parts.password}@")
        apps = Apps(node.url())
        app = apps()
        old = apps(result_backend_transport_options={"layout": "per-task"})
        try:
            task_id, kept = store(old, 5), store(app, 1)
            store(old, None, states.STARTED)
            pattern = f"^{apps.prefix}\\."
            node.ctl("set_policy", "trap", pattern, '{"max-length": 1000}', "--apply-to", "queues")

            result = run(app, "doctor", "--json", "--management", url)
            assert result.exit_code == Exit.FAILED, result.output
            found = findings(result)
            assert found["policy"] == "error"
            assert found["leftovers"] == "warning"

            (counted,) = lines(run(app, "stats", "--json", "--management", url))
            assert counted["management"]["url"] == node.management_url
            assert counted["management"]["bindings"] >= 1

            result = run(app, "migrate", "--yes", "--json", "--management", url)
            outcomes = {line["id"]: line["outcome"] for line in lines(result)}
            assert outcomes.pop(task_id) == "moved"
            assert list(outcomes.values()) == ["not ended"]
            assert run(app, "get", task_id, kept).exit_code == Exit.OK

            result = run(
                app, "stats", "--management", node.management_url.replace("127", "x127", 1)
            )
            assert result.exit_code == Exit.UNAVAILABLE
            assert run(app, "stats", "--management", "nothing").exit_code == Exit.UNAVAILABLE
        finally:
            apps.close()
