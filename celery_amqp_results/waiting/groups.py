"""Groups that read the states of all members at once.

Celery's result sets read one member after the other. For the progress of a group of a thousand
tasks that would be a thousand requests to the broker. The result sets of an app read all unknown
states in one pass, and answer from that.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Type, TypeVar

from celery.result import ResultSet

from celery_amqp_results.library_types import App, TaskResult
from celery_amqp_results.protocol.ids import id_text
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.waiting.results import leaves

__all__ = ("Pass", "ask_in_one_pass")

_M = TypeVar("_M", bound=Callable[..., object])

#: The methods of a result set that read every member.
ASKING = (
    "ready",
    "successful",
    "failed",
    "waiting",
    "completed_count",
    "maybe_throw",
    "maybe_reraise",
)

#: The attributes of an app that hold its classes of result sets.
CLASSES = ("ResultSet", "GroupResult")


class Pass:
    """The states that one thread has read for its present operation."""

    def __init__(self) -> None:
        self._local = threading.local()

    def unused(self) -> Dict[str, Optional[StateMessage]]:
        """The states of the present pass that were not used yet; none outside of a pass.

        Each answers one question: callbacks of users may ask again, and get the state of then.
        """
        found: Dict[str, Optional[StateMessage]] = getattr(self._local, "states", {})
        return found

    @contextlib.contextmanager
    def over(
        self,
        read: Callable[[List[str]], Dict[str, Optional[StateMessage]]],
        tasks: Iterable[TaskResult],
    ) -> Iterator[None]:
        """Answer from one read of all *tasks* that are not known to be ready.

        A pass within another one, of a group in a group, is part of it.
        """
        if hasattr(self._local, "states"):
            yield
            return
        missing = [id_text(task.id) for task in tasks if task._cache is None]
        self._local.states = read(missing) if missing else {}
        try:
            yield
        finally:
            del self._local.states


def ask_in_one_pass(app: App) -> None:
    """Make the result sets of *app* read all their members at once.

    Celery makes every group from these classes: one that was just sent, and one that is restored.
    """
    for name in CLASSES:
        kind = getattr(app, name)
        if not hasattr(kind, "asks_in_one_pass"):
            setattr(app, name, _in_one_pass(kind))


def _in_one_pass(kind: Type[ResultSet]) -> Type[ResultSet]:
    """Return a subclass of *kind* that reads in one pass. It pickles as *kind* does."""
    methods = {name: _wrapped(getattr(kind, name)) for name in ASKING}
    about = {"__module__": kind.__module__, "__doc__": kind.__doc__, "asks_in_one_pass": True}
    return type(kind.__name__, (kind,), {**methods, **about})


def _wrapped(method: _M) -> _M:
    @functools.wraps(method)
    def ask(self: ResultSet, *args: object, **kwargs: object) -> Any:
        # A restored group may be given another backend.
        reader = getattr(self.backend, "reader", None)
        with contextlib.nullcontext() if reader is None else reader.in_one_pass(leaves(self)):
            return method(self, *args, **kwargs)

    return ask  # type: ignore[return-value]
