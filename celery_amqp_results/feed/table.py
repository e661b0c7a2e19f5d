"""A process's knowledge of tasks and shards: the table behind every read.

The shell reports events and queries the table. The table does no I/O, has no thread and no clock:
the shell passes the time with each event. See :mod:`celery_amqp_results.feed.inbox`.

**Shards.** The table has a view of each shard in which strangers' tasks are read or waited for:

========  =====================================  ================================================
state     meaning                                how a read of a stranger's task is answered
========  =====================================  ================================================
absent    not bound                              by a checkout; the read is counted
bound     the binding stands since *t*           by a checkout
live      a checkout that began ``STEADY``       after a barrier, from memory: a task of which
          after *t* was folded with everything   nothing is known is PENDING for certain
          pushed since
lost      the inbox connection was lost          as absent, and the next read binds the shard
========  =====================================  ================================================

========  ================================  ========  ==========================================
from      event                             to        action
========  ================================  ========  ==========================================
absent    second read in ``READ_AGAIN``     absent    bind
lost      read                              lost      bind
absent    a waiting client covers a task    absent    bind
absent    the binding stands                bound
bound     a census ends that began          live
          ``STEADY`` after the binding
live      a check is due, a read            live      census; the view is replaced by it
any       ``PAYS`` states were pushed       absent    unbind, not within ``LEAST_BOUND`` of the
          since the last read                         binding, nor while clients wait
any       the connection is lost            lost      forget everything
========  ================================  ========  ==========================================

A *census* is a checkout that records everything in a shard: the loose states in full, and of
everything else the digest of the id, eight bytes.

When more than a quarter of the shards is bound, or strangers' tasks are read often, one key binds
all of them.

**Tasks.** The table's knowledge of a task is either complete, or dropped. It is complete

- in a live view, by the view itself;
- when this process has sent it while the client's binding stood;
- when it was looked up while a binding stood that brings its states.

Each look-up is a *look*: an object that collects the states pushed for its tasks while the store is
read, so that no state is missed between the two.
"""

from __future__ import annotations

import array
import bisect
import collections
import dataclasses
import itertools
import re
from typing import (
    Collection,
    Deque,
    Dict,
    Iterable,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Set,
    Tuple,
)

from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.names import Topology
from celery_amqp_results.protocol.page import Census, number_of
from celery_amqp_results.protocol.ranking import fold, is_final, supersedes
from celery_amqp_results.toolkit.bounded import BoundedDict

__all__ = ("ALL", "Action", "Look", "Table", "Unread")

#: The key that stands for all shards, where one binding covers them.
ALL = -1

#: Seconds that a binding has to stand before a read may rely on it: on another node of a cluster it
#: may take effect a moment later.
STEADY = 1.0
#: A second read of a shard within this time binds it, in seconds.
READ_AGAIN = 60.0
#: This number of look-ups of strangers' tasks, within this time in seconds, binds all shards.
MANY_READS = 20
MANY_READS_SECONDS = 10.0
#: A binding pays for itself while fewer states are pushed between two reads. A push costs the
#: broker about a hundredth of what a checkout does.
PAYS = 100
#: The shortest life of a binding, in seconds: bindings are metadata, and must not churn.
LEAST_BOUND = 30.0
#: Seconds after which a live view is checked against the store; doubled each time, up to the last.
FIRST_CHECK = 15.0
LAST_CHECK = 300.0
#: Seconds between two checks, of whichever views. A check costs as much as ten barriers, and one
#: that finds a state that was not pushed ends all views.
CHECK_PAUSE = 5.0
#: Seconds after which a pushed state certainly lies in its shard, unless it was lost.
SETTLED = 10.0
#: How long a final state outside a live view is known, in seconds.
KEEP_FINAL = 15.0

#: A state that is older than this and was not pushed will not be pushed, in microseconds.
LATE = 5_000_000

