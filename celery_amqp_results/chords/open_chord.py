"""What a leader knows of one open chord. Does no I/O."""

from __future__ import annotations

import math
from typing import Dict, Iterable, List, Mapping, Optional, Set

from celery_amqp_results.chords import plan as plans
from celery_amqp_results.chords.actions import Delivery, Fire
from celery_amqp_results.chords.plan import Amendment, Plan
from celery_amqp_results.protocol.message import StateMessage

__all__ = ("OpenChord",)

#: Seconds until the leader looks up a silent chord in the store; doubled each time, up to the most.
FIRST_RECHECK = 15.0
LAST_RECHECK = 300.0


class OpenChord:
    """A chord with a plan that is not acknowledged yet."""

    def __init__(self, plan: Plan, delivery: Delivery, now: float) -> None:
        self.plan = plan
        self.deliveries = [delivery]
        self.amendments: List[Amendment] = []
        self.missing: Set[str] = set()
        self.ends: Dict[str, StateMessage] = {}
        self.bodiless: Set[str] = set()
        #: Marks of amendments that a task has made, which have not been delivered here.
        self.unamended: Set[str] = set()
        #: Tasks of the body to look up in the store before the body may be sent.
        self.unproven: Set[str] = set()
        self.sending = False
        self.failures = 0
        self.pause = FIRST_RECHECK
        self.recheck_at = now + FIRST_RECHECK
        #: The time of its timer.
        self.timer_at = math.inf
        self.heard_at = now
        #: When the latest end was published.
        self.latest = plan.began
        #: Once the chord has expired, the tasks to look up before it is given up.
        self.last_look: Optional[Set[str]] = None

    @property
    def watched(self) -> Set[str]:
        """All tasks of the header."""
        return self.missing | self.ends.keys()

    @property
    def complete(self) -> bool:
        """Whether the body must be sent now."""
        return not (self.missing or self.unamended or self.unproven or self.sending)

    def fire(self) -> Fire:
        """Return the action that sends the body."""
        self.sending = True
        results = plans.amended(self.plan.results, self.amendments)
        # Copies: the leader goes on while a helper sends the body.
        ends, bodiless = dict(self.ends), frozenset(self.bodiless)
        return Fire(self.plan, results, ends, bodiless, self.failures)

    def was_sent(self, bodies: Mapping[str, Iterable[StateMessage]]) -> bool:
        """Return whether the states of *bodies* prove that another leader has sent the body."""
        return not self.sending and any(
            # A body with the id of the task that sends the chord has older states of that task.
            state.published >= self.plan.began
            for proof in self.plan.proofs
            for state in bodies.get(proof, ())
        )

    def seconds_left(self, wall: int) -> float:
        """Return the seconds from *wall* until the chord expires."""
        if self.plan.expires is None:
            return math.inf
        return (self.latest + self.plan.expires * 1000 - wall) / 1e6

    def recheck(self, now: float) -> bool:
        """Plan the next recheck; return whether to read the store now."""
        silent = now - self.heard_at >= self.pause / 2 or self.pause == FIRST_RECHECK
        self.recheck_at = now + self.pause
        self.pause = min(2 * self.pause, LAST_RECHECK)
        return silent
