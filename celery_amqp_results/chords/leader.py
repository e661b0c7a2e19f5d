"""The leader: decides when a chord is complete, and which actions follow.

:class:`Leader` receives *events* (its methods) and returns *actions* (:meth:`Leader.take`). It does
no I/O, has no clock and no threads; :mod:`~celery_amqp_results.chords.service` is the shell around
it.

For each open chord the leader knows which tasks of the header have ended. It learns of most ends by
pushed states. It reads the store where it may have missed an end: for a redelivered plan, for a
plan that began before the binding was effective, and for a silent chord. It acknowledges a plan
only after sending its body: until then the broker delivers it to another leader if this one dies.
"""

from __future__ import annotations

import collections
import heapq
import itertools
import math
from typing import Collection, Deque, Dict, FrozenSet, Iterable, List, Mapping, Optional, Tuple

from celery_amqp_results.chords import plan as plans
from celery_amqp_results.chords.actions import Acknowledge, Action, Bind, Delivery, GiveUp, LookUp
from celery_amqp_results.chords.open_chord import OpenChord
from celery_amqp_results.chords.pending import SKEW, Ends, LookUps, Marks, pause
from celery_amqp_results.chords.plan import Amendment, Plan
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.names import plan_number
from celery_amqp_results.protocol.ranking import is_final, supersedes
from celery_amqp_results.toolkit.bounded import BoundedDict

__all__ = ("Leader",)

#: A binding may take effect on another node of a cluster shortly after the broker has confirmed it.
#: Plans of the first seconds are looked up once more after this time.
SETTLE_SECONDS = 1.0

#: Seconds after which an amendment to a finished chord is given up.
LAST_AMENDMENT = 60.0

#: The most chords that are remembered as fired.
MAX_FIRED = 100_000


