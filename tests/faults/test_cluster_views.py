"""Reads from memory on a cluster of three nodes that are restarted, killed or cut off."""

from __future__ import annotations

import os
import time
import uuid
from typing import Callable, Iterator, List

import pytest
from celery import states

from celery_amqp_results.feed import views
from tests.conftest import Apps, eventually
from tests.faults import faults
from tests.faults.test_linearizable_reads import Load, judge
from tools import rabbitmq

pytestmark = pytest.mark.skipif(
    not os.environ.get("LOAD"), reason="takes minutes and a quiet machine: make test-faults"
)

#: Seconds of a load. The faults begin after the first and end before the last.
SECONDS = 90.0
BEFORE, AFTER = 10.0, 15.0


@pytest.fixture
def apps(cluster: rabbitmq.Cluster) -> Iterator[Callable[..., Apps]]:
    """Make apps that connect to the nodes in a given order."""
    made: List[Apps] = []

    def make(first: int = 0) -> Apps:
        urls = cluster.urls()
        found = Apps(";".join(urls[first:] + urls[:first]), {})
        if made:
            found.prefix = made[0].prefix
        made.append(found)
        return found

    yield make
    for each in made:
        each.close()


OPTIONS = {"shards": 4, "queue_type": "quorum", "lookup_timeout": 40}


@pytest.mark.parametrize("how", ["halt", "kill"])
def test_no_answer_is_too_old_while_the_nodes_are_restarted_one_after_the_other(
    cluster: rabbitmq.Cluster, apps: Callable[..., Apps], how: str
) -> None:
    storing, reading = (apps(n)(result_backend_transport_options=OPTIONS) for n in range(2))
    with Load(storing, reading, SECONDS) as load:
        time.sleep(BEFORE)
        for node in cluster.nodes:
            if time.monotonic() < load.end - AFTER:
                getattr(node, how)()
                node.start()
        judge(load, seen_counts=False)


def test_a_reader_on_a_node_that_is_cut_off_answers_right_once_its_view_is_checked(
    cluster: rabbitmq.Cluster, apps: Callable[..., Apps], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "FIRST_CHECK", 2.0)
    writer, reader = (apps(n)(result_backend_transport_options=OPTIONS) for n in range(2))
    task_id = str(uuid.uuid4())
    writer.backend.store_result(task_id, 1, states.STARTED)

    def remembered() -> bool:
        before = reader.backend.metrics().remembered
        reader.AsyncResult(task_id).state  # noqa: B018
        return bool(reader.backend.metrics().remembered > before)

    eventually(remembered)
    with faults.partitioned(cluster.nodes, cluster.nodes[1]):
        writer.backend.store_result(task_id, 1, states.SUCCESS)
        eventually(lambda: reader.AsyncResult(task_id).state == states.SUCCESS, timeout=90.0)
