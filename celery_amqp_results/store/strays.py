"""Messages that no caller waits for, and that must be published again. Pure: no I/O, no clock."""

from __future__ import annotations

import collections
import logging
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
        self._waiting: Deque[Publication] = collections.deque(maxlen=MAX_STRAYS)
        #: How many were given up.
        self.lost = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, publications: Iterable[Publication]) -> None:
        """Publish these again, when it is time."""
        for publication in publications:
            why = self._refusal(publication)
            if why is None:
                self._waiting.append(publication)
            else:
                self.give_up(publication, why)

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

    def take_due(self, now: float) -> List[Publication]:
        """Remove and return the messages to publish *now* (``time.monotonic``)."""
        due: List[Publication] = []
        later: List[Publication] = []
        for publication in self._waiting:
            if publication.status is Status.RETURNED and publication.message.shard is None:
                # Its queue was deleted, and is not declared again.
                continue
            if publication.status is not Status.REFUSED:
                due.append(publication)
            elif publication.refusals > len(REFUSAL_PAUSES):
                self.give_up(
                    publication, f"the broker refused it {publication.refusals} times (nack)"
                )
            elif now < publication.sent + REFUSAL_PAUSES[publication.refusals - 1]:
                later.append(publication)
            else:
                due.append(publication)
        self._waiting.clear()
        self._waiting.extend(later)
        return due
