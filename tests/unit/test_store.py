"""Looking states up, as far as it needs no broker."""

from __future__ import annotations

import collections
import contextlib
import json
from typing import Any, Dict, Iterator, List, Optional
from unittest import mock

import pytest

from celery_amqp_results import errors
from celery_amqp_results.options import Options
from celery_amqp_results.protocol import page
from celery_amqp_results.protocol.codec import Codec
from celery_amqp_results.protocol.names import Topology
from celery_amqp_results.store import checkout, shard_read
from celery_amqp_results.store import lookup as store
from tests.unit.broker_model import Clock, ConfirmChannel, Link, Queue
from tests.unit.fakes import state


@pytest.mark.parametrize(
    ("shards", "seconds"),
    [(1, 10.0), (store.PARALLEL, 10.0), (store.PARALLEL + 1, 20.0), (16 * store.PARALLEL, 160.0)],
)
def test_each_shard_has_a_limited_share_of_the_time(shards: int, seconds: float) -> None:
    assert store.lookup_seconds(shards, 10.0) == seconds


# -- long shards -------------------------------------------------------------------------------

#: Seconds that reading a message takes, and confirming a page.
READING = 0.05
CONFIRMING = 0.1

#: Loose results in a shard.
LOOSE = 60


class SlowConfirms(ConfirmChannel):
    """Confirms that take time, and are not awaited past the deadline."""

    def __init__(self, link: Slow) -> None:
        super().__init__(link)
        self._clock = link.queue.clock

    def wait(self, tags: Any, end: Any = None) -> None:
        super().wait(tags, end)
        self._clock.microseconds += int(CONFIRMING * 1e6)
        if self._clock.monotonic() >= end:
            raise errors.NotConfirmed("no confirm")


class Slow(Link):
    """A connection to a broker with several shards, on which every operation takes time."""

    def __init__(self, clock: Clock) -> None:
        self.queues: Dict[str, Queue] = collections.defaultdict(lambda: Queue(clock))
        super().__init__(Queue(clock), lambda: None)
        self.publishing = SlowConfirms(self)

    def find(self, name: str) -> Queue:
        return self.queues[name]

    def drain(self, timeout: float) -> bool:
        came = super().drain(min(timeout, 1.0))
        if came:
            self.queue.clock.microseconds += int(READING * 1e6)
        # Rounding must not stop the clock just before the deadline.
        self.queue.clock.microseconds += 1
        return came


class Shards:
    """Several long shards with loose results."""

    def __init__(self, shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        self.link = Slow(self.clock)
        topology = Topology("t", shards, "classic")
        declarations: Any = mock.Mock(topology=topology)
        codec = Codec("json", ["application/json"])
        pool: Any = mock.Mock()
        pool.link = self._use_link
        self.store = store.Store(pool, declarations, Options(page_size=1000), True, codec.decode)
        monkeypatch.setattr(store, "time", self.clock)
        monkeypatch.setattr(checkout, "time", self.clock)
        monkeypatch.setattr(shard_read, "time", self.clock)
        monkeypatch.setattr(shard_read, "LONG_SHARD", LOOSE)
        #: One id for each shard.
        self.ids: Dict[int, str] = {}
        self.names = {shard: topology.shard_queue_name(shard) for shard in range(shards)}
        kept = dict.fromkeys(range(shards), 0)
        number = 0
        while min(kept.values()) < LOOSE:
            number += 1
            task_id = f"task {number}"
            shard = topology.shard(task_id)
            if kept[shard] < LOOSE:
                kept[shard] += 1
                self.ids[shard] = task_id
                body = json.dumps({"task_id": task_id, "result": "x" * 50}).encode()
                done = state(task_id, body=body)
                self.link.find(self.names[shard]).publish(done.properties(True), done.body)

    @contextlib.contextmanager
    def _use_link(self, end: float) -> Iterator[Link]:
        try:
            yield self.link
        except Exception:
            self.link.lose_channels()
            raise

    def read(self, seconds: float) -> List[str]:
        """Look up one id of each shard within *seconds*, and return those found."""
        self.store.lookup_timeout = seconds
        return self._found(None)

    def read_until(self, seconds: float) -> List[str]:
        """Do the same for a caller that waits no longer than that."""
        return self._found(self.clock.monotonic() + seconds)

    def _found(self, deadline: Optional[float]) -> List[str]:
        found = self.store.read(self.ids.values(), deadline)
        return [task_id for task_id, states in found.items() if states]

    def pages(self) -> int:
        """Return the number of pages."""
        return sum(
            entry.properties.get("type") == page.PAGE
            for name in self.names.values()
            for entry in self.link.find(name).ready
        )


def test_packing_a_long_shard_takes_a_fifth_of_the_time_that_reading_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shards = Shards(1, monkeypatch)
    started = shards.clock.monotonic()
    shards.read(60.0)
    assert shards.pages() > 1
    reading = LOOSE * READING
    spent = shards.clock.monotonic() - started
    # One more page may be in flight when the time is over; it comes back, before the fence.
    assert spent < reading * (1 + shard_read.LONG_PACK_SHARE) + 2 * CONFIRMING + 20 * READING


def test_packing_a_long_shard_ends_before_the_look_up_times_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Given a shard whose look-up has almost no time left
    shards = Shards(1, monkeypatch)
    # Then the results are found, and no page is left beside the originals it should replace
    assert shards.read((LOOSE + 2) * READING + 3.5 * CONFIRMING) == list(shards.ids.values())
    entries = shards.link.find(shards.names[0]).ready
    assert len(entries) - shards.pages() < LOOSE


def test_one_page_is_packed_even_if_selecting_takes_all_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shards, select = Shards(1, monkeypatch), page.select

    def slow(*given: Any) -> Any:
        shards.clock.microseconds += int(LOOSE * READING * 1e6)
        return select(*given)

    monkeypatch.setattr(page, "select", slow)
    # When selecting what to pack takes as long as reading
    shards.read(60.0)
    # Then one page is packed, and the next reader continues
    assert shards.pages() == 1
    shards.read(60.0)
    assert shards.pages() == 2


def test_a_reader_without_time_for_the_page_to_return_publishes_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Given a short shard, and a caller that waits only until it is read
    shards = Shards(1, monkeypatch)
    monkeypatch.setattr(shard_read, "LONG_SHARD", 10_000)
    for _ in range(3):
        assert shards.read_until((LOOSE + 3) * READING) == list(shards.ids.values())
    # Then the shard does not grow
    assert len(shards.link.find(shards.names[0]).ready) == LOOSE
    # And a reader with enough time packs it
    assert shards.read_until(60.0) == list(shards.ids.values())
    assert len(shards.link.find(shards.names[0]).ready) < LOOSE


def test_packing_does_not_take_the_time_that_other_shards_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Given several long shards that can all be read if nothing else is done
    shards = Shards(4, monkeypatch)
    found = shards.read(4 * (LOOSE + 2) * READING * (1 + shard_read.LONG_PACK_SHARE / 2))
    assert sorted(found) == sorted(shards.ids.values())


def test_packing_time_does_not_multiply_with_the_number_of_shards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shards = Shards(4, monkeypatch)
    started = shards.clock.monotonic()
    shards.read(60.0)
    assert shards.pages() > 1
    reading = 4 * LOOSE * READING
    spent = shards.clock.monotonic() - started
    assert spent < reading * (1 + shard_read.LONG_PACK_SHARE) + 4 * (2 * CONFIRMING + 10 * READING)
