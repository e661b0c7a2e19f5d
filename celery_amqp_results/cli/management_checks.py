"""Checks of ``results doctor`` that need RabbitMQ's management API: policies, alarms, leftovers."""

from __future__ import annotations

import os
from typing import Any, Callable, Iterator, List, Mapping, Optional, Sequence, Tuple

from celery_amqp_results.cli import inspection, limits, management, policies
from celery_amqp_results.cli.common import Session
from celery_amqp_results.cli.findings import CLOCK_TOLERANCE, Finding
from celery_amqp_results.cli.migrate import old_queues
from celery_amqp_results.cli.output import age, counted
from celery_amqp_results.protocol.names import Topology

__all__ = ("checks", "clock_findings", "limit_findings", "node_findings", "refused")

#: The pattern of ``rpc://`` queue names.
_RPC = "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"


def checks(
    session: Session, topology: Topology, api: management.Management
) -> Tuple[Callable[[], Iterator[Finding]], ...]:
    """Return the checks, some of which the management API may refuse to this user."""
    return (
        lambda: _policies(session, topology, api),
        lambda: node_findings(api.get("nodes"), topology.queue_type),
        lambda: _old_queues(topology, api),
        lambda: _rpc_queues(api),
        lambda: _large_forever(topology, api),
        lambda: clock_findings(api.skew),
    )


def refused(exc: management.ManagementError) -> Finding:
    """Return the finding that the management API refused a request."""
    return Finding(
        "management",
        "info",
        str(exc),
        "give the user the tag 'monitoring' for nodes, and 'policymaker' for policies: "
        "`rabbitmqctl set_user_tags USER monitoring policymaker`",
    )


# -- limits ----------------------------------------------------------------------------------------


def limit_findings(
    session: Session, broker: inspection.Broker, api: Optional[management.Management]
) -> Iterator[Finding]:
    """Compare limits on queues, connections and channels with the needs of the app.

    Without *api*, only the limits of the connection are known.
    """
    channels = broker.channel_max
    if api is None:
        known = limits.Limits(channel_max=channels, complete=False)
    else:
        connections = api.get("connections")
        known = limits.limits_from(
            api.get("vhost-limits", api.vhost),
            api.get("user-limits", api.user),
            queues=int(api.get("queues", api.vhost, page=1, page_size=1)["total_count"]),
            connections=sum(each.get("vhost") == api.vhost for each in connections),
            user_connections=sum(each.get("user") == api.user for each in connections),
            channel_max=channels,
        )
    yield from limits.findings(known, _needs(session, broker, api))


def _needs(
    session: Session, broker: inspection.Broker, api: Optional[management.Management]
) -> limits.Needs:
    topology, conf = broker.topology, session.app.conf
    queues = [] if api is None else api.queues_of(topology.prefix, "shard", "chords")
    names = [queue["name"] for queue in queues]
    return limits.Needs(
        shards=topology.shards,
        shards_present=sum(name.startswith(f"{topology.prefix}.shard.") for name in names),
        plans_present=sum(name.startswith(f"{topology.prefix}.chords.") for name in names),
        stored=bool(broker.exists(topology.exchange)),
        declare=session.backend.options.declare,
        concurrency=conf.worker_concurrency or os.cpu_count() or 1,
        pool_limit=conf.broker_pool_limit,
    )


def clock_findings(skew: Optional[float]) -> Iterator[Finding]:
    """Warn if the clock of the broker is *skew* seconds ahead of ours, or behind."""
    if skew is not None and abs(skew) > CLOCK_TOLERANCE:
        yield Finding(
            "clock",
            "warning",
            f"the broker's clock differs from this one by {age(abs(skew))}",
            "have the clocks set by NTP",
        )


# -- policies --------------------------------------------------------------------------------------


def _policies(
    session: Session, topology: Topology, api: management.Management
) -> Iterator[Finding]:
    """Yield the effects of policies on our queues, existing or not."""
    queues = api.queues_of(topology.prefix, "shard", "large", "chords")
    inboxes = {binding["destination"] for binding in api.bindings(topology.exchange)}
    if inboxes:
        queues += [queue for queue in api.queues("^amq\\.gen-") if queue["name"] in inboxes]
    kinds = policies.roles(topology, session.backend.config.expirations)
    asked = (api.get(kind, api.vhost) for kind in ("policies", "operator-policies"))
    yield from policies.findings(kinds, queues, asked)


# -- nodes -----------------------------------------------------------------------------------------


def node_findings(nodes: Sequence[Mapping[str, Any]], queue_type: str) -> Iterator[Finding]:
    """Yield alarms, and whether the type of the queues suits a cluster."""
    for node in nodes:
        for alarm, resource in (("mem_alarm", "memory"), ("disk_free_alarm", "disk")):
            if node.get(alarm):
                yield Finding(
                    "alarm",
                    "error",
                    f"{node['name']} has a {resource} alarm: nothing can be published",
                    f"free {resource}{' space' if resource == 'disk' else ''} on that node, or "
                    "raise its limit",
                )
    if len(nodes) > 1 and queue_type == "classic":
        yield Finding(
            "cluster",
            "warning",
            f"the cluster has {len(nodes)} nodes, and classic queues have one copy each",
            "use the option queue_type = 'quorum', under another result_exchange",
        )


# -- leftovers -------------------------------------------------------------------------------------


def _old_queues(topology: Topology, api: management.Management) -> Iterator[Finding]:
    old = old_queues(api, topology.prefix)
    if old:
        yield Finding(
            "leftovers",
            "warning",
            f"{counted(len(old), 'queue')} of single tasks, as Celery 4 and the layout 'per-task' "
            "make them",
            "if nobody uses them any more: `celery results migrate` moves the results out of "
            "them, with --delete it only deletes them",
        )


def _rpc_queues(api: management.Management) -> Iterator[Finding]:
    unread = [queue for queue in api.queues(_RPC) if not queue.get("consumers")]
    going: List[str] = []
    staying: List[str] = []
    for queue in unread:
        expire = (queue.get("arguments") or {}).get("x-expires")
        (going if expire else staying).append(queue["name"])
    if going:
        yield Finding(
            "leftovers",
            "info",
            f"{counted(len(going), 'queue')} that nobody reads, named as rpc:// names its own",
            "nothing to do: they expire by themselves, after the result_expires of their apps",
        )
    if staying:
        yield Finding(
            "leftovers",
            "warning",
            f"{counted(len(staying), 'queue')} that nobody reads and that never expire, named as "
            "rpc:// names its own",
            "if no client of rpc:// uses them any more, delete them: `rabbitmqctl delete_queue "
            f"{staying[0]}`",
        )


def _large_forever(topology: Topology, api: management.Management) -> Iterator[Finding]:
    large = api.queues_of(topology.prefix, "large")
    forever = [q for q in large if not (q.get("arguments") or {}).get("x-expires")]
    if forever:
        yield Finding(
            "large",
            "warning",
            f"{len(forever)} of {len(large)} queues of large results never expire",
            "set result_expires, and forget large results",
        )
