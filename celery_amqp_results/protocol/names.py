"""Names, routing keys, and arguments of everything the backend declares on the broker.

::

    shard queues     <result_exchange>.shard.<n>           not bound; keep every state
    topic exchange   <result_exchange>.states              gets a copy of every state
    plan queues      <result_exchange>.chords.<n>          not bound; plans of chords
    large results    <result_exchange>.large.<task>.<mark> not bound; the body of one result
    inbox            named by the broker, exclusive        bound with  *.<client>.#, *.all.#, <n>.#
                                                            or *.*.*.#, and barrier.<random>
    leader's inbox   named by the broker, exclusive        bound with  *.*.<n>.#
    routing key      <shard>.<client>.<plan queue>.<group>.<task>.<STATE>

This module does no I/O and knows nothing of connections. ``docs/wire.md`` describes the same for
programs in other languages: a change here needs a change there.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import uuid
import zlib
from typing import Dict, Mapping, Optional

from celery_amqp_results import errors
from celery_amqp_results.protocol.message import StateMessage

__all__ = (
    "ABSENT",
    "BROADCAST",
    "OVERFLOW",
    "PLAN_QUEUES",
    "QueueSpec",
    "Route",
    "Topology",
    "barrier_key",
    "client_word",
    "encode_word",
    "plan_number",
)

#: Stands in a routing key for an absent word.
ABSENT = "-"

#: Milliseconds that a quorum queue waits for a reader whose node it cannot reach. The nodes of a
#: cluster may lose contact for a moment.
DISCONNECTED_TIMEOUT = 1000

#: Stands for the client in the routing key of a state whose writer does not know who sent the task:
#: a revoke, a chord that failed, a task replaced by another. Every inbox receives these states,
#: since the sender of the task may wait for them. It is not a digest.
BROADCAST = "all"

#: First word of the key by which an overflowing inbox reports that; not a shard number.
OVERFLOW = "overflow"

#: Number of queues for the plans of chords. Every process must use the same number.
PLAN_QUEUES = 8

#: A word of a routing key is at most this long; a longer one is replaced by its digest. Six words,
#: of which two are numbers and one is a digest of 16, then always fit the 255 bytes of a key.
MAX_WORD = 72

_SAFE = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")


@functools.lru_cache(maxsize=4096)
def encode_word(value: Optional[str]) -> str:
    """Return *value* as one word of a routing key.

    Letters, digits, ``_`` and ``-`` stand for themselves, anything else for ``%XX`` of its UTF-8
    bytes, so that a dot does not end the word and ``*`` and ``#`` can be bound literally. A word
    longer than :data:`MAX_WORD` becomes ``~`` and a digest. Different values give different words,
    except ``None`` and the empty text, which give :data:`ABSENT`.
    """
    if not value:
        return ABSENT
    if value == ABSENT:
        return "%2D"
    if len(value) <= MAX_WORD and _SAFE.issuperset(value):
        return value
    # Lone surrogates are not valid UTF-8, but legal in a Python string and so in a task id.
    raw = value.encode("utf-8", "surrogatepass")
    if len(raw) <= MAX_WORD:
        word = "".join(chr(b) if chr(b) in _SAFE else f"%{b:02X}" for b in raw)
        if len(word) <= MAX_WORD:
            return word
    return "~" + hashlib.blake2b(raw, digest_size=24).hexdigest()


@functools.lru_cache(maxsize=1024)
def client_word(origin: Optional[str]) -> str:
    """Return the word for the process that sent a task.

    Parameters:
        origin: the task's header ``origin`` (``gen<pid>@<host>``), the same for every thread of
            the sender; ``None`` gives :data:`ABSENT`.
    """
    if not origin:
        return ABSENT
    raw = origin.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(raw, digest_size=8).hexdigest()


def barrier_key() -> str:
    """Return a new routing key for the barriers of one inbox.

    No binding for states matches it, except ``#``: it begins with no shard's number, has two words,
    and the second one is longer than a client's.
    """
    return f"barrier.{uuid.uuid4().hex}"


@dataclasses.dataclass(frozen=True)
class QueueSpec:
    """How a queue is declared. It is durable, and neither exclusive nor deleted by itself."""

    name: str
    arguments: Mapping[str, object]


def plan_number(group_id: str) -> int:
    """Return the number of the plan queue for the chord whose header has the id *group_id*."""
    return zlib.crc32(group_id.encode("utf-8", "surrogatepass")) % PLAN_QUEUES


@dataclasses.dataclass(frozen=True)
class Route:
    """The parts of a routing key that identify the waiting clients, besides the task id."""

    #: Word of the process that sent the task, see :func:`client_word`.
    client: str = ABSENT
    #: Id of the group that the task belongs to.
    group_id: Optional[str] = None
    #: Whether that group is the header of a chord.
    in_chord: bool = False

    @property
    def plan_queue(self) -> str:
        """The word for the plan queue of the task's chord."""
        if not self.in_chord or not self.group_id:
            return ABSENT
        return str(plan_number(self.group_id))


