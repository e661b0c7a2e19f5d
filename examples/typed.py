"""Typed code that uses this package: mypy accepts it in strict mode, and pyright accepts it too.

Celery itself has no types, so results are Any. Where stubs such as celery-types know the type of
a result object, coroutines return values of that type.
"""

from __future__ import annotations

import asyncio
from typing import Any, Dict, List, Optional, Protocol

from celery_amqp_results import AMQPBackend, aio, errors
from celery_amqp_results.metrics import Metrics


def backend_of(app: Any) -> AMQPBackend:
    """Return the backend of an app, with its type."""
    backend = app.backend
    assert isinstance(backend, AMQPBackend)
    return backend


def states_of(app: Any, task_id: str) -> List[str]:
    """Return the states of a task until it ends."""
    found: List[str] = []
    for meta in backend_of(app).watch(task_id, timeout=60):
        state: str = meta["status"]
        found.append(state)
    return found


def stored(app: Any) -> int:
    """Return how many states this process has stored."""
    metrics: Metrics = backend_of(app).metrics()
    return metrics.stored


async def value_of(app: Any, task_id: str) -> int:
    """Wait for a number in a coroutine."""
    try:
        number: int = await aio.get(task_id, timeout=5, app=app)
    except aio.WaitTimeout:
        return -1
    except errors.BackendUnavailable as exc:
        raise RuntimeError("no broker") from exc
    return number


class Doubled(Protocol):
    """The result object of a task that returns a number, as stubs for Celery describe it."""

    id: str

    def get(self, timeout: Optional[float] = None) -> int: ...


async def doubled(result: Doubled) -> int:
    """Wait for a result object; the value has the type that the stubs know."""
    return await aio.get(result, timeout=5)


async def sum_of(results: List[Doubled]) -> int:
    """Wait for several of them."""
    total = sum(await aio.gather(*results))
    async for _, number in aio.as_completed(results):
        total -= number
    return total


async def follow(app: Any, task_id: str) -> List[Dict[str, Any]]:
    """Return all metas of a task as it goes on."""
    return [meta async for meta in aio.watch(task_id, app=app)]


def main(app: Any, task_id: str) -> None:
    print(states_of(app, task_id), stored(app), asyncio.run(value_of(app, task_id)))
