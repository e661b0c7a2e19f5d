"""How long a result is kept, as users say it and as the broker is told. Does no I/O."""

from __future__ import annotations

import datetime
import math
from typing import Any, Optional

__all__ = ("MAX_EXPIRES", "NAME", "milliseconds")

#: Header of a task's message, and attribute of a task, with the expiry of its results.
NAME = "result_expires"

#: The longest expiration that RabbitMQ takes, in seconds.
MAX_EXPIRES = 4_294_967


def milliseconds(value: Any) -> Optional[int]:
    """Return an expiration in milliseconds, ``None`` for never.

    Parameters:
        value: seconds, or a timedelta; 0 and ``None`` are never.

    Raises:
        ValueError: when it is neither, or is not allowed.
    """
    if isinstance(value, datetime.timedelta):
        value = value.total_seconds()
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r:.100} is not a number of seconds, nor a timedelta")
    if value == 0:
        return None
    if math.isnan(value) or not 0 < value <= MAX_EXPIRES:
        raise ValueError(
            f"{value!r} is not a number of seconds that RabbitMQ takes, which is up to "
            f"{MAX_EXPIRES} (49 days). Use 0 or None to keep results until they are forgotten."
        )
    return max(1, int(value * 1000))
