"""Types of what Celery, kombu and py-amqp give us, since these libraries have none.

Each protocol names what this package uses of an object. This module imports no other of the
package.
"""

from __future__ import annotations

import datetime
from typing import Any, Dict, Mapping, Optional, Protocol, Union

__all__ = ("App", "Leaf", "Meta", "TaskResult")

#: A state of a task as Celery knows it: its name, the value, and more.
Meta = Dict[str, Any]


class App(Protocol):
    """A Celery app."""

    amqp: Any
    backend: Any
    conf: Any
    control: Any
    #: The task that runs in this thread or greenlet, or ``None``.
    current_worker_task: Any
    main: Optional[str]
    tasks: Mapping[str, object]
    timezone: datetime.tzinfo

    def connection_for_write(self, url: Optional[str] = None, **options: object) -> Any:
        """Return a connection to the app's broker, or to *url*, that is not yet connected."""

    def set_current(self) -> None:
        """Make it the current app of this thread."""


class TaskResult(Protocol):
    """The result object of a task."""

    #: Text, or a ``uuid.UUID``.
    id: Any
    backend: Any
    #: Whether the task ignores its result.
    ignored: bool
    #: Calls the callbacks.
    on_ready: Any
    #: The result object of the task before it in a chain, or ``None``.
    parent: Any
    #: The meta, once the task has ended.
    _cache: Optional[Meta]

    def maybe_throw(self, propagate: bool = True, callback: Any = None) -> Any:
        """Return the value of a task that has ended, or raise its exception."""


#: A task whose result is wanted: its id or its result object.
Leaf = Union[str, TaskResult]
