"""The timetable of the measure *fleet*: which process sends, stores or polls which task, and when.

All processes compute the same timetable from the same few numbers, so that they need no messages
while they are measured. Nothing here does I/O or reads a clock.

A task is sent by one web process, stored by one storing process, and polled by other web processes,
as a page behind a load balancer does: twice before the result is stored, once at about the moment
when it is stored, and once after it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import uuid
from typing import Iterator, List, Tuple

__all__ = ("JITTER", "POLL", "POLLS", "SEND", "STORED_AFTER", "Step", "Timetable")

#: Seconds from sending a task to storing its result.
STORED_AFTER = 0.3

#: Seconds from sending a task to each of its polls.
POLLS = (0.1, 0.2, STORED_AFTER, 0.45)

#: The poll at the moment of storing comes up to this many seconds later, at random.
JITTER = 0.02

SEND, POLL = "send", "poll"


@dataclasses.dataclass(frozen=True, order=True)
class Step:
    """One thing that a web process does."""

    #: Seconds after the start.
    at: float
    #: :data:`SEND` or :data:`POLL`.
    action: str
    task: int


@dataclasses.dataclass(frozen=True)
class Timetable:
    """The steps of all processes in one round.

    Parameters:
        seed: makes the ids; each round needs its own.
        processes: number of web processes.
        storing: number of processes that store results.
        rate: tasks a second.
        seconds: how long tasks are sent.
    """

    seed: str
    processes: int
    storing: int
    rate: float
    seconds: float

    @property
    def tasks(self) -> int:
        """Number of tasks in the round."""
        return round(self.rate * self.seconds)

    @property
    def length(self) -> float:
        """Seconds until the last step."""
        return self.seconds + POLLS[-1] + JITTER

    def task_id(self, task: int) -> str:
        """Return the id of a task; it looks like one that Celery makes."""
        return str(uuid.UUID(bytes=self._noise(task)[:16], version=4))

    def sender(self, task: int) -> int:
        """Return the number of the web process that sends *task*."""
        return task % self.processes

    def sent_at(self, task: int) -> float:
        """Return when *task* is sent, in seconds after the start."""
        return task / self.rate

    def steps(self, number: int) -> List[Step]:
        """Return the steps of web process *number*, in their order."""
        return sorted(step for who, step in self._all_steps() if who == number)

    def stores(self, number: int) -> Iterator[Tuple[float, int]]:
        """Yield when storing process *number* stores which task."""
        for task in range(number, self.tasks, self.storing):
            yield self.sent_at(task) + STORED_AFTER, task

    def _all_steps(self) -> Iterator[Tuple[int, Step]]:
        for task in range(self.tasks):
            sent = self.sent_at(task)
            yield self.sender(task), Step(sent, SEND, task)
            jitter, *choices = self._noise(task)[16:]
            for after, choice in zip(POLLS, choices):
                # A number from 1 on, so that no process polls its own task.
                other = 1 + choice % max(1, self.processes - 1)
                poller = (self.sender(task) + other) % self.processes
                late = JITTER * (jitter + 1) / 256 if after == STORED_AFTER else 0.0
                yield poller, Step(sent + after + late, POLL, task)

    def _noise(self, task: int) -> bytes:
        """Return 32 bytes that look random and are the same in every process."""
        return hashlib.sha256(f"{self.seed}/{task}".encode()).digest()
