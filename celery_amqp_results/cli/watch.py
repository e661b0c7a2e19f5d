"""``results watch``: states as they happen."""

from __future__ import annotations

import contextlib
import time
from typing import List, NamedTuple, Optional, Tuple

import click
from celery.exceptions import TimeoutError

from celery_amqp_results.cli.board import Board, Screen
from celery_amqp_results.cli.common import Exit, Seconds, Session, check_ids, command
from celery_amqp_results.cli.describing import describe, group_ids
from celery_amqp_results.cli.output import counted

__all__ = ("watch",)


@command(name="watch")
@click.argument("ids", metavar="[ID...]", nargs=-1)
@click.option("--group", metavar="ID", help="The members of a group.")
@click.option(
    "--state", "names", metavar="STATE", multiple=True, help="These states alone; may be repeated."
)
@click.option("--timeout", type=Seconds(), metavar="SECONDS", help="End after that.")
def watch(
    session: Session,
    ids: Tuple[str, ...],
    group: Optional[str],
    names: Tuple[str, ...],
    timeout: Optional[float],
) -> None:
    """Watch states as they happen: of given tasks, of a group, or of everything.

    Given tasks are watched until all have ended; everything until Ctrl-C. A task whose meta has
    the numbers "current" and "total" gets a progress bar. With --json there is a line for each
    state. Exits with 1 when a task that was given has failed, with 3 when --timeout is over
    before all have ended, and with 130 after Ctrl-C while given tasks go on.
    """
    if ids:
        check_ids(ids)
    wanted = tuple(name.upper() for name in names) or None
    target = _target(session, ids, group)
    title = _title(len(ids), group, wanted)
    if target.live_group is not None:
        end = "Ctrl-C" if timeout is None else "--timeout is over"
        session.output.note(
            f"group {group!r} is not saved (GroupResult.save): its states are shown from now on, "
            f"until {end}"
        )
    board = Board(len(target.ids) if target.ids and wanted is None else None)
    screen = Screen(session.output, board, title)
    metas = session.backend.watch(target.ids, states=wanted, timeout=timeout)
    late = None
    try:
        with contextlib.closing(metas), screen.shown():
            for found in metas:
                if target.live_group in (None, found.get("group_id")):
                    screen.take(describe(found["task_id"], found))
    except TimeoutError as exc:
        late = str(exc)
    except KeyboardInterrupt:
        _summary(session, board)
        session.end(Exit.INTERRUPTED if target.ids is not None else Exit.OK)
    _summary(session, board)
    if late is not None:
        session.output.note(late)
    if board.failed and target.ids is not None:
        session.end(Exit.FAILED)
    if late is not None:
        session.end(Exit.NOT_READY)


class _Target(NamedTuple):
    """What is watched."""

    #: The tasks, ``None`` for all.
    ids: Optional[List[str]]
    #: The only group whose states are shown.
    live_group: Optional[str] = None


def _target(session: Session, ids: Tuple[str, ...], group: Optional[str]) -> _Target:
    """Return what to watch.

    Raises:
        click.UsageError: when the members of a group beside other ids are unknown.
    """
    if group is None:
        return _Target(list(dict.fromkeys(ids)) or None)
    members = group_ids(session, group)
    if members is not None:
        return _Target(list(dict.fromkeys([*ids, *members])))
    if ids:
        raise click.UsageError(f"group {group!r} is not saved: watch it without other ids")
    return _Target(None, group)


def _title(count: int, group: Optional[str], wanted: Optional[Tuple[str, ...]]) -> str:
    if group is not None:
        return f"watching group {group}"
    if count:
        return f"watching {counted(count, 'task')}"
    return f"watching {', '.join(wanted) if wanted else 'everything'}"


def _summary(session: Session, board: Board) -> None:
    seconds = time.monotonic() - board.started
    session.output.line(
        f"{board.ended} ended, {board.failed} failed, in {seconds:.1f} s", style="bold"
    )
