"""kombu's ``Consumer``, with the documented methods that RabbitMQ does not support.

RabbitMQ answers ``flow(False)``, ``recover()`` without ``requeue`` and a limit in bytes by closing
the whole connection (540, NOT_IMPLEMENTED). Here ``flow`` is implemented in another way. The other
two raise an error before anything is sent, so that the channel stays usable.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import kombu

__all__ = ("Consumer",)


class Consumer(kombu.Consumer):
    """A consumer like kombu's, whose documentation covers the rest.

    Parameters:
        channel: a channel, or a connection, whose default channel is taken.
        queues: a queue, or several, to consume from.
        no_ack: whether messages need no acknowledgement; each queue's own setting by default.
        auto_declare: whether queues are declared at once; true by default.
        callbacks: called in their order with (body, message).
        on_decode_error: called with (message, exception) for a message that cannot be decoded; by
            default the exception is raised.
        on_message: called with the message alone, not decoded, instead of *callbacks*.
        accept: names of serializers or content types that are accepted.
        prefetch_count: first limit of :meth:`qos`.
        tag_prefix: begins the consumer tags.

    Not thread-safe, as its channel is not.
    """

    def __init__(
        self,
        channel: Any,
        queues: Union[Sequence[kombu.Queue], kombu.Queue, None] = None,
        no_ack: Optional[bool] = None,
        auto_declare: Optional[bool] = None,
        callbacks: Optional[List[Callable[[Any, Any], object]]] = None,
        on_decode_error: Optional[Callable[[Any, Exception], object]] = None,
        on_message: Optional[Callable[[Any], object]] = None,
        accept: Optional[Sequence[str]] = None,
        prefetch_count: Optional[int] = None,
        tag_prefix: Optional[str] = None,
    ) -> None:
        # By name: the queues ever consumed from, and with which no_ack.
        self._consumed: Dict[str, Tuple[kombu.Queue, Optional[bool]]] = {}
        # By name: the queues to consume from when the flow is enabled again.
        self._held: Dict[str, Tuple[kombu.Queue, Optional[bool]]] = {}
        self._flowing = True
        super().__init__(
            channel,
            queues,
            no_ack,
            auto_declare,
            callbacks,
            on_decode_error,
            on_message,
            accept,
            prefetch_count,
            tag_prefix,
        )

    def _basic_consume(
        self,
        queue: kombu.Queue,
        consumer_tag: Optional[str] = None,
        no_ack: Optional[bool] = None,
        nowait: bool = True,
    ) -> Any:
        # kombu calls this for each queue, however consuming begins.
        if not self._flowing:
            self._held.setdefault(queue.name, (queue, no_ack))
            return None
        if not self.consuming_from(queue):
            self._consumed[queue.name] = (queue, no_ack)
        return super()._basic_consume(queue, consumer_tag, no_ack, nowait)

    def flow(self, active: bool) -> None:
        """Stop or resume the delivery of messages to this consumer.

        RabbitMQ has no such request. Stopping cancels the consumers of all queues at the broker and
        remembers them; resuming starts them again. Messages already delivered may still be
        acknowledged, but no longer count for the limit of :meth:`qos`. Messages on the way are
        still passed to the callbacks, within this call. While the delivery is stopped,
        :meth:`consume` only remembers the queues, also after :meth:`revive`. Other consumers of the
        channel are not affected.

        Parameters:
            active: ``False`` to stop, ``True`` to resume. Repeated calls do nothing.

        Raises:
            NotImplementedError: for stopping, when a queue would be deleted with its last consumer
                (``auto_delete``); nothing is stopped.
        """
        if bool(active) == self._flowing:
            return
        if active:
            self._flowing = True
            held, self._held = self._held, {}
            for queue, no_ack in held.values():
                self._basic_consume(queue(self.channel), no_ack=no_ack, nowait=False)
            return
        held = {name: each for name, each in self._consumed.items() if self.consuming_from(name)}
        for name, (queue, _) in held.items():
            if queue.auto_delete:
                raise NotImplementedError(
                    "RabbitMQ cannot stop the delivery to a consumer; ending the consumer instead "
                    f"would delete the queue {name!r}, which is auto_delete, with all its "
                    "messages. Nothing was stopped. Use qos(prefetch_count=...), and acknowledge "
                    "when more may come"
                )
        # First, since messages may come meanwhile, and their callbacks may call this as well.
        self._flowing = False
        self._held = held
        super().cancel()

    def cancel(self) -> None:
        """Cancel the consumers of all queues; messages already delivered may be acknowledged."""
        self._held.clear()
        self._consumed.clear()
        super().cancel()

    close = cancel

    def cancel_by_queue(self, queue: Union[kombu.Queue, str]) -> None:
        """Cancel the consumer of one queue, given by name or itself."""
        name = queue if isinstance(queue, str) else queue.name
        self._held.pop(name, None)
        self._consumed.pop(name, None)
        super().cancel_by_queue(queue)

    def revive(self, channel: Any) -> None:
        """Resume on another channel after the connection was lost.

        Declares the queues, sets the first limit of :meth:`qos`, and consumes again from the same
        queues.

        Parameters:
            channel: the channel, or a connection, whose default channel is taken.
        """
        before = {name: each for name, each in self._consumed.items() if self.consuming_from(name)}
        super().revive(channel)
        # kombu before 5.7 does not resume consuming.
        for queue in self.queues:
            if queue.name in before:
                self._basic_consume(queue, no_ack=before[queue.name][1], nowait=False)

    def qos(
        self, prefetch_size: int = 0, prefetch_count: int = 0, apply_global: bool = False
    ) -> Any:
        """Limit the messages that are delivered in advance of acknowledgements.

        Parameters:
            prefetch_size: not supported by RabbitMQ; 0, for no limit in bytes.
            prefetch_count: how many messages; 0 for no limit.
            apply_global: whether the limit is for all consumers of the channel together, and not
                for each one that is begun later. Since RabbitMQ 4.3 it is for each in any case.

        Raises:
            NotImplementedError: when *prefetch_size* is not 0; nothing is sent.
        """
        if prefetch_size:
            raise NotImplementedError(
                f"a limit in bytes, prefetch_size={prefetch_size!r}, is not supported by RabbitMQ, "
                "which would close the connection; nothing was sent. Use prefetch_count"
            )
        return super().qos(0, prefetch_count, apply_global)

    def recover(self, requeue: bool = False) -> Any:
        """Requeue all unacknowledged messages of the channel.

        Parameters:
            requeue: must be true: the messages go back to their queues, whose other consumers may
                get them. RabbitMQ cannot redeliver them to this consumer alone.

        Raises:
            NotImplementedError: when *requeue* is false; nothing is sent.
        """
        if not requeue:
            raise NotImplementedError(
                "recover() without requeue is not supported by RabbitMQ, which would close the "
                "connection; nothing was sent. Use recover(requeue=True), which puts the messages "
                "back into their queues: where this is the only consumer, it gets them again"
            )
        return super().recover(requeue=True)
