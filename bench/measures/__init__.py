"""What is measured: a module for each measure.

Each module has a function ``measure(place)`` that yields rows. :data:`ALL` names them in the order
in which they are run.
"""

from __future__ import annotations

from typing import Callable, Dict, Iterator

from bench.figures import Row
from bench.measures import (
    broker,
    chord,
    cold,
    collect,
    connections,
    end_to_end,
    endurance,
    fleet,
    floor,
    large,
    memory,
    poll_floor,
    round_trip,
    shards,
    store,
    storm,
    stranger,
    worker,
)
from bench.place import Place

__all__ = ("ALL", "ON_REQUEST", "THOROUGH")

ALL: Dict[str, Callable[[Place], Iterator[Row]]] = {
    "broker": broker.measure,
    "store": store.measure,
    "collect": collect.measure,
    "roundtrip": round_trip.measure,
    "endtoend": end_to_end.measure,
    "worker": worker.measure,
    "cold": cold.measure,
    "chord": chord.measure,
    "storm": storm.measure,
    "floor": floor.measure,
    "pollfloor": poll_floor.measure,
    "fleet": fleet.measure,
    "connections": connections.measure,
    "shards": shards.measure,
    "lookup": stranger.measure,
    "large": large.measure,
    "memory": memory.measure,
    "endurance": endurance.measure,
}

#: Measures that run only if the command line names them.
ON_REQUEST = ("endurance",)

#: Measures that a quick run leaves out unless the command line names them.
THOROUGH = ("broker", "floor", "pollfloor", "large", "cold", "shards", "connections")
