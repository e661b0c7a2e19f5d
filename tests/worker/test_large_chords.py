"""Memory of a worker that leads large chords, or many. Their headers are not run, but stored."""

from __future__ import annotations

import os
import re
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest
from celery import Celery, chord
from celery.app.task import Context
from celery.result import AsyncResult

from tests.conftest import LOAD, PATIENCE, Apps, eventually
from tests.worker.chord_tasks import register
from tests.worker.test_chords import plans_left
from tools import rabbitmq

#: Tasks of the large chords.
SIZES = [10_000, 100_000] if LOAD else [1_000]

#: Chords of ten that are open at once.
OPEN = 10_000 if LOAD else 200

#: Kilobytes that any leader may take, with its threads and connections.
BASE = 50_000

LONG = 600.0 if LOAD else PATIENCE


@pytest.fixture(params=["classic", "quorum"] if LOAD else ["classic"])
def app(request: pytest.FixtureRequest, make_app: Apps) -> Celery:
    # Without waiting for confirms, which the leader does not see.
    options = {"queue_type": request.param, "shards": 8, "confirm": False}
    app = make_app(result_backend_transport_options=options)
    app.set_current()
    return app


@pytest.fixture
def t(app: Celery) -> SimpleNamespace:
    return register(app)


def send(app: Celery, t: SimpleNamespace, size: int) -> SimpleNamespace:
    """Publish the plan of a chord, and send no task of its header."""
    group_id, ids = str(uuid.uuid4()), [str(uuid.uuid4()) for _ in range(size)]
    body = t.total.s()
    result = body.freeze()
    app.backend.apply_chord((group_id, [AsyncResult(i, app=app) for i in ids]), body)
    app.backend.set_chord_size(group_id, size)
    return SimpleNamespace(group_id=group_id, ids=ids, body=dict(body), result=result)


def end(app: Celery, sent: SimpleNamespace) -> None:
    """Store the results of a header: 1 of each task."""
    for task_id in sent.ids:
        request = Context(id=task_id, group=sent.group_id, chord=sent.body, ignore_result=False)
        app.backend.mark_as_done(task_id, 1, request)


def memory(pid: int) -> Dict[str, int]:
    """Return the kilobytes that a process has in memory now, and has had at most."""
    status = Path(f"/proc/{pid}/status").read_text()
    return {name: int(kilobytes) for name, kilobytes in re.findall(r"(Vm\w+):\s+(\d+) kB", status)}


def allocated(node: rabbitmq.Node) -> int:
    """Return the kilobytes that a broker uses, without what waits for collection."""
    collected = "[erlang:garbage_collect(P) || P <- erlang:processes()], erlang:memory(total)"
    return int(node.eval(collected)) // 1024


def warm_worker(app: Celery, t: SimpleNamespace, start_worker: Any) -> Any:
    worker = start_worker(app, module="tests.faults.chord_app", pool="prefork", concurrency=1)
    # A chord that it runs, so that it leads before this process stores anything of a chord.
    assert chord([t.same.s(1), t.same.s(2)], t.total.s()).delay().get(timeout=PATIENCE) == 3
    assert not app.backend.layout.chords.service.running
    return worker


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
@pytest.mark.parametrize("size", SIZES)
def test_the_leader_of_a_large_chord_takes_little_memory(
    app: Celery, t: SimpleNamespace, start_worker: Any, size: int
) -> None:
    worker = warm_worker(app, t, start_worker)
    before = memory(worker.pid)["VmRSS"]
    sent = send(app, t, size)
    end(app, sent)
    assert sent.result.get(timeout=LONG) == size
    assert not app.backend.layout.chords.service.running
    taken = memory(worker.pid)["VmHWM"] - before
    print(f"the leader took {taken} kB")
    assert taken < BASE + 2 * size
    worker.stop()
    assert plans_left(app) == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_open_chords_take_memory_for_their_plans_only(
    app: Celery, node: rabbitmq.Node, t: SimpleNamespace, start_worker: Any
) -> None:
    worker = warm_worker(app, t, start_worker)
    before = memory(worker.pid)["VmRSS"]
    queues, broker = node.queue_count(), allocated(node)
    sent: List[SimpleNamespace] = [send(app, t, 10) for _ in range(OPEN)]
    eventually(lambda: plans_left(app) == 0, LONG)
    assert node.queue_count() == queues
    print(f"{node.version}: {OPEN} open chords, the broker took {allocated(node) - broker} kB")
    for one in sent[-20:]:
        end(app, one)
    assert [one.result.get(timeout=LONG) for one in sent[-20:]] == [10] * 20
    assert not app.backend.layout.chords.service.running
    taken = memory(worker.pid)["VmHWM"] - before
    print(f"the leader took {taken} kB")
    assert taken < BASE + 16 * OPEN
