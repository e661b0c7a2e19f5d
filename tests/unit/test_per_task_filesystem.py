"""Tasks over ``filesystem://``: a separate file, since a process can have one worker at a time."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
from celery import chord, group, signals
from celery.contrib.testing.worker import start_worker

from tests.unit.test_per_task_memory import LONG, Running, filesystem_app


def test_tasks_run_over_files(tmp_path: Path) -> None:
    app = filesystem_app(tmp_path)
    running = Running(app)
    # kombu does not write its files atomically, and a process that reads half a file fails. So all
    # tasks are sent before the worker starts, and their results are read when it has ended.
    one = running.add.delay(1, 2)
    failed = running.fail.delay("gone")
    several = group(running.add.s(i, i) for i in range(4)).apply_async()
    body = chord(running.add.s(i, i) for i in range(4))(running.total.s())
    missing = {one.id, failed.id, body.id, *(result.id for result in several)}
    ended = threading.Event()

    def count(task_id: str, **kwargs: Any) -> None:
        missing.discard(task_id)
        if not missing:
            ended.set()

    level = logging.getLogger().level
    signals.task_postrun.connect(count)
    try:
        with start_worker(app, perform_ping_check=False, pool="solo", shutdown_timeout=LONG):
            assert ended.wait(LONG)
    finally:
        signals.task_postrun.disconnect(count)
        # The worker has changed the filters, and later tests rely on warnings.
        logging.getLogger().setLevel(level)
    assert one.get(timeout=LONG) == 3
    assert app.AsyncResult(one.id).get(timeout=LONG) == 3
    with pytest.raises(KeyError, match="gone"):
        failed.get(timeout=LONG)
    assert several.get(timeout=LONG) == [0, 2, 4, 6]
    assert body.get(timeout=LONG) == 12
    app.backend.close()
    app.close()
