"""``results purge``: delete all results."""

from __future__ import annotations

import click

from celery_amqp_results.cli import inspection
from celery_amqp_results.cli.common import Exit, Session, command
from celery_amqp_results.cli.output import counted

__all__ = ("purge",)


@command(name="purge")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
def purge(session: Session, yes: bool) -> None:
    """Delete all results and saved groups of this app's result_exchange.

    Chords that wait for their parts go on. Results that are stored meanwhile may stay.
    """
    with inspection.Broker(session) as broker:
        lengths = broker.lengths()
        total = sum(lengths.values())
        where = broker.connector.describe()
        if not yes and not click.confirm(
            f"Delete all results in {broker.topology.exchange} at {where} "
            f"({counted(total, 'message')})?",
            err=True,
        ):
            session.output.note("nothing was deleted")
            session.end(Exit.FAILED)
        filled = [shard for shard, length in lengths.items() if length]
        deleted = bodies = 0
        for shard in filled:
            # Otherwise the bodies of large results would stay, and without an expiry for ever.
            contents = broker.read((shard,))
            prefix = f"{broker.topology.prefix}.large."
            for queue in contents.body_queues:
                # A message must not be able to name any queue for deletion.
                if queue.startswith(prefix):
                    broker.channel.queue_delete(queue)
                    bodies += 1
            deleted += int(broker.channel.queue_purge(broker.topology.shard_queue_name(shard)))
    if session.output.json:
        session.output.data({"messages": deleted, "large": bodies})
    else:
        session.output.line(
            f"deleted: {counted(deleted, 'message')}, {counted(bodies, 'large result')}"
        )
