"""Every worker pool stores plain results, progress, failures, groups and chords.

Prefork, the most common pool, has its own :mod:`tests.worker.test_contract`.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Callable, List

import pytest
from celery import chord, group

from tests.conftest import Apps
from tests.worker import tasks

LONG = 60


@pytest.mark.parametrize("pool", ["threads", "gevent", "eventlet", "solo"])
def test_a_pool_supports_every_kind_of_result(
    pool: str, make_app: Apps, start_worker: Callable[..., Any]
) -> None:
    if pool in ("gevent", "eventlet") and importlib.util.find_spec(pool) is None:
        pytest.skip(f"{pool} is not installed")
    app = make_app()
    start_worker(app, pool=pool, concurrency=1 if pool == "solo" else 3)

    def sign(task: Any, *args: Any) -> Any:
        return app.signature(task.name, args)

    assert sign(tasks.add, 1, 2).apply_async().get(timeout=LONG) == 3
    with pytest.raises(KeyError, match="no"):
        sign(tasks.fail, "no").apply_async().get(timeout=LONG)
    seen: List[Any] = []
    result = sign(tasks.progress, 3).apply_async()
    assert result.get(timeout=LONG, on_message=lambda meta: seen.append(meta["status"])) == 3
    assert set(seen) <= {"PROGRESS", "SUCCESS"}
    joined = group([sign(tasks.add, n, n) for n in range(10)], app=app).apply_async()
    assert joined.get(timeout=LONG) == [2 * n for n in range(10)]
    header = [sign(tasks.add, n, 1) for n in range(10)]
    body = sign(tasks.payload, 3).set(immutable=True)
    assert chord(header, body, app=app).apply_async().get(timeout=LONG) == "xxx"
