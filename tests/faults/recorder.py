"""Records what storing and waiting processes observe, and checks the promises of a result backend.

This module knows nothing of the backend. Every process writes its calls and their outcomes into a
journal: a file of its own, line by line and unbuffered, so that the journal of a killed process is
complete up to its last line. Times are those of ``time.monotonic``, which is one clock for all
processes of a machine. :func:`check` reads the journals and reports violations:

``lost``
    A reader did not find a final state whose ``store_result`` had returned.
``older``
    A read returned an older state than an earlier read, or than had been stored before.
``replaced``
    SUCCESS, or its value, has changed.
``wrong``
    A read returned a state that had never been stored.
``late``
    A wait or a look-up exceeded its timeout.
``twice``
    A wait was given the same state a second time.
``missed``
    A wait ended without a result that had long been stored.
``unfired``
    A wait for the body of a chord ended long after its header had, and the body had not been sent.

States that the broker had not confirmed when it was killed are not promised: a process may have
read such a state before the crash, and not find it until its publisher has published it again.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any, Counter, Dict, Iterable, Iterator, List, NamedTuple, Optional, Set, Tuple

__all__ = ("Journal", "Limits", "Verdict", "Violation", "check", "history", "load", "value")

PENDING = "PENDING"
SUCCESS = "SUCCESS"
FINAL = frozenset({SUCCESS, "FAILURE", "REVOKED"})

#: The kinds of violations.
KINDS = ("lost", "older", "replaced", "wrong", "late", "twice", "missed", "unfired")


def value(task_id: str, version: int, size: int = 60) -> Dict[str, Any]:
    """Return the value of state number *version* of a task; no other state has the same."""
    text = hashlib.sha256(f"{task_id} {version}".encode()).hexdigest()
    return {"v": version, "text": (text * (size // len(text) + 1))[:size]}


class _Content(NamedTuple):
    """A state and its value, in short form."""

    state: str
    #: Number of the state among those of its task; -1 for a state that no process stored.
    version: int
    digest: str


def _content(state: str, result: Any) -> _Content:
    if isinstance(result, BaseException):
        result = result.args[0] if result.args else None
    version = -1
    if isinstance(result, dict) and isinstance(result.get("v"), int):
        version = result["v"]
    if state == PENDING and result is None:
        return _Content(PENDING, -1, "")
    raw = json.dumps(result, sort_keys=True, default=repr).encode()
    return _Content(state, version, hashlib.sha256(raw).hexdigest()[:16])


class Journal:
    """Records what a process does. Thread-safe.

    Parameters:
        folder: the folder of the journals.
        role: what the process does; part of the file's name.

    After a fork the child must create one of its own.
    """

    def __init__(self, folder: Path, role: str) -> None:
        self.process = f"{role}-{os.getpid()}"
        self._file = os.open(
            folder / f"{self.process}.journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
        )
        self._waits = 0

    def _note(self, *event: Any) -> None:
        # One write per event: the kernel keeps it even if the process is killed.
        os.write(self._file, json.dumps(event).encode() + b"\n")

    def began_to_store(self, task_id: str, state: str, result: Any) -> None:
        """Record that ``store_result`` is about to be called."""
        self._note("store", task_id, *_content(state, result), time.monotonic())

    def stored(self, task_id: str, state: str, result: Any, error: Optional[str] = None) -> None:
        """Record that ``store_result`` has returned, or raised *error*."""
        self._note("stored", task_id, *_content(state, result), time.monotonic(), error)

    def read(self, kind: str, began: float, task_id: str, state: str, result: Any) -> None:
        """Record a read.

        Parameters:
            kind: ``look-up`` if the broker was asked, ``poll`` if pushed states may have been the
                answer.
            began: when the read began (``time.monotonic``).
        """
        content = _content(state, result)
        self._note("read", kind, task_id, *content, began, time.monotonic())

    def failed_to_read(self, began: float, timeout: float, error: str) -> None:
        """Record that a read raised, and how long it was allowed to take."""
        self._note("unread", began, time.monotonic(), timeout, error)

    def began_to_wait(self, task_ids: Iterable[str], timeout: float) -> int:
        """Record that a wait for *task_ids* begins; return its number."""
        self._waits += 1
        number = self._waits
        now = time.monotonic()
        self._note("wait", number, list(task_ids), now, now + timeout)
        return number

    def got(self, number: int, task_id: str, state: str, result: Any) -> None:
        """Record that a wait was given the final state of a task."""
        self._note("got", number, task_id, *_content(state, result), time.monotonic())

    def heard(self, number: int, task_id: str, state: str, result: Any) -> None:
        """Record that a wait was given any state of a task by ``on_message``."""
        self._note("heard", number, task_id, *_content(state, result), time.monotonic())

    def waited(self, number: int, error: Optional[str] = None) -> None:
        """Record that a wait has returned, or raised *error*."""
        self._note("waited", number, time.monotonic(), error)

    def began_to_forget(self, task_id: str) -> None:
        """Record that a task is about to be forgotten."""
        self._note("forget", task_id, time.monotonic())

    def sends_chord(self, body: str, header: List[str]) -> None:
        """Record that a chord is about to be sent, by the ids of its tasks."""
        self._note("chord", body, header, time.monotonic())

    def fired(self, body: str) -> None:
        """Record that the body of a chord was sent."""
        self._note("fire", body, time.monotonic())

    def crashed(self) -> None:
        """Record that the broker is about to be killed, and again that it was killed."""
        self._note("crash", time.monotonic())

    def deleted(self) -> None:
        """Record that results are about to be deleted on purpose, and again that they were."""
        self._note("delete", time.monotonic())

    def cut(self) -> None:
        """Record that a node is about to be cut off from its cluster, and again that it is back."""
        self._note("cut", time.monotonic())

    @contextlib.contextmanager
    def storing(self, task_id: str, state: str, result: Any) -> Iterator[None]:
        """Record what the block stores, and whether it raises; swallows the error."""
        self.began_to_store(task_id, state, result)
        try:
            yield
        except Exception as exc:
            self.stored(task_id, state, result, repr(exc))
        else:
            self.stored(task_id, state, result)


# -- reading the journals ------------------------------------------------------------------------


@dataclasses.dataclass
class Store:
    """A call of ``store_result``."""

    process: str
    content: _Content
    began: float
    ended: Optional[float] = None
    error: Optional[str] = None
    #: When every process must be able to find it from, or ``None``. An intermediate state is only
    #: promised once the same process has stored a final state after it.
    kept: Optional[float] = None


@dataclasses.dataclass
class Read:
    """A read and the state that it returned."""

    process: str
    kind: str
    content: _Content
    began: float
    ended: float


@dataclasses.dataclass
class Wait:
    """A wait for some tasks."""

    process: str
    tasks: List[str]
    began: float
    deadline: float
    ended: Optional[float] = None
    error: Optional[str] = None
    #: The final states that it was given, with their times, by task.
    got: Dict[str, List[Tuple[_Content, float]]] = dataclasses.field(default_factory=dict)
    heard: List[Tuple[str, _Content]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Record:
    """The contents of a folder of journals."""

    stores: Dict[str, List[Store]] = dataclasses.field(default_factory=dict)
    reads: Dict[str, List[Read]] = dataclasses.field(default_factory=dict)
    waits: List[Wait] = dataclasses.field(default_factory=list)
    #: When forgetting each task began.
    forgotten: Dict[str, float] = dataclasses.field(default_factory=dict)
    #: Reads that raised: process, begin, end, seconds allowed, error.
    unread: List[Tuple[str, float, float, float, str]] = dataclasses.field(default_factory=list)
    #: The ids of each chord's header, by that of its body.
    chords: Dict[str, List[str]] = dataclasses.field(default_factory=dict)
    #: How often each body was sent.
    fired: Counter[str] = dataclasses.field(default_factory=collections.Counter)
    #: When the broker was killed.
    crashes: List[float] = dataclasses.field(default_factory=list)
    #: When a node was cut off, and when it was back, in turn.
    cuts: List[float] = dataclasses.field(default_factory=list)

    def is_cut(self, at: float, lag: float) -> bool:
        """Return whether a node was cut off at a time, or less than *lag* seconds before."""
        ends = [*self.cuts[1::2], float("inf")]
        return any(begin <= at <= end + lag for begin, end in zip(self.cuts[::2], ends))

    def promised(self, since: float = 0.0, until: float = float("inf")) -> List[str]:
        """Return the tasks that readers must find and that were stored between two times."""
        return [
            task_id
            for task_id, stores in self.stores.items()
            if task_id not in self.forgotten
            and any(s.kept is not None and since <= s.began <= until for s in stores)
        ]


def load(folder: Path) -> Record:
    """Read all journals of a folder. An incomplete last line is ignored."""
    record = Record()
    for path in sorted(folder.glob("*.journal")):
        process = path.name[: -len(".journal")]
        open_stores: Dict[Tuple[str, int], Store] = {}
        on_the_way: List[Store] = []
        waits: Dict[int, Wait] = {}
        for line in path.read_bytes().split(b"\n")[:-1]:
            what, *event = json.loads(line)
            if what == "store":
                task_id, state, version, digest, began = event
                store = Store(process, _Content(state, version, digest), began)
                open_stores[task_id, version] = store
                record.stores.setdefault(task_id, []).append(store)
            elif what == "stored":
                task_id, state, version, digest, ended, error = event
                store = open_stores.pop((task_id, version))
                store.ended, store.error = ended, error
                if error is None:
                    on_the_way.append(store)
                    if state in FINAL:
                        for earlier in on_the_way:
                            earlier.kept = ended
                        on_the_way.clear()
            elif what == "read":
                kind, task_id, state, version, digest, began, ended = event
                read = Read(process, kind, _Content(state, version, digest), began, ended)
                record.reads.setdefault(task_id, []).append(read)
            elif what == "unread":
                record.unread.append((process, *event))
            elif what == "wait":
                number, tasks, began, deadline = event
                waits[number] = Wait(process, tasks, began, deadline)
            elif what == "got":
                number, task_id, state, version, digest, at = event
                content = _Content(state, version, digest)
                waits[number].got.setdefault(task_id, []).append((content, at))
            elif what == "heard":
                number, task_id, state, version, digest, at = event
                waits[number].heard.append((task_id, _Content(state, version, digest)))
            elif what == "waited":
                number, waits[event[0]].ended, waits[event[0]].error = event
            elif what == "forget":
                task_id, at = event
                record.forgotten[task_id] = min(at, record.forgotten.get(task_id, at))
            elif what == "chord":
                body, header, _ = event
                record.chords[body] = header
            elif what == "fire":
                record.fired[event[0]] += 1
            elif what == "crash":
                record.crashes.extend(event)
            elif what == "cut":
                record.cuts.extend(event)
            elif what == "delete":
                pass  # check() has a parameter for it.
            else:
                raise ValueError(f"{path}: unknown event {what!r}")
        record.waits.extend(waits.values())
    record.crashes.sort()
    record.cuts.sort()
    return record


def history(folder: Path) -> List[Dict[str, Any]]:
    """Return all journals of a folder in the format of :mod:`tools.check_history`."""
    events: List[Dict[str, Any]] = []
    # Processes may still run: without a common end, a result could be in the journal of its reader
    # and not yet in that of its writer, which was read before.
    end = time.monotonic()
    for path in sorted(folder.glob("*.journal")):
        process = path.name[: -len(".journal")]
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1]):
            for event in _as_history(number, *json.loads(line)):
                if event["time"] <= end:
                    events.append({"process": process, **event})
    return sorted(events, key=lambda event: event["time"])


def _as_history(number: int, what: str, *event: Any) -> Iterator[Dict[str, Any]]:
    if what == "store":
        yield _event("invoke", "store", event[4], task=event[0], value=event[1:4])
    elif what == "stored":
        outcome = "ok" if event[5] is None else "info"
        yield _event(outcome, "store", event[4], task=event[0], value=event[1:4], error=event[5])
    elif what == "read":
        kind, task_id, state, version, digest, began, ended = event
        yield _event("invoke", "read", began, task=task_id, op=-number, kind=kind)
        value = (state, version, digest)
        yield _event("ok", "read", ended, task=task_id, op=-number, kind=kind, value=value)
    elif what == "unread":
        began, ended, timeout, error = event
        yield _event("invoke", "read", began, op=-number, kind="look-up", timeout=timeout)
        yield _event("fail", "read", ended, op=-number, kind="look-up", error=error)
    elif what == "wait":
        wait, tasks, began, deadline = event
        yield _event("invoke", "wait", began, op=wait, tasks=tasks, timeout=deadline - began)
    elif what in ("got", "heard"):
        wait, task_id, state, version, digest, at = event
        by, value = ("return" if what == "got" else "message"), (state, version, digest)
        yield _event("info", "deliver", at, op=wait, task=task_id, value=value, by=by)
    elif what == "waited":
        wait, at, error = event
        yield _event("ok" if error is None else "fail", "wait", at, op=wait, error=error)
    elif what == "forget":
        yield _event("invoke", "forget", event[1], task=event[0])
    elif what == "chord":
        yield _event("invoke", "chord", event[2], task=event[0], tasks=event[1])
    elif what == "fire":
        yield _event("info", "fire", event[1], task=event[0])
    else:
        yield _event("info", what, event[0])


def _event(type: str, f: str, time: float, **more: Any) -> Dict[str, Any]:
    return {"time": time, "type": type, "f": f, **more}


# -- the verdict ---------------------------------------------------------------------------------


class Limits(NamedTuple):
    """Deviations that do not break a promise."""

    #: Seconds by which an answer from pushed states may lag behind the store. A process cannot
    #: know better while its connection is dead and has not been reported as lost. Applies to all
    #: answers while a node is cut off from its cluster, and for as long afterwards.
    lag: float = 45.0
    #: Seconds by which a wait or a look-up may exceed its timeout on a busy machine.
    grace: float = 15.0
    #: Seconds after which results expire; ``None`` for never.
    expires: Optional[float] = None


LIMITS = Limits()


class Violation(NamedTuple):
    """A promise that was broken."""

    kind: str
    task_id: str
    #: When the promise was made: when the state was stored, or when the wait began.
    at: float
    what: str


@dataclasses.dataclass
class Verdict:
    """The outcome of a check."""

    violations: List[Violation]
    #: The number of tasks that readers had to find.
    at_stake: int
    #: The number of ``store_result`` calls that raised.
    refused: int
    #: The numbers of reads and waits that returned, and that raised within their timeout.
    answers: int
    raised: int
    #: Longest time from the end of a ``store_result`` until a wait was given the result.
    longest_wait: float
    #: Longest ``store_result`` that returned, and longest look-up.
    longest_store: float
    longest_read: float
    #: The number of chords whose bodies were sent, and of those whose bodies were sent twice.
    chords: int
    doubled: int

    def count(self, *kinds: str) -> int:
        """Return the number of violations of some kinds."""
        return sum(violation.kind in kinds for violation in self.violations)

    def text(self, most: int = 20) -> str:
        """Return the violations as lines of text."""
        lines = [f"{v.kind}: {v.task_id}: {v.what}" for v in self.violations[:most]]
        if len(self.violations) > most:
            kinds: Counter[str] = collections.Counter(v.kind for v in self.violations)
            lines.append(f"and more, together {dict(kinds)}")
        return "\n".join(lines)


def _rank(content: _Content) -> Tuple[int, int]:
    """Return the rank of a state: a reader may see ranks rise, but never fall."""
    if content.state == PENDING:
        return (0, 0)
    if content.state == SUCCESS:
        return (3, 0)
    return (2 if content.state in FINAL else 1, content.version)


class _Floor:
    """The highest-ranking state that was known at each time."""

    def __init__(self, known: Iterable[Tuple[float, _Content, str]]) -> None:
        self._times: List[float] = []
        self._best: List[Tuple[_Content, str]] = []
        best: Optional[Tuple[_Content, str]] = None
        for at, content, why in sorted(known, key=lambda item: item[0]):
            if best is None or _rank(content) > _rank(best[0]):
                best = (content, why)
            self._times.append(at)
            self._best.append(best)

    def before(self, at: float) -> Optional[Tuple[_Content, str]]:
        """Return the state that was known before *at*, and how it was known."""
        index = bisect.bisect_left(self._times, at)
        return self._best[index - 1] if index else None


class _ReadFloor:
    """The highest-ranking state that had been read at each time, and that the broker had to keep.

    Parameters:
        reads: the reads.
        why: how they were made, for messages.
        promised: when the broker had to keep each state from.
        crashes: when the broker was killed.
    """

    def __init__(
        self,
        reads: Iterable[Read],
        why: str,
        promised: Dict[_Content, float],
        crashes: List[float],
    ) -> None:
        self._crashes = crashes
        known: Dict[int, List[Tuple[float, _Content, str]]] = {}
        for read in reads:
            first = bisect.bisect_right(crashes, read.ended)
            # A state that was promised when the broker was killed must be found afterwards too.
            sure = promised.get(read.content, float("inf"))
            last = first
            while last < len(crashes) and sure < crashes[last]:
                last += 1
            for life in range(first, last + 1):
                known.setdefault(life, []).append((read.ended, read.content, why))
        self._floors = {life: _Floor(items) for life, items in known.items()}

    def before(self, read: Read, lag: float) -> Optional[Tuple[_Content, str]]:
        """Return the state that had been read *lag* before *read* began, and how."""
        floor = self._floors.get(bisect.bisect_right(self._crashes, read.ended))
        return None if floor is None else floor.before(read.began - lag)


def check(
    record: Record,
    limits: Limits = LIMITS,
    since: float = 0.0,
    until: float = float("inf"),
    now: Optional[float] = None,
    deleted: float = 0.0,
) -> Verdict:
    """Report broken promises.

    Parameters:
        since: tasks and waits that began earlier are ignored.
        until: tasks and waits that began later are ignored.
        now: when the journals ended (``time.monotonic``); unfinished waits whose timeout was over
            by then count as late. ``None`` for the current time.
        deleted: when a shard was deleted: later waits may miss results stored before.
    """
    now = time.monotonic() if now is None else now
    violations: List[Violation] = []
    by_task: Dict[str, List[Tuple[Wait, _Content, float]]] = {}
    for wait in record.waits:
        for task_id, given in wait.got.items():
            by_task.setdefault(task_id, []).extend((wait, content, at) for content, at in given)
    longest_wait = longest_store = longest_read = 0.0
    at_stake = refused = answers = raised = 0

    chosen: Set[str] = set()
    for task_id, stores in record.stores.items():
        born = min(store.began for store in stores)
        if since <= born <= until:
            chosen.add(task_id)
            at_stake += any(store.kept is not None for store in stores)
            refused += sum(store.error is not None for store in stores)
            longest_store = max(
                [longest_store, *(s.ended - s.began for s in stores if s.ended is not None)]
            )
    for task_id in (record.reads.keys() | by_task.keys()) - record.stores.keys():
        violations.extend(_unknown(task_id, record.reads.get(task_id, ()), since, until))
    for task_id in chosen:
        reads = list(record.reads.get(task_id, ()))
        answers += len(reads)
        longest_read = max([longest_read, *(read.ended - read.began for read in reads)])
        for wait, content, at in by_task.get(task_id, ()):
            reads.append(Read(wait.process, "push", content, wait.began, at))
        violations.extend(_check_task(task_id, record.stores[task_id], reads, record, limits))
    for wait in record.waits:
        if not since <= wait.began <= until:
            continue
        answers += wait.ended is not None and wait.error is None
        raised += wait.error is not None
        violations.extend(
            violation
            for violation in _check_wait(wait, record, limits, now)
            if violation.kind != "missed"
            or all(s.began >= deleted for s in record.stores.get(violation.task_id, ()))
        )
        for task_id, given in wait.got.items():
            ends = [
                store.kept
                for store in record.stores.get(task_id, ())
                if store.kept is not None and store.content.state in FINAL
            ]
            if ends:
                longest_wait = max(longest_wait, given[0][1] - max(min(ends), wait.began))
    chosen = {wait.tasks[0] for wait in record.waits if since <= wait.began <= until}
    fired = [record.fired[body] for body in chosen & record.chords.keys() & record.fired.keys()]
    for process, began, ended, allowed, error in record.unread:
        if not since <= began <= until:
            continue
        raised += 1
        longest_read = max(longest_read, ended - began)
        if ended - began > allowed + limits.grace:
            text = f"a read of {process} raised after {ended - began:.1f} s of {allowed:g}: {error}"
            violations.append(Violation("late", "-", began, text))
    violations.sort(key=lambda violation: violation.at)
    return Verdict(
        violations,
        at_stake,
        refused,
        answers,
        raised,
        longest_wait,
        longest_store,
        longest_read,
        len(fired),
        sum(count > 1 for count in fired),
    )


def _unknown(
    task_id: str, reads: Iterable[Read], since: float, until: float
) -> Iterator[Violation]:
    for read in reads:
        if read.content.state != PENDING and since <= read.began <= until:
            yield Violation("wrong", task_id, read.began, f"{read} although nothing was stored")


def _check_task(
    task_id: str, stores: List[Store], reads: List[Read], record: Record, limits: Limits
) -> Iterator[Violation]:
    written: Dict[_Content, float] = {}
    promised: Dict[_Content, float] = {}
    # A task that ran twice is in two journals, in any order.
    for store in stores:
        content = store.content
        written[content] = min(store.began, written.get(content, store.began))
        if store.kept is not None:
            promised[content] = min(store.kept, promised.get(content, store.kept))
    first = min(store.began for store in stores)
    by_stores = _Floor((at, content, "stored before") for content, at in promised.items())
    by_others = _ReadFloor(
        # A pushed state may not have reached the store yet.
        (read for read in reads if read.kind == "look-up"),
        "read before",
        promised,
        record.crashes,
    )
    own = {
        process: _ReadFloor(
            (read for read in reads if read.process == process),
            "read before by the same process",
            promised,
            record.crashes,
        )
        for process in {read.process for read in reads}
    }
    end = record.forgotten.get(task_id, float("inf"))
    if limits.expires is not None:
        end = min(end, first + limits.expires)
    success: Optional[Read] = None
    for read in sorted(reads, key=lambda read: read.ended):
        content = read.content
        if content.state != PENDING and not written.get(content, float("inf")) <= read.ended:
            yield Violation("wrong", task_id, first, f"{read} although that was never stored")
            continue
        if read.ended >= end:
            continue
        if content.state == SUCCESS:
            if success is not None and success.content != content:
                yield Violation("replaced", task_id, first, f"{read} after {success}")
            success = success or read
        # A process that answers from pushed states may lag behind others. A client on a node that
        # is cut off may do so, until it notices.
        fresh = read.kind == "look-up" and not record.is_cut(read.began, limits.lag)
        lag = 0.0 if fresh else limits.lag
        for known in (
            by_stores.before(read.began - lag),
            by_others.before(read, lag),
            own[read.process].before(read, 0.0),
        ):
            if known is None or _rank(known[0]) <= _rank(content):
                continue
            if known[0].state == SUCCESS and content.state != PENDING:
                kind = "replaced"
            else:
                kind = "lost" if known[0].state in FINAL and content.state == PENDING else "older"
            yield Violation(kind, task_id, first, f"{read} although {known[0]} was {known[1]}")
            break


def _check_wait(wait: Wait, record: Record, limits: Limits, now: float) -> Iterator[Violation]:
    what = f"a wait of {wait.process} for {len(wait.tasks)} tasks"
    ended = now if wait.ended is None else wait.ended
    if ended > wait.deadline + limits.grace:
        over = ended - wait.deadline
        yield Violation("late", wait.tasks[0], wait.began, f"{what} was {over:.1f} s too long")
    for task_id, given in wait.got.items():
        if len(given) > 1:
            yield Violation("twice", task_id, wait.began, f"{what} was given {given}")
    for (task_id, content), times in collections.Counter(wait.heard).items():
        if times > 1:
            yield Violation("twice", task_id, wait.began, f"{what} heard {content} {times} times")
    if wait.ended is None:
        return
    for task_id in wait.tasks:
        if task_id in wait.got or task_id in record.forgotten:
            continue
        if wait.error is None:
            yield Violation("missed", task_id, wait.began, f"{what} returned without it")
            continue
        for store in record.stores.get(task_id, ()):
            if (
                store.kept is not None
                and store.content.state in FINAL
                and max(store.kept, wait.began) + limits.lag < wait.ended
            ):
                yield Violation(
                    "missed",
                    task_id,
                    wait.began,
                    f"{what} raised {wait.error} {wait.ended - store.kept:.1f} s after it was "
                    "stored",
                )
                break
        else:
            if not _may_be_unfired(task_id, wait.ended - limits.lag, record):
                yield Violation("unfired", task_id, wait.began, f"{what} raised {wait.error}")


def _may_be_unfired(body: str, at: float, record: Record) -> bool:
    """Return whether *body* is that of no chord, or need not have been sent at a time."""
    header = record.chords.get(body)
    if header is None or body in record.fired:
        return True
    return not all(
        any(store.kept is not None and store.kept < at for store in record.stores.get(task_id, ()))
        for task_id in header
    )
