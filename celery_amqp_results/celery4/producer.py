"""kombu's ``Producer`` and ``Exchange``, with the documented features that kombu lacks.

``mandatory`` works in kombu already, although its page calls it "not supported": the broker
returns a message that no queue takes, and ``on_return`` gets it. The differences are these:

- ``immediate`` is an error before anything is sent. RabbitMQ would close the whole connection.
- A producer's exchange is declared at instantiation, as documented, instead of before the first
  message. It may be given by name.
- ``declare`` of :meth:`Producer.publish` may be any sequence. Neither that list nor the caller's
  headers are modified: kombu appends the exchange to the list, and marks the headers as compressed
  for all later messages.
- :meth:`Exchange.publish` accepts bytes and received messages. With kombu before 5.7,
  :meth:`Exchange.Message` accepts a delivery mode.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Union

import kombu
from kombu.entity import maybe_delivery_mode

__all__ = ("Exchange", "Producer")

#: Properties of a received message that are forwarded. ``user_id`` is left out, since the broker
#: accepts only the name of the publishing user.
_FORWARDED = (
    "app_id",
    "cluster_id",
    "correlation_id",
    "delivery_mode",
    "expiration",
    "message_id",
    "reply_to",
    "timestamp",
    "type",
)


def _refuse_immediate(immediate: bool) -> None:
    if immediate:
        raise NotImplementedError(
            "the option 'immediate' is not supported by RabbitMQ, which would close the "
            "connection; nothing was sent. Use 'mandatory' with on_return to learn that no queue "
            "takes a message, or expiration=0 to have it dropped unless a consumer is ready"
        )


class Exchange(kombu.Exchange):
    """An exchange like kombu's, whose documentation covers all parameters and attributes."""

    def Message(
        self,
        body: Any,
        delivery_mode: Union[int, str, None] = None,
        properties: Optional[Mapping[str, object]] = None,
        **kwargs: object,
    ) -> Any:
        """Return a message for :meth:`publish`.

        Parameters:
            body: content; text is sent as UTF-8.
            delivery_mode: 1 or ``transient``, 2 or ``persistent``; that of the exchange by
                default.
            properties: more properties of the message.
            **kwargs: ``priority``, ``content_type``, ``content_encoding`` and ``headers``.
        """
        # kombu before 5.7 ignores delivery_mode.
        mode = maybe_delivery_mode(delivery_mode or self.delivery_mode)
        if isinstance(body, str):
            kwargs.setdefault("content_encoding", "utf-8")
        return self.channel.prepare_message(
            body, properties=dict(properties or {}, delivery_mode=mode), **kwargs
        )

    def publish(
        self,
        message: Any,
        routing_key: Optional[str] = None,
        mandatory: bool = False,
        immediate: bool = False,
        exchange: Optional[str] = None,
    ) -> Any:
        """Publish a message.

        Parameters:
            message: the return value of :meth:`~kombu.Exchange.Message`, a received message, a
                string, which is sent as UTF-8, or bytes.
            routing_key: routing key of the message.
            mandatory: whether the broker returns the message if no queue takes it. The callbacks
                in ``channel.events["basic_return"]`` get it while events are drained; without any
                the drain raises it as an error.
            immediate: not supported by RabbitMQ.
            exchange: name of another exchange to publish to.

        Raises:
            NotImplementedError: when *immediate* is set; nothing is sent.
        """
        _refuse_immediate(immediate)
        if isinstance(message, bytes):
            message = self.Message(message, content_encoding="binary")
        elif isinstance(message, kombu.Message):
            message = self._forwarded(message)
        return super().publish(message, routing_key, mandatory, False, exchange)

    def _forwarded(self, message: Any) -> Any:
        """Return a copy of a received message for sending."""
        properties = {k: v for k, v in message.properties.items() if k in _FORWARDED}
        headers = dict(message.headers)
        if not message.errors:
            # The body was decompressed on arrival.
            headers.pop("compression", None)
        return self.channel.prepare_message(
            message.body,
            message.properties.get("priority"),
            message.content_type,
            message.content_encoding,
            headers,
            properties,
        )


