"""The bindings of the inbox: which shards should be bound, and which are.

A binding brings every state of a shard. It costs the broker a message for each, so it must save
look-ups. Bindings are metadata and must not churn. When more than a quarter of the shards is bound,
or tasks of other processes are read often, one key binds all of them.

This module does no I/O and has no clock.
"""

from __future__ import annotations

import collections
from typing import Deque, Dict, List, NamedTuple, Optional, Set

from celery_amqp_results.feed import views

__all__ = ("ALL", "Action", "Bindings")

#: The key that stands for all shards, where one binding covers them.
ALL = -1

#: This number of look-ups of other processes' tasks within this time, in seconds, binds all shards.
MANY_READS = 20
MANY_READS_SECONDS = 10.0
#: A binding pays for itself while fewer states are pushed between two reads. A push costs the
#: broker about a hundredth of what a checkout does.
PAYS = 100
#: The shortest life of a binding, in seconds.
LEAST_BOUND = 30.0


class Action(NamedTuple):
    """A change of a binding on the broker."""

    #: True to bind, false to unbind.
    bind: bool
    #: Number of the shard, or :data:`ALL`.
    key: int


class Bindings:
    """The bindings to shards. Not thread-safe."""

    def __init__(self, shards: int) -> None:
        self._shards = shards
        #: Keys that should be bound; keys requested from the broker; bound keys, with the times.
        self._wanted: Set[int] = set()
        self._requested: Set[int] = set()
        self._standing: Dict[int, float] = {}
        #: How many waiting clients follow tasks of other processes in each shard.
        self._watched: Dict[int, int] = {}
        #: Times of the latest look-ups of other processes' tasks.
        self._reads: Deque[float] = collections.deque(maxlen=MANY_READS)
        #: How many more states may be pushed before the binding of all shards stops paying.
        self._credit = 0
        #: Whether :meth:`actions` has something to do.
        self.restless = False
        #: Whether an inbox would be of use.
        self.wants_inbox = False

    def __contains__(self, shard: object) -> bool:
        """Whether all states of a shard are pushed."""
        return shard in self._standing or ALL in self._standing

    def since(self, key: int) -> Optional[float]:
        """Return since when the binding of a shard, or of all, stands; ``None`` if none does."""
        return self._standing.get(ALL, self._standing.get(key))

    def lost(self) -> None:
        """The connection is lost. Only shards with waiting clients are bound again at once."""
        self._requested.clear()
        self._standing.clear()
        self._wanted = set(self._watched)
        self.restless = bool(self._wanted)

    def bound(self, key: int, now: float) -> None:
        """The binding stands."""
        self._requested.discard(key)
        self._standing[key] = now
        if key == ALL:
            self._credit = max(self._credit, PAYS * self._shards // 4)

    def watched(self, shard: int, count: int) -> None:
        """Change the number of clients that wait for tasks of other processes in a shard."""
        self._watched[shard] = self._watched.get(shard, 0) + count
        if self._watched[shard] <= 0:
            del self._watched[shard]

    def want(self, key: int) -> None:
        """Request a binding, or the one of all shards if many are bound."""
        self.wants_inbox = self.restless = True
        if ALL in self._wanted:
            return
        self._wanted.add(key)
        if len(self._wanted) > max(1, self._shards // 4):
            self._wanted.add(ALL)

    def read(self, shards: int, looks_up: bool, now: float) -> None:
        """Count a read of other processes' tasks in a number of shards.

        Parameters:
            looks_up: whether one of them is not bound, so that only a look-up can tell.
        """
        self._credit = min(self._credit + PAYS * shards, PAYS * self._shards)
        if looks_up:
            self._reads.append(now)
            if len(self._reads) == MANY_READS and now - self._reads[0] <= MANY_READS_SECONDS:
                self.want(ALL)

    def pushed(self, shard: int, unread: int, now: float) -> Optional[int]:
        """Count a push; return the key of a binding that does not pay any more, and is dropped.

        Parameters:
            unread: how many states of the shard were pushed since its last read.
        """
        self._credit -= 1
        key = ALL if ALL in self._standing else shard
        if key == ALL:
            pays = self._credit >= 0 or bool(self._watched)
        else:
            pays = unread <= PAYS or shard in self._watched or shard not in self._standing
        if pays or now - self._standing[key] < LEAST_BOUND:
            return None
        if key == ALL:
            self._wanted.clear()
            self._reads.clear()
        else:
            self._wanted.discard(shard)
        self.restless = True
        return key

    def actions(self, now: float, connected: bool) -> List[Action]:
        """Return the bindings to add and to remove, each once.

        Parameters:
            connected: whether there is a connection to bind on.
        """
        self.restless = False
        if ALL in self._standing and now - self._standing[ALL] >= views.STEADY:
            self._wanted.intersection_update({ALL})
        found = [
            Action(False, key)
            for key, since in self._standing.items()
            if key not in self._wanted and now - since >= LEAST_BOUND
        ]
        for _, key in found:
            del self._standing[key]
        if connected:
            new = sorted(self._wanted - self._standing.keys() - self._requested)
            self._requested.update(new)
            found += [Action(True, key) for key in new]
        return found
