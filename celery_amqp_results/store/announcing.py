"""Announcing to all processes that states were removed.

A process that knows a shard completely answers from memory. So a process that removes the states of
a task publishes a mark to the exchange, which no queue keeps, and waits until the broker has
delivered it to all inboxes.
"""

from __future__ import annotations

import time
from typing import Collection

from celery_amqp_results.amqp import nowait
from celery_amqp_results.amqp.link import Link
from celery_amqp_results.protocol.clock import wall
from celery_amqp_results.protocol.message import FORGOTTEN, MARK, StateMessage
from celery_amqp_results.protocol.names import BROADCAST, Route, Topology
from celery_amqp_results.toolkit.retry import is_over, time_left

__all__ = ("announce",)

#: The longest wait for the broker's confirm, in seconds: a third-party queue may be stuck.
CONFIRM_SECONDS = 0.25


def announce(link: Link, topology: Topology, ids: Collection[str]) -> None:
    """Publish that *ids* were removed; return after the confirm, or when that is late.

    Parameters:
        link: an open connection that the caller uses exclusively.
        topology: names.
        ids: the tasks.

    Raises:
        amqp.exceptions.AccessRefused, NotFound: when the exchange cannot be written to.
        amqp.AMQPError, OSError: when the connection is lost.
    """
    channel = link.channel()
    channel.confirm_select()
    confirmed = 0

    def on_ack(tag: int, multiple: bool) -> None:
        nonlocal confirmed
        confirmed = max(confirmed, tag) if multiple else confirmed + 1

    channel.events["basic_ack"].add(on_ack)
    channel.events["basic_nack"].add(on_ack)
    now = wall()
    with link.corked():
        for task_id in ids:
            mark = StateMessage(
                task_id, FORGOTTEN, now, b"", "application/octet-stream", "binary", kind=MARK
            )
            key = topology.routing_key(mark.id, mark.state, Route(BROADCAST))
            properties = mark.properties(persistent=False)
            nowait.publish(channel, topology.exchange, key, properties, mark.body)
    end = time.monotonic() + CONFIRM_SECONDS
    while confirmed < len(ids) and channel.is_open and not is_over(end):
        link.drain(time_left(end, CONFIRM_SECONDS))
    channel.close()