class Leader:
    """Follows the chords of the plan queues that this process leads.

    Parameters:
        memory: bytes of results to keep; others are read again when they are needed.

    Not thread-safe. Times are those of ``time.monotonic`` (*now*) and microseconds since 1970
    (*wall*).
    """

    def __init__(self, memory: int) -> None:
        self._actions: Deque[Action] = collections.deque()
        self._chords: Dict[str, OpenChord] = {}
        #: Marks of the chords with the task in their header or body, by task id.
        self._waiting = Marks()
        self._proving = Marks()
        #: Marks of the open chords by header; several if the chord was sent again.
        self._of_group: Dict[str, List[str]] = {}
        #: Marks of plans and amendments that are over.
        self._fired: BoundedDict[str, None] = BoundedDict(MAX_FIRED)
        self._fired_groups: BoundedDict[str, None] = BoundedDict(MAX_FIRED)
        self._orphans: Dict[str, List[Tuple[Amendment, Delivery]]] = {}
        self._ends = Ends(memory)
        self._look_ups = LookUps()
        #: By plan queue, since when all ends have been pushed; ``None`` until it is bound.
        self._sure: Dict[int, Optional[int]] = {}
        self._timers: List[Tuple[float, int, str]] = []
        self._order = itertools.count()

    # -- queries of the shell ----------------------------------------------------------------------

    def take(self) -> List[Action]:
        """Return the pending actions in order, each once."""
        actions = list(self._actions)
        self._actions.clear()
        return actions

    def next_event(self) -> float:
        """Return when :meth:`tick` is due."""
        timer = self._timers[0][0] if self._timers else math.inf
        return min(timer, self._look_ups.due_at)

    @property
    def open(self) -> int:
        """How many chords are open."""
        return len(self._chords)

    @property
    def holds(self) -> bool:
        """Whether any message is held that is not acknowledged."""
        return bool(self._chords or self._orphans)

    @property
    def oldest(self) -> Optional[int]:
        """When the oldest open chord began, in microseconds since 1970."""
        return min((chord.plan.began for chord in self._chords.values()), default=None)

    @property
    def leads(self) -> FrozenSet[int]:
        """Numbers of the plan queues that this process leads."""
        return frozenset(self._sure)

    def progress(self, key: str) -> Optional[Tuple[int, List[str]]]:
        """Return how many tasks a chord's header has, and which have not ended.

        *key* is the id of the header or of the body. Returns ``None`` for a chord not open here.
        """
        for chord in self._chords.values():
            if chord.plan.group_id == key or key in chord.plan.proofs:
                return len(chord.watched), sorted(chord.missing)
        return None

    # -- events ------------------------------------------------------------------------------------

    def plan_delivered(self, plan: Plan, delivery: Delivery, redelivered: bool, now: float) -> None:
        """Take in a delivered plan."""
        number = plan_number(plan.group_id)
        self._lead(number)
        if plan.mark in self._chords:
            # Redelivered after a lost channel, or published twice by the sender.
            self._chords[plan.mark].deliveries.append(delivery)
            return
        if plan.mark in self._fired:
            self._actions.append(Acknowledge((delivery,)))
            return
        chord = self._chords[plan.mark] = OpenChord(plan, delivery, now)
        self._of_group.setdefault(plan.group_id, []).append(plan.mark)
        self._watch(chord, plans.leaves(plan.results))
        for amendment, other in self._orphans.pop(plan.group_id, ()):
            self._amend(chord, amendment, other)
        sure = self._sure.get(number)
        if sure is None:
            # The store is read when the binding stands.
            self._doubt(chord, redelivered)
        elif redelivered or plan.began < max(sure, self._ends.forgotten):
            self._doubt(chord, redelivered)
            self._ask(chord)
        self._set_chord_timer(chord, now, plan.began)
        self._fire_if_complete(chord)

    def amendment_delivered(self, amendment: Amendment, delivery: Delivery, now: float) -> None:
        """Take in a delivered amendment."""
        self._lead(plan_number(amendment.group_id))
        marks = self._of_group.get(amendment.group_id)
        if marks:
            self._amend(self._chords[marks[-1]], amendment, delivery)
            for mark in marks:
                chord = self._chords[mark]
                chord.unamended.discard(amendment.mark)
                self._fire_if_complete(chord)
        elif amendment.mark in self._fired:
            self._actions.append(Acknowledge((delivery,)))
        else:
            self._orphans.setdefault(amendment.group_id, []).append((amendment, delivery))
            patience = None if amendment.expires is None else amendment.expires / 1000
            if amendment.group_id in self._fired_groups:
                # The chord is over, unless it was sent again and its plan comes later.
                patience = min(patience or LAST_AMENDMENT, LAST_AMENDMENT)
            if patience is not None:
                # The id of a header is different from every mark of a chord.
                self._set_timer(now + patience, amendment.group_id)

    def state_pushed(self, state: StateMessage, now: float, wall: int) -> None:
        """Take in a pushed state."""
        if not is_final(state.state):
            return
        marks = self._waiting.of((state.id,))
        if marks:
            for mark in marks:
                self._end(self._chords[mark], state, now)
            return
        self._ends.add(state, wall)

    def bound(self, number: int, now: float, wall: int) -> None:
        """Note that the binding of a plan queue stands."""
        if number not in self._sure:
            return
        self._sure[number] = wall + SKEW
        for chord in self._chords.values():
            if plan_number(chord.plan.group_id) == number or chord.amendments:
                chord.recheck_at = min(chord.recheck_at, now + SETTLE_SECONDS)
                self._set_chord_timer(chord, now, wall)
                self._ask(chord)

    def looked_up(
        self,
        request: LookUp,
        found: Mapping[str, StateMessage],
        bodies: Mapping[str, Iterable[StateMessage]],
        now: float,
    ) -> None:
        """Take in the ends of tasks, and the states of tasks of bodies, that the store has."""
        if not self._look_ups.answered(request, now):
            return
        for mark in self._waiting.of(found):
            chord = self._chords[mark]
            for task_id in sorted(chord.missing & found.keys()):
                state = found[task_id]
                if not chord.plan.again or state.published >= chord.plan.began:
                    self._end(chord, state, now)
        for mark in self._waiting.of(request.tasks):
            chord = self._chords[mark]
            if chord.last_look is not None:
                chord.last_look -= request.tasks
                self._push_timer(chord, now)
        for mark in self._proving.of(request.bodies):
            chord = self._chords[mark]
            chord.unproven -= request.bodies
            if chord.was_sent(bodies):
                self._remember_fired(chord.plan)
                self._close(chord)
            else:
                self._fire_if_complete(chord)

    def look_up_failed(self, request: LookUp, now: float) -> None:
        """Note that the store could not be read."""
        waiting, proving = self._waiting.tasks, self._proving.tasks
        self._look_ups.failed(request, waiting, proving, now)

    def sent(self, mark: str) -> None:
        """Note that the body of a chord was sent, or its error reported."""
        chord = self._chords.get(mark)
        if chord is not None:
            self._close(chord)

    def not_sent(self, mark: str, now: float) -> None:
        """Note that nothing could be sent; schedule another try."""
        # A redelivered plan must not count as fired.
        self._fired.pop(mark, None)
        chord = self._chords.get(mark)
        if chord is None:
            return
        chord.sending = False
        if not chord.deliveries:
            self._close(chord)
            return
        chord.recheck_at = now + pause(chord.failures)
        chord.failures += 1
        self._push_timer(chord, chord.recheck_at)

    def requeued(self) -> None:
        """Note that the broker has requeued all messages, and will deliver them here again."""
        for chord in self._chords.values():
            chord.deliveries.clear()
        self._orphans.clear()
        # The broker closes a channel that acknowledges a delivery it has requeued.
        others = [action for action in self._actions if not isinstance(action, Acknowledge)]
        self._actions = collections.deque(others)

    def connection_lost(self, sending: Collection[str]) -> None:
        """Forget everything that the broker redelivers, or that may have changed meanwhile.

        The chords whose marks are in *sending* are kept. The sending of any other has not begun,
        even if it was decided.
        """
        kept = {mark: chord for mark, chord in self._chords.items() if mark in sending}
        for mark, chord in self._chords.items():
            if chord.sending and mark not in kept:
                self._fired.pop(mark, None)
        self._chords.clear()
        self._waiting.clear()
        self._proving.clear()
        self._of_group.clear()
        self._orphans.clear()
        self._ends.clear()
        self._sure.clear()
        self._look_ups.clear()
        self._timers.clear()
        self._actions.clear()
        for mark, chord in kept.items():
            chord.deliveries.clear()
            chord.timer_at = math.inf
            self._chords[mark] = chord
            self._of_group.setdefault(chord.plan.group_id, []).append(mark)
            self._ends.bytes += sum(len(state.body) for state in chord.ends.values())

    def tick(self, now: float, wall: int) -> None:
        """Handle due timers."""
        while self._timers and self._timers[0][0] <= now:
            _, _, key = heapq.heappop(self._timers)
            chord = self._chords.get(key)
            if chord is not None:
                chord.timer_at = math.inf
                self._look_after(chord, now, wall)
            elif key in self._orphans:
                for amendment, delivery in self._orphans.pop(key):
                    why = "a task was added to it when it was over"
                    self._actions.append(GiveUp(amendment.group_id, why))
                    self._actions.append(Acknowledge((delivery,)))
        if now >= self._look_ups.due_at:
            self._actions.append(self._look_ups.begin())

    # -- deciding ----------------------------------------------------------------------------------

    def _lead(self, number: int) -> None:
        if number not in self._sure:
            self._sure[number] = None
            self._actions.append(Bind(number))

    def _watch(self, chord: OpenChord, ids: Iterable[str]) -> None:
        for task_id in ids:
            if task_id in chord.ends or task_id in chord.missing:
                continue
            early = self._ends.take(task_id)
            if early is not None:
                self._set_end(chord, early)
            else:
                chord.missing.add(task_id)
                self._waiting.add(task_id, chord.plan.mark)

    def _amend(self, chord: OpenChord, amendment: Amendment, delivery: Delivery) -> None:
        chord.deliveries.append(delivery)
        if any(amendment.mark == known.mark for known in chord.amendments):
            return
        chord.amendments.append(amendment)
        chord.unamended.discard(amendment.mark)
        ids = list(plans.leaves(amendment.results))
        self._watch(chord, ids)
        number = plan_number(amendment.subgroup or amendment.group_id)
        if number not in self._sure:
            self._lead(number)
        elif amendment.subgroup is None and amendment.began >= max(
            self._sure[number] or 0, self._ends.forgotten
        ):
            return
        # The tasks may have ended before the binding stood.
        self._look_ups.want(chord.missing.intersection(ids))

    def _end(self, chord: OpenChord, state: StateMessage, now: float) -> None:
        chord.heard_at = now
        self._set_end(chord, state)
        self._fire_if_complete(chord)

    def _set_end(self, chord: OpenChord, state: StateMessage) -> None:
        chord.missing.discard(state.id)
        known = chord.ends.get(state.id)
        if known is not None:
            if not supersedes(state, known):
                return
            self._ends.release((known,))
        kept, bodiless = self._ends.keep(state)
        chord.ends[state.id] = kept
        (chord.bodiless.add if bodiless else chord.bodiless.discard)(state.id)
        chord.latest = max(chord.latest, state.published)
        if state.amended is not None and not self._is_amended(chord.plan.group_id, state.amended):
            # On a cluster a state may overtake the amendment, which is in another queue.
            chord.unamended.add(state.amended)
        # A SUCCESS supersedes a FAILURE as long as the chord is open.
        self._waiting.add(state.id, chord.plan.mark)

    def _is_amended(self, group_id: str, mark: str) -> bool:
        return any(
            amendment.mark == mark
            for sending in self._of_group[group_id]
            for amendment in self._chords[sending].amendments
        )

    def _doubt(self, chord: OpenChord, redelivered: bool) -> None:
        """Look up, before sending the body, whether another process has sent it."""
        if chord.plan.again and not redelivered:
            # The body of an earlier sending may still be running.
            return
        chord.unproven.update(chord.plan.proofs)
        for proof in chord.plan.proofs:
            self._proving.add(proof, chord.plan.mark)

    def _ask(self, chord: OpenChord) -> None:
        """Look up the unknown tasks of a chord."""
        self._look_ups.want(chord.missing, chord.unproven)

    def _fire_if_complete(self, chord: OpenChord) -> None:
        if chord.complete:
            self._remember_fired(chord.plan)
            self._actions.append(chord.fire())

    def _remember_fired(self, plan: Plan) -> None:
        self._fired[plan.mark] = None
        self._fired_groups[plan.group_id] = None

    def _close(self, chord: OpenChord) -> None:
        """Forget a chord that is over, and acknowledge its messages."""
        mark, group_id = chord.plan.mark, chord.plan.group_id
        del self._chords[mark]
        for amendment in chord.amendments:
            # It may be delivered again after the plan.
            self._fired[amendment.mark] = None
        marks = self._of_group[group_id]
        marks.remove(mark)
        if not marks:
            del self._of_group[group_id]
        self._look_ups.drop(
            self._waiting.leave(mark, chord.watched),
            self._proving.leave(mark, chord.plan.proofs),
        )
        self._ends.release(chord.ends.values())
        if chord.deliveries:
            self._actions.append(Acknowledge(tuple(chord.deliveries)))

    def _look_after(self, chord: OpenChord, now: float, wall: int) -> None:
        if chord.sending:
            return
        if self._is_abandoned(chord, wall):
            missing = f"{len(chord.missing)} of {len(chord.watched)} tasks have not ended"
            self._actions.append(GiveUp(chord.plan.group_id, missing))
            self._close(chord)
            return
        if now >= chord.recheck_at:
            if chord.complete:
                chord.recheck_at = math.inf
                self._fire_if_complete(chord)
            elif chord.recheck(now):
                if chord.unamended:
                    # Perhaps the plan was published twice, and the chord is over.
                    self._doubt(chord, True)
                self._ask(chord)
        self._set_chord_timer(chord, now, wall)

    def _is_abandoned(self, chord: OpenChord, wall: int) -> bool:
        """Return whether a chord has expired and the store, too, has no later end for it."""
        if chord.complete or chord.seconds_left(wall) > 0:
            chord.last_look = None
            return False
        if chord.last_look is None:
            chord.last_look = set(chord.missing)
            self._ask(chord)
        return not (chord.unproven or chord.last_look & chord.missing)

    def _set_chord_timer(self, chord: OpenChord, now: float, wall: int) -> None:
        left = chord.seconds_left(wall)
        # An expired chord waits for the answer of the last look-up, or to be sent.
        self._push_timer(chord, min(chord.recheck_at, now + left if left > 0 else math.inf))

    def _push_timer(self, chord: OpenChord, at: float) -> None:
        if at < chord.timer_at:
            chord.timer_at = at
            self._set_timer(at, chord.plan.mark)

    def _set_timer(self, at: float, key: str) -> None:
        heapq.heappush(self._timers, (at, next(self._order), key))
