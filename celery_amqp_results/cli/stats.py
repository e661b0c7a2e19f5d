"""``results stats``: how much is kept, and where."""

from __future__ import annotations

import time
from typing import Any, Dict, Optional

import click

from celery_amqp_results.cli.common import (
    Exit,
    Failed,
    Session,
    command,
    management_options,
    shared_only,
)
from celery_amqp_results.cli.output import age, counted, size
from celery_amqp_results.protocol.ranking import is_final

__all__ = ("stats",)


@command(name="stats")
@click.option(
    "--read",
    "count",
    metavar="N",
    default="8",
    show_default=True,
    help="Look into so many shards, or 'all'; 0 for none. A shard is held while it is read.",
)
@click.option(
    "--rate",
    "seconds",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Count what is published for so long.",
)
@management_options
def stats(
    session: Session,
    count: str,
    seconds: Optional[float],
    management_url: Optional[str],
    no_management: bool,
) -> None:
    """Show how many results are kept, in how many shards, how old and how large.

    Messages are counted exactly. What is in them is counted in some shards and estimated for all,
    see --read. Inboxes and memory are known from RabbitMQ's management API alone.
    """
    from celery_amqp_results.cli import inspection

    shared_only(session, "stats")
    wanted = _number(count)
    with inspection.Broker(session) as broker:
        api = broker.management(management_url, guess=not no_management)
        lengths = broker.lengths()
        filled = sorted(shard for shard, length in lengths.items() if length)
        chosen = filled if wanted is None else inspection.spread(filled, wanted)
        contents = broker.read(chosen)
        messages = sum(lengths.values())
        inside = sum(lengths[shard] for shard in chosen)
        # The messages weigh the shards that were not read.
        scale = messages / inside if inside else 0.0
        found: Dict[str, Any] = {
            "broker": broker.version,
            "exchange": broker.topology.exchange,
            "queue_type": broker.topology.queue_type,
            "shards": broker.topology.shards,
            "shards_declared": len(lengths),
            "messages": messages,
            "longest_shard": max(lengths.values(), default=0),
            "shards_read": contents.shards,
            "exact": len(chosen) == len(filled),
            "results": round(contents.results * scale) if chosen or not filled else None,
            "running": round(contents.running * scale) if chosen or not filled else None,
            "groups": round(contents.groups * scale) if chosen or not filled else None,
            "pages": round(contents.pages * scale) if chosen or not filled else None,
            "bytes": round(contents.bytes * scale) if chosen or not filled else None,
            "large": round(len(contents.body_queues) * scale) if chosen or not filled else None,
            "foreign": contents.foreign,
            "oldest_seconds": None
            if contents.oldest is None
            else max(0.0, time.time() - contents.oldest),
            "expires_seconds": session.backend.expires or None,
            "published_per_second": None,
            "ended_per_second": None,
            "management": None if api is None else _from_management(session, broker, api),
        }
    if seconds is not None:
        found.update(_rates(session, seconds))
    _show(session, found)


def _number(text: str) -> Optional[int]:
    if text == "all":
        return None
    if not text.isdecimal():
        raise click.UsageError(f"--read is a number of shards or 'all', not {text!r}")
    return int(text)


def _rates(session: Session, seconds: float) -> Dict[str, float]:

    published = ended = 0
    end = time.monotonic() + seconds
    with session.backend.layout.tap() as tap:
        while (left := end - time.monotonic()) > 0:
            for state in tap.step(end, left):
                published += 1
                ended += is_final(state.state)
    return {"published_per_second": published / seconds, "ended_per_second": ended / seconds}


def _from_management(session: Session, broker: Any, api: Any) -> Dict[str, Any]:
    import re

    from celery_amqp_results.cli import management
    from celery_amqp_results.protocol.names import OVERFLOW

    topology = broker.topology
    prefix = re.escape(topology.prefix)
    try:
        queues = api.queues(f"^{prefix}\\.(shard|large|chord)\\.")
        bindings = api.get("exchanges", api.vhost, topology.exchange, "bindings", "source")
        exchange = api.get("exchanges", api.vhost, topology.exchange)
    except management.ManagementError as exc:
        if exc.status == 404:
            return {"url": api.url}
        raise Failed(str(exc), Exit.UNAVAILABLE) from exc
    kinds = {kind: [q for q in queues if q["name"].startswith(f"{topology.prefix}.{kind}.")]
             for kind in ("shard", "large", "chord")}  # fmt: skip
    # Beside each inbox is a queue that tells when it was full.
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
        "chords_open": len(kinds["chord"]),
        "inboxes": len(listening),
        "bindings": len(bindings),
        "published_per_second": traffic.get("publish_in_details", {}).get("rate"),
    }


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
        "size": "not read" if found["bytes"] is None else f"{about}{size(found['bytes'])}",
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
        rows["open chords"] = f"{api['chords_open']:,} queues"
        rows["memory"] = size(api["memory"])
    elif api is None:
        rows["inboxes"] = "known from the management API alone (--management URL)"
    output.pairs(f"results in {found['exchange']}", rows)
    if not found["exact"] and found["shards_read"]:
        output.line(f"estimated from {found['shards_read']} shards; --read all counts", "dim")
