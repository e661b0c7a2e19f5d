"""``results get`` and ``results forget``."""

from __future__ import annotations

import contextlib
from typing import Dict, Iterator, List, Optional, Tuple

import click
from celery import states
from celery.exceptions import SecurityError, TimeoutError
from kombu.exceptions import KombuError

from celery_amqp_results import errors
from celery_amqp_results.cli.board import Board, line_of, live
from celery_amqp_results.cli.common import Exit, Failed, Seconds, Session, check_ids, command
from celery_amqp_results.cli.describing import describe, group_ids, show
from celery_amqp_results.cli.output import counted
from celery_amqp_results.library_types import Meta
from celery_amqp_results.protocol.ranking import fold
from celery_amqp_results.waiting.waits import Patience

__all__ = ("forget", "get")


def present(
    session: Session, ids: List[str], timeout: Optional[float]
) -> Iterator[Tuple[str, Meta]]:
    """Yield the id and the meta of each known task, and again whenever it changes.

    A meta that cannot be read has the error in ``unreadable``. Ends when all have ended, or after
    *timeout* seconds.
    """
    backend, patience = session.backend, Patience(timeout)
    deadline = patience.deadline()
    try:
        for update in backend.waits.updates(ids, patience):
            state = update.final or fold(update.states)
            if state is None:
                continue
            try:
                decoded = backend.reader.decode_if_kept(state, deadline)
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
        self._known: Dict[str, Meta] = {}
        #: Whether a task failed or is unreadable, and whether a task has not ended.
        self.failed = self.unready = False

    def take(self, task_id: str, meta: Meta) -> Meta:
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
@click.option("--timeout", type=Seconds(), metavar="SECONDS", help="Wait no longer than that.")
def get(session: Session, ids: Tuple[str, ...], wait: bool, timeout: Optional[float]) -> None:
    """Show the state, result, traceback and children of tasks.

    Reading removes nothing. With --json there is a line for each task. With --wait each task is
    shown as soon as it and those before it have ended, and the states of those that go on are
    shown on standard error. Exits with 1 when one has failed, and otherwise with 3 when one has not
    ended or is not known.
    """
    check_ids(ids)
    if timeout is not None and not wait:
        raise click.UsageError("--timeout is how long to --wait")
    unique = list(dict.fromkeys(ids))
    answers = _Answers(session, unique)
    output, board = session.output, Board(len(unique))
    title = f"waiting for {counted(len(unique), 'task')}"
    with live(output, board, title, transient=True) if wait else contextlib.nullcontext():
        for task_id, meta in present(session, unique, timeout if wait else 0):
            described = answers.take(task_id, meta)
            board.take(described)
            if wait and not (output.json or output.console or described["ready"]):
                output.note(line_of(described))
    answers.finish()
    if answers.failed:
        session.end(Exit.FAILED)
    if answers.unready:
        session.end(Exit.NOT_READY)


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
        session.backend.forget_all(unique)
    if group is not None:
        session.backend.delete_group(group)
    if session.output.json:
        session.output.data({"forgotten": unique, "group": group})
    else:
        session.output.line(f"forgotten: {len(unique)} task{'s' if len(unique) != 1 else ''}")
