"""``results watch``: states as they happen."""

from __future__ import annotations

import contextlib
import time
from typing import List, Optional, Tuple

import click
from celery.exceptions import TimeoutError

from celery_amqp_results.cli.board import Board, line_of, live
from celery_amqp_results.cli.common import Exit, Seconds, Session, check_ids, command
from celery_amqp_results.cli.describing import Described, describe, group_ids
from celery_amqp_results.cli.output import Output, counted

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
    tasks, live_group = _targets(session, ids, group)
    title = _title(len(ids), group, wanted)
    if live_group is not None:
        end = "Ctrl-C" if timeout is None else "--timeout is over"
        session.output.note(
            f"group {group!r} is not saved (GroupResult.save): its states are shown from now on, "
            f"until {end}"
        )
    board = Board(len(tasks) if tasks and wanted is None else None)
    metas = session.backend.watch(tasks, states=wanted, timeout=timeout)
    late = None
    try:
        with contextlib.closing(metas), live(session.output, board, title):
            for found in metas:
                if live_group in (None, found.get("group_id")):
                    _take(session.output, board, describe(found["task_id"], found))
    except TimeoutError as exc:
        late = str(exc)
    except KeyboardInterrupt:
        _summary(session, board)
        session.end(Exit.INTERRUPTED if tasks is not None else Exit.OK)
    _summary(session, board)
    if late is not None:
        session.output.note(late)
    if board.failed and tasks is not None:
        session.end(Exit.FAILED)
    if late is not None:
        session.end(Exit.NOT_READY)


def _targets(
    session: Session, ids: Tuple[str, ...], group: Optional[str]
) -> Tuple[Optional[List[str]], Optional[str]]:
    """Return the tasks to watch, ``None`` for all, and the only group that is shown of these.

    Raises:
        click.UsageError: when the members of a group beside other ids are unknown.
    """
    if group is None:
        return list(dict.fromkeys(ids)) or None, None
    members = group_ids(session, group)
    if members is not None:
        return list(dict.fromkeys([*ids, *members])), None
    if ids:
        raise click.UsageError(f"group {group!r} is not saved: watch it without other ids")
    return None, group


def _take(output: Output, board: Board, described: Described) -> None:
    board.take(described)
    if output.json:
        output.data(described)
    elif output.console is None:
        output.line(line_of(described))


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
