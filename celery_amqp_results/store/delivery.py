"""Deciding what to do next with published messages, and what an error means for them.

Without I/O and without a clock.
"""

from __future__ import annotations

import re
from typing import Callable, List, NamedTuple, NoReturn, Optional, Sequence, Set

from amqp import exceptions as amqp_errors

from celery_amqp_results import errors
from celery_amqp_results.amqp.confirm_log import Outgoing, Publication, Status
from celery_amqp_results.amqp.declarations import Declarations
from celery_amqp_results.amqp.failures import is_refusal

__all__ = (
    "Delivery",
    "Verdict",
    "concerns",
    "describe",
    "named_queue",
    "raise_if_final",
    "raise_not_confirmed",
    "size_limit",
)

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
    """Messages that are published together, until the broker has confirmed all of them."""

    def __init__(self, messages: Sequence[Outgoing]) -> None:
        self.messages = messages
        self.publications = [Publication(message) for message in messages]
        self._declared: Set[int] = set()

    @property
    def gone(self) -> Set[str]:
        """The queues that do not exist and need not."""
        return {p.message.queue for p in self.publications if _is_gone(p)}

    @property
    def done(self) -> bool:
        """Whether nothing must be published again."""
        return all(p.status is Status.CONFIRMED or _is_gone(p) for p in self.publications)

    def choose_copies(
        self, verdict: Verdict, confirm: bool, knows: Callable[[Optional[int]], bool]
    ) -> List[int]:
        """Decide which live copies are sent at once; return the shards to declare before that.

        A reader that receives a state must find it in the store from then on. So the copy waits for
        the confirm if the shard may have no queue. Without a waiting caller the shard is declared
        first instead.

        Parameters:
            knows: returns whether the queue of a shard is known to be there.
        """
        unknown: List[int] = []
        for publication in verdict.again:
            shard = publication.message.shard
            sure = shard is None or shard in verdict.declare or knows(shard)
            publication.push = sure or not confirm
            if shard is not None and not sure and not confirm:
                unknown.append(shard)
        return unknown

    def held_copies(self) -> List[Publication]:
        """Return the messages whose live copies were held until the confirm."""
        return [p for p in self.publications if not p.push and p.message.pushed is not None]

    def judge(self) -> Verdict:
        """Return the next steps, at the beginning and once everything sent is settled."""
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
                    continue
                again.append(publication)
                if shard in self._declared:
                    homeless.append(publication)
                declare.append(shard)
        self._declared.update(declare)
        return Verdict(again, list(dict.fromkeys(declare)), failure, refused, homeless)


def _is_gone(publication: Publication) -> bool:
    return publication.status is Status.RETURNED and publication.message.shard is None


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
    queue = named_queue(exc)
    return not messages or queue is None or queue in {message.queue for message in messages}


def named_queue(exc: BaseException) -> Optional[str]:
    """Return the queue that the broker's error is about, if it names one."""
    found = _QUEUE.search(str(exc))
    return found[1] if found else None


def describe(messages: Sequence[Outgoing]) -> str:
    """Return the names of *messages*, for error messages."""
    if not messages:
        return "a request about queues"
    return ", ".join(message.what for message in messages[:3]) + (
        f" and {len(messages) - 3} more" if len(messages) > 3 else ""
    )


def raise_if_final(
    exc: BaseException, messages: Sequence[Outgoing], broker: str, declarations: Declarations
) -> None:
    """Raise the error for *exc* if publishing *messages* again cannot help.

    Parameters:
        messages: what was published; none for a request about queues.
    """
    if isinstance(exc, errors.BackendUnavailable) and not isinstance(exc, errors.NotConfirmed):
        # Connecting retries on its own, by the same policy.
        raise exc
    if not concerns(exc, messages):
        return
    refusal = declarations.refusal(exc)
    if refusal is not None:
        raise refusal from exc
    limit = size_limit(exc)
    if limit is not None and messages:
        largest = max(messages, key=lambda message: len(message.body))
        too_large = errors.ResultTooLarge(
            f"{largest.what} has {len(largest.body)} bytes when encoded, and the broker at "
            f"{broker} takes messages of up to {limit} bytes (max_message_size in its "
            "rabbitmq.conf). Return less, set result_compression, or raise that limit."
        )
        too_large.size, too_large.limit = len(largest.body), limit
        raise too_large from exc
    if limit is None and is_refusal(exc):
        raise errors.BackendUnavailable(
            f"the broker at {broker} refuses {describe(messages)}: {exc}. "
            "Check the user's permissions on the exchange and the queues "
            f"{declarations.topology.prefix}.*, and on the default exchange (amq.default)"
        ) from exc


def raise_not_confirmed(
    exc: BaseException, messages: Sequence[Outgoing], broker: str, tries: int
) -> NoReturn:
    """Raise the error for messages that *tries* tries did not get confirmed."""
    raise errors.NotConfirmed(
        f"the broker at {broker} did not confirm {describe(messages)} in {tries} tries: {exc!r}"
    ) from exc
