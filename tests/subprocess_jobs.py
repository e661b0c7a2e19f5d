"""Functions that tests run in other processes, see :mod:`tests.subprocesses`. No test imports."""

from __future__ import annotations

import threading
import time
from typing import Any, Dict, List, Optional, Tuple

from celery import Celery
from celery.result import GroupResult

from tests.subprocesses import say


def metas(app: Celery, ids: List[str], times: int = 1) -> List[Dict[str, Any]]:
    """Look up each of *ids* *times* times; return the metas of all."""
    return [app.backend.get_task_meta(i, cache=False) for _ in range(times) for i in ids]


def states(app: Celery, ids: List[str]) -> List[str]:
    """Return the states of *ids*."""
    return [app.AsyncResult(i).state for i in ids]


def values(app: Celery, ids: List[str], times: int = 1, timeout: float = 60) -> List[Any]:
    """Wait for each of *ids* *times* times; return the values of all."""
    return [app.AsyncResult(i).get(timeout=timeout) for _ in range(times) for i in ids]


def store(app: Celery, results: List[Tuple[str, Any, str]]) -> None:
    """Store each (id, result, state)."""
    for task_id, result, state in results:
        app.backend.store_result(task_id, result, state)


def forget(app: Celery, ids: List[str]) -> None:
    """Forget *ids*."""
    for task_id in ids:
        app.AsyncResult(task_id).forget()


def wait_and_say(app: Celery, task_id: str, timeout: float = 60) -> Any:
    """Say "waiting" once the inbox is open, then wait for the task."""
    result = app.AsyncResult(task_id)
    assert (result.state, result.state) == ("PENDING", "PENDING")
    say("waiting")
    return result.get(timeout=timeout)


def states_until_ready(app: Celery, task_id: str, timeout: float = 60) -> List[Tuple[str, Any]]:
    """Wait for a task and return its states as they arrive; say "waiting" at the second."""
    seen: List[Tuple[str, Any]] = []

    def on_message(meta: Dict[str, Any]) -> None:
        seen.append((meta["status"], meta["result"]))
        if len(seen) == 2:
            say("waiting")

    app.AsyncResult(task_id).get(timeout=timeout, on_message=on_message)
    return seen


def poll_until_final(app: Celery, ids: List[str], timeout: float = 90) -> Dict[str, Any]:
    """Poll *ids* with fresh result objects until all are final.

    Returns for each id the states in the order seen, without repetitions, and the final meta.
    """
    seen: Dict[str, List[Any]] = {i: [] for i in ids}
    final: Dict[str, Any] = {}
    deadline = time.monotonic() + timeout
    say("polling")
    while len(final) < len(ids) and time.monotonic() < deadline:
        for task_id in ids:
            if task_id in final:
                continue
            meta = app.backend.get_task_meta(task_id)
            step: Any = meta["status"]
            if step == "PROGRESS":
                step = ("PROGRESS", meta["result"]["current"])
            if not seen[task_id] or seen[task_id][-1] != step:
                seen[task_id].append(step)
            if meta["status"] in app.backend.READY_STATES:
                final[task_id] = meta
    # Final states must not change either.
    for task_id, meta in final.items():
        again = app.backend.get_task_meta(task_id)
        assert again == meta, (again, meta)
    return {"seen": seen, "final": final}


def restore_and_join(app: Celery, group_id: str) -> Tuple[List[str], Any]:
    """Restore a group that another process saved; return its members' ids and values."""
    group = GroupResult.restore(group_id, app=app)
    assert group is not None
    return [node.id for node in group], group.get(timeout=60)


def restored(app: Celery, group_id: str) -> Optional[List[str]]:
    """Return the members of a saved group, or ``None``."""
    group = GroupResult.restore(group_id, app=app)
    return None if group is None else [node.id for node in group]


def delete_group(app: Celery, group_id: str) -> None:
    """Delete a saved group."""
    GroupResult(group_id, [], app=app).delete()


def get_pickled(app: Celery, pickled: bytes) -> Any:
    """Unpickle a result object and wait for it."""
    import pickle

    return pickle.loads(pickled).get(timeout=60)


def only_send(app: Celery, times: int) -> Dict[str, Any]:
    """Send tasks; return the broker connections and the threads that exist afterwards."""
    for number in range(times):
        app.send_task("tests.nothing", (number,))
    return {
        "connections": connections_to(int(app.connection_for_write().port or 5672)),
        "threads": sorted(t.name for t in threading.enumerate()),
    }


def send_and_end(app: Celery, name: str) -> List[str]:
    """Send a task and return its id."""
    return [app.send_task(name, (1, 2)).id]


def connections_to(port: int) -> int:
    """Return how many TCP connections this process has to *port* (on Linux)."""
    import os
    import re

    sockets = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            match = re.match(r"socket:\[(\d+)\]", os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
        if match:
            sockets.add(match.group(1))
    count = 0
    for name in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(name) as table:
            for line in list(table)[1:]:
                fields = line.split()
                established = fields[3] == "01"
                remote = int(fields[2].rpartition(":")[2], 16)
                count += established and remote == port and fields[9] in sockets
    return count


def count_and_revoke(
    app: Celery, group_id: str, timeout: float = 60
) -> Tuple[List[int], List[Any]]:
    """Wait for three members of a group, revoke the others, and join it.

    Returns how many are completed, of how many, and the values, or the name of the exception.
    """
    restored = GroupResult.restore(group_id, app=app)
    deadline = time.monotonic() + timeout
    while restored.completed_count() < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    counts = [restored.completed_count(), len(restored)]
    restored.revoke()
    values = restored.get(timeout=timeout, propagate=False)
    return counts, [type(v).__name__ if isinstance(v, Exception) else v for v in values]


def forget_group(app: Celery, group_id: str) -> List[str]:
    """Forget a group and its members; return their states after that."""
    restored = GroupResult.restore(group_id, app=app)
    ids = [node.id for node in restored]
    restored.forget()
    restored.delete()
    return states(app, ids)
