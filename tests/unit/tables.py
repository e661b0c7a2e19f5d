"""An inbox and a store without a broker: what they know is what the tests tell them."""

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
    """Return an id as Celery makes them."""
    return str(uuid.uuid4())


def state(
    task_id: str,
    name: str = "SUCCESS",
    published: Optional[int] = None,
    body: bytes = b"",
    **fields: Any,
) -> StateMessage:
    """Return a state, published later than all before unless it is said when."""
    when = next(_times) if published is None else published
    return StateMessage(task_id, name, when, body, "application/json", "utf-8", **fields)


def push(inbox: Inbox, *states: StateMessage) -> None:
    """Have the broker bring *states*."""
    for each in states:
        inbox._receive(Message(each.body, **each.properties(persistent=True)))


class _Wakeup:
    """Stands for the socket that wakes the reader thread."""

    def send(self, octets: bytes) -> None:
        pass

    def close(self) -> None:
        pass


class Table(Inbox):
    """An inbox whose reader thread binds at once what is wanted, and reads nothing.

    What is pushed is given to :func:`push`. Its connection is there from the first
    :meth:`cover` on, until :meth:`lose`; while ``reachable`` is false it cannot be opened.
    """

    def __init__(self, shards: int = 8) -> None:
        self.reachable = True
        declarations = Declarations(Topology("unit", shards, "classic"))
        # No connection is opened, so there is nothing to open it with.
        super().__init__(None, declarations, "client")  # type: ignore[arg-type]

    def shard(self, task_id: str) -> int:
        return self._declarations.topology.shard(task_id)

    def open(self) -> None:
        """Have a connection."""
        self._opened(_Wakeup(), set(self._wanted))  # type: ignore[arg-type]

    def lose(self) -> None:
        """Lose the connection."""
        self._lose(OSError("lost"))

    def brings(self, task_id: str, ours: bool) -> bool:
        """Whether the broker would bring a state that is published now."""
        return bool(self._epoch) and (ours or self.shard(task_id) in self._bound)

    def _start(self) -> None:
        if self.reachable and not self._epoch:
            self.open()

    def _wake_reader(self) -> None:
        if self._epoch:
            self._bound |= self._wanted


class Kept:
    """A store in a dict, with the methods that waiting uses."""

    lookup_timeout = 5.0

    def __init__(self) -> None:
        self.states: Dict[str, List[StateMessage]] = {}
        #: What was asked for, call by call.
        self.asked: List[List[str]] = []
        #: What reading raises, if anything.
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
    """Return what a look-up raises that was not answered in time."""
    return errors.LookupTimeout("no answer")
