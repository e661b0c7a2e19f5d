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
from celery_amqp_results.protocol.ids import state_name
from celery_amqp_results.protocol.ranking import fold, is_final
from celery_amqp_results.waiting.waits import Patience

__all__ = ("describe", "forget", "get", "group_ids")

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


def describe(task_id: str, found: Optional[Dict[str, Any]]) -> Dict[str, Any]:
    """Return the output for a task, which ``docs/command-line.md`` describes.

    Parameters:
        task_id: the task.
        found: its meta, or ``None`` if nothing is known of it.
    """
    found = found or {"status": states.PENDING, "result": None}
    state = found["status"]
    failed = state in states.EXCEPTION_STATES
    described: Dict[str, Any] = {
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
    from celery_amqp_results.waiting.results import tasks_in

    saved = session.backend.restore_group(group_id, cache=False)
    if saved is None:
        return None
    return [node if isinstance(node, str) else node.id for node in tasks_in(saved)]


def present(
    session: Session, ids: List[str], timeout: Optional[float]
) -> Iterator[Tuple[str, Dict[str, Any]]]:
    """Yield the id and the meta of each known task, and again whenever it changes.

    A meta that cannot be read has the error in ``unreadable``. Ends when all have ended, or after
    *timeout* seconds.
    """
    backend = session.backend
    try:
        for update in backend.waits.updates(ids, Patience(timeout)):
            state = update.final or fold(update.states)
            if state is None:
                continue
            try:
                decoded = backend.reader.decode_if_kept(state)
                if decoded is not None:
                    yield update.task_id, decoded
            except (KombuError, SecurityError, errors.ForeignMessage) as exc:
                yield (
                    update.task_id,
                    {
                        "status": state.state,
                        "result": None,
                        "unreadable": f"{type(exc).__name__}: {exc}",
                    },
                )
    except TimeoutError:
        return


class _Answers:
    """Prints each task once, in the given order, as soon as it has ended."""

    def __init__(self, session: Session, ids: List[str]) -> None:
        self._session = session
        self._left = list(ids)
        self._known: Dict[str, Dict[str, Any]] = {}
        #: Whether a task failed or is unreadable, and whether a task has not ended.
        self.failed = self.unready = False

    def take(self, task_id: str, meta: Dict[str, Any]) -> Dict[str, Any]:
        """Note the state of a task, and print what is ready; return the output for the task."""
        described = describe(task_id, meta)
        if "unreadable" in meta:
            described["unreadable"] = meta["unreadable"]
        self._known[task_id] = described
        while self._left and self._known.get(self._left[0], {}).get("ready"):
            self._print(self._left.pop(0))
        return described

    def finish(self) -> None:
        """Print the remaining tasks as they are."""
        for task_id in self._left:
            self._print(task_id)

    def _print(self, task_id: str) -> None:
        backend = self._session.backend
        described = self._known.get(task_id)
        if described is None:
            described = describe(task_id, None)
            if backend.options.track_sent:
                described["fate"] = backend.fate(task_id).status
        show(self._session, described, known=task_id in self._known)
        self.failed |= described["state"] in states.PROPAGATE_STATES or "unreadable" in described
        self.unready |= not described["ready"]


@command(name="get")
@click.argument("ids", metavar="ID...", nargs=-1)
@click.option("--wait", is_flag=True, help="Wait until all of them have ended.")
@click.option(
    "--timeout", type=click.FloatRange(min=0), metavar="SECONDS", help="Wait no longer than that."
)
def get(session: Session, ids: Tuple[str, ...], wait: bool, timeout: Optional[float]) -> None:
    """Show the state, result, traceback and children of tasks.

    Reading removes nothing. With --json there is a line for each task. With --wait each task is
    shown as soon as it and those before it have ended, and the states of those that go on are
    shown on standard error. Exits with 1 when one has failed, and otherwise with 3 when one has not
    ended or is not known.
    """
    from celery_amqp_results.cli.watch import Waiting

    check_ids(ids)
    if timeout is not None and not wait:
        raise click.UsageError("--timeout is how long to --wait")
    unique = list(dict.fromkeys(ids))
    answers = _Answers(session, unique)
    with Waiting(session.output, len(unique), wait) as waiting:
        for task_id, meta in present(session, unique, timeout if wait else 0):
            waiting.take(answers.take(task_id, meta))
    answers.finish()
    if answers.failed:
        session.end(Exit.FAILED)
    if answers.unready:
        session.end(Exit.NOT_READY)


def show(session: Session, described: Dict[str, Any], known: bool = True) -> None:
    """Print the state of one task."""
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
