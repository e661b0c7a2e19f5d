"""``results doctor``: what is wrong, or will be, and what to do about it."""

from __future__ import annotations

import dataclasses
import re
import time
import uuid
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import click
from amqp import exceptions as amqp_errors
from celery import states
from celery.app.task import Context

from celery_amqp_results import errors, expiry
from celery_amqp_results.cli.common import (
    Exit,
    Failed,
    Session,
    command,
    management_options,
    shared_only,
)
from celery_amqp_results.cli.output import STYLES, age, size

__all__ = ("Finding", "doctor", "growth_finding", "policy_findings")

#: Oldest RabbitMQ that the tests run on.
OLDEST = (3, 10)

#: What the backend relies on, by the broker's names.
CAPABILITIES = (
    "publisher_confirms",
    "basic.nack",
    "consumer_cancel_notify",
    "exchange_exchange_bindings",
    "connection.blocked",
)

#: More messages than this in a shard make a look-up slow: about 0.1 ms each.
MANY_MESSAGES = 4000

#: More results than this in a shard are a risk: loose ones could not be read in time.
MANY_RESULTS = 40_000

#: Seconds for which results have to come before their rate is believed.
MEASURABLE = 600.0

#: The largest message by default: RabbitMQ before 4.0, and since.
OLD_MESSAGE_LIMIT = 128 * 1024 * 1024
MESSAGE_LIMIT = 16 * 1024 * 1024

#: Clocks may differ by so many seconds.
CLOCK_TOLERANCE = 5.0

#: Seconds within which the result of the probe has to be seen.
PROBE_TIMEOUT = 20.0
PROBE_EXPIRES = 60

#: What a policy may do to our queues, and what becomes of results.
POLICY_TRAPS = {
    "max-length": ("error", "drops or refuses results when a shard is that long"),
    "max-length-bytes": ("error", "drops or refuses results when a shard is that large"),
    "message-ttl": ("warning", "drops results earlier than result_expires if it is shorter"),
    "expires": ("error", "deletes a shard with all its results when nobody reads it"),
    "delivery-limit": ("error", "drops results that are looked up often: every read counts"),
    "dead-letter-exchange": ("warning", "sends each result that expires to another exchange"),
    "alternate-exchange": ("info", "has no effect: the exchange has one by argument"),
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    #: Stable name of the check.
    check: str
    #: ``ok``, ``info``, ``warning`` or ``error``.
    severity: str
    text: str
    #: What to do; empty where there is nothing.
    advice: str = ""


@command(name="doctor")
@click.option("--no-probe", is_flag=True, help="Publish nothing: do not store and read a result.")
@click.option("--strict", is_flag=True, help="Exit with 1 for warnings as well.")
@management_options
def doctor(
    session: Session,
    no_probe: bool,
    strict: bool,
    management_url: Optional[str],
    no_management: bool,
) -> None:
    """Look for what is wrong, or will be, and say what to do.

    One result is stored, waited for, looked up and forgotten, unless --no-probe is given. Policies,
    alarms and leftovers are known from RabbitMQ's management API alone. Exits with 1 when there is
    an error.
    """
    from celery_amqp_results.cli import inspection

    shared_only(session, "doctor")
    findings: List[Finding] = []
    with inspection.Broker(session) as broker:
        api = broker.management(management_url, guess=not no_management)
        findings += _broker(broker)
        declared = list(_declarations(broker))
        findings += declared
        usable = all(finding.severity != "error" for finding in declared)
        if usable:
            findings += _contents(session, broker)
        if usable and not no_probe:
            findings += _probe(session)
        findings += _old_exchange(session, broker)
        if api is None:
            findings.append(
                Finding(
                    "management",
                    "info",
                    "the management API was not asked: policies, alarms and leftovers are unknown",
                    "give its address with --management http://user:password@host:15672",
                )
            )
        else:
            findings += _from_management(session, broker, api)
    findings += _settings(session)
    worst = {finding.severity for finding in findings}
    _show(session, findings)
    if "error" in worst or (strict and "warning" in worst):
        session.end(Exit.FAILED)


def _show(session: Session, findings: List[Finding]) -> None:
    output = session.output
    if output.json:
        output.data({"findings": [dataclasses.asdict(finding) for finding in findings]})
        return
    marks = {"ok": "ok", "info": "info", "warning": "WARN", "error": "ERROR"}
    for finding in findings:
        if output.console is None:
            output.line(f"{marks[finding.severity]:5}  {finding.check}: {finding.text}")
            if finding.advice:
                output.line(f"       -> {finding.advice}")
            continue
        from rich.table import Table
        from rich.text import Text

        style = STYLES[finding.severity]
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=2)
        grid.add_column(width=12, no_wrap=True)
        grid.add_column(overflow="fold")
        sign = {"ok": "✔", "info": "•", "warning": "▲", "error": "✘"}[finding.severity]
        text = Text(finding.text)
        if finding.advice:
            text.append(f"\n→ {finding.advice}", style=style)
        grid.add_row(Text(sign, style=style), Text(finding.check, style="dim"), text)
        output.console.print(grid)
    counts = {s: sum(f.severity == s for f in findings) for s in ("error", "warning")}
    style = "error" if counts["error"] else "warning" if counts["warning"] else "ok"
    output.line(f"{counts['error']} errors, {counts['warning']} warnings", STYLES[style])


