"""The permissions that docs/command-line.md lists are sufficient, and each is necessary."""

from __future__ import annotations

import contextlib
import re
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence

import pytest
from amqp import exceptions as amqp_errors
from celery import states
from celery.result import AsyncResult, GroupResult

from celery_amqp_results.cli.common import Exit
from tests.cli.conftest import Administrator
from tests.cli.test_commands import findings, lines, new_id, run, store
from tests.conftest import Apps, raw_connection

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "command-line.md"
KINDS = ("configure", "write", "read")

#: Larger than ``inline_limit``, so it has a queue of its own.
LARGE = "x" * 200_000

Patterns = Dict[str, List[str]]


def documented(prefix: str) -> Dict[str, Patterns]:
    """Return the page's configure, write and read patterns by command, for another *prefix*.

    Each is a list of alternatives.
    """
    rows = re.findall(r"^([a-z].*?)  +(configure|write|read) +(\S+)$", PAGE.read_text(), re.M)
    found: Dict[str, Patterns] = {}
    for command, kind, pattern in rows:
        inner = re.fullmatch(r"\^(?:\((.*)\)|(.*))\$", pattern)
        assert inner is not None, pattern
        text = (inner.group(1) or inner.group(2)).replace("celeryresults", prefix)
        found.setdefault(command, {})[kind] = text.split("|") if text else []
    assert all(patterns.keys() == set(KINDS) for patterns in found.values())
    return found


def joined(patterns: Patterns) -> Dict[str, str]:
    """Return the patterns as RabbitMQ expects them."""
    return {kind: f"^({'|'.join(each)})$" if each else "^$" for kind, each in patterns.items()}


class Scenarios:
    """One scenario for each use of a command, with the broker state that it needs.

    Parameters:
        apps: makes the apps.
        user: the user that runs the commands.
        spans: seconds to watch everything for, in turn, until a state was seen.
    """

    def __init__(self, apps: Apps, user: str, spans: Sequence[float]) -> None:
        self.apps = apps
        self.spans = spans
        # With one shard, a missing permission always causes a refusal.
        self.theirs = apps(shards=1)
        host = apps.url.rpartition("@")[2]
        self.app = apps(f"amqp://{user}:{user}@{host}", shards=1)
        self.app.conf.broker_url = f"amqp://{user}:{user}@{host}"

    def has_queue(self, name: str) -> bool:
        with raw_connection(self.apps.url) as connection:
            try:
                connection.channel().queue_declare(name, passive=True)
            except amqp_errors.NotFound:
                return False
            return True

    def has_exchange(self) -> bool:
        with raw_connection(self.apps.url) as connection:
            try:
                connection.channel().exchange_declare(
                    f"{self.apps.prefix}.states", "topic", passive=True
                )
            except amqp_errors.NotFound:
                return False
            return True

    def large_queue(self, task_id: str) -> str:
        (state,) = self.theirs.backend.layout.store.read((task_id,))[task_id]
        assert state.body_queue is not None
        return str(state.body_queue)

    def start_afresh(self) -> None:
        """Delete everything on the broker, as before the first task."""
        with raw_connection(self.apps.url) as connection:
            channel = connection.channel()
            channel.queue_delete(f"{self.apps.prefix}.shard.0")
            channel.exchange_delete(f"{self.apps.prefix}.states")

    # Each returns whether the command did its job.

    def get(self) -> bool:
        small, large = store(self.theirs, 1), store(self.theirs, LARGE)
        result = run(self.app, "get", "--json", small, large)
        return result.exit_code == Exit.OK and [x["result"] for x in lines(result)] == [1, LARGE]

    def get_wait(self) -> bool:
        arguments = ("get", "--wait", "--timeout", "60", "--json")
        return self.waits(arguments) and self.waits(arguments, before=True)

    def watch_ids(self) -> bool:
        arguments = ("watch", "--timeout", "60", "--json")
        return self.waits(arguments) and self.waits(arguments, before=True)

    def waits(self, arguments: Sequence[str], before: bool = False) -> bool:
        """Return whether a command sees a task finish during its wait, or *before* it."""
        self.start_afresh()
        task_id = new_id()

        def work() -> None:
            self.theirs.backend.store_result(task_id, LARGE, states.SUCCESS)

        if before:
            work()
            result = run(self.app, *arguments, task_id)
        else:
            with self.meanwhile(work):
                result = run(self.app, *arguments, task_id)
        return result.exit_code == Exit.OK and lines(result)[-1]["result"] == LARGE

    @contextlib.contextmanager
    def meanwhile(self, work: Callable[[], Any], every: float = 0.0) -> Iterator[None]:
        """Call *work* during a ``with`` block, once the command has declared the exchange.

        Parameters:
            work: called on another thread.
            every: seconds between two calls; 0 for one call.
        """
        over = threading.Event()

        def run() -> None:
            while not self.has_exchange() and not over.wait(0.02):
                pass
            while not over.is_set():
                work()
                if not every or over.wait(every):
                    break

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def watch(self) -> bool:
        for seconds in self.spans:
            self.start_afresh()
            with self.meanwhile(lambda: store(self.theirs, LARGE), 0.1):
                result = run(self.app, "watch", "--timeout", str(seconds), "--json")
            if result.exit_code != Exit.OK:
                return False
            if result.stdout:
                return bool(lines(result)[-1]["result"] == LARGE)
        return False

    def forget(self) -> bool:
        ids = [store(self.theirs, 1), store(self.theirs, LARGE)]
        large = self.large_queue(ids[1])
        group = GroupResult(
            new_id(), [AsyncResult(i, app=self.theirs) for i in ids], app=self.theirs
        )
        group.save()
        result = run(self.app, "forget", "--group", group.id)
        if result.exit_code != Exit.OK:
            return False
        # The mark of track_sent needs no other permission.
        options = {"shards": 1, "track_sent": True}
        tracking = self.apps(self.app.conf.result_backend, result_backend_transport_options=options)
        tracking.conf.broker_url = self.app.conf.broker_url
        if run(tracking, "forget", store(self.theirs, 1)).exit_code != Exit.OK:
            return False
        return run(self.theirs, "get", *ids).exit_code == Exit.NOT_READY and not self.has_queue(
            large
        )

    def stats(self) -> bool:
        store(self.theirs, 1)
        result = run(self.app, "stats", "--json", "--no-management", "--read", "all")
        return result.exit_code == Exit.OK and lines(result)[0]["results"] > 0

    def stats_rate(self) -> bool:
        arguments = ("stats", "--json", "--no-management", "--rate", "0.1")
        self.start_afresh()
        if run(self.app, *arguments).exit_code != Exit.OK:
            return False
        store(self.theirs, 1)
        result = run(self.app, *arguments)
        return result.exit_code == Exit.OK and lines(result)[0]["results"] == 1

    def doctor(self) -> bool:
        self.start_afresh()
        if run(self.app, "doctor", "--no-management").exit_code != Exit.OK:
            return False
        store(self.theirs, 1)
        result = run(self.app, "doctor", "--json", "--no-management")
        return result.exit_code == Exit.OK and "warning" not in findings(result).values()

    def doctor_no_probe(self) -> bool:
        store(self.theirs, 1)
        result = run(self.app, "doctor", "--json", "--no-management", "--no-probe")
        return result.exit_code == Exit.OK and "warning" not in findings(result).values()

    def purge(self) -> bool:
        ids = [store(self.theirs, 1), store(self.theirs, LARGE)]
        large = self.large_queue(ids[1])
        result = run(self.app, "purge", "--yes")
        if result.exit_code != Exit.OK:
            return False
        return run(self.theirs, "get", *ids).exit_code == Exit.NOT_READY and not self.has_queue(
            large
        )

    def old(self, value: Any) -> str:
        """Store a result as Celery 4 did."""
        layout = {"layout": "per-task"}
        return store(self.apps(result_backend_transport_options=layout), value)

    def migrate(self) -> bool:
        self.start_afresh()
        ids = [self.old(1), self.old(LARGE)]
        result = run(self.app, "migrate", "--yes", "--json", *ids)
        if result.exit_code != Exit.OK:
            return False
        if {line["outcome"] for line in lines(result)} != {"moved"}:
            return False
        return run(self.theirs, "get", *ids).exit_code == Exit.OK and not any(
            self.has_queue(task_id.replace("-", "")) for task_id in ids
        )

    def migrate_delete(self) -> bool:
        task_id = self.old(1)
        result = run(self.app, "migrate", "--yes", "--delete", "--json", task_id)
        return result.exit_code == Exit.OK and not self.has_queue(task_id.replace("-", ""))

    def migrate_dry_run(self) -> bool:
        task_id = self.old(1)
        result = run(self.app, "migrate", "--dry-run", "--json", task_id)
        return result.exit_code == Exit.OK and lines(result)[0]["outcome"] == "would be moved"


