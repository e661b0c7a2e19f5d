"""Messages that no caller waits for, and that must be published again. Pure: no I/O, no clock."""

from __future__ import annotations

import collections
import logging
from typing import Deque, Iterable, List, Optional

from celery_amqp_results.amqp.confirms import Publication, Status
from celery_amqp_results.store.delivery import size_limit

__all__ = ("MAX_STRAYS", "Strays")

logger = logging.getLogger(__name__)

#: The most messages that wait to be published again. The oldest is dropped for one more. A lost
#: connection leaves what was unconfirmed on it: 500 messages, and one for each further thread.
MAX_STRAYS = 2000

#: Pauses, in seconds, before a refused message is published again. After the last refusal the
#: message is lost.
REFUSAL_PAUSES = (0.0, 0.2, 0.5, 1.0, 2.0)


class Strays:
    """Decides which messages are published again, and when.

    Not thread-safe: the lock of the publishing channel guards it.
    """

    def __init__(self) -> None:
        self._waiting: Deque[Publication] = collections.deque(maxlen=MAX_STRAYS)

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, publications: Iterable[Publication]) -> None:
        """Publish these again, when it is time."""
        for publication in publications:
            if self._is_hopeless(publication.message.body, publication.failure):
                logger.error(
                    "%s is lost: it has %d bytes, and the broker takes up to %d",
                    publication.message.what,
                    len(publication.message.body),
                    size_limit(publication.failure),
                )
            else:
                self._waiting.append(publication)

    @staticmethod
    def _is_hopeless(body: bytes, failure: Optional[BaseException]) -> bool:
        limit = size_limit(failure)
        return limit is not None and len(body) > limit

    def take_due(self, now: float) -> List[Publication]:
        """Remove and return the messages to publish now.

        Parameters:
            now: the time (``time.monotonic``).
        """
        due: List[Publication] = []
        later: List[Publication] = []
        for publication in self._waiting:
            if publication.status is Status.RETURNED and publication.message.shard is None:
                # Its queue was deleted, and is not declared again.
                continue
            if publication.status is not Status.REFUSED:
                due.append(publication)
            elif publication.refusals > len(REFUSAL_PAUSES):
                logger.error(
                    "lost, since the broker refused it %d times (nack): %s",
                    publication.refusals,
                    publication.message.what,
                )
            elif now < publication.sent + REFUSAL_PAUSES[publication.refusals - 1]:
                later.append(publication)
            else:
                due.append(publication)
        self._waiting.clear()
        self._waiting.extend(later)
        return due
