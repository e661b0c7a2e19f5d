"""A simulation of several leaders of chords, on a model of the broker.

The leaders are the real ones. The model has what they depend on: plan queues with a single active
consumer, a store, an inbox for each connection, bindings that take effect some time after they were
confirmed, look-ups that take a while, acknowledgements that are lost with a connection, and
processes that are killed. A seed decides in which order everything happens.

Checked: every chord fires its body; never before all tasks of its header have ended, including
those that were added; and again only if the leader that has sent it lost its connection or its life
before the broker had its acknowledgement.
"""

from __future__ import annotations

import collections
import dataclasses
import random
import uuid
from typing import Any, Callable, Deque, Dict, Iterator, List, Optional, Set, Tuple

from celery_amqp_results.chords.actions import Acknowledge, Bind, Fire, GiveUp, LookUp
from celery_amqp_results.chords.leader import SETTLE_SECONDS, Leader
from celery_amqp_results.chords.pending import SKEW
from celery_amqp_results.chords.plan import Amendment, Plan, leaves
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.names import plan_number
from celery_amqp_results.protocol.ranking import fold
from tests.simulation.model import Broken

LEADERS = 3
CHORDS = 6
STEPS = 900

#: Seconds in which a run must come to rest after the last fault.
PATIENCE = 2000.0


@dataclasses.dataclass
class Message:
    """A plan or an amendment in a plan queue."""

    content: Any
    number: int
    redelivered: bool = False


@dataclasses.dataclass
class Chord:
    """A chord, and what has become of it."""

    plan: Plan
    #: The tasks that must end before the body is sent, and those that have ended.
    tasks: List[str]
    ended: Set[str] = dataclasses.field(default_factory=set)
    #: The marks of the last amendments by tasks.
    amended: Dict[str, str] = dataclasses.field(default_factory=dict)
    published: bool = False
    #: The connections that have sent the body.
    senders: List[Session] = dataclasses.field(default_factory=list)
    #: When a state of the body was stored first.
    proven_at: Optional[int] = None


@dataclasses.dataclass(eq=False)
class Session:
    """A connection of a leader."""

    alive: bool = True
    unacked: Dict[int, Message] = dataclasses.field(default_factory=dict)
    #: Deliveries on their way, by plan queue, and pushed states.
    plans: Dict[int, Deque[Tuple[int, Message]]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(collections.deque)
    )
    states: Deque[StateMessage] = dataclasses.field(default_factory=collections.deque)
    #: Acknowledgements on their way; those of one chord go together.
    acks: Deque[Tuple[int, ...]] = dataclasses.field(default_factory=collections.deque)
    #: Bound plan queues, and when that takes effect.
    bound: Dict[int, float] = dataclasses.field(default_factory=dict)


class Process:
    """A process that may lead: its leader, its connection, and its helpers."""

    def __init__(self, memory: int, skew: int) -> None:
        self.memory = memory
        self.skew = skew
        self.session: Optional[Session] = None
        self.restart()

    def restart(self) -> None:
        """Begin without any memory."""
        self.leader = Leader(self.memory)
        #: What helper threads do: look-ups and their findings, bodies and whether they were sent.
        self.looking: List[Tuple[LookUp, Any]] = []
        self.firing: List[Tuple[Fire, Session, bool]] = []


