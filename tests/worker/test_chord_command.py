"""``results chord`` shows how far a chord is, as its leader knows it."""

from __future__ import annotations

import uuid
from typing import Any, Callable, Dict

import pytest
from celery import Celery, chord

from celery_amqp_results.cli.common import Exit
from tests.cli.test_commands import lines, run
from tests.conftest import Apps, eventually
from tests.worker.chord_tasks import register

TIMEOUT = 60


def ask(app: Celery, key: str) -> Dict[str, Any]:
    """Return what ``results chord --json`` prints, or nothing where no worker leads the chord."""
    result = run(app, "chord", "--json", "--timeout", "3", key)
    found = lines(result)
    return found[0] if found else {}


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_the_command_names_the_tasks_that_have_not_ended(
    make_app: Apps, start_worker: Callable[..., Any], pool: str
) -> None:
    # Given a chord of which one task is in a queue that no worker consumes
    app = make_app()
    start_worker(app, module="tests.worker.chord_tasks", pool=pool)
    tasks = register(app)
    later = f"later-{uuid.uuid4().hex[:8]}"
    late = tasks.add.s(5, 5).set(queue=later, task_id=str(uuid.uuid4()))
    body = chord([tasks.add.s(n, n) for n in range(4)] + [late])(tasks.total.s())
    header = body.parent
    try:
        # When the leader is asked, by the id of the header or of the body
        eventually(lambda: ask(app, header.id).get("ended") == 4)
        for key in (header.id, body.id):
            found = ask(app, key)
            # Then it names the task that is missing, and its state
            assert (found["tasks"], found["ended"]) == (5, 4)
            assert found["missing"] == {late.options["task_id"]: "PENDING"}
            assert "@" in found["leader"]
        # And without an id the leaders are shown, with their open chords
        (shown,) = lines(run(app, "chord", "--json"))
        assert shown["workers"] == 1
        (leader,) = shown["leaders"].values()
        assert (leader["queues"] >= 1, leader["open"]) == (True, 1)
        assert leader["oldest_seconds"] > 0
        assert found["leader"] in run(app, "chord").stdout
        text = run(app, "chord", header.id).stdout
        assert "4 of 5 tasks" in text
        assert late.options["task_id"] in text
    finally:
        app.control.add_consumer(later, reply=True, timeout=TIMEOUT, limit=1)
    # And when the chord has fired, no worker leads it any more
    assert body.get(timeout=TIMEOUT) == 22
    result = eventually(lambda: r if (r := run(app, "chord", header.id)).stderr else None)
    assert result.exit_code == Exit.NOT_READY
    assert "it has fired" in result.stderr


@pytest.mark.usefixtures("new_pools")
def test_without_a_worker_the_command_says_so(make_app: Apps) -> None:
    app = make_app()
    for arguments in ((str(uuid.uuid4()),), ()):
        result = run(app, "chord", "--timeout", "1", *arguments)
        assert result.exit_code == Exit.NOT_READY, result.stderr
        assert "no worker has answered" in result.stderr
