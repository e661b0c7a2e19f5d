"""Marks: the fate of a task without a stored state.

PENDING may mean that the task was never sent, that it waits for a worker, that its result has
expired, or that it was forgotten. With the option ``track_sent`` small messages distinguish these
cases: ``SENT`` when a task is sent, ``ENDED`` with its final state, and ``FORGOTTEN`` with
``forget()``. They lie in the shard of the task, and in no inbox; the latest mark counts. ``ENDED``
outlives the result.

A process that knows a shard completely answers from memory. So a process that removes the states of
a task also announces a mark ``FORGOTTEN`` on the exchange, which no queue keeps.
"""

from __future__ import annotations

import datetime
import logging
import time
import weakref
from typing import Any, Collection, NamedTuple, Optional, Set

import amqp
import kombu

from celery_amqp_results.amqp import nowait
from celery_amqp_results.amqp.confirm_log import Outgoing, Publication
from celery_amqp_results.amqp.confirms import ConfirmChannel
from celery_amqp_results.amqp.declarations import Declarations, declare_exchange
from celery_amqp_results.amqp.failures import TRANSIENT
from celery_amqp_results.amqp.link import channel_nowait
from celery_amqp_results.protocol import expiry
from celery_amqp_results.protocol.clock import wall
from celery_amqp_results.protocol.message import FORGOTTEN, MARK, StateMessage
from celery_amqp_results.protocol.names import BROADCAST, Route, Topology
from celery_amqp_results.toolkit.interrupts import raise_if_from_signal_handler
from celery_amqp_results.toolkit.retry import is_over, time_left

__all__ = ("ENDED", "FORGOTTEN", "SENT", "Fate", "Marker", "announce", "ended_expiration", "mark")

logger = logging.getLogger(__name__)

SENT = "SENT"
ENDED = "ENDED"

#: The longest wait for the confirm of an announcement, in seconds: some queue may be stuck.
CONFIRM_SECONDS = 0.25

#: The meaning of the last mark, if no state is kept.
_MEANINGS = {SENT: "sent", ENDED: "expired", FORGOTTEN: "forgotten"}


class Fate(NamedTuple):
    """The fate of a task."""

    #: ``stored``: a state is kept. ``sent``: the task was sent, and no state is stored.
    #: ``expired``: it has ended, and its result has expired. ``forgotten``: its result was deleted
    #: by ``forget()``. ``unknown``: it was never sent, or too long ago.
    status: str
    #: When that began, in UTC: when it was stored, sent, ended or forgotten.
    since: Optional[datetime.datetime] = None

    @classmethod
    def read(cls, state: Optional[StateMessage], last_mark: Optional[StateMessage]) -> Fate:
        """Return the fate of a task, by its state and its last mark."""
        if state is not None:
            return cls("stored", _time(state))
        if last_mark is not None and last_mark.state in _MEANINGS:
            return cls(_MEANINGS[last_mark.state], _time(last_mark))
        return cls("unknown")


def _time(state: StateMessage) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(state.published / 1e6, datetime.timezone.utc)


def mark(task_id: str, what: str, now: int, expiration: Optional[int]) -> StateMessage:
    """Return a mark.

    Parameters:
        what: :data:`SENT`, :data:`ENDED` or :data:`FORGOTTEN`.
        now: microseconds since 1970.
        expiration: milliseconds after which the broker drops it, or ``None``.
    """
    return StateMessage(
        task_id, what, now, b"", "application/octet-stream", "binary", None, expiration, MARK
    )


def ended_expiration(expiration: Optional[int]) -> Optional[int]:
    """Return the milliseconds for which :data:`ENDED` is kept: twice as long as the result."""
    if expiration is None:
        return None
    return min(2 * expiration, expiry.MAX_MILLISECONDS)


def announce(channel: ConfirmChannel, topology: Topology, ids: Collection[str]) -> None:
    """Announce to all inboxes that *ids* were removed; wait briefly for the broker's confirm."""
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


class _Side:
    """A channel for marks on a connection that sends tasks. Never waits for an answer.

    A refusal by the broker closes this channel, and not the one that tasks are sent on.
    """

    def __init__(self, connection: amqp.Connection, declarations: Declarations) -> None:
        self._declarations = declarations
        #: Why publishing marks has stopped, or ``None``.
        self.refused: Optional[str] = None
        self._requested: Set[int] = set()
        self.channel = channel_nowait(connection, self._on_close)
        if not declarations.declare:
            return
        # The broker refuses this if others count the shards differently: marks would go astray.
        declare_exchange(self.channel, declarations.topology, nowait=True)

    def _on_close(self, code: int, text: str, class_id: int, method_id: int) -> None:
        self.refused = f"({code}) {text}"
        logger.warning(
            "tasks that are sent on this connection are not tracked any more: %s", self.refused
        )

    def publish(self, message: Outgoing) -> None:
        if self.refused is not None:
            return
        shard = message.shard
        if shard is not None and self._declarations.declare and shard not in self._requested:
            self._declarations.request_shard(self.channel, shard)
            self._requested.add(shard)
        # The app's connections may use confirms.
        nowait.publish(self.channel, "", message.queue, message.properties, message.body)


class Marker:
    """Publishes marks on the connections that send tasks.

    Parameters:
        declarations: declares the exchange, and shards before they are first used.

    Only one thread at a time may use a connection; kombu's pools ensure that. After a fork the
    child must make a new one.
    """

    def __init__(self, declarations: Declarations) -> None:
        self._declarations = declarations
        self._sides: weakref.WeakKeyDictionary[Any, _Side] = weakref.WeakKeyDictionary()

    def publish(self, connection: kombu.Connection, message: Outgoing) -> None:
        """Publish *message* on a side channel of *connection*, without waiting for an answer.

        Raises nothing when the broker is unreachable: sending the task comes next and fails as
        well, and its caller may retry that.

        Parameters:
            connection: kombu's connection, which is opened if necessary.
        """
        try:
            if not connection.connected:
                connection.ensure_connection(max_retries=1, interval_start=0)
            established = connection.connection
            side = self._sides.get(established)
            if side is None:
                side = self._sides[established] = _Side(established, self._declarations)
            side.publish(message)
        except TRANSIENT as exc:
            raise_if_from_signal_handler(exc)
            logger.info("%s was not published: %r", message.what, exc)
