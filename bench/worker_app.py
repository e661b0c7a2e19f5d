"""What a worker process of the benchmarks loads."""

from __future__ import annotations

from bench.peers import app_from_environment

app = app_from_environment()
