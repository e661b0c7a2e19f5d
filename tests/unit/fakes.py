"""An inbox and a store without a broker: what they know is what the tests tell them."""

from __future__ import annotations

import itertools
import time
import uuid
from typing import Any, Callable, Collection, Dict, List, Optional

from amqp.basic_message import Message

from celery_amqp_results import errors
from celery_amqp_results.amqp.declarations import Declarations
from celery_amqp_results.feed.inbox import Inbox
from celery_amqp_results.feed.reads import Reads
from celery_amqp_results.feed.views import STEADY
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.names import Topology
from celery_amqp_results.protocol.page import Census
from celery_amqp_results.protocol.ranking import fold
from celery_amqp_results.waiting.follower import Follower

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
    """Have the broker deliver *states*."""
    for each in states:
        inbox.on_message(Message(each.body, **each.properties(persistent=True)))


class FakeSession:
    """Stands for a connection: a barrier comes back at once, behind everything under way."""

    blocked = False

    def __init__(self, inbox: FakeInbox) -> None:
        self._inbox = inbox

    def wake(self) -> None:
        if self._inbox.reachable:
            self._inbox.bind()

    def pass_barrier(self, timeout: float) -> bool:
        began = time.monotonic()
        self._inbox.before_barrier()
        self._inbox.on_proof(began)
        return True

    def take_in(self) -> bool:
        return True

    def replace(self, why: str) -> None:
        pass


class FakeInbox(Inbox):
    """An inbox whose reader thread binds at once what is wanted, and reads nothing.

    Tests deliver states with :func:`push`. Its connection is there from the first
    :meth:`cover` on, until :meth:`lose`; while ``reachable`` is false it cannot be opened.
    Bindings are old enough to be relied on, unless ``fresh`` is set.
    """

    def __init__(self, shards: int = 8, limit: int = 1024 * 1024) -> None:
        self.reachable = True
        self.fresh = False
        #: Called before a barrier comes back.
        self.before_barrier: Callable[[], None] = lambda: None
        declarations = Declarations(Topology("unit", shards, "classic"))
        # No connection is opened, so there is nothing to open it with.
        super().__init__(None, declarations, "client", limit)  # type: ignore[arg-type]
        self._keeper.start = self._start  # type: ignore[method-assign]

    def _start(self) -> None:
        if self.reachable and not self._table.epoch:
            self.open()

    @property
    def table(self) -> Any:
        return self._table

    def shard(self, task_id: str) -> int:
        return self._declarations.topology.shard(task_id)

    def open(self) -> None:
        """Have a connection."""
        self.on_open(FakeSession(self))  # type: ignore[arg-type]
        if not self.fresh:
            self._table._opened_at -= STEADY
        self.bind()

    def lose(self) -> None:
        """Lose the connection."""
        self.on_lost()

    def bind(self) -> None:
        """Bind and unbind what the table wants."""
        now = time.monotonic() - (0.0 if self.fresh else STEADY)
        for action in self._table.actions(time.monotonic()):
            if action.bind:
                self._table.bound(action.key, now)

    def brings(self, task_id: str, ours: bool) -> bool:
        """Whether the broker would deliver a state that is published now."""
        return bool(self._table.epoch) and (ours or self.shard(task_id) in self._table.bindings)


class FakeStore:
    """A store in a dict, with the methods that reads use."""

    lookup_timeout = 5.0
    check: Any = None

    def __init__(self) -> None:
        self.states: Dict[str, List[StateMessage]] = {}
        #: The ids requested, by call.
        self.asked: List[List[str]] = []
        #: What reading raises, if anything.
        self.failure: Optional[Exception] = None
        #: Which shard keeps which task, for those that take a census.
        self.shard: Callable[[str], int] = Topology("unit", 8, "classic").shard

    def add(self, *states: StateMessage) -> None:
        for each in states:
            self.states.setdefault(each.id, []).append(each)

    def read(
        self,
        ids: Collection[str],
        deadline: Optional[float] = None,
        censuses: Optional[Dict[int, Census]] = None,
    ) -> Dict[str, List[StateMessage]]:
        self.asked.append(sorted(ids))
        if self.failure is not None:
            raise self.failure
        for shard, census in (censuses or {}).items():
            for task_id, found in self.states.items():
                if self.shard(task_id) == shard:
                    for each in found:
                        census.add(each)
        return {task_id: list(self.states.get(task_id, ())) for task_id in ids}

    def current(self, task_id: str) -> Optional[StateMessage]:
        return fold(self.states.get(task_id, ()))


def reads_of(inbox: FakeInbox, store: FakeStore) -> Reads:
    """Return what reads states from the two."""
    store.shard = inbox.shard
    return Reads(inbox, store)  # type: ignore[arg-type]


def follower_of(
    inbox: FakeInbox, store: FakeStore, wake: Optional[Callable[[], None]] = None
) -> Follower:
    """Return a follower of no tasks yet."""
    return Follower(inbox, reads_of(inbox, store), wake)


def timed_out() -> errors.LookupTimeout:
    """Return what a look-up raises that was not answered in time."""
    return errors.LookupTimeout("no answer")
