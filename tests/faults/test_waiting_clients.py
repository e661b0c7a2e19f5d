"""Clients of each kind of concurrency while their connections are reset or the broker restarts."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
from typing import Iterator

import pytest
from celery import states

from tests.conftest import Apps
from tests.faults import waiting_clients
from tools import rabbitmq
from tools.proxy import Proxy


@contextlib.contextmanager
def client(kind: str, url: str, prefix: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.waiting_clients", kind, url, prefix],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("threads", "connections reset"),
        ("threads", "RabbitMQ restarted"),
        ("gevent", "connections reset"),
        ("gevent", "RabbitMQ restarted"),
        ("eventlet", "connections reset"),
        ("asyncio", "connections reset"),
    ],
)
def test_all_awaited_results_arrive_despite_lost_connections(
    make_app: Apps, node: rabbitmq.Node, kind: str, fault: str
) -> None:
    if kind in ("gevent", "eventlet") and importlib.util.find_spec(kind) is None:
        pytest.skip(f"{kind} is not installed")
    app = make_app()
    ids = waiting_clients.task_ids(make_app.prefix)
    with (
        Proxy(node.amqp_port) as proxy,
        client(kind, proxy.url(node.url()), make_app.prefix) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        # When results are stored before, between and after the faults
        for number, task_id in enumerate(ids):
            app.backend.store_result(task_id, number, states.SUCCESS)
            if number in (3, 6) and fault == "connections reset":
                proxy.reset()
            elif number == 5 and fault == "RabbitMQ restarted":
                node.restart()
        # Then each waiter has its own result
        out, err = process.communicate(timeout=2 * waiting_clients.PATIENCE)
        assert process.returncode == 0, err
        assert json.loads(out.splitlines()[-1]) == {i: n for n, i in enumerate(ids)}, err