#: By the name of the command on the page, the scenario that uses it.
COMMANDS: Dict[str, Callable[[Scenarios], bool]] = {
    "get": Scenarios.get,
    "get --wait": Scenarios.get_wait,
    "watch ID": Scenarios.watch_ids,
    "watch": Scenarios.watch,
    "forget": Scenarios.forget,
    "stats": Scenarios.stats,
    "stats --rate": Scenarios.stats_rate,
    "doctor": Scenarios.doctor,
    "doctor --no-probe": Scenarios.doctor_no_probe,
    "purge": Scenarios.purge,
    "migrate": Scenarios.migrate,
    "migrate --delete": Scenarios.migrate_delete,
    "migrate --dry-run": Scenarios.migrate_dry_run,
}


def test_the_page_names_the_permissions_of_each_command() -> None:
    assert documented("p").keys() == COMMANDS.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_needs_exactly_its_documented_permissions(
    command: str, admin: Administrator, managed_apps: Apps
) -> None:
    patterns = documented(managed_apps.prefix)[command]
    with admin.user() as user:

        def works(allowed: Patterns, spans: Sequence[float] = (1,)) -> bool:
            admin.permit(user, joined(allowed))
            world = Scenarios(managed_apps, user, spans)
            try:
                return COMMANDS[command](world)
            finally:
                # The broker caches permissions for each channel.
                world.theirs.backend.close()
                world.app.backend.close()

        assert works(patterns, spans=(1, 10, 60))
        for kind in KINDS:
            for alternative in patterns[kind]:
                less = [each for each in patterns[kind] if each != alternative]
                assert not works({**patterns, kind: less}), f"{kind} {alternative} is not needed"
