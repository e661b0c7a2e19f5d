"""Two apps in one process whose results are in different clusters, under the same names."""

from __future__ import annotations

import functools
import os
import threading
from typing import Any, Dict, List

from celery import Celery, states

from tests.broker.helpers import LONG, Waiting, new_id
from tests.conftest import Apps
from tools import rabbitmq


def test_results_of_two_clusters_do_not_mix(make_app: Apps, node: rabbitmq.Node) -> None:
    name = os.environ.get("RABBITMQ_DISTRIBUTION", "system")
    with rabbitmq.Node(rabbitmq.distribution(name)) as second:
        # Both use the same broker for tasks, and the same names for results
        here = make_app()
        there = Celery("there", broker=make_app.url, backend=second.url(), set_as_current=False)
        there.conf.update(here.conf.changes, result_backend=second.url())
        apps: Dict[str, Celery] = {"here": here, "there": there}
        ids = [new_id() for _ in range(20)]
        later = new_id()
        try:
            # When both wait for the same task, and store results under the same ids in threads
            waiting = {
                where: Waiting(functools.partial(app.AsyncResult(later).get, timeout=LONG))
                for where, app in apps.items()
            }
            found: List[Any] = []

            def work(where: str, app: Celery) -> None:
                for task_id in ids:
                    app.backend.store_result(task_id, where, states.SUCCESS)
                read = app.backend.layout.store.read(ids)
                metas = [app.backend.reader.decode(each) for (each,) in read.values()]
                found.append((where, {meta["result"] for meta in metas}))

            threads = [threading.Thread(target=work, args=item) for item in apps.items()]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(2 * LONG)
            # Then each has its own results
            assert sorted(found) == [("here", {"here"}), ("there", {"there"})]
            for where, app in apps.items():
                app.backend.store_result(later, where, states.SUCCESS)
            assert {where: each.result() for where, each in waiting.items()} == {
                "here": "here",
                "there": "there",
            }
            here.AsyncResult(ids[0]).forget()
            assert there.AsyncResult(ids[0]).get(timeout=LONG) == "there"
        finally:
            there.backend.close()
            there.close()
