"""How long a result is kept, in the user's format and in the broker's. Does no I/O."""

from __future__ import annotations

import datetime
import math
from typing import Optional

__all__ = ("MAX_MILLISECONDS", "NAME", "milliseconds", "seconds")

#: Header of a task's message, and attribute of a task, with the expiry of its results.
NAME = "result_expires"

#: The longest expiration that RabbitMQ accepts for messages and queues: ten years.
MAX_MILLISECONDS = 315_360_000_000


def seconds(value: object) -> Optional[float]:
    """Return an expiry in seconds, ``None`` for never.

    Parameters:
        value: seconds, as a number or as text, which is what environment variables hold; or a
            timedelta. 0 and ``None`` mean never. More than ten years are treated as ten years.

    Raises:
        ValueError: when it is none of these, or negative.
    """
    if value is None:
        return None
    number = _number(value)
    if number is None:
        raise ValueError(f"{value!r:.100} is not a number of seconds, nor a timedelta")
    if number == 0:
        return None
    if not 0 < number < math.inf:
        raise ValueError(
            f"{value!r:.100} is not a number of seconds from now. Use 0 or None to keep results "
            "until they are forgotten."
        )
    return min(number, MAX_MILLISECONDS / 1000)


def milliseconds(value: object) -> Optional[int]:
    """Return an expiry in milliseconds, ``None`` for never; see :func:`seconds`."""
    number = seconds(value)
    return None if number is None else max(1, int(number * 1000))


def _number(value: object) -> Optional[float]:
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return value if isinstance(value, (int, float)) else None
