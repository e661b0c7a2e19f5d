"""A simulation of several processes that store, read and forget, on a model of the broker.

The processes use the real table of tasks and shards, the real checkout with its packing into real
pages, and the real log of confirms with the decisions of a delivery. The models have what these
depend on: queues that keep messages and give them to one consumer after the other
(:mod:`tests.unit.broker_model`); an exchange that routes copies to inboxes
(:mod:`tests.simulation.exchange`); bindings that take effect some time after they were confirmed;
confirms in any order; lost connections; and a crash that loses what was not confirmed. A test
compares the models with RabbitMQ. A seed decides in which order everything happens. Nothing else
does: the same seed gives the same run.

Messages published to a shard and to the exchange in one write take effect in one step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import uuid
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Set, Tuple
from unittest import mock

from celery_amqp_results.amqp.confirm_log import ConfirmLog, Outgoing, Publication, Status
from celery_amqp_results.feed.table import PROOF_SECONDS, Table, Unread
from celery_amqp_results.feed.views import STEADY, Look
from celery_amqp_results.options import Options
from celery_amqp_results.protocol import clock
from celery_amqp_results.protocol.codec import Codec
from celery_amqp_results.protocol.message import STATE, StateMessage
from celery_amqp_results.protocol.names import Topology
from celery_amqp_results.protocol.page import Census
from celery_amqp_results.protocol.ranking import fold, is_lasting
from celery_amqp_results.store import checkout, lookup, shard_read
from celery_amqp_results.store.delivery import Delivery
from tests.simulation.exchange import Exchange
from tests.unit.broker_model import Clock, Killed, Link, Queue

SHARDS = 4
TASKS = 16
PROCESSES = 3
STEPS = 1500
#: Reads under way at once, at most.
MAX_READS = 6
STAGES = ("STARTED", "PROGRESS", "SUCCESS")
RANKS = {"FAILURE": 1, "SUCCESS": 2}
CODEC = Codec("json", ["application/json"])


class Broken(AssertionError):
    """A promise was broken. The text says which, and has the schedule."""


@dataclasses.dataclass
class Task:
    """A task, and what has become of it."""

    id: str
    shard: int
    owner: int
    #: The states that are stored, in this order.
    stages: Tuple[str, ...] = STAGES
    #: How many of its stages were begun to be stored, and how many were confirmed.
    begun: int = 0
    confirmed: int = 0
    #: The worth of the state that some read has returned, and the step when that read was over.
    seen: List[Tuple[int, int]] = dataclasses.field(default_factory=list)
    #: The stages whose live copies were published.
    copied: Set[int] = dataclasses.field(default_factory=set)
    #: The worth of each stage, and the step when it was confirmed.
    kept: List[Tuple[int, int]] = dataclasses.field(default_factory=list)
    forget_began: Optional[int] = None
    #: When ``forget`` had returned: the time.
    forgotten_at: Optional[float] = None

    def worth(self, stage: int) -> int:
        """Return how many stages are not outranked by any after this one, from the worst on."""
        by_rank = sorted(
            self.stages, key=lambda state: (RANKS.get(state, 0), self.stages.index(state))
        )
        return by_rank.index(self.stages[stage - 1]) + 1 if stage else 0


class Shards(Link):
    """A connection for look-ups, which reads any number of shards.

    Parameters:
        queues: the shards, by their names.
        between: called before each operation.
    """

    def __init__(self, queues: Dict[str, Queue], between: Callable[[], None]) -> None:
        super().__init__(next(iter(queues.values())), between)
        self._queues = queues

    def find(self, name: str) -> Queue:
        return self._queues[name]


@dataclasses.dataclass(eq=False)
class Store:
    """A state that is being stored: what ``store_result`` does."""

    task: Task
    stage: int
    state: StateMessage
    delivery: Delivery

    @property
    def publication(self) -> Publication:
        """The durable copy, and its live copy."""
        return self.delivery.publications[0]


class Process:
    """A process with an inbox, and with a channel to publish on."""

    def __init__(self, number: int, table: Table) -> None:
        self.number = number
        self.table = table
        #: Requested and unanswered keys; those that will route soon.
        self.asked: List[int] = []
        self.late: Dict[int, float] = {}
        #: Shards that it has seen a confirm of.
        self.knows: Set[int] = set()
        self.connect_publisher()
        self.stores: List[Store] = []

    def sent(self, task_id: str, now: float) -> None:
        """Note that it sends a task."""
        self.table.sent(task_id, now)

    def opened(self, now: float) -> None:
        """Note that its inbox is open."""
        self.table.opened(now)

    def lost(self) -> None:
        """Note that its inbox is lost."""
        self.table.lost()

    def bound(self, key: int, now: float) -> None:
        """Note that a binding stands."""
        self.table.bound(key, now)

    def pushed(self, state: StateMessage, now: float) -> None:
        """Take in a pushed state."""
        self.table.pushed(state, now)

    def connect_publisher(self) -> None:
        """Open another channel to publish on."""
        self.log = ConfirmLog()
        self._tag = 0
        #: Answers of the broker that have not arrived: delivery tags.
        self.answers: List[int] = []

    def write(self, publication: Publication, now: float) -> None:
        """Note that a message is written, with its live copy if it has one."""
        self.log.sent(publication, now)
        self._expect(1 + publication.push)

    def write_copy(self, publication: Publication) -> None:
        """Note that a live copy is written."""
        self.log.copy_sent(publication)
        self._expect(1)

    def _expect(self, count: int) -> None:
        self.answers += range(self._tag + 1, self._tag + count + 1)
        self._tag += count


@dataclasses.dataclass(eq=False)
class Checkouts:
    """The reads of some shards by one look-up."""

    link: Shards
    reads: List[Any]
    left: List[Any]

    def step(self, messages: int) -> bool:
        """Handle some messages, or finish a shard; return whether all are read.

        Raises:
            Killed: when the connection was lost.
        """
        if self.link.dead:
            raise Killed
        done = [read for read in self.left if read.done]
        for read in done:
            self.left.remove(read)
            read.finish(float("inf"), float("inf"), lambda: None)
        for _ in range(0 if done else messages):
            if not self.link.drain(0.0) or any(read.done for read in self.left):
                break
        return not self.left


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
    checkouts: Optional[Checkouts] = None
    #: Whether it only takes a census.
    counts: bool = False


class Simulation:
    """One run.

    Parameters:
        seed: decides everything.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.topology = Topology("simulation", SHARDS, "classic")
        self.clock = Clock()
        self.step = 0
        self.schedule: List[str] = []
        limit = self.random.choice((2_000, 4_000, 1_000_000))
        self.processes = [self._new_process(n, limit) for n in range(PROCESSES)]
        self.tasks = [self._new_task() for _ in range(TASKS)]
        self.queues = {
            self.topology.shard_queue_name(shard): Queue(self.clock) for shard in range(SHARDS)
        }
        #: Shards that were declared. The others return what is published to them.
        self.declared: Set[int] = set()
        self.exchange = Exchange()
        declarations: Any = mock.Mock(topology=self.topology)
        options, pool = Options(page_size=600), mock.Mock()
        self.store_of = lookup.Store(pool, declarations, options, True, CODEC.decode)
        self.forgetting: List[Tuple[Task, Optional[Checkouts]]] = []
        self.reads: List[Read] = []
        self.answered = 0
        self.remembered = 0
        #: Those of them that needed no barrier.
        self.unproved = 0

    @property
    def now(self) -> float:
        """The time."""
        return self.clock.monotonic()

    def _new_process(self, number: int, limit: int) -> Process:
        return Process(number, Table(self.topology, limit))

    def _new_task(self) -> Task:
        task_id = str(uuid.UUID(int=self.random.getrandbits(128), version=4))
        owner = self.random.randrange(PROCESSES)
        return Task(task_id, self.topology.shard(task_id), owner)

    def run(self) -> Simulation:
        """Run to the end.

        Raises:
            Broken: when an answer is wrong.
        """
        with contextlib.ExitStack() as stack:
            for module, name, value in (
                (lookup, "time", self.clock), (checkout, "time", self.clock),
                (shard_read, "time", self.clock), (clock, "time", self.clock),
                (shard_read, "PACK_AT", 8),
            ):  # fmt: skip
                stack.enter_context(mock.patch.object(module, name, value))
            self._run()
        return self

    def _actions(self) -> List[Tuple[float, Callable[[], Optional[str]]]]:
        """Return what may happen, and how often it does."""
        # With few deliveries the inboxes lag behind.
        deliveries = self.random.choice((2, 16))
        return [
            (3, self.store), (12, self.answer), (0.5, self.forget), (4, self.go_on_forgetting),
            (8, self.ask), (40, self.go_on), (deliveries, self.deliver), (6, self.bind),
            (4, self.take_effect), (4, self.connect), (1, self.wait), (2, self.count),
        ]  # fmt: skip

    def _run(self) -> None:
        actions = self._actions()
        rare: List[Callable[[], Optional[str]]] = [
            self.lose, self.crash, self.lose_publisher, self.refuse,
        ]  # fmt: skip
        weights = [weight for weight, _ in actions]
        for self.step in range(STEPS):
            if self.random.random() < 0.002:
                action = self.random.choice(rare)
            else:
                ((_, action),) = self.random.choices(actions, weights)
            self._do(action)
        while self.reads:
            self.step += 1
            self._go_on_at_the_end()
            if self.step > 100 * STEPS:
                self.fail("a read never ends")
        for process in self.processes:
            self._check_memory(process.table)

    def _go_on_at_the_end(self) -> None:
        """Let everything go on that reads may wait for."""
        self.go_on_forgetting()
        self.go_on()
        self.deliver()

    def _do(self, action: Callable[[], Optional[str]]) -> None:
        done = action()
        if done is not None:
            self.schedule.append(f"{self.step:4} {self.now:9.2f} {done}")

    # -- storing -----------------------------------------------------------------------------------

    def store(self) -> Optional[str]:
        at = self.random.randrange(len(self.tasks))
        task = self.tasks[at]
        if task.confirmed == len(task.stages) and self.random.random() < 0.3:
            # Old tasks lie in pages, of which memory has only the digests.
            task = self.tasks[at] = self._new_task()
        waiting = any(each.task is task for process in self.processes for each in process.stores)
        if waiting or task.begun == len(task.stages) or task.forget_began is not None:
            return None
        if task.begun == 0:
            self.processes[task.owner].sent(task.id, self.now)
        task.begun += 1
        name = task.stages[task.begun - 1]
        body = json.dumps({"task_id": task.id, "status": name, "result": "x" * 150}).encode()
        state = StateMessage(task.id, name, self.clock.now(), body, "application/json", "utf-8")
        outgoing = Outgoing(
            self.topology.shard_queue_name(task.shard), state.properties(True), body, task.shard,
            pushed=("states", task.id),
        )  # fmt: skip
        process = self.random.choice(self.processes)
        store = Store(task, task.begun, state, Delivery([outgoing]))
        process.stores.append(store)
        self._publish(process, store)
        return f"process {process.number} writes {state.state} of {self._name(task)}"

    def _publish(self, process: Process, store: Store) -> None:
        publication, shard = store.publication, store.task.shard
        publication.push = shard in process.knows
        process.write(publication, self.now)
        if shard in self.declared:
            message = publication.message
            self.queues[message.queue].publish(dict(message.properties), message.body)
        else:
            message = publication.message
            process.log.came_back(message.queue, message.properties, message.body)
        if publication.push:
            store.task.copied.add(store.stage)
            self.exchange.publish(store.state, shard, store.task.owner)

    def answer(self) -> Optional[str]:
        """A confirm arrives."""
        process = self.random.choice(self.processes)
        if not process.answers:
            return None
        tag = process.answers.pop(self.random.randrange(len(process.answers)))
        process.log.acknowledged(tag, False)
        self._decide(process)
        return f"process {process.number} receives the confirm of {tag}"

    def refuse(self) -> Optional[str]:
        """A queue refuses a message that it has not kept, or a live copy."""
        process = self.random.choice(self.processes)
        if not process.answers:
            return None
        tag = process.answers.pop(self.random.randrange(len(process.answers)))
        for store in process.stores:
            if process.log._kept.get(tag) is store.publication:
                self._drop(store)
        process.log.refused(tag, False)
        self._decide(process)
        return f"process {process.number} learns that {tag} is refused"

    def lose_publisher(self) -> str:
        """A publisher loses its connection before the confirms have come."""
        process = self.random.choice(self.processes)
        process.log.lost(OSError("lost"))
        process.connect_publisher()
        self._decide(process)
        return f"process {process.number} publishes on another connection"

    def _decide(self, process: Process) -> None:
        """Do what the deliveries decide after an answer."""
        for store in list(process.stores):
            publication, shard = store.publication, store.task.shard
            if not publication.settled:
                continue
            verdict = store.delivery.judge()
            self.declared.update(verdict.declare)
            if verdict.again:
                self._publish(process, store)
            elif not publication.push:
                process.knows.add(shard)
                process.write_copy(publication)
                store.task.copied.add(store.stage)
                self.exchange.publish(store.state, shard, store.task.owner)
            elif not publication.copying:
                process.stores.remove(store)
                store.task.confirmed = store.stage
                store.task.kept.append((store.task.worth(store.stage), self.step))

    def _drop(self, store: Store) -> None:
        """Lose a message that was not confirmed."""
        queue = self.queues[store.publication.message.queue]
        published = store.state.published
        entries = [*queue.ready, *(e for c in queue.consumers for e in c.held.values())]
        for entry in entries:
            headers = entry.properties.get("application_headers") or {}
            if headers.get("published") == published:
                # It expires at once, unless a reader has it already.
                entry.expires = 0

    # -- forgetting --------------------------------------------------------------------------------

    def forget(self) -> Optional[str]:
        task = self.random.choice(self.tasks)
        if task.confirmed < len(task.stages) or task.forget_began is not None:
            return None
        task.forget_began = self.step
        self.forgetting.append((task, None))
        return f"{self._name(task)} is being removed"

    def go_on_forgetting(self) -> Optional[str]:
        if not self.forgetting:
            return None
        task, checkouts = self.forgetting.pop(0)
        try:
            if checkouts is None:
                checkouts = self._check_out({task.shard: {task.id}}, remove=True)
            elif checkouts.step(self._some()):
                self.exchange.broadcast(("forgotten", task.id))
                task.forgotten_at = self.now
                return f"the removal of {self._name(task)} is announced and confirmed"
        except Killed:
            checkouts = None
        self.forgetting.append((task, checkouts))
        return None

    def _some(self) -> int:
        return self.random.choice((2, 100, 100))

    def _check_out(
        self, shards: Mapping[int, Set[str]], census: Any = (), remove: bool = False
    ) -> Checkouts:
        link = Shards(self.queues, lambda: None)

        def between() -> None:
            if self.random.random() < 0.003:
                link.die()

        link.between = between
        reads: List[Any] = []
        for shard, ids in shards.items():
            where: Tuple[Any, Any, int, Any, str] = (self.store_of, link, shard, ids, STATE)
            if remove:
                reads.append(shard_read.Removal(*where))
            else:
                reads.append(shard_read.LookUp(*where, Census() if shard in census else None))
        return Checkouts(link, reads, list(reads))

    # -- reading -----------------------------------------------------------------------------------

    def ask(self) -> Optional[str]:
        if len(self.reads) >= MAX_READS:
            # They would only stand in line.
            return None
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
            self.exchange.pass_through(process.number, read)
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
            if self.random.random() < 0.002 or not self._connected(read.process):
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
        if not missing and not (read.counts and read.look):
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
        try:
            if read.checkouts is None:
                shards: Dict[int, Set[str]] = {shard: set() for shard in read.look.census}
                for task in missing:
                    shards.setdefault(task.shard, set()).add(task.id)
                read.checkouts = self._check_out(shards, frozenset(read.look.census))
                return "reads shards"
            if not read.checkouts.step(self._some()):
                return "receives messages"
        except Killed:
            self._give_up(read)
            return "loses the connection of a look-up"
        self._end_look(read.process, read.look, read.checkouts, read.answers)
        read.look = read.checkouts = None
        return "ends a look-up"

    def _end_look(
        self,
        process: Process,
        look: Look,
        checkouts: Checkouts,
        answers: Dict[str, Optional[StateMessage]],
    ) -> None:
        found: Dict[str, List[StateMessage]] = {}
        censuses: Dict[int, Census] = {}
        for each in checkouts.reads:
            for task_id in each.wanted:
                found[task_id] = self.store_of.readable("shard", each.found.get(task_id, []))
            if each.census is not None:
                each.census.loose = each.credible(each.census.loose)
                censuses[each.shard] = each.census
        process.table.end(look, found, censuses, self.now)
        answers.update((task_id, fold(states)) for task_id, states in found.items())

    def _give_up(self, read: Read) -> None:
        """End a look-up that has failed; the next one begins afresh."""
        if read.look is not None:
            read.process.table.end(read.look, {}, {}, self.now)
        read.look = read.checkouts = None

    def _judge(self, read: Read, task: Task) -> None:
        """Check an answer against everything that was stored, forgotten and seen before."""
        state = read.answers[task.id]
        stage = 0 if state is None else task.stages.index(state.state) + 1
        self.answered += 1
        least = max((s for s, at in (*task.kept, *task.seen) if at < read.began), default=0)
        if task.forget_began is not None:
            if state is None:
                return
            # A slow inbox may have the worse of two ends behind the better one, which a look-up no
            # longer finds; the news of the removal comes after both.
            least = 0
        if task.forgotten_at is not None and task.forgotten_at + PROOF_SECONDS < read.asked_at:
            self.fail(f"{self._name(task)} was forgotten, and is read as {stage}")
        if task.worth(stage) < least:
            self.fail(
                f"{self._name(task)} was at stage {least}, and process {read.process.number} reads "
                f"{stage}"
            )
        if stage > task.begun:
            self.fail(f"{self._name(task)} is read as {stage}, which was never stored")
        if stage in task.copied:
            # Where the live copy follows the confirm, a look-up may find the state before.
            task.seen.append((task.worth(stage), self.step))

    def count(self) -> Optional[str]:
        process = self.random.choice(self.processes)
        shards = process.table.uncounted(self.now)[:2]
        if not shards or len(self.reads) >= MAX_READS:
            return None
        # The other readers may hold the shards, so this read goes on step by step as well.
        read = Read(process, [], self.step, self.now)
        read.look = process.table.begin((), self.now, shards)
        read.counts = True
        self.reads.append(read)
        return f"process {process.number} counts {shards}"

    # -- connections -------------------------------------------------------------------------------

    def _connected(self, process: Process) -> bool:
        return process.number in self.exchange.inboxes

    def _wants_inbox(self, process: Process) -> bool:
        return process.table.bindings.wants_inbox

    def connect(self) -> Optional[str]:
        process = self.random.choice(self.processes)
        if self._connected(process) or not self._wants_inbox(process):
            return None
        self.exchange.open(process.number)
        process.opened(self.now)
        self._act(process)
        return f"process {process.number} opens its inbox"

    def _act(self, process: Process) -> None:
        if not self._connected(process):
            return
        for action in process.table.actions(self.now):
            if action.bind:
                process.asked.append(action.key)
            else:
                self.exchange.unbind(process.number, action.key)
                process.late.pop(action.key, None)

    def bind(self) -> Optional[str]:
        process = self.random.choice(self.processes)
        if not process.asked:
            return None
        key = process.asked.pop(0)
        # In a cluster it takes effect on another node a moment later.
        if self.random.random() < 0.5:
            self.exchange.bind(process.number, key)
        else:
            process.late[key] = self.now + STEADY * 0.99
        process.bound(key, self.now)
        return f"process {process.number} is bound to {key}, late: {key in process.late}"

    def take_effect(self) -> Optional[str]:
        late = [(process, key) for process in self.processes for key in process.late]
        if not late:
            return None
        process, key = self.random.choice(late)
        del process.late[key]
        self.exchange.bind(process.number, key)
        return f"the binding of process {process.number} to {key} takes effect"

    def deliver(self) -> Optional[str]:
        process = self.random.choice(self.processes)
        inbox = self.exchange.inboxes.get(process.number)
        if inbox is None or not inbox.messages:
            return None
        message = inbox.messages.popleft()
        table = process.table
        if isinstance(message, Read):
            if message.barrier == "under way":
                message.barrier = "back"
            table.proved(message.asked_at)
            what = "a barrier"
        elif isinstance(message, StateMessage):
            process.pushed(message, self.now)
            if table.bindings.restless:
                self._act(process)
            what = f"{message.state} of {message.id[:4]}"
        else:
            table.forgotten(message[1], self.now)
            what = f"that {message[1][:4]} is forgotten"
        return f"process {process.number} is given {what}"

    def lose(self) -> Optional[str]:
        connected = list(filter(self._connected, self.processes))
        if not connected:
            return None
        process = self.random.choice(connected)
        self._disconnect(process)
        return f"process {process.number} loses its connection"

    def _disconnect(self, process: Process) -> None:
        self.exchange.lose(process.number)
        process.lost()
        process.asked.clear()
        process.late.clear()

    def crash(self) -> str:
        """Kill the broker: what it has not confirmed may be lost, and is published again."""
        for process in list(filter(self._connected, self.processes)):
            self._disconnect(process)
        for read in self.reads:
            if read.checkouts is not None:
                read.checkouts.link.die()
            self._give_up(read)
            # Before the crash they may have read the states that were lost.
            read.answers.clear()
            read.began = self.step
        for checkouts in self._other_checkouts():
            checkouts.link.die()
        for process in self.processes:
            for store in process.stores:
                if store.publication.status is not Status.CONFIRMED:
                    # It may have been seen before; that is not promised.
                    task, stage = store.task, store.stage
                    task.seen = [each for each in task.seen if each[0] < task.worth(stage)]
                    if self.random.random() < 0.5:
                        self._drop(store)
            process.log.lost(OSError("killed"))
            process.connect_publisher()
            self._decide(process)
        return "the broker is killed, and back"

    def _other_checkouts(self) -> List[Checkouts]:
        """Return those that belong to no read."""
        return [checkouts for _, checkouts in self.forgetting if checkouts is not None]

    def wait(self) -> str:
        seconds = self.random.choice((0.1, 0.3, 0.3, 0.5, 0.5, 1.0, 1.0, 5.0, 20.0))
        self.clock.microseconds += int(seconds * 1e6)
        for process in self.processes:
            for key, at in list(process.late.items()):
                if self.now >= at:
                    del process.late[key]
                    self.exchange.bind(process.number, key)
        under_way = [each.checkouts for each in self.reads] + self._other_checkouts()
        for checkouts in under_way:
            for each in checkouts.left if checkouts is not None else ():
                with contextlib.suppress(Killed):
                    each.checkout.renew_fence()
        return "time passes"

    # -- the verdict -------------------------------------------------------------------------------

    def _check_memory(self, table: Any) -> None:
        size = sum(entry.size for entry in table.memory.recent.values())
        digests = sum(len(view.digests or ()) for view in table.memory.views.values())
        if (size, digests) != (table.memory._recent_bytes, table.memory._digests):
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
