"""Look-ups work on a hosted plan, with the settings that docs/hosted.md gives."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from typing import Any, Dict, Iterator, Optional

import pytest
from celery import Celery, states

from celery_amqp_results import errors
from tests.broker.helpers import new_id, until_stored
from tests.conftest import Apps
from tools import rabbitmq
from tools.proxy import Proxy

#: Shared plans close a connection with more unacknowledged messages.
LIMIT = 1000

_DELIVER, _ACK = (60, 60), (60, 80)
_CLOSE_CHANNEL = (20, 40)
_METHOD, _FRAME_END = 1, 1


class Plan(Proxy):
    """Resets a connection that has more than ``LIMIT`` unacknowledged messages."""

    def __init__(self, target: int) -> None:
        super().__init__(target)
        #: The largest number of unacknowledged messages on a connection, and what was closed.
        self.largest = 0
        self.closed = 0

    async def _pump(self, pair: Any, reader: Any, writer: asyncio.StreamWriter) -> None:
        from_client = writer is pair.server
        counted: Dict[int, Dict[int, None]] = pair.__dict__.setdefault("unacked", {})
        data = await reader.readexactly(8) if from_client else b""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                writer.write(data)
                await writer.drain()
                head = await reader.readexactly(7)
                kind, channel, size = struct.unpack(">BHI", head)
                payload = await reader.readexactly(size + _FRAME_END)
                if kind == _METHOD:
                    self._count(counted, channel, payload)
                    held = sum(map(len, counted.values()))
                    self.largest = max(self.largest, held)
                    if held > LIMIT:
                        self.closed += 1
                        pair.reset(pair.client)
                        pair.reset(pair.server)
                        return
                data = head + payload

    def _count(self, counted: Dict[int, Dict[int, None]], channel: int, payload: bytes) -> None:
        method = struct.unpack_from(">HH", payload)
        tags = counted.setdefault(channel, {})
        if method == _DELIVER:
            at = 5 + payload[4]
            tags[struct.unpack_from(">Q", payload, at)[0]] = None
        elif method == _ACK:
            tag, multiple = struct.unpack_from(">QB", payload, 4)
            for each in [tag] if not multiple else [known for known in tags if known <= tag]:
                tags.pop(each, None)
        elif method == _CLOSE_CHANNEL:
            tags.clear()


@pytest.fixture
def plan(node: rabbitmq.Node) -> Iterator[Plan]:
    """A proxy that closes connections as a shared plan does."""
    with Plan(node.amqp_port) as proxy:
        yield proxy


def store(app: Celery, number: int) -> Optional[str]:
    """Store *number* results; return the id of one of them."""
    task_id = None
    for index in range(number):
        task_id = new_id()
        app.backend.store_result(task_id, index, states.SUCCESS)
    until_stored(app)
    return task_id


def test_a_look_up_works_with_as_many_loose_results_in_a_shard_as_the_page_allows(
    make_app: Apps, plan: Plan
) -> None:
    # Given a shard with nearly as many loose results as the plan allows unacknowledged messages
    writer = make_app("amqp://?shards=1&confirm=false")
    task_id = store(writer, 900)
    reader = make_app(f"{plan.url(make_app.url)}?shards=1")

    # When it is looked up, once while the results are loose and again when they are packed
    for _ in range(3):
        assert reader.backend.get_task_meta(task_id)["result"] == 899

    # Then the plan has closed no connection
    assert plan.closed == 0
    assert 900 <= plan.largest <= LIMIT


def test_a_look_up_in_a_longer_shard_is_a_clear_error_on_such_a_plan(
    make_app: Apps, plan: Plan
) -> None:
    writer = make_app("amqp://?shards=1&confirm=false")
    task_id = store(writer, LIMIT + 100)
    reader = make_app(
        plan.url(make_app.url),
        result_backend_transport_options={
            "shards": 1,
            "lookup_timeout": 2,
            "retry_policy": {"max_retries": 1},
        },
    )
    with pytest.raises(errors.BackendUnavailable):
        reader.backend.get_task_meta(task_id)
    assert plan.closed > 0
