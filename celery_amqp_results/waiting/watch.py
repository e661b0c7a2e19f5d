"""Watching: the states of tasks as they happen, in a form for people and programs to read.

There are two kinds of watches. For *given tasks* a follower brings kept and pushed states, see
:mod:`~celery_amqp_results.waiting.follower`; this module puts them into the guaranteed order. For
*everything*, a :class:`~celery_amqp_results.waiting.tap.Tap` receives a copy of every state.

The guarantee: the current state of each task comes first, then each state that becomes current,
once; a state never comes after one that supersedes it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import (
    Callable,
    Collection,
    Dict,
    FrozenSet,
    Generator,
    Iterable,
    List,
    NamedTuple,
    Optional,
    Union,
)

from celery.exceptions import TimeoutError
from kombu.exceptions import ContentDisallowed

from celery_amqp_results import errors
from celery_amqp_results.amqp.failures import was_refused
from celery_amqp_results.library_types import Meta
from celery_amqp_results.protocol.ids import id_text
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.ranking import is_final
from celery_amqp_results.toolkit.forks import Process
from celery_amqp_results.toolkit.retry import deadline_after
from celery_amqp_results.waiting.progress import Newest, Update
from celery_amqp_results.waiting.results import tasks_in
from celery_amqp_results.waiting.tap import FORKED, Tap

__all__ = (
    "UNREADABLE",
    "Target",
    "concerns_one_state",
    "leave_out",
    "may_be_fetched_later",
    "read_states",
    "read_target",
    "watch_everything",
    "watch_ids",
)

logger = logging.getLogger(__name__)

#: The longest single wait of a tap, in seconds.
LONGEST_STEP = 3600.0

#: Errors of a single state, and not of reading.
UNREADABLE = (ContentDisallowed, errors.ForeignMessage, errors.ResultExpired)


class Target(NamedTuple):
    """The tasks to watch."""

    #: Tasks to follow, each once.
    ids: List[str]
    #: Metas of tasks known to have ended.
    ended: List[Meta]


def read_target(target: object) -> Target:
    """Return the tasks that *target* names.

    Parameters:
        target: an id, a result object, a group or another result set, or an iterable of these. A
            task that ignores its result never has a state, and is left out.

    Raises:
        TypeError: when it is none of these.
    """
    ids: Dict[str, None] = {}
    ended: Dict[str, Meta] = {}
    for node in tasks_in(target):
        if isinstance(node, str):
            ids[node] = None
        elif node.ignored:
            continue
        elif node._cache is not None and is_final(node._cache["status"]):
            task_id = id_text(node.id)
            ended[task_id] = {"task_id": task_id, **node._cache}
        else:
            ids[id_text(node.id)] = None
    return Target([i for i in ids if i not in ended], list(ended.values()))


def read_states(names: Union[str, Iterable[str], None]) -> Optional[FrozenSet[str]]:
    """Return the names of the wanted states, or ``None`` for all.

    Raises:
        TypeError: when a name is not text.
        ValueError: when there are no names, since no state would ever match.
    """
    if names is None:
        return None
    found = frozenset((names,) if isinstance(names, str) else names)
    if not found:
        raise ValueError("states is empty: give the names of states, or None for all")
    for name in found:
        if not isinstance(name, str):
            raise TypeError(f"states has {name!r}, which is not the name of a state")
    return found


def watch_ids(
    updates: Generator[Update, None, None],
    ended: Iterable[Meta],
    decode: Callable[[StateMessage, Optional[float]], Meta],
    wanted: Optional[Collection[str]],
    begin: Callable[[], Optional[float]],
) -> Generator[Meta, None, None]:
    """Yield the metas of *ended* tasks and of *updates* in the guaranteed order.

    Parameters:
        updates: closed at the end.
        wanted: names of the states to yield, ``None`` for all.
        begin: called when the iteration begins; returns the deadline for *decode*.
    """
    deadline = begin()
    newest = Newest()
    process = Process()
    with contextlib.closing(updates):
        for known in ended:
            if wanted is None or known["status"] in wanted:
                yield known
        for update in updates:
            for state in newest.of_update(update):
                if wanted is None or state.state in wanted:
                    yield {"task_id": state.id, **decode(state, deadline)}
                    if not process.is_current:
                        raise RuntimeError(FORKED)
            if update.final is not None:
                newest.drop(update.task_id)


def watch_everything(
    tap: Tap,
    decode: Callable[[StateMessage, Optional[float]], Meta],
    timeout: Optional[float],
) -> Generator[Meta, None, None]:
    """Yield the metas of the states from *tap*, for *timeout* seconds or for ever.

    A state that cannot be decoded, or whose body cannot be fetched for the moment, is left out with
    a warning, since the others are not affected.
    """
    deadline = deadline_after(timeout)
    with tap:
        while deadline is None or time.monotonic() < deadline:
            for state in tap.step(deadline, LONGEST_STEP):
                try:
                    decoded = decode(state, deadline)
                except TimeoutError:
                    return
                except Exception as exc:
                    if not concerns_one_state(exc):
                        raise
                    leave_out(state, exc)
                else:
                    yield {"task_id": state.id, **decoded}


def concerns_one_state(exc: Exception) -> bool:
    """Return whether other states may be decoded after *exc*, an error of decoding one."""
    return isinstance(exc, UNREADABLE) or may_be_fetched_later(exc)


def may_be_fetched_later(exc: Exception) -> bool:
    """Return whether *exc* says that the body of a large state cannot be fetched for the moment."""
    return isinstance(exc, errors.BackendUnavailable) and not was_refused(exc)


def leave_out(state: StateMessage, exc: Exception) -> None:
    """Log that a watch of everything leaves out *state*."""
    logger.warning("left out the %s of %s: %s", state.state, state.id, exc)
