"""Deciding what to do next with published messages, without I/O and without a clock."""

from __future__ import annotations

import re
from typing import List, NamedTuple, Optional, Sequence, Set

from amqp import exceptions as amqp_errors

from celery_amqp_results.amqp.confirms import Outgoing, Publication, Status

__all__ = ("Delivery", "Verdict", "concerns", "describe", "size_limit")

#: The broker's error for a message that is too large; it closes the channel.
_MAX_SIZE = re.compile(r"larger than .*?max size (\d+)")

#: How the broker names a queue that it refuses.
_QUEUE = re.compile(r"queue '([^']*)'")


class Verdict(NamedTuple):
    """The next steps of a delivery."""

    #: Messages to publish once more.
    again: List[Publication]
    #: Shards to declare before that.
    declare: List[int]
    #: The error that some were lost with, or ``None``.
    failure: Optional[BaseException]
    #: Messages that a queue has refused.
    refused: List[Publication]
    #: Messages that no queue has taken although their shard was declared.
    homeless: List[Publication]


class Delivery:
    """Messages that are published together, until the broker has confirmed all of them.

    Parameters:
        messages: the messages.
    """

    def __init__(self, messages: Sequence[Outgoing]) -> None:
        self.messages = messages
        self.publications = [Publication(message) for message in messages]
        #: Queues that do not exist and need not.
        self.gone: Set[str] = set()
        self._declared: Set[int] = set()

    def unsent(self) -> List[Publication]:
        """Return the messages to publish."""
        return [p for p in self.publications if p.status is Status.UNSENT]

    def judge(self) -> Verdict:
        """Return the next steps, once everything sent is settled."""
        again: List[Publication] = []
        declare: List[int] = []
        failure: Optional[BaseException] = None
        refused: List[Publication] = []
        homeless: List[Publication] = []
        for publication in self.publications:
            shard = publication.message.shard
            if publication.status in (Status.UNSENT, Status.LOST):
                again.append(publication)
                failure = failure or publication.failure
            elif publication.status is Status.REFUSED:
                again.append(publication)
                refused.append(publication)
            elif publication.status is Status.RETURNED:
                if shard is None:
                    self.gone.add(publication.message.queue)
                    continue
                again.append(publication)
                if shard in self._declared:
                    homeless.append(publication)
                declare.append(shard)
        self._declared.update(declare)
        return Verdict(again, list(dict.fromkeys(declare)), failure, refused, homeless)


def size_limit(exc: Optional[BaseException]) -> Optional[int]:
    """Return the broker's size limit if *exc* says that a message exceeds it."""
    if not isinstance(exc, amqp_errors.PreconditionFailed):
        return None
    found = _MAX_SIZE.search(str(exc))
    return int(found.group(1)) if found else None


def concerns(exc: BaseException, messages: Sequence[Outgoing]) -> bool:
    """Return whether *exc*, which closed a shared channel, is about *messages*."""
    limit = size_limit(exc)
    if limit is not None:
        return any(len(message.body) > limit for message in messages)
    found = _QUEUE.search(str(exc))
    return not messages or found is None or found[1] in {message.queue for message in messages}


def describe(messages: Sequence[Outgoing]) -> str:
    """Return the names of *messages*, for error messages."""
    if not messages:
        return "a request about queues"
    return ", ".join(message.what for message in messages[:3]) + (
        f" and {len(messages) - 3} more" if len(messages) > 3 else ""
    )
