"""``AMQPBackend.Queue``: the queue that never caches its declaration."""

from __future__ import annotations

import kombu

from celery_amqp_results import AMQPBackend
from celery_amqp_results.per_task.wire import NoCacheQueue
from tests.broker.conftest import Entities, bodies


def test_queue_is_an_alias_of_no_cache_queue() -> None:
    assert AMQPBackend.Queue is NoCacheQueue
    assert issubclass(NoCacheQueue, kombu.Queue)


def test_a_declaration_is_never_cached(entities: Entities) -> None:
    producer = AMQPBackend.Producer(entities.connection())
    queue = entities.queue()
    assert queue.can_cache_declaration is False
    assert queue(producer.channel).can_cache_declaration is False
    # Given a queue that was declared, and deleted behind the producer's back
    producer.publish(1, routing_key=queue.name, declare=[queue])
    entities.connection().channel().queue_delete(queue.name)
    assert not entities.has_queue(queue)
    # When it is declared again on the same connection
    producer.publish(2, routing_key=queue.name, declare=[queue])
    # Then it exists again
    assert bodies(queue(producer.channel)) == [2]


def test_the_declaration_of_a_plain_queue_is_cached(entities: Entities) -> None:
    # The contrast to the test above: kombu's own queue behaves like this.
    producer = AMQPBackend.Producer(entities.connection())
    queue = kombu.Queue(entities.queue().name)
    producer.publish(1, routing_key=queue.name, declare=[queue])
    entities.connection().channel().queue_delete(queue.name)
    producer.publish(2, routing_key=queue.name, declare=[queue])
    assert not entities.has_queue(queue)
