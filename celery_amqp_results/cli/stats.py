"""``results stats``: the number, age and size of the results."""

from __future__ import annotations

import time
from typing import Any, Dict, Optional

import click

from celery_amqp_results.cli import inspection, management
from celery_amqp_results.cli.common import (
    Exit,
    Failed,
    Seconds,
    Session,
    command,
    management_options,
)
from celery_amqp_results.cli.output import age, counted, size
from celery_amqp_results.protocol.names import OVERFLOW
from celery_amqp_results.protocol.ranking import is_final

__all__ = ("stats",)

#: Counts of the shards that are read, which are estimated for all.
ESTIMATED = ("results", "running", "groups", "pages", "bytes")


@command(name="stats")
@click.option(
    "--read",
    "count",
    metavar="N",
    default="auto",
    show_default=True,
    help="Look into N shards, or 'all'; 0 for none; 'auto' for some 2,000 messages. A shard is "
    "held while it is read.",
)
@click.option(
    "--rate",
    "seconds",
    type=Seconds(min_open=True),
    metavar="SECONDS",
    help="Count what is published for so long.",
)
@management_options
def stats(session: Session, count: str, seconds: Optional[float]) -> None:
    """Show how many results are kept, in how many shards, how old and how large.

    Messages are counted exactly. Their contents are counted in some shards and estimated for all,
    see --read. Only RabbitMQ's management API knows inboxes and memory.
    """
    with inspection.Broker(session) as broker:
        api = broker.management()
        found = _kept(session, broker, count)
        found["management"] = None if api is None else _from_management(session, broker, api)
        # The API's figures may lag behind.
        found["large_bytes"] = (found["management"] or {}).get("large_bytes") or found[
            "large_bytes"
        ]
    if seconds is not None:
        found.update(_rates(session, seconds))
    _show(session, found)


def _number(text: str, shards: int) -> Optional[int]:
    """Return the number of shards to read; ``None`` for enough to estimate well."""
    if text in ("all", "auto"):
        return shards if text == "all" else None
    if not text.isdecimal():
        raise click.UsageError(f"--read is a number of shards, 'all' or 'auto', not {text!r}")
    return int(text)


def _kept(session: Session, broker: inspection.Broker, count: str) -> Dict[str, Any]:
    """Return the contents of the shards, counted in some and estimated for all.

    Results are spread evenly over the shards by their ids, whereas a message may hold one or many:
    so the estimate is by shards.
    """
    topology, lengths = broker.topology, broker.lengths()
    filled = sum(1 for length in lengths.values() if length)
    chosen = inspection.choose(lengths, _number(count, topology.shards))
    contents = broker.read(chosen)
    bodies = broker.body_bytes(contents.body_queues)

    def estimate(number: Optional[int]) -> Optional[int]:
        if number is None or (filled and not chosen):
            return None
        return round(number * filled / len(chosen)) if chosen else 0

    return {
        "broker": str(broker.properties.get("version", "?")),
        "exchange": topology.exchange,
        "queue_type": topology.queue_type,
        "shards": topology.shards,
        "shards_declared": len(lengths),
        "messages": sum(lengths.values()),
        "longest_shard": max(lengths.values(), default=0),
        "shards_read": contents.shards,
        "exact": len(chosen) == filled,
        **{name: estimate(getattr(contents, name)) for name in ESTIMATED},
        "large": estimate(len(contents.body_queues)),
        "large_bytes": estimate(bodies),
        "foreign": contents.foreign,
        "oldest_seconds": None
        if contents.oldest is None
        else max(0.0, time.time() - contents.oldest),
        "expires_seconds": session.backend.expires or None,
        "published_per_second": None,
        "ended_per_second": None,
    }


def _rates(session: Session, seconds: float) -> Dict[str, float]:
    published = ended = 0
    with session.shared_layout().tap() as tap:
        # The connection is opened before the time begins.
        tap.step(None, 0.0)
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            for state in tap.step(end, left):
                published += 1
                ended += is_final(state.state)
    return {"published_per_second": published / seconds, "ended_per_second": ended / seconds}


