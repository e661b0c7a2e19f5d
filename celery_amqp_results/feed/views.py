"""What the table knows of one shard, and of one task.

Plain data: this module does no I/O and has no clock.
"""

from __future__ import annotations

import array
import bisect
import collections
import dataclasses
from typing import Deque, Dict, Iterable, List, Optional, Set, Tuple

from celery_amqp_results.protocol.message import StateMessage

__all__ = ("Digests", "Entry", "Look", "View")

#: Seconds that a binding has to stand before a read may rely on it: on another node of a cluster it
#: may take effect a moment later.
STEADY = 1.0
#: Seconds after which a live view is checked against the store; doubled each time, up to the last.
FIRST_CHECK = 15.0
LAST_CHECK = 300.0
#: Seconds after which a pushed state certainly lies in its shard, unless it was lost.
SETTLED = 10.0
#: About how many bytes a state takes in memory besides its body, or an id without a known state.
STATE_OVERHEAD = 700
NOTHING_OVERHEAD = 300
#: Bytes for a digest.
DIGEST_SIZE = 8
#: Bytes of recently pushed states that are kept for each shard that is not live.
MAX_LATELY_BYTES = 256 * 1024
#: The number of single digests that are added before all are sorted.
MAX_LOOSE_DIGESTS = 512


class Digests:
    """A set of digests, eight bytes each."""

    def __init__(self, digests: Iterable[int] = ()) -> None:
        self._sorted = array.array("Q", sorted(set(digests)))
        self._loose: Set[int] = set()

    def __contains__(self, number: int) -> bool:
        if number in self._loose:
            return True
        at = bisect.bisect_left(self._sorted, number)
        return at < len(self._sorted) and self._sorted[at] == number

    def __len__(self) -> int:
        return len(self._sorted) + len(self._loose)

    def add(self, number: int) -> None:
        """Add a digest."""
        if number not in self:
            self._loose.add(number)
            if len(self._loose) > MAX_LOOSE_DIGESTS:
                self._sorted = array.array("Q", sorted({*self._sorted, *self._loose}))
                self._loose = set()


@dataclasses.dataclass(eq=False)
class Look:
    """A look-up under way. Made by :meth:`Table.begin`, and given back to it at the end."""

    ids: Set[str]
    #: Number of the connection, 0 for none.
    epoch: int
    began: float
    #: The shards of the census.
    census: Set[int]
    #: States pushed for the tasks, and in the shards of the census, since it began or shortly
    #: before.
    pushed: Dict[str, List[StateMessage]] = dataclasses.field(default_factory=dict)
    #: Tasks that were forgotten since.
    forgotten: Set[str] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(eq=False)
class Entry:
    """The knowledge of one task: its current state, or that there is none."""

    shard: int
    state: Optional[StateMessage]
    #: When it became known, or was last pushed.
    at: float
    #: Whether a read may rely on it. A client that waits for the task may use it anyway.
    sure: bool

    @property
    def size(self) -> int:
        """About how many bytes it takes."""
        if self.state is None:
            return NOTHING_OVERHEAD
        return STATE_OVERHEAD + len(self.state.body)


class View:
    """The knowledge of one shard."""

    def __init__(self) -> None:
        #: When it was last read, and whether the connection was lost since it was bound.
        self.read_at: Optional[float] = None
        self.lost = False
        #: Since when a binding stands, ``None`` while there is none.
        self.bound_at: Optional[float] = None
        #: The tasks with a known state.
        self.ids: Set[str] = set()
        #: Digests of all other ids with states in the shard; ``None`` while it is not live.
        self.digests: Optional[Digests] = None
        #: States pushed recently while it was not live, with the times.
        self.lately: Deque[Tuple[float, StateMessage]] = collections.deque()
        self.lately_bytes = 0
        #: How many states were pushed since it was last read.
        self.unread = 0
        self.check_at = 0.0
        self.check_pause = FIRST_CHECK

    @property
    def live(self) -> bool:
        """Whether everything in the shard is known."""
        return self.digests is not None

    def note(self, state: StateMessage, now: float) -> None:
        """Keep a pushed state for a while."""
        self.lately.append((now, state))
        self.lately_bytes += len(state.body)
        while self.lately[0][0] < now - SETTLED or self.lately_bytes > MAX_LATELY_BYTES:
            at, oldest = self.lately.popleft()
            self.lately_bytes -= len(oldest.body)
            if self.bound_at is not None and at >= now - SETTLED:
                # Some of the states pushed before were dropped.
                self.bound_at = max(self.bound_at, at)
            if not self.lately:
                break

    def checked(self, now: float, again: bool) -> None:
        """Note that a census was taken, and whether the view was live before."""
        self.check_pause = min(2 * self.check_pause, LAST_CHECK) if again else FIRST_CHECK
        self.check_at = now + self.check_pause

    def clear(self) -> None:
        """Drop the recently pushed states."""
        self.lately.clear()
        self.lately_bytes = 0

    def steady(self, now: float) -> bool:
        """Whether a read that began at *now* may rely on the binding."""
        return self.bound_at is not None and now - self.bound_at >= STEADY
