"""Classifying why an operation on the broker failed.

A *transient* failure may be gone at the next try: a lost connection, a node that is starting, a
limit on connections that others use up at the moment. A *refusal* is permanent: a wrong password, a
missing permission, a queue with other properties. An exception from a user's signal handler is
neither, whatever its class, see :mod:`~celery_amqp_results.toolkit.interrupts`.
"""

from __future__ import annotations

import re
from typing import NamedTuple, Optional, Tuple, Type

import kombu
from amqp import exceptions as amqp_errors

__all__ = (
    "CHANNELS",
    "CONNECTIONS",
    "NO_QUEUE",
    "QUEUES",
    "TRANSIENT",
    "Limit",
    "is_refusal",
    "limit_of",
    "was_refused",
)

#: Errors of a lost connection, a closed channel or a broken protocol, and
#: :exc:`~celery_amqp_results.errors.BackendUnavailable`, which is an ``OperationalError``.
TRANSIENT: Tuple[Type[Exception], ...] = (
    amqp_errors.AMQPError,
    amqp_errors.MessageNacked,
    kombu.exceptions.OperationalError,
    OSError,
)

#: How the broker's text begins if a queue does not exist. The code is the same for other reasons,
#: for example when the queue's node is down.
NO_QUEUE = "NOT_FOUND - no queue "

#: What a broker limits.
CONNECTIONS = "connections"
CHANNELS = "channels"
QUEUES = "queues"

#: RabbitMQ's texts, from 3.10 to 4.3. Its codes are those of refusals.
_LIMITS: Tuple[Tuple[str, re.Pattern[str]], ...] = (
    (CONNECTIONS, re.compile(r"connection limit \((?P<number>\d+)\) is reached")),
    (CHANNELS, re.compile(r"maximum allowed (?:user )?limit of \(?(?P<number>\d+)")),
    (CHANNELS, re.compile(r"negotiated channel_max \((?P<number>\d+)\)")),
    (QUEUES, re.compile(r"queue limit in .*\((?P<number>\d+)\) is reached")),
)


class Limit(NamedTuple):
    """A limit of the broker that was reached."""

    #: :data:`CONNECTIONS`, :data:`CHANNELS` or :data:`QUEUES`.
    what: str
    number: int


def limit_of(exc: Optional[BaseException]) -> Optional[Limit]:
    """Return the limit that the broker says was reached, or ``None`` if *exc* is about none."""
    if not isinstance(exc, (amqp_errors.NotAllowed, amqp_errors.PreconditionFailed)):
        return None
    for what, pattern in _LIMITS:
        found = pattern.search(str(exc))
        if found:
            return Limit(what, int(found["number"]))
    return None


def is_refusal(exc: BaseException) -> bool:
    """Return whether the broker refused for a reason that a retry does not change.

    Wrong password, no such virtual host, no permission, a declaration that differs. A limit on
    connections or channels is no refusal: others will close theirs.
    """
    if not isinstance(
        exc,
        (amqp_errors.AccessRefused, amqp_errors.NotAllowed, amqp_errors.PreconditionFailed),
    ):
        return False
    limit = limit_of(exc)
    return limit is None or limit.what == QUEUES


def was_refused(exc: BaseException) -> bool:
    """Return whether *exc*, or the error that it was raised from, is a refusal."""
    return is_refusal(exc.__cause__ or exc)
