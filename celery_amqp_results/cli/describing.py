"""What the commands print about a task."""

from __future__ import annotations

import contextlib
from typing import Any, Dict, Iterator, List, Optional

from celery import states

from celery_amqp_results.cli.common import Session
from celery_amqp_results.library_types import Meta
from celery_amqp_results.protocol.ids import state_name
from celery_amqp_results.protocol.ranking import is_final
from celery_amqp_results.waiting.results import tasks_in

__all__ = ("Described", "describe", "group_ids", "show")

#: The output for a task, which ``docs/command-line.md`` describes.
Described = Dict[str, Any]

#: Further keys of a meta with ``result_extended``.
EXTENDED = ("name", "args", "kwargs", "worker", "retries", "queue")


#: Descriptions of a task without a stored state.
FATES = {
    "untracked": "nothing is known of it: not started, expired, forgotten or never sent",
    "unknown": "nobody has sent it, or that was too long ago",
    "sent": "it was sent, and has stored nothing so far",
    "expired": "it has ended, and its result has expired",
    "forgotten": "its result was forgotten",
    "stored": "it has stored something just now",
}


def describe(task_id: str, found: Optional[Meta]) -> Described:
    """Return the output for a task whose meta was *found*, or of which nothing is known."""
    found = found or {"status": states.PENDING, "result": None}
    state = found["status"]
    failed = state in states.EXCEPTION_STATES
    described: Described = {
        "id": task_id,
        "state": state_name(state),
        "ready": is_final(state),
        "result": None if failed else found.get("result"),
        "error": found.get("result") if failed else None,
        "traceback": found.get("traceback"),
        "children": list(_ids_in(found.get("children"))),
        "group": found.get("group_id"),
        "parent": found.get("parent_id"),
        "date_done": found.get("date_done"),
    }
    described.update({name: found[name] for name in EXTENDED if found.get(name) is not None})
    return described


def _ids_in(children: Any) -> Iterator[str]:
    """Yield the ids of *children*, which are result objects as nested tuples."""
    for child in children or ():
        with contextlib.suppress(TypeError, ValueError, IndexError, KeyError):
            identity, members = child
            yield str(identity[0] if isinstance(identity, (list, tuple)) else identity)
            yield from _ids_in(members)


def group_ids(session: Session, group_id: str) -> Optional[List[str]]:
    """Return the ids of the members of a saved group, or ``None``."""
    saved = session.backend.restore_group(group_id, cache=False)
    if saved is None:
        return None
    return [node if isinstance(node, str) else node.id for node in tasks_in(saved)]


def show(session: Session, described: Described, known: bool = True) -> None:
    """Print the state of one task."""
    output = session.output
    if output.json:
        output.data(described)
        return
    rows: Dict[str, object] = {"state": described["state"]}
    if not known:
        rows["note"] = FATES[described.get("fate", "untracked")]
    for name in ("name", "worker", "date_done", "group", "parent", *EXTENDED, "unreadable"):
        if described.get(name) is not None:
            rows[name] = described[name]
    if described["error"] is not None:
        rows["error"] = repr(described["error"])
    elif known and "unreadable" not in described:
        rows["result"] = repr(described["result"])
    if described["children"]:
        rows["children"] = "\n".join(described["children"])
    if described["traceback"]:
        rows["traceback"] = str(described["traceback"]).rstrip()
    output.pairs(described["id"], rows)
