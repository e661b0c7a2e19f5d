"""A simulation of several processes that store, read and forget, on a model of the broker.

The processes use the real table of tasks and shards. The model has what the reads depend on: shards
that keep states, loose and in pages; an exchange that routes copies to bound inboxes; bindings that
take effect some time after they were confirmed; inboxes that deliver in order; confirms; lost
connections; and a crash that loses what was not confirmed. A seed decides in which order everything
happens. Nothing else does: the same seed gives the same run.

Messages published to a shard and to the exchange in one write take effect in one step.
"""

from __future__ import annotations

import dataclasses
import random
import uuid
from typing import Any, Callable, Deque, Dict, Iterator, List, Optional, Set, Tuple

from celery_amqp_results.feed.bindings import ALL
from celery_amqp_results.feed.table import PROOF_SECONDS, Table, Unread
from celery_amqp_results.feed.views import STEADY, Look
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.names import Topology
from celery_amqp_results.protocol.page import Census, number_of
from celery_amqp_results.protocol.ranking import fold, is_final, is_lasting

SHARDS = 4
TASKS = 16
PROCESSES = 3
STEPS = 700
STAGES = ("STARTED", "PROGRESS", "SUCCESS")


class Broken(AssertionError):
    """A promise was broken. The text says which, and has the schedule."""


@dataclasses.dataclass
class Task:
    """A task, and what has become of it."""

    id: str
    shard: int
    owner: int
    #: How many of its stages were begun to be stored, and how many were confirmed.
    begun: int = 0
    confirmed: int = 0
    #: The stage that some read has returned, and the time when that read was over.
    seen: List[Tuple[int, int]] = dataclasses.field(default_factory=list)
    #: When each stage was confirmed.
    kept: List[Tuple[int, int]] = dataclasses.field(default_factory=list)
    forget_began: Optional[int] = None
    #: When ``forget`` had returned: the time.
    forgotten_at: Optional[float] = None


