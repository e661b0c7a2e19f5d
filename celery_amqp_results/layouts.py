"""What the backend needs of a layout: a way to keep results on a broker.

``shared`` keeps all results in a fixed number of queues; ``per-task`` has a queue for each task,
as Celery 4 had. The backend turns Celery's calls into these few.
"""

from __future__ import annotations

from typing import Collection, Dict, Iterable, List, Optional, Protocol

from celery_amqp_results.meta import StateMessage
from celery_amqp_results.waiting import Update

__all__ = ("Following", "Layout")


class Following(Protocol):
    """Follows tasks until they end. For one thread, and to be closed at the end."""

    #: The tasks that have not ended, each with the state that counts so far.
    pending: Dict[str, Optional[StateMessage]]

    def __enter__(self) -> Following:
        """Return itself."""

    def __exit__(self, *exc_info: object) -> None:
        """Close it."""

    def add(self, ids: Iterable[str]) -> None:
        """Follow *ids* as well. Does no I/O."""

    def discard(self, task_id: str) -> None:
        """Follow *task_id* no more."""

    def poke(self) -> None:
        """Have :meth:`step` return soon. May be called by any thread."""

    def pause(self, seconds: float) -> None:
        """Wait for *seconds*, or until there is something to do."""

    def step(self, deadline: Optional[float], pause: float) -> List[Update]:
        """Wait at most *pause* seconds for something new and return it."""

    def close(self) -> None:
        """Follow nothing any more."""


class Layout(Protocol):
    """Keeps results on a broker. Thread-safe; made anew after a fork."""

    def note_sent(self, task_id: str) -> None:
        """Note that this process is about to send a task. Does no I/O."""

    def publish(
        self, state: StateMessage, client: str, group_id: Optional[str], final: bool
    ) -> None:
        """Publish a state; of a *final* one, return only when the broker has it."""

    def poll(self, ids: Collection[str]) -> Dict[str, Optional[StateMessage]]:
        """Return the present state of each of *ids*, or ``None`` where nothing is known."""

    def follower(self) -> Following:
        """Return a follower of no tasks yet."""

    def forget(self, ids: Collection[str]) -> None:
        """Delete everything about *ids*."""

    def save_group(self, group: StateMessage) -> None:
        """Keep a group."""

    def read_group(self, group_id: str) -> Optional[StateMessage]:
        """Return a group that was kept, or ``None``."""

    def forget_group(self, group_id: str) -> None:
        """Delete a group that was kept."""

    def close(self, wait: bool = True) -> None:
        """Close all connections and end all threads."""
