"""The number of examples of the property tests; ``EXAMPLES=1000`` tries more."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "unit",
    max_examples=int(os.environ.get("EXAMPLES", "40")),
    # A slow machine is no failure.
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
)
settings.load_profile("unit")