class Producer(kombu.Producer):
    """Sends messages like kombu's producer, whose documentation covers the attributes.

    Parameters:
        channel: a connection or a channel; ``None`` to pass one to :meth:`revive` later.
        exchange: the default exchange of messages. An exchange given by name is never declared,
            since its type is unknown.
        routing_key: the default routing key.
        serializer: kombu's name of a serializer; ``json`` by default.
        auto_declare: whether *exchange* is declared at once, and again before a message that
            follows on a new connection; true by default.
        compression: kombu's name of a compression; none by default.
        on_return: called with (exception, exchange, routing_key, message) for messages that are
            ``mandatory`` and that no queue takes, while events are drained. It is registered with
            the channel, and so it gets the messages of all producers on that channel.

    Raises:
        amqp.exceptions.PreconditionFailed: when the exchange exists with other properties.

    Not thread-safe, as its channel is not.
    """

    def __init__(
        self,
        channel: Any,
        exchange: Union[kombu.Exchange, str, None] = None,
        routing_key: Optional[str] = None,
        serializer: Optional[str] = None,
        auto_declare: Optional[bool] = None,
        compression: Optional[str] = None,
        on_return: Optional[Callable[[Exception, str, str, Any], object]] = None,
    ) -> None:
        if isinstance(exchange, str):
            exchange = Exchange(exchange, no_declare=True)
        super().__init__(
            channel, exchange, routing_key, serializer, auto_declare, compression, on_return
        )
        if channel and self.auto_declare and self.exchange.name:
            self.maybe_declare(self.exchange)

    def maybe_declare(self, entity: Any, retry: bool = False, **retry_policy: object) -> Any:
        """Declare an exchange or a queue, unless that was done on this connection.

        Parameters:
            entity: the entity to declare; ``None`` does nothing.
            retry: whether to connect and try again when the connection is lost.
            **retry_policy: parameters of ``kombu.Connection.ensure``.

        Returns:
            Whether it was declared.
        """
        connection = self.connection if retry else None
        declare = super().maybe_declare
        if connection is None:
            return declare(entity)
        # kombu 5.3's own retry fails for some entities: it does not bind them, or declares them on
        # the lost channel. Reviving the producer works for all.
        return connection.ensure(self, lambda: declare(entity), **retry_policy)()

    def publish(
        self,
        body: Any,
        routing_key: Optional[str] = None,
        delivery_mode: Union[int, str, None] = None,
        mandatory: bool = False,
        immediate: bool = False,
        priority: int = 0,
        content_type: Optional[str] = None,
        content_encoding: Optional[str] = None,
        serializer: Optional[str] = None,
        headers: Optional[Mapping[str, object]] = None,
        compression: Optional[str] = None,
        exchange: Union[kombu.Exchange, str, None] = None,
        retry: bool = False,
        retry_policy: Optional[Dict[str, Any]] = None,
        declare: Optional[Sequence[Any]] = None,
        expiration: Optional[float] = None,
        **properties: object,
    ) -> Any:
        """Publish a message.

        Parameters:
            body: content of the message.
            routing_key: routing key; that of the producer by default.
            delivery_mode: 1 or ``transient``, 2 or ``persistent``; that of the exchange by
                default.
            mandatory: whether the broker returns the message if no queue takes it.
                ``on_return`` is called with (exception, exchange, routing_key, message) while
                events are drained; without one the drain raises the exception.
            immediate: not supported by RabbitMQ.
            priority: 0 to 9.
            content_type: type of a *body* that is already serialized.
            content_encoding: encoding of a *body* that is already serialized.
            serializer: kombu's name of a serializer; that of the producer by default.
            headers: headers of the message.
            compression: kombu's name of a compression; that of the producer by default.
            exchange: another exchange to publish to, which must exist.
            retry: whether to connect and publish again when the connection is lost.
            retry_policy: parameters of ``kombu.Connection.ensure``.
            declare: entities to declare first, unless that was done on this connection.
            expiration: seconds after which the broker drops the message; ``None`` for never.
            **properties: more properties of the message, and ``timeout`` and ``confirm_timeout``
                where kombu has them.

        Raises:
            NotImplementedError: when *immediate* is set; nothing is sent or declared.
        """
        _refuse_immediate(immediate)
        return super().publish(
            body,
            routing_key=routing_key,
            delivery_mode=delivery_mode,
            mandatory=mandatory,
            priority=priority,
            content_type=content_type,
            content_encoding=content_encoding,
            serializer=serializer,
            headers=None if headers is None else dict(headers),
            compression=compression,
            exchange=exchange,
            retry=retry,
            retry_policy=retry_policy,
            declare=None if declare is None else list(declare),
            expiration=expiration,
            **properties,
        )
