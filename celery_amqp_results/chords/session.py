"""One connection of a leader: it consumes the plan queues and the pushed states."""

from __future__ import annotations

import time
from typing import Iterable, Protocol

import amqp
from amqp import exceptions as amqp_errors
from amqp import spec

from celery_amqp_results.amqp import connections
from celery_amqp_results.amqp.declarations import Declarations, declare_queue
from celery_amqp_results.chords.workers import bell
from celery_amqp_results.protocol.names import PLAN_QUEUES
from celery_amqp_results.toolkit.sockets import WakeUp

__all__ = ("Handler", "Session")

#: Seconds between heartbeats. The broker delivers the plans of a frozen or unreachable leader to
#: another one after twice that.
HEARTBEAT = 10.0

#: The most open plans of one queue; the broker accepts no larger prefetch.
MAX_OPEN = 65535

#: Seconds after which open plans are requeued and redelivered. The broker closes the channel of a
#: consumer that holds a message for too long, by default for 30 minutes.
RETAKE_SECONDS = 600.0


class Handler(Protocol):
    """What a session needs of the service that owns it."""

    #: Whether this process has met a chord: then the plan queues are declared.
    met: bool

    @property
    def holds(self) -> bool:
        """Whether any plan or amendment is not acknowledged."""

    @property
    def finished(self) -> bool:
        """Whether the session must end."""

    def on_plan(self, message: amqp.Message) -> bool:
        """Take in a message of a plan queue; return whether no leader can read it."""

    def on_state(self, message: amqp.Message) -> None:
        """Take in a pushed state."""

    def perform(self, session: Session, now: float) -> float:
        """Carry out the actions of the leader; return when it is due again."""

    def requeued(self) -> None:
        """Note that all open plans will be delivered again."""


class Session:
    """A connection with its queue declared, and all queues consumed.

    Parameters:
        wake_up: ends a wait of :meth:`lead`.

    Raises:
        BackendUnavailable, DeclarationRefused: when the broker cannot be reached or refuses us.
        amqp.AMQPError, OSError: when the connection is lost, here and in all methods.
    """

    def __init__(
        self,
        connector: connections.Connector,
        declarations: Declarations,
        handler: Handler,
        wake_up: WakeUp,
    ) -> None:
        self._connector = connector
        self._declarations = declarations
        self._handler = handler
        self._wake_up = wake_up
        self._topology = declarations.topology
        #: Whether plan queues exist.
        self.found = False
        #: Whether the connection is known to be lost, or was closed.
        self.dropped = False
        self._retake_at = time.monotonic() + RETAKE_SECONDS
        self.link = connector.open_once(HEARTBEAT, purpose="chords")
        try:
            self._set_up()
        except BaseException:
            self.drop()
            raise

    def _set_up(self) -> None:
        self.channel = self.link.channel()
        declare = self._handler.met and self._declarations.declare
        if not declare:
            present = self._present()
            if not present:
                return
            self._handler.met = True
            # They are declared together. So the permission to declare them again is needed only
            # if one was deleted.
            declare = present <= PLAN_QUEUES
            if declare and not self._declarations.declare:
                return
        if declare:
            self._declarations.ensure_exchange(self.channel)
            for number in range(PLAN_QUEUES):
                declare_queue(self.channel, self._topology.plan_queue(number))
        self.found = True
        self.queue = str(
            self.channel.queue_declare(
                "",
                durable=False,
                exclusive=True,
                auto_delete=True,
                arguments={"x-queue-type": "classic"},
            ).queue
        )
        self.channel.basic_consume(
            self.queue, no_ack=True, callback=self._handler.on_state, on_cancel=self._on_cancel
        )
        self.channel.basic_qos(0, MAX_OPEN, False)
        for number in range(PLAN_QUEUES):
            self.channel.basic_consume(
                self._topology.plan_queue(number).name,
                callback=self._on_plan,
                on_cancel=self._on_cancel,
            )

    def _present(self) -> int:
        """Return how many plan queues, and the exchange after them, exist up to the first gap."""
        channel, present = self.link.channel(), 0
        try:
            for number in range(PLAN_QUEUES):
                channel.queue_declare(self._topology.plan_queue(number).name, passive=True)
                present += 1
            channel.exchange_declare(self._topology.exchange, "topic", passive=True)
            present += 1
        except amqp_errors.NotFound:
            return present
        channel.close()
        return present

    def _on_plan(self, message: amqp.Message) -> None:
        if self._handler.on_plan(message):
            self.channel.basic_ack(message.delivery_tag)

    def _on_cancel(self, consumer_tag: str) -> None:
        raise amqp_errors.ConsumerCancelled("a queue of the chord leader was deleted", (60, 30))

    def bind(self, number: int) -> None:
        """Bind the states of the chords in plan queue *number*."""
        topology = self._topology
        self.channel.queue_bind(self.queue, topology.exchange, topology.plan_binding(number))

    def acknowledge(self, deliveries: Iterable[int]) -> None:
        """Acknowledge *deliveries*."""
        with self.link.corked():
            for delivery in deliveries:
                self.channel.basic_ack(delivery)

    def lead(self) -> None:
        """Lead until the service is closed or the connection is lost, which raises an error."""
        if not self.found:
            return
        handler, link = self._handler, self.link
        reader = bell.reader()
        # Drained so that it does not fill up; that a chord was met is already known.
        sources = [link.socket] if reader is None else [link.socket, reader]
        next_tick = 0.0
        while not handler.finished:
            now = time.monotonic()
            pause = min(link.idle_time(), handler.perform(self, now) - now)
            ready = self._wake_up.wait(max(0.0, pause), *sources)
            if reader in ready:
                bell.drain()
            if link.socket in ready:
                link.drain(0.0)
            while link.buffered():
                link.drain(0.0)
            if now >= next_tick:
                self._retake(now)
                link.tick()
                next_tick = now + HEARTBEAT / 4

    def _retake(self, now: float) -> None:
        """Have open plans redelivered, so that none is held for too long."""
        if self._handler.holds and now >= self._retake_at:
            # All messages that come before the answer are redelivered.
            self.channel.send_method(spec.Basic.Recover, "b", (True,), wait=spec.Basic.RecoverOk)
            self._handler.requeued()
        if not self._handler.holds or now >= self._retake_at:
            self._retake_at = now + RETAKE_SECONDS

    def close(self) -> None:
        """Close the connection with the protocol's handshake."""
        # Helpers send no more bodies: the next leader is given the plans.
        self.dropped = True
        self.link.close()

    def drop(self) -> None:
        """Close the socket without a handshake."""
        self.dropped = True
        self.link.drop()
        self._connector.mark_host_failed(self.link)
