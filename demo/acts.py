"""The demo, act by act."""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import datetime
import logging
import os
import statistics
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import celery
from celery import Celery, chord, group
from celery.exceptions import TimeoutError
from celery.result import AsyncResult, GroupResult, ResultSet

import celery_amqp_results
from celery_amqp_results.protocol.names import PLAN_QUEUES
from demo import interrupts, processes, reader, screen
from demo.processes import Broker, Failed, settings
from tools import rabbitmq

#: Time limit of each part of the demo, in seconds.
TIMEOUT = 60.0

#: Fewer than the default of 256, whose declaration at first use would take over a second.
SHARDS = 16

WORKER_PROCESSES = 4
FAILING = 5
RENDERED = ("render a", "render b", "render c", "render d")
FRAMES = 30
SECONDS_A_FRAME = 0.1
#: Ids that a reader looks up one by one; the members of the group it reads together.
SINGLE_LOOKUPS = 20
#: How often a reader reads everything.
ROUNDS = 2

#: Celery prefers these variables to the app's configuration.
CELERY_VARIABLES = (
    "CELERY_BROKER_URL",
    "CELERY_BROKER_READ_URL",
    "CELERY_BROKER_WRITE_URL",
    "CELERY_RESULT_BACKEND",
    "CELERY_CONFIG_MODULE",
    "CELERY_LOADER",
)


