"""Declaring the exchange and the shard queues, each once per process and connection to the broker.

A declaration of what is there already costs a fraction of a millisecond, a new queue 3 to 8: so
nothing is declared that is not used, and nothing twice. What is remembered is forgotten when a
connection is lost, since the broker may have lost what was declared, too.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Dict, Mapping, Optional

from amqp import exceptions as amqp_errors

from celery_amqp_results import errors
from celery_amqp_results.topology import QueueSpec, Topology

__all__ = ("Declarations", "declare_queue")

#: A shard is looked for again after so many seconds, at its next use. What reaches an inbox does
#: not come back to its publisher, who so learns in no other way that somebody has deleted a shard.
RECHECK_SECONDS = 60.0
#: It is declared and bound again after so many seconds: the binding may be gone, and the queue not.
#: That costs more, 2 ms on RabbitMQ 4.3, which writes a binding to the disk although it is there.
REASSERT_SECONDS = 600.0


class Declarations:
    """Remembers what of a topology this process has declared. Thread-safe.

    Parameters:
        topology: names and queue arguments.
        declare: whether the exchange and the shards are declared here; else they have to be there.
    """

    def __init__(self, topology: Topology, declare: bool = True) -> None:
        self.topology = topology
        self.declare = declare
        self._lock = threading.Lock()
        self._exchange = False
        #: When each shard was declared, and last seen, by ``time.monotonic``.
        self._shards: Dict[int, float] = {}
        self._seen: Dict[int, float] = {}
        #: Goes up with :meth:`forget`: what is declared meanwhile is not remembered.
        self.generation = 0

    def has_shard(self, shard: int) -> bool:
        """Return whether this process has declared and bound the queue of *shard* of late."""
        declared = self._shards.get(shard)
        return declared is not None and time.monotonic() - declared < REASSERT_SECONDS

    def is_due(self, shard: int) -> bool:
        """Return whether the queue of *shard*, which is there, is to be looked for again."""
        seen = self._seen.get(shard)
        return seen is not None and time.monotonic() - seen >= RECHECK_SECONDS

    def note_seen(self, shard: int) -> None:
        """Note that the queue of *shard* is there."""
        with self._lock:
            if shard in self._shards:
                self._seen[shard] = time.monotonic()

    def ensure_exchange(self, channel: Any) -> None:
        """Declare the exchange, if this process has not.

        Raises:
            DeclarationRefused: when it exists with other properties, or does not exist and is not
                to be declared here.
        """
        if self._exchange:
            return
        generation = self.generation
        topology = self.topology
        if not self.declare:
            try:
                # This needs no permission.
                channel.exchange_declare(topology.exchange, "topic", passive=True)
            except amqp_errors.NotFound as exc:
                raise self.missing(f"exchange {topology.exchange!r}") from exc
            with self._lock:
                self._exchange = generation == self.generation
            return
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
            if generation == self.generation:
                self._exchange = True

    def check_exchange(self, channel: Any) -> None:
        """Find out, once, whether the exchange is as it should be, if it is there at all.

        For those who only read, and declare nothing: it tells them that others count the shards
        differently. A user who may not declare the exchange is not told, and reads on.

        Raises:
            DeclarationRefused: when it exists with other properties.
        """
        try:
            channel.exchange_declare(self.topology.exchange, "topic", passive=True)
            # A passive declaration compares nothing.
            self.ensure_exchange(channel)
        except amqp_errors.NotFound:
            # Nobody has stored anything yet.
            pass
        except amqp_errors.AccessRefused:
            self._exchange = True

    @property
    def exchange_checked(self) -> bool:
        """Whether the exchange was declared or checked by this process."""
        return self._exchange

    def missing(self, what: str) -> errors.DeclarationRefused:
        """Return the error for something that others should have declared."""
        return errors.DeclarationRefused(
            f"the broker has no {what}, and the option 'declare' is false. Somebody who may has to "
            "declare what results need: 'python -m celery_amqp_results.definitions' prints it for "
            "'rabbitmqctl import_definitions'."
        )

    def request_shard(self, channel: Any, shard: int) -> int:
        """Ask for the queue of *shard* to be declared and bound.

        The exchange must be there. No answer is waited for: where the broker refuses, it closes
        the channel, and :meth:`refusal` says what that means. Until something that was published
        on the channel afterwards is confirmed, the queue may not be there: another connection is
        not to count on it, since what it publishes would reach inboxes, and be kept by nobody.

        Returns:
            The generation, for :meth:`remember`.
        """
        generation = self.generation
        topology = self.topology
        spec = topology.shard_queue(shard)
        if not self.declare:
            # It has to be there. This needs no permission.
            channel.queue_declare(spec.name, passive=True, nowait=True)
            return generation
        channel.queue_declare(
            spec.name,
            durable=spec.durable,
            exclusive=spec.exclusive,
            auto_delete=spec.auto_delete,
            arguments=dict(spec.arguments),
            nowait=True,
        )
        channel.queue_bind(spec.name, topology.exchange, topology.shard_binding(shard), nowait=True)
        return generation

    def remember(self, requested: Mapping[int, int]) -> None:
        """Remember that shards are there.

        Parameters:
            requested: by their numbers, what :meth:`request_shard` returned.
        """
        with self._lock:
            now = time.monotonic()
            for shard, generation in requested.items():
                if generation == self.generation:
                    self._shards[shard] = self._seen[shard] = now

    def refusal(self, exc: BaseException) -> Optional[errors.DeclarationRefused]:
        """Return the error to raise for *exc*, or ``None`` if it is not about a declaration."""
        if not self.declare and isinstance(exc, amqp_errors.NotFound):
            return self.missing(f"exchange or queue that results need ({exc})")
        # What a precondition failed of otherwise is the size of a message.
        if not isinstance(exc, amqp_errors.PreconditionFailed) or "inequivalent arg" not in str(
            exc
        ):
            return None
        return _refused(exc)

    def forget(self) -> None:
        """Declare everything anew from now on."""
        with self._lock:
            self.generation += 1
            self._exchange = False
            self._shards = {}
            self._seen = {}


def declare_queue(channel: Any, spec: QueueSpec) -> int:
    """Declare the queue *spec* on *channel*, and return how many read it already.

    Raises:
        DeclarationRefused: when it exists with other properties.
    """
    try:
        declared = channel.queue_declare(
            spec.name,
            durable=spec.durable,
            exclusive=spec.exclusive,
            auto_delete=spec.auto_delete,
            arguments=dict(spec.arguments),
        )
    except amqp_errors.PreconditionFailed as exc:
        raise _refused(exc) from exc
    return int(declared.consumer_count)


def _refused(exc: BaseException) -> errors.DeclarationRefused:
    return errors.DeclarationRefused(
        f"the broker has a queue that differs from the one wanted here: {exc}. All processes that "
        "share results need the same option 'queue_type'; a queue of another type has to be "
        "deleted before the option can be changed, or the app given a 'result_exchange' of its "
        "own."
    )
