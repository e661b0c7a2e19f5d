"""A process's knowledge of tasks and shards: the table behind every read.

The shell reports events and queries the table. The table does no I/O, has no thread and no clock:
the shell passes the time with each event. See :mod:`celery_amqp_results.feed.inbox`.

**Shards.** The table has a view of each shard in which tasks of other processes are read or
waited for:

========  =====================================  ================================================
state     meaning                                how a read of such a task is answered
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

**Tasks.** The table's knowledge of a task is either complete, or dropped. It is complete

- in a live view, by the view itself;
- when this process has sent it while the client's binding stood;
- when it was looked up while a binding stood that brings its states.

Each look-up is a *look*: an object that collects the states pushed for its tasks while the store is
read, so that no state is missed between the two.
"""

from __future__ import annotations

import re
from typing import Collection, Iterable, List, Mapping, Optional, Set

from celery_amqp_results.feed import views
from celery_amqp_results.feed.bindings import ALL, Action, Bindings
from celery_amqp_results.feed.memory import Memory
from celery_amqp_results.feed.views import Digests, Look, View
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.names import Topology
from celery_amqp_results.protocol.page import Census, number_of
from celery_amqp_results.protocol.ranking import fold, is_final, supersedes
from celery_amqp_results.toolkit.bounded import BoundedDict

__all__ = ("Table", "Unread")

#: A second read of a shard within this time binds it, in seconds.
READ_AGAIN = 60.0
#: Seconds between two checks, of whichever views. A check costs as much as ten barriers, and one
#: that finds a state that was not pushed ends all views.
CHECK_PAUSE = 5.0
#: Seconds after a barrier in which a SUCCESS is answered without another one. This is how long
#: other processes may still return what was forgotten.
PROOF_SECONDS = 1.0
#: How long a final state outside a live view is known, in seconds.
KEEP_FINAL = 15.0

#: A state that is older than this and was not pushed will not be pushed, in microseconds.
LATE = 5_000_000

#: An id as Celery makes them. Other ids come from the application, which may have reused them.
_NEW_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")

#: Ids remembered as sent by this process, at most. A task whose id is forgotten counts as
#: another process's.
MAX_SENT = 100_000


class Unread(Exception):
    """Raised when only a look-up can tell the state of a task."""


