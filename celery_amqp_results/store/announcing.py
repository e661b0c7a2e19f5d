"""Announcing to all processes that states were removed.

A process that knows a shard completely answers from memory. So a process that removes the states of
a task publishes a mark to the exchange, which no queue keeps, and waits until the broker has
delivered it to all inboxes.
"""

from __future__ import annotations

import time
from typing import Collection

from celery_amqp_results.amqp.confirms import ConfirmChannel, Outgoing, Publication
from celery_amqp_results.protocol.clock import wall
from celery_amqp_results.protocol.names import BROADCAST, Route, Topology
from celery_amqp_results.store.marks import FORGOTTEN, mark
from celery_amqp_results.toolkit.retry import is_over, time_left

__all__ = ("announce",)

#: The longest wait for the broker's confirm, in seconds: a third-party queue may be stuck.
CONFIRM_SECONDS = 0.25


def announce(channel: ConfirmChannel, topology: Topology, ids: Collection[str]) -> None:
    """Publish that *ids* were removed; return after the confirm, or when that is late.

    Raises:
        amqp.exceptions.AccessRefused, NotFound: when the exchange cannot be written to.
        amqp.AMQPError, OSError: when the connection is lost.
    """
    now = wall()
    with channel.link.corked():
        for task_id in ids:
            state = mark(task_id, FORGOTTEN, now, None)
            key = topology.routing_key(task_id, FORGOTTEN, Route(BROADCAST))
            properties = state.properties(persistent=False)
            message = Outgoing("", properties, state.body, pushed=(topology.exchange, key))
            channel.publish_copy(Publication(message))
    end = time.monotonic() + CONFIRM_SECONDS
    while channel.log.busy and not is_over(end):
        channel.link.drain(time_left(end, CONFIRM_SECONDS))
