"""``results migrate``: moves results out of Celery 4's queues."""

from __future__ import annotations

import collections
import re
import uuid
from typing import Counter, List, Optional, Tuple

import click
from kombu.exceptions import KombuError, OperationalError

from celery_amqp_results import errors
from celery_amqp_results.backend import AMQPBackend
from celery_amqp_results.cli import inspection, management
from celery_amqp_results.cli.common import Exit, Failed, Session, command, management_options
from celery_amqp_results.protocol.message import STATE
from celery_amqp_results.protocol.names import BROADCAST, Route
from celery_amqp_results.protocol.ranking import is_final

__all__ = ("migrate", "old_queues")

_NAME = re.compile(r"[0-9a-f]{32}\Z")


def old_queues(api: management.Management, exchange: str) -> List[str]:
    """Return the names of the queues of single tasks that are bound to *exchange*."""
    return sorted(
        binding["destination"]
        for binding in api.bindings(exchange)
        if binding["destination_type"] == "queue"
        and binding["destination"] == binding["routing_key"]
        and _NAME.match(binding["destination"])
    )


@command(name="migrate")
@click.argument("ids", metavar="[ID...]", nargs=-1)
@click.option("--delete", is_flag=True, help="Delete the queues; do not keep the results.")
@click.option("--dry-run", "-n", is_flag=True, help="Say what would be done.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@management_options
def migrate(session: Session, ids: Tuple[str, ...], delete: bool, dry_run: bool, yes: bool) -> None:
    """Move results out of the queues that Celery 4, or the layout per-task, has for each task.

    Without ids the queues are listed by RabbitMQ's management API. A result that is moved expires
    after result_expires from now. Tasks that have not ended are left alone. Exits with 1 when one
    could not be moved, and otherwise with 3 when one that was named is not there or has not ended.
    """
    # Fails before anything is asked if results are not moved into this layout.
    session.shared_layout()
    chosen = list(dict.fromkeys(ids))
    if not chosen:
        with inspection.Broker(session) as broker:
            chosen = _listed(broker, broker.management())
    what = "delete the queues" if delete else "move the results"
    if chosen and not dry_run and not yes:
        click.confirm(f"{what.capitalize()} of {len(chosen)} tasks?", abort=True, err=True)
    # Reads the queues of single tasks on the same broker.
    old = session.backend.clone("the command line", layout="per-task", track_sent=False)
    # A result is deleted there only after the broker has confirmed the copy.
    new = session.backend.clone("the command line", confirm=True)
    counts: Counter[str] = collections.Counter()
    try:
        for task_id in chosen:
            outcome = _one(new, old, task_id, delete, dry_run)
            counts[outcome] += 1
            if session.output.json:
                session.output.data({"id": task_id, "outcome": outcome})
            else:
                session.output.line(f"{task_id} {outcome}")
    finally:
        old.close()
        new.close()
    if not session.output.json:
        session.output.line(
            ", ".join(f"{n} {outcome}" for outcome, n in counts.items()) or "nothing to do"
        )
    if counts.get("unreadable"):
        session.end(Exit.FAILED)
    if ids and ("not there" in counts or "not ended" in counts):
        session.end(Exit.NOT_READY)


def _listed(broker: inspection.Broker, api: Optional[management.Management]) -> List[str]:
    """Return the ids of all tasks with a queue."""
    if api is None:
        raise Failed(
            "AMQP cannot list queues: give ids, or the management API with --management "
            "http://user:password@host:15672",
            Exit.USAGE,
        )
    try:
        names = old_queues(api, broker.topology.prefix)
    except management.ManagementError as exc:
        raise Failed(str(exc), Exit.UNAVAILABLE) from exc
    return [str(uuid.UUID(name)) for name in names]


def _one(new: AMQPBackend, old: AMQPBackend, task_id: str, delete: bool, dry_run: bool) -> str:
    """Move or delete one result; return the outcome."""
    try:
        old.rkey(task_id)
    except ValueError:
        # Too long for the name of a queue.
        return "not there"
    try:
        state = old.layout.poll((task_id,))[task_id]
    except OperationalError:
        raise
    except (KombuError, errors.ForeignMessage, errors.BacklogLimitExceeded):
        if not delete:
            return "unreadable"
        state = None
    else:
        if state is None:
            return "not there"
        if not is_final(state.state) and not delete:
            return "not ended"
    if dry_run:
        return "would be deleted" if delete else "would be moved"
    if not delete:
        assert state is not None
        try:
            found = dict(old.config.codec.decode(state), task_id=task_id)
        except (KombuError, errors.ForeignMessage):
            return "unreadable"
        expiration = new.config.expirations.result
        message = new.recorder.encode(task_id, state.state, found, STATE, expiration)
        new.layout.publish(message, Route(BROADCAST), True)
    old.layout.forget((task_id,))
    return "deleted" if delete else "moved"
