"""Trees of result objects: groups, their members, and the tasks before them in a chain.

This module does no I/O.
"""

from __future__ import annotations

import uuid
from typing import Any, Iterable, Iterator

from celery.result import AsyncResult, EagerResult, ResultSet

from celery_amqp_results.library_types import Leaf, TaskResult
from celery_amqp_results.protocol.ids import id_text

__all__ = ("leaves", "parents", "tasks_in")


def leaves(node: Any) -> Iterator[Any]:
    """Yield the members of the group *node* one by one, or the id or result object itself."""
    if isinstance(node, ResultSet):
        for member in node.results:
            yield from leaves(member)
    else:
        yield node


def parents(node: object) -> Iterator[TaskResult]:
    """Yield the tasks before the result object or group *node* in a chain, first to last."""
    before = []
    parent = getattr(node, "parent", None)
    while parent is not None:
        before.append(parent)
        parent = getattr(parent, "parent", None)
    for parent in reversed(before):
        yield from leaves(parent)


def tasks_in(target: object) -> Iterator[Leaf]:
    """Yield the ids and result objects that a user has named.

    Parameters:
        target: an id, a result object, a group or another result set, or an iterable of these.

    Raises:
        TypeError: when it contains anything else.
    """
    if isinstance(target, (str, bytes, uuid.UUID)):
        yield id_text(target)
    elif isinstance(target, (AsyncResult, EagerResult, ResultSet)):
        yield from leaves(target)
    elif isinstance(target, Iterable):
        for each in target:
            yield from tasks_in(each)
    else:
        raise TypeError(
            f"{target!r} cannot be watched: give a task id, a result object, a group, or a list "
            "of these"
        )
