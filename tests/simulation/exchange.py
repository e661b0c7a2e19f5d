"""A model of the topic exchange and of the inboxes that are bound to it.

An inbox receives the states of its own tasks, what is sent to all, and the states of the shards
that it is bound to, in the order of publishing. A lost connection takes the inbox with it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Deque, Dict, Set

from celery_amqp_results.feed.bindings import ALL

__all__ = ("Exchange", "Inbox")


@dataclasses.dataclass(eq=False)
class Inbox:
    """The inbox of a process, and the keys that route to it."""

    messages: Deque[Any] = dataclasses.field(default_factory=lambda: Deque())
    keys: Set[int] = dataclasses.field(default_factory=set)


class Exchange:
    """Routes messages to the inboxes of processes, which are known by their numbers."""

    def __init__(self) -> None:
        self.inboxes: Dict[int, Inbox] = {}

    def open(self, process: int) -> None:
        """Declare the inbox of a process."""
        self.inboxes[process] = Inbox()

    def lose(self, process: int) -> None:
        """Lose the connection of a process."""
        self.inboxes.pop(process, None)

    def bind(self, process: int, key: int) -> None:
        """Route the states of a shard, or of all, to the inbox of a process."""
        if process in self.inboxes:
            self.inboxes[process].keys.add(key)

    def unbind(self, process: int, key: int) -> None:
        """Undo :meth:`bind`."""
        if process in self.inboxes:
            self.inboxes[process].keys.discard(key)

    def publish(self, message: Any, shard: int, owner: int) -> None:
        """Route the state of a task that the process *owner* has sent."""
        for process, inbox in self.inboxes.items():
            if process == owner or inbox.keys & {shard, ALL}:
                inbox.messages.append(message)

    def broadcast(self, message: Any) -> None:
        """Route a message to all inboxes."""
        for inbox in self.inboxes.values():
            inbox.messages.append(message)

    def pass_through(self, process: int, message: Any) -> None:
        """Route a barrier to the inbox of its process."""
        if process in self.inboxes:
            self.inboxes[process].messages.append(message)
