"""Three nodes with quorum queues, one of which is killed or cut off under load."""

from __future__ import annotations

from typing import Iterator

import pytest

from tests.conftest import LOAD
from tests.faults import faults
from tools import rabbitmq

pytestmark = pytest.mark.skipif(
    not LOAD, reason="takes minutes and a quiet machine: make test-faults"
)


@pytest.fixture(scope="module")
def place(cluster: rabbitmq.Cluster) -> Iterator[faults.Place]:
    """A cluster with a load on it, whose processes know all three nodes."""
    with faults.place(cluster.nodes, queue_type="quorum", shards=4) as place:
        yield place


@pytest.mark.parametrize("name", ["leader of shards killed with -9", "node partitioned away"])
def test_nothing_is_lost_and_clients_fail_over_when(place: faults.Place, name: str) -> None:
    load = place.load
    since = load.now()
    load.until_stored(40)
    # The fault lasts until every client has failed over to the remaining nodes.
    faults.CLUSTER[name].provoke(place)
    load.until_stored(40)
    load.until_flowing()
    verdict = load.verdict(since)
    assert not verdict.violations, f"{verdict.text()}\njournals are in {load.keep()}"
    assert verdict.at_stake
