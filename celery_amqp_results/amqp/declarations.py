"""Declaring the exchange once per process and connection, and a shard queue when it is missing.

Declaring something that exists costs a fraction of a millisecond, a new queue 3 to 8 ms. So nothing
is declared before it is used, and nothing twice. When a connection is lost the process forgets what
it has declared, since the broker may have lost that, too.
"""

from __future__ import annotations

import threading
import time
import uuid
from typing import Any, Callable, Optional, Set

import amqp
from amqp import exceptions as amqp_errors

from celery_amqp_results import errors
from celery_amqp_results.amqp import failures
from celery_amqp_results.protocol.names import QueueSpec, Topology

#: Seconds for which no queue is declared after the broker has refused one because of a limit.
LIMIT_PAUSE = 60.0

#: How many queues of a limit are left to other programs, above all to the app's own workers.
ROOM = 4
#: An app with at most this number of shards was given its share of a limit.
FEW_SHARDS = 16

__all__ = ("Declarations", "declare_exchange", "declare_queue")


class Declarations:
    """Remembers which parts of a topology this process has declared. Thread-safe.

    Parameters:
        declare: whether the exchange and the shards are declared here; otherwise they must exist.
    """

    def __init__(self, topology: Topology, declare: bool = True) -> None:
        self.topology = topology
        self.declare = declare
        self._lock = threading.Lock()
        self._exchange = False
        self._shards: Set[int] = set()
        #: The broker's limit on queues and its error text, once it has refused one.
        self._limit: Optional[int] = None
        self._limited_by = ""
        #: When to ask it again.
        self._asked_again = 0.0
        #: Incremented by :meth:`forget`: concurrent declarations are not remembered.
        self._generation = 0

    @property
    def few(self) -> bool:
        """Whether the shards are so few that they are declared without a question about limits."""
        return self.topology.shards <= FEW_SHARDS

    def knows(self, shard: Optional[int]) -> bool:
        """Return whether the queue of *shard* was there when this process last used it."""
        return shard is None or shard in self._shards

    def remember(self, shard: int) -> None:
        """Note that the queue of *shard* is there."""
        with self._lock:
            self._shards.add(shard)

    def ensure_exchange(self, channel: amqp.Channel) -> None:
        """Declare the exchange, if this process has not.

        Raises:
            DeclarationRefused: when it exists with other properties, or is missing and must not be
                declared here.
        """
        if self._exchange:
            return
        generation = self._generation
        topology = self.topology
        try:
            if self.declare:
                declare_exchange(channel, topology)
            else:
                # This needs no permission.
                channel.exchange_declare(topology.exchange, "topic", passive=True)
        except amqp_errors.NotFound as exc:
            raise self.missing(f"exchange {topology.exchange!r}") from exc
        except amqp_errors.PreconditionFailed as exc:
            raise errors.DeclarationRefused(
                f"the broker has an exchange {topology.exchange!r} that differs from the one "
                f"wanted here: {exc}. If the difference is in the alternate exchange, other "
                "processes spread the results over another number of shards, or over queues of "
                f"another type (here it is {topology.shards} of type {topology.queue_type}): give "
                "all of them the same options 'shards' and 'queue_type', or this app a "
                "'result_exchange' of its own."
            ) from exc
        with self._lock:
            if generation == self._generation:
                self._exchange = True

    def check_exchange(self, channel: amqp.Channel) -> None:
        """Check once that the exchange has the expected properties, if it exists.

        For processes that only read and declare nothing: they learn that others count the shards
        differently. A user who may not declare the exchange reads on without this check.

        Raises:
            DeclarationRefused: when it exists with other properties.
        """
        try:
            channel.exchange_declare(self.topology.exchange, "topic", passive=True)
            # A passive declaration compares nothing.
            self.ensure_exchange(channel)
        except amqp_errors.NotFound:
            # No process has stored anything yet.
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

    def request_shard(self, channel: amqp.Channel, shard: int) -> None:
        """Ask for the queue of *shard* to be declared.

        Does not wait for an answer. If the broker refuses, it closes the channel, and
        :meth:`refusal` explains the error.
        """
        _declare_queue(channel, self.topology.shard_queue(shard), nowait=True)

    def refusal(self, exc: BaseException) -> Optional[Exception]:
        """Return the error to raise for *exc*, or ``None`` if it is not about a declaration."""
        if not self.declare and isinstance(exc, amqp_errors.NotFound):
            return self.missing(f"exchange or queue that results need ({exc})")
        limit = failures.limit_of(exc)
        if limit is not None and limit.what == failures.QUEUES:
            return self._limited(limit.number, exc)
        # The other cause of a failed precondition is the size of a message.
        if not isinstance(exc, amqp_errors.PreconditionFailed) or "inequivalent arg" not in str(
            exc
        ):
            return None
        return _refused(exc)

    def check_limit(self) -> None:
        """Raise if the broker has recently refused a queue because of a limit.

        Other programs need queues as well, above all the queues of tasks.

        Raises:
            BackendUnavailable: which names the limit.
        """
        if self._limit is not None and time.monotonic() < self._asked_again:
            raise self._too_many_queues()

    def check_room(
        self, asking: Callable[[], amqp.Channel], count: int
    ) -> Optional[errors.BackendUnavailable]:
        """Return the error to raise instead of declaring *count* shards, or ``None``.

        AMQP does not tell a limit on queues before it is reached. So this declares *count* and
        :data:`ROOM` queues, and deletes them at once.

        Parameters:
            asking: returns an open channel, which the broker closes if they do not fit.
        """
        if not count or self.few:
            return None
        channel = asking()
        probe = f"{self.topology.prefix}.room.{uuid.uuid4().hex}"
        names = [f"{probe}.{number}" for number in range(ROOM + count)]
        refusal = None
        try:
            for name in names:
                nowait = name is not names[-1]
                channel.queue_declare(name, exclusive=True, auto_delete=True, nowait=nowait)
        except amqp_errors.ChannelError as exc:
            # py-amqp has opened the channel again.
            limit = failures.limit_of(exc)
            if limit is None or limit.what != failures.QUEUES:
                # A user without the permission does without this check.
                return None
            refusal = self._limited(limit.number, exc)
        # The shard is declared on another channel, so wait until these are gone.
        for name in names:
            channel.queue_delete(name, nowait=name is not names[-1])
        return refusal

    def _limited(self, number: int, exc: BaseException) -> errors.BackendUnavailable:
        """Remember that the broker allows *number* queues, and return the error that says so."""
        with self._lock:
            self._limit = number
            self._asked_again = time.monotonic() + LIMIT_PAUSE
            self._limited_by = str(exc)
        return self._too_many_queues()

    def _too_many_queues(self) -> errors.BackendUnavailable:
        shards = self.topology.shards
        fewer = max(1, min(16, (self._limit or 0) // 4))
        return errors.BackendUnavailable(
            f"the broker allows {self._limit} queues, and results are spread over {shards}: "
            f"{self._limited_by}. The last {ROOM} are left to other programs. "
            "Let results use fewer: give all processes the option "
            f"'shards', as in '?shards={fewer}' in the result backend URL, and this app a "
            "'result_exchange' of its own. Or raise that limit."
        )

    def forget(self) -> None:
        """Declare everything anew from now on."""
        with self._lock:
            self._generation += 1
            self._exchange = False
            self._shards.clear()


def declare_exchange(channel: amqp.Channel, topology: Topology, nowait: bool = False) -> None:
    """Declare the exchange on *channel*.

    Parameters:
        nowait: whether to skip waiting for an answer. If the broker refuses, it closes the channel.

    Raises:
        amqp.PreconditionFailed: when it exists with other properties, and an answer is waited for.
    """
    channel.exchange_declare(
        topology.exchange,
        "topic",
        durable=True,
        auto_delete=False,
        arguments=topology.exchange_arguments,
        nowait=nowait,
    )


def declare_queue(channel: amqp.Channel, spec: QueueSpec) -> int:
    """Declare the queue *spec* on *channel*, and return how many read it already.

    Raises:
        DeclarationRefused: when it exists with other properties.
    """
    try:
        declared = _declare_queue(channel, spec)
    except amqp_errors.PreconditionFailed as exc:
        raise _refused(exc) from exc
    return int(declared.consumer_count)


def _declare_queue(channel: amqp.Channel, spec: QueueSpec, nowait: bool = False) -> Any:
    return channel.queue_declare(
        spec.name,
        durable=spec.durable,
        exclusive=spec.exclusive,
        auto_delete=spec.auto_delete,
        arguments=dict(spec.arguments),
        nowait=nowait,
    )


def _refused(exc: BaseException) -> errors.DeclarationRefused:
    return errors.DeclarationRefused(
        f"the broker has a queue that differs from the one wanted here: {exc}. All processes that "
        "share results need the same option 'queue_type'; a queue of another type has to be "
        "deleted before the option can be changed, or the app given a 'result_exchange' of its "
        "own."
    )
