"""What storing and waiting processes saw, and whether that keeps the promises of a result backend.

This knows nothing of the backend. Every process writes what it calls and what comes of it into a
journal, a file of its own, line by line and unbuffered, so that even what a process did that was
killed is known. Times are those of ``time.monotonic``, which is one clock for all processes of a
machine. :func:`check` reads the journals and says what was broken:

``lost``
    A final state whose ``store_result`` had returned was not found by who looked for it.
``older``
    Something older was read than what had been read, or stored, before.
``replaced``
    SUCCESS, or its value, has changed.
``wrong``
    What was read had never been stored.
``late``
    A wait, or a look-up, was not over in its time.
``twice``
    A wait was given the same thing a second time.
``missed``
    A wait ended without a result that had long been stored.

Not promised is what the broker had not confirmed when it was killed: somebody may have read it
before, and not find it afterwards until its publisher has published it again.
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

__all__ = ("Journal", "Limits", "Verdict", "Violation", "check", "load", "value")

PENDING = "PENDING"
SUCCESS = "SUCCESS"
FINAL = frozenset({SUCCESS, "FAILURE", "REVOKED"})

#: The kinds of violations.
KINDS = ("lost", "older", "replaced", "wrong", "late", "twice", "missed")


def value(task_id: str, version: int, size: int = 60) -> Dict[str, Any]:
    """Return what is stored as state number *version* of a task: no other state has the same."""
    text = hashlib.sha256(f"{task_id} {version}".encode()).hexdigest()
    return {"v": version, "text": (text * (size // len(text) + 1))[:size]}


class _Content(NamedTuple):
    """A state and what came with it, in short."""

    state: str
    #: Number of the state among those of its task; -1 of a state that was made by nobody.
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
    """Writes down what a process does. May be used by several threads.

    Parameters:
        folder: where the journals are.
        role: what the process does; part of the file's name.

    After a fork the child has to make one of its own.
    """

    def __init__(self, folder: Path, role: str) -> None:
        self.process = f"{role}-{os.getpid()}"
        self._file = os.open(
            folder / f"{self.process}.journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
        )
        self._waits = 0

    def _note(self, *event: Any) -> None:
        # One write each: the kernel keeps it, whatever becomes of the process.
        os.write(self._file, json.dumps(event).encode() + b"\n")

    def began_to_store(self, task_id: str, state: str, result: Any) -> None:
        """Note that ``store_result`` is about to be called."""
        self._note("store", task_id, *_content(state, result), time.monotonic())

    def stored(self, task_id: str, state: str, result: Any, error: Optional[str] = None) -> None:
        """Note that ``store_result`` has returned, or raised *error*."""
        self._note("stored", task_id, *_content(state, result), time.monotonic(), error)

    def read(self, kind: str, began: float, task_id: str, state: str, result: Any) -> None:
        """Note what was read.

        Parameters:
            kind: ``look-up`` where the broker was asked, ``poll`` where what was pushed before
                may have been the answer.
            began: when the read began (``time.monotonic``).
        """
        content = _content(state, result)
        self._note("read", kind, task_id, *content, began, time.monotonic())

    def failed_to_read(self, began: float, timeout: float, error: str) -> None:
        """Note that a read raised, and in what time it had to be answered."""
        self._note("unread", began, time.monotonic(), timeout, error)

    def began_to_wait(self, task_ids: Iterable[str], timeout: float) -> int:
        """Note that a wait for *task_ids* begins; return its number."""
        self._waits += 1
        number = self._waits
        now = time.monotonic()
        self._note("wait", number, list(task_ids), now, now + timeout)
        return number

    def got(self, number: int, task_id: str, state: str, result: Any) -> None:
        """Note that a wait was given the final state of a task."""
        self._note("got", number, task_id, *_content(state, result), time.monotonic())

    def heard(self, number: int, task_id: str, state: str, result: Any) -> None:
        """Note that a wait was given a state of a task, whichever, by ``on_message``."""
        self._note("heard", number, task_id, *_content(state, result), time.monotonic())

    def waited(self, number: int, error: Optional[str] = None) -> None:
        """Note that a wait has returned, or raised *error*."""
        self._note("waited", number, time.monotonic(), error)

    def began_to_forget(self, task_id: str) -> None:
        """Note that a task is about to be forgotten."""
        self._note("forget", task_id, time.monotonic())

    def crashed(self) -> None:
        """Note that the broker is about to be killed, and again that it was."""
        self._note("crash", time.monotonic())

    @contextlib.contextmanager
    def storing(self, task_id: str, state: str, result: Any) -> Iterator[None]:
        """Note what the block stores, and whether it raises; the error goes no further."""
        self.began_to_store(task_id, state, result)
        try:
            yield
        except Exception as exc:
            self.stored(task_id, state, result, repr(exc))
        else:
            self.stored(task_id, state, result)


# -- what the journals say -----------------------------------------------------------------------


@dataclasses.dataclass
class Store:
    """A call of ``store_result``."""

    process: str
    content: _Content
    began: float
    ended: Optional[float] = None
    error: Optional[str] = None
    #: Since when everybody has to find it, or ``None``. A state on the way is only promised when
    #: a final one that the same process stored after it is.
    kept: Optional[float] = None


@dataclasses.dataclass
class Read:
    """A state that was read."""

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
    #: By task, the final states that it was given, with their times.
    got: Dict[str, List[Tuple[_Content, float]]] = dataclasses.field(default_factory=dict)
    heard: List[Tuple[str, _Content]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Record:
    """All that is in a folder of journals."""

    stores: Dict[str, List[Store]] = dataclasses.field(default_factory=dict)
    reads: Dict[str, List[Read]] = dataclasses.field(default_factory=dict)
    waits: List[Wait] = dataclasses.field(default_factory=list)
    #: When forgetting a task began.
    forgotten: Dict[str, float] = dataclasses.field(default_factory=dict)
    #: Of reads that raised: process, begin, end, seconds allowed, error.
    unread: List[Tuple[str, float, float, float, str]] = dataclasses.field(default_factory=list)
    #: When the broker was killed.
    crashes: List[float] = dataclasses.field(default_factory=list)

    def promised(self, since: float = 0.0, until: float = float("inf")) -> List[str]:
        """Return the tasks that have to be found and were stored between two times."""
        return [
            task_id
            for task_id, stores in self.stores.items()
            if task_id not in self.forgotten
            and any(s.kept is not None and since <= s.began <= until for s in stores)
        ]


def load(folder: Path) -> Record:
    """Read all journals of a folder. A last line that was not written to its end is left out."""
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
            elif what == "crash":
                record.crashes.extend(event)
            else:
                raise ValueError(f"{path}: unknown event {what!r}")
        record.waits.extend(waits.values())
    record.crashes.sort()
    return record


# -- the verdict ---------------------------------------------------------------------------------


class Limits(NamedTuple):
    """What is still within the promises."""

    #: Seconds by which an answer from what was pushed may lag behind what is stored. While its
    #: connection is dead and nobody has said so, a process cannot know better.
    lag: float = 45.0
    #: Seconds by which a wait or a look-up may overrun its time on a busy machine.
    grace: float = 15.0
    #: Seconds after which results expire; ``None`` for never.
    expires: Optional[float] = None


LIMITS = Limits()


class Violation(NamedTuple):
    """A promise that was broken."""

    kind: str
    task_id: str
    #: When what was broken had been promised: when it was stored, or when a wait began.
    at: float
    what: str


@dataclasses.dataclass
class Verdict:
    """What a record comes to."""

    violations: List[Violation]
    #: Tasks that had to be found.
    at_stake: int
    #: Calls of ``store_result`` that raised.
    refused: int
    #: Reads and waits that came to an answer, and those that raised in their time.
    answers: int
    raised: int
    #: Longest time between the end of a ``store_result`` and a wait being given the result.
    longest_wait: float
    #: Longest ``store_result`` that returned, and longest look-up.
    longest_store: float
    longest_read: float

    def count(self, *kinds: str) -> int:
        """Return how many violations there are of some kinds."""
        return sum(violation.kind in kinds for violation in self.violations)

    def text(self, most: int = 20) -> str:
        """Return the violations as lines."""
        lines = [f"{v.kind}: {v.task_id}: {v.what}" for v in self.violations[:most]]
        if len(self.violations) > most:
            kinds: Counter[str] = collections.Counter(v.kind for v in self.violations)
            lines.append(f"and more, together {dict(kinds)}")
        return "\n".join(lines)


def _rank(content: _Content) -> Tuple[int, int]:
    """Return how much a state counts: more may follow less, never the other way."""
    if content.state == PENDING:
        return (0, 0)
    if content.state == SUCCESS:
        return (3, 0)
    return (2 if content.state in FINAL else 1, content.version)


class _Floor:
    """The most that was known at each time."""

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
        """Return what was known before *at*, and why."""
        index = bisect.bisect_left(self._times, at)
        return self._best[index - 1] if index else None


class _ReadFloor:
    """The most that had been read at each time, and that the broker was bound to keep.

    Parameters:
        reads: what was read.
        why: how it was read, for messages.
        promised: since when the broker was bound to keep what it had.
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
            # What was promised when the broker was killed is to be found afterwards, too.
            sure = promised.get(read.content, float("inf"))
            last = first
            while last < len(crashes) and sure < crashes[last]:
                last += 1
            for life in range(first, last + 1):
                known.setdefault(life, []).append((read.ended, read.content, why))
        self._floors = {life: _Floor(items) for life, items in known.items()}

    def before(self, read: Read, lag: float) -> Optional[Tuple[_Content, str]]:
        """Return what had been read *lag* before *read* began, and why that matters."""
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
    """Say which promises were broken.

    Parameters:
        since: tasks and waits that began before are left out.
        until: those that began after are left out.
        now: when the journals ended (``time.monotonic``); waits that had to be over by then and
            are not count as late. ``None`` for the present.
        deleted: when somebody deleted what was kept: who waits later for what was stored before
            misses nothing.
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
    # A task that was run twice is in two journals, in any order.
    for store in stores:
        content = store.content
        written[content] = min(store.began, written.get(content, store.began))
        if store.kept is not None:
            promised[content] = min(store.kept, promised.get(content, store.kept))
    first = min(store.began for store in stores)
    by_stores = _Floor((at, content, "stored before") for content, at in promised.items())
    by_others = _ReadFloor(
        # What was pushed may not have reached the store yet.
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
        # What came by a push, or was kept from one, may lag behind what others know.
        lag = 0.0 if read.kind == "look-up" else limits.lag
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
