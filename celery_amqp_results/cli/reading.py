"""``results get`` and ``results forget``."""

from __future__ import annotations

import contextlib
from typing import Any, Dict, Iterator, List, Optional, Tuple

import click
from celery import states
from celery.exceptions import SecurityError, TimeoutError
from kombu.exceptions import KombuError

from celery_amqp_results import errors
from celery_amqp_results.cli.common import Exit, Failed, Session, check_ids, command
from celery_amqp_results.protocol.ranking import fold, is_final

__all__ = ("describe", "forget", "get", "group_ids")

#: What a meta of ``result_extended`` has besides.
EXTENDED = ("name", "args", "kwargs", "worker", "retries", "queue")


#: What is known of a task of which no state is kept.
FATES = {
    "untracked": "nothing is known of it: not started, expired, forgotten or never sent",
    "unknown": "nobody has sent it, or that was too long ago",
    "sent": "it was sent, and has stored nothing so far",
    "expired": "it has ended, and its result has expired",
    "forgotten": "its result was forgotten",
    "stored": "it has stored something just now",
}


def describe(task_id: str, found: Optional[Dict[str, Any]]) -> Dict[str, Any]:
    """Return what is printed of a task, which ``docs/command-line.md`` describes.

    Parameters:
        task_id: the task.
        found: its meta, or ``None`` where nothing is known of it.
    """
    found = found or {"status": states.PENDING, "result": None}
    state = found["status"]
    failed = state in states.EXCEPTION_STATES
    described: Dict[str, Any] = {
        "id": task_id,
        "state": state,
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
    """Return the ids of the members of a group that was saved, or ``None``."""
    from celery_amqp_results.waiting import watch as watching

    saved = session.backend.restore_group(group_id, cache=False)
    if saved is None:
        return None
    return [node if isinstance(node, str) else node.id for node in watching.nodes(saved)]


def present(
    session: Session, ids: List[str], timeout: Optional[float]
) -> Tuple[Dict[str, Dict[str, Any]], bool]:
    """Return the metas of tasks by id, and whether all have ended within *timeout*.

    What cannot be read has the error in ``unreadable``.
    """
    found: Dict[str, Dict[str, Any]] = {}
    complete = True
    backend = session.backend
    try:
        for update in backend._updates(ids, timeout):
            state = update.final or fold(update.states)
            if state is None:
                continue
            try:
                decoded = backend._decode_if_kept(state)
                if decoded is not None:
                    found[update.task_id] = decoded
            except (KombuError, SecurityError, errors.ForeignMessage) as exc:
                found[update.task_id] = {
                    "status": state.state,
                    "result": None,
                    "unreadable": f"{type(exc).__name__}: {exc}",
                }
    except TimeoutError:
        complete = False
    return found, complete


@command(name="get")
@click.argument("ids", metavar="ID...", nargs=-1)
@click.option("--wait", is_flag=True, help="Wait until all of them have ended.")
@click.option(
    "--timeout", type=click.FloatRange(min=0), metavar="SECONDS", help="Wait no longer than that."
)
def get(session: Session, ids: Tuple[str, ...], wait: bool, timeout: Optional[float]) -> None:
    """Show the state, result, traceback and children of tasks.

    Reading removes nothing. With --json there is a line for each task. Exits with 1 when one has
    failed, and otherwise with 3 when one has not ended or is not known.
    """
    check_ids(ids)
    if timeout is not None and not wait:
        raise click.UsageError("--timeout is how long to --wait")
    unique = list(dict.fromkeys(ids))
    found, _ = present(session, unique, timeout if wait else 0)
    described = []
    for task_id in unique:
        what = describe(task_id, found.get(task_id))
        if task_id not in found and session.backend.options.track_sent:
            what["fate"] = session.backend.fate(task_id).status
        unreadable = found.get(task_id, {}).get("unreadable")
        if unreadable is not None:
            what["unreadable"] = unreadable
        described.append(what)
        show(session, what, known=task_id in found)
    if any(d["state"] in states.PROPAGATE_STATES or "unreadable" in d for d in described):
        session.end(Exit.FAILED)
    if not all(d["ready"] for d in described):
        session.end(Exit.NOT_READY)


def show(session: Session, described: Dict[str, Any], known: bool = True) -> None:
    """Print what is known of one task."""
    output = session.output
    if output.json:
        output.data(described)
        return
    rows: Dict[str, Any] = {"state": described["state"]}
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


@command(name="forget")
@click.argument("ids", metavar="[ID...]", nargs=-1)
@click.option("--group", "group", metavar="ID", help="Members of a saved group, and the group.")
def forget(session: Session, ids: Tuple[str, ...], group: Optional[str]) -> None:
    """Delete what is kept of tasks, or of a saved group and its members.

    Forgetting what is not there is no error.
    """
    check_ids(ids, group)
    unique = list(dict.fromkeys(ids))
    if group is not None:
        members = group_ids(session, group)
        if members is None:
            raise Failed(
                f"no group {group!r} is kept: it was not saved (GroupResult.save), or has expired",
                Exit.NOT_READY,
            )
        unique = list(dict.fromkeys([*unique, *members]))
    if unique:
        session.backend.layout.forget(unique)
    if group is not None:
        session.backend.delete_group(group)
    if session.output.json:
        session.output.data({"forgotten": unique, "group": group})
    else:
        session.output.line(f"forgotten: {len(unique)} task{'s' if len(unique) != 1 else ''}")
