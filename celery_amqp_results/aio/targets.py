"""What coroutines can wait for: ids, result objects and groups; their backend and their values."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from typing import Any, Iterable, Optional, Protocol, Tuple, TypeVar

import celery
from celery import states as celery_states
from celery.exceptions import TimeoutError
from celery.result import AsyncResult, EagerResult, ResultSet

from celery_amqp_results.aio.driver import run_blocking
from celery_amqp_results.backend import AMQPBackend
from celery_amqp_results.errors import WaitTimeout
from celery_amqp_results.library_types import Leaf
from celery_amqp_results.protocol.ids import id_text
from celery_amqp_results.protocol.message import StateMessage

__all__ = (
    "Gettable",
    "backend_of",
    "checked",
    "common_backend",
    "decoded_state",
    "id_of",
    "is_known",
    "known_value",
    "raise_failure",
    "resolve",
    "timed_out",
)

_T_co = TypeVar("_T_co", covariant=True)

#: A larger body is decoded on another thread, since decoding it here would block the loop.
LARGE_BODY = 64 * 1024


class Gettable(Protocol[_T_co]):
    """A result object whose ``get`` has the type of the task's value.

    Type checkers find it in stubs for Celery, such as celery-types.
    """

    def get(self, *args: Any, **kwargs: Any) -> _T_co:
        """Return the value."""


def backend_of(node: Leaf, app: Optional[celery.Celery] = None) -> AMQPBackend:
    """Return the backend that knows of an id or of a result object."""
    backend = None if isinstance(node, str) else getattr(node, "backend", None)
    if backend is None:
        backend = (app or celery.current_app).backend
    if not isinstance(backend, AMQPBackend):
        raise TypeError(
            f"the result backend is {backend!r}: celery_amqp_results.aio can wait for results of "
            "the backend amqp:// alone. For a task id, give the app whose task it is as app=..."
        )
    return backend


def checked(node: object) -> Any:
    """Return an id as text, and a result object as it is.

    Raises:
        TypeError: when it is neither.
    """
    if isinstance(node, (str, bytes, uuid.UUID)):
        return id_text(node)
    if isinstance(node, (AsyncResult, EagerResult, ResultSet)):
        return node
    raise TypeError(
        f"{node!r} cannot be waited for: give a task id, a result object, or a group. For several, "
        "use gather()"
    )


def id_of(leaf: Leaf) -> str:
    """Return the id of a result object, or *leaf* if it is one itself."""
    return leaf if isinstance(leaf, str) else id_text(leaf.id)


def is_known(leaf: Leaf) -> bool:
    """Whether *leaf* is known without asking the store."""
    return not isinstance(leaf, str) and (
        leaf.ignored
        or (leaf._cache is not None and leaf._cache["status"] in celery_states.READY_STATES)
    )


def known_value(leaf: Any) -> Tuple[str, Any]:
    """Return state and value of what :func:`is_known`."""
    # A task that ignores its result is not waited for: AsyncResult.get returns None.
    if leaf.ignored:
        return celery_states.SUCCESS, None
    return leaf._cache["status"], leaf._cache["result"]


async def decoded_state(
    backend: AMQPBackend, state: StateMessage, deadline: Optional[float] = None
) -> StateMessage:
    """Return *state*, decoded on another thread if decoding may take long.

    The body of a large result is fetched from the broker there as well.

    Parameters:
        deadline: time (``time.monotonic``) at which the caller's timeout is over.

    Raises:
        WaitTimeout: when that takes until *deadline*.
        ResultExpired: when the body is gone.
        LookupTimeout, BackendUnavailable: when it could not be read.
        kombu.exceptions.ContentDisallowed, ForeignMessage: when it cannot be decoded.
    """
    if state.decoded is not None:
        return state
    if state.body_queue is not None or state.compression or len(state.body) > LARGE_BODY:
        reading = run_blocking(backend.reader.content, state, deadline)
        seconds = None if deadline is None else deadline - time.monotonic()
        try:
            # All threads may be busy with reads that have no deadline.
            content = await asyncio.wait_for(reading, seconds)
        except (TimeoutError, asyncio.TimeoutError) as exc:
            raise WaitTimeout(f"the result of {state.id} is not read yet") from exc
        state = dataclasses.replace(state, decoded=content, body_queue=None)
    return state


def common_backend(leaves: Iterable[Leaf], app: Optional[celery.Celery]) -> Optional[AMQPBackend]:
    """Return the backend of *leaves*, or ``None`` if none of them must be waited for.

    Raises:
        TypeError: when they have several backends.
    """
    backends = [backend_of(leaf, app) for leaf in leaves if not isinstance(leaf, EagerResult)]
    if any(each.layout is not backends[0].layout for each in backends):
        raise TypeError("results of several apps cannot be waited for together")
    return backends[0] if backends else None


def resolve(backend: AMQPBackend, leaf: Leaf, state: StateMessage) -> Tuple[str, Any]:
    """Give a result object its final state; return the state's name and the value."""
    if isinstance(leaf, str):
        meta = backend.reader.decode(state)
        return meta["status"], meta["result"]
    backend.waits.resolve(leaf, state)
    return known_value(leaf)


def raise_failure(leaf: Leaf, state: str, value: object) -> None:
    """Raise the exception of a task that has failed."""
    if state not in celery_states.PROPAGATE_STATES:
        return
    if not isinstance(leaf, (str, EagerResult)):
        # Includes the worker's traceback, if the app enables that.
        leaf.maybe_throw(propagate=True)
    raise value if isinstance(value, BaseException) else Exception(value)


def timed_out(timeout: float, missing: int, total: int) -> WaitTimeout:
    """Return the error for tasks that have not ended in time."""
    what = "the task is" if total == 1 else f"{missing} of {total} tasks are"
    return WaitTimeout(f"{what} not ready after {timeout:g} seconds")
