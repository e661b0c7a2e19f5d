"""Faults of a broker under load; see :mod:`tests.faults.recorder`.

``make soak`` provokes these and more at random.
"""

from __future__ import annotations

import os
from typing import Iterator

import pytest

from tests.conftest import LOAD
from tests.faults import faults
from tools import rabbitmq

pytestmark = pytest.mark.skipif(
    not LOAD, reason="takes minutes and a quiet machine: make test-faults"
)

#: The faults provoked here, by name. Slow ones, and those that rarely hit, are left to the soak.
NAMES = [
    "RabbitMQ killed with -9",
    "connections reset",
    "exchange deleted",
    "inboxes deleted",
    "storing process killed with -9",
    "children of a worker killed with -9",
]


@pytest.fixture(scope="module")
def place(_session_node: rabbitmq.Node) -> Iterator[faults.Place]:
    """A load of processes that store, wait, join, poll, look up, and send tasks and chords."""
    if _session_node is None:
        pytest.skip("the broker of AMQP_URL is not ours to control")
    with faults.place(
        [_session_node], timeout=30, workers=["prefork"], seed=int.from_bytes(os.urandom(4), "big")
    ) as place:
        yield place


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_lost_or_wrong_during(place: faults.Place, name: str) -> None:
    fault = faults.SINGLE[name]
    load = place.load
    # Given results that are stored, waited for, joined, polled and looked up
    since = load.now()
    load.until_stored(40)
    # When the fault occurs and is over
    fault.provoke(place)
    load.until_stored(40)
    load.until_flowing()
    # Then every process sees the right states, in time, and once
    verdict = load.verdict(since)
    assert not verdict.violations, f"{verdict.text()}\njournals are in {load.keep()}"
    assert verdict.at_stake
