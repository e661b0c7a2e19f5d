"""A cluster of three nodes, of which the one dies that a reader is connected to."""

from __future__ import annotations

import uuid

from celery import states

from tests import subprocesses
from tests.conftest import Apps
from tests.faults import fault_jobs
from tools import rabbitmq


def test_nobody_waits_in_line_behind_a_reader_whose_node_is_killed(
    cluster: rabbitmq.Cluster,
) -> None:
    # RabbitMQ 4.3 waits a minute for what was connected to a node that is gone, if it is let.
    options = {"shards": 1, "queue_type": "quorum", "lookup_timeout": 40}
    conf = {"result_backend_transport_options": options}
    doomed, *others_left = cluster.nodes
    there, here = Apps(doomed.url(), {}), Apps(others_left[0].url(), {})
    here.prefix = there.prefix
    task_id = str(uuid.uuid4())
    app, reader = there(**conf), here(**conf)
    try:
        app.backend.store_result(task_id, "kept", states.SUCCESS)
        # Given a reader that has the shard, through one node
        with subprocesses.start(app, fault_jobs.hold_shard, shard=0) as process:
            assert process.readline() == "holding"
            # When that node is killed
            doomed.kill()
            # Then it keeps no other reader waiting
            assert reader.backend._get_task_meta_for(task_id)["result"] == "kept"
    finally:
        app.backend.close()
        here.close()
