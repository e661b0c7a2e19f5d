"""Ids of tasks and groups, and names of states, as text. Does no I/O."""

from __future__ import annotations

import uuid
from typing import Any

__all__ = ("id_text", "plain_ids", "state_name")


def id_text(value: object) -> str:
    """Return the id of a task or a group as text.

    Parameters:
        value: text, its UTF-8 bytes, or a ``uuid.UUID``, which Django and FastAPI take from URLs.

    Raises:
        TypeError: when it is none of them.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, bytes):
        return value.decode()
    raise TypeError(f"{value!r:.200} is not the id of a task or a group: give text or a UUID")


def plain_ids(value: object) -> Any:
    """Return nested tuples of results with every ``uuid.UUID`` in them as text.

    Parameters:
        value: the ``as_tuple()`` of a result object, before or after serialization.
    """
    if isinstance(value, (list, tuple)):
        return [plain_ids(item) for item in value]
    return str(value) if isinstance(value, uuid.UUID) else value


def state_name(state: object) -> str:
    """Return the name under which *state* goes over the wire.

    A task may report progress without naming a state: ``None`` and the empty text have the empty
    name.
    """
    if state is None:
        return ""
    return state if isinstance(state, str) else str(state)
