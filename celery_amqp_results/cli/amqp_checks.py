"""Checks of ``results doctor`` that need AMQP alone: the broker, the shards, a probe, settings."""

from __future__ import annotations

import re
import time
import uuid
from typing import Any, Iterator, List, Mapping, Optional, Tuple

import amqp
from amqp import exceptions as amqp_errors

from celery_amqp_results import errors
from celery_amqp_results.amqp.declarations import Declarations, declare_queue
from celery_amqp_results.cli import inspection
from celery_amqp_results.cli.common import Failed, Session
from celery_amqp_results.cli.findings import CLOCK_TOLERANCE, Finding
from celery_amqp_results.cli.output import age, counted, size
from celery_amqp_results.protocol.names import PLAN_QUEUES, Topology

__all__ = (
    "alarm_findings",
    "broker_findings",
    "chord_findings",
    "content_findings",
    "declaration_findings",
    "embedding_findings",
    "growth_finding",
    "old_exchange_findings",
    "permissions",
    "refused",
    "setting_findings",
)

#: The oldest RabbitMQ that the tests run on.
OLDEST = (3, 10)

#: The capabilities that the backend relies on, by the broker's names.
CAPABILITIES = (
    "publisher_confirms",
    "basic.nack",
    "consumer_cancel_notify",
    "exchange_exchange_bindings",
    "connection.blocked",
)

#: More messages than this in a shard make a look-up slow: about 0.1 ms each.
MANY_MESSAGES = 4000

#: More results than this in a shard are a risk: loose ones may take too long to read.
MANY_RESULTS = 40_000

#: Seconds of incoming results from which on their rate is credible.
MEASURABLE = 600.0

#: The largest message by default: RabbitMQ before 4.0, and since.
OLD_MESSAGE_LIMIT = 128 * 1024 * 1024
MESSAGE_LIMIT = 16 * 1024 * 1024

#: Seconds that the broker may take to report that it blocks publishers.
ALARM_TIMEOUT = 10.0


def broker_findings(properties: Mapping[str, Any]) -> Iterator[Finding]:
    """Check the version and the features of the broker, by its server *properties*."""
    version = str(properties.get("version", "?"))
    cluster = properties.get("cluster_name", "")
    product = properties.get("product", "?")
    numbers = _version(properties)
    if product != "RabbitMQ":
        yield Finding(
            "broker",
            "warning",
            f"the broker is {product} {version}, not RabbitMQ",
            "use RabbitMQ, or the layout 'per-task', which asks less of a broker",
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
        f"the broker takes results of up to {size(limit)} unless its max_message_size says "
        "otherwise",
        "nothing to do unless tasks return that much: keep such values elsewhere, and return "
        "where they are",
    )


def embedding_findings(properties: Mapping[str, Any], queue_type: str) -> Iterator[Finding]:
    """Recommend where RabbitMQ 4 should keep the messages of classic queues."""
    if queue_type == "classic" and _version(properties) >= (4, 0):
        yield Finding(
            "message-store",
            "info",
            "a classic queue of RabbitMQ 4 opens and closes a file for each result that is stored",
            "if results are a large part of the broker's work, set queue_index_embed_msgs_below = "
            "0 in rabbitmq.conf: it saves 28 to 45 % of the processor time of a stored result and "
            "costs 200 bytes of memory for each result that no reader has packed yet; it concerns "
            "all classic queues of the broker",
        )


def chord_findings(broker: inspection.Broker) -> Iterator[Finding]:
    """Find plans of chords that no worker leads."""
    topology = broker.topology
    plans = 0
    stuck: List[str] = []
    for number in range(PLAN_QUEUES):
        name = topology.plan_queue(number).name
        try:
            found = broker.count(name)
        except Failed:
            # This user lacks the permission to see it.
            return
        messages, consumers = found or (0, 0)
        if messages and not consumers:
            plans += messages
            stuck.append(name)
    if stuck:
        yield Finding(
            "chords",
            "warning",
            f"{counted(plans, 'chord')} in {counted(len(stuck), 'plan queue')}, of which no worker "
            f"is the leader: {', '.join(stuck[:3])}{', ...' if len(stuck) > 3 else ''}",
            "start a worker of this app: the main process of each worker leads chords. If workers "
            "run, check that they have this version and may read these queues",
        )


def _version(properties: Mapping[str, Any]) -> Tuple[int, ...]:
    """Return the first two numbers of the broker's version."""
    return tuple(int(n) for n in re.findall(r"\d+", str(properties.get("version", "?")))[:2])


