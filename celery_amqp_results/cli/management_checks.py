"""Checks of ``results doctor`` that need RabbitMQ's management API: policies, alarms, leftovers."""

from __future__ import annotations

import re
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from celery_amqp_results.cli import management
from celery_amqp_results.cli.common import Session
from celery_amqp_results.cli.findings import CLOCK_TOLERANCE, Finding
from celery_amqp_results.cli.migrate import old_queues
from celery_amqp_results.cli.output import age, counted
from celery_amqp_results.protocol.names import Topology

__all__ = ("clock_finding", "management_findings", "node_findings")

#: What a policy may do to our queues, and what becomes of results.
POLICY_TRAPS = {
    "max-length": ("error", "drops or refuses results when a queue is that long"),
    "max-length-bytes": ("error", "drops or refuses results when a queue is that large"),
    "message-ttl": ("warning", "drops results before they expire"),
    "expires": ("error", "deletes a queue with all that is in it when nobody reads it"),
    "delivery-limit": ("error", "drops results that are looked up often: every read counts"),
    "dead-letter-exchange": ("warning", "sends each result that expires to another exchange"),
}

#: What ``apply-to`` of a policy has to be for it to concern queues, besides the type itself.
_QUEUES = ("all", "queues")

#: How ``rpc://`` names its queues.
_RPC = "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"


def management_findings(session: Session, topology: Topology, api: Any) -> Iterator[Finding]:
    """Yield all that the management API knows of; what it does not tell is a finding as well.

    Parameters:
        session: the command's.
        topology: names of our queues.
        api: a :class:`celery_amqp_results.cli.management.Management`.
    """
    expires = session.backend._expiration
    checks: Tuple[Callable[[], Iterator[Finding]], ...] = (
        lambda: _policies(topology, api, expires),
        lambda: node_findings(api.get("nodes"), topology.queue_type),
        lambda: _old_queues(topology, api),
        lambda: _rpc_queues(api),
        lambda: _large_forever(topology, api),
    )
    for check in checks:
        try:
            yield from check()
        except management.ManagementError as exc:
            yield Finding(
                "management",
                "info",
                str(exc),
                "give the user the tag 'monitoring' for nodes, and 'policymaker' for policies: "
                "`rabbitmqctl set_user_tags USER monitoring policymaker`",
            )
    found = clock_finding(api.skew)
    if found is not None:
        yield found


def clock_finding(skew: Optional[float]) -> Optional[Finding]:
    """Return what is to be said of the broker's clock, if anything.

    Parameters:
        skew: seconds that it is ahead of ours, or ``None`` where that is not known.
    """
    if skew is None or abs(skew) <= CLOCK_TOLERANCE:
        return None
    return Finding(
        "clock",
        "warning",
        f"the broker's clock differs from this one by {age(abs(skew))}",
        "have the clocks set by NTP",
    )


# -- policies --------------------------------------------------------------------------------------


def _policies(topology: Topology, api: Any, expires: Optional[int]) -> Iterator[Finding]:
    """Yield what policies do to our queues, whether these are there yet or not."""
    #: By what sets it, key and value: a queue that it concerns.
    found: Dict[Tuple[str, str, str], str] = {}
    queues = api.queues(f"^{re.escape(topology.prefix)}\\.(shard|large|chord)\\.")
    for queue in queues:
        # What the policy and the operator policy together make of the queue.
        definition = queue.get("effective_policy_definition") or {}
        names = [queue.get(kind) for kind in ("policy", "operator_policy") if queue.get(kind)]
        if isinstance(definition, dict):
            for key, value in definition.items():
                found.setdefault((" or ".join(map(repr, names)), key, str(value)), queue["name"])
    # Of those that are not there yet, by name.
    expected = (
        topology.shard_queue(0).name,
        topology.large_queue("task", "mark").name,
        topology.chord_queue("group").name,
    )
    absent = [
        name
        for name in expected
        if not any(queue["name"].startswith(_kind(topology, name)) for queue in queues)
    ]
    if absent:
        for kind in ("policies", "operator-policies"):
            policies = api.get(kind, api.vhost)
            for name in absent:
                applied = _applied(policies, name, topology.queue_type)
                if applied is not None:
                    for key, value in applied["definition"].items():
                        found.setdefault((repr(applied["name"]), key, str(value)), name)
    harmful = False
    for (names_of, key, value), queue_name in found.items():
        if not _harms(key, value, topology.queue_type, expires):
            continue
        harmful = True
        severity, what = POLICY_TRAPS[key]
        yield Finding(
            "policy",
            severity,
            f"the policy {names_of} sets {key} = {value} on {queue_name!r}, which {what}",
            f"change its pattern so that it leaves out names that begin with '{topology.prefix}.'",
        )
    if not harmful:
        yield Finding("policy", "ok", "no policy changes what becomes of results")


def _kind(topology: Topology, name: str) -> str:
    """Return what the names of all queues of one kind begin with."""
    return f"{topology.prefix}.{name[len(topology.prefix) + 1 :].split('.')[0]}."


def _applied(
    policies: Sequence[Mapping[str, Any]], name: str, queue_type: str
) -> Optional[Mapping[str, Any]]:
    """Return the one of *policies* that a queue would be given: that of the highest priority."""
    matching = [
        policy
        for policy in policies
        if policy.get("apply-to") in (*_QUEUES, f"{queue_type}_queues")
        and _matches(policy["pattern"], name)
    ]
    return max(matching, key=lambda policy: int(policy.get("priority", 0)), default=None)


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error:
        # Erlang has a few things that Python has not.
        return False


def _harms(key: str, value: str, queue_type: str, expires: Optional[int]) -> bool:
    """Return whether a policy's key harms results in queues of that type."""
    if key not in POLICY_TRAPS or (key == "delivery-limit" and queue_type != "quorum"):
        return False
    if key == "message-ttl" and expires is not None and value.isdecimal():
        # It drops nothing that has not expired.
        return int(value) < expires
    return True


# -- nodes -----------------------------------------------------------------------------------------


def node_findings(nodes: Sequence[Mapping[str, Any]], queue_type: str) -> Iterator[Finding]:
    """Yield alarms, and whether the queues are of a type for a cluster.

    Parameters:
        nodes: what the management API says of each node.
        queue_type: type of our queues.
    """
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


def _old_queues(topology: Topology, api: Any) -> Iterator[Finding]:
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


def _rpc_queues(api: Any) -> Iterator[Finding]:
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


def _large_forever(topology: Topology, api: Any) -> Iterator[Finding]:
    large = api.queues(f"^{re.escape(topology.prefix)}\\.large\\.")
    forever = [q for q in large if not (q.get("arguments") or {}).get("x-expires")]
    if forever:
        yield Finding(
            "large",
            "warning",
            f"{len(forever)} of {len(large)} queues of large results never expire",
            "set result_expires, and forget large results",
        )
