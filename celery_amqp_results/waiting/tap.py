"""A tap: a queue of its own on the exchange that receives a copy of every state.

It begins when it is opened and keeps nothing.
"""

from __future__ import annotations

import logging
import time
from typing import Collection, List, Optional, Protocol, runtime_checkable

import amqp

from celery_amqp_results import errors
from celery_amqp_results.amqp import connections
from celery_amqp_results.amqp.declarations import Declarations
from celery_amqp_results.amqp.failures import TRANSIENT, is_refusal
from celery_amqp_results.amqp.link import Link
from celery_amqp_results.feed.pushed import PushedStates
from celery_amqp_results.protocol.message import STATE, StateMessage
from celery_amqp_results.toolkit.forks import Process
from celery_amqp_results.toolkit.retry import Retry, time_left
from celery_amqp_results.toolkit.sockets import WakeUp
from celery_amqp_results.waiting.progress import Newest

__all__ = ("FORKED", "MAX_QUEUED", "Tap", "tap_of")

logger = logging.getLogger(__name__)

#: Seconds between heartbeats on the connection of a tap. They are answered when the watcher asks
#: for the next state, so it may spend about twice this time on one.
HEARTBEAT = 60.0

#: The most states in the queue of a tap. Beyond that the oldest are dropped.
MAX_QUEUED = 1_000_000

#: The most tasks whose last state is remembered.
MAX_REMEMBERED = 20_000

#: The message of an error.
FORKED = "a watch was begun before a fork and goes on in the child: begin it in the child"


@runtime_checkable
class Tappable(Protocol):
    """A layout in which the states of all tasks come by at one place."""

    def tap(self, wanted: Optional[Collection[str]] = None) -> Tap:
        """Return a tap of all states, or of the *wanted* ones."""


def tap_of(layout: object, wanted: Optional[Collection[str]] = None) -> Tap:
    """Return a tap of all states, or of the *wanted* ones.

    Raises:
        Unsupported: where the layout has no tap.
    """
    if not isinstance(layout, Tappable):
        raise errors.Unsupported(
            "the layout 'per-task' has no place where the states of all tasks come by; watch given "
            "tasks, or use the layout 'shared' on RabbitMQ"
        )
    return layout.tap(wanted)


class Tap:
    """Every state that is published on the exchange, while it is open.

    It owns a connection with one exclusive queue, which is deleted with it. After a lost connection
    it opens another; states published in between are missed.

    Parameters:
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
        self._pushed = PushedStates(declarations.topology, logger)
        self._opened = False
        self._shut = False
        self._process = Process()
        self._newest = Newest(MAX_REMEMBERED)
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
        if link is not None and self._process.is_current:
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
        if not self._process.is_current:
            raise RuntimeError(FORKED)
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
        state = self._pushed.read(message)
        if state is None or state.kind != STATE:
            return
        if self._wanted is None or state.state in self._wanted:
            self._arrived.append(state)


def _on_cancel(consumer_tag: str) -> None:
    raise amqp.exceptions.ConsumerCancelled("the queue of a watcher was deleted", (60, 30))