def _broker(broker: Any) -> Iterator[Finding]:
    properties = broker.properties
    version = broker.version
    cluster = properties.get("cluster_name", "")
    product = properties.get("product", "?")
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if product != "RabbitMQ":
        yield Finding(
            "broker",
            "warning",
            f"the broker is {product} {version}, not RabbitMQ",
            "the layout 'per-task' asks less of a broker",
        )
    elif numbers < OLDEST:
        yield Finding(
            "broker",
            "warning",
            f"RabbitMQ {version} is older than what is tested, 3.10",
            "upgrade RabbitMQ",
        )
    else:
        yield Finding("broker", "ok", f"RabbitMQ {version}, cluster {cluster}")
    capabilities = properties.get("capabilities", {})
    missing = [name for name in CAPABILITIES if not capabilities.get(name)]
    if missing:
        yield Finding(
            "features",
            "error",
            f"the broker lacks {', '.join(missing)}",
            "use RabbitMQ 3.10 or later",
        )
    limit = MESSAGE_LIMIT if numbers >= (4, 0) else OLD_MESSAGE_LIMIT
    yield Finding(
        "message-size",
        "info",
        f"the broker takes messages of up to {size(limit)} unless max_message_size says otherwise",
        "keep larger values elsewhere, and return where they are",
    )


def _declarations(broker: Any) -> Iterator[Finding]:
    """Compare what is there with what the settings say; declare nothing that is not there."""
    from celery_amqp_results.declarations import Declarations, declare_queue

    topology = broker.topology
    try:
        Declarations(topology).check_exchange(broker.channel)
    except errors.DeclarationRefused as exc:
        yield Finding(
            "exchange",
            "error",
            str(exc),
            "give all processes the same option 'shards', or this app a result_exchange of its own",
        )
        return
    except amqp_errors.AccessRefused as exc:
        yield Finding("permissions", "error", str(exc), _permissions(topology))
        return
    if not broker.has_exchange(topology.exchange):
        yield Finding(
            "exchange", "info", f"{topology.exchange} is not there yet: nothing was stored"
        )
    try:
        lengths = broker.lengths()
    except Failed as exc:
        yield Finding("permissions", "error", exc.message, _permissions(topology))
        return
    for shard in sorted(lengths)[:1]:
        try:
            declare_queue(broker.channel, topology.shard_queue(shard))
        except errors.DeclarationRefused as exc:
            yield Finding(
                "queue-type",
                "error",
                str(exc),
                "set the option 'queue_type' to what the queues are, or see 'Changing shards or "
                "the queue type' in docs/operations.md",
            )
            return
        except amqp_errors.AccessRefused as exc:
            yield Finding("permissions", "error", str(exc), _permissions(topology))
            return
    yield Finding(
        "declarations",
        "ok",
        f"{len(lengths)} of {topology.shards} {topology.queue_type} shards are there, as the "
        "settings say",
    )


