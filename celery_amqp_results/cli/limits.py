"""Compare the limits of a broker with the needs of the app. Pure: no I/O.

The figures of the management API and of the connection come in; findings come out.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Iterator, Mapping, Optional, Sequence

from celery_amqp_results.cli.findings import Finding
from celery_amqp_results.cli.output import counted
from celery_amqp_results.protocol.names import PLAN_QUEUES
from celery_amqp_results.store.lookup import PARALLEL

__all__ = (
    "Limits",
    "Needs",
    "advice_on_refusal",
    "findings",
    "limits_from",
    "recommended_shards",
)

#: Queues of a waiting process: its inbox, and the overflow queue of the inbox.
QUEUES_OF_A_WAITER = 2

#: Queues of Celery itself for one worker: tasks, events and remote control.
QUEUES_OF_A_WORKER = 4

#: Connections of a storing process, of one that also waits, and of a worker's chord leader.
STORES = 2
WAITS = 3
LEADS = 1

#: Connections of Celery itself: a worker's main process consumes on one and sends on another; any
#: other process sends on one.
CELERY_IN_MAIN = 2
CELERY_IN_PROCESS = 1

#: The most channels of one of our connections, unless it offers fewer: one for each shard that is
#: read at the same time, one to publish pages, and one for other requests.
CHANNELS_WANTED = PARALLEL + 2

#: A connection needs at least this many channels.
CHANNELS_NEEDED = 2

_REFUSED_QUEUE = re.compile(r"queue limit|limit on queues|queues? .*limit .*reached", re.I)
_REFUSED_LIMIT = re.compile(r"limit .*reached|max(imum)?[ _-]allowed", re.I)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of the broker, and their present use; ``None`` if there is no limit."""

    max_queues: Optional[int] = None
    queues: int = 0
    #: The limit of the virtual host.
    max_connections: Optional[int] = None
    connections: int = 0
    #: The limits of the user.
    user_max_connections: Optional[int] = None
    user_connections: int = 0
    user_max_channels: Optional[int] = None
    #: The limit of one connection, which the broker announces.
    channel_max: Optional[int] = None
    #: Whether the limits of the virtual host and of the user are known.
    complete: bool = True


@dataclasses.dataclass(frozen=True)
class Needs:
    """The needs of an app."""

    #: Shards, and how many of them exist already.
    shards: int
    shards_present: int = 0
    plans_present: int = 0
    #: Whether the exchange exists, so that the number of shards is fixed.
    stored: bool = False
    declare: bool = True
    #: Child processes of a worker.
    concurrency: int = 1
    #: The setting ``broker_pool_limit``; ``None`` or 0 for no limit.
    pool_limit: Optional[int] = None

    @property
    def missing_queues(self) -> int:
        """Queues that will still be declared for results and chords."""
        if not self.declare:
            return 0
        return self.shards - self.shards_present + max(0, PLAN_QUEUES - self.plans_present)

    @property
    def worker_connections(self) -> int:
        """Connections of one prefork worker."""
        main = self._limited(STORES + LEADS) + CELERY_IN_MAIN
        return main + self.concurrency * (self._limited(STORES) + CELERY_IN_PROCESS)

    @property
    def client_connections(self) -> int:
        """Connections of one process that sends tasks and waits for them."""
        return self._limited(WAITS) + CELERY_IN_PROCESS

    def _limited(self, connections: int) -> int:
        return min(connections, self.pool_limit or connections)


def limits_from(
    vhost_limits: Sequence[Mapping[str, Any]],
    user_limits: Sequence[Mapping[str, Any]],
    **used: Any,
) -> Limits:
    """Return the limits from answers of the management API, lists with one entry or none.

    Parameters:
        **used: the other fields of :class:`Limits`.
    """
    vhost = vhost_limits[0].get("value", {}) if vhost_limits else {}
    user = user_limits[0].get("value", {}) if user_limits else {}
    return Limits(
        max_queues=_limit(vhost.get("max-queues")),
        max_connections=_limit(vhost.get("max-connections")),
        user_max_connections=_limit(user.get("max-connections")),
        user_max_channels=_limit(user.get("max-channels")),
        **used,
    )


def _limit(value: object) -> Optional[int]:
    """Return a limit; RabbitMQ writes a negative number for no limit."""
    return value if isinstance(value, int) and value >= 0 else None


