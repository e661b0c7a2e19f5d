"""Exports the metrics of each process of a worker: name this module with ``--include``.

``celery -A examples.tasks worker --include examples.monitoring.exporter``

A worker with prefork children exports each child on the next free port from 9200 on.
"""

from __future__ import annotations

import os
from typing import Any

from celery.signals import worker_process_init, worker_ready
from prometheus_client import CollectorRegistry, start_http_server

from celery_amqp_results.exporters.prometheus import ResultsCollector
from examples.tasks import app

FIRST_PORT = int(os.environ.get("METRICS_PORT", "9200"))
PORTS = 100


def start(address: str = "0.0.0.0") -> int:
    """Serve the metrics of this process; return the port."""
    registry = CollectorRegistry()
    registry.register(ResultsCollector(app))
    for port in range(FIRST_PORT, FIRST_PORT + PORTS):
        try:
            start_http_server(port, address, registry)
        except OSError:
            # Another process has it.
            continue
        return port
    raise OSError(f"no port is free from {FIRST_PORT} on")


@worker_process_init.connect
@worker_ready.connect
def _start(**kwargs: Any) -> None:
    # The main process, and each child: children store the results, the main process revokes.
    start()