#: An id as Celery makes them. Other ids come from the application, which may have reused them.
_NEW_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")

#: About how many bytes a state takes in memory besides its body, or an id without a known state.
STATE_OVERHEAD = 700
NOTHING_OVERHEAD = 300
#: Bytes for a digest.
DIGEST_SIZE = 8
#: Bytes of recently pushed states that are kept for each shard that is not live.
MAX_LATELY_BYTES = 256 * 1024
#: Ids remembered as sent by this process, at most. A task whose id is forgotten counts as a
#: stranger's.
MAX_SENT = 100_000
#: The number of single digests that are added before all are sorted.
MAX_LOOSE_DIGESTS = 512


class Unread(Exception):
    """Raised when only a look-up can tell the state of a task."""


class Action(NamedTuple):
    """A change of a binding on the broker."""

    #: True to bind, false to unbind.
    bind: bool
    #: Number of the shard, or :data:`ALL`.
    key: int


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
class _Entry:
    """The knowledge of one task: its current state, or that there is none."""

    shard: int
    state: Optional[StateMessage]
    #: When it became known, or was last pushed.
    at: float
    #: Whether a read may rely on it. A client that waits for the task may use it anyway.
    sure: bool

    @property
    def size(self) -> int:
        if self.state is None:
            return NOTHING_OVERHEAD
        return STATE_OVERHEAD + len(self.state.body)


class _View:
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

    def clear(self) -> None:
        """Drop the recently pushed states."""
        self.lately.clear()
        self.lately_bytes = 0

    def steady(self, now: float) -> bool:
        """Whether a read that began at *now* may rely on the binding."""
        return self.bound_at is not None and now - self.bound_at >= STEADY


