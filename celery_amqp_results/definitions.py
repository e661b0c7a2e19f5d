"""Prints the broker definitions for deployments in which processes declare nothing.

::

    python -m celery_amqp_results.definitions --shards 64 > results.json
    rabbitmqctl import_definitions results.json
"""

from __future__ import annotations

import argparse
import json
from typing import Optional, Sequence

from celery_amqp_results.options import MAX_SHARDS, QUEUE_TYPES, Options
from celery_amqp_results.protocol.names import Topology

__all__ = ("main",)


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m celery_amqp_results.definitions",
        description="Print the exchange and the queues that results need, as RabbitMQ's "
        "definitions, for apps with the option declare=false.",
    )
    parser.add_argument(
        "--result-exchange",
        default="celeryresults",
        help="the setting result_exchange; %(default)s by default",
    )
    parser.add_argument(
        "--shards",
        type=_shards,
        default=Options.shards,
        help="the option of that name; %(default)s by default",
    )
    parser.add_argument(
        "--queue-type",
        choices=QUEUE_TYPES,
        default=Options.queue_type,
        help="the option queue_type; %(default)s by default",
    )
    parser.add_argument(
        "--vhost", default="/", help="name of the virtual host; %(default)s by default"
    )
    chosen = parser.parse_args(arguments)
    topology = Topology(chosen.result_exchange, chosen.shards, chosen.queue_type)
    print(json.dumps(topology.definitions(chosen.vhost), indent=1))


def _shards(text: str) -> int:
    number = int(text)
    if not 1 <= number <= MAX_SHARDS:
        raise argparse.ArgumentTypeError(f"{text} is not in 1 to {MAX_SHARDS}")
    return number


if __name__ == "__main__":
    main()
