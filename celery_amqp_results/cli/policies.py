"""Decide which RabbitMQ policies harm results, chords and inboxes. Pure: no I/O.

The management API provides the queues and the policies; this module interprets them.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

from celery_amqp_results.cli.findings import Finding
from celery_amqp_results.config import Expirations
from celery_amqp_results.protocol.names import Topology
from celery_amqp_results.waiting.tap import MAX_QUEUED

__all__ = ("Role", "applied", "findings", "roles")

#: Milliseconds that a busy process may leave states in its inbox.
INBOX_PATIENCE = 60_000

#: By key of a policy: severity and effect for queues that keep messages.
_KEEPING = {
    "max-length": ("error", "drops or refuses {what} when a queue is that long"),
    "max-length-bytes": ("error", "drops or refuses {what} when a queue is that large"),
    "message-ttl": ("warning", "drops {what} before they expire"),
    "expires": ("error", "deletes a queue with all that is in it when nobody reads it"),
    "delivery-limit": ("error", "drops {what} that are delivered often: every read counts"),
    "dead-letter-exchange": ("warning", "sends each message that expires to another exchange"),
}

#: The same for inboxes, which pass states on: a dropped state is still in its shard.
_PASSING = {
    "max-length": ("warning", "drops {what} that a busy process has not taken yet"),
    "max-length-bytes": ("warning", "drops {what} that a busy process has not taken yet"),
    "message-ttl": ("warning", "drops {what} that a busy process has not taken yet"),
}


@dataclasses.dataclass(frozen=True)
class Role:
    """A kind of queue that the backend uses.

    Parameters:
        what: its contents, for people.
        prefix: the beginning of these queues' names.
        example: the name of one of them, which need not exist.
        queue_type: ``classic`` or ``quorum``.
        leave_out: the names that a pattern must exclude.
        keeps: milliseconds for which a message must be kept; ``None`` for ever.
        harms: by key of a policy, severity and effect.
        longest: the most messages by its own argument; ``None`` for no limit.
    """

    what: str
    prefix: str
    example: str
    queue_type: str
    leave_out: str
    keeps: Optional[int]
    harms: Mapping[str, Tuple[str, str]] = dataclasses.field(repr=False)
    longest: Optional[int] = None

    def harm(self, key: str, value: str) -> Optional[Tuple[str, str]]:
        """Return severity and effect of a policy's key on these queues, or ``None``."""
        if key not in self.harms or (key == "delivery-limit" and self.queue_type != "quorum"):
            return None
        number = int(value) if value.isdecimal() else None
        if number is not None:
            if key == "message-ttl" and self.keeps is not None and number >= self.keeps:
                # It only drops messages that have expired anyway.
                return None
            if key == "max-length" and self.longest is not None and number >= self.longest:
                return None
        severity, effect = self.harms[key]
        return severity, effect.format(what=self.what)


def roles(topology: Topology, expirations: Expirations) -> List[Role]:
    """Return the kinds of queues of the layout ``shared``."""
    ours, kind = f"{topology.prefix}.", topology.queue_type
    large = topology.large_queue("task", "mark").name

    def keeping(what: str, name: str, example: str, keeps: Optional[int]) -> Role:
        return Role(what, f"{ours}{name}.", example, kind, ours, keeps, _KEEPING)

    return [
        keeping("results", "shard", topology.shard_queue_name(0), expirations.result),
        keeping("results", "large", large, expirations.result),
        keeping("chords", "chords", topology.plan_queue(0).name, expirations.chord),
        Role(
            "states in inboxes",
            "amq.gen-",
            "amq.gen-doctor",
            "classic",
            "amq.gen-",
            INBOX_PATIENCE,
            _PASSING,
            MAX_QUEUED,
        ),
    ]


def findings(
    kinds: Sequence[Role],
    queues: Sequence[Mapping[str, Any]],
    policies: Iterable[Sequence[Mapping[str, Any]]],
) -> Iterator[Finding]:
    """Yield the effects of policies on the backend's queues, existing or not.

    Parameters:
        kinds: the return value of :func:`roles`.
        queues: the existing queues, as the management API describes them.
        policies: the policies, and then the operator policies, for queues that do not exist yet;
            iterated only if some are missing.
    """
    #: By role, source, key and value: an affected queue.
    found: Dict[Tuple[int, str, str, str], str] = {}
    missing = []
    for number, role in enumerate(kinds):
        present = [queue for queue in queues if queue["name"].startswith(role.prefix)]
        if not present:
            missing.append((number, role))
        for queue in present:
            # The combination of the queue's policy and operator policy.
            definition = queue.get("effective_policy_definition") or {}
            names = [queue[kind] for kind in ("policy", "operator_policy") if queue.get(kind)]
            if isinstance(definition, dict):
                for key, value in definition.items():
                    by = " or ".join(map(repr, names))
                    found.setdefault((number, by, key, str(value)), queue["name"])
    for each in policies if missing else ():
        for number, role in missing:
            policy = applied(each, role.example, role.queue_type)
            if policy is not None:
                for key, value in policy["definition"].items():
                    found.setdefault((number, repr(policy["name"]), key, str(value)), role.example)
    harmful = False
    for (number, by, key, value), queue_name in found.items():
        harm = kinds[number].harm(key, value)
        if harm is not None:
            harmful = True
            severity, effect = harm
            yield Finding(
                "policy",
                severity,
                f"the policy {by} sets {key} = {value} on {queue_name!r}, which {effect}",
                "change its pattern so that it leaves out names that begin with "
                f"'{kinds[number].leave_out}'",
            )
    if not harmful:
        yield Finding("policy", "ok", "no policy changes what becomes of results and chords")


def applied(
    policies: Sequence[Mapping[str, Any]], name: str, queue_type: str
) -> Optional[Mapping[str, Any]]:
    """Return the one of *policies* that applies to a queue: that with the highest priority."""
    matching = [
        policy
        for policy in policies
        if policy.get("apply-to") in ("all", "queues", f"{queue_type}_queues")
        and _matches(policy["pattern"], name)
    ]
    return max(matching, key=lambda policy: int(policy.get("priority", 0)), default=None)


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error:
        # Erlang's syntax has a few elements that Python's has not.
        return False
