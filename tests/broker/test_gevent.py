"""The backend in a process whose threads are greenlets."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict

import pytest

from tests.conftest import Apps
from tools import rabbitmq
from tools.proxy import Proxy

if importlib.util.find_spec("gevent") is None:
    pytest.skip("gevent is not installed", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent.parent

#: Runs with everything replaced by gevent before anything else is imported.
_PROGRAM = """
import gevent.monkey
gevent.monkey.patch_all()
import json, os, sys, time, uuid
import gevent
from celery import Celery

conf = json.loads(sys.argv[1])
app = Celery("greenlets", broker=conf.pop("broker"), backend="amqp://")
app.conf.update(conf)
new_id = lambda: str(uuid.uuid4())
say = lambda value: print(json.dumps(value), flush=True)
"""


def run(app: Any, url: str, program: str) -> subprocess.Popen[str]:
    conf: Dict[str, Any] = {
        "broker": url,
        "result_exchange": app.conf.result_exchange,
        "result_backend_transport_options": app.conf.result_backend_transport_options,
    }
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM + program, json.dumps(conf)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_idle_connections_cost_greenlets_nothing(make_app: Apps, node: rabbitmq.Node) -> None:
    # Given greenlets that have stored a result, looked one up, and waited
    with Proxy(node.amqp_port) as proxy:
        process = run(
            make_app(),
            proxy.url(node.url()),
            """
app.backend.store_result(new_id(), 1, "SUCCESS")
app.backend.get_state(new_id())
pool = app.backend.layout._pool
with pool.link() as link:
    for _ in range(3):
        link.readable(0.001)
publisher = app.backend.layout.publisher
app.backend.store_result(new_id(), 1, "SUCCESS")
say("ready")
gevent.get_hub().threadpool.apply(sys.stdin.readline)
before = time.process_time()
gevent.sleep(4)
say(time.process_time() - before)
gevent.get_hub().threadpool.apply(sys.stdin.readline)
task = new_id()
app.backend.store_result(task, 7, "SUCCESS")
say(app.AsyncResult(task).get(timeout=30))
os._exit(0)
""",
        )
        try:
            assert process.stdout is not None
            assert process.stdin is not None
            assert json.loads(process.stdout.readline()) == "ready"
            # When a load balancer closes the connections while they are idle
            proxy.refuse()
            proxy.reset()
            process.stdin.write("go\n")
            process.stdin.flush()
            # Then the process does nothing
            assert json.loads(process.stdout.readline()) < 2.0
            # And works when the broker is there again
            proxy.resume()
            process.stdin.write("go\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline()) == 7
        finally:
            process.kill()
            process.communicate()
