"""A cluster of three nodes where the node dies that a reader is connected to."""

from __future__ import annotations

import uuid
from typing import Any, Dict

from celery import states

from tests import subprocesses
from tests.conftest import Apps
from tests.faults import fault_jobs
from tools import rabbitmq


def test_no_reader_waits_behind_one_whose_node_was_killed(
    cluster: rabbitmq.Cluster,
) -> None:
    # By default, RabbitMQ 4.3 keeps the consumers of a lost node for a minute.
    options = {"shards": 1, "queue_type": "quorum", "lookup_timeout": 40}
    conf: Dict[str, Any] = {"result_backend_transport_options": options}
    doomed, *others_left = cluster.nodes
    there, here = Apps(doomed.url(), {}), Apps(others_left[0].url(), {})
    here.prefix = there.prefix
    task_id = str(uuid.uuid4())
    app, reader = there(**conf), here(**conf)
    try:
        app.backend.store_result(task_id, "kept", states.SUCCESS)
        # Given a reader that holds the shard, connected to one node
        with subprocesses.start(app, fault_jobs.hold_shard, shard=0) as process:
            assert process.readline() == "holding"
            # When that node is killed
            doomed.kill()
            # Then it blocks no other reader
            assert reader.backend._get_task_meta_for(task_id)["result"] == "kept"
    finally:
        app.backend.close()
        here.close()
