"""Packing loose results into pages: what is written, and what that replaces. Pure: no I/O."""

from __future__ import annotations

import itertools
from typing import Callable, Dict, Iterable, Iterator, List, Mapping, Set

from celery_amqp_results.protocol import page
from celery_amqp_results.protocol.message import STATE, StateMessage
from celery_amqp_results.protocol.ranking import is_final

__all__ = ("Packing", "split", "without_damaged")


class Packing:
    """Replaces the messages of a shard by pages.

    Parameters:
        sources: the states in each message, by delivery tag.
        credible: returns states without those that must not displace others.
        now: microseconds since 1970.
    """

    def __init__(
        self,
        sources: Mapping[int, List[StateMessage]],
        credible: Callable[[Iterable[StateMessage]], List[StateMessage]],
        now: int,
    ) -> None:
        self._sources = sources
        self._keep, self._drop = page.select(
            credible(itertools.chain.from_iterable(sources.values())), now
        )
        self._settled = {id(state) for state in self._drop}

    @property
    def size(self) -> int:
        """How many states are packed or dropped."""
        return len(self._keep) + len(self._drop)

    @property
    def settled(self) -> int:
        """How many states were packed or dropped so far."""
        return len(self._settled)

    def pages(self, page_size: int) -> Iterator[List[StateMessage]]:
        """Yield the contents of the pages, each of at most *page_size* bytes."""
        return split(self._keep, page_size)

    def is_last(self, content: List[StateMessage]) -> bool:
        """Return whether *content* is that of the last page."""
        return content[-1] is self._keep[-1]

    def wrote(self, content: List[StateMessage]) -> None:
        """Note that the broker has confirmed a page."""
        self._settled.update(map(id, content))

    def replaced(self) -> List[int]:
        """Return the delivery tags of messages of which every state is packed or dropped."""
        return [
            tag
            for tag, states_of in self._sources.items()
            if all(id(state) in self._settled for state in states_of)
        ]

    def orphans(self, replaced: Iterable[int]) -> Set[str]:
        """Return the queues whose only pointers are dropped and that would not expire.

        Parameters:
            replaced: the tags of the messages that are removed.
        """
        dropped = {id(state) for state in self._drop}
        gone_tags = set(replaced)
        gone: Set[str] = set()
        # The same pointer may occur twice.
        kept: Set[str] = set()
        for tag, states_of in self._sources.items():
            for state in states_of:
                if state.body_queue is not None and state.expiration is None:
                    superseded = tag in gone_tags and id(state) in dropped
                    (gone if superseded else kept).add(state.body_queue)
        return gone - kept


def split(states: Iterable[StateMessage], page_size: int) -> Iterator[List[StateMessage]]:
    """Yield *states* in batches that make pages of about *page_size* bytes at most."""
    batch: List[StateMessage] = []
    size = 0
    for state in states:
        if batch and size + len(state.body) > page_size:
            yield batch
            batch, size = [], 0
        batch.append(state)
        size += len(state.body) + page.OVERHEAD
    if batch:
        yield batch


def without_damaged(
    known: Iterable[StateMessage],
    readable: Callable[[List[StateMessage]], List[StateMessage]],
) -> List[StateMessage]:
    """Return the states *known* without undecodable final states that would hide others.

    Parameters:
        readable: returns those of several final states of a task that do not hide a decodable one.
    """
    states = list(known)
    ends: Dict[str, List[StateMessage]] = {}
    for state in states:
        if state.kind == STATE and is_final(state.state):
            ends.setdefault(state.id, []).append(state)
    damaged: Set[int] = set()
    for several in ends.values():
        if len(several) > 1:
            damaged.update(map(id, several))
            damaged.difference_update(map(id, readable(several)))
    return [state for state in states if id(state) not in damaged]