class Table:
    """A process's knowledge of tasks and shards. Not thread-safe.

    Parameters:
        topology: which shard keeps which task.
        limit: bytes of memory for this knowledge.
    """

    def __init__(self, topology: Topology, limit: int) -> None:
        self._topology = topology
        self._limit = limit
        #: Number of the present connection, counted from 1; 0 while there is none.
        self.epoch = 0
        self.connections = 0
        self._opened_at = 0.0
        self._views: Dict[int, _View] = {}
        #: The known tasks; the one read or pushed last comes last.
        self._recent: collections.OrderedDict[str, _Entry] = collections.OrderedDict()
        self._recent_bytes = 0
        self._digest_count = 0
        self._sent: BoundedDict[str, None] = BoundedDict(MAX_SENT)
        self._own_read_at: Optional[float] = None
        self._looks: List[Look] = []
        #: Keys that should be bound; keys requested from the broker; bound keys, with the times.
        self._wanted: Set[int] = set()
        self._requested: Set[int] = set()
        self._standing: Dict[int, float] = {}
        #: How many waiting clients follow strangers' tasks in each shard.
        self._watched: Dict[int, int] = {}
        #: Whether :meth:`actions` has something to do.
        self.restless = False
        #: Times of the latest look-ups of strangers' tasks.
        self._reads: Deque[float] = collections.deque(maxlen=MANY_READS)
        #: How many more states may be pushed before the binding of all shards stops paying.
        self._credit = 0
        #: Whether an inbox would be of use.
        self.wants_inbox = False
        #: When the next view may be checked, and the view that was checked last.
        self._check_after = 0.0
        self._checking = -1
        #: A state that a check has found and that was not pushed, for the log.
        self.missed = ""

    # -- queries -------------------------------------------------------------------------------

    @property
    def memory(self) -> int:
        """About how many bytes are used."""
        return self._recent_bytes + DIGEST_SIZE * self._digest_count

    @property
    def live_views(self) -> int:
        """How many shards are known completely."""
        return sum(view.live for view in self._views.values())

    def is_own(self, task_id: str) -> bool:
        """Whether this process has sent the task."""
        return task_id in self._sent

    def is_due(self, task_id: str, now: float) -> bool:
        """Return whether to check the view of the task's shard now; if so, the check has begun."""
        shard = self._topology.shard(task_id)
        view = self._views.get(shard)
        if view is None or not view.live or now < view.check_at:
            return False
        if now < self._check_after and shard != self._checking:
            return False
        self._check_after, self._checking = now + CHECK_PAUSE, shard
        return True

    def recall(
        self, task_id: str, now: float, wall: int, sure: bool = True
    ) -> Optional[StateMessage]:
        """Return the current state of a task, or ``None`` for none yet.

        Parameters:
            task_id: the task.
            now: the time.
            wall: microseconds since 1970.
            sure: whether the caller relies on the answer after a barrier. A waiting client
                receives later states anyway, and asks the store again later.

        Raises:
            Unread: when only the store can tell.
        """
        entry = self._recent.get(task_id)
        shard = self._topology.shard(task_id) if entry is None else entry.shard
        view = self._views.get(shard)
        live = view is not None and view.live
        if entry is None:
            if not live or number_of(task_id) in view.digests:  # type: ignore[union-attr, operator]
                raise Unread
            return None
        if entry.state is not None:
            if entry.state.expired(wall):
                raise Unread
            if not live and is_final(entry.state.state) and now - entry.at > KEEP_FINAL:
                raise Unread
        if sure and not (entry.sure or live):
            raise Unread
        self._recent.move_to_end(task_id)
        return entry.state

    # -- events --------------------------------------------------------------------------------

    def opened(self, now: float) -> None:
        """The inbox has a connection, and is bound to this process's client word."""
        self.connections += 1
        self.epoch = self.connections
        self._opened_at = now

    def lost(self) -> None:
        """The connection is lost: states may be missed until the next one stands."""
        self.epoch = 0
        for view in self._views.values():
            view.lost = view.lost or view.bound_at is not None
            self._end(view)
        for task_id in list(self._recent):
            self._take_out(task_id)
        self._requested.clear()
        self._standing.clear()
        self.missed = ""
        # Only shards with waiting clients are bound again at once.
        self._wanted = set(self._watched)
        self.restless = bool(self._wanted)

    def sent(self, task_id: str, now: float) -> None:
        """This process is about to send a task."""
        again = task_id in self._sent
        self._sent[task_id] = None
        # The store may already hold a state of any other id.
        if self.epoch and not again and task_id not in self._recent and _NEW_ID.fullmatch(task_id):
            self._remember(task_id, None, now, now - self._opened_at >= STEADY)

    def pushed(self, state: StateMessage, now: float, own: bool = False) -> None:
        """The state was pushed, or (*own*) this process has published it."""
        shard = self._topology.shard(state.id)
        view = self._view(shard)
        self._update(view, shard, state, now)
        for look in self._looks:
            if state.id in look.ids or shard in look.census:
                look.pushed.setdefault(state.id, []).append(state)
        if not own and view.bound_at is not None:
            view.unread += 1
            self._credit -= 1
            self._drop_idle(shard, view, now)

    def _update(self, view: _View, shard: int, state: StateMessage, now: float) -> None:
        entry = self._recent.get(state.id)
        if entry is not None:
            if entry.state is None or supersedes(state, entry.state):
                self._remember(state.id, state, now, entry.sure)
        elif view.digests is None:
            view.note(state, now)
        elif number_of(state.id) not in view.digests:
            self._remember(state.id, state, now, True)
        # Otherwise an older state that is only in the store may be the current one.

    def forgotten(self, task_id: str, now: float) -> None:
        """The states of the task were removed."""
        view = self._view(self._topology.shard(task_id))
        for look in self._looks:
            look.forgotten.add(task_id)
            look.pushed.pop(task_id, None)
        if view.live:
            self._remember(task_id, None, now, True)
            return
        self.discard(task_id)
        kept = [each for each in view.lately if each[1].id != task_id]
        view.clear()
        for at, state in kept:
            view.note(state, at)

    def discard(self, task_id: str) -> None:
        """Drop the knowledge of a task, unless its shard is known completely."""
        entry = self._recent.get(task_id)
        if entry is not None and not self._view(entry.shard).live:
            self._take_out(task_id)

    def bound(self, key: int, now: float) -> None:
        """The binding stands."""
        self._requested.discard(key)
        self._standing[key] = now
        if key == ALL:
            self._credit = max(self._credit, PAYS * self._topology.shards // 4)
        for shard in self._views if key == ALL else (key,):
            view = self._view(shard)
            if view.bound_at is None:
                view.bound_at = now
                view.unread = 0
                view.lost = False

    # -- reads ---------------------------------------------------------------------------------

    def asked(self, ids: Iterable[str], now: float) -> None:
        """Count reads of *ids*, and bind the shards that are read often."""
        own = False
        shards: Set[int] = set()
        for task_id in ids:
            if task_id in self._sent:
                own = True
            else:
                shards.add(self._topology.shard(task_id))
        if own and not self.epoch:
            self.wants_inbox |= _is_recent(self._own_read_at, now)
            self._own_read_at = now
        absent = False
        for shard in shards:
            view = self._view(shard)
            again = view.lost or _is_recent(view.read_at, now)
            view.read_at = now
            view.unread = 0
            if view.bound_at is None:
                absent = True
                if again:
                    self._want(shard)
        self._credit = min(self._credit + PAYS * len(shards), PAYS * self._topology.shards)
        if absent:
            self._reads.append(now)
            if len(self._reads) == MANY_READS and now - self._reads[0] <= MANY_READS_SECONDS:
                self._want(ALL)

    def cover(self, ids: Iterable[str]) -> Set[int]:
        """Request bindings for the strangers among *ids*; return the shards not yet bound."""
        shards = {self._topology.shard(task_id) for task_id in ids if task_id not in self._sent}
        missing = {shard for shard in shards if not self.is_bound(shard)}
        for shard in missing:
            self._want(shard)
        return missing

    def is_bound(self, shard: int) -> bool:
        """Whether all states of a shard are pushed."""
        return shard in self._standing or ALL in self._standing

    def watched(self, task_id: str, count: int) -> None:
        """Change the number of clients that wait for a stranger's task."""
        shard = self._topology.shard(task_id)
        self._watched[shard] = self._watched.get(shard, 0) + count
        if self._watched[shard] <= 0:
            del self._watched[shard]

    def uncounted(self, now: float) -> List[int]:
        """Return the shards whose census pays although no read asks for them now.

        When frequent reads have bound all shards, the next read may ask for any of them.
        """
        since = self._standing.get(ALL)
        if since is None or now - since < STEADY:
            return []
        views = ((shard, self._view(shard)) for shard in range(self._topology.shards))
        return [
            shard
            for shard, view in views
            if not view.live and view.steady(now) and now >= view.check_at
        ]

    def begin(self, ids: Collection[str], now: float, shards: Iterable[int] = ()) -> Look:
        """Begin a look-up of *ids*, which ends with :meth:`end`.

        Parameters:
            ids: the tasks.
            now: the time.
            shards: further shards for a census.
        """
        look = Look(set(ids), self.epoch, now, set())
        self._looks.append(look)
        for shard in {*shards, *(self._topology.shard(task_id) for task_id in ids)}:
            view = self._views.get(shard)
            if view is None:
                continue
            if view.steady(now) and now >= view.check_at:
                look.census.add(shard)
            # The state may not lie in the shard yet, for example in a quorum queue.
            for at, state in view.lately:
                if at >= now - SETTLED and (state.id in look.ids or shard in look.census):
                    look.pushed.setdefault(state.id, []).append(state)
        return look

    def end(
        self,
        look: Look,
        found: Mapping[str, List[StateMessage]],
        censuses: Mapping[int, Census],
        now: float,
        wall: int = 0,
    ) -> None:
        """End a look-up.

        Parameters:
            look: what :meth:`begin` returned.
            found: the states that the store holds of each id that could be read.
            censuses: the censuses of the shards that were read.
            now: the time.
            wall: microseconds since 1970.
        """
        if look not in self._looks:
            return
        self._looks.remove(look)
        if not self.epoch or look.epoch != self.epoch:
            return
        for shard, census in censuses.items():
            if shard in look.census and self._view(shard).steady(look.began):
                self._take_census(shard, look, census, now, wall)
        for task_id, states in found.items():
            if task_id not in look.forgotten:
                self._take_found(task_id, look, states, now)

    def _take_found(self, task_id: str, look: Look, states: List[StateMessage], now: float) -> None:
        view = self._view(self._topology.shard(task_id))
        own = task_id in self._sent
        if not own and (view.bound_at is None or look.began < view.bound_at):
            # States since then would not be pushed.
            return
        sure = view.steady(look.began) or (own and look.began - self._opened_at >= STEADY)
        if view.live and not sure:
            # The view has newer knowledge.
            return
        entry = self._recent.get(task_id)
        known = []
        if entry is not None and entry.state is not None and entry.at >= look.began - SETTLED:
            known = [entry.state]
        self._remember(task_id, fold([*states, *look.pushed.get(task_id, ()), *known]), now, sure)

    def _take_census(self, shard: int, look: Look, census: Census, now: float, wall: int) -> None:
        """Make a view live, or replace it by the findings of a check."""
        view = self._view(shard)
        checked = view.digests
        before = {task_id: self._recent[task_id].state for task_id in view.ids}
        current = self._count(shard, look, census)
        self._set_digests(view, Digests(census.digests))
        view.clear()
        for task_id, state in current.items():
            number = number_of(task_id)
            if number in census.digests:
                # More of its states are in a page: only a look-up tells the current one.
                self._take_out(task_id)
                continue
            if (
                checked is not None
                and task_id not in look.pushed
                and state.published < wall - LATE
                and before.get(task_id) != state
                and number not in checked
            ):
                self.missed = f"the {state.state} of {task_id!r:.100}"
            if self.memory + STATE_OVERHEAD + len(state.body) <= self._limit:
                self._remember(task_id, state, now, True)
            else:
                self._take_out(task_id)
                self._add_digest(view, number)
        view.check_pause = FIRST_CHECK if checked is None else min(2 * view.check_pause, LAST_CHECK)
        view.check_at = now + view.check_pause

    def _count(self, shard: int, look: Look, census: Census) -> Dict[str, StateMessage]:
        """Return the current states of a shard that a census has not found in pages."""
        by_id: Dict[str, List[StateMessage]] = {}
        for state in itertools.chain(census.loose, *look.pushed.values()):
            if state.id not in look.forgotten and self._topology.shard(state.id) == shard:
                by_id.setdefault(state.id, []).append(state)
        for task_id in list(self._view(shard).ids):
            entry = self._recent[task_id]
            if entry.state is None:
                # The live view will contain this task.
                self._take_out(task_id)
            elif entry.at >= look.began - SETTLED and task_id not in look.forgotten:
                by_id.setdefault(task_id, []).append(entry.state)
            elif not entry.sure or number_of(task_id) not in census.digests:
                # It has expired, or was deleted.
                self._take_out(task_id)
        return {
            task_id: current
            for task_id, states in by_id.items()
            if (current := fold(states)) is not None
        }

    # -- bindings ------------------------------------------------------------------------------

    def actions(self, now: float) -> List[Action]:
        """Return the bindings to add and to remove, each once."""
        self.restless = False
        found = []
        if ALL in self._standing and now - self._standing[ALL] >= STEADY:
            self._wanted.intersection_update({ALL})
        for key, since in list(self._standing.items()):
            if key not in self._wanted and now - since >= LEAST_BOUND:
                del self._standing[key]
                found.append(Action(False, key))
                for shard in list(self._views) if key == ALL else (key,):
                    if not self.is_bound(shard):
                        self._end(self._view(shard))
        if self.epoch:
            new = sorted(self._wanted - self._standing.keys() - self._requested)
            self._requested.update(new)
            found.extend(Action(True, key) for key in new)
        return found

    def _want(self, key: int) -> None:
        self.wants_inbox = self.restless = True
        if ALL in self._wanted:
            return
        self._wanted.add(key)
        if len(self._wanted) > max(1, self._topology.shards // 4):
            self._wanted.add(ALL)

    def _drop_idle(self, shard: int, view: _View, now: float) -> None:
        """Stop requesting a binding that does not pay for itself."""
        if ALL in self._standing:
            if self._credit >= 0 or self._watched or now - self._standing[ALL] < LEAST_BOUND:
                return
            self._wanted.clear()
            for each in self._views.values():
                each.read_at = None
            self._reads.clear()
        elif view.unread > PAYS and shard not in self._watched and shard in self._standing:
            if now - self._standing[shard] < LEAST_BOUND:
                return
            self._wanted.discard(shard)
            view.read_at = None
        else:
            return
        self.restless = True

    # -- entries and views ---------------------------------------------------------------------

    def _view(self, shard: int) -> _View:
        view = self._views.get(shard)
        if view is None:
            view = self._views[shard] = _View()
            view.bound_at = self._standing.get(ALL, self._standing.get(shard))
        return view

    def _remember(
        self, task_id: str, state: Optional[StateMessage], now: float, sure: bool
    ) -> None:
        old = self._recent.pop(task_id, None)
        shard = self._topology.shard(task_id) if old is None else old.shard
        entry = self._recent[task_id] = _Entry(shard, state, now, sure)
        self._recent_bytes += entry.size - (0 if old is None else old.size)
        self._view(shard).ids.add(task_id)
        while self.memory > self._limit and len(self._recent) > 1:
            self._evict()
        if self.memory > self._limit:
            self._drop_oldest_view(now)

    def _evict(self) -> None:
        """Drop the entry that was neither read nor pushed for longest."""
        task_id, entry = next(iter(self._recent.items()))
        self._take_out(task_id)
        view = self._view(entry.shard)
        if view.live and entry.state is not None:
            self._add_digest(view, number_of(task_id))

    def _take_out(self, task_id: str) -> Optional[_Entry]:
        entry = self._recent.pop(task_id, None)
        if entry is not None:
            self._recent_bytes -= entry.size
            self._view(entry.shard).ids.discard(task_id)
        return entry

    def _add_digest(self, view: _View, number: int) -> None:
        assert view.digests is not None
        self._digest_count -= len(view.digests)
        view.digests.add(number)
        self._digest_count += len(view.digests)

    def _set_digests(self, view: _View, digests: Optional[Digests]) -> None:
        self._digest_count -= len(view.digests or ())
        view.digests = digests
        self._digest_count += len(digests or ())

    def _drop_oldest_view(self, now: float) -> None:
        """Drop the live view that was not read for longest: there are too many digests."""
        live = [view for view in self._views.values() if view.digests]
        if live:
            oldest = min(live, key=lambda view: view.read_at or 0.0)
            self._set_digests(oldest, None)
            oldest.check_at = now + LAST_CHECK

    def _end(self, view: _View) -> None:
        """Note that no binding stands: only states of the process's own tasks are still pushed."""
        for task_id in [task_id for task_id in view.ids if task_id not in self._sent]:
            self._take_out(task_id)
        self._set_digests(view, None)
        view.bound_at = None
        view.clear()
        view.unread = 0
        view.check_at = 0.0


def _is_recent(before: Optional[float], now: float) -> bool:
    return before is not None and now - before <= READ_AGAIN
