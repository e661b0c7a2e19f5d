"""``celery results ...`` against a live broker, in this process."""

from __future__ import annotations

import json
import threading
import uuid
from types import SimpleNamespace
from typing import Any, Dict, List, Optional

import amqp.exceptions as amqp_errors
import click
import pytest
from celery import Celery, states
from celery.bin.base import CLIContext
from celery.result import AsyncResult, GroupResult
from click.testing import CliRunner, Result

from celery_amqp_results.cli import common, inspection, results
from celery_amqp_results.cli.common import Exit
from tests.broker.helpers import held
from tests.conftest import Apps, eventually, raw_connection
from tools import rabbitmq


def run(app: Celery, *arguments: str, stdin: Optional[str] = None) -> Result:
    """Run ``celery results ...`` as Celery does, and check that no traceback is shown."""
    context = CLIContext(app=app, no_color=False, workdir=None)
    result = CliRunner().invoke(results, list(arguments), obj=context, input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback (most recent call last)" not in result.stderr
    return result


def lines(result: Result) -> List[Dict[str, Any]]:
    """Return the JSON lines that were printed."""
    return [json.loads(line) for line in result.stdout.splitlines()]


def new_id() -> str:
    return str(uuid.uuid4())


def store(app: Celery, value: Any = 1, state: str = states.SUCCESS, **kwargs: Any) -> str:
    task_id = new_id()
    app.backend.store_result(task_id, value, state, **kwargs)
    return task_id


# -- get, forget ---------------------------------------------------------------------------------


def test_get_shows_a_result_and_a_failure_with_its_traceback(app: Celery) -> None:
    good = store(app, {"sum": 3})
    bad = store(app, KeyError("no such"), states.FAILURE, traceback="line 1\nline 2")
    unknown = new_id()

    result = run(app, "get", good)
    assert result.exit_code == Exit.OK
    assert good in result.stdout
    assert "{'sum': 3}" in result.stdout
    # Piped output has no colour and no frame
    assert "\x1b" not in result.stdout
    assert "╭" not in result.stdout

    result = run(app, "get", bad)
    assert result.exit_code == Exit.FAILED
    assert "KeyError('no such')" in result.stdout
    assert "line 2" in result.stdout

    result = run(app, "get", unknown)
    assert result.exit_code == Exit.NOT_READY
    assert "nothing is known" in result.stdout

    result = run(app, "get", "--json", good, bad, unknown)
    assert result.exit_code == Exit.FAILED
    first, second, third = lines(result)
    assert (first["id"], first["state"], first["ready"]) == (good, "SUCCESS", True)
    assert first["result"] == {"sum": 3}
    assert second["error"]["type"] == "KeyError"
    assert second["result"] is None
    assert (third["state"], third["ready"]) == ("PENDING", False)
    assert first.keys() == second.keys() == third.keys()


def test_get_waits_for_a_result_up_to_its_timeout(make_app: Apps) -> None:
    worker, app = make_app(), make_app()
    task_id = store(worker, {"current": 1, "total": 2}, "PROGRESS")
    result = run(app, "get", "--wait", "--timeout", "3", "--json", task_id)
    assert result.exit_code == Exit.NOT_READY
    assert lines(result)[0]["state"] == "PROGRESS"

    timer = threading.Timer(0.2, worker.backend.store_result, (task_id, 7, states.SUCCESS))
    timer.start()
    result = run(app, "get", "--wait", "--timeout", "60", "--json", task_id)
    timer.join()
    assert result.exit_code == Exit.OK
    assert lines(result)[0]["result"] == 7


def test_the_timeout_of_get_limits_the_read_of_a_large_result(
    make_app: Apps, amqp_url: str
) -> None:
    app = make_app("amqp://?inline_limit=1024&lookup_timeout=60")
    task_id = store(app, "x" * 5000)
    state = app.backend.layout.poll((task_id,))[task_id]
    assert state is not None
    with held(amqp_url, str(state.body_queue)):
        result = run(app, "get", "--wait", "--timeout", "1", "--json", task_id)
    assert result.exit_code == Exit.NOT_READY


def test_get_shows_the_progress_of_a_task_while_it_waits(make_app: Apps) -> None:
    # Given an unfinished task, and a finished one that is requested after it
    worker, app = make_app(), make_app()
    first, second = new_id(), store(worker, "second")
    store_progress = worker.backend.store_result
    store_progress(first, {"current": 1, "total": 3}, "PROGRESS")
    script = [({"current": 2, "total": 3}, "PROGRESS"), ("first", states.SUCCESS)]
    # When the command waits while the task reports progress
    timers = [
        threading.Timer(0.5 * (n + 1), store_progress, (first, value, state))
        for n, (value, state) in enumerate(script)
    ]
    for timer in timers:
        timer.start()
    result = run(app, "get", "--wait", "--timeout", "60", first, second)
    for timer in timers:
        timer.join()
    # Then its states are shown apart from the output, which has the requested order
    assert result.exit_code == Exit.OK
    progress = [line for line in result.stderr.splitlines() if "PROGRESS" in line]
    assert any("1 of 3" in line for line in progress) or any("2 of 3" in line for line in progress)
    assert all(first in line for line in progress)
    assert "PROGRESS" not in result.stdout
    assert result.stdout.index("'first'") < result.stdout.index("'second'")
    # And JSON output is the same as without waiting
    result = run(app, "get", "--wait", "--json", first, second)
    assert (len(lines(result)), result.stderr) == (2, "")


def test_get_prints_finished_tasks_before_the_others_finish(make_app: Apps) -> None:
    worker, app = make_app(), make_app()
    done, waits, late = store(worker, "done"), new_id(), store(worker, "late")
    result = run(app, "get", "--wait", "--timeout", "0.5", "--json", done, waits, late)
    assert result.exit_code == Exit.NOT_READY
    assert [(line["id"], line["state"]) for line in lines(result)] == [
        (done, "SUCCESS"),
        (waits, "PENDING"),
        (late, "SUCCESS"),
    ]


def test_a_task_s_value_cannot_send_control_sequences_to_the_terminal(app: Celery) -> None:
    task_id = store(app, KeyError("\x1b[2J"), states.FAILURE, traceback="\x1b]0;title\x07")
    result = run(app, "get", task_id)
    assert "\x1b" not in result.stdout


def test_get_decodes_only_accepted_content(make_app: Apps) -> None:
    worker = make_app(
        result_serializer="pickle", accept_content=["pickle"], result_accept_content=["pickle"]
    )
    task_id = store(worker, {1, 2})
    good = store(make_app(), 5)
    result = run(make_app(), "get", "--json", task_id, good)
    assert result.exit_code == Exit.FAILED
    first, second = lines(result)
    assert "ContentDisallowed" in first["unreadable"]
    assert second["result"] == 5


def test_forget_deletes_results_and_groups(app: Celery) -> None:
    ids = [store(app, n) for n in range(3)]
    group = GroupResult(new_id(), [AsyncResult(i, app=app) for i in ids[1:]], app=app)
    group.save()

    result = run(app, "forget", ids[0], "--json")
    assert (result.exit_code, lines(result)) == (
        Exit.OK,
        [{"forgotten": ids[:1], "group": None}],
    )
    assert run(app, "get", ids[0]).exit_code == Exit.NOT_READY
    assert run(app, "get", ids[1]).exit_code == Exit.OK

    assert run(app, "forget", "--group", group.id).exit_code == Exit.OK
    assert run(app, "get", *ids).exit_code == Exit.NOT_READY
    result = run(app, "forget", "--group", group.id)
    assert result.exit_code == Exit.NOT_READY
    assert "GroupResult.save" in result.stderr


@pytest.mark.usefixtures("new_pools")
def test_forget_gives_tasks_the_fate_forgotten(make_app: Apps) -> None:
    app = make_app(result_backend_transport_options={"shards": 1, "track_sent": True})
    ids = [app.send_task("task").id for _ in range(2)]
    for task_id in ids:
        app.backend.store_result(task_id, 1, states.SUCCESS)
    assert run(app, "forget", *ids).exit_code == Exit.OK
    eventually(lambda: {app.backend.fate(each).status for each in ids} == {"forgotten"})


# -- watch ---------------------------------------------------------------------------------------


def test_watch_ends_when_the_given_tasks_have_finished(make_app: Apps) -> None:
    worker, app = make_app(), make_app()
    done = store(worker, 1)
    failing = store(worker, {"current": 1, "total": 4}, "PROGRESS")
    timer = threading.Timer(
        0.2, worker.backend.store_result, (failing, ValueError("bad"), states.FAILURE)
    )
    timer.start()
    result = run(app, "watch", "--json", done, failing, "--timeout", "60")
    timer.join()
    assert result.exit_code == Exit.FAILED
    seen = [(line["id"], line["state"]) for line in lines(result)]
    ended = {(done, "SUCCESS"), (failing, "FAILURE")}
    # On a slow machine the failure may be stored before the first look-up.
    assert ended <= set(seen) <= ended | {(failing, "PROGRESS")}
    result = run(app, "watch", done)
    assert result.exit_code == Exit.OK
    assert "1 ended, 0 failed" in result.stdout


def test_watch_of_a_group_and_of_an_unfinished_task(app: Celery) -> None:
    ids = [store(app, n) for n in range(2)]
    group = GroupResult(new_id(), [AsyncResult(i, app=app) for i in ids], app=app)
    group.save()
    result = run(app, "watch", "--json", "--group", group.id)
    assert result.exit_code == Exit.OK
    assert {line["id"] for line in lines(result)} == set(ids)
    result = run(app, "watch", store(app, None, states.STARTED), "--timeout", "0.1")
    assert result.exit_code == Exit.NOT_READY


def test_watch_of_everything_shows_published_states_without_reading_shards(make_app: Apps) -> None:
    worker, app = make_app(), make_app()
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(0.05):
            store(worker, 1)
            store(worker, ValueError("bad"), states.FAILURE)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        # A busy machine may take long to start listening.
        for seconds in (2, 10, 60):
            result = run(app, "watch", "--json", "--state", "failure", "--timeout", str(seconds))
            if result.stdout:
                break
    finally:
        stop.set()
        thread.join()
    assert result.exit_code == Exit.OK
    assert {line["state"] for line in lines(result)} == {"FAILURE"}


# -- stats, purge --------------------------------------------------------------------------------


def test_stats_count_stored_results(app: Celery) -> None:
    for n in range(20):
        store(app, n)
    store(app, None, states.STARTED)
    store(app, "x" * 200_000)
    result = run(app, "stats", "--json", "--read", "all", "--no-management", "--rate", "0.1")
    assert result.exit_code == Exit.OK
    (found,) = lines(result)
    assert (found["results"], found["running"], found["large"]) == (21, 1, 1)
    assert found["messages"] == 22
    assert found["exact"] is True
    assert found["shards"] == 8
    assert found["oldest_seconds"] >= 0
    assert found["published_per_second"] == 0
    assert run(app, "get", store(app, 1)).exit_code == Exit.OK
    result = run(app, "stats", "--read", "0", "--no-management")
    assert "not read" in result.stdout
    assert run(app, "stats", "--read", "some").exit_code == Exit.USAGE


def test_stats_of_few_results_are_exact_in_however_many_shards(make_app: Apps) -> None:
    app = make_app(shards=256)
    for n in range(400):
        store(app, n)
    (found,) = lines(run(app, "stats", "--json", "--no-management"))
    assert (found["results"], found["exact"]) == (400, True)


def test_stats_estimate_by_the_number_of_shards(make_app: Apps) -> None:
    # Given shards of which some are packed: one message of these holds many results
    app = make_app(shards=16)
    ids = [store(app, n) for n in range(1600)]
    topology = app.backend.config.topology
    packed = [task_id for task_id in ids if topology.shard(task_id) % 2]
    for task_id in packed[:64]:
        app.backend.layout.store.read((task_id,))
    # When half of them are looked into
    (found,) = lines(run(app, "stats", "--json", "--read", "8", "--no-management"))
    # Then the estimate is that of shards: those that were read have about half of all
    assert found["exact"] is False
    assert 1300 < found["results"] < 1900


def test_stats_show_the_size_of_large_results(app: Celery) -> None:
    for _ in range(3):
        store(app, "x" * 200_000)
    (found,) = lines(run(app, "stats", "--json", "--no-management"))
    assert 600_000 < found["large_bytes"] < 620_000
    assert found["bytes"] < 10_000
    text = run(app, "stats", "--no-management").stdout
    assert "in shards, 58" in text
    assert "KiB in queues of large results" in text


def test_no_management_wins_over_the_environment(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RABBITMQ_MANAGEMENT_URL", "http://localhost:1")
    assert run(app, "stats", "--json").exit_code == Exit.UNAVAILABLE
    (found,) = lines(run(app, "stats", "--json", "--no-management"))
    assert found["management"] is None


def test_a_queue_whose_node_is_down_is_not_missing() -> None:
    broker = object.__new__(inspection.Broker)

    def answer(text: str) -> Any:
        def declare(queue: str, passive: bool) -> Any:
            raise amqp_errors.NotFound(text, (50, 10), 404)

        return SimpleNamespace(queue_declare=declare, is_open=True)

    broker._channel = answer("NOT_FOUND - no queue 'q' in vhost '/'")
    assert broker.count("q") is None
    broker._channel = answer("NOT_FOUND - home node 'rabbit@b' of durable queue 'q' is down")
    with pytest.raises(common.Failed, match=r"'q' is not available now.*is down") as raised:
        broker.count("q")
    assert raised.value.exit_code == Exit.UNAVAILABLE


def test_purge_asks_first_and_also_deletes_large_results(app: Celery) -> None:
    small, large = store(app, 1), store(app, "x" * 200_000)
    result = run(app, "purge", stdin="n\n")
    assert result.exit_code == Exit.FAILED
    assert run(app, "get", small, large).exit_code == Exit.OK
    result = run(app, "purge", "--yes", "--json")
    assert (result.exit_code, lines(result)) == (Exit.OK, [{"messages": 2, "large": 1}])
    assert run(app, "get", small).exit_code == Exit.NOT_READY


# -- doctor --------------------------------------------------------------------------------------


def findings(result: Result) -> Dict[str, str]:
    (found,) = lines(result)
    return {f["check"]: f["severity"] for f in found["findings"]}


def test_doctor_finds_nothing_wrong_on_a_healthy_broker(app: Celery) -> None:
    store(app, 1)
    result = run(app, "doctor", "--json", "--no-management")
    assert result.exit_code == Exit.OK, result.stdout
    found = findings(result)
    assert (found["broker"], found["declarations"], found["probe"]) == ("ok", "ok", "ok")
    assert found["expiry"] == "ok"
    # The probe cleans up after itself
    (counted,) = lines(run(app, "stats", "--json", "--read", "all", "--no-management"))
    assert counted["results"] == 1
    plain = run(app, "doctor", "--no-management", "--no-probe").stdout
    assert "0 errors" in plain
    assert "probe" not in plain


@pytest.mark.usefixtures("new_pools")
def test_get_and_doctor_know_which_tasks_were_sent(make_app: Apps) -> None:
    app = make_app(result_backend_transport_options={"shards": 1, "track_sent": True})
    waits, done, forgotten, unknown = (new_id() for _ in range(4))
    for task_id in (waits, done, forgotten):
        app.send_task("task", task_id=task_id)
    for task_id in (done, forgotten):
        app.backend.store_result(task_id, 1, states.SUCCESS)
    app.backend.forget(forgotten)

    def fates() -> Dict[str, Any]:
        return {line["id"]: line.get("fate") for line in lines(run(app, "get", "--json", *ids))}

    ids = [waits, done, forgotten, unknown]
    # Marks are published without waiting for confirms.
    wanted = {waits: "sent", done: None, forgotten: "forgotten", unknown: "unknown"}
    eventually(lambda: fates() == wanted)
    assert "has stored nothing so far" in run(app, "get", waits).stdout
    found = json.loads(run(app, "doctor", "--json", "--no-probe", "--no-management").stdout)
    (finding,) = (each for each in found["findings"] if each["check"] == "sent")
    assert finding["text"].startswith("sent, and nothing stored since: 1 task in 1 shard, ")
    assert json.loads(run(app, "stats", "--json", "--no-management").stdout)["running"] == 0


def test_doctor_finds_different_shards_a_different_queue_type_and_missing_expiry(
    make_app: Apps,
) -> None:
    store(make_app(), 1)
    result = run(make_app(shards=4), "doctor", "--json", "--no-management")
    assert result.exit_code == Exit.FAILED
    assert findings(result)["exchange"] == "error"
    quorum = make_app(result_backend_transport_options={"shards": 8, "queue_type": "quorum"})
    result = run(quorum, "doctor", "--json", "--no-management")
    assert result.exit_code == Exit.FAILED
    assert findings(result)["exchange"] == "error"
    assert "queue_type" in result.stdout
    result = run(make_app(result_expires=0), "doctor", "--json", "--no-management")
    assert result.exit_code == Exit.OK
    assert findings(result)["expiry"] == "warning"
    result = run(make_app(result_expires=0), "doctor", "--strict", "--no-management")
    assert result.exit_code == Exit.FAILED


def test_doctor_reports_missing_permissions(make_app: Apps, node: rabbitmq.Node) -> None:
    user = f"u{uuid.uuid4().hex[:8]}"
    node.ctl("add_user", user, "secret")
    node.ctl("set_permissions", user, "^$", "^$", "^$")
    try:
        app = make_app(node.url(user=user, password="secret"))
        store(make_app(), 1)
        result = run(app, "doctor", "--json", "--no-management")
        assert result.exit_code == Exit.FAILED
        assert "secret" not in result.output
        text = result.stdout + result.stderr
        assert "permission" in text or "ACCESS_REFUSED" in text
    finally:
        node.ctl("delete_user", user)


# -- migrate -------------------------------------------------------------------------------------


def test_migrate_collects_results_from_per_task_queues(make_app: Apps) -> None:
    old = make_app(result_backend_transport_options={"layout": "per-task"})
    app = make_app()
    moved, failed, deleted = store(old, 5), store(old, KeyError("k"), states.FAILURE), store(old)
    going = store(old, None, states.STARTED)

    result = run(app, "migrate", "--dry-run", "--json", moved, going, new_id(), "x" * 300, failed)
    assert [line["outcome"] for line in lines(result)] == [
        "would be moved",
        "not ended",
        "not there",
        "not there",
        "would be moved",
    ]
    # As for the command get
    assert result.exit_code == Exit.NOT_READY
    assert run(app, "get", moved).exit_code == Exit.NOT_READY

    result = run(app, "migrate", "--yes", moved, failed)
    assert result.exit_code == Exit.OK, result.output
    assert lines(run(app, "get", "--json", moved))[0]["result"] == 5
    assert lines(run(app, "get", "--json", failed))[0]["error"]["type"] == "KeyError"
    run(app, "migrate", "--yes", "--delete", deleted, going)
    with raw_connection(str(app.conf.broker_url)) as connection:
        for task_id in (moved, failed, deleted, going):
            with pytest.raises(Exception, match="NOT_FOUND"):
                connection.channel().queue_declare(task_id.replace("-", ""), passive=True)


# -- usage errors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["get"],
        ["get", ""],
        ["get", "--timeout", "1", "x"],
        ["forget"],
        ["watch", "--timeout", "-1"],
        ["get", "x", "--wait", "--timeout", "nan"],
        ["get", "x", "--wait", "--timeout", "inf"],
        ["watch", "--timeout", "nan"],
        ["chord", "--timeout", "nan"],
        ["chord", "--timeout", "inf"],
        ["stats", "--rate", "nan"],
        ["stats", "--rate", "inf"],
        ["nothing"],
    ],
)
def test_wrong_usage_shows_an_error_and_an_exit_code(app: Celery, arguments: List[str]) -> None:
    result = run(app, *arguments)
    assert result.exit_code == Exit.USAGE
    assert "Usage" in result.output


