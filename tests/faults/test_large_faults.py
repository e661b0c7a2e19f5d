"""Large results while the broker is killed."""

from __future__ import annotations

import functools
import threading
import uuid
from typing import Dict, List

from celery import Celery, states

from tests.conftest import Apps, eventually
from tools import rabbitmq


class Writer:
    """Stores large results until told to stop, and records the confirmed ones."""

    def __init__(self, app: Celery) -> None:
        self.confirmed: Dict[str, str] = {}
        self.errors: List[BaseException] = []
        self._app = app
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                task_id = str(uuid.uuid4())
                value = task_id * 1000
                self._app.backend.store_result(task_id, value, states.SUCCESS)
                self.confirmed[task_id] = value
        except BaseException as exc:
            self.errors.append(exc)

    def has_confirmed(self, wanted: int) -> bool:
        """Return whether *wanted* results are confirmed, or the writer has failed."""
        return bool(self.errors) or len(self.confirmed) >= wanted

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "the writer hangs"
        assert not self.errors


def test_confirmed_large_results_survive_a_killed_broker(
    make_app: Apps, node: rabbitmq.Node
) -> None:
    app = make_app(result_backend_transport_options={"shards": 2, "inline_limit": 1024})
    writer = Writer(app)
    for _ in range(2):
        wanted = len(writer.confirmed) + 20
        eventually(functools.partial(writer.has_confirmed, wanted), 60)
        assert not writer.errors
        node.kill()
        node.start()
    writer.stop()
    app.backend.close()
    for task_id, value in writer.confirmed.items():
        assert app.backend._get_task_meta_for(task_id)["result"] == value
        app.backend.forget(task_id)
