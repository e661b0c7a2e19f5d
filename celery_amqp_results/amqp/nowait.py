"""Writing to a channel without waiting for an answer, past py-amqp's methods, which would wait."""

from __future__ import annotations

from typing import Callable, Mapping

import amqp
from amqp import spec

from celery_amqp_results.amqp import frames

__all__ = ("bind", "on_bound", "on_qos", "publish", "qos", "unbind", "write")


def write(connection: amqp.Connection, octets: bytes) -> None:
    """Write whole frames.

    Raises:
        amqp.AMQPError, OSError: when the connection is lost.
    """
    # Celery's own connections would connect again.
    if not connection.connected:
        raise amqp.exceptions.RecoverableConnectionError("the connection is closed")
    connection.transport.write(octets)
    # py-amqp's heartbeats count these bytes.
    connection.bytes_sent += 1


def publish(
    channel: amqp.Channel, exchange: str, key: str, properties: Mapping[str, object], body: bytes
) -> None:
    """Publish a message that need not find a queue.

    On a channel with confirms, ``basic_publish()`` would wait for the confirm.
    """
    connection = channel.connection
    octets = frames.publish_frames(
        channel.channel_id, connection.frame_max, properties, body, (exchange, key, False)
    )
    write(connection, octets)


def on_bound(channel: amqp.Channel, callback: Callable[..., None]) -> None:
    """Call *callback* for each answer to :func:`bind`; they come in order."""
    channel._callbacks[spec.Queue.BindOk] = callback


def bind(channel: amqp.Channel, queue: str, exchange: str, key: str) -> None:
    """Request a binding, see :func:`on_bound`."""
    channel.send_method(spec.Queue.Bind, "BsssbF", (0, queue, exchange, key, False, None))


def unbind(channel: amqp.Channel, queue: str, exchange: str, key: str) -> None:
    """Request that a binding is removed."""
    channel.send_method(spec.Queue.Unbind, "BsssF", (0, queue, exchange, key, None))


def on_qos(channel: amqp.Channel, callback: Callable[[], None]) -> None:
    """Call *callback* for each answer to :func:`qos`; they come in order."""
    channel._callbacks[spec.Basic.QosOk] = callback


def qos(channel: amqp.Channel, prefetch: int = 0) -> None:
    """Request at most *prefetch* deliveries at once, 0 for any number, see :func:`on_qos`."""
    channel.send_method(spec.Basic.Qos, "lBb", (0, prefetch, False))
