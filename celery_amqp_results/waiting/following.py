"""The interface of all followers."""

from __future__ import annotations

from typing import Dict, Iterable, List, Optional, Protocol

from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.waiting.progress import Update

__all__ = ("Following",)


class Following(Protocol):
    """Follows tasks until they end. For one thread; must be closed at the end."""

    #: The tasks that have not ended, each with its current state so far.
    pending: Dict[str, Optional[StateMessage]]

    def add(self, ids: Iterable[str]) -> None:
        """Follow *ids* as well. Does no I/O."""

    def discard(self, task_id: str) -> None:
        """Stop following *task_id*."""

    def poke(self) -> None:
        """Make :meth:`step` return soon. May be called by any thread."""

    def pause(self, seconds: float) -> None:
        """Wait for *seconds*, or until there is something to do."""

    def step(self, deadline: Optional[float], pause: float) -> List[Update]:
        """Wait for updates and return them.

        Parameters:
            deadline: time (``time.monotonic``) after which nothing more is read from the broker.
            pause: seconds to wait at most before returning an empty list. Reading may take longer.

        Raises:
            BackendUnavailable: when the broker cannot be reached or refuses us.
            DeclarationRefused: when something on the broker exists with other properties.
            Exception: what is wrong with a state or its queue, in the layout ``per-task``.
        """

    def close(self) -> None:
        """Stop following all tasks."""
