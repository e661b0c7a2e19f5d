"""What a leader asks its shell to do."""

from __future__ import annotations

import dataclasses
from typing import FrozenSet, List, Mapping, Tuple, Union

from celery_amqp_results.chords.plan import Nested, Plan
from celery_amqp_results.protocol.message import StateMessage

__all__ = ("Acknowledge", "Action", "Bind", "Delivery", "Fire", "GiveUp", "LookUp")

#: The shell's number for a delivery of the broker.
Delivery = int


@dataclasses.dataclass(frozen=True)
class Bind:
    """Bind the states of the chords in plan queue *number*."""

    number: int


@dataclasses.dataclass(frozen=True)
class LookUp:
    """Read *tasks* (states and parts) and *bodies* (states) in the store."""

    tasks: FrozenSet[str]
    bodies: FrozenSet[str]


@dataclasses.dataclass(frozen=True)
class Fire:
    """Send the body of a chord, or fail it if a task of its header has failed."""

    plan: Plan
    #: The ids of the header's tasks in order and nesting, including amendments.
    results: List[Nested] = dataclasses.field(compare=False)
    ends: Mapping[str, StateMessage] = dataclasses.field(compare=False)
    #: Tasks with known ends whose bodies did not fit the memory.
    bodiless: FrozenSet[str] = frozenset()
    #: How many times firing has failed.
    failures: int = 0


@dataclasses.dataclass(frozen=True)
class Acknowledge:
    """Acknowledge *deliveries*, since the chord is over."""

    deliveries: Tuple[Delivery, ...]


@dataclasses.dataclass(frozen=True)
class GiveUp:
    """Report that a chord has expired, or that tasks were added to a finished chord."""

    group_id: str
    why: str


Action = Union[Bind, LookUp, Fire, Acknowledge, GiveUp]