def alarm_findings(broker: inspection.Broker) -> Iterator[Finding]:
    """Check whether the broker blocks publishers.

    It reports that only to a connection that publishes. The messages published here have no queue.
    """
    # A separate connection: during the alarm a connection that has published hears nothing more.
    link = broker.connector.open(0.0)
    try:
        settled: List[int] = []
        channel = link.channel()
        channel.confirm_select()
        channel.events["basic_ack"].add(lambda tag, multiple: settled.append(tag))
        nowhere = f"doctor-{uuid.uuid4()}"
        end = time.monotonic() + ALARM_TIMEOUT
        # The broker still accepts the first message, and may confirm it before it reports the
        # alarm.
        for number in (1, 2):
            channel.basic_publish(amqp.Message(b"", delivery_mode=1), routing_key=nowhere)
            while len(settled) < number and link.blocked is None:
                left = end - time.monotonic()
                if left <= 0:
                    break
                link.drain(left)
        if link.blocked is not None or len(settled) < 2:
            why = link.blocked or f"it has not confirmed a message within {ALARM_TIMEOUT:g} s"
            yield Finding(
                "alarm",
                "error",
                f"the broker blocks publishers ({why}): nothing can be stored or looked up, and "
                "the shards were not looked into",
                "free memory or disk space on the broker, or raise its limit: see "
                "`rabbitmq-diagnostics alarms`",
            )
    finally:
        # A blocked connection cannot be closed with the protocol's handshake.
        link.drop()


def declaration_findings(session: Session, broker: inspection.Broker) -> Iterator[Finding]:
    """Compare the declared objects with the settings; declare nothing that is missing."""
    topology, declare = broker.topology, session.backend.options.declare
    found = broker.exists(topology.exchange)
    if found is False:
        yield _missing_exchange(topology.exchange, declare)
    elif declare:
        try:
            Declarations(topology).ensure_exchange(broker.channel)
        except errors.DeclarationRefused as exc:
            yield Finding(
                "exchange",
                "error",
                str(exc),
                "give all processes the same options 'shards' and 'queue_type', or this app a "
                "result_exchange of its own",
            )
            return
        except amqp_errors.AccessRefused:
            yield _not_compared("exchange", topology.exchange)
    try:
        lengths = broker.lengths()
    except Failed as exc:
        yield Finding("permissions", "error", exc.message, permissions(topology))
        return
    for shard in sorted(lengths)[:1] if declare else ():
        queue = topology.shard_queue(shard)
        try:
            declare_queue(broker.channel, queue)
        except errors.DeclarationRefused as exc:
            yield Finding(
                "queue-type",
                "error",
                str(exc),
                "set the option 'queue_type' to what the queues are; to change it, give this app "
                "another result_exchange, or delete the queue if it is the only one and empty",
            )
            return
        except amqp_errors.AccessRefused:
            yield _not_compared("queue-type", queue.name)
    yield _shard_count(len(lengths), topology, declare)


def _shard_count(there: int, topology: Topology, declare: bool) -> Finding:
    count = f"{there} of {topology.shards} {topology.queue_type} shards are there"
    if there == topology.shards:
        return Finding("declarations", "ok", count)
    if declare:
        return Finding(
            "declarations", "ok", f"{count}; each is declared when its first result is stored"
        )
    return Finding(
        "declarations",
        "error",
        f"{count}, and the option 'declare' is false: what belongs into the others cannot be "
        "stored",
        _DEFINITIONS,
    )


_DEFINITIONS = (
    "import what `python -m celery_amqp_results.definitions` prints with `rabbitmqctl "
    "import_definitions`, as a user who may declare"
)


def _missing_exchange(name: str, declare: bool) -> Finding:
    if declare:
        return Finding(
            "exchange",
            "info",
            f"{name} is not there yet: nothing was stored so far",
            "nothing to do: it is declared when the first result is stored",
        )
    return Finding(
        "exchange", "error", f"{name} is not there, and the option 'declare' is false", _DEFINITIONS
    )


def _not_compared(check: str, name: str) -> Finding:
    return Finding(
        check,
        "info",
        f"{name} was not compared with the settings: this user may not configure it",
        "run the doctor as a user who may store results as well",
    )


def refused(topology: Topology, exc: BaseException) -> Finding:
    """Return the finding that the broker refused an operation."""
    return Finding("permissions", "error", f"the broker refuses us: {exc}", permissions(topology))


def permissions(topology: Topology) -> str:
    """Return advice about the permissions that the user lacks."""
    prefix = re.escape(topology.prefix).replace("\\-", "-")
    return (
        f"allow the user configure and read on ^({prefix}\\..*|amq\\.gen-.*)$ and write on "
        f"^({prefix}\\..*|amq\\.gen-.*|amq\\.default)$ besides what it has"
    )


