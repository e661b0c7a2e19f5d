"""What the reference page says of restarts of the server: durable, transient, persistent."""

from __future__ import annotations

from typing import Iterator, Optional, Tuple

import kombu
import pytest

from celery_amqp_results import AMQPBackend
from tests.broker.conftest import Entities, bodies
from tools import rabbitmq


@pytest.fixture(scope="module")
def restarted(
    _session_node: Optional[rabbitmq.Node],
) -> Iterator[Tuple[Entities, kombu.Exchange, kombu.Exchange, kombu.Queue]]:
    """A durable and a transient exchange, and a queue, declared before a restart.

    The queue was given a persistent and a transient message. One restart is for all tests.
    """
    if _session_node is None:
        pytest.skip("the broker of AMQP_URL is not ours to control")
    entities = Entities(_session_node.url())
    connection = entities.connection()
    channel = connection.channel()
    durable, transient = entities.exchange(), entities.exchange(durable=False)
    queue = entities.declared_queue(channel)
    producer = AMQPBackend.Producer(channel)
    for exchange in (durable, transient):
        producer.maybe_declare(exchange)
    for mode in ("persistent", "transient"):
        producer.publish(mode, routing_key=queue.name, delivery_mode=mode)
    entities.until_ready(queue, 2)
    connection.release()
    _session_node.restart()
    yield entities, durable, transient, queue
    entities.close()


Restarted = Tuple[Entities, kombu.Exchange, kombu.Exchange, kombu.Queue]


def test_a_durable_exchange_is_there_after_a_restart(restarted: Restarted) -> None:
    entities, durable, _, _ = restarted
    assert entities.has_exchange(durable)


def test_a_transient_exchange_is_purged_by_a_restart(
    restarted: Restarted, node: rabbitmq.Node
) -> None:
    entities, _, transient, _ = restarted
    # Not where RabbitMQ keeps what is declared in Khepri, as from 4.3 on it always does: a
    # transient exchange is there until it is deleted then.
    kept = node.eval("rabbit_feature_flags:is_enabled(khepri_db).") == "true"
    assert entities.has_exchange(transient) is kept


def test_of_the_messages_the_persistent_ones_are_preserved(restarted: Restarted) -> None:
    entities, _, _, queue = restarted
    assert bodies(kombu.Queue(queue.name)(entities.channel())) == ["persistent"]
