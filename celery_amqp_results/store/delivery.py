"""What to do next with messages that were published: decided without I/O and without a clock."""

from __future__ import annotations

import re
from typing import List, NamedTuple, Optional, Sequence, Set

from amqp import exceptions as amqp_errors

from celery_amqp_results.amqp.confirms import Outgoing, Publication, Status

__all__ = ("Delivery", "Verdict", "concerns", "describe", "size_limit")

#: What the broker says of a message that is too large: it closes the channel.
_MAX_SIZE = re.compile(r"larger than .*?max size (\d+)")

#: How the broker names a queue that it refuses.
_QUEUE = re.compile(r"queue '([^']*)'")


class Verdict(NamedTuple):
    """What to do next."""

    #: What has to be published once more.
    again: List[Publication]
    #: Shards to declare before that.
    declare: List[int]
    #: Why some of it was lost with the connection, ``None`` where nothing was.
    failure: Optional[BaseException]
    #: What a queue has refused.
    refused: List[Publication]
    #: What no queue has taken although its shard was declared.
    homeless: List[Publication]


class Delivery:
    """Some messages that are published together, until the broker has all of them.

    Parameters:
        messages: the messages.
    """

    def __init__(self, messages: Sequence[Outgoing]) -> None:
        self.messages = messages
        self.publications = [Publication(message) for message in messages]
        #: Queues that are not there and need not be.
        self.gone: Set[str] = set()
        self._declared: Set[int] = set()

    def unsent(self) -> List[Publication]:
        """Return what has to be published."""
        return [p for p in self.publications if p.status is Status.UNSENT]

    def judge(self) -> Verdict:
        """Return what to do next, once all that was sent is settled."""
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
    """Return the largest size that the broker takes, if *exc* says that a message is larger."""
    if not isinstance(exc, amqp_errors.PreconditionFailed):
        return None
    found = _MAX_SIZE.search(str(exc))
    return int(found.group(1)) if found else None


def concerns(exc: BaseException, messages: Sequence[Outgoing]) -> bool:
    """Return whether *exc*, which closed a channel that others use too, is about *messages*."""
    limit = size_limit(exc)
    if limit is not None:
        return any(len(message.body) > limit for message in messages)
    found = _QUEUE.search(str(exc))
    return not messages or found is None or found[1] in {message.queue for message in messages}


def describe(messages: Sequence[Outgoing]) -> str:
    """Return the names of *messages*, for messages to people."""
    if not messages:
        return "a request about queues"
    return ", ".join(message.what for message in messages[:3]) + (
        f" and {len(messages) - 3} more" if len(messages) > 3 else ""
    )
