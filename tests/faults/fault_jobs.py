"""Functions that fault tests run in other processes, see :mod:`tests.subprocesses`."""

from __future__ import annotations

import os
import time
from typing import Any, Dict, List

from celery import Celery

from celery_amqp_results.amqp.confirms import ConfirmChannel
from celery_amqp_results.store import lookup as store_module
from celery_amqp_results.store.checkout import PREFETCH, Checkout, Limits
from tests.subprocesses import hear, say


def hold_shard(app: Celery, shard: int) -> int:
    """Check a shard out, say so, and read on when told; return the number of messages seen."""
    layout = app.backend.layout
    queue = app.backend.config.topology.shard_queue_name(shard)
    with layout.store._pool.link() as link:
        checkout = Checkout(link, queue, lambda message: None, Limits(PREFETCH, {}))
        deadline = time.monotonic() + 60
        while not checkout.fenced and time.monotonic() < deadline:
            link.drain(1.0)
        say("holding")
        hear()
        checkout.close(wait=True)
        return checkout.seen


#: Points between two operations on the broker at which a packing reader can die.
CRASH_POINTS = ("before the page", "after the page", "before the acknowledgements", "half of them",
                "after the acknowledgements")  # fmt: skip


def die_while_packing(app: Celery, task_id: str, point: str) -> None:
    """Look a task up in a shard that is due for packing, and die at *point*."""

    def die() -> None:
        os._exit(9)

    publish, wait, acknowledge = ConfirmChannel.publish, ConfirmChannel.wait, Checkout.acknowledge

    def dying_publish(self: Any, message: Any) -> None:
        if point == "before the page":
            die()
        publish(self, message)

    def dying_wait(self: Any, tags: Any, deadline: Any) -> None:
        wait(self, tags, deadline)
        if point == "after the page":
            die()

    def dying_acknowledge(self: Any, tags: Any) -> None:
        tags = list(tags)
        if point == "before the acknowledgements":
            die()
        acknowledge(self, tags[: len(tags) // 2] if point == "half of them" else tags)
        if point == "half of them":
            # The written bytes are already on their way to the broker.
            self.channel.queue_declare(self.queue, passive=True)
            die()
        if point == "after the acknowledgements":
            die()

    for owner, method in (
        (ConfirmChannel, dying_publish),
        (ConfirmChannel, dying_wait),
        (Checkout, dying_acknowledge),
    ):
        setattr(owner, method.__name__[len("dying_") :], method)
    store_module.PACK_SECONDS = 10.0
    state = app.AsyncResult(task_id).state
    raise AssertionError(f"nothing was packed, the state is {state}")


def read_all_the_time(app: Celery, expected: Dict[str, Any], seconds: float) -> List[str]:
    """Look all tasks up repeatedly, one by one; return the wrong answers."""
    wrong = []
    end = time.monotonic() + seconds
    say("reading")
    while time.monotonic() < end:
        for task_id, value in expected.items():
            meta = app.backend._get_task_meta_for(task_id)
            if (meta["status"], meta["result"]) != ("SUCCESS", value):
                wrong.append(f"{task_id}: {meta['status']} {meta['result']!r}")
    return wrong
