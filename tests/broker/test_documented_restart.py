"""The reference page's statements about restarts: durable, transient, persistent."""

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

    The queue holds a persistent and a transient message. All tests share one restart.
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


def test_a_durable_exchange_survives_a_restart(restarted: Restarted) -> None:
    entities, durable, _, _ = restarted
    assert entities.has_exchange(durable)


def test_a_transient_exchange_is_removed_by_a_restart(
    restarted: Restarted, node: rabbitmq.Node
) -> None:
    entities, _, transient, _ = restarted
    # Except where RabbitMQ keeps its metadata in Khepri, as it always does since 4.3: there a
    # transient exchange stays until it is deleted.
    kept = node.eval("rabbit_feature_flags:is_enabled(khepri_db).") == "true"
    assert entities.has_exchange(transient) is kept


def test_only_persistent_messages_survive_a_restart(restarted: Restarted) -> None:
    entities, _, _, queue = restarted
    assert bodies(kombu.Queue(queue.name)(entities.channel())) == ["persistent"]