def _permissions(topology: Any) -> str:
    prefix = re.escape(topology.prefix).replace("\\-", "-")
    return (
        f"allow configure and read on ^({prefix}\\..*|amq\\.gen-.*)$ and write on "
        f"^({prefix}\\..*|amq\\.gen-.*|amq\\.default)$"
    )


def growth_finding(
    results: float, seconds: float, expires: float, shards: int
) -> Optional[Finding]:
    """Return what is to be said of the number of results that will be kept, if anything.

    Parameters:
        results: how many are kept now.
        seconds: age of the oldest of them.
        expires: seconds after which they expire.
        shards: number of shards.
    """
    if seconds < MEASURABLE or seconds >= expires:
        # Too early to tell, or there are as many as there will be.
        return None
    rate = results / seconds
    each = rate * expires / shards
    if each <= MANY_RESULTS:
        return None
    wanted = min(4096, 1 << int(rate * expires / MANY_RESULTS).bit_length())
    return Finding(
        "growth",
        "warning",
        f"at {rate:,.0f} results a second there will be {each:,.0f} in each shard when the first "
        f"expire, in {age(expires - seconds)}",
        "a shard that is never looked up can be read only up to some 60,000: shorten "
        f"result_expires, set ignore_result where nobody reads, or use {wanted} shards under "
        "another result_exchange",
    )


