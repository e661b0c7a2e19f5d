"""The permissions that docs/operations.md asks for are enough."""

from __future__ import annotations

import re
import uuid
from pathlib import Path
from typing import Dict

from celery.result import AsyncResult, GroupResult

from tests.conftest import PATIENCE, Apps
from tools import rabbitmq

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "operations.md"


def documented(prefix: str) -> Dict[str, str]:
    """Return the patterns on the page, for another *prefix* than the one there."""
    patterns = dict(re.findall(r"^(configure|write|read) +(\S+)$", PAGE.read_text(), re.M))
    assert patterns.keys() == {"configure", "write", "read"}
    return {name: pattern.replace("celeryresults", prefix) for name, pattern in patterns.items()}


def test_a_user_with_the_documented_permissions_stores_waits_and_looks_up(
    make_app: Apps, node: rabbitmq.Node
) -> None:
    # Given a user for results who has no other permissions
    user, password = f"u{uuid.uuid4().hex[:8]}", uuid.uuid4().hex
    patterns = documented(make_app.prefix)
    node.ctl("add_user", user, password)
    node.ctl(
        "set_permissions",
        "-p",
        "/",
        user,
        patterns["configure"],
        patterns["write"],
        patterns["read"],
    )
    try:
        url = node.url(user, password)
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
    finally:
        node.ctl("delete_user", user)
