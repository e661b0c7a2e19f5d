"""Errors that the backend raises.

::

    celery.exceptions.ImproperlyConfigured
     +-- InvalidOption              an option of ours is unknown or has a bad value
     +-- DeclarationRefused         the broker holds a queue or exchange that differs from ours
    kombu.exceptions.OperationalError
     +-- BackendUnavailable         the broker cannot be reached, or refuses us
          +-- LookupTimeout         a shard was not read within ``lookup_timeout``
          +-- NotConfirmed          the broker did not take a published state
    ValueError
     +-- ForeignMessage             a message in our queues that is not ours, or is damaged
    celery.exceptions.BackendError
     +-- ResultTooLarge             the broker refuses a message of this size; an EncodeError too
     +-- ResultExpired              of a large result only the pointer is left
     +-- BacklogLimitExceeded       too many states of one task in the layout per-task
    celery.exceptions.TimeoutError and asyncio.TimeoutError
     +-- WaitTimeout                a task did not end in time; raised by celery_amqp_results.aio
    NotImplementedError
     +-- Unsupported                this layout or transport cannot do that

All of them survive pickling: task errors travel between processes.
"""

from __future__ import annotations

import asyncio
from typing import Optional

from celery.exceptions import BackendError, ImproperlyConfigured, TimeoutError
from kombu.exceptions import EncodeError, OperationalError

__all__ = (
    "BackendUnavailable",
    "BacklogLimitExceeded",
    "DeclarationRefused",
    "ForeignMessage",
    "InvalidOption",
    "LookupTimeout",
    "NotConfirmed",
    "ResultExpired",
    "ResultTooLarge",
    "Unsupported",
    "WaitTimeout",
)


class InvalidOption(ImproperlyConfigured):
    """Raised when an option is unknown, or when its value is not allowed."""


class DeclarationRefused(ImproperlyConfigured):
    """Raised when a queue or exchange exists with other properties than ours."""


class BackendUnavailable(OperationalError):
    """Raised when the broker cannot be reached, or refuses us."""


class LookupTimeout(BackendUnavailable):
    """Raised when a shard could not be read within ``lookup_timeout`` seconds.

    The state of the task is then unknown; nothing was changed, and asking again is safe.
    """


class NotConfirmed(BackendUnavailable):
    """Raised when the broker did not confirm a published state.

    The state may be stored or not; publishing it again is safe.
    """


class ForeignMessage(ValueError):
    """Raised when a message is not one of ours, or is damaged."""


class ResultTooLarge(BackendError, EncodeError):
    """Raised when the broker refuses a result because of its size.

    To Celery that is a result that cannot be encoded: the task fails with this error.
    """

    #: Bytes of the encoded result, and how many the broker takes, where that is known.
    size: Optional[int] = None
    limit: Optional[int] = None


class ResultExpired(BackendError):
    """Raised when a large result ends while it is being read: it expired, or was forgotten.

    The state of such a task then reads PENDING, as for any other expired result.
    """


class BacklogLimitExceeded(BackendError):
    """Raised when a task has more states in its queue than may be skipped."""


class Unsupported(NotImplementedError):
    """Raised when the layout or the transport in use does not support an operation."""


class WaitTimeout(TimeoutError, asyncio.TimeoutError):
    """Raised when a task that a coroutine waits for has not ended within the timeout.

    It is what ``AsyncResult.get`` raises, and what asyncio raises, in one.
    """

    def __new__(cls, *args: object) -> WaitTimeout:
        """Create it without arguments: OSError, a base since Python 3.11, interprets them."""
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        self.args = args
