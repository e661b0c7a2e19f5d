"""Declaring the exchange and the shard queues, each once per process and connection to the broker.

A declaration of what is there already costs a fraction of a millisecond, a new queue 3 to 8: so
nothing is declared that is not used, and nothing twice. What is remembered is forgotten when a
connection is lost, since the broker may have lost what was declared, too.
"""

from __future__ import annotations

import threading
from typing import Any, Set

from amqp import exceptions as amqp_errors

from celery_amqp_results import errors
from celery_amqp_results.topology import QueueSpec, Topology

__all__ = ("Declarations", "declare_queue")


class Declarations:
    """Remembers what of a topology this process has declared. Thread-safe."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self._lock = threading.Lock()
        self._exchange = False
        self._shards: Set[int] = set()
        #: Goes up with :meth:`forget`: what is declared meanwhile is not remembered.
        self._generation = 0

    def has_shard(self, shard: int) -> bool:
        """Return whether the queue of *shard* was declared and bound by this process."""
        return shard in self._shards

    def ensure_exchange(self, channel: Any) -> None:
        """Declare the exchange, if this process has not.

        Raises:
            DeclarationRefused: when it exists with other properties.
        """
        if self._exchange:
            return
        generation = self._generation
        topology = self.topology
        try:
            channel.exchange_declare(
                topology.exchange,
                "topic",
                durable=True,
                auto_delete=False,
                arguments=topology.exchange_arguments,
            )
        except amqp_errors.PreconditionFailed as exc:
            raise errors.DeclarationRefused(
                f"the broker has an exchange {topology.exchange!r} that differs from the one "
                f"wanted here: {exc}. If the difference is in the alternate exchange, other "
                "processes spread the results over another number of shards (here it is "
                f"{topology.shards}): give all of them the same option 'shards', or this app a "
                "'result_exchange' of its own."
            ) from exc
        with self._lock:
            if generation == self._generation:
                self._exchange = True

    def ensure_shard(self, channel: Any, shard: int) -> None:
        """Declare and bind the queue of *shard*, if this process has not.

        Raises:
            DeclarationRefused: when it exists with other properties.
        """
        if shard in self._shards:
            return
        generation = self._generation
        self.ensure_exchange(channel)
        topology = self.topology
        spec = topology.shard_queue(shard)
        declare_queue(channel, spec)
        channel.queue_bind(spec.name, topology.exchange, topology.shard_binding(shard))
        with self._lock:
            if generation == self._generation:
                self._shards.add(shard)

    def forget(self) -> None:
        """Declare everything anew from now on."""
        with self._lock:
            self._generation += 1
            self._exchange = False
            self._shards = set()


def declare_queue(channel: Any, spec: QueueSpec) -> str:
    """Declare the queue *spec* on *channel* and return its name.

    Raises:
        DeclarationRefused: when it exists with other properties.
    """
    try:
        return str(
            channel.queue_declare(
                spec.name,
                durable=spec.durable,
                exclusive=spec.exclusive,
                auto_delete=spec.auto_delete,
                arguments=dict(spec.arguments),
            ).queue
        )
    except amqp_errors.PreconditionFailed as exc:
        raise errors.DeclarationRefused(
            f"the broker has a queue {spec.name!r} that differs from the one wanted here: {exc}. "
            "All processes that share results need the same option 'queue_type'; a queue of "
            "another type has to be deleted before the option can be changed, or the app given a "
            "'result_exchange' of its own."
        ) from exc
