"""Reads by several processes, and a checker that judges whether their answers are linearizable.

Three rules. An answer is never older than what ``store_result`` had stored before the question was
asked. Once any process has seen a state, no later read by any process returns an older one. A
second after ``forget`` has returned, no process finds the task.

Imports no test machinery: the functions run in processes of their own.
"""

from __future__ import annotations

import contextlib
import random
import time
import uuid
from typing import Any, Dict, Iterable, List, NamedTuple, Tuple

from celery import Celery, states

from celery_amqp_results import errors
from celery_amqp_results.feed.table import PROOF_SECONDS
from tests import subprocesses

#: The states of a task in order; the number of a version is its place here.
STAGES = (states.PENDING, states.STARTED, states.SUCCESS)
FINAL = len(STAGES) - 1
#: The number of the version that stands for ``forget``.
FORGOTTEN = len(STAGES)
#: For how many seconds other processes may return a SUCCESS that was forgotten.
GRACE = PROOF_SECONDS
#: One of this number of tasks is forgotten, this many tasks after it was stored.
FORGETTING, LATER = 3, 5

_NAMESPACE = uuid.UUID("0c1de9d5-3b07-4a5e-8f0e-7f2f0b1f7b11")


def task_id(run: str, number: int) -> str:
    """Return the id of a task."""
    return str(uuid.uuid5(_NAMESPACE, f"{run}/{number}"))


class Event(NamedTuple):
    """A store, a read or a ``forget``.

    Times are of ``time.monotonic``, one clock for the whole machine.
    """

    task: int
    version: int
    began: float
    ended: float


def begin() -> Tuple[float, float]:
    """Tell the test that this process runs; return when to begin and when to end."""
    subprocesses.say("ready")
    start, end = subprocesses.hear().split()
    return float(start), float(end)


def store(app: Celery, run: str, first: int, step: int, rate: float) -> List[Event]:
    """Store the states of every *step*th task, from *first* on."""
    events: List[Event] = []
    start, end = begin()
    for count in range(1_000_000):
        due = start + count / rate
        time.sleep(max(0.0, min(due, end) - time.monotonic()))
        if time.monotonic() >= end:
            return events
        number = first + count * step
        for version in range(1, len(STAGES)):
            began = time.monotonic()
            app.backend.store_result(task_id(run, number), number, STAGES[version])
            events.append(Event(number, version, began, time.monotonic()))
        if count >= LATER and not count % FORGETTING:
            events.append(_forget(app, run, number - LATER * step))
    return events


def _forget(app: Celery, run: str, number: int) -> Event:
    began, ended = time.monotonic(), float("inf")
    with contextlib.suppress(errors.BackendUnavailable):
        app.AsyncResult(task_id(run, number)).forget()
        ended = time.monotonic()
    return Event(number, FORGOTTEN, began, ended)


def read(app: Celery, run: str, rate: float) -> Dict[str, Any]:
    """Read the states of tasks that are being stored, and of older ones."""
    start, end = begin()
    events: List[Event] = []
    failed = 0
    choose = random.Random()
    while True:
        began = time.monotonic()
        if began >= end:
            metrics = app.backend.metrics()
            return {
                "events": events,
                "failed": failed,
                "remembered": metrics.remembered,
                "looked_up": metrics.looked_up,
            }
        newest = int((began - start) * rate)
        number = max(0, newest - choose.choice((-1, 0, 0, 1, 1, 2, 5, 40)))
        try:
            state = app.AsyncResult(task_id(run, number)).state
        except errors.BackendUnavailable:
            failed += 1
            continue
        events.append(Event(number, STAGES.index(state), began, time.monotonic()))


_NEVER = Event(0, FORGOTTEN, float("inf"), float("inf"))


def check(stores: Iterable[Event], reads: Iterable[Event], seen_counts: bool = True) -> List[str]:
    """Return the wrong answers.

    Parameters:
        stores: all stores, and what was forgotten.
        reads: all reads.
        seen_counts: whether a state that was read once must be found ever after. A state without
            a confirm may be lost when a broker is killed, even if a process has read it.
    """
    wrong = []
    stored: Dict[int, List[Event]] = {}
    for each in stores:
        stored.setdefault(each.task, []).append(each)
    by_task: Dict[int, List[Event]] = {}
    for each in reads:
        by_task.setdefault(each.task, []).append(each)
    for number, answers in by_task.items():
        began = {each.version: each.began for each in stored.get(number, ())}
        # The ends of reads and of certain stores. Only a final state is certain when
        # ``store_result`` returns.
        seen = [(e.ended, e.version) for e in stored.get(number, ()) if e.version == FINAL]
        if seen_counts:
            seen += [(answer.ended, answer.version) for answer in answers]
        seen.sort()
        at, least = 0, 0
        forgotten = next((e for e in stored.get(number, ()) if e.version == FORGOTTEN), _NEVER)
        for answer in sorted(answers, key=lambda answer: answer.began):
            if answer.version and answer.began > forgotten.ended + GRACE:
                wrong.append(f"task {number}: {STAGES[answer.version]} after it was forgotten")
            if not answer.version and answer.ended >= forgotten.began:
                continue
            while at < len(seen) and seen[at][0] < answer.began:
                least = max(least, seen[at][1])
                at += 1
            if answer.version < least:
                wrong.append(f"task {number}: {STAGES[answer.version]} after {STAGES[least]}")
            if answer.version and answer.ended < began.get(answer.version, float("inf")):
                wrong.append(f"task {number}: {STAGES[answer.version]} before it was stored")
    return wrong
