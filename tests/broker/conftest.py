"""Fixtures of the tests that need a broker."""

from __future__ import annotations

import socket
import time
import uuid
from typing import Any, Callable, Dict, Iterator, List

import kombu
import pytest
from amqp import exceptions as amqp_errors

from celery_amqp_results import AMQPBackend
from tests.conftest import PATIENCE, connect, raw_connection


class Entities:
    """Connections to a broker, with exchanges and queues that have random names.

    The exchanges and queues are of the backend's own classes, so these are what the tests cover.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.connections: List[kombu.Connection] = []
        self.exchanges: List[str] = []
        self.queues: List[str] = []

    def connection(self, **options: Any) -> kombu.Connection:
        """Return a new connection, which is released after the test."""
        connection = connect(self.url, **options)
        self.connections.append(connection)
        return connection

    def channel(self) -> Any:
        """Return a channel on a new connection."""
        return self.connection().channel()

    def exchange(self, type: str = "", **options: Any) -> kombu.Exchange:
        """Return an exchange that is not declared and not bound to a channel."""
        self.exchanges.append(f"documented-{uuid.uuid4().hex}")
        return AMQPBackend.Exchange(self.exchanges[-1], type, **options)

    def queue(self, exchange: Any = None, routing_key: str = "", **options: Any) -> kombu.Queue:
        """Return a queue that is not declared and not bound to a channel."""
        self.queues.append(f"documented-{uuid.uuid4().hex}")
        return AMQPBackend.Queue(self.queues[-1], exchange, routing_key, **options)

    def declared_queue(self, channel: Any, *arguments: Any, **options: Any) -> kombu.Queue:
        """Return a queue that is declared."""
        queue = self.queue(*arguments, **options)(channel)
        queue.declare()
        return queue

    def has_exchange(self, exchange: kombu.Exchange) -> bool:
        """Return whether the broker has it."""
        with raw_connection(self.url) as connection:
            try:
                # A passive declaration does not compare the type.
                connection.channel().exchange_declare(exchange.name, "direct", passive=True)
            except amqp_errors.NotFound:
                return False
            return True

    def has_queue(self, queue: kombu.Queue) -> bool:
        """Return whether the broker has it."""
        with raw_connection(self.url) as connection:
            try:
                connection.channel().queue_declare(queue.name, passive=True)
            except amqp_errors.NotFound:
                return False
            return True

    def until_ready(self, queue: kombu.Queue, count: int, timeout: float = PATIENCE) -> None:
        """Return when *count* messages wait in a queue; fail after *timeout* seconds."""
        deadline = time.monotonic() + timeout
        while True:
            # The broker answers this before it has processed what was published earlier.
            found = queue.channel.queue_declare(queue.name, passive=True).message_count
            if found == count:
                return
            if time.monotonic() >= deadline:
                pytest.fail(f"{found} messages wait, not {count}")
            time.sleep(0.01)

    def close(self) -> None:
        """Release the connections and delete what was declared."""
        for connection in self.connections:
            connection.release()
        with raw_connection(self.url) as connection:
            channel = connection.channel()
            # Deleting what does not exist is no error.
            for name in self.queues:
                channel.queue_delete(name)
            for name in self.exchanges:
                channel.exchange_delete(name)


@pytest.fixture
def entities(amqp_url: str) -> Iterator[Entities]:
    """Makes connections, exchanges and queues, and cleans up after them."""
    entities = Entities(amqp_url)
    yield entities
    entities.close()


def drain(
    connection: kombu.Connection, condition: Callable[[], Any], timeout: float = PATIENCE
) -> None:
    """Drain events until *condition* is true; fail after *timeout* seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            pytest.fail(f"not true within {timeout} s: {condition}")
        try:
            connection.drain_events(timeout=remaining)
        except socket.timeout:
            continue


def bodies(queue: kombu.Queue) -> List[Any]:
    """Take all messages out of a queue and return their bodies."""
    return [message.decode() for message in messages(queue)]


def messages(queue: kombu.Queue) -> List[Any]:
    """Take all messages out of a queue."""
    found: List[Any] = []
    while True:
        message = queue.get(no_ack=True)
        if message is None:
            return found
        found.append(message)


def cut(connection: kombu.Connection) -> None:
    """Make a connection lose the broker, as when a cable is cut."""
    connection.connection.sock.shutdown(socket.SHUT_RDWR)


def version_of(connection: kombu.Connection) -> Any:
    """Return the version of the broker, as (major, minor)."""
    properties: Dict[str, Any] = connection.connection.server_properties
    major, minor = properties["version"].split(".")[:2]
    return int(major), int(minor)