@dataclasses.dataclass(frozen=True)
class Topology:
    """Names and arguments that follow from the settings."""

    #: The setting ``result_exchange``: first part of every name.
    prefix: str
    #: How many shard queues there are.
    shards: int
    #: ``classic`` or ``quorum``.
    queue_type: str

    @property
    def exchange(self) -> str:
        """Name of the topic exchange that receives a copy of every state."""
        return f"{self.prefix}.states"

    @property
    def exchange_arguments(self) -> Dict[str, object]:
        """Arguments of the exchange.

        RabbitMQ neither keeps nor compares arguments of our own. It does compare the name of the
        alternate exchange, which need not exist. That name contains the number and type of the
        shards. So a process with other settings is refused, instead of looking for results in the
        wrong places and finding them pending.
        """
        kind = "" if self.queue_type == "classic" else f"-{self.queue_type}"
        return {"alternate-exchange": f"{self.prefix}.shards-{self.shards}{kind}"}

    def shard(self, task_id: str) -> int:
        """Return the number of the shard that keeps *task_id*, a task's or a group's id."""
        return zlib.crc32(task_id.encode("utf-8", "surrogatepass")) % self.shards

    def shard_queue_name(self, shard: int) -> str:
        """Return the name of the queue of shard number *shard*."""
        return f"{self.prefix}.shard.{shard}"

    def shard_queue(self, shard: int) -> QueueSpec:
        """Return the queue of shard number *shard*."""
        return QueueSpec(self.shard_queue_name(shard), self._queue_arguments())

    def plan_queue(self, number: int) -> QueueSpec:
        """Return the queue number *number* for plans of chords."""
        return QueueSpec(f"{self.prefix}.chords.{number}", self._queue_arguments())

    def large_queue(self, task_id: str, mark: str, expires: Optional[int] = None) -> QueueSpec:
        """Return the queue for the body of a large result.

        Parameters:
            mark: a random text that distinguishes it from the task's other queues.
            expires: milliseconds without a read after which the broker deletes it, or ``None``.
        """
        arguments = self._queue_arguments()
        if expires is not None:
            arguments["x-expires"] = expires
        return QueueSpec(f"{self.prefix}.large.{encode_word(task_id)}.{mark}", arguments)

    def check_body_queue(self, state: StateMessage) -> None:
        """Check that *state* points to a queue that can hold its body.

        Waiting clients read that queue, and ``forget()`` deletes it.

        Raises:
            ForeignMessage: when it points to another queue.
        """
        if state.body_queue is not None:
            start = self.large_queue(state.id, "").name
            if not state.body_queue.startswith(start):
                raise errors.ForeignMessage(
                    f"the body of {state.id!r:.100} is said to be in {state.body_queue!r:.300}, "
                    f"which does not begin with {start!r}"
                )

    def _queue_arguments(self) -> Dict[str, object]:
        arguments: Dict[str, object] = {
            "x-queue-type": self.queue_type,
            # The single active consumer holds the lock of a checkout.
            "x-single-active-consumer": True,
        }
        if self.queue_type == "quorum":
            # Every read returns messages, and a limit on deliveries drops those returned too often.
            # It is 20 by default since 4.0, where -1 means no limit. But before 4.0, -1 drops a
            # message when it is returned for the first time. This number is effectively unlimited
            # in all versions.
            arguments["x-delivery-limit"] = 2**31 - 1
            # A reader whose node is killed or cut off keeps the queue until this timeout, a minute
            # by default since 4.3, and all others wait in line. Before 4.3 the argument is unknown,
            # and the queue is released at once.
            arguments["x-consumer-disconnected-timeout"] = DISCONNECTED_TIMEOUT
        return arguments

    def shard_binding(self, shard: int) -> str:
        """Return the binding key for every message of shard number *shard*."""
        return f"{shard}.#"

    @staticmethod
    def every_binding() -> str:
        """Return the binding key for every message of all shards."""
        # "#" would also match the keys of barriers, and that of an inbox that overflows.
        return "*.*.*.#"

    def definitions(self, vhost: str) -> Dict[str, object]:
        """Return the permanent declarations, in the format of RabbitMQ's definitions."""
        queues = [
            *map(self.shard_queue, range(self.shards)),
            *map(self.plan_queue, range(PLAN_QUEUES)),
        ]
        return {
            "exchanges": [
                {
                    "name": self.exchange,
                    "vhost": vhost,
                    "type": "topic",
                    "durable": True,
                    "auto_delete": False,
                    "internal": False,
                    "arguments": self.exchange_arguments,
                }
            ],
            "queues": [
                {
                    "name": queue.name,
                    "vhost": vhost,
                    "durable": True,
                    "auto_delete": False,
                    "arguments": dict(queue.arguments),
                }
                for queue in queues
            ],
        }

    @staticmethod
    def client_binding(client: str) -> str:
        """Return the binding key for every state of the tasks that *client* sent."""
        return f"*.{client}.#"

    def task_binding(self, task_id: str) -> str:
        """Return the binding key for every state of *task_id*."""
        return f"{self.shard(task_id)}.*.*.*.{encode_word(task_id)}.*"

    @staticmethod
    def state_binding(state: str) -> str:
        """Return the binding key for *state* of every task."""
        return f"*.*.*.*.*.{encode_word(state)}"

    @staticmethod
    def plan_binding(number: int) -> str:
        """Return the binding key for every state of the chords in plan queue *number*."""
        return f"*.*.{number}.#"

    def routing_key(self, task_id: str, state: str, route: Route = Route()) -> str:
        """Return the routing key of a state of a task, whose id may have any length and shape."""
        return (
            f"{self.shard(task_id)}.{route.client}.{route.plan_queue}"
            f".{encode_word(route.group_id)}.{encode_word(task_id)}.{encode_word(state)}"
        )
