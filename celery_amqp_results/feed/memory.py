"""The states that a process holds, limited in bytes.

The states that were neither read nor pushed for longest are dropped first; then the views with the
most digests. This module does no I/O and has no clock.
"""

from __future__ import annotations

import collections
import itertools
from typing import Callable, Container, Dict, Optional

from celery_amqp_results.feed import views
from celery_amqp_results.feed.views import Digests, Entry, Look, View
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.page import Census, number_of
from celery_amqp_results.protocol.ranking import by_task, fold

__all__ = ("Memory",)


class Memory:
    """The known tasks, and the views of shards. Not thread-safe.

    Parameters:
        shard: returns the shard of a task.
        limit: bytes of memory.
        bound_since: returns since when the binding of a shard stands, or ``None``.
    """

    def __init__(
        self,
        shard: Callable[[str], int],
        limit: int,
        bound_since: Callable[[int], Optional[float]],
    ) -> None:
        self._shard = shard
        self._limit = limit
        self._bound_since = bound_since
        self.views: Dict[int, View] = {}
        #: The known tasks; the one read or pushed last comes last.
        self.recent: collections.OrderedDict[str, Entry] = collections.OrderedDict()
        self._recent_bytes = 0
        self._digests = 0

    @property
    def size(self) -> int:
        """About how many bytes are used."""
        return self._recent_bytes + views.DIGEST_SIZE * self._digests

    @property
    def live_views(self) -> int:
        """How many shards are known completely."""
        return sum(view.live for view in self.views.values())

    def has_room_for(self, state: StateMessage) -> bool:
        """Return whether *state* fits without dropping another one."""
        return self.size + views.STATE_OVERHEAD + len(state.body) <= self._limit

    def view(self, shard: int) -> View:
        """Return the view of a shard."""
        view = self.views.get(shard)
        if view is None:
            view = self.views[shard] = View()
            view.bound_at = self._bound_since(shard)
        return view

    def remember(self, task_id: str, state: Optional[StateMessage], now: float, sure: bool) -> None:
        """Note the current state of a task; ``None`` if it has none."""
        old = self.recent.pop(task_id, None)
        shard = self._shard(task_id) if old is None else old.shard
        entry = self.recent[task_id] = Entry(shard, state, now, sure)
        self._recent_bytes += entry.size - (0 if old is None else old.size)
        self.view(shard).ids.add(task_id)
        while self.size > self._limit and len(self.recent) > 1:
            self._evict()
        if self.size > self._limit:
            self._drop_oldest_view(now)

    def _evict(self) -> None:
        task_id, entry = next(iter(self.recent.items()))
        self.take_out(task_id)
        view = self.view(entry.shard)
        if view.live and entry.state is not None:
            self.add_digest(view, number_of(task_id))

    def _drop_oldest_view(self, now: float) -> None:
        """Drop the live view that was not read for longest: there are too many digests."""
        live = [view for view in self.views.values() if view.digests]
        if live:
            oldest = min(live, key=lambda view: view.read_at or 0.0)
            self.set_digests(oldest, None)
            oldest.check_at = now + views.LAST_CHECK

    def take_out(self, task_id: str) -> None:
        """Drop the knowledge of a task."""
        entry = self.recent.pop(task_id, None)
        if entry is not None:
            self._recent_bytes -= entry.size
            self.view(entry.shard).ids.discard(task_id)

    def add_digest(self, view: View, number: int) -> None:
        """Note that a live view has a state of an id, which is not held itself."""
        assert view.digests is not None
        self._digests -= len(view.digests)
        view.digests.add(number)
        self._digests += len(view.digests)

    def set_digests(self, view: View, digests: Optional[Digests]) -> None:
        """Make a view live, or end that with ``None``."""
        self._digests -= len(view.digests or ())
        view.digests = digests
        self._digests += len(digests or ())

    def current_states(self, shard: int, look: Look, census: Census) -> Dict[str, StateMessage]:
        """Return the current states of a shard that a census has not found in pages."""
        by_id = by_task(
            state
            for state in itertools.chain(census.loose, *look.pushed.values())
            if state.id not in look.forgotten and self._shard(state.id) == shard
        )
        for task_id in list(self.view(shard).ids):
            entry = self.recent[task_id]
            if entry.state is None:
                # The live view will contain this task.
                self.take_out(task_id)
            elif entry.at >= look.began - views.SETTLED and task_id not in look.forgotten:
                by_id.setdefault(task_id, []).append(entry.state)
            elif not entry.sure or number_of(task_id) not in census.digests:
                # It has expired, or was deleted.
                self.take_out(task_id)
        return {
            task_id: current
            for task_id, states in by_id.items()
            if (current := fold(states)) is not None
        }

    def end(self, view: View, own: Container[str]) -> None:
        """Note that no binding stands, so that only states of *own* tasks are still pushed."""
        for task_id in [task_id for task_id in view.ids if task_id not in own]:
            self.take_out(task_id)
        self.set_digests(view, None)
        view.bound_at = None
        view.clear()
        view.unread = 0
        view.check_at = 0.0
