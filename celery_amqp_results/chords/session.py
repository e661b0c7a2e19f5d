"""One connection of a leader: it consumes the plan queues and the pushed states."""

from __future__ import annotations

import time
from typing import Callable, Iterable

import amqp
from amqp import exceptions as amqp_errors
from amqp import spec

from celery_amqp_results.amqp import connections
from celery_amqp_results.amqp.declarations import Declarations, declare_queue
from celery_amqp_results.chords.workers import bell
from celery_amqp_results.protocol.names import PLAN_QUEUES
from celery_amqp_results.toolkit.sockets import WakeUp

__all__ = ("Session",)

#: Seconds between heartbeats. The broker delivers the plans of a frozen or unreachable leader to
#: another one after twice that.
HEARTBEAT = 10.0

#: The most open plans of one queue; the broker accepts no larger prefetch.
MAX_OPEN = 65535

#: Seconds after which open plans are requeued and redelivered. The broker closes the channel of a
#: consumer that holds a message for too long, by default for 30 minutes.
RETAKE_SECONDS = 600.0


class Session:
    """A connection with its queue declared, and all queues consumed.

    Parameters:
        met: whether this process has met a chord: then the plan queues are declared.
        on_plan: takes in a message of a plan queue; returns whether no leader can read it.
        on_state: takes in a pushed state.

    Raises:
        BackendUnavailable, DeclarationRefused: when the broker cannot be reached or refuses us.
        amqp.AMQPError, OSError: when the connection is lost, here and in all methods.
    """

    def __init__(
        self,
        connector: connections.Connector,
        declarations: Declarations,
        met: bool,
        on_plan: Callable[[amqp.Message], bool],
        on_state: Callable[[amqp.Message], None],
    ) -> None:
        self._connector = connector
        self._declarations = declarations
        self._take_plan = on_plan
        self._take_state = on_state
        self._topology = declarations.topology
        #: Whether chords are known to exist.
        self.met = met
        #: Whether plan queues exist.
        self.found = False
        #: Whether the connection is known to be lost, or was closed.
        self.dropped = False
        self._retake_at = time.monotonic() + RETAKE_SECONDS
        self._tick_at = 0.0
        self.link = connector.open_once(HEARTBEAT, purpose="chords")
        try:
            self._set_up()
        except BaseException:
            self.drop()
            raise

    def _set_up(self) -> None:
        self.channel = self.link.channel()
        declare = self.met and self._declarations.declare
        if not declare:
            present = self._present()
            if not present:
                return
            self.met = True
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
            self.queue, no_ack=True, callback=self._take_state, on_cancel=self._on_cancel
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
        if self._take_plan(message):
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

    def receive(self, pause: float, wake_up: WakeUp) -> None:
        """Wait at most *pause* seconds for messages, and take them in."""
        link, reader = self.link, bell.reader()
        sources = [link.socket] if reader is None else [link.socket, reader]
        ready = wake_up.wait(max(0.0, min(link.idle_time(), pause)), *sources)
        if reader in ready:
            # So that it does not fill up; that a chord was met is already known.
            bell.drain()
        if link.socket in ready:
            link.drain(0.0)
        while link.buffered():
            link.drain(0.0)

    def tick(self, now: float, holds: bool) -> bool:
        """Send heartbeats; return whether all open plans will be redelivered.

        That is done if the leader *holds* plans, so that none is held for too long.
        """
        if now < self._tick_at:
            return False
        self._tick_at = now + HEARTBEAT / 4
        self.link.tick()
        retake = holds and now >= self._retake_at
        if retake:
            # All messages that come before the answer are redelivered.
            self.channel.send_method(spec.Basic.Recover, "b", (True,), wait=spec.Basic.RecoverOk)
        if retake or not holds:
            self._retake_at = now + RETAKE_SECONDS
        return retake

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
