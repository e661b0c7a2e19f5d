"""Readers that look up, pack and forget, killed between any two operations on a model of the queue.

The store, the checkout and the page are the real code. The machine records what was stored and
forgotten, which determines what a reader may find.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Dict, List, Optional, Set
from unittest import mock

import pytest
from celery import states
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from celery_amqp_results.options import Options
from celery_amqp_results.protocol import clock
from celery_amqp_results.protocol.codec import Codec
from celery_amqp_results.protocol.message import STATE, StateMessage
from celery_amqp_results.protocol.names import Topology
from celery_amqp_results.protocol.ranking import fold, supersedes
from celery_amqp_results.store import checkout, shard_read
from celery_amqp_results.store import lookup as store
from tests.unit.broker_model import Clock, Killed, Link, Queue

IDS = ("a", "b", "c", "d")
#: Milliseconds after which a state expires.
LIFETIMES = (None, 2_000, 60_000)
CODEC = Codec("json", ["application/json"])
names = st.sampled_from(["STARTED", "PROGRESS", states.SUCCESS, states.FAILURE, states.REVOKED])

#: Events between two operations of a reader that writes; mostly none.
interludes = st.lists(
    st.sampled_from(["nothing"] * 4 + ["store", "read", "forget", "wait", "die"]), max_size=12
)


@dataclasses.dataclass(eq=False)
class Record:
    """One state that was stored."""

    state: StateMessage
    #: Whether no process has tried to forget it, or a reader has found it after that.
    safe: bool = True
    #: Whether a process has forgotten it and reported success.
    gone: bool = False
    #: Whether it was published again, and so expires later while it is loose.
    again: bool = False


class Reader:
    """A process that reads the shard."""

    def __init__(self, machine: PackingMachine, ids: List[str], remove: bool) -> None:
        self.machine = machine
        self.remove = remove
        self.ids = ids
        self.link = Link(machine.queue, self._between)
        self.interludes: List[str] = []
        self.started = machine.clock.microseconds
        #: The records stored before the read began, and those known to be forgotten by then.
        self.before = [r for i in ids for r in machine.records[i] if not r.gone]
        self.gone = {r.state.published for i in ids for r in machine.records[i] if r.gone}
        #: Whether one of its tasks was forgotten during the read.
        self.disturbed: Set[str] = set()
        if remove:
            for record in self.before:
                record.safe = False
            for other in machine.active:
                other.disturbed.update(ids)
        for other in machine.active:
            if other.remove:
                self.disturbed.update(other.ids)
        machine.active.append(self)
        kind = shard_read.Removal if remove else shard_read.LookUp
        self.read: Any = kind(machine.store, self.link, 0, set(ids), STATE)  # type: ignore[arg-type]

    def _between(self) -> None:
        what = self.interludes.pop(0) if self.interludes else "nothing"
        if what == "die":
            self.link.die()
        elif what == "store":
            self.machine.store_state(IDS[self.machine.clock.microseconds % 4], states.SUCCESS, None)
        elif what in ("read", "forget") and len(self.machine.readers) < 4:
            self.machine.readers.append(Reader(self.machine, list(IDS[:2]), what == "forget"))
        elif what == "wait":
            self.machine.clock.microseconds += 2_100_000

    def continue_with(self, messages: int, interludes: List[str]) -> None:
        """Handle some messages, and finish if all have come."""
        for _ in range(messages):
            if self.read.done or not self.link.drain(0.0):
                break
        if not self.read.done:
            return
        self.machine.readers.remove(self)
        self.interludes = list(interludes)
        try:
            self.read.finish(float("inf"), float("inf"), lambda: None)
        except Killed:
            return
        finally:
            self.machine.active.remove(self)
        if self.remove:
            for record in self.before:
                record.gone = True
        else:
            self.check()

    def check(self) -> None:
        """Check the findings against the record."""
        now = self.machine.clock.microseconds
        for task_id in self.ids:
            found = self.read.found.get(task_id, [])
            current = fold(found)
            known = {record.state.published: record for record in self.machine.records[task_id]}
            for state in found:
                assert state.published in known, "nobody has stored this"
                assert state == known[state.published].state, "it was changed"
                assert state.published not in self.gone, "it was forgotten, and is back"
                if not known[state.published].again:
                    assert not state.expired(self.started), "it had expired"
            for record in self.before:
                state = record.state
                if (
                    state.id != task_id
                    or not record.safe
                    or state.expired(now)
                    or self.machine.superseded(record)
                    or task_id in self.disturbed
                ):
                    continue
                assert current is not None, f"lost: {state}"
                assert fold([*found, state]) == current, f"lost: {state}; found {current}"
            if task_id not in self.disturbed:
                for state in found:
                    # A state that was found once must be found again.
                    known[state.published].safe = True


class PackingMachine(RuleBasedStateMachine):
    """Writers and readers of one shard."""

    @initialize()
    def start(self) -> None:
        self.clock = Clock()
        self.queue = Queue(self.clock)
        self.records: Dict[str, List[Record]] = {task_id: [] for task_id in IDS}
        self.readers: List[Reader] = []
        #: Those, and the one that is writing.
        self.active: List[Reader] = []
        declarations: Any = mock.Mock(topology=Topology("t", 1, "classic"))
        options, pool = Options(page_size=600), mock.Mock()
        self.store = store.Store(pool, declarations, options, True, CODEC.decode)
        self._patches: List[Any] = [
            mock.patch.object(store, "time", self.clock),
            mock.patch.object(checkout, "time", self.clock),
            mock.patch.object(shard_read, "time", self.clock),
            mock.patch.object(clock, "time", self.clock),
            mock.patch.object(shard_read, "PACK_AT", 3),
            mock.patch.object(shard_read, "MAX_RETAINED", 2_000),
        ]
        for patch in self._patches:
            patch.start()

    def store_state(self, task_id: str, name: str, lifetime: Optional[int]) -> None:
        """Store a state."""
        published = self.clock.now()
        body = json.dumps({"task_id": task_id, "status": name, "result": published}).encode()
        state = StateMessage(
            task_id, name, published, body, "application/json", "utf-8", None, lifetime
        )
        self.queue.publish(state.properties(True), body)
        # A state stored while its task is being forgotten may be forgotten or not.
        forgotten = any(reader.remove and task_id in reader.ids for reader in self.active)
        self.records[task_id].append(Record(state, safe=not forgotten))

    def superseded(self, record: Record) -> bool:
        """Return whether another state supersedes it, even one that is gone by now."""
        return any(
            other is not record and supersedes(other.state, record.state)
            for other in self.records[record.state.id]
        )

    @rule(task_id=st.sampled_from(IDS), name=names, lifetime=st.sampled_from(LIFETIMES))
    def a_worker_stores_a_state(self, task_id: str, name: str, lifetime: Optional[int]) -> None:
        self.store_state(task_id, name, lifetime)

    @rule(count=st.integers(1, 6), lifetime=st.sampled_from(LIFETIMES))
    def workers_store_results(self, count: int, lifetime: Optional[int]) -> None:
        for number in range(count):
            self.store_state(IDS[number % len(IDS)], states.SUCCESS, lifetime)

    @rule(delivered=st.booleans())
    def a_worker_publishes_twice(self, delivered: bool) -> None:
        for records in self.records.values():
            if records and not records[-1].gone and records[-1].safe:
                state = records[-1].state
                # While its task is being forgotten, a copy stored meanwhile may stay.
                beside = any(r.remove and state.id in r.ids for r in self.active)
                if not beside and not state.expired(self.clock.microseconds):
                    records[-1].again = True
                    self.queue.publish(state.properties(True), state.body)

    @precondition(lambda self: len(self.readers) < 4)
    @rule(ids=st.lists(st.sampled_from(IDS), min_size=1, unique=True))
    def begin_to_read(self, ids: List[str]) -> None:
        self.readers.append(Reader(self, ids, False))

    @precondition(lambda self: len(self.readers) < 4)
    @rule(task_id=st.sampled_from(IDS))
    def begin_to_forget(self, task_id: str) -> None:
        self.readers.append(Reader(self, [task_id], True))

    @precondition(lambda self: self.readers)
    @rule(data=st.data(), messages=st.sampled_from([1, 3, 100]), what=interludes)
    def continue_reading(self, data: st.DataObject, messages: int, what: List[str]) -> None:
        data.draw(st.sampled_from(self.readers)).continue_with(messages, what)

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def kill_a_reader(self, data: st.DataObject) -> None:
        reader = data.draw(st.sampled_from(self.readers))
        self.readers.remove(reader)
        self.active.remove(reader)
        reader.link.die()

    @rule(milliseconds=st.sampled_from([1, 1_999, 30_000, 61_000]))
    def time_passes(self, milliseconds: int) -> None:
        while milliseconds > 0:
            self.clock.microseconds += min(milliseconds, 20_000) * 1000
            milliseconds -= 20_000
            # As their clocks do while they wait.
            for reader in self.readers:
                reader.read.checkout.renew_fence()

    def teardown(self) -> None:
        """Read everything that is left, twice: the first read packs."""
        if not hasattr(self, "clock"):
            return
        try:
            for _ in range(10):
                for reader in list(self.readers):
                    # Readers in line get their turn when the first one has finished.
                    reader.continue_with(1000, [])
            assert not self.readers, "somebody waits in line for ever"
            for _ in range(2):
                reader = Reader(self, list(IDS), False)
                self.readers.append(reader)
                reader.continue_with(1000, [])
                assert not self.readers, "the fence has not come"
        finally:
            for patch in self._patches:
                patch.stop()


PackingMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_packing = pytest.mark.filterwarnings("default")(PackingMachine.TestCase)
