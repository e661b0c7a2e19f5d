"""A model of one RabbitMQ queue, as far as reading and packing a shard depend on it.

Messages are delivered first in, first out, and a returned message goes back to its place. Consumers
stand in line, and only the first one receives messages: all there are, without asking. Delivered
messages stay with the consumer until it acknowledges them or its channel is closed. Then all of
them are returned in one step, and delivered to the next consumer in line. Expired messages are
dropped when they would be delivered.

Each action of a client is an *operation*. A hook is called between any two operations; it may let
other clients act, or kill the client.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
from typing import Any, Callable, Deque, Dict, Iterator, List, Optional

import amqp
from amqp import spec

from celery_amqp_results.amqp.confirm_log import Publication, Status


class Killed(Exception):
    """Raised in a client that has been killed."""


class Clock:
    """Stands for the module ``time``: advances on request, and a little with each reading."""

    def __init__(self) -> None:
        self.microseconds = 1_700_000_000_000_000

    def now(self) -> int:
        """Return microseconds since 1970, never the same twice."""
        self.microseconds += 1
        return self.microseconds

    def time_ns(self) -> int:
        return self.microseconds * 1000

    def monotonic(self) -> float:
        return self.microseconds / 1e6


@dataclasses.dataclass(eq=False)
class Entry:
    """A message in the queue."""

    position: int
    properties: Dict[str, Any]
    body: bytes
    #: When it expires, in microseconds since 1970, or ``None``.
    expires: Optional[int]
    redelivered: bool = False


class Queue:
    """The queue."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._position = 0
        self.ready: List[Entry] = []
        self.consumers: List[Channel] = []

    def publish(self, properties: Dict[str, Any], body: bytes) -> None:
        self._position += 1
        expires = None
        if properties.get("expiration") is not None:
            milliseconds = int(properties["expiration"])
            assert 0 <= milliseconds < 2**32, "RabbitMQ refuses this expiration"
            expires = self.clock.microseconds + milliseconds * 1000
        self.ready.append(Entry(self._position, dict(properties), body, expires))
        self.dispatch()

    def dispatch(self) -> None:
        """Deliver all messages to the first consumer in line."""
        if not self.consumers:
            return
        for entry in self.ready:
            if entry.expires is None or self.clock.microseconds < entry.expires:
                self.consumers[0].take(entry)
        self.ready = []

    def put_back(self, entries: List[Entry]) -> None:
        for entry in entries:
            entry.redelivered = True
            positions = [ready.position for ready in self.ready]
            self.ready.insert(bisect.bisect_right(positions, entry.position), entry)

    def leave(self, channel: Channel) -> None:
        """Remove a consumer from the line, and return its messages."""
        if channel in self.consumers:
            self.consumers.remove(channel)
            self.put_back(list(channel.held.values()))
            channel.held.clear()
            channel.coming.clear()
            self.dispatch()


class Channel:
    """A channel of a client, with at most one consumer."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._queue = link.queue
        #: ``None`` when closed, as with py-amqp.
        self.connection: Optional[Link] = link
        self._callback: Callable[[amqp.Message], None] = lambda message: None
        #: What its consumer asked for.
        self.prefetch = 0
        self.arguments: Dict[str, Any] = {}
        self._tag = 0
        #: Delivered and unacknowledged messages, by delivery tag.
        self.held: Dict[int, Entry] = {}
        #: Tags of messages on their way to the client.
        self.coming: Deque[int] = collections.deque()

    def send_method(self, method: Any, *arguments: Any) -> None:
        self._link.operation()
        if method == spec.Channel.Close:
            self.connection = None
            self._queue.leave(self)
        else:
            assert method == spec.Basic.Qos
            _, (_, self.prefetch, _) = arguments

    def basic_consume(self, queue: str, **options: Any) -> None:
        self._link.operation()
        assert not options["no_ack"]
        self._callback, self.arguments = options["callback"], options["arguments"]
        self._queue = self._link.find(queue)
        self._queue.consumers.append(self)
        self._queue.dispatch()

    def basic_publish(self, message: amqp.Message, routing_key: str) -> None:
        self._link.operation()
        self._link.find(routing_key).publish(message.properties, message.body)

    def basic_ack(self, tag: int) -> None:
        self._link.operation()
        del self.held[tag]

    def take(self, entry: Entry) -> None:
        self._tag += 1
        self.held[self._tag] = entry
        self.coming.append(self._tag)

    def lose(self) -> None:
        """Return all messages that the channel holds to the queue."""
        self._queue.leave(self)

    def receive(self) -> None:
        """Let the client handle one message."""
        tag = self.coming.popleft()
        entry = self.held[tag]
        message = amqp.Message(entry.body, **entry.properties)
        message.delivery_info = {"delivery_tag": tag, "redelivered": entry.redelivered}
        self._callback(message)


class ConfirmChannel:
    """The part of :class:`celery_amqp_results.amqp.confirms.ConfirmChannel` that packing uses."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def publish(self, publication: Publication) -> None:
        self._link.operation()
        message = publication.message
        self._link.find(message.queue).publish(dict(message.properties), message.body)

    def wait(self, publications: Any, end: Any = None) -> None:
        # The reader receives messages while it waits for its confirms.
        self._link.operation()
        while self._link.drain(0.0):
            pass
        for publication in publications:
            publication.status = Status.CONFIRMED


class Link:
    """A connection of a client.

    Parameters:
        queue: the only queue, unless :meth:`find` is overridden.
        between: called before each operation; raises :class:`Killed` to kill the client.
    """

    blocked = None
    #: The broker answered the opening of a channel.
    frames_received = 0

    def __init__(self, queue: Queue, between: Callable[[], None]) -> None:
        self.queue = queue
        self.between = between
        self.publishing = ConfirmChannel(self)
        self._channels: List[Channel] = []
        self.dead = False

    def find(self, name: str) -> Queue:
        """Return the queue of that name."""
        return self.queue

    def operation(self) -> None:
        if not self.dead:
            self.between()
        if self.dead:
            raise Killed

    def channel_nowait(self, on_close: Any) -> Channel:
        self._channels.append(Channel(self))
        self.frames_received += 1
        return self._channels[-1]

    def has_room(self) -> bool:
        """Return whether another channel may be opened."""
        return True

    @contextlib.contextmanager
    def corked(self) -> Iterator[None]:
        # The broker processes one after the other, and possibly only the first.
        yield

    def drain(self, timeout: float) -> bool:
        for channel in self._channels:
            if channel.coming:
                channel.receive()
                return True
        self.queue.clock.microseconds += int(min(timeout, 60.0) * 1e6)
        return False

    def tick(self) -> None:
        """Do nothing: there are no heartbeats."""

    def die(self) -> None:
        """Kill the client: all messages that it holds are returned."""
        self.dead = True
        self.lose_channels()

    def lose_channels(self) -> None:
        """Return all messages that its channels hold."""
        for channel in self._channels:
            channel.lose()
