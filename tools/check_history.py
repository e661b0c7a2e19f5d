"""Checks a history of operations on a result backend, without knowing the backend.

    python tools/check_history.py HISTORY.jsonl [--lag 45] [--grace 15]

The soak (``make soak HISTORY=folder``) writes such histories. This file needs only the standard
library and imports nothing of the project, so it can be read, or replaced, by a sceptic.

The format
    One JSON object a line, in the order of ``time``:

    ``time``      seconds, on one clock for all processes
    ``process``   who did it; a process does several operations at once
    ``type``      ``invoke`` (begins), ``ok`` (returned), ``fail`` (raised, had no effect), ``info``
                  (raised, and may have had an effect; or an event that is no operation)
    ``f``         ``store``, ``read``, ``wait``, ``deliver``, ``forget``, ``chord``, ``fire``,
                  ``crash``, ``delete`` or ``cut``
    ``op``        links the end of an operation with its beginning, within a process
    ``task``      the task, or the body of a chord; ``tasks`` for a wait, and for a chord's header
    ``value``     ``[state, version, digest]``: the version numbers the states of a task in the
                  order of storing, and the digest stands for the value
    ``kind``      of a read: ``look-up`` (from the broker) or ``poll`` (perhaps from pushed states)
    ``timeout``   of a read or wait, in seconds

    ``deliver`` says that a wait (``op``) was given a state: ``by`` is ``return``, once a task, or
    ``message`` for a callback, which gets every state once. ``chord`` is written before a chord is
    sent, ``fire`` when its body was sent. ``crash`` is written before and after a broker is killed,
    ``delete`` before and after stored results are deleted on purpose, ``cut`` before and after a
    node is cut off from its cluster: until then, and for the time of ``--lag`` afterwards, look-ups
    may lag behind as polls may.

The model
    Each task is a register with a ranking: SUCCESS ranks above FAILURE and REVOKED, which rank
    above all other states; within a class the later version ranks higher, except that the first
    SUCCESS stays. A store raises the register to its state, if that ranks higher. A store is
    *durable* from its ``ok`` if its state is final; any other state from the ``ok`` of a final
    state that the same process stores after it.

The rules
    ``invented``   A read or wait returned a state that no store had begun to write.
    ``lost``       A read returned nothing after a durable final store, or an earlier read of it.
    ``stale``      A read returned a lower rank than a durable store, or an earlier read.
    ``changed``    Two reads returned different SUCCESSes, or something else after a SUCCESS.
    ``twice``      A wait returned a task twice, or was given the same state twice.
    ``late``       A read or wait took longer than its timeout and the grace.
    ``missed``     A wait returned without one of its results, or timed out long after the store.
    ``unfired``    A wait for the body of a chord timed out, long after the stores of all tasks of
                   the header were durable, and the body had not been sent.
"""

from __future__ import annotations

import argparse
import bisect
import collections
import json
import sys
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Set, Tuple

FINAL = ("SUCCESS", "FAILURE", "REVOKED")
NOTHING = "PENDING"

Event = Dict[str, Any]


class Violation(NamedTuple):
    """A rule that was broken."""

    rule: str
    task: str
    time: float
    text: str


class Read(NamedTuple):
    """A state that a process was given, by a read or by a wait."""

    began: float
    ended: float
    process: str
    kind: str
    value: Tuple[str, int, str]


def rank(value: Sequence[Any]) -> Tuple[int, int]:
    """Return the rank of a state in its register."""
    state, version = value[0], value[1]
    if state == NOTHING:
        return (0, 0)
    if state == "SUCCESS":
        return (3, 0)
    return (2 if state in FINAL else 1, version)


class Task:
    """Everything that was done to one task."""

    def __init__(self) -> None:
        self.began: Dict[Tuple[str, int, str], float] = {}
        self.durable: Dict[Tuple[str, int, str], float] = {}
        self.reads: List[Read] = []
        #: States given to message callbacks, which get superseded ones too.
        self.heard: List[Read] = []
        self.forgotten = float("inf")

    @property
    def first(self) -> float:
        """When the first store began."""
        return min(self.began.values(), default=float("inf"))