class ChordSimulation:
    """One run.

    Parameters:
        seed: decides everything.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.now = 1000.0
        self.step = 0
        self.calm = False
        self.schedule: List[str] = []
        self.tag = 0
        self.ready: Dict[int, Deque[Message]] = collections.defaultdict(collections.deque)
        #: Consumers of all plan queues, the active one first.
        self.consumers: List[Session] = []
        self.store: Dict[str, List[StateMessage]] = collections.defaultdict(list)
        memory = self.random.choice((0, 30, 1_000_000))
        self.processes = [
            Process(memory, self.random.randrange(-SKEW // 3, SKEW // 3)) for _ in range(LEADERS)
        ]
        self.chords = [self._new_chord() for _ in range(CHORDS)]
        self.sent = 0
        self.repeated = 0

    @property
    def wall(self) -> int:
        """Microseconds since 1970."""
        return int((self.now + 1e6) * 1e6)

    def _id(self) -> str:
        return str(uuid.UUID(int=self.random.getrandbits(128), version=4))

    def _new_chord(self) -> Chord:
        tasks = [self._id() for _ in range(self.random.choice((1, 2, 3, 5)))]
        began = self.wall + self.random.randrange(-SKEW // 3, SKEW // 3)
        plan = Plan(self._id(), self._id(), list(tasks), began, proofs=(self._id(),))
        return Chord(plan, tasks)

    def run(self) -> ChordSimulation:
        """Run to the end.

        Raises:
            Broken: when a promise is broken.
        """
        usual: List[Tuple[float, Callable[[], Optional[str]]]] = [
            (3, self.publish), (4, self.end_task), (1, self.amend), (6, self.deliver),
            (8, self.take_in), (8, self.perform), (5, self.help), (6, self.flush),
            (1, self.run_body), (3, self.connect), (3, self.wait),
        ]  # fmt: skip
        rare: List[Callable[[], Optional[str]]] = [
            self.lose, self.kill, self.recover, self.publish_again,
        ]  # fmt: skip
        weights = [weight for weight, _ in usual]
        for self.step in range(STEPS):
            if self.random.random() < 0.02:
                self._do(self.random.choice(rare))
            else:
                self._do(self.random.choices(usual, weights)[0][1])
        self._come_to_rest(usual, weights)
        return self

    def _do(self, action: Callable[[], Optional[str]]) -> None:
        done = action()
        if done is not None:
            self.schedule.append(f"{self.step:4} {self.now:9.2f} {done}")

    def _come_to_rest(self, usual: List[Tuple[float, Any]], weights: List[float]) -> None:
        self.calm = True
        end = self.now + PATIENCE
        while not all(chord.senders for chord in self.chords) or self._left():
            self.step += 1
            if self.now > end:
                raise self._broken(f"chords are open or plans are left for ever: {self._left()}")
            self._do(self.random.choices(usual, weights)[0][1])

    def _left(self) -> int:
        return sum(map(len, self.ready.values())) + sum(
            len(session.unacked) for session in self.consumers
        )

    def _broken(self, what: str) -> Broken:
        return Broken("\n".join((*self.schedule[-400:], f"seed {self.seed}: {what}")))

    # -- senders and workers -----------------------------------------------------------------------

    def _queue(self, content: Any) -> None:
        number = plan_number(content.group_id)
        self.ready[number].append(Message(content, number))

    def publish(self) -> Optional[str]:
        chord = self.random.choice(self.chords)
        if chord.published:
            return None
        chord.published = True
        self._queue(chord.plan)
        return f"the plan of {chord.plan.group_id:.4} is published"

    def publish_again(self) -> Optional[str]:
        """The sender has lost the confirm of a plan that the broker had."""
        chord = self.random.choice(self.chords)
        if not chord.published or chord.senders:
            return None
        self._queue(chord.plan)
        return f"the plan of {chord.plan.group_id:.4} is published again"

    def end_task(self) -> Optional[str]:
        chord = self.random.choice(self.chords)
        waiting = [task for task in chord.tasks if task not in chord.ended]
        # The last task of a header is sent after the plan.
        if not chord.published:
            waiting = [task for task in waiting if task != chord.plan.results[-1]]
        again = self.random.random() < 0.1 and bool(chord.ended)
        if not again and not waiting:
            return None
        task = self.random.choice(sorted(chord.ended) if again else waiting)
        chord.ended.add(task)
        self._store(task, chord.plan.group_id, chord.amended.get(task))
        return f"a task {task:.4} of {chord.plan.group_id:.4} ends"

    def _store(self, task: str, group_id: Optional[str], amended: Optional[str]) -> None:
        status = self.random.choice(("SUCCESS", "SUCCESS", "FAILURE"))
        state = StateMessage(
            task, status, self.wall, b"x" * 10, "application/json", "utf-8", amended=amended
        )
        self.store[task].append(state)
        for session in self.consumers:
            if group_id and session.bound.get(plan_number(group_id), self.now + 1) <= self.now:
                session.states.append(state)

    def amend(self) -> Optional[str]:
        """A running task of a header adds a task to it."""
        chord = self.random.choice(self.chords)
        running = [task for task in chord.tasks if task not in chord.ended]
        if not chord.published or not running or len(chord.tasks) > 8:
            return None
        task, added = self.random.choice(running), self._id()
        amendment = Amendment(
            chord.plan.group_id, self._id(), task, [added], began=self.wall, expires=60_000
        )
        chord.tasks.append(added)
        chord.amended[task] = amendment.mark
        self._queue(amendment)
        return f"a task {task:.4} of {chord.plan.group_id:.4} adds {added:.4}"

    def run_body(self) -> Optional[str]:
        chord = self.random.choice(self.chords)
        if not chord.senders or chord.proven_at is not None:
            return None
        chord.proven_at = self.step
        self._store(chord.plan.proofs[0], None, None)
        return f"the body of {chord.plan.group_id:.4} runs"

    # -- the broker --------------------------------------------------------------------------------

    def deliver(self) -> Optional[str]:
        numbers = [number for number, messages in self.ready.items() if messages]
        if not numbers or not self.consumers:
            return None
        number = self.random.choice(numbers)
        session = self.consumers[0]
        message = self.ready[number].popleft()
        self.tag += 1
        session.unacked[self.tag] = message
        session.plans[number].append((self.tag, message))
        return f"{type(message.content).__name__} of {message.content.group_id:.4} is delivered"

    def flush(self) -> Optional[str]:
        sessions = [session for session in self.consumers if session.acks]
        if not sessions:
            return None
        session = self.random.choice(sessions)
        for tag in session.acks.popleft():
            session.unacked.pop(tag, None)
        return "the broker has an acknowledgement"

    def _requeue(self, session: Session) -> None:
        for tag in sorted(session.unacked, reverse=True):
            message = session.unacked[tag]
            self.ready[message.number].appendleft(dataclasses.replace(message, redelivered=True))
        session.unacked.clear()

    def _end_session(self, process: Process) -> None:
        session = process.session
        if session is not None:
            session.alive = False
            self.consumers.remove(session)
            self._requeue(session)
            process.session = None

    def connect(self) -> Optional[str]:
        process = self.random.choice(self.processes)
        if process.session is not None:
            return None
        process.session = Session()
        self.consumers.append(process.session)
        return f"process {self.processes.index(process)} connects"

    def lose(self) -> Optional[str]:
        process = self.random.choice(self.processes)
        if process.session is None:
            return None
        self._end_session(process)
        process.leader.connection_lost({action.plan.mark for action, *_ in process.firing})
        return f"process {self.processes.index(process)} loses its connection"

    def kill(self) -> Optional[str]:
        process = self.random.choice(self.processes)
        self._end_session(process)
        process.restart()
        return f"process {self.processes.index(process)} is killed"

    def recover(self) -> Optional[str]:
        """A leader has its open plans delivered again."""
        process = self.random.choice(self.processes)
        session = process.session
        if session is None or session.acks:
            return None
        for number in list(session.plans):
            while session.plans[number]:
                self._take_plan(process, number)
        self._perform(process)
        while session.acks:
            for tag in session.acks.popleft():
                session.unacked.pop(tag, None)
        self._requeue(session)
        process.leader.requeued()
        return f"process {self.processes.index(process)} takes its plans again"

    # -- leaders -----------------------------------------------------------------------------------

    def take_in(self) -> Optional[str]:
        """A leader takes in a delivery of one of its queues."""
        process = self.random.choice(self.processes)
        session = process.session
        if session is None:
            return None
        sources = [number for number, messages in session.plans.items() if messages]
        if session.states and (not sources or self.random.random() < 0.5):
            process.leader.state_pushed(
                session.states.popleft(), self.now, self.wall + process.skew
            )
        elif sources:
            self._take_plan(process, self.random.choice(sources))
        return None

    def _take_plan(self, process: Process, number: int) -> None:
        assert process.session is not None
        tag, message = process.session.plans[number].popleft()
        if isinstance(message.content, Plan):
            process.leader.plan_delivered(message.content, tag, message.redelivered, self.now)
        else:
            process.leader.amendment_delivered(message.content, tag, self.now)

    def perform(self) -> Optional[str]:
        process = self.random.choice(self.processes)
        if process.session is not None:
            self._perform(process)
        return None

    def _perform(self, process: Process) -> None:
        session, leader = process.session, process.leader
        assert session is not None
        leader.tick(self.now, self.wall + process.skew)
        for action in leader.take():
            if isinstance(action, Bind):
                late = self.random.choice((0.0, 0.9 * SETTLE_SECONDS))
                session.bound[action.number] = self.now + late
                leader.bound(action.number, self.now, self.wall + process.skew)
            elif isinstance(action, Acknowledge):
                session.acks.append(action.deliveries)
            elif isinstance(action, LookUp):
                process.looking.append((action, None))
            elif isinstance(action, Fire):
                process.firing.append((action, session, False))
            else:
                assert isinstance(action, GiveUp)
                over = [c for c in self.chords if c.plan.group_id == action.group_id and c.senders]
                if not over:
                    raise self._broken(f"a chord was given up: {action.why}")

    def help(self) -> Optional[str]:
        """A helper thread does the next step of its work."""
        process = self.random.choice(self.processes)
        jobs: List[Callable[[], Optional[str]]] = []
        if process.looking:
            jobs.append(lambda: self._look_up(process))
        if process.firing:
            jobs.append(lambda: self._fire(process))
        return self.random.choice(jobs)() if jobs else None

    def _look_up(self, process: Process) -> Optional[str]:
        request, found = process.looking.pop(0)
        if not self.calm and self.random.random() < 0.1:
            process.leader.look_up_failed(request, self.now)
            return "a look-up fails"
        if found is None:
            states = {task: fold(self.store[task]) for task in sorted(request.tasks)}
            ends = {task: state for task, state in states.items() if state is not None}
            bodies = {task: list(self.store[task]) for task in sorted(request.bodies)}
            process.looking.insert(0, (request, (ends, bodies)))
            return "a look-up reads the store"
        ends, bodies = found
        process.leader.looked_up(request, ends, bodies, self.now)
        return "a look-up ends"

    def _fire(self, process: Process) -> Optional[str]:
        action, session, sent = process.firing.pop(0)
        mark = action.plan.mark
        if sent:
            process.leader.sent(mark)
            return "a helper reports that a body was sent"
        if not session.alive or (not self.calm and self.random.random() < 0.2):
            process.leader.not_sent(mark, self.now)
            return "a body cannot be sent"
        (chord,) = [chord for chord in self.chords if chord.plan.mark == mark]
        self._check(chord, action)
        chord.senders.append(session)
        self.sent += 1
        process.firing.insert(0, (action, session, True))
        return f"process {self.processes.index(process)} sends the body of {chord.plan.group_id:.4}"

    def _check(self, chord: Chord, action: Fire) -> None:
        if set(leaves(action.results)) != set(chord.tasks) or set(chord.tasks) - chord.ended:
            raise self._broken(f"chord {chord.plan.group_id:.4} is fired without all its tasks")
        if not set(action.ends) >= set(chord.tasks):
            raise self._broken(f"chord {chord.plan.group_id:.4} is fired without some results")
        if any(session.alive for session in chord.senders):
            raise self._broken(f"chord {chord.plan.group_id:.4} is fired twice")
        self.repeated += bool(chord.senders)

    def wait(self) -> Optional[str]:
        self.now += self.random.choice((0.001, 0.01, 0.3, 2.0, 20.0))
        return None


def run_chords(first: int, count: int) -> Iterator[ChordSimulation]:
    """Run *count* seeds from *first* on."""
    for seed in range(first, first + count):
        yield ChordSimulation(seed).run()
