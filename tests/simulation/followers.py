"""Clients that wait for tasks, on the simulation of :mod:`tests.simulation.model`.

The clients are real: the follower with its table, the inbox with its waiters, and the reads. Where
one of them would wait (for a state, a binding, a barrier or the store), the simulation goes on with
something else instead. Each client is a thread for that; only one thread runs at a time.

Promises: a client receives each state once, and a final state once for each task. No wait is
forgotten. What ends a wait outranks, or is, what was confirmed or seen before the wait began.
Only a state that is on its way to the inbox then may come after another final state of a task that
ran twice.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Set, Tuple
from unittest import mock

from celery_amqp_results import errors
from celery_amqp_results.feed import inbox as inbox_module
from celery_amqp_results.feed.inbox import Inbox
from celery_amqp_results.feed.reads import Reads
from celery_amqp_results.feed.waiter import Waiter
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.page import Census
from celery_amqp_results.toolkit import retry
from celery_amqp_results.waiting import follower
from tests.simulation.model import STAGES, Checkouts, Process, Read, Simulation, Task
from tests.unit.broker_model import Killed

#: Some tasks run twice.
TWICE = (("STARTED", "FAILURE", "SUCCESS"), ("STARTED", "SUCCESS", "FAILURE"))
MAX_CLIENTS = 4
#: Steps after which a wait counts as forgotten, when its task has ended.
PATIENCE = 40_000
SECONDS = 60.0


class Ended(BaseException):
    """Raised in the thread of a client whose run is over."""


class Turn(threading.local):
    """The client whose thread this is."""

    client: Optional[Client] = None


turn = Turn()


def go_on_until(condition: Callable[[], object]) -> None:
    """Let everything else go on until *condition* holds."""
    client = turn.client
    assert client is not None
    while not condition():
        client.pause()


class SimulatedWaiter(Waiter):
    """A waiter that waits in the time of the simulation."""

    def wait(self, timeout: float) -> bool:
        client = turn.client
        assert client is not None
        end = client.run.now + timeout
        go_on_until(lambda: self._event.is_set() or client.run.now >= end)
        return self._event.is_set()


class Changed:
    """Stands for the lock of an inbox, which no two threads want at once."""

    def __init__(self, run: FollowerSimulation) -> None:
        self._run = run

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc_info: object) -> None:
        pass

    def notify_all(self) -> None:
        pass

    def wait(self, seconds: float) -> None:
        client, end, step = turn.client, self._run.now + seconds, self._run.step
        assert client is not None
        go_on_until(lambda: self._run.step > step or self._run.now >= end)


class Keeper:
    """Stands for the thread of an inbox: the simulation connects."""

    failure = None
    closing = False

    def __init__(self) -> None:
        self.started = False

    def start(self) -> None:
        self.started = True

    def is_hopeless(self, now: float) -> bool:
        return False


class Session:
    """Stands for the connection of an inbox."""

    def __init__(self, run: FollowerSimulation, process: FollowingProcess) -> None:
        self._run = run
        self._process = process

    def wake(self) -> None:
        self._run._act(self._process)

    def replace(self, why: str) -> None:
        self._run.suspected += 1
        self._process.failed = True

    def take_in(self) -> bool:
        return True

    def pass_barrier(self, timeout: float) -> bool:
        run = self._run
        barrier = Read(self._process, [], run.step, run.now, barrier="under way")
        end = run.now + timeout
        run.exchange.pass_through(self._process.number, barrier)
        go_on_until(lambda: barrier.barrier == "back" or run.now >= end)
        return barrier.barrier == "back"


class Store:
    """Stands for the store: real checkouts on the model of the broker."""

    check = None

    def __init__(self, run: FollowerSimulation) -> None:
        self._run = run

    def read(
        self, ids: Iterable[str], deadline: Optional[float], censuses: Dict[int, Census]
    ) -> Dict[str, List[StateMessage]]:
        run = self._run
        shards: Dict[int, Set[str]] = {shard: set() for shard in sorted(censuses)}
        for task_id in sorted(ids):
            shards.setdefault(run.topology.shard(task_id), set()).add(task_id)
        run.note(f"a client begins to read {[task_id[:4] for task_id in sorted(ids)]}")
        try:
            checkouts = run._check_out(shards, frozenset(censuses))
            with run.killed_in_crashes(checkouts):
                go_on_until(lambda: checkouts.step(run._some()))
        except Killed as exc:
            raise errors.BackendUnavailable("the connection is lost") from exc
        run.note("a client has read the store")
        found = {}
        for each in checkouts.reads:
            for task_id in each.wanted:
                found[task_id] = run.store_of.readable("shard", each.found.get(task_id, []))
            if each.census is not None:
                each.census.loose = each.credible(each.census.loose)
                censuses[each.shard] = each.census
        return found


class FollowingProcess(Process):
    """A process with a real inbox."""

    def __init__(self, number: int, run: FollowerSimulation, limit: int) -> None:
        declarations: Any = mock.Mock(topology=run.topology)
        self.inbox = inbox = Inbox(mock.Mock(), declarations, f"client{number}", limit)
        any_inbox: Any = inbox
        any_inbox._changed = Changed(run)
        any_inbox._keeper = self.keeper = Keeper()
        any_inbox._pushed = mock.Mock(read=lambda message: message)
        self.reads = Reads(inbox, Store(run))  # type: ignore[arg-type]
        any_reads: Any = self.reads
        any_reads._count_rest = lambda: None
        self._run = run
        #: Whether its connection must be replaced.
        self.failed = False
        super().__init__(number, inbox._table)

    def sent(self, task_id: str, now: float) -> None:
        self.inbox.note_sent(task_id)

    def opened(self, now: float) -> None:
        self.failed = False
        self.inbox.on_open(Session(self._run, self))  # type: ignore[arg-type]

    def lost(self) -> None:
        self.inbox.on_lost()

    def bound(self, key: int, now: float) -> None:
        self.inbox.on_bound(key)

    def pushed(self, state: StateMessage, now: float) -> None:
        self.inbox.on_message(state)


class Client:
    """A client that waits for tasks, in a thread that runs when :meth:`resume` is called."""

    def __init__(self, run: FollowerSimulation, process: FollowingProcess) -> None:
        self.run = run
        self.process = process
        self._to_client, self._to_run = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._ending = False
        self._failure: Optional[BaseException] = None
        #: The awaited tasks, and what the end of the wait for each must be worth.
        self.awaited: Dict[str, Tuple[Task, int]] = {}
        self.told: Dict[str, Set[Tuple[int, str]]] = {}
        #: Tasks to wait for as well, and whether to stop waiting for all.
        self.more: List[Task] = []
        self.leaves = False
        self._thread.start()

    # -- the simulation's side ---------------------------------------------------------------------

    @property
    def over(self) -> bool:
        """Whether nothing is left to do."""
        return not self._thread.is_alive()

    def resume(self) -> None:
        """Let it run until it waits again."""
        self._to_client.release()
        self._to_run.acquire()
        if self._failure is not None:
            raise self._failure

    def end(self) -> None:
        """End its thread."""
        if not self.over:
            self._ending = True
            self._to_client.release()
        self._thread.join(SECONDS)

    # -- its own side ------------------------------------------------------------------------------

    def pause(self) -> None:
        """Let the simulation go on."""
        self._to_run.release()
        self._to_client.acquire()
        if self._ending:
            raise Ended

    def _main(self) -> None:
        turn.client = self
        self._to_client.acquire()
        try:
            if not self._ending:
                self._follow()
        except Ended:
            pass
        except BaseException as exc:
            self._failure = exc
        self._to_run.release()

    def _follow(self) -> None:
        with contextlib.closing(
            follower.Follower(self.process.inbox, self.process.reads)
        ) as following:
            while not self.leaves:
                if self.more:
                    more, self.more = self.more, []
                    for task in more:
                        least = self.run.least(self.process, task)
                        self.awaited.setdefault(task.id, (task, least))
                    following.add([task.id for task in more])
                if not following.pending:
                    return
                released = following._tasks.held_until()
                for update in following.step(None, self.run.random.choice((0.1, 1.0, 60.0))):
                    # A state that was held for as long as that is yielded, whatever the store has.
                    self._take(update, sure=self.run.now < released)
                self.run.rechecked += len(following._tasks.unpushed)
                self._check(following)
                self.pause()

    def _take(self, update: Any, sure: bool) -> None:
        run = self.run
        states = [state.state for state in update.states]
        run.note(
            f"a client of process {self.process.number} is told that {update.task_id:.4} is "
            f"{states}, read: {update.history}"
        )
        if update.task_id not in self.awaited:
            run.fail(f"a client is told of {update.task_id:.4} after its end")
        task, least = self.awaited[update.task_id]
        told = self.told.setdefault(task.id, set())
        for state in update.states:
            key = (state.published, state.state)
            if key in told:
                run.fail(f"a client is told twice that {run._name(task)} is {state.state}")
            told.add(key)
        published = [state.published for state in update.states]
        if published != sorted(published):
            run.fail(f"a client is told the states of {run._name(task)} in another order")
        if update.final is None:
            return
        del self.awaited[task.id], self.told[task.id]
        run.ended += 1
        worth = task.worth(task.stages.index(update.final.state) + 1)
        if sure and worth < least and task.forget_began is None:
            run.fail(
                f"{run._name(task)} was worth {least}, and a client is told {update.final.state}"
            )

    def _check(self, following: follower.Follower) -> None:
        if set(following.pending) != set(self.awaited):
            self.run.fail("a client waits for other tasks than it should")


class FollowerSimulation(Simulation):
    """One run with clients that wait.

    Parameters:
        seed: decides everything.
    """

    def __init__(self, seed: int) -> None:
        self.clients: List[Client] = []
        self.followed_checkouts: List[Checkouts] = []
        #: Waits that have ended; those whose push had been missed; connections suspected for it.
        self.ended = 0
        self.rechecked = 0
        self.suspected = 0
        super().__init__(seed)

    def _new_process(self, number: int, limit: int) -> Process:
        return FollowingProcess(number, self, limit)

    def _new_task(self) -> Task:
        task = super()._new_task()
        task.stages = self.random.choice((STAGES, STAGES, *TWICE))
        if self.random.random() < 0.5:
            # Sent long before its first state.
            self.processes[task.owner].sent(task.id, self.now)
        return task

    def run(self) -> FollowerSimulation:
        with contextlib.ExitStack() as stack:
            for module, name, value in (
                (follower, "time", self.clock), (follower, "Waiter", SimulatedWaiter),
                (inbox_module, "time", self.clock), (retry, "time", self.clock),
                (follower, "warn_of_failed_look_up", lambda exc: None),
            ):  # fmt: skip
                stack.enter_context(mock.patch.object(module, name, value))
            try:
                super().run()
            finally:
                for client in self.clients:
                    client.end()
        return self

    def _actions(self) -> List[Tuple[float, Callable[[], Optional[str]]]]:
        return [
            *super()._actions(), (3, self.follow), (30, self.go_on_waiting), (0.2, self.leave),
            (2, self.replace),
        ]  # fmt: skip

    def _wants_inbox(self, process: Process) -> bool:
        assert isinstance(process, FollowingProcess)
        return process.keeper.started or super()._wants_inbox(process)

    def _other_checkouts(self) -> List[Checkouts]:
        return super()._other_checkouts() + self.followed_checkouts

    def least(self, process: Process, task: Task) -> int:
        """Return what the state that ends a wait must be worth."""
        inbox = self.exchange.inboxes.get(process.number)
        coming = {
            task.worth(task.stages.index(message.state) + 1)
            for message in (inbox.messages if inbox else ())
            if isinstance(message, StateMessage) and message.id == task.id
        }
        confirmed = {worth for worth, _ in (*task.kept, *task.seen)}
        return max(confirmed - coming, default=0)

    def note(self, what: str) -> None:
        """Add a line to the schedule."""
        self.schedule.append(f"{self.step:4} {self.now:9.2f} {what}")

    @contextlib.contextmanager
    def killed_in_crashes(self, checkouts: Checkouts) -> Iterator[None]:
        """Kill the connection of *checkouts* with the broker, and at the end."""
        self.followed_checkouts.append(checkouts)
        try:
            yield
        finally:
            checkouts.link.die()
            self.followed_checkouts.remove(checkouts)

    # -- clients -----------------------------------------------------------------------------------

    def follow(self) -> Optional[str]:
        """A client begins to wait, or waits for another task."""
        tasks = self.random.sample(self.tasks, self.random.choice((1, 1, 3)))
        tasks = [task for task in tasks if task.forget_began is None]
        if not tasks:
            return None
        if len(self.clients) < MAX_CLIENTS:
            process = self.random.choice(self.processes)
            assert isinstance(process, FollowingProcess)
            client = Client(self, process)
            self.clients.append(client)
        else:
            client = self.random.choice(self.clients)
        client.more += tasks
        names = ", ".join(map(self._name, tasks))
        return f"a client of process {client.process.number} waits for {names}"

    def go_on_waiting(self) -> Optional[str]:
        """A client goes on."""
        if not self.clients:
            return None
        client = self.random.choice(self.clients)
        client.resume()
        if client.over:
            self.clients.remove(client)
        return None

    def leave(self) -> Optional[str]:
        """A client stops waiting before the end."""
        if not self.clients:
            return None
        client = self.random.choice(self.clients)
        client.leaves = True
        return f"a client of process {client.process.number} leaves"

    def replace(self) -> Optional[str]:
        """A process replaces a connection on which nothing came that should have."""
        for process in self.processes:
            assert isinstance(process, FollowingProcess)
            if process.failed and self._connected(process):
                process.failed = False
                self._disconnect(process)
                return f"process {process.number} replaces its connection"
        return None

    # -- the end -----------------------------------------------------------------------------------

    def _run(self) -> None:
        super()._run()
        actions = self._actions()
        excluded = {self.follow, self.forget, self.ask, self.leave}
        actions = [each for each in actions if each[1] not in excluded]
        weights = [weight for weight, _ in actions]
        last = self.step + PATIENCE
        awaited: Dict[str, Task] = {}
        while self._is_anybody_waiting():
            self.step += 1
            if self.step > last:
                names = ", ".join(map(self._name, awaited.values()))
                self.fail(f"a wait is forgotten: {names}")
            ((_, action),) = self.random.choices(actions, weights)
            self._do(action)
            awaited = {i: task for c in self.clients for i, (task, _) in c.awaited.items()}
            for task in awaited.values():
                if task not in self.tasks:
                    # Only the tasks in this list go on to be stored.
                    self.tasks.append(task)

    def _go_on_at_the_end(self) -> None:
        super()._go_on_at_the_end()
        self.go_on_waiting()

    def _is_anybody_waiting(self) -> bool:
        return any(
            client.more or any(t.forget_began is None for t, _ in client.awaited.values())
            for client in self.clients
        )


def run_followers(first: int, count: int) -> Iterator[FollowerSimulation]:
    """Run *count* seeds from *first* on."""
    for seed in range(first, first + count):
        yield FollowerSimulation(seed).run()
