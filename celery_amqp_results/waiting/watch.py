"""Watching: the states of tasks as they happen, in a form for people and programs to read.

There are two kinds of watches. For *given tasks* a follower brings kept and pushed states, see
:mod:`~celery_amqp_results.waiting.follower`; this module puts them into the guaranteed order. For
*everything*, a :class:`Tap` is a queue of its own on the exchange that receives a copy of every
state. It begins when it is opened and keeps nothing.

The guarantee: the current state of each task comes first, then each state that becomes current,
once; a state never comes after one that supersedes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
import uuid
from typing import (
    Any,
    Callable,
    Collection,
    Dict,
    FrozenSet,
    Generator,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Union,
)

import amqp
from celery.result import AsyncResult, EagerResult, ResultSet
from kombu.exceptions import ContentDisallowed

from celery_amqp_results import errors
from celery_amqp_results.amqp import connections
from celery_amqp_results.amqp.declarations import Declarations
from celery_amqp_results.amqp.failures import TRANSIENT, is_refusal
from celery_amqp_results.amqp.link import Link
from celery_amqp_results.protocol.ids import id_text
from celery_amqp_results.protocol.message import STATE, StateMessage
from celery_amqp_results.protocol.ranking import fold, is_final, supersedes
from celery_amqp_results.toolkit.bounded import BoundedDict
from celery_amqp_results.toolkit.retry import Retry, time_left
from celery_amqp_results.toolkit.sockets import WakeUp
from celery_amqp_results.waiting.progress import Update

__all__ = (
    "UNREADABLE",
    "Newest",
    "Tap",
    "Target",
    "decode_or_none",
    "leave_out",
    "nodes",
    "read_states",
    "read_target",
    "watch_everything",
    "watch_ids",
)

logger = logging.getLogger(__name__)

Meta = Dict[str, Any]

#: Seconds between heartbeats on the connection of a tap. They are answered when the watcher asks
#: for the next state, so it may spend about twice this time on one.
HEARTBEAT = 60.0

#: The most states in the queue of a tap. Beyond that the oldest are dropped.
MAX_QUEUED = 1_000_000

#: The most tasks whose last state is remembered while everything is watched.
MAX_REMEMBERED = 20_000

#: The longest single wait of a tap, in seconds.
LONGEST_STEP = 3600.0

#: Errors of a single state, and not of reading.
UNREADABLE = (ContentDisallowed, errors.ForeignMessage, errors.ResultExpired)

_FORKED = "a watch was begun before a fork and goes on in the child: begin it in the child"


class Target(NamedTuple):
    """The tasks to watch."""

    #: Tasks to follow, each once.
    ids: List[str]
    #: Metas of tasks known to have ended.
    ended: List[Meta]


def read_target(target: Any) -> Target:
    """Return the tasks that *target* names.

    Parameters:
        target: an id, a result object, a group or another result set, or an iterable of these. A
            task that ignores its result never has a state, and is left out.

    Raises:
        TypeError: when it is none of these.
    """
    ids: Dict[str, None] = {}
    ended: Dict[str, Meta] = {}
    for node in nodes(target):
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


def nodes(target: Any) -> Iterator[Any]:
    """Return the ids and result objects in *target*, which :func:`read_target` describes.

    Raises:
        TypeError: when it contains anything else.
    """
    if isinstance(target, (str, bytes, uuid.UUID)):
        yield id_text(target)
    elif isinstance(target, (AsyncResult, EagerResult)):
        yield target
    elif isinstance(target, ResultSet):
        yield from nodes(target.results)
    elif isinstance(target, Iterable):
        for node in target:
            yield from nodes(node)
    else:
        raise TypeError(
            f"{target!r} cannot be watched: give a task id, a result object, a group, or a list "
            "of these"
        )


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


class Newest:
    """Filters updates for states that become current, each once.

    Parameters:
        limit: the most tasks that are remembered; ``None`` for any number.
    """

    def __init__(self, limit: Optional[int] = None) -> None:
        self._last: BoundedDict[str, StateMessage] = BoundedDict(limit)

    def take(self, update: Update) -> List[StateMessage]:
        """Return the states of *update* that become current, in order.

        The history of a task that is new here is left out.
        """
        states: List[StateMessage] = update.states
        if update.history and update.task_id not in self._last:
            present = fold(states)
            states = [] if present is None else [present]
        return [state for state in states if self.accept(state)]

    def accept(self, state: StateMessage) -> bool:
        """Return whether *state* outranks all earlier states of its task."""
        last = self._last.get(state.id)
        if last is not None and (
            (state.published, state.state) == (last.published, last.state)
            or not supersedes(state, last)
        ):
            return False
        # Its body is no longer needed.
        self._last[state.id] = dataclasses.replace(state, body=b"", decoded=None)
        return True

    def drop(self, task_id: str) -> None:
        """Forget a task that has no more states to come."""
        self._last.pop(task_id, None)


def watch_ids(
    updates: Generator[Update, None, None],
    ended: Iterable[Meta],
    decode: Callable[[StateMessage], Meta],
    wanted: Optional[Collection[str]],
) -> Generator[Meta, None, None]:
    """Yield the metas of *updates* in the guaranteed order.

    Parameters:
        updates: updates of the tasks; closed at the end.
        ended: metas of tasks that have ended.
        decode: decodes a state.
        wanted: names of the states to yield, ``None`` for all.

    Raises:
        Exception: errors of *updates* and *decode*.
    """
    newest = Newest()
    pid = os.getpid()
    with contextlib.closing(updates):
        for known in ended:
            if wanted is None or known["status"] in wanted:
                yield known
        for update in updates:
            for state in newest.take(update):
                if wanted is None or state.state in wanted:
                    yield {"task_id": state.id, **decode(state)}
                    if os.getpid() != pid:
                        raise RuntimeError(_FORKED)
            if update.final is not None:
                newest.drop(update.task_id)


class Tap:
    """Every state that is published on the exchange, while it is open.

    It owns a connection with one exclusive queue, which is deleted with it. After a lost connection
    it opens another; states published in between are missed.

    Parameters:
        connector: opens the connection.
        declarations: provides the names, and declares the exchange.
        wanted: names of the states to get, ``None`` for all.

    For one thread, except :meth:`poke` and :meth:`shut`. Does no I/O until :meth:`step`.
    """

    def __init__(
        self,
        connector: connections.Connector,
        declarations: Declarations,
        wanted: Optional[Collection[str]] = None,
    ) -> None:
        self._connector = connector
        self._declarations = declarations
        self._wanted = wanted
        self._link: Optional[Link] = None
        self._arrived: List[StateMessage] = []
        self._tries = Retry(connector.policy)
        self._opened = False
        self._shut = False
        self._pid = os.getpid()
        self._newest = Newest(MAX_REMEMBERED)
        #: How often the connection was lost, and how many messages were not states.
        self.lost = 0
        self.rejected = 0
        #: Made by the first step, since a tap that is never used is not closed either.
        self._wake_up: Optional[WakeUp] = None

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def poke(self) -> None:
        """Make :meth:`step` return soon. May be called by any thread."""
        wake_up = self._wake_up
        if wake_up is not None:
            wake_up.ring()

    def shut(self) -> None:
        """Make :meth:`step` raise from now on. May be called by any thread."""
        self._shut = True
        self.poke()

    def close(self) -> None:
        """Close the connection, and with it the queue."""
        link, self._link = self._link, None
        if link is not None and self._pid == os.getpid():
            link.close()
        wake_up, self._wake_up = self._wake_up, None
        if wake_up is not None:
            wake_up.close()

    def step(self, deadline: Optional[float], pause: float) -> List[StateMessage]:
        """Wait at most *pause* seconds for states and return the current ones.

        Parameters:
            deadline: time (``time.monotonic``) after which connecting is given up.

        Raises:
            BackendUnavailable: when the broker cannot be reached at the beginning, refuses us, or
                when the backend was closed.
            DeclarationRefused: when the exchange exists with other properties.
        """
        if self._pid != os.getpid():
            raise RuntimeError(_FORKED)
        until = time.monotonic() + time_left(deadline, pause)
        if self._wake_up is None:
            self._wake_up = WakeUp()
        if self._shut:
            raise errors.BackendUnavailable("the result backend was closed while watching")
        try:
            if self._link is None:
                self._open(deadline)
            assert self._link is not None
            self._link.tick()
            if not self._arrived:
                self._link.wait(until, self._wake_up)
            while self._link.readable():
                self._link.drain(0.0)
            self._tries.succeeded()
        except errors.BackendUnavailable:
            raise
        except TRANSIENT as exc:
            pause = self._lose(exc)
            self._wake_up.wait(time_left(until, pause))
        arrived, self._arrived = self._arrived, []
        return [state for state in arrived if self._newest.accept(state)]

    def _lose(self, exc: Exception) -> float:
        """Close the connection; return the seconds after which to open another."""
        seconds = self._tries.after_success(exc, time.monotonic())
        link, self._link = self._link, None
        if link is not None:
            link.drop()
            self.lost += 1
        self._declarations.forget()
        if is_refusal(exc):
            raise errors.BackendUnavailable(
                f"the broker at {self._connector.describe()} refuses to have results watched: "
                f"{exc}. Check the user's permissions on the exchange "
                f"{self._declarations.topology.exchange!r} and on queues that the broker names "
                "(amq.gen-*)."
            ) from exc
        logger.warning(
            "the connection that results are watched on is lost, opening another in %.1f s; "
            "states may be missed: %r",
            seconds,
            exc,
        )
        return seconds

    def _open(self, deadline: Optional[float]) -> None:
        # At the first connection the URL may well be wrong.
        link = (
            self._connector.open_once(HEARTBEAT, deadline, "watch")
            if self._opened
            else self._connector.open(HEARTBEAT, deadline, "watch")
        )
        try:
            topology = self._declarations.topology
            channel = link.channel()
            self._declarations.ensure_exchange(channel)
            queue = channel.queue_declare(
                "",
                durable=False,
                exclusive=True,
                auto_delete=True,
                arguments={
                    "x-queue-type": "classic",
                    "x-max-length": MAX_QUEUED,
                    "x-overflow": "drop-head",
                },
            ).queue
            if self._wanted is None:
                channel.queue_bind(queue, topology.exchange, topology.every_binding())
            else:
                for name in self._wanted:
                    channel.queue_bind(queue, topology.exchange, topology.state_binding(name))
            channel.basic_qos(0, 0, False)
            channel.basic_consume(
                queue, no_ack=True, callback=self._on_message, on_cancel=_on_cancel
            )
        except BaseException:
            link.drop()
            raise
        self._link = link
        self._opened = True

    def _on_message(self, message: amqp.Message) -> None:
        try:
            state = StateMessage.from_properties(message.properties, message.body)
        except errors.ForeignMessage as exc:
            self.rejected += 1
            level = logging.WARNING if self.rejected == 1 else logging.DEBUG
            logger.log(level, "ignored a foreign or damaged message while watching: %s", exc)
            return
        if state.kind == STATE and (self._wanted is None or state.state in self._wanted):
            self._arrived.append(state)


def _on_cancel(consumer_tag: str) -> None:
    raise amqp.exceptions.ConsumerCancelled("the queue of a watcher was deleted", (60, 30))


def watch_everything(
    tap: Tap, decode: Callable[[StateMessage], Meta], timeout: Optional[float]
) -> Generator[Meta, None, None]:
    """Yield the metas of the states from *tap*, for *timeout* seconds or for ever.

    A state that cannot be decoded is left out with a warning, since the others are not affected.

    Raises:
        BackendUnavailable, DeclarationRefused: see :meth:`Tap.step`.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    with tap:
        while deadline is None or time.monotonic() < deadline:
            for state in tap.step(deadline, LONGEST_STEP):
                decoded = decode_or_none(state, decode)
                if decoded is not None:
                    yield decoded


def decode_or_none(state: StateMessage, decode: Callable[[StateMessage], Meta]) -> Optional[Meta]:
    """Return the meta of *state* with its id, or log a warning and return ``None``."""
    try:
        return {"task_id": state.id, **decode(state)}
    except UNREADABLE as exc:
        leave_out(state, exc)
        return None


def leave_out(state: StateMessage, exc: Exception) -> None:
    """Log that a watch of everything leaves out *state*."""
    logger.warning("left out the %s of %s: %s", state.state, state.id, exc)