@dataclasses.dataclass(eq=False)
class Process:
    """A process with an inbox."""

    number: int
    table: Table
    connected: bool = False
    inbox: Deque[Any] = dataclasses.field(default_factory=lambda: Deque())
    #: Requested and unanswered keys; keys that route, and those that soon will.
    asked: List[int] = dataclasses.field(default_factory=list)
    routing: Set[int] = dataclasses.field(default_factory=set)
    late: Dict[int, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(eq=False)
class Read:
    """A read of some tasks by a process, step by step."""

    process: Process
    tasks: List[Task]
    began: int
    #: The time when it began, and so when its barrier was published.
    asked_at: float
    epoch: int = 0
    barrier: str = "none"
    answers: Dict[str, Optional[StateMessage]] = dataclasses.field(default_factory=dict)
    look: Optional[Look] = None
    found: Optional[Tuple[Dict[str, List[StateMessage]], Dict[int, Census]]] = None


class Simulation:
    """One run.

    Parameters:
        seed: decides everything.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.topology = Topology("simulation", SHARDS, "classic")
        self.now = 1000.0
        self.step = 0
        self.schedule: List[str] = []
        limit = self.random.choice((2_000, 4_000, 1_000_000))
        self.processes = [Process(n, Table(self.topology, limit)) for n in range(PROCESSES)]
        self.tasks = [self._new_task() for _ in range(TASKS)]
        self.shards: List[List[StateMessage]] = [[] for _ in range(SHARDS)]
        #: Tasks whose states lie in pages.
        self.packed: Set[str] = set()
        #: States that were written and not confirmed.
        self.unconfirmed: List[Tuple[Task, int, StateMessage]] = []
        self.forgetting: List[Task] = []
        self.reads: List[Read] = []
        self.answered = 0
        self.remembered = 0
        #: Those of them that needed no barrier.
        self.unproved = 0

    def _new_task(self) -> Task:
        task_id = str(uuid.UUID(int=self.random.getrandbits(128), version=4))
        owner = self.random.randrange(PROCESSES)
        return Task(task_id, self.topology.shard(task_id), owner)

    def run(self) -> Simulation:
        """Run to the end.

        Raises:
            Broken: when an answer is wrong.
        """
        # With few deliveries the inboxes lag behind.
        deliveries = self.random.choice((2, 16))
        actions: List[Tuple[float, Callable[[], Optional[str]]]] = [
            (2, self.store), (8, self.confirm), (0.5, self.forget), (2, self.end_forgetting),
            (8, self.ask), (14, self.go_on), (deliveries, self.deliver), (6, self.bind),
            (4, self.take_effect), (4, self.connect), (1, self.pack), (3, self.wait),
            (2, self.count),
        ]  # fmt: skip
        rare: List[Callable[[], Optional[str]]] = [self.lose, self.crash, self.send_again]
        weights = [weight for weight, _ in actions]
        for self.step in range(STEPS):
            if self.random.random() < 0.004:
                action = self.random.choice(rare)
            else:
                ((_, action),) = self.random.choices(actions, weights)
            done = action()
            if done is not None:
                self.schedule.append(f"{self.step:4} {self.now:9.2f} {done}")
        while self.reads:
            self.step += 1
            self.go_on()
            self.deliver()
        for process in self.processes:
            self._check_memory(process.table)
        return self

    # -- storing and forgetting --------------------------------------------------------------------

    def store(self) -> Optional[str]:
        task = self.random.choice(self.tasks)
        waiting = any(each is task for each, _, _ in self.unconfirmed)
        if waiting or task.begun == len(STAGES) or task.forget_began is not None:
            return None
        if task.begun == 0:
            self.processes[task.owner].table.sent(task.id, self.now)
        task.begun += 1
        state = StateMessage(
            task.id, STAGES[task.begun - 1], self.step, b"x" * 200, "application/json", "utf-8"
        )
        self._write(task, task.begun, state)
        return f"{state.state} of {self._name(task)} is written"

    def _write(self, task: Task, stage: int, state: StateMessage) -> None:
        self.shards[task.shard].append(state)
        for process in self.processes:
            own = process.number == task.owner
            if process.connected and (own or process.routing & {task.shard, ALL}):
                process.inbox.append(state)
        self.unconfirmed.append((task, stage, state))

    def confirm(self) -> Optional[str]:
        if not self.unconfirmed:
            return None
        index = self.random.randrange(len(self.unconfirmed))
        task, stage, state = self.unconfirmed.pop(index)
        task.confirmed = stage
        task.kept.append((stage, self.step))
        return f"{state.state} of {self._name(task)} is confirmed"

    def forget(self) -> Optional[str]:
        task = self.random.choice(self.tasks)
        if task.confirmed < len(STAGES) or task.forget_began is not None:
            return None
        task.forget_began = self.step
        self.shards[task.shard] = [each for each in self.shards[task.shard] if each.id != task.id]
        self.packed.discard(task.id)
        self.forgetting.append(task)
        return f"{self._name(task)} is removed"

    def end_forgetting(self) -> Optional[str]:
        if not self.forgetting:
            return None
        task = self.forgetting.pop(self.random.randrange(len(self.forgetting)))
        for process in self.processes:
            if process.connected:
                process.inbox.append(("forgotten", task.id))
        task.forgotten_at = self.now
        return f"the removal of {self._name(task)} is announced and confirmed"

    # -- reading -----------------------------------------------------------------------------------

    def ask(self) -> Optional[str]:
        process = self.random.choice(self.processes)
        tasks = self.random.sample(self.tasks, self.random.choice((1, 1, 1, 3)))
        read = Read(process, tasks, self.step, self.now)
        self.reads.append(read)
        table = process.table
        table.asked([task.id for task in tasks], self.now)
        self._act(process)
        known = [found for task in tasks if (found := self._recall(table, task)) is not None]
        names = ", ".join(map(self._name, tasks))
        lasting = len(known) == len(tasks) and all(is_lasting(state) for (state,) in known)
        if lasting and table.is_proved(self.now):
            self.remembered += len(tasks)
            self.unproved += len(tasks)
            self._answer(read, {task.id: state for task, (state,) in zip(tasks, known)})
            return f"process {process.number} asks for {names}, and knows them"
        if table.epoch and known:
            read.epoch, read.barrier = table.epoch, "under way"
            process.inbox.append(read)
        return f"process {process.number} asks for {names}; barrier: {read.barrier}"

    def _recall(self, table: Table, task: Task) -> Optional[Tuple[Optional[StateMessage]]]:
        if table.is_due(task.id, self.now):
            return None
        try:
            return (table.recall(task.id, self.now, 0),)
        except Unread:
            return None

    def go_on(self) -> Optional[str]:
        if not self.reads:
            return None
        read = self.random.choice(self.reads)
        table = read.process.table
        who = f"process {read.process.number}"
        if read.barrier == "under way":
            if self.random.random() < 0.02 or not read.process.connected:
                read.barrier = "lost"
                return f"{who} gives up a barrier"
            return None
        if read.barrier == "back":
            read.barrier = "none"
            if read.epoch == table.epoch:
                for task in read.tasks:
                    recalled = self._recall(table, task)
                    if recalled is not None:
                        read.answers[task.id] = recalled[0]
                        self.remembered += 1
        missing = [task for task in read.tasks if task.id not in read.answers]
        if not missing:
            self._answer(read, {})
            return f"{who} has answers"
        return f"{who} {self._look_up(read, missing)}"

    def _answer(self, read: Read, answers: Dict[str, Optional[StateMessage]]) -> None:
        read.answers.update(answers)
        self.reads.remove(read)
        for task in read.tasks:
            self._judge(read, task)

    def _look_up(self, read: Read, missing: List[Task]) -> str:
        table = read.process.table
        if read.look is None:
            read.look = table.begin([task.id for task in missing], self.now)
            return f"begins a look-up, census of {sorted(read.look.census)}"
        if read.found is None:
            read.found = self._snapshot(read.look)
            return "has read the shards"
        found, censuses = read.found
        table.end(read.look, found, censuses, self.now)
        read.answers.update((task_id, fold(states)) for task_id, states in found.items())
        read.look = read.found = None
        return "ends a look-up"

    def _snapshot(self, look: Look) -> Tuple[Dict[str, List[StateMessage]], Dict[int, Census]]:
        found: Dict[str, List[StateMessage]] = {task_id: [] for task_id in look.ids}
        censuses = {shard: Census() for shard in look.census}
        for shard, states in enumerate(self.shards):
            for state in states:
                if state.id in found:
                    found[state.id].append(state)
                if shard in censuses and state.id in self.packed and is_final(state.state):
                    censuses[shard].digests.add(number_of(state.id))
                elif shard in censuses:
                    censuses[shard].add(state)
        return found, censuses

    def _judge(self, read: Read, task: Task) -> None:
        """Check an answer against everything that was stored, forgotten and seen before."""
        state = read.answers[task.id]
        stage = 0 if state is None else STAGES.index(state.state) + 1
        self.answered += 1
        least = max((s for s, at in (*task.kept, *task.seen) if at < read.began), default=0)
        if state is None and task.forget_began is not None:
            return
        if task.forgotten_at is not None and task.forgotten_at + PROOF_SECONDS < read.asked_at:
            self.fail(f"{self._name(task)} was forgotten, and is read as {stage}")
        if stage < least:
            self.fail(
                f"{self._name(task)} was at stage {least}, and process {read.process.number} reads "
                f"{stage}"
            )
        if stage > task.begun:
            self.fail(f"{self._name(task)} is read as {stage}, which was never stored")
        task.seen.append((stage, self.step))

    def count(self) -> Optional[str]:
        process = self.random.choice(self.processes)
        shards = process.table.uncounted(self.now)[:2]
        if not shards:
            return None
        look = process.table.begin((), self.now, shards)
        read = Read(process, [], self.step, self.now, look=look)
        read.found = self._snapshot(look)
        process.table.end(look, *read.found, self.now)
        return f"process {process.number} counts {shards}"

    # -- connections -------------------------------------------------------------------------------

    def connect(self) -> Optional[str]:
        process = self.random.choice(self.processes)
        if process.connected or not process.table.wants_inbox:
            return None
        process.connected = True
        process.table.opened(self.now)
        self._act(process)
        return f"process {process.number} opens its inbox"

    def _act(self, process: Process) -> None:
        if not process.connected:
            return
        for action in process.table.actions(self.now):
            if action.bind:
                process.asked.append(action.key)
            else:
                process.routing.discard(action.key)
                process.late.pop(action.key, None)

    def bind(self) -> Optional[str]:
        process = self.random.choice(self.processes)
        if not process.asked:
            return None
        key = process.asked.pop(0)
        # In a cluster it takes effect on another node a moment later.
        if self.random.random() < 0.5:
            process.routing.add(key)
        else:
            process.late[key] = self.now + STEADY * 0.99
        process.table.bound(key, self.now)
        return f"process {process.number} is bound to {key}, late: {key in process.late}"

    def take_effect(self) -> Optional[str]:
        late = [(process, key) for process in self.processes for key in process.late]
        if not late:
            return None
        process, key = self.random.choice(late)
        del process.late[key]
        process.routing.add(key)
        return f"the binding of process {process.number} to {key} takes effect"

    def deliver(self) -> Optional[str]:
        process = self.random.choice(self.processes)
        if not process.inbox:
            return None
        message = process.inbox.popleft()
        table = process.table
        if isinstance(message, Read):
            if message.barrier == "under way":
                message.barrier = "back"
            table.proved(message.asked_at)
            what = "a barrier"
        elif isinstance(message, StateMessage):
            table.pushed(message, self.now)
            if table.restless:
                self._act(process)
            what = f"{message.state} of {message.id[:4]}"
        else:
            table.forgotten(message[1], self.now)
            what = f"that {message[1][:4]} is forgotten"
        return f"process {process.number} is given {what}"

    def lose(self) -> Optional[str]:
        connected = [process for process in self.processes if process.connected]
        if not connected:
            return None
        process = self.random.choice(connected)
        self._disconnect(process)
        return f"process {process.number} loses its connection"

    def _disconnect(self, process: Process) -> None:
        process.connected = False
        process.table.lost()
        process.inbox.clear()
        process.asked.clear()
        process.routing.clear()
        process.late.clear()

    def crash(self) -> str:
        """Kill the broker: what it has not confirmed is lost, and published again."""
        for process in self.processes:
            if process.connected:
                self._disconnect(process)
        unconfirmed, self.unconfirmed = self.unconfirmed, []
        for task, stage, state in unconfirmed:
            lost = [each for each in self.shards[task.shard] if each is not state]
            self.shards[task.shard] = lost
            # It may have been seen before; that is not promised.
            task.seen = [(seen, at) for seen, at in task.seen if seen < stage]
            self._write(task, stage, state)
        for read in self.reads:
            # Before the crash they may have read the states that were lost.
            read.answers.clear()
            if read.look is not None:
                read.process.table.end(read.look, {}, {}, self.now)
            read.look = read.found = None
            read.began = self.step
        return "the broker is killed, and back"

    def send_again(self) -> Optional[str]:
        """A publisher has lost its connection before the confirm came."""
        if not self.unconfirmed:
            return None
        task, stage, state = self.unconfirmed.pop(self.random.randrange(len(self.unconfirmed)))
        self._write(task, stage, state)
        return f"{state.state} of {self._name(task)} is written again"

    def pack(self) -> Optional[str]:
        shard = self.random.randrange(SHARDS)
        ids = {each.id for each in self.shards[shard] if is_final(each.state)}
        for task_id in ids - self.packed:
            found = [each for each in self.shards[shard] if each.id == task_id]
            current = fold(found)
            waiting = {each.id for _, _, each in self.unconfirmed}
            if current is None or task_id in waiting:
                continue
            others = [each for each in self.shards[shard] if each.id != task_id]
            self.shards[shard] = [*others, current]
            self.packed.add(task_id)
        return f"shard {shard} is packed" if ids else None

    def wait(self) -> str:
        self.now += self.random.choice((0.1, 0.3, 0.3, 0.5, 0.5, 1.0, 1.0, 5.0, 20.0))
        for process in self.processes:
            for key, at in list(process.late.items()):
                if self.now >= at:
                    del process.late[key]
                    process.routing.add(key)
        return "time passes"

    # -- the verdict -------------------------------------------------------------------------------

    def _check_memory(self, table: Any) -> None:
        size = sum(entry.size for entry in table._memory.recent.values())
        digests = sum(len(view.digests or ()) for view in table._memory.views.values())
        if (size, digests) != (table._memory._recent_bytes, table._memory._digests):
            self.fail("memory is not counted right")

    def _name(self, task: Task) -> str:
        return f"{task.id[:4]}/{task.shard}"

    def fail(self, why: str) -> None:
        lines = "\n".join(self.schedule)
        raise Broken(f"seed {self.seed}, step {self.step}: {why}\n{lines}")


def run_many(first: int, count: int) -> Iterator[Simulation]:
    """Run seeds, one after the other, from *first* on."""
    for seed in range(first, first + count):
        yield Simulation(seed).run()
