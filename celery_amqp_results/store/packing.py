"""Packing loose results into pages: what is written, and what that replaces. Pure: no I/O."""

from __future__ import annotations

import collections
from typing import AbstractSet, Callable, Collection, Counter, Dict, Iterable, Iterator, List, Set

from celery_amqp_results.protocol import page
from celery_amqp_results.protocol.message import STATE, StateMessage
from celery_amqp_results.protocol.ranking import is_final

__all__ = ("Packing", "damaged_in", "split")


class Packing:
    """Replaces the messages of a shard by pages.

    Parameters:
        sources: the states in each message, by delivery tag.
        damaged: states that must not displace others; they stay where they are.
        now: microseconds since 1970.
    """

    def __init__(
        self,
        sources: Dict[int, List[StateMessage]],
        damaged: AbstractSet[StateMessage],
        now: int,
    ) -> None:
        self._sources = sources
        # Each state with the delivery tag of its message.
        self._keep, self._drop = page.select(
            (
                (tag, state)
                for tag, states_of in sources.items()
                for state in states_of
                if not damaged or state not in damaged
            ),
            now,
        )
        #: How many states of each message are neither packed nor dropped.
        self._left = {tag: len(states_of) for tag, states_of in sources.items()}
        #: How many states are packed, from the beginning of those to keep.
        self._packed = 0
        for tag, _ in self._drop:
            self._left[tag] -= 1

    @property
    def size(self) -> int:
        """How many states are packed or dropped."""
        return len(self._keep) + len(self._drop)

    @property
    def settled(self) -> int:
        """How many states were packed or dropped so far."""
        return self._packed + len(self._drop)

    def pages(self, page_size: int) -> Iterator[List[StateMessage]]:
        """Yield the contents of the pages, each of at most *page_size* bytes."""
        return split((state for _, state in self._keep), page_size)

    def is_last(self, content: List[StateMessage]) -> bool:
        """Return whether *content* is that of the last page."""
        return self._packed + len(content) == len(self._keep)

    def wrote(self, content: List[StateMessage]) -> None:
        """Note that the broker has confirmed the next page."""
        packed = self._packed + len(content)
        for tag, _ in self._keep[self._packed : packed]:
            self._left[tag] -= 1
        self._packed = packed

    def replaced(self) -> List[int]:
        """Return the delivery tags of messages of which every state is packed or dropped."""
        return [tag for tag, left in self._left.items() if not left]

    def orphans(self, replaced: Collection[int]) -> Set[str]:
        """Return the queues whose only pointers are dropped and that would not expire.

        Parameters:
            replaced: the tags of the messages that are removed.
        """
        gone_tags = set(replaced)
        gone = _unexpiring(state for tag, state in self._drop if tag in gone_tags)
        # The same pointer may occur twice.
        known = _unexpiring(state for states_of in self._sources.values() for state in states_of)
        return {queue for queue, count in gone.items() if count == known[queue]}


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


def _unexpiring(states: Iterable[StateMessage]) -> Counter[str]:
    """Return the queues of large results that would not expire, and how many states have them."""
    return collections.Counter(
        state.body_queue
        for state in states
        if state.body_queue is not None and state.expiration is None
    )


def damaged_in(
    known: Iterable[StateMessage],
    readable: Callable[[List[StateMessage]], List[StateMessage]],
) -> Set[StateMessage]:
    """Return the undecodable final states that would hide others among *known*.

    Parameters:
        readable: returns those of several final states of a task that do not hide a decodable one.
    """
    ends: Dict[str, List[StateMessage]] = {}
    for state in known:
        if state.kind == STATE and is_final(state.state):
            ends.setdefault(state.id, []).append(state)
    damaged: Set[StateMessage] = set()
    for several in ends.values():
        if len(several) > 1:
            # Equal copies are equally damaged.
            kept = readable(several)
            damaged.update(state for state in several if state not in kept)
    return damaged
