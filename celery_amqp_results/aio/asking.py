"""Asking for the state of a task once, and forgetting; see :mod:`celery_amqp_results.aio`."""

from __future__ import annotations

import logging
from typing import Dict, Optional

from celery import Celery
from celery import states as celery_states
from celery.result import EagerResult, ResultSet

from celery_amqp_results import errors
from celery_amqp_results.aio import bridge
from celery_amqp_results.aio.driver import run_blocking
from celery_amqp_results.aio.targets import backend_of, checked, decoded_state, id_of
from celery_amqp_results.library_types import Meta
from celery_amqp_results.waiting import results as trees

__all__ = ("forget", "get_meta", "state")

logger = logging.getLogger(__name__)


async def get_meta(target: object, *, app: Optional[Celery] = None) -> Meta:
    """Return the current meta of a task, as ``backend.get_task_meta`` does, with the ``task_id``.

    The meta of an unknown task is ``{"status": "PENDING", "result": None}``. All tasks requested in
    one turn of the event loop are looked up together.

    Parameters:
        target: a task id or a result object.
        app: the app of a task id; the current app by default.

    Raises:
        LookupTimeout: when the store could not be read in time.
        BackendUnavailable: when the broker cannot be reached or refuses us.
        kombu.exceptions.ContentDisallowed, ForeignMessage: when the state cannot be decoded.
        TypeError: when *target* is neither.
    """
    leaf = checked(target)
    if isinstance(leaf, ResultSet):
        raise TypeError(f"{target!r} is a group, which has no state: ask for its members")
    if not isinstance(leaf, str) and leaf._cache is not None:
        return {"task_id": id_of(leaf), **leaf._cache}
    task_id = id_of(leaf)
    backend = backend_of(leaf, app)
    state = (await bridge.bridge_of(backend).poll((task_id,)))[task_id]
    if state is not None:
        try:
            return {
                "task_id": task_id,
                **backend.reader.decode(await decoded_state(backend, state)),
            }
        except errors.ResultExpired as exc:
            logger.warning("taken for expired: %s", exc)
    return {"task_id": task_id, "status": celery_states.PENDING, "result": None}


async def state(target: object, *, app: Optional[Celery] = None) -> str:
    """Return the name of the current state of a task, ``PENDING`` if nothing is known of it.

    Parameters and errors are those of :func:`get_meta`.
    """
    return str((await get_meta(target, app=app))["status"])


async def forget(target: object, *, app: Optional[Celery] = None) -> None:
    """Delete everything kept of a task and those before it in a chain, or of a group's members.

    Parameters:
        target: a task id, a result object, or a group. The cache of a result object is cleared.
        app: the app of a task id; the current app by default.

    Raises:
        LookupTimeout, BackendUnavailable: as :func:`get_meta`. Some may be deleted; forgetting
            again is safe.
        TypeError: when *target* is none of these.
    """
    ids: Dict[str, None] = {}
    backend = None
    for leaf in trees.leaves(checked(target)):
        if isinstance(leaf, EagerResult):
            continue
        backend = backend or backend_of(leaf, app)
        for each in (leaf, *trees.parents(leaf)):
            if not isinstance(each, (str, EagerResult)):
                each._cache = None
            ids[id_of(each)] = None
    if backend is not None:
        await run_blocking(backend.forget_all, list(ids))