def _from_management(
    session: Session, broker: inspection.Broker, api: management.Management
) -> Dict[str, Any]:
    topology = broker.topology
    names = ("shard", "large", "chords")
    try:
        queues = api.queues_of(topology.prefix, *names)
        exchange = api.get("exchanges", api.vhost, topology.exchange)
        bindings = api.bindings(topology.exchange)
    except management.ManagementError as exc:
        if exc.status == 404:
            return {"url": api.url}
        raise Failed(str(exc), Exit.UNAVAILABLE) from exc
    kinds = {kind: [q for q in queues if q["name"].startswith(f"{topology.prefix}.{kind}.")]
             for kind in names}  # fmt: skip
    # Each inbox has an overflow queue beside it.
    listening = {
        binding["destination"]
        for binding in bindings
        if not binding["routing_key"].startswith(f"{OVERFLOW}.")
    }
    traffic = exchange.get("message_stats", {})
    return {
        "url": api.url,
        "memory": sum(queue.get("memory", 0) for queue in queues),
        "bytes": sum(queue.get("message_bytes", 0) for queue in kinds["shard"]),
        "large_queues": len(kinds["large"]),
        "large_bytes": sum(queue.get("message_bytes", 0) for queue in kinds["large"]),
        "chords_open": sum(queue.get("messages", 0) for queue in kinds["chords"]),
        "inboxes": len(listening),
        "bindings": len(bindings),
        "published_per_second": traffic.get("publish_in_details", {}).get("rate"),
    }


def _sizes(found: Dict[str, Any], about: str) -> str:
    """Return the size of results on the broker, for people."""
    if found["bytes"] is None:
        return "not read"
    text = f"{about}{size(found['bytes'])} in shards"
    if found["large"]:
        bodies = found["large_bytes"]
        text += ", " + ("an unknown size" if bodies is None else f"{about}{size(bodies)}")
        text += " in queues of large results"
    return text


def _show(session: Session, found: Dict[str, Any]) -> None:
    output = session.output
    if output.json:
        output.data(found)
        return
    about = "" if found["exact"] else "about "

    def number(name: str) -> str:
        return "not read" if found[name] is None else f"{about}{found[name]:,}"

    rows = {
        "broker": f"RabbitMQ {found['broker']}",
        "results": number("results"),
        "running": f"{number('running')} (states of tasks that have not ended)",
        "groups": number("groups"),
        "large": f"{number('large')} (bodies in queues of their own)",
        "messages": f"{found['messages']:,} in {found['shards_declared']} of {found['shards']} "
        f"{found['queue_type']} shards, at most {found['longest_shard']:,} in one",
        "pages": number("pages"),
        "size": _sizes(found, about),
        "oldest": age(found["oldest_seconds"]),
        "expire after": age(found["expires_seconds"]) if found["expires_seconds"] else "never",
    }
    if found["foreign"]:
        rows["foreign"] = f"{counted(found['foreign'], 'message')}, not ours or damaged"
    if found["published_per_second"] is not None:
        rows["rate"] = (
            f"{found['published_per_second']:,.1f} states/s, "
            f"{found['ended_per_second']:,.1f} results/s"
        )
    api = found["management"]
    if api is not None and "inboxes" in api:
        rows["inboxes"] = f"{api['inboxes']:,} (processes that wait or watch)"
        rows["open chords"] = f"{api['chords_open']:,}"
        rows["memory"] = size(api["memory"])
    elif api is None:
        rows["inboxes"] = "known from the management API alone (--management URL)"
    output.pairs(f"results in {found['exchange']}", rows)
    if not found["exact"] and found["shards_read"]:
        output.line(f"estimated from {found['shards_read']} shards; --read all counts", "dim")