COMMANDS = [
    ["get", "x"],
    ["watch", "x"],
    ["watch"],
    ["forget", "x"],
    ["stats"],
    ["doctor"],
    ["purge", "--yes"],
    ["migrate", "--yes", "x"],
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_commands_refuse_another_result_backend(arguments: List[str]) -> None:
    app = Celery("other", backend="cache+memory://", set_as_current=False)
    result = run(app, *arguments)
    assert result.exit_code == Exit.CONFIGURATION
    assert "CacheBackend" in result.stderr
    assert "result_backend" in result.stderr


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_commands_report_that_the_broker_is_down(make_app: Apps, arguments: List[str]) -> None:
    # No process listens on that port.
    app = make_app("amqp://me:secret@127.0.0.1:1//")
    result = run(app, *arguments)
    assert result.exit_code == Exit.UNAVAILABLE, result.output
    assert "127.0.0.1:1" in result.stderr
    assert "secret" not in result.output


def test_commands_report_an_invalid_option_and_an_unsupported_layout(make_app: Apps) -> None:
    app = make_app("amqp://?shards=many")
    result = run(app, "stats")
    assert result.exit_code == Exit.CONFIGURATION
    assert "'many'" in result.stderr
    result = run(make_app("amqp://?layout=per-task", result_backend_transport_options={}), "stats")
    assert result.exit_code == Exit.CONFIGURATION
    assert "per-task" in result.stderr
    app.conf.result_backend = "amqp://"


def test_every_command_has_a_help_text_and_json_output() -> None:
    for name, command in results.commands.items():
        assert isinstance(command, click.Command)
        assert command.help, name
        assert any("--json" in option.opts for option in command.params), name
