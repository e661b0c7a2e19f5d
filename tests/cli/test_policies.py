"""``results doctor`` finds the policies that drop chords and messages of inboxes."""

from __future__ import annotations

import contextlib
from typing import Any, Dict, Iterator, Optional

import pytest
from celery import Celery

from tests.broker.helpers import open_inbox
from tests.cli.conftest import Administrator
from tests.cli.test_commands import store
from tests.cli.test_doctor import DAY, Report, managed
from tests.conftest import Apps, eventually, raw_connection


@contextlib.contextmanager
def plan_queue(apps: Apps) -> Iterator[None]:
    """Declare a queue for the plans of chords, if it is not there, for a ``with`` block."""
    name = f"{apps.prefix}.chords.0"
    with raw_connection(apps.url) as connection:
        channel = connection.channel()
        channel.queue_declare(name, durable=True, auto_delete=False)
        try:
            yield
        finally:
            channel.queue_delete(name)


def told(app: Celery, admin: Administrator, severity: str, words: str) -> Report:
    """Return what the doctor finds once the management API knows of the policy."""

    def found() -> Optional[Report]:
        report = managed(app, admin, "--no-probe")
        return report if words in report.said("policy", severity) else None

    return eventually(found)


@pytest.mark.parametrize("there", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("definition", "severity", "words"),
    [
        ({"message-ttl": 1000}, "warning", "drops chords before they expire"),
        ({"max-length": 10}, "error", "drops or refuses chords"),
        ({"expires": 10**6}, "error", "deletes a queue"),
    ],
    ids=str,
)
def test_a_policy_that_drops_chords(
    managed_apps: Apps,
    admin: Administrator,
    definition: Dict[str, Any],
    severity: str,
    words: str,
    there: bool,
) -> None:
    app = managed_apps(shards=1)
    with contextlib.ExitStack() as stack:
        if there:
            stack.enter_context(plan_queue(managed_apps))
        stack.enter_context(admin.policy(f"^{managed_apps.prefix}\\.chords\\.", definition))
        text = told(app, admin, severity, words).said("policy", severity)
    assert f"'{managed_apps.prefix}.chords.0'" in text
    assert f"names that begin with '{managed_apps.prefix}.'" in text


def test_the_expiry_of_chords_is_their_own(managed_apps: Apps, admin: Administrator) -> None:
    app = managed_apps(shards=1, result_expires=DAY / 1000, result_chord_expires=7 * DAY / 1000)
    with admin.policy(f"^{managed_apps.prefix}\\.", {"message-ttl": 2 * DAY}):
        text = told(app, admin, "warning", "chords").said("policy", "warning")
    # Results are kept for a day: no policy of two days drops any.
    assert "results" not in text.replace(managed_apps.prefix, "")


@pytest.mark.parametrize("there", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "definition", [{"max-length": 100}, {"max-length-bytes": 1000}, {"message-ttl": 10}], ids=str
)
def test_a_policy_that_drops_what_is_pushed_to_inboxes(
    managed_apps: Apps, admin: Administrator, definition: Dict[str, Any], there: bool
) -> None:
    app = managed_apps(shards=1)
    store(app)
    if there:
        open_inbox(app)
    with admin.policy("^amq\\.gen-", definition):
        text = told(app, admin, "warning", "inboxes").said("policy", "warning")
    assert "drops states in inboxes that a busy process has not taken yet" in text
    assert "names that begin with 'amq.gen-'" in text
    assert ("amq.gen-doctor" in text) == (not there)


def test_a_policy_that_changes_nothing_for_inboxes(
    managed_apps: Apps, admin: Administrator
) -> None:
    app = managed_apps(shards=1)
    store(app)
    with admin.policy("^amq\\.gen-", {"max-length": 2_000_000, "message-ttl": DAY}):
        assert managed(app, admin, "--no-probe")["policy"]["severity"] == "ok"
        open_inbox(app)
        assert managed(app, admin, "--no-probe")["policy"]["severity"] == "ok"