class History:
    """A history, sorted by task and by wait."""

    def __init__(self, events: Iterable[Event]) -> None:
        self.tasks: Dict[str, Task] = collections.defaultdict(Task)
        self.waits: Dict[Tuple[str, int], Event] = {}
        self.delivered: Dict[Tuple[str, int], List[Event]] = collections.defaultdict(list)
        self.finished: Dict[Tuple[str, int], Event] = {}
        self.failed_reads: List[Tuple[Event, Event]] = []
        self.crashes: List[float] = []
        self.deletes: List[float] = []
        self.cuts: List[float] = []
        self.headers: Dict[str, List[str]] = {}
        self.fired: Set[str] = set()
        self.end = 0.0
        self._open: Dict[Tuple[str, int], Event] = {}
        self._unconfirmed: Dict[str, List[Tuple[str, Any]]] = collections.defaultdict(list)
        for event in sorted(events, key=lambda event: event["time"]):
            self.end = event["time"]
            getattr(self, f"_on_{event['f']}")(event)

    def _on_store(self, event: Event) -> None:
        task, value = self.tasks[event["task"]], tuple(event["value"])
        if event["type"] == "invoke":
            task.began.setdefault(value, event["time"])
        elif event["type"] == "ok":
            unconfirmed = self._unconfirmed[event["process"]]
            unconfirmed.append((event["task"], value))
            if value[0] in FINAL:
                for task_id, earlier in unconfirmed:
                    self.tasks[task_id].durable.setdefault(earlier, event["time"])
                unconfirmed.clear()

    def _on_read(self, event: Event) -> None:
        key = event["process"], event["op"]
        if event["type"] == "invoke":
            self._open[key] = event
            return
        begun = self._open.pop(key)
        if event["type"] == "ok":
            self.tasks[event["task"]].reads.append(
                Read(begun["time"], event["time"], key[0], begun["kind"], tuple(event["value"]))
            )
        else:
            self.failed_reads.append((begun, event))

    def _on_wait(self, event: Event) -> None:
        key = event["process"], event["op"]
        (self.waits if event["type"] == "invoke" else self.finished)[key] = event

    def _on_deliver(self, event: Event) -> None:
        key = event["process"], event["op"]
        self.delivered[key].append(event)
        task = self.tasks[event["task"]]
        read = Read(self.waits[key]["time"], event["time"], key[0], "push", tuple(event["value"]))
        (task.reads if event["by"] == "return" else task.heard).append(read)

    def _on_forget(self, event: Event) -> None:
        task = self.tasks[event["task"]]
        task.forgotten = min(task.forgotten, event["time"])

    def _on_chord(self, event: Event) -> None:
        self.headers[event["task"]] = event["tasks"]

    def _on_fire(self, event: Event) -> None:
        self.fired.add(event["task"])

    def _on_cut(self, event: Event) -> None:
        self.cuts.append(event["time"])

    def is_cut(self, at: float, lag: float) -> bool:
        """Return whether a node was cut off at a time, or less than *lag* seconds before."""
        ends = [*self.cuts[1::2], float("inf")]
        return any(begin <= at <= end + lag for begin, end in zip(self.cuts[::2], ends))

    def _on_crash(self, event: Event) -> None:
        self.crashes.append(event["time"])

    def _on_delete(self, event: Event) -> None:
        self.deletes.append(event["time"])


class _Highest:
    """The highest-ranking state known at each time."""

    def __init__(self, known: Iterable[Tuple[float, Any]]) -> None:
        self.times: List[float] = []
        self.values: List[Any] = []
        for time, value in sorted(known, key=lambda item: (item[0], rank(item[1]))):
            if not self.values or rank(value) > rank(self.values[-1]):
                self.times.append(time)
                self.values.append(value)

    def before(self, time: float) -> Any:
        place = bisect.bisect_left(self.times, time)
        return self.values[place - 1] if place else None


def _survives(read: Read, until: float, task: Task, crashes: List[float]) -> bool:
    """Return whether no broker crash may have undone a state that was read, before *until*."""
    durable = task.durable.get(read.value, float("inf"))
    return all(durable < crash for crash in crashes if read.began <= crash <= until)