def _contents(session: Session, broker: Any) -> Iterator[Finding]:
    from celery_amqp_results.cli import inspection

    lengths = broker.lengths()
    total, shards = sum(lengths.values()), broker.topology.shards
    longest = max(lengths.values(), default=0)
    if longest > MANY_MESSAGES:
        wanted = min(4096, 1 << (shards * longest // MANY_MESSAGES).bit_length())
        yield Finding(
            "shards",
            "warning",
            f"a shard has {longest:,} messages, of {total:,} in {shards} shards: look-ups in it "
            f"take about {longest / 10000:.1f} s",
            "they are packed when they are read: if nobody reads results, set ignore_result; "
            f"otherwise shorten result_expires, or use {wanted} shards under another "
            "result_exchange",
        )
    else:
        yield Finding(
            "shards",
            "ok",
            f"{total:,} messages, at most {longest:,} in one of {shards} shards",
        )
    filled = [shard for shard, length in lengths.items() if length]
    contents = broker.read(inspection.spread(sorted(filled), 4))
    expires = session.backend._expiration
    if contents.shards and contents.oldest is not None and expires is not None:
        kept = (contents.results + contents.running) * len(filled) / contents.shards
        growth = growth_finding(kept, time.time() - contents.oldest, expires / 1000, shards)
        if growth is not None:
            yield growth
    if contents.foreign:
        yield Finding(
            "foreign",
            "warning",
            f"{contents.foreign} messages in {contents.shards} shards are damaged or not ours",
            "find out who publishes them: only this backend may write to these queues",
        )
    if contents.ahead > CLOCK_TOLERANCE:
        yield Finding(
            "clock",
            "warning",
            f"a state was published {age(contents.ahead)} ahead of this machine's clock",
            "have the clocks of workers and readers set by NTP: of two states the later counts",
        )
    if contents.sent:
        waiting = age(time.time() - (contents.sent_since or time.time()))
        yield Finding(
            "sent",
            "info",
            f"{contents.sent} tasks in {contents.shards} shards were sent and have stored "
            f"nothing so far, the oldest {waiting} ago",
            "they wait for a worker, run without track_started, ignore their results, or were "
            "lost with their queue: see `celery inspect reserved` and the lengths of the queues",
        )
    if contents.everlasting and session.backend._expiration is not None:
        yield Finding(
            "everlasting",
            "info",
            f"{contents.everlasting} states in {contents.shards} shards never expire",
            "they were stored with result_expires = None or 0: forget them",
        )


def _probe(session: Session) -> Iterator[Finding]:
    """Store a result, wait for it, look it up and forget it."""
    backend = session.backend
    task_id = f"doctor-{uuid.uuid4()}"
    took: List[Tuple[str, float]] = []

    def timed(name: str, function: Callable[[], Any]) -> Any:
        started = time.monotonic()
        value = function()
        took.append((name, time.monotonic() - started))
        return value

    # What is left of it where this process is killed goes by itself.
    request = Context(id=task_id, **{expiry.NAME: PROBE_EXPIRES})
    try:
        timed(
            "store",
            lambda: backend.store_result(task_id, "probe", states.SUCCESS, request=request),
        )
        got = timed("wait", lambda: list(backend.get_many([task_id], timeout=PROBE_TIMEOUT)))
        timed("look up", lambda: backend.layout.store.read((task_id,)))
        timed("forget", lambda: backend.forget(task_id))
    except (errors.BackendUnavailable, errors.DeclarationRefused) as exc:
        done = ", ".join(name for name, _ in took) or "nothing"
        yield Finding(
            "probe",
            "error",
            f"a result could not be stored and read: {exc} (worked: {done})",
            f"check alarms and permissions: {_permissions(backend._topology)}",
        )
        return
    if not got or got[0][1]["result"] != "probe":
        yield Finding("probe", "error", f"a result came back as {got!r:.200}", "report this")
        return
    spent = ", ".join(f"{name} {seconds * 1000:.0f} ms" for name, seconds in took)
    yield Finding("probe", "ok", f"a result was stored, waited for, looked up, forgotten: {spent}")


def _old_exchange(session: Session, broker: Any) -> Iterator[Finding]:
    name = broker.topology.prefix
    if broker.has_exchange(name):
        yield Finding(
            "leftovers",
            "info",
            f"there is an exchange {name!r}, as Celery 4 and the layout 'per-task' have it",
            "if nobody uses it any more: `celery results migrate`, then delete it",
        )


def _settings(session: Session) -> Iterator[Finding]:
    backend, conf = session.backend, session.app.conf
    if backend._expiration is None:
        yield Finding(
            "expiry",
            "warning",
            "result_expires is 0 or None: what is stored is kept until it is forgotten",
            "set result_expires, or have every reader forget() what it has read",
        )
    else:
        yield Finding("expiry", "ok", f"results expire after {age(backend._expiration / 1000)}")
    if not backend.persistent:
        yield Finding(
            "persistence",
            "info",
            "result_persistent is false: results are gone when the broker restarts",
        )
    if not backend.options.confirm:
        yield Finding(
            "confirms",
            "info",
            "the option confirm is false: a result that the broker did not get is not noticed",
        )
    if "pickle" in (conf.result_accept_content or conf.accept_content or ()):
        yield Finding(
            "pickle",
            "warning",
            "pickle is accepted: who may publish to the exchange can run code in every reader",
            "remove it from accept_content and result_accept_content",
        )


def _from_management(session: Session, broker: Any, api: Any) -> Iterator[Finding]:
    from celery_amqp_results.cli import management

    topology = broker.topology
    checks: Tuple[Callable[[], Iterator[Finding]], ...] = (
        lambda: policy_findings(topology, api),
        lambda: _nodes(topology, api),
        lambda: _leftovers(topology, api),
        lambda: _large_forever(session, topology, api),
    )
    for check in checks:
        try:
            yield from check()
        except management.ManagementError as exc:
            yield Finding(
                "management",
                "info",
                str(exc),
                "a user with the tag 'monitoring' sees nodes, one with 'policymaker' policies",
            )
    if api.skew is not None and abs(api.skew) > CLOCK_TOLERANCE:
        yield Finding(
            "clock",
            "warning",
            f"the broker's clock differs from this one by {age(abs(api.skew))}",
            "have the clocks set by NTP",
        )


def policy_findings(topology: Any, api: Any) -> Iterator[Finding]:
    """Yield what policies do to the shards, whether these are there yet or not.

    Raises:
        ManagementError: when the management API does not tell.
    """
    name = topology.shard_queue(0).name
    found: Dict[Tuple[str, str, Any], str] = {}
    for queue in api.queues(f"^{re.escape(topology.prefix)}\\.(shard|large|chord)\\."):
        # What both policies together make of the queue.
        definition = queue.get("effective_policy_definition") or {}
        policy = queue.get("policy") or queue.get("operator_policy")
        if isinstance(definition, dict):
            for key, value in definition.items():
                found.setdefault((str(policy), key, str(value)), queue["name"])
    if not found:
        for kind in ("policies", "operator-policies"):
            matching = [
                policy
                for policy in api.get(kind, api.vhost)
                if policy.get("apply-to") != "exchanges" and _matches(policy["pattern"], name)
            ]
            for policy in sorted(matching, key=lambda p: -int(p.get("priority", 0)))[:1]:
                for key, value in policy["definition"].items():
                    found.setdefault((policy["name"], key, str(value)), name)
    bad = False
    for (policy, key, value), queue_name in found.items():
        if key not in POLICY_TRAPS:
            continue
        severity, what = POLICY_TRAPS[key]
        bad = bad or severity != "info"
        yield Finding(
            "policy",
            severity,
            f"the policy {policy!r} sets {key} = {value} on {queue_name!r}, which {what}",
            f"change its pattern so that it leaves out names that begin with '{topology.prefix}.'",
        )
    if not bad:
        yield Finding("policy", "ok", "no policy changes the queues of results")


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error:
        return False


def _nodes(topology: Any, api: Any) -> Iterator[Finding]:
    nodes = api.get("nodes")
    for node in nodes:
        for alarm in ("mem_alarm", "disk_free_alarm"):
            if node.get(alarm):
                yield Finding(
                    "alarm",
                    "error",
                    f"{node['name']} has a {'memory' if alarm == 'mem_alarm' else 'disk'} alarm: "
                    "nothing can be published",
                    "free memory or disk space on that node, or raise its limit",
                )
    if len(nodes) > 1 and topology.queue_type == "classic":
        yield Finding(
            "cluster",
            "warning",
            f"the cluster has {len(nodes)} nodes, and classic queues have one copy each",
            "use the option queue_type = 'quorum', under another result_exchange",
        )


def _leftovers(topology: Any, api: Any) -> Iterator[Finding]:
    from celery_amqp_results.cli.migrate import old_queues

    old = old_queues(api, topology.prefix)
    if old:
        yield Finding(
            "leftovers",
            "warning",
            f"{len(old)} queues of single tasks, as Celery 4 and the layout 'per-task' make them",
            "if nobody uses them any more: `celery results migrate` collects or deletes them",
        )
    uuid_pattern = "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"
    rpc = [q for q in api.queues(uuid_pattern) if not q.get("consumers")]
    if rpc:
        yield Finding(
            "leftovers",
            "info",
            f"{len(rpc)} queues that nobody reads are named as rpc:// names its own",
            "they expire by themselves (result_expires) unless a policy prevents it",
        )


def _large_forever(session: Session, topology: Any, api: Any) -> Iterator[Finding]:
    large = api.queues(f"^{re.escape(topology.prefix)}\\.large\\.")
    forever = [q for q in large if not (q.get("arguments") or {}).get("x-expires")]
    if forever:
        yield Finding(
            "large",
            "warning",
            f"{len(forever)} of {len(large)} large results have queues that never expire",
            "set result_expires, and forget large results",
        )