class Show:
    """The sent tasks and their outcomes.

    Parameters:
        view: the screen that shows them.
        app: the app that sends.
        tasks: how many members the group has.
        every_state: whether every state is pushed, or only the latest of several in a row.
    """

    def __init__(
        self, view: screen.Screen, app: Celery, tasks: int, every_state: bool = True
    ) -> None:
        self.view = view
        self.app = app
        self.tasks = tasks
        self.every_state = every_state
        self.plain = max(10, tasks // 5)
        self.header = max(2, min(100, tasks))
        #: Everything sent, by id, as the sender saw it.
        self.seen: reader.Seen = {}
        self.singles: List[str] = []
        self.group_id = ""
        self.chord_id = uuid.uuid4().hex
        self.rows: List[Sequence[str]] = []
        self.wrong: List[str] = []

    def expect(self, condition: bool, otherwise: str) -> None:
        """Note *otherwise* as wrong unless *condition* holds."""
        if not condition:
            self.wrong.append(otherwise)

    def row(self, what: str, came: str, bar: screen.Bar) -> None:
        """Note a line of the table."""
        self.rows.append((what, str(bar.total), came, f"{bar.seconds or 0.0:.2f} s"))

    def remember(self, results: Sequence[AsyncResult]) -> None:
        """Note what the sender saw of *results*."""
        for result in results:
            self.seen[result.id] = reader.look(result)

    # -- the acts ----------------------------------------------------------------------------

    def send_first(self, bars: screen.Bars) -> None:
        """One task. Waiting for it opens the connection that results are pushed on."""
        from demo.tasks import add

        bar = bars.add("the first", 1)
        result = add.delay(40, 2)
        value = result.get(timeout=TIMEOUT)
        self.expect(value == 42, f"the first task returned {value}")
        bar.advance()
        bar.finish(f"returned {value}; connections were opened")
        self.remember([result])
        self.singles.append(result.id)
        self.row("the first task", f"returned {value}", bar)

    def send_plain(self, bars: screen.Bars) -> None:
        """Tasks that just return something."""
        from demo.tasks import add

        bar = bars.add("plain", self.plain)
        pushed = Pushes(bar)
        results: List[AsyncResult] = []
        for i in range(self.plain):
            results.append(add.delay(i, i))
            results[-1].then(pushed.on_ready)
        self.expect(pushed.wait_for(self.plain), "not every callback was called")
        values = [result.get(timeout=TIMEOUT) for result in results]
        self.expect(values == [2 * i for i in range(self.plain)], "plain results differ")
        bar.finish(pushed.summary("callbacks called"))
        self.remember(results)
        self.singles += [result.id for result in results[:SINGLE_LOOKUPS]]
        self.row("plain tasks", "all returned, all callbacks called", bar)

    def send_failing(self, bars: screen.Bars) -> None:
        """Tasks that fail: the sender gets their exception."""
        from demo.tasks import divide

        bar = bars.add("failing", FAILING)
        results = [divide.delay(i, 0) for i in range(FAILING)]
        raised: collections.Counter[str] = collections.Counter()
        for result in results:
            try:
                result.get(timeout=TIMEOUT)
            except ArithmeticError as exc:
                raised[type(exc).__name__] += 1
            bar.advance()
        self.expect(raised["ZeroDivisionError"] == FAILING, f"failures raised {dict(raised)}")
        came = ", ".join(f"{name} raised in the sender" for name in raised)
        bar.finish(came)
        self.remember(results)
        self.singles += [result.id for result in results]
        self.row("failing tasks", came, bar)

    def send_progress(self, bars: screen.Bars) -> None:
        """Tasks that report progress: every report is pushed."""
        from demo.tasks import render

        results = [render.delay(FRAMES, SECONDS_A_FRAME) for _ in RENDERED]
        by_id = {result.id: bars.add(name, FRAMES) for result, name in zip(results, RENDERED)}
        reports = 0

        def on_message(meta: Dict[str, Any]) -> None:
            nonlocal reports
            bar = by_id[meta["task_id"]]
            if meta["status"] == "PROGRESS":
                reports += 1
                bar.to(meta["result"]["current"])
                bar.note("PROGRESS")
            elif meta["status"] == "SUCCESS":
                bar.to(FRAMES)
                bar.finish(f"SUCCESS, {meta['result']}")

        ResultSet(results, app=self.app).get(timeout=TIMEOUT, on_message=on_message)
        if self.every_state:
            self.expect(reports == FRAMES * len(RENDERED), f"{reports} reports of progress came")
        self.remember(results)
        self.singles += [result.id for result in results]
        bar = max(by_id.values(), key=lambda bar: bar.seconds or 0.0)
        seconds = f"{bar.seconds or 0.0:.2f} s"
        self.rows.append(
            ("tasks with progress", str(len(RENDERED)), f"{reports} states pushed", seconds)
        )

    def send_group(self, bars: screen.Bars) -> None:
        """A group, which is saved for later readers."""
        from demo.tasks import square

        bar = bars.add("group", self.tasks)
        pushed = Pushes(bar)
        bar.note("sending")
        result: GroupResult = group(square.s(i) for i in range(self.tasks)).apply_async()
        bar.note("waiting")
        result.save()
        values = result.get(timeout=TIMEOUT, on_message=pushed.on_message)
        self.expect(values == [i * i for i in range(self.tasks)], "results of the group differ")
        bar.finish(pushed.summary("pushed"))
        self.group_id = result.id
        self.remember(result.results)
        self.row("a group", "all returned", bar)

    def send_chord(self, bars: screen.Bars) -> None:
        """A chord, whose body is sent when the last part ends."""
        from demo.tasks import square, total

        bar = bars.add("chord", self.header)
        pushed = Pushes(bar)
        header = group(square.s(i) for i in range(self.header)).set(task_id=self.chord_id)
        body: AsyncResult = chord(header, total.s()).apply_async()
        body.parent.get(timeout=TIMEOUT, on_message=pushed.on_message)
        value = body.get(timeout=TIMEOUT)
        right = value == sum(i * i for i in range(self.header))
        self.expect(right, f"the body of the chord returned {value}")
        bar.finish(f"the body returned {value:,}")
        self.remember([body])
        self.singles.append(body.id)
        self.row("a chord", "its body got all parts", bar)

    # -- reading -----------------------------------------------------------------------------

    def compare(self, name: str, rounds: Sequence[Dict[str, Any]]) -> Sequence[str]:
        """Return the line of the table of a reader."""
        reads = equal = pending = 0
        for one in rounds:
            for task_id, seen in one["seen"].items():
                reads += 1
                equal += tuple(seen) == self.seen[task_id]
                pending += seen[0] == "PENDING"
        expected = self.to_read
        good = equal == reads == expected
        self.expect(good, f"{name} read {equal} of {expected} results as the sender did")
        return (
            name,
            f"{reads:,} in {len(rounds)} rounds",
            "all the same" if good else f"DIFFERS in {expected - equal}",
            str(pending),
            f"{sum(one['seconds'] for one in rounds) / ROUNDS:.2f} s",
        )

    @property
    def to_read(self) -> int:
        """How many results a reader reads."""
        return ROUNDS * (len(self.singles) + self.tasks)

    def question(self) -> Dict[str, Any]:
        """Return the request to a reader."""
        return {"ids": self.singles, "group": self.group_id, "rounds": ROUNDS}


class Pushes:
    """Counts pushed states on a bar, and measures their delay."""

    def __init__(self, bar: screen.Bar) -> None:
        self._bar = bar
        self._delays: List[float] = []
        self._arrived = threading.Condition()

    def on_message(self, meta: Dict[str, Any]) -> None:
        """Take the meta of a state."""
        if meta["status"] == "SUCCESS":
            self._count(meta.get("date_done"))

    def on_ready(self, result: AsyncResult) -> None:
        """Take a result that is ready; called by another thread."""
        self._count(result.date_done)

    def _count(self, done: Any) -> None:
        now = datetime.datetime.now(datetime.timezone.utc)
        if isinstance(done, str):
            done = datetime.datetime.fromisoformat(done)
        with self._arrived:
            if done is not None:
                # Celery 4's metas, which are written on memory://, have no date.
                done = done if done.tzinfo else done.replace(tzinfo=datetime.timezone.utc)
                self._delays.append((now - done).total_seconds())
            self._bar.advance()
            self._arrived.notify_all()

    def wait_for(self, count: int) -> bool:
        """Wait until *count* states have come; return whether they have."""
        with self._arrived:
            return self._arrived.wait_for(lambda: self._bar.done >= count, TIMEOUT)

    def summary(self, what: str) -> str:
        """Return a summary with the median delay."""
        if not self._delays:
            return what
        return f"{what}, median {1000 * statistics.median(self._delays):.1f} ms"


# -- with RabbitMQ -------------------------------------------------------------------------------


def run_on_broker(
    stack: contextlib.ExitStack, view: screen.Screen, broker: Broker, tasks: int, readers: int
) -> Show:
    """The demo with a worker and readers as separate processes."""
    # The processes of the demo use it as well: a killed process leaves files behind.
    folder = Path(stack.enter_context(held_folder()))
    variables = dict(settings(broker.url, broker.name, SHARDS), TMPDIR=str(folder))
    os.environ.update(variables)
    stack.callback(_quietly, broker.clean_up)
    with view.step("starting a Celery worker") as done:
        worker = processes.start(
            stack,
            "celery",
            ["-A", "demo.tasks", "worker", "--pool", "prefork", "--loglevel", "INFO",
             "--concurrency", str(WORKER_PROCESSES), "--without-gossip", "--without-mingle",
             "--without-heartbeat", "--hostname", f"{broker.name}@localhost"],
            variables,
            folder / "worker.log",
        )  # fmt: skip
        view.logs.append(folder / "worker.log")
        worker.wait_for(" ready.")
        done += [f"Celery {celery.__version__}, a worker", f"{WORKER_PROCESSES} processes"]
    from demo.tasks import app

    stack.callback(app.backend.close)
    show = Show(view, app, tasks)
    broker.others.extend(broker.topology.plan_queue(number).name for number in range(PLAN_QUEUES))
    queues: List[Tuple[str, int]] = []

    def count_queues(when: str) -> None:
        with view.status("counting the queues"):
            queues.append((when, broker.queues()))

    count_queues("with the worker idle")
    view.heading("Sending tasks", "every result is pushed to this process, none is polled for")
    with view.bars() as bars:
        show.send_first(bars)
        show.send_plain(bars)
        show.send_failing(bars)
    count_queues(f"after {len(show.seen):,} tasks")
    with view.bars() as bars:
        show.send_progress(bars)
        show.send_group(bars)
        show.send_chord(bars)
    count_queues(f"after {len(show.seen):,} tasks")

    view.heading("Reading by id", "processes that sent nothing; each reads everything twice")
    lines = []
    with view.bars() as bars:
        lines += _read(stack, show, bars, variables, ["alone"])
        names = [f"{n} of {readers} at once" for n in range(1, readers + 1)]
        lines += _read(stack, show, bars, variables, names)
    _tables(show, lines, queues, broker)
    return show


@contextlib.contextmanager
def held_folder() -> Any:
    """A temporary folder that is removed even after an interrupt."""
    with interrupts.held():
        folder = tempfile.TemporaryDirectory(prefix="celery-results-demo-")
    with folder as path:
        yield path


def _read(
    stack: contextlib.ExitStack,
    show: Show,
    bars: screen.Bars,
    variables: Dict[str, str],
    names: Sequence[str],
) -> List[Sequence[str]]:
    running = []
    for name in names:
        process = processes.start(stack, "demo.reader", [], variables)
        bar = bars.add(f"pid {process.pid}", show.to_read)
        running.append((name, process, bar))
    for _, process, _ in running:
        process.ask(show.question())
    # One thread reads from each reader, so that all bars move.
    with concurrent.futures.ThreadPoolExecutor(len(running)) as threads:
        listeners = [threads.submit(_listen, process, bar) for _, process, bar in running]
    return [
        show.compare(f"pid {process.pid}, {name}", listener.result())
        for (name, process, _), listener in zip(running, listeners)
    ]


def _listen(process: processes.Process, bar: screen.Bar) -> List[Dict[str, Any]]:
    rounds: List[Dict[str, Any]] = []
    for answer in process.answers():
        if "read" in answer:
            bar.to(answer["read"])
        else:
            rounds = answer["rounds"]
    bar.to(sum(len(one["seen"]) for one in rounds))
    bar.finish("read, each twice")
    return rounds


def _tables(
    show: Show, lines: Sequence[Sequence[str]], queues: Sequence[Tuple[str, int]], broker: Broker
) -> None:
    view = show.view
    view.table("What ran", ("sent", ">tasks", "what came", ">took"), show.rows)
    view.table(
        "What the readers saw",
        ("reader", ">results read", "beside what the sender saw", ">pending", ">a round"),
        lines,
    )
    whose = "on the broker" if broker.node is not None else "of this demo on the broker"
    view.table(f"Queues {whose}", ("when", ">queues"), queues)
    # An inbox with the queue beside it; the plan queues of chords, and their leader's inbox.
    most = queues[0][1] + SHARDS + 2 + PLAN_QUEUES + 2
    show.expect(queues[-1][1] <= most, f"{queues[-1][1]} queues, of at most {most}")
    view.line(
        f"{SHARDS} of them keep the results, however many these are (an app has 256 unless told "
        f"otherwise). {PLAN_QUEUES} keep the plans of chords."
    )
    view.line("The milliseconds are from the end of a task in the worker to its arrival here.")


# -- without -------------------------------------------------------------------------------------


def run_in_memory(
    stack: contextlib.ExitStack, view: screen.Screen, tasks: int, readers: int
) -> Show:
    """The demo on kombu's broker in memory, with a worker that is a thread."""
    view.warn("Instead, this runs within one process, on kombu's memory:// broker. It cannot show:")
    view.warn("- results read by other processes: the readers are threads here;")
    view.warn("- the layout of queues that RabbitMQ gets: here every task has a queue of its own;")
    view.warn("- chords fired by their last part: here a task polls for the parts;")
    view.warn("- how fast it is, and that results survive a restart.")
    os.environ.update(
        settings("memory://localhost", f"celery-results-demo-{uuid.uuid4().hex[:8]}", SHARDS)
    )
    from celery.contrib.testing.worker import start_worker

    from demo.tasks import app

    # The worker would log the intended failures between the lines of the demo.
    logging.getLogger("celery.app.trace").setLevel(logging.CRITICAL)
    stack.callback(app.backend.close)
    with view.step("starting a worker thread") as done:
        stack.enter_context(
            start_worker(app, pool="threads", concurrency=4, perform_ping_check=False, loglevel=0)
        )
        done += [f"Celery {celery.__version__}, a worker", "4 threads"]
    show = Show(view, app, tasks, every_state=False)
    view.heading("Sending tasks", "within one process")
    with view.bars() as bars:
        show.send_first(bars)
        show.send_plain(bars)
        show.send_failing(bars)
        show.send_progress(bars)
        show.send_group(bars)
        show.send_chord(bars)
    question = show.question()
    names = [f"thread {n} of {readers} at once" for n in range(1, readers + 1)]
    answers: Dict[str, List[Dict[str, Any]]] = {name: [] for name in names}

    def read(name: str, bar: screen.Bar) -> None:
        for _ in range(question["rounds"]):
            started = time.monotonic()
            seen = reader.read(app, question["ids"], question["group"], bar.advance)
            answers[name].append({"seen": seen, "seconds": time.monotonic() - started})
        bar.finish("read, each twice")

    view.heading("Reading by id", "threads that sent nothing; each reads everything twice")
    with view.bars() as bars:
        threads = [
            threading.Thread(
                target=read, args=(name, bars.add(f"thread {n}", show.to_read)), daemon=True
            )
            for n, name in enumerate(names, 1)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT)
    view.table("What ran", ("sent", ">tasks", "what came", ">took"), show.rows)
    view.table(
        "What the readers saw",
        ("reader", ">results read", "beside what the sender saw", ">pending", ">a round"),
        [show.compare(name, answers[name]) for name in names],
    )
    return show


# -- all of it -----------------------------------------------------------------------------------


def find_broker(
    stack: contextlib.ExitStack, view: screen.Screen, given: Optional[str]
) -> Optional[Broker]:
    """Return the broker to use, or ``None`` if there is none."""
    name = f"celery-results-demo-{uuid.uuid4().hex[:8]}"
    if not given:
        try:
            with view.step("starting a private RabbitMQ") as done:
                node = processes.start_node(stack)
                done += [f"RabbitMQ {node.version}", f"a private node on port {node.amqp_port}"]
            return Broker(node.url(), node, name, SHARDS)
        except rabbitmq.NotAvailable as exc:
            view.warn(f"No private RabbitMQ: {exc}")
            given = os.environ.get("AMQP_URL")
    if not given:
        return None
    broker = Broker(given, None, name, SHARDS)
    with view.step("connecting to the broker") as done:
        done += [broker.product(), "yours; what the demo declares there begins with " + name]
    return broker


def _quietly(clean_up: Callable[[], None]) -> None:
    try:
        clean_up()
    except Failed as exc:
        print(f"What the demo declared could not be deleted: {exc}", file=sys.stderr)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the demo and return its exit code: 0 if everything was as it should be."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--broker", help="URL of a RabbitMQ to use instead of a private one")
    parser.add_argument("--memory", action="store_true", help="use no RabbitMQ at all")
    parser.add_argument("--tasks", type=int, default=1000, help="members of the group")
    parser.add_argument("--readers", type=int, default=4, help="readers at the same moment")
    options = parser.parse_args(arguments)
    for variable in CELERY_VARIABLES:
        os.environ.pop(variable, None)
    view = screen.make()
    view.title(
        f"celery-amqp-results {celery_amqp_results.__version__}",
        "task results through RabbitMQ alone",
    )
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        try:
            broker = None if options.memory else find_broker(stack, view, options.broker)
            if broker is None:
                show = run_in_memory(stack, view, options.tasks, options.readers)
            else:
                show = run_on_broker(stack, view, broker, options.tasks, options.readers)
        except (Failed, TimeoutError) as exc:
            logs = "\n".join(path.read_text(errors="replace")[-3000:] for path in view.logs)
            print(f"The demo failed: {exc}\n{logs}", file=sys.stderr)
            return 1
        finally:
            # Cleaning up must not be interrupted: it ends by itself.
            interrupts.ignore()
    view.line("")
    for wrong in show.wrong:
        view.warn(f"NOT AS IT SHOULD BE: {wrong}")
    if not show.wrong:
        view.good(f"All as it should be, in {time.monotonic() - started:.0f} s.")
    return 1 if show.wrong else 0
