"""The number of examples of the property tests; ``EXAMPLES=1000`` tries more."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

# The example that kills a mutant is not reported, so it need not be made smaller.
_PHASES = set(Phase)
if "MUTANT_UNDER_TEST" in os.environ:
    _PHASES -= {Phase.shrink, Phase.explain}

settings.register_profile(
    "unit",
    max_examples=int(os.environ.get("EXAMPLES", "40")),
    # A slow machine is no failure.
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
    phases=_PHASES,
)
settings.load_profile("unit")