def _check_reads(name: str, task: Task, history: History, lag: float) -> Iterable[Violation]:
    stored = _Highest((time, value) for value, time in task.durable.items())
    success: Optional[Read] = None
    end = min([task.forgotten, *(t for t in history.deletes if t >= task.first)])
    earlier: List[Read] = []
    for read in task.heard:
        if task.began.get(read.value, float("inf")) > read.ended:
            yield Violation("invented", name, read.ended, f"{read}: no store had begun")
    for read in sorted(task.reads, key=lambda read: read.ended):
        state = read.value[0]
        if state != NOTHING and task.began.get(read.value, float("inf")) > read.ended:
            yield Violation("invented", name, read.ended, f"{read}: no store had begun")
            continue
        if read.ended >= end:
            continue
        if state == "SUCCESS" and success and success.value != read.value:
            yield Violation("changed", name, read.ended, f"{read} after {success}")
        if state == "SUCCESS":
            success = success or read
        fresh = read.kind == "look-up" and not history.is_cut(read.began, lag)
        delay = 0.0 if fresh else lag
        must = [stored.before(read.began - delay)]
        must.extend(
            other.value
            for other in earlier
            if other.ended < read.began - (0.0 if other.process == read.process else delay)
            and (other.kind == "look-up" or other.process == read.process)
            and _survives(other, read.ended, task, history.crashes)
        )
        most = max((value for value in must if value), key=rank, default=None)
        if most is not None and rank(most) > rank(read.value):
            if state != NOTHING:
                rule = "changed" if most[0] == "SUCCESS" else "stale"
            else:
                rule = "lost" if most[0] in FINAL else "stale"
            yield Violation(rule, name, read.ended, f"{read} although {most} was known")
        # Only the highest of each process matters for what follows.
        if not any(rank(e.value) >= rank(read.value) and e.process == read.process
                   and e.kind == read.kind for e in earlier):  # fmt: skip
            earlier.append(read)


def _check_wait(
    key: Tuple[str, int], history: History, lag: float, grace: float
) -> Iterable[Violation]:
    wait, finished = history.waits[key], history.finished.get(key)
    time = wait["time"]
    seen: Set[Tuple[Any, ...]] = set()
    for event in history.delivered[key]:
        value = tuple(event["value"]) if event["by"] == "message" else ()
        delivery = event["by"], event["task"], value
        if delivery in seen:
            yield Violation("twice", event["task"], time, f"{key} was given {delivery} twice")
        seen.add(delivery)
    ended = history.end if finished is None else finished["time"]
    if ended > time + wait["timeout"] + grace:
        yield Violation("late", wait["tasks"][0], time, f"{key} took {ended - time:.1f} s")
    if finished is None:
        return
    got = {e["task"] for e in history.delivered[key] if e["by"] == "return"}
    for name in set(wait["tasks"]) - got:
        task = history.tasks[name]
        if task.forgotten < float("inf") or any(t >= task.first for t in history.deletes):
            continue
        stored = _durable_since(task)
        if finished["type"] == "ok" or max(stored, time) + lag < ended:
            yield Violation("missed", name, time, f"{key} ended ({finished['type']}) without it")
        elif _is_unfired(name, ended - lag, history):
            yield Violation("unfired", name, time, f"{key} ended, and the header long before")


def _durable_since(task: Task) -> float:
    return min((t for v, t in task.durable.items() if v[0] in FINAL), default=float("inf"))


def _is_unfired(name: str, at: float, history: History) -> bool:
    """Return whether a chord's body was not sent, though its header ended before *at*."""
    header = history.headers.get(name)
    if header is None or name in history.fired:
        return False
    return all(_durable_since(history.tasks[task]) < at for task in header)


def check(events: Iterable[Event], lag: float = 45.0, grace: float = 15.0) -> List[Violation]:
    """Return the violations in a history.

    Parameters:
        events: the lines of a history.
        lag: seconds by which polls and pushes may lag behind, while a dead connection is not
            noticed.
        grace: seconds by which a read or wait may exceed its timeout on a busy machine.
    """
    history = History(events)
    found: List[Violation] = []
    for name, task in history.tasks.items():
        found.extend(_check_reads(name, task, history, lag))
    for key in history.waits:
        found.extend(_check_wait(key, history, lag, grace))
    for begun, ended in history.failed_reads:
        took = ended["time"] - begun["time"]
        if took > begun["timeout"] + grace:
            found.append(Violation("late", "-", begun["time"], f"a read took {took:.1f} s"))
    return sorted(found, key=lambda violation: violation.time)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command line; return 1 if a rule was broken."""
    parser = argparse.ArgumentParser(description="Check a history of a result backend.")
    parser.add_argument("history")
    parser.add_argument("--lag", type=float, default=45.0)
    parser.add_argument("--grace", type=float, default=15.0)
    options = parser.parse_args(arguments)
    with open(options.history, encoding="utf-8") as lines:
        events = [json.loads(line) for line in lines]
    found = check(events, options.lag, options.grace)
    for violation in found:
        print(f"{violation.time:.3f} {violation.rule} {violation.task}: {violation.text}")
    print(f"{len(events)} events, {len(found)} violations")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
