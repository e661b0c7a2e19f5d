"""The permissions that docs/operations.md asks for are enough."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Dict, Iterator

import pytest
from celery.result import AsyncResult, GroupResult

from celery_amqp_results import errors
from tests.conftest import PATIENCE, Apps
from tools import rabbitmq

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "operations.md"


def documented(prefix: str) -> Dict[str, str]:
    """Return the patterns on the page, for another *prefix* than the one there."""
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
def test_a_user_who_may_not_declare_shares_what_an_administrator_has_declared(
    make_app: Apps, node: rabbitmq.Node, queue_type: str
) -> None:
    # Given a user who may declare what comes and goes, as documented, and nothing else
    pattern = re.search(r"`configure` may then be `(\S+)`", PAGE.read_text())
    assert pattern is not None
    configure = pattern.group(1).replace("celeryresults", make_app.prefix)
    options = {"shards": 2, "queue_type": queue_type}
    task_id = uuid.uuid4().hex
    with user_with(node, {**documented(make_app.prefix), "configure": configure}) as url:
        apart = {"result_backend_transport_options": {**options, "declare": False}}
        writer, reader = make_app(url, **apart), make_app(url, **apart)
        # Where nothing is declared, reading finds nothing, and storing says what is missing
        assert reader.AsyncResult(task_id).state == "PENDING"
        with pytest.raises(errors.DeclarationRefused, match="definitions"):
            writer.backend.store_result(task_id, 42, "SUCCESS")

        # When an administrator imports the definitions, which are what others would declare
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

        # And hears of a shard that is missing, although an inbox takes what is published to it
        writer.backend.close()
        shard = f"{make_app.prefix}.shard.{writer.backend._topology.shard(task_id)}"
        node.ctl("delete_queue", shard)
        with pytest.raises(errors.DeclarationRefused, match=re.escape(shard)):
            writer.backend.store_result(task_id, 42, "SUCCESS")
        for app in (writer, reader):
            app.backend.close()


def import_definitions(node: rabbitmq.Node, prefix: str, *arguments: str) -> None:
    """Do what docs/operations.md tells an administrator to do."""
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
