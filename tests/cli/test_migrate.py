"""``results migrate`` with results that a real Celery 4 has stored.

``CELERY4_PYTHON`` names a Python that has Celery 4.4. Without it the queues are filled with
messages that were recorded from Celery 4.
"""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any, Callable, Dict, Iterator, List

import amqp
import pytest
from amqp import exceptions as amqp_errors
from celery import states

from celery_amqp_results.cli.common import Exit
from celery_amqp_results.store.publisher import Publisher
from tests.cli.conftest import Administrator
from tests.cli.test_commands import lines, new_id, run
from tests.conftest import PATIENCE, PATIENT, Apps, raw_connection

CELERY4 = """
import json, sys, warnings
warnings.simplefilter("ignore")
from celery import Celery
job = json.load(sys.stdin)
app = Celery("celery4", broker=job["url"], backend="amqp://")
app.conf.update(job["conf"])
for task_id, state, result in job["states"]:
    value = KeyError("gone") if state == "FAILURE" else result
    traceback = "line 1" if state == "FAILURE" else None
    app.backend.store_result(task_id, value, state, traceback=traceback)
"""

Stored = List[List[Any]]


def by_celery_4(apps: Apps, stored: Stored) -> None:
    """Let a real Celery 4 store the results; skip the test if there is none."""
    python = os.environ.get("CELERY4_PYTHON")
    if not python:
        pytest.skip("CELERY4_PYTHON names no Python with Celery 4.4")
    conf = {"result_exchange": apps.prefix, **PATIENT}
    done = subprocess.run(
        [python, "-c", CELERY4],
        input=json.dumps({"url": apps.url, "conf": conf, "states": stored}),
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def as_recorded(apps: Apps, stored: Stored) -> None:
    """Publish the messages that were recorded from Celery 4.4.7."""
    with raw_connection(apps.url) as connection:
        channel = connection.channel()
        channel.confirm_select()
        channel.exchange_declare(apps.prefix, "direct", durable=True, auto_delete=False)
        for task_id, state, result in stored:
            name = task_id.replace("-", "")
            failed = state == states.FAILURE
            body = {
                "task_id": task_id,
                "status": state,
                "result": {
                    "exc_type": "KeyError",
                    "exc_message": ["gone"],
                    "exc_module": "builtins",
                }
                if failed
                else result,
                "traceback": "line 1" if failed else None,
                "children": None,
            }
            channel.queue_declare(
                name, durable=True, auto_delete=True, arguments={"x-expires": 86_400_000}
            )
            channel.queue_bind(name, apps.prefix, name)
            channel.basic_publish_confirm(
                amqp.Message(
                    json.dumps(body),
                    content_type="application/json",
                    content_encoding="utf-8",
                    delivery_mode=2,
                    priority=0,
                    correlation_id=task_id,
                    application_headers={},
                ),
                exchange=apps.prefix,
                routing_key=name,
            )


def queues(apps: Apps, ids: List[str]) -> List[str]:
    """Return those of *ids* that have a per-task queue."""
    found = []
    with raw_connection(apps.url) as connection:
        for task_id in ids:
            try:
                connection.channel().queue_declare(task_id.replace("-", ""), passive=True)
                found.append(task_id)
            except amqp_errors.NotFound:
                pass
    return found


@pytest.fixture
def ids(managed_apps: Apps) -> Iterator[List[str]]:
    """Ids of four tasks, whose queues are deleted after the test."""
    made = [new_id() for _ in range(4)]
    yield made
    with raw_connection(managed_apps.url) as connection:
        for task_id in made:
            connection.channel().queue_delete(task_id.replace("-", ""))


def test_a_moved_result_is_confirmed_although_the_app_confirms_none(
    managed_apps: Apps, ids: List[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    confirms: List[bool] = []
    publish = Publisher.publish

    def note(self: Publisher, messages: Any, confirm: bool = True) -> None:
        confirms.append(confirm)
        publish(self, messages, confirm)

    monkeypatch.setattr(Publisher, "publish", note)
    as_recorded(managed_apps, [[ids[0], "SUCCESS", 7]])
    app = managed_apps(result_backend_transport_options={"confirm": False})
    assert run(app, "migrate", ids[0], "--yes").exit_code == Exit.OK
    assert confirms == [True]
    assert app.AsyncResult(ids[0]).get(timeout=PATIENCE) == 7


@pytest.mark.parametrize("write", [as_recorded, by_celery_4])
def test_results_of_celery_4_are_moved_and_read_afterwards(
    managed_apps: Apps,
    admin: Administrator,
    ids: List[str],
    write: Callable[[Apps, Stored], None],
) -> None:
    good, failed, going, other = ids
    stored: Stored = [
        [good, "STARTED", None],
        [good, "SUCCESS", {"sum": [1, None]}],
        [failed, "FAILURE", None],
        [going, "STARTED", None],
        [other, "SUCCESS", 7],
    ]
    write(managed_apps, stored)
    app = managed_apps()
    management = ("--json", "--management", admin.url)

    def migrate(*arguments: str) -> Dict[str, str]:
        result = run(app, "migrate", *arguments, *management)
        assert result.exit_code == Exit.OK, result.output
        return {line["id"]: line["outcome"] for line in lines(result)}

    # A dry run shows what would be done, and changes nothing
    would = dict.fromkeys((good, failed, other), "would be moved")
    assert migrate("--dry-run") == {**would, going: "not ended"}
    assert queues(managed_apps, ids) == ids

    # All finished results are moved, and can be read repeatedly with the shared layout
    moved = dict.fromkeys((good, failed, other), "moved")
    assert migrate("--yes") == {**moved, going: "not ended"}
    assert queues(managed_apps, ids) == [going]
    reader = managed_apps()
    for _ in range(2):
        assert reader.AsyncResult(good).get(timeout=PATIENCE) == {"sum": [1, None]}
        assert reader.AsyncResult(other).state == states.SUCCESS
    with pytest.raises(KeyError, match="gone"):
        reader.AsyncResult(failed).get(timeout=PATIENCE)
    assert reader.AsyncResult(failed).traceback == "line 1"

    # Unfinished tasks are removed only with --delete
    assert migrate("--yes", "--delete") == {going: "deleted"}
    assert queues(managed_apps, ids) == []
    assert reader.AsyncResult(going).state == states.PENDING
