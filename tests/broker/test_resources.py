"""No leaks: threads, connections, queues, file descriptors, result objects."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import threading
import time
import weakref
from typing import Any, Callable, List, Set

from celery import Celery, states
from celery.app.task import Context
from celery.result import AsyncResult

from celery_amqp_results.amqp.link import _links
from tests import subprocesses
from tests.broker.helpers import LONG, Waiting, new_id, until_watched
from tests.conftest import Apps
from tools import rabbitmq

RECONNECTS = 100


def threads() -> Set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("celery-results")}


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def use_everything(app: Celery) -> None:
    """Make the backend open everything that it can open."""
    backend = app.backend
    task_id, later = new_id(), new_id()
    backend.store_result(task_id, 1, states.SUCCESS)
    assert app.AsyncResult(task_id).get(timeout=LONG) == 1
    called = threading.Event()
    app.AsyncResult(later).then(lambda result: called.set())
    backend.store_result(later, 2, states.SUCCESS)
    assert called.wait(LONG)
    service = backend.layout.chords.service
    service.start(met=True)
    body = app.signature("tests.body")
    body.freeze()
    group_id, member = new_id(), new_id()
    backend.apply_chord((group_id, [AsyncResult(member, app=app)]), body)
    backend.set_chord_size(group_id, 1)
    backend.mark_as_done(member, 1, Context(id=member, group=group_id, chord=dict(body)))
    deadline = time.monotonic() + LONG
    while service.fired < 1 or service.open:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def use_and_leave(app: Celery) -> None:
    """Use the backend as a program that exits without closing anything."""
    use_everything(app)
    app.backend.close = lambda: None
    app.close = lambda: None


def test_nothing_is_left_after_closing_or_after_the_process_exits(
    make_app: Apps, node: rabbitmq.Node, eventually: Callable[..., Any]
) -> None:
    def on_broker() -> List[str]:
        listed = node.ctl("-q", "list_connections", "pid") + node.ctl("-q", "list_queues", "name")
        return [
            line for line in listed.splitlines()
            if line.startswith(("<", "amq.gen"))
        ]  # fmt: skip

    def nothing_more() -> bool:
        return len(on_broker()) <= len(before)

    before = on_broker()
    # Other tests may have left some queues.
    others = threads()
    app = make_app(shards=1)
    use_everything(app)
    app.backend.close()
    gc.collect()
    base = descriptors()
    # Once more: by now Python has opened everything that it opens on first use
    for _ in range(3):
        use_everything(app)
        assert threads() - others
        app.backend.close()
    eventually(lambda: not threads() - others)
    gc.collect()
    assert descriptors() <= base
    subprocesses.run(app, use_and_leave)
    eventually(nothing_more, 40)


def test_the_number_of_descriptors_is_constant_over_many_reconnects(
    make_app: Apps, eventually: Callable[..., Any]
) -> None:
    app = make_app(shards=1)
    backend = app.backend
    task_id, waited = new_id(), new_id()
    waiting = Waiting(lambda: app.AsyncResult(waited).get(timeout=4 * LONG))
    until_watched(app, waited, eventually)
    inbox = backend.layout.inbox
    counts = []
    lost = 0
    while lost < RECONNECTS:
        backend.store_result(task_id, lost, states.SUCCESS)
        assert backend.layout.store.read([task_id])[task_id]
        until_watched(app, waited, eventually)
        counts.append(descriptors())
        epoch = inbox.connections
        for link in list(_links):
            if link.alive:
                with contextlib.suppress(OSError, AttributeError):
                    link.socket.shutdown(socket.SHUT_RDWR)
                    lost += 1
        eventually(lambda epoch=epoch: inbox.connections > epoch)
    backend.store_result(waited, "end", states.SUCCESS)
    assert waiting.result() == "end"
    assert counts[-1] <= max(counts[:5]) + 3


def test_ten_thousand_results_are_collected_while_locks_are_held(make_app: Apps) -> None:
    app = make_app(shards=1)
    backend = app.backend
    # Given results with and without callbacks, each in a cycle that only the collector can break
    gc.disable()
    try:
        watched = []
        results = [app.AsyncResult(new_id()) for _ in range(10_000)]
        for number, result in enumerate(results):
            if number % 10 == 0:
                result.then(lambda result: None)
                backend.remove_pending_result(result)
            result.circle = result
            watched.append(weakref.ref(result))
        del result, results
        layout = backend.layout
        pending = backend.waits.pending
        assert pending is not None

        # When the collector runs in a thread that holds every lock there is
        def collect() -> int:
            with layout.inbox._changed, pending._lock, layout.publisher._lock:
                return gc.collect()

        assert Waiting(collect).result() >= 8_000
    finally:
        gc.enable()
    # Then those without callbacks are gone
    assert sum(ref() is not None for ref in watched) <= 1_000
    backend.close()
    assert isinstance(app.AsyncResult("x"), AsyncResult)
