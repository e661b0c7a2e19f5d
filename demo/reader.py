"""A process that has sent no tasks and reads results by their ids.

It receives ``{"ids": [...], "group": id, "rounds": n}`` on standard input and writes lines of JSON:
periodically the number of results read, and at last the results of each round and the time that it
took.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any, Callable, Dict, List, Tuple

from celery.result import AsyncResult, GroupResult

#: Time limit for reading a group, in seconds.
TIMEOUT = 60.0

#: How many results are read between two reports.
STEP = 20

Seen = Dict[str, Tuple[str, str]]


def look(result: AsyncResult) -> Tuple[str, str]:
    """Return state and value of a result, as text that can be compared."""
    return str(result.state), repr(result.result)


def read(app: Any, ids: List[str], group_id: str, on_read: Callable[[], Any]) -> Seen:
    """Read every id by itself, and the members of the group together.

    Parameters:
        app: the app.
        ids: ids of tasks.
        group_id: id of a group that was saved.
        on_read: called for each result.
    """
    seen: Seen = {}
    for task_id in ids:
        seen[task_id] = look(AsyncResult(task_id, app=app))
        on_read()
    group = GroupResult.restore(group_id, app=app)
    if group is not None:
        values = group.get(timeout=TIMEOUT, on_message=lambda meta: on_read())
        for member, value in zip(group.results, values):
            seen[member.id] = ("SUCCESS", repr(value))
    return seen


def main() -> int:
    """Carry out the request on standard input."""
    from demo.tasks import app

    wanted = json.load(sys.stdin)
    count = 0

    def on_read() -> None:
        nonlocal count
        count += 1
        if count % STEP == 0:
            _say({"read": count})

    rounds = []
    for _ in range(wanted["rounds"]):
        started = time.monotonic()
        seen = read(app, wanted["ids"], wanted["group"], on_read)
        rounds.append({"seen": seen, "seconds": time.monotonic() - started})
    _say({"rounds": rounds})
    app.backend.close()
    return 0


def _say(what: Dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    # The demo handles Ctrl-C, and then ends this process.
    sys.exit(main())
