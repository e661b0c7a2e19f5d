"""Messages that no caller waits for, and that must be published again. Pure: no I/O, no clock."""

from __future__ import annotations

import collections
import logging
import math
from typing import Deque, Iterable, List, Optional

from celery_amqp_results.amqp.confirm_log import Publication, Status
from celery_amqp_results.amqp.failures import is_refusal
from celery_amqp_results.store.delivery import named_queue, size_limit

__all__ = ("MAX_STRAYS", "Strays")

logger = logging.getLogger(__name__)

#: The most messages that wait to be published again. The oldest is dropped for one more. A lost
#: connection leaves what was unconfirmed on it: 500 messages, and one for each further thread.
MAX_STRAYS = 2000

#: Pauses, in seconds, before a refused message is published again. After the last refusal the
#: message is lost. A quorum queue refuses everything while it has no leader, which may take half a
#: minute when nodes restart.
REFUSAL_PAUSES = (0.0, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)


class Strays:
    """Decides which messages are published again, and when.

    Not thread-safe: the lock of the publishing channel guards it.
    """

    def __init__(self) -> None:
        self._waiting: Deque[Publication] = collections.deque()
        #: When the first of them is due (``time.monotonic``).
        self._due_at = math.inf
        #: How many were given up.
        self.lost = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, publications: Iterable[Publication]) -> None:
        """Publish these again, when it is time."""
        for publication in publications:
            why = self._refusal(publication)
            if why is not None:
                self.give_up(publication, why)
                continue
            if len(self._waiting) == MAX_STRAYS:
                self.give_up(self._waiting.popleft(), f"{MAX_STRAYS} later states wait as well")
            self._waiting.append(publication)
            self._due_at = min(self._due_at, _due_at(publication, math.inf))

    def give_up(self, publication: Publication, why: object) -> None:
        """Count and log that a message is not published again."""
        self.lost += 1
        logger.error("%s is lost: %s", publication.message.what, why)

    @staticmethod
    def _refusal(publication: Publication) -> Optional[str]:
        """Return why the broker will never take a message, or ``None``."""
        failure, message = publication.failure, publication.message
        limit = size_limit(failure)
        if limit is not None and len(message.body) > limit:
            return f"it has {len(message.body)} bytes, and the broker takes up to {limit}"
        # Unless the message has come back, its queue may be there although it was declared here.
        if failure is None or not publication.homeless or not is_refusal(failure):
            return None
        if named_queue(failure) != message.queue:
            return None
        return f"its queue is not there, and the broker refuses it: {failure}"

    def take_due(self, now: float, longest: float = math.inf) -> List[Publication]:
        """Remove and return the messages to publish *now* (``time.monotonic``).

        Parameters:
            longest: the longest pause in seconds: a process that ends does not wait for more.
        """
        if now < self._due_at and longest == math.inf:
            return []
        due: List[Publication] = []
        later: List[Publication] = []
        for publication in self._waiting:
            if publication.status is Status.RETURNED and publication.message.shard is None:
                # Its queue was deleted, and is not declared again.
                continue
            if _is_refused_for_good(publication):
                self.give_up(
                    publication, f"the broker refused it {publication.refusals} times (nack)"
                )
            elif now < _due_at(publication, longest):
                later.append(publication)
            else:
                due.append(publication)
        self._waiting.clear()
        self._waiting.extend(later)
        self._due_at = min((_due_at(each, math.inf) for each in later), default=math.inf)
        return due


def _is_refused_for_good(publication: Publication) -> bool:
    refused = publication.status is Status.REFUSED
    return refused and publication.refusals > len(REFUSAL_PAUSES)


def _due_at(publication: Publication, longest: float) -> float:
    """Return when to publish a message again, after a pause of at most *longest* seconds."""
    if publication.status is not Status.REFUSED or _is_refused_for_good(publication):
        return -math.inf
    return publication.sent + min(longest, REFUSAL_PAUSES[publication.refusals - 1])
