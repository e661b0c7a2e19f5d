"""Trees of result objects: groups, their members, and the tasks before them in a chain.

This module does no I/O.
"""

from __future__ import annotations

import uuid
from typing import Any, Iterable, Iterator

from celery.result import AsyncResult, EagerResult, ResultSet

from celery_amqp_results.protocol.ids import id_text

__all__ = ("leaves", "parents", "tasks_in")


def leaves(node: Any) -> Iterator[Any]:
    """Yield the tasks that *node* stands for: the members of a group one by one, or itself.

    Parameters:
        node: an id, a result object or a result set. Ids are yielded as they are.
    """
    if isinstance(node, ResultSet):
        for member in node.results:
            yield from leaves(member)
    else:
        yield node


def parents(node: Any) -> Iterator[Any]:
    """Yield the tasks before *node* in a chain, the nearest first.

    Parameters:
        node: an id, which has none, a result object or a group.
    """
    parent = getattr(node, "parent", None)
    while parent is not None:
        yield from leaves(parent)
        parent = getattr(parent, "parent", None)
