"""``results chord``: the leaders of chords, and which tasks of a header have not ended."""

from __future__ import annotations

from typing import Any, Dict, List, NoReturn, Optional

import click
from celery import states

from celery_amqp_results.chords.remote import COMMAND
from celery_amqp_results.cli.common import Exit, Failed, Seconds, Session, command
from celery_amqp_results.cli.output import age, counted
from celery_amqp_results.cli.reading import present

__all__ = ("chord",)

#: The most missing tasks that are listed for people; ``--json`` lists all.
MAX_LISTED = 50

_NO_ANSWER = (
    "no worker has answered: start one, since workers lead chords, and leave remote control on "
    "(worker_enable_remote_control); `celery results doctor` finds chords that wait"
)


@command(name="chord")
@click.argument("key", metavar="[ID]", required=False)
@click.option(
    "--timeout",
    type=Seconds(min_open=True),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="How long workers have to answer.",
)
def chord(session: Session, key: Optional[str], timeout: float) -> None:
    """Show how many tasks of a chord's header have not ended, and which.

    ID is that of the header (the group) or of the body. The worker that leads the chord answers,
    by remote control. Without ID all leaders are shown: their open chords, and the oldest. Exits
    with 3 while tasks are missing, or when no worker leads the chord.
    """
    # Other layouts leave chords to Celery.
    session.shared_layout()
    if not key:
        _leaders(session, timeout)
        return
    answers = _ask(session, key, timeout)
    leader = next((worker for worker, answer in answers.items() if answer.get("led")), None)
    if leader is None:
        _nobody_leads(key, len(answers))
    answer = answers[leader]
    missing: List[str] = answer["missing"]
    known = {task_id: meta["status"] for task_id, meta in present(session, missing, 0)}
    found = {
        "id": key,
        "leader": leader,
        "tasks": answer["tasks"],
        "ended": answer["tasks"] - len(missing),
        "missing": {task_id: known.get(task_id, states.PENDING) for task_id in missing},
    }
    if session.output.json:
        session.output.data(found)
    else:
        _show(session, found)
    session.end(Exit.NOT_READY if missing else Exit.OK)


def _leaders(session: Session, timeout: float) -> None:
    """Show which workers lead chords."""
    answers = _ask(session, "", timeout)
    if not answers:
        raise Failed(_NO_ANSWER, Exit.NOT_READY)
    leaders = {worker: answer for worker, answer in answers.items() if answer.get("led")}
    names = ("queues", "open", "oldest_seconds")
    found = {worker: {name: answer[name] for name in names} for worker, answer in leaders.items()}
    if session.output.json:
        session.output.data({"workers": len(answers), "leaders": found})
        return
    rows = [
        (worker, each["queues"], each["open"], age(each["oldest_seconds"]) if each["open"] else "-")
        for worker, each in sorted(found.items())
    ]
    if rows:
        session.output.table(
            "leaders of chords", ("worker", ">plan queues", ">open chords", ">oldest"), rows
        )
    else:
        session.output.line(f"none of {counted(len(answers), 'worker')} leads chords so far")


def _ask(session: Session, key: str, timeout: float) -> Dict[str, Dict[str, Any]]:
    """Return the answers of all workers by their names."""
    replies: Optional[List[Dict[str, Any]]] = session.app.control.broadcast(
        COMMAND, arguments={"key": key}, reply=True, timeout=timeout
    )
    return {
        worker: answer
        for reply in replies or ()
        for worker, answer in reply.items()
        if isinstance(answer, dict)
    }


def _nobody_leads(key: str, workers: int) -> NoReturn:
    if workers:
        raise Failed(
            f"none of the {workers} workers that answered leads a chord {key!r}: it has fired "
            "(`celery results get` with the id of its body shows the result), has expired, or was "
            "never sent",
            Exit.NOT_READY,
        )
    raise Failed(_NO_ANSWER, Exit.NOT_READY)


def _show(session: Session, found: Dict[str, Any]) -> None:
    missing: Dict[str, str] = found["missing"]
    rows = {
        "ended": f"{found['ended']:,} of {found['tasks']:,} tasks of the header",
        "leader": found["leader"],
    }
    if missing:
        lines = [f"{task_id} {state}" for task_id, state in list(missing.items())[:MAX_LISTED]]
        if len(missing) > MAX_LISTED:
            lines.append(f"and {len(missing) - MAX_LISTED:,} more; --json lists all")
        rows["missing"] = "\n".join(lines)
    else:
        rows["missing"] = "none: the body is sent at this moment"
    session.output.pairs(f"chord {found['id']}", rows)
