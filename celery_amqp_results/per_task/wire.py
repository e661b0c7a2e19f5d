"""What Celery 4 puts on the broker: declarations, and the fields of messages. No I/O.

**Transient results** (``result_persistent = False``) made Celery 4 declare a transient queue.
RabbitMQ has deprecated these, and refuses them where they are not permitted: the queue is then
durable, and only the messages are transient. A broker that permits them gets Celery 4's
declarations, since the two must agree on the queue. An existing queue that differs, by another
``result_expires`` or another ``result_persistent``, is used as it is.

With ``result_serializer = "pickle"`` the bytes are those of kombu's pickle protocol, which was 2 in
Celery 4 and is 4 now: Python 2 cannot read the latter (kombu reads ``PICKLE_PROTOCOL`` from the
environment).
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Dict, Mapping, Optional, Tuple

import kombu

from celery_amqp_results import errors
from celery_amqp_results.protocol.codec import Codec
from celery_amqp_results.protocol.ids import state_name
from celery_amqp_results.protocol.message import GROUP, StateMessage

__all__ = ("COUNT_HEADERS", "Messages", "NoCacheQueue", "Wire", "returns_of")

#: The fields of a result's meta that are written, and those that ``result_extended`` adds.
FIELDS: Tuple[str, ...] = ("task_id", "status", "result", "traceback", "children")
EXTENDED_FIELDS = ("name", "args", "kwargs", "worker", "retries", "queue")
#: The same of a saved group, which Celery 4 could not save.
GROUP_FIELDS = ("status", "result", "group_id")

#: The state in the meta of a saved group.
GROUP_STATE = "GROUP"

#: Headers with which quorum queues count; a copy starts without.
COUNT_HEADERS = ("x-delivery-count", "x-acquired-count")

#: The most bytes of a name, and of the property that holds the id, in AMQP.
MAX_ID = 255


class NoCacheQueue(kombu.Queue):
    """A queue that is declared at every use: it may have expired, or gone with its consumer."""

    can_cache_declaration = False


@dataclasses.dataclass(frozen=True)
class Wire:
    """Celery 4's declarations and messages, as they follow from the settings."""

    #: The setting ``result_exchange``.
    exchange: str = "celeryresults"
    #: The setting ``result_exchange_type``.
    exchange_type: str = "direct"
    #: Whether exchange, queues and messages survive a restart of the broker.
    persistent: bool = True
    #: Whether a queue is deleted with its last consumer.
    auto_delete: bool = True
    #: Seconds without use after which the broker deletes a queue, or ``None``.
    expires: Optional[float] = None
    #: The setting ``result_extended``.
    extended: bool = False

    @property
    def delivery_mode(self) -> int:
        """2 for messages that survive a restart, otherwise 1."""
        return 2 if self.persistent else 1

    @staticmethod
    def rkey(task_id: str) -> str:
        """Return the name of the queue of *task_id*, which is its routing key as well.

        Raises:
            ValueError: when the id is too long for AMQP, so that the task cannot have a queue.
        """
        size = len(task_id.encode("utf-8", "surrogatepass"))
        if size > MAX_ID:
            raise ValueError(
                f"the id {task_id[:40]!r}... has {size} bytes, and one in the layout per-task has "
                f"at most {MAX_ID}: give the task a shorter id, or use the layout shared"
            )
        return task_id.replace("-", "")

    def exchange_entity(self) -> kombu.Exchange:
        """Return the exchange, not bound to a channel."""
        return kombu.Exchange(
            self.exchange,
            self.exchange_type,
            durable=self.persistent,
            auto_delete=False,
            delivery_mode=self.delivery_mode,
        )

    def queue_entity(self, task_id: str, durable: Optional[bool] = None) -> NoCacheQueue:
        """Return the queue of *task_id*, not bound to a channel."""
        name = self.rkey(task_id)
        return NoCacheQueue(
            name,
            self.exchange_entity(),
            name,
            durable=self.persistent if durable is None else durable,
            auto_delete=self.auto_delete,
            expires=self.expires or None,
        )

    def shape(self, result_meta: Mapping[str, object]) -> Dict[str, object]:
        """Return the written fields of *result_meta*, in Celery 4's order."""
        fields = FIELDS + EXTENDED_FIELDS if self.extended else FIELDS
        if result_meta.get("status") == GROUP_STATE and "group_id" in result_meta:
            fields = GROUP_FIELDS
        return {name: result_meta.get(name) for name in fields}


class Messages:
    """Reads the states from messages. Thread-safe."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        # Messages carry no time, so the order in which they are received is used instead.
        self._received = itertools.count(1)

    def state_of(self, message: kombu.Message) -> StateMessage:
        """Return the state that *message* holds, decoded.

        Raises:
            kombu.exceptions.ContentDisallowed: when its content type is not accepted.
            ForeignMessage: when it is damaged, or not a state.
        """
        body = message.body
        bare = StateMessage(
            # Unknown before decoding.
            "",
            "message",
            next(self._received),
            body.encode("utf-8", "surrogatepass") if isinstance(body, str) else bytes(body or b""),
            message.content_type or "application/data",
            message.content_encoding or "utf-8",
        )
        decoded = self._codec.decode(bare)
        status = state_name(decoded["status"])
        group_id = decoded.get("group_id")
        if status == GROUP_STATE and isinstance(group_id, str):
            return dataclasses.replace(bare, id=group_id, state=status, kind=GROUP, decoded=decoded)
        task_id = decoded.get("task_id")
        if not isinstance(task_id, str):
            raise errors.ForeignMessage(f"a meta without task_id and status: {decoded!r:.200}")
        return dataclasses.replace(bare, id=task_id, state=status, decoded=decoded)

    def received_again(self, state: StateMessage) -> StateMessage:
        """Return *state* as received now: all states read meanwhile are older."""
        return dataclasses.replace(state, published=next(self._received))


def returns_of(message: kombu.Message) -> int:
    """Return a quorum queue's count of how often *message* was put back."""
    count = message.headers.get(COUNT_HEADERS[0])
    return count if isinstance(count, int) else 0