def growth_finding(
    results: float, seconds: float, expires: float, shards: int
) -> Optional[Finding]:
    """Warn where more results will be kept than a shard can hold.

    Parameters:
        results, seconds: how many are kept now, and the age of the oldest of them.
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
        f"at {rate:,.{1 if rate < 10 else 0}f} results a second there will be {each:,.0f} in each "
        f"shard when the first expire, in {age(expires - seconds)}",
        "a shard that is never looked up can be read only up to some 60,000 to 100,000: shorten "
        f"result_expires, set ignore_result where nobody reads, or use {wanted} shards under "
        "another result_exchange",
    )


def content_findings(session: Session, broker: inspection.Broker) -> Iterator[Finding]:
    """Check the lengths of the shards, and the contents of some of them."""
    lengths = broker.lengths()
    shards = broker.topology.shards
    yield _length_finding(lengths, shards)
    filled = [shard for shard, length in lengths.items() if length]
    contents = broker.read(inspection.spread(sorted(filled), 4))
    expires = session.backend.config.expirations.result
    if contents.shards and contents.oldest is not None and expires is not None:
        kept = (contents.results + contents.running) * len(filled) / contents.shards
        growth = growth_finding(kept, time.time() - contents.oldest, expires / 1000, shards)
        if growth is not None:
            yield growth
    yield from _oddities(contents, expires)


def _length_finding(lengths: Mapping[int, int], shards: int) -> Finding:
    total, longest = sum(lengths.values()), max(lengths.values(), default=0)
    if longest > MANY_MESSAGES:
        wanted = min(4096, 1 << (shards * longest // MANY_MESSAGES).bit_length())
        return Finding(
            "shards",
            "warning",
            f"a shard has {longest:,} messages, of {total:,} in {shards} shards: look-ups in it "
            f"take about {longest / 10000:.1f} s",
            "they are packed when they are read: if nobody reads results, set ignore_result; "
            f"otherwise shorten result_expires, or use {wanted} shards under another "
            "result_exchange",
        )
    return Finding(
        "shards",
        "ok",
        f"{counted(total, 'message')}, at most {longest:,} in one of {shards} shards",
    )


def _oddities(contents: inspection.Contents, expires: Optional[int]) -> Iterator[Finding]:
    """Yield what should not be in the shards."""
    if contents.foreign:
        yield Finding(
            "foreign",
            "warning",
            f"damaged, or not ours: {counted(contents.foreign, 'message')} in "
            f"{counted(contents.shards, 'shard')}",
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
            f"sent, and nothing stored since: {counted(contents.sent, 'task')} in "
            f"{counted(contents.shards, 'shard')}, the oldest {waiting} ago",
            "they wait for a worker, run without track_started, ignore their results, or were "
            "lost with their queue: see `celery inspect reserved` and the lengths of the queues",
        )
    if contents.everlasting and expires is not None:
        yield Finding(
            "everlasting",
            "info",
            f"kept without expiry: {counted(contents.everlasting, 'state')} in "
            f"{counted(contents.shards, 'shard')}",
            "they were stored with result_expires = None or 0: forget them",
        )


def old_exchange_findings(broker: inspection.Broker) -> Iterator[Finding]:
    """Check whether Celery 4's exchange exists."""
    name = broker.topology.prefix
    if broker.exists(name):
        yield Finding(
            "leftovers",
            "info",
            f"there is an exchange {name!r}, as Celery 4 and the layout 'per-task' have it",
            "if nobody uses it any more: `celery results migrate`, then delete it",
        )


def setting_findings(session: Session) -> Iterator[Finding]:
    """Yield settings with consequences."""
    backend, conf = session.backend, session.app.conf
    if backend.config.expirations.result is None:
        yield Finding(
            "expiry",
            "warning",
            "result_expires is 0 or None: what is stored is kept until it is forgotten",
            "set result_expires, or have every reader forget() what it has read",
        )
    else:
        yield Finding(
            "expiry", "ok", f"results expire after {age(backend.config.expirations.result / 1000)}"
        )
    if not backend.persistent:
        yield Finding(
            "persistence",
            "info",
            "result_persistent is false: results are gone when the broker restarts",
            "nothing to do if that is wanted",
        )
    if not backend.options.confirm:
        yield Finding(
            "confirms",
            "info",
            "the option confirm is false: a result that the broker did not get is not noticed",
            "nothing to do if speed counts for more than results",
        )
    if "pickle" in (conf.result_accept_content or conf.accept_content or ()):
        yield Finding(
            "pickle",
            "warning",
            "pickle is accepted: who may publish to the exchange can run code in every reader",
            "remove it from accept_content and result_accept_content",
        )