def recommended_shards(free: int) -> int:
    """Return a number of shards that leaves most of *free* queues to other uses."""
    spare = max(1, (free - PLAN_QUEUES) // 4)
    return min(256, 1 << (spare.bit_length() - 1))


def findings(limits: Limits, needs: Needs) -> Iterator[Finding]:
    """Yield the limits, and which of them are too low."""
    found = [
        *_queues(limits, needs),
        *_connections(limits, needs),
        *_pool_limit(needs),
        *_channels(limits),
    ]
    yield from found
    if not limits.complete:
        yield Finding(
            "limits",
            "info",
            "limits on queues and connections are unknown without the management API",
            f"compare them with the page of your plan: the app declares "
            f"up to {counted(needs.missing_queues, 'queue')}",
        )
    elif not found:
        yield Finding("limits", "ok", "no limit on queues, connections or channels is near")


def _queues(limits: Limits, needs: Needs) -> Iterator[Finding]:
    limit = limits.max_queues
    if limit is None:
        return
    free, missing = limit - limits.queues, needs.missing_queues
    plans = missing - (needs.shards - needs.shards_present)
    text = (
        f"the virtual host may have {counted(limit, 'queue')} and has {limits.queues:,}; "
        f"{counted(needs.shards - needs.shards_present, 'shard')} and "
        f"{counted(max(0, plans), 'plan queue')} of chords will be declared"
    )
    reserve = QUEUES_OF_A_WORKER + QUEUES_OF_A_WAITER
    if not missing and free >= reserve:
        return
    if free >= missing + reserve:
        yield Finding(
            "queue-limit",
            "info",
            text,
            f"nothing to do while at least {reserve} queues stay free: each worker needs "
            f"{QUEUES_OF_A_WORKER}, each process that waits {QUEUES_OF_A_WAITER}, each large "
            "result 1",
        )
        return
    shards = recommended_shards(free + needs.shards_present + needs.plans_present)
    if shards < needs.shards:
        where = ", under another result_exchange" if needs.stored else ""
        advice = (
            f"use fewer shards, as in result_backend = 'amqp://?shards={shards}'{where}, "
            "in every process; or raise the limit (max-queues)"
        )
    else:
        advice = "raise the limit (max-queues), or delete queues that nobody uses"
    yield Finding("queue-limit", "error" if free < missing else "warning", text, advice)


def _connections(limits: Limits, needs: Needs) -> Iterator[Finding]:
    worker, client = needs.worker_connections, needs.client_connections
    for whose, limit, used in (
        ("the virtual host", limits.max_connections, limits.connections),
        ("the user", limits.user_max_connections, limits.user_connections),
    ):
        if limit is None:
            continue
        enough = limit >= worker + client
        yield Finding(
            "connection-limit",
            "info" if enough else "warning",
            f"{whose} may have {counted(limit, 'connection')} and has {used:,}; a worker with "
            f"{needs.concurrency} child processes needs up to {worker}, a process that sends "
            f"tasks and waits {client}",
            "each process needs 2 connections to store and 3 to wait, a worker's main process 1 "
            "more to lead chords, and Celery its own: "
            + (
                "add up what your processes need"
                if enough
                else "use fewer child processes or --pool=threads (one process), or raise the limit"
            ),
        )


def _pool_limit(needs: Needs) -> Iterator[Finding]:
    if needs.pool_limit == 1:
        yield Finding(
            "pool-limit",
            "warning",
            "broker_pool_limit is 1: a process can store and look up results, but cannot wait for "
            "them, and a worker cannot lead chords",
            "set broker_pool_limit to 3 or more, or to 2 for processes that either wait or lead "
            "chords",
        )


def _channels(limits: Limits) -> Iterator[Finding]:
    offered = limits.channel_max
    if offered is not None and 0 < offered < CHANNELS_WANTED:
        yield Finding(
            "channel-limit",
            "error" if offered < CHANNELS_NEEDED else "info",
            f"a connection may have {counted(offered, 'channel')}",
            f"set channel_max in rabbitmq.conf to {CHANNELS_WANTED} or more: with fewer channels a "
            "look-up of many shards reads fewer of them at the same time",
        )
    limit = limits.user_max_channels
    if limit is not None:
        enough = limit >= 2 * CHANNELS_WANTED
        yield Finding(
            "channel-limit",
            "info" if enough else "warning",
            f"the user may have {counted(limit, 'channel')} in all; a look-up of many shards opens "
            f"up to {CHANNELS_WANTED}, any other connection 1 or 2",
            "add up what your processes need"
            if enough
            else "raise the limit (max-channels of the user): look-ups wait for free channels",
        )


def advice_on_refusal(text: str, shards: int) -> Optional[str]:
    """Return advice if *text*, an error of the broker, reports a reached limit, or ``None``."""
    if _REFUSED_QUEUE.search(text):
        return (
            f"the limit on queues is reached: the app uses {shards} shards; use fewer, as in "
            "result_backend = 'amqp://?shards=16', under another result_exchange, or raise the "
            "limit"
        )
    if _REFUSED_LIMIT.search(text):
        return (
            "a limit on connections or channels is reached: each process needs 2 connections to "
            "store and 3 to wait; run fewer processes, or raise the limit"
        )
    return None