class Table:
    """A process's knowledge of tasks and shards. Not thread-safe.

    Parameters:
        limit: bytes of memory for this knowledge.
    """

    def __init__(self, topology: Topology, limit: int) -> None:
        self._topology = topology
        #: Number of the present connection, counted from 1; 0 while there is none.
        self.epoch = 0
        self.connections = 0
        self._opened_at = 0.0
        #: Everything that was confirmed before this time has come.
        self._proved_at = -PROOF_SECONDS
        self._sent: BoundedDict[str, None] = BoundedDict(MAX_SENT)
        self._own_read_at: Optional[float] = None
        self._looks: List[Look] = []
        self.bindings = Bindings(topology.shards)
        self.memory = Memory(topology.shard, limit, self.bindings.since)
        #: When the next view may be checked, and the view that was checked last.
        self._check_after = 0.0
        self._checking = -1
        #: A state that a check has found and that was not pushed, for the log.
        self.missed = ""

    # -- queries -------------------------------------------------------------------------------

    def is_own(self, task_id: str) -> bool:
        """Whether this process has sent the task."""
        return task_id in self._sent

    def is_proved(self, now: float) -> bool:
        """Whether a SUCCESS may be answered without a barrier."""
        return bool(self.epoch) and now - self._proved_at < PROOF_SECONDS

    def is_due(self, task_id: str, now: float) -> bool:
        """Return whether to check the view of the task's shard now; if so, the check has begun."""
        shard = self._topology.shard(task_id)
        view = self.memory.views.get(shard)
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
            wall: microseconds since 1970.
            sure: whether the caller relies on the answer after a barrier. A waiting client
                receives later states anyway, and asks the store again later.

        Raises:
            Unread: when only the store can tell.
        """
        entry = self.memory.recent.get(task_id)
        shard = self._topology.shard(task_id) if entry is None else entry.shard
        view = self.memory.views.get(shard)
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
        self.memory.recent.move_to_end(task_id)
        return entry.state

    # -- events --------------------------------------------------------------------------------

    def opened(self, now: float) -> None:
        """The inbox has a connection, and is bound to this process's client word."""
        self.connections += 1
        self.epoch = self.connections
        self._opened_at = now

    def proved(self, at: float) -> None:
        """A barrier published at a time has come back."""
        self._proved_at = max(self._proved_at, at)

    def lost(self) -> None:
        """The connection is lost: states may be missed until the next one stands."""
        self.epoch = 0
        self._proved_at = -PROOF_SECONDS
        for view in self.memory.views.values():
            view.lost = view.lost or view.bound_at is not None
            self.memory.end(view, self._sent)
        for task_id in list(self.memory.recent):
            self.memory.take_out(task_id)
        self.bindings.lost()
        self.missed = ""

    def sent(self, task_id: str, now: float) -> None:
        """This process is about to send a task."""
        again = task_id in self._sent
        self._sent[task_id] = None
        # The store may already hold a state of any other id.
        new = not again and task_id not in self.memory.recent and _NEW_ID.fullmatch(task_id)
        if self.epoch and new:
            self.memory.remember(task_id, None, now, now - self._opened_at >= views.STEADY)

    def pushed(self, state: StateMessage, now: float, own: bool = False) -> None:
        """The state was pushed, or (*own*) this process has published it."""
        shard = self._topology.shard(state.id)
        view = self.memory.view(shard)
        self._update(view, state, now)
        for look in self._looks:
            if state.id in look.ids or shard in look.census:
                look.pushed.setdefault(state.id, []).append(state)
        if not own and view.bound_at is not None:
            view.unread += 1
            dropped = self.bindings.pushed(shard, view.unread, now)
            if dropped is not None:
                for each in self.memory.views.values() if dropped == ALL else (view,):
                    each.read_at = None

    def _update(self, view: View, state: StateMessage, now: float) -> None:
        entry = self.memory.recent.get(state.id)
        if entry is not None:
            if entry.state is None or supersedes(state, entry.state):
                self.memory.remember(state.id, state, now, entry.sure)
        elif view.digests is None:
            # Only a look-up that began on this connection can use it.
            if self.epoch:
                view.note(state, now)
        elif number_of(state.id) not in view.digests:
            self.memory.remember(state.id, state, now, True)
        # Otherwise an older state that is only in the store may be the current one.

    def forgotten(self, task_id: str, now: float) -> None:
        """The states of the task were removed."""
        view = self.memory.view(self._topology.shard(task_id))
        for look in self._looks:
            look.forgotten.add(task_id)
        if view.live:
            self.memory.remember(task_id, None, now, True)
            return
        self.discard(task_id)
        kept = [each for each in view.lately if each[1].id != task_id]
        view.clear()
        for at, state in kept:
            view.note(state, at)

    def discard(self, task_id: str) -> None:
        """Drop the knowledge of a task, unless its shard is known completely."""
        entry = self.memory.recent.get(task_id)
        if entry is not None and not self.memory.view(entry.shard).live:
            self.memory.take_out(task_id)

    def bound(self, key: int, now: float) -> None:
        """The binding stands."""
        self.bindings.bound(key, now)
        for shard in self.memory.views if key == ALL else (key,):
            view = self.memory.view(shard)
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
            self.bindings.wants_inbox |= _is_recent(self._own_read_at, now)
            self._own_read_at = now
        absent = False
        for shard in shards:
            view = self.memory.view(shard)
            again = view.lost or _is_recent(view.read_at, now)
            view.read_at = now
            view.unread = 0
            if view.bound_at is None:
                absent = True
                if again:
                    self.bindings.want(shard)
        self.bindings.read(len(shards), absent, now)

    def cover(self, ids: Iterable[str]) -> Set[int]:
        """Request bindings for tasks of other processes; return the shards not yet bound."""
        shards = {self._topology.shard(task_id) for task_id in ids if task_id not in self._sent}
        missing = {shard for shard in shards if shard not in self.bindings}
        for shard in missing:
            self.bindings.want(shard)
        return missing

    def uncounted(self, now: float) -> List[int]:
        """Return the shards whose census pays although no read asks for them now.

        When frequent reads have bound all shards, the next read may ask for any of them.
        """
        since = self.bindings.since(ALL)
        if since is None or now - since < views.STEADY:
            return []
        every = ((shard, self.memory.view(shard)) for shard in range(self._topology.shards))
        return [
            shard
            for shard, view in every
            if not view.live and view.steady(now) and now >= view.check_at
        ]

    def begin(self, ids: Collection[str], now: float, shards: Iterable[int] = ()) -> Look:
        """Begin a look-up of *ids*, which ends with :meth:`end`.

        Parameters:
            shards: further shards for a census.
        """
        look = Look(set(ids), self.epoch, now, set())
        self._looks.append(look)
        for shard in {*shards, *(self._topology.shard(task_id) for task_id in ids)}:
            view = self.memory.views.get(shard)
            if view is None:
                continue
            if view.steady(now) and now >= view.check_at:
                look.census.add(shard)
            # The state may not lie in the shard yet, for example in a quorum queue.
            for at, state in view.lately:
                if at >= now - views.SETTLED and (state.id in look.ids or shard in look.census):
                    look.pushed.setdefault(state.id, []).append(state)
        return look

    def checks(self, look: Look) -> bool:
        """Return whether *look* compares a live view with the store."""
        return look.epoch == self.epoch and any(
            self.memory.view(shard).live for shard in look.census
        )

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
            found: the states that the store holds of each id that could be read.
            censuses: the censuses of the shards that were read.
            wall: microseconds since 1970.
        """
        if look not in self._looks:
            return
        self._looks.remove(look)
        if not self.epoch or look.epoch != self.epoch:
            return
        for shard, census in censuses.items():
            if shard in look.census and self.memory.view(shard).steady(look.began):
                self._take_census(shard, look, census, now, wall)
        for task_id, states in found.items():
            if task_id not in look.forgotten:
                self._take_found(task_id, look, states, now)

    def _take_found(self, task_id: str, look: Look, states: List[StateMessage], now: float) -> None:
        view = self.memory.view(self._topology.shard(task_id))
        own = task_id in self._sent
        if not own and (view.bound_at is None or look.began < view.bound_at):
            # States since then would not be pushed.
            return
        sure = view.steady(look.began) or (own and look.began - self._opened_at >= views.STEADY)
        if view.live and not sure:
            # The view has newer knowledge.
            return
        entry = self.memory.recent.get(task_id)
        known = []
        if entry is not None and entry.state is not None and entry.at >= look.began - views.SETTLED:
            known = [entry.state]
        current = fold([*states, *look.pushed.get(task_id, ()), *known])
        self.memory.remember(task_id, current, now, sure)

    def _take_census(self, shard: int, look: Look, census: Census, now: float, wall: int) -> None:
        """Make a view live, or replace it by the findings of a check."""
        view = self.memory.view(shard)
        checked = view.digests
        before = {task_id: self.memory.recent[task_id].state for task_id in view.ids}
        current = self.memory.current_states(shard, look, census)
        self.memory.set_digests(view, Digests(census.digests))
        view.clear()
        for task_id, state in current.items():
            number = number_of(task_id)
            if number in census.digests:
                # More of its states are in a page: only a look-up tells the current one.
                self.memory.take_out(task_id)
                continue
            if (
                checked is not None
                and task_id not in look.pushed
                and state.published < wall - LATE
                and before.get(task_id) != state
                and number not in checked
            ):
                self.missed = f"the {state.state} of {task_id!r:.100}"
            if self.memory.has_room_for(state):
                self.memory.remember(task_id, state, now, True)
            else:
                self.memory.take_out(task_id)
                self.memory.add_digest(view, number)
        view.checked(now, again=checked is not None)

    # -- bindings ------------------------------------------------------------------------------

    def actions(self, now: float) -> List[Action]:
        """Return the bindings to add and to remove, each once."""
        found = self.bindings.actions(now, bool(self.epoch))
        for bind, key in found:
            if not bind:
                for shard in list(self.memory.views) if key == ALL else (key,):
                    if shard not in self.bindings:
                        self.memory.end(self.memory.view(shard), self._sent)
        return found


def _is_recent(before: Optional[float], now: float) -> bool:
    return before is not None and now - before <= READ_AGAIN
