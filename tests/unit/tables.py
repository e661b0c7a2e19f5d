"""An inbox and a store without a broker: the tests decide what they know."""

from __future__ import annotations

import itertools
import uuid
from typing import Any, Collection, Dict, List, Optional

from amqp.basic_message import Message

from celery_amqp_results import errors
from celery_amqp_results.amqp.declarations import Declarations
from celery_amqp_results.feed.inbox import Inbox
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.names import Topology
from celery_amqp_results.protocol.ranking import fold

_times = itertools.count(1)


def new_id() -> str:
    """Return an id as Celery generates them."""
    return str(uuid.uuid4())


def state(
    task_id: str,
    name: str = "SUCCESS",
    published: Optional[int] = None,
    body: bytes = b"",
    **fields: Any,
) -> StateMessage:
    """Return a state, published later than all earlier ones unless *published* is given."""
    when = next(_times) if published is None else published
    return StateMessage(task_id, name, when, body, "application/json", "utf-8", **fields)


def push(inbox: Inbox, *states: StateMessage) -> None:
    """Deliver *states* to the inbox as the broker would."""
    for each in states:
        inbox._receive(Message(each.body, **each.properties(persistent=True)))


class _Wakeup:
    """Stands for the socket that wakes the reader thread up."""

    def send(self, octets: bytes) -> None:
        pass

    def close(self) -> None:
        pass


class Table(Inbox):
    """An inbox whose reader thread binds immediately, and reads nothing.

    Tests deliver states with :func:`push`. The connection exists from the first :meth:`cover` until
    :meth:`lose`; while ``reachable`` is false it cannot be opened.
    """

    def __init__(self, shards: int = 8) -> None:
        self.reachable = True
        declarations = Declarations(Topology("unit", shards, "classic"))
        # No connection is opened, so no options are needed.
        super().__init__(None, declarations, "client")  # type: ignore[arg-type]

    def shard(self, task_id: str) -> int:
        return self._declarations.topology.shard(task_id)

    def open(self) -> None:
        """Open the connection."""
        self._opened(_Wakeup(), set(self._wanted))  # type: ignore[arg-type]

    def lose(self) -> None:
        """Lose the connection."""
        self._lose(OSError("lost"))

    def brings(self, task_id: str, ours: bool) -> bool:
        """Return whether the broker would push a state that is published now."""
        return bool(self._epoch) and (ours or self.shard(task_id) in self._bound)

    def _start(self) -> None:
        if self.reachable and not self._epoch:
            self.open()

    def _wake_reader(self) -> None:
        if self._epoch:
            self._bound |= self._wanted


class FakeStore:
    """A store in a dict, with the methods that waiting uses."""

    lookup_timeout = 5.0

    def __init__(self) -> None:
        self.states: Dict[str, List[StateMessage]] = {}
        #: The ids requested, by call.
        self.asked: List[List[str]] = []
        #: The exception that reading raises, if any.
        self.failure: Optional[Exception] = None

    def add(self, *states: StateMessage) -> None:
        for each in states:
            self.states.setdefault(each.id, []).append(each)

    def read(
        self, ids: Collection[str], deadline: Optional[float] = None
    ) -> Dict[str, List[StateMessage]]:
        self.asked.append(sorted(ids))
        if self.failure is not None:
            raise self.failure
        return {task_id: list(self.states.get(task_id, ())) for task_id in ids}

    def current(self, task_id: str) -> Optional[StateMessage]:
        return fold(self.states.get(task_id, ()))


def timed_out() -> errors.LookupTimeout:
    """Return the error of a look-up that times out."""
    return errors.LookupTimeout("no answer")
