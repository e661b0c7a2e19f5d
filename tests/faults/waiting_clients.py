"""A process that waits for results, in threads, greenlets or coroutines.

::

    python -m tests.faults.waiting_clients KIND URL PREFIX

Writes ``waiting`` once all awaited results would be pushed, and at the end the results.
"""

# Monkey patching must happen before anything is imported that uses the patched modules.
# ruff: noqa: E402

from __future__ import annotations

import sys

KIND = sys.argv[1] if __name__ == "__main__" else ""

if KIND == "gevent":
    from gevent import monkey

    monkey.patch_all()
elif KIND == "eventlet":
    import warnings

    warnings.simplefilter("ignore")
    import eventlet

    eventlet.monkey_patch()

import asyncio
import json
import threading
import time
import uuid
from typing import Any, Dict, List

from celery import Celery

#: The number of results that are awaited at once.
COUNT = 10

#: Seconds that the whole run may take.
PATIENCE = 120.0


def task_ids(prefix: str) -> List[str]:
    """Return the tasks that a process with *prefix* waits for."""
    return [str(uuid.uuid5(uuid.NAMESPACE_OID, f"{prefix}/{n}")) for n in range(COUNT)]


def _say_when_covered(app: Celery, ids: List[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        inbox = app.backend.layout.inbox
        if all(inbox.covers(task_id) for task_id in ids):
            break
        time.sleep(0.05)
    print("waiting", flush=True)


def _in_threads(app: Celery, ids: List[str]) -> Dict[str, Any]:
    found: Dict[str, Any] = {}

    def wait(task_id: str) -> None:
        found[task_id] = app.AsyncResult(task_id).get(timeout=PATIENCE)

    # These are greenlets if threading is patched.
    threads = [threading.Thread(target=wait, args=(task_id,), daemon=True) for task_id in ids]
    for thread in threads:
        thread.start()
    _say_when_covered(app, ids)
    for thread in threads:
        thread.join(PATIENCE)
    return found


async def _in_coroutines(app: Celery, ids: List[str]) -> Dict[str, Any]:
    from celery_amqp_results import aio

    waiting = [
        asyncio.ensure_future(aio.get(task_id, timeout=PATIENCE, app=app)) for task_id in ids
    ]
    await asyncio.get_running_loop().run_in_executor(None, _say_when_covered, app, ids)
    return dict(zip(ids, await asyncio.gather(*waiting)))


def main() -> None:
    """Wait for the results, and write them."""
    url, prefix = sys.argv[2:]
    app = Celery("waiting", broker=url, backend="amqp://")
    app.conf.update(
        result_exchange=prefix,
        result_backend_transport_options={
            "shards": 8,
            "lookup_timeout": PATIENCE,
            "retry_policy": {"max_retries": 300},
        },
    )
    ids = task_ids(prefix)
    coroutines = KIND == "asyncio"
    found = asyncio.run(_in_coroutines(app, ids)) if coroutines else _in_threads(app, ids)
    print(json.dumps(found), flush=True)
    app.backend.close()


if __name__ == "__main__":
    main()
