"""The permissions that docs/operations.md lists are sufficient."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import uuid
from concurrent import futures
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
from celery.app.task import Context
from celery.result import AsyncResult, GroupResult

from celery_amqp_results import errors
from tests.broker.helpers import Waiting
from tests.conftest import PATIENCE, Apps, eventually
from tools import rabbitmq

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "operations.md"


def documented(prefix: str) -> Dict[str, str]:
    """Return the page's patterns, for another *prefix* than the page's."""
    patterns = dict(re.findall(r"^(configure|write|read) +(\S+)$", PAGE.read_text(), re.M))
    assert patterns.keys() == {"configure", "write", "read"}
    return {name: pattern.replace("celeryresults", prefix) for name, pattern in patterns.items()}


@contextlib.contextmanager
def user_with(node: rabbitmq.Node, patterns: Dict[str, str]) -> Iterator[str]:
    """Make a user with permissions for the duration of a ``with`` block; yield a URL."""
    user, password = f"u{uuid.uuid4().hex[:8]}", uuid.uuid4().hex
    node.ctl("add_user", user, password)
    try:
        allowed = (patterns[name] for name in ("configure", "write", "read"))
        node.ctl("set_permissions", "-p", "/", user, *allowed)
        yield node.url(user, password)
    finally:
        node.ctl("delete_user", user)


def documented_roles(prefix: str) -> Dict[str, List[str]]:
    """Return configure, write and read of each role on the page, for another *prefix*."""
    found = re.findall(
        r"^(worker|reader|sender) +(configure|write|read) +(\S+)$", PAGE.read_text(), re.M
    )
    roles: Dict[str, List[str]] = {}
    for role, _, pattern in found:
        roles.setdefault(role, []).append(pattern.replace("celeryresults", prefix))
    return roles


@pytest.fixture
def role_urls(make_app: Apps, node: rabbitmq.Node) -> Dict[str, str]:
    """Return URLs of users that have exactly the permissions of the roles on the page.

    The users disappear with the node.
    """

    def make_user(role: str, patterns: List[str]) -> str:
        user, password = f"{role}{uuid.uuid4().hex[:8]}", uuid.uuid4().hex
        node.ctl("add_user", user, password)
        node.ctl("set_permissions", "-p", "/", user, *patterns)
        return node.url(user, password)

    roles = documented_roles(make_app.prefix)
    assert {len(patterns) for patterns in roles.values()} == {3}
    # Each command takes seconds.
    with futures.ThreadPoolExecutor() as pool:
        return dict(zip(roles, pool.map(make_user, roles, roles.values())))


def test_each_role_can_do_its_work_with_its_documented_permissions(
    make_app: Apps, role_urls: Dict[str, str]
) -> None:
    worker, reader, sender = (make_app(role_urls[role]) for role in ("worker", "reader", "sender"))
    task_id = uuid.uuid4().hex
    # A worker stores intermediate and final states; a reader waits, polls, looks up and forgets
    waiting = Waiting(lambda: reader.AsyncResult(task_id).get(timeout=PATIENCE))
    worker.backend.store_result(task_id, {"n": 1}, "PROGRESS")
    worker.backend.store_result(task_id, 42, "SUCCESS")
    assert waiting.result() == 42
    many = [uuid.uuid4().hex for _ in range(300)]
    for each in many:
        worker.backend.store_result(each, each, "SUCCESS")
    found = reader.backend.layout.store.read(many)
    assert all(found.values())
    assert reader.backend.layout.store.packed
    reader.AsyncResult(many[0]).forget()
    assert reader.AsyncResult(many[0]).state == "PENDING"

    # A sender sends a chord, and a worker leads it
    body = sender.signature("tests.body")
    body.freeze()
    member = uuid.uuid4().hex
    group_id = uuid.uuid4().hex
    sender.backend.apply_chord((group_id, [AsyncResult(member, app=sender)]), body)
    sender.backend.set_chord_size(group_id, 1)
    worker.backend.layout.chords.service.start(met=True)
    request = Context(id=member, group=group_id, chord=dict(body), ignore_result=False)
    worker.backend.mark_as_done(member, 1, request)
    eventually(lambda: worker.backend.metrics().chords_fired == 1)

    # And a sender can do no more
    with pytest.raises(errors.BackendUnavailable, match=make_app.prefix):
        sender.AsyncResult(task_id).state  # noqa: B018 - asks the broker
    with pytest.raises(errors.BackendUnavailable, match=make_app.prefix):
        sender.backend.store_result(task_id, 43, "SUCCESS")
    for app in (worker, reader, sender):
        app.backend.close()


def test_a_user_with_the_documented_permissions_stores_waits_and_looks_up(
    make_app: Apps, node: rabbitmq.Node
) -> None:
    # Given a user for results who has no other permissions
    with user_with(node, documented(make_app.prefix)) as url:
        writer, reader = make_app(url), make_app(url)
        task_id, group_id = uuid.uuid4().hex, uuid.uuid4().hex

        # When one process stores, and another waits, looks up, keeps a group and forgets
        writer.backend.store_result(task_id, 42, "SUCCESS")
        assert reader.AsyncResult(task_id).state == "SUCCESS"
        assert reader.AsyncResult(task_id).get(timeout=PATIENCE) == 42
        result = GroupResult(group_id, [AsyncResult(task_id, app=writer)], app=writer)
        result.save(backend=writer.backend)
        restored = GroupResult.restore(group_id, backend=reader.backend, app=reader)

        # Then nothing was refused
        assert [member.id for member in restored] == [task_id]
        reader.backend.forget(task_id)
        assert reader.AsyncResult(task_id).state == "PENDING"
        for app in (writer, reader):
            app.backend.close()


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_a_user_without_configure_rights_uses_what_an_administrator_declared(
    make_app: Apps, node: rabbitmq.Node, queue_type: str
) -> None:
    # Given a user that may declare temporary queues, as documented, and nothing else
    pattern = re.search(r"need to configure only `(\S+)`", PAGE.read_text())
    assert pattern is not None
    configure = pattern.group(1).replace("celeryresults", make_app.prefix)
    options = {"shards": 2, "queue_type": queue_type}
    task_id = uuid.uuid4().hex
    with user_with(node, {**documented(make_app.prefix), "configure": configure}) as url:
        apart: Dict[str, Any] = {"result_backend_transport_options": {**options, "declare": False}}
        writer, reader = make_app(url, **apart), make_app(url, **apart)
        # While nothing is declared, reading finds nothing, and storing names what is missing
        assert reader.AsyncResult(task_id).state == "PENDING"
        with pytest.raises(errors.DeclarationRefused, match="definitions"):
            writer.backend.store_result(task_id, 42, "SUCCESS")

        # When an administrator imports the definitions, which normal processes would declare
        import_definitions(node, make_app.prefix, "--shards", "2", "--queue-type", queue_type)
        make_app(result_backend_transport_options=options).backend.store_result(
            uuid.uuid4().hex, 1, "SUCCESS"
        )
        # Then the user stores, looks up, waits and forgets
        writer.backend.store_result(task_id, 42, "SUCCESS")
        assert reader.AsyncResult(task_id).state == "SUCCESS"
        assert reader.AsyncResult(task_id).get(timeout=30) == 42
        reader.backend.forget(task_id)
        assert reader.AsyncResult(task_id).state == "PENDING"

        # And gets an error for a missing shard, even if an inbox receives the copy
        writer.backend.close()
        shard = f"{make_app.prefix}.shard.{writer.backend.config.topology.shard(task_id)}"
        node.ctl("delete_queue", shard)
        with pytest.raises(errors.DeclarationRefused, match=re.escape(shard)):
            writer.backend.store_result(task_id, 42, "SUCCESS")
        for app in (writer, reader):
            app.backend.close()


def import_definitions(node: rabbitmq.Node, prefix: str, *arguments: str) -> None:
    """Follow docs/operations.md as an administrator would."""
    module = "celery_amqp_results.definitions"
    path = node.log_path.with_name("results.json")
    path.write_bytes(
        subprocess.run(
            [sys.executable, "-m", module, "--result-exchange", prefix, *arguments],
            check=True,
            capture_output=True,
        ).stdout
    )
    node.ctl("import_definitions", node.distribution.inside(path))
