"""The store during broker crashes, frozen readers and interrupted packing."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from typing import Any, Dict, List

import pytest
from amqp.exceptions import ConsumerCancelled
from celery import Celery, states

from celery_amqp_results.store import lookup as store_module
from celery_amqp_results.store import shard_read
from celery_amqp_results.store.checkout import FENCE, GRACE, Checkout, limits_for
from tests import subprocesses
from tests.conftest import LOAD, Apps, eventually
from tests.faults import fault_jobs
from tools import rabbitmq

#: Enough loose messages for a reader to pack them.
WORTH_PACKING = 60


def new_ids(count: int) -> List[str]:
    return [str(uuid.uuid4()) for _ in range(count)]


def read_from_store(app: Celery, ids: List[str]) -> Dict[str, Any]:
    """Return what the store has for *ids*, independent of pushed states."""
    app.backend.close()
    return {task_id: app.backend._get_task_meta_for(task_id) for task_id in ids}


class Writer:
    """Stores results until told to stop, and records the confirmed ones."""

    def __init__(self, app: Celery) -> None:
        self.confirmed: Dict[str, int] = {}
        self.error: BaseException | None = None
        self._app = app
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                task_id, value = str(uuid.uuid4()), len(self.confirmed)
                self._app.backend.store_result(task_id, value, states.SUCCESS)
                self.confirmed[task_id] = value
        except BaseException as exc:
            self.error = exc

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "the writer hangs"
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_confirmed_results_survive_a_broker_that_is_killed_repeatedly(
    make_app: Apps, node: rabbitmq.Node, queue_type: str
) -> None:
    conf: Dict[str, Any] = {
        "result_backend_transport_options": {"shards": 4, "queue_type": queue_type}
    }
    if queue_type == "quorum":
        # RabbitMQ writes the record of a new quorum queue to disk some moments after it has
        # confirmed the declaration. If the only replica is killed before, the queue comes back
        # empty.
        app = make_app(**conf)
        for task_id in new_ids(40):
            app.backend.store_result(task_id, None, states.SUCCESS)
        node.restart()
    writers = [Writer(make_app(**conf)) for _ in range(2)]

    def more_are_confirmed(count: int) -> None:
        wanted = sum(len(w.confirmed) for w in writers) + count
        eventually(
            lambda: (
                any(w.error is not None for w in writers)
                or sum(len(w.confirmed) for w in writers) >= wanted
            ),
            60,
        )
        for writer in writers:
            if writer.error is not None:
                raise writer.error

    for _ in range(5 if LOAD else 2):
        # Given results that are being stored
        more_are_confirmed(50)
        # When the broker is killed without warning, and is started again
        node.kill()
        node.start()
    more_are_confirmed(10)
    for writer in writers:
        writer.stop()
    # Then every confirmed result is found
    reader = make_app(**conf)
    expected = {i: v for writer in writers for i, v in writer.confirmed.items()}
    found = reader.backend.layout.poll(list(expected))
    lost = [i for i, state in found.items() if state is None or state.state != states.SUCCESS]
    assert not lost, f"{len(lost)} of {len(expected)} are lost"


def test_waiters_notice_only_a_delay_when_the_broker_is_killed(
    make_app: Apps, node: rabbitmq.Node
) -> None:
    app, worker = make_app(), make_app()
    ids = new_ids(40)
    got: Dict[str, Any] = {}
    waiter = threading.Thread(
        target=lambda: got.update(app.backend.get_many(ids, timeout=90)), daemon=True
    )
    waiter.start()
    inbox = app.backend.layout.inbox
    eventually(lambda: all(inbox.covers(i) for i in ids))
    # Given results stored before the crash, and some while the broker was coming back
    for task_id in ids[:10]:
        worker.backend.store_result(task_id, "before", states.SUCCESS)
    node.kill()
    node.start()
    for task_id in ids[10:]:
        worker.backend.store_result(task_id, "after", states.SUCCESS)
    waiter.join(90)
    assert len(got) == len(ids)
    assert {meta["result"] for i, meta in got.items() if i in ids[:10]} == {"before"}


def test_waiting_continues_after_a_clean_restart(make_app: Apps, node: rabbitmq.Node) -> None:
    app, worker = make_app(), make_app()
    task_id = new_ids(1)[0]
    got: List[Any] = []
    waiter = threading.Thread(
        target=lambda: got.append(app.AsyncResult(task_id).get(timeout=90)), daemon=True
    )
    waiter.start()
    eventually(lambda: app.backend.layout.inbox.covers(task_id))
    node.restart()
    worker.backend.store_result(task_id, 7, states.SUCCESS)
    waiter.join(90)
    assert got == [7]


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
@pytest.mark.parametrize("point", fault_jobs.CRASH_POINTS)
def test_nothing_is_lost_when_a_reader_dies_while_it_packs(
    make_app: Apps, point: str, queue_type: str
) -> None:
    app = make_app(
        result_backend_transport_options={"shards": 1, "queue_type": queue_type, "confirm": False}
    )
    # Given a shard that the next reader will pack
    ids = new_ids(WORTH_PACKING)
    for number, task_id in enumerate(ids):
        app.backend.store_result(task_id, number, states.SUCCESS)
    app.backend.close()
    # When that reader dies at some point
    with subprocesses.start(
        app, fault_jobs.die_while_packing, task_id=ids[0], point=point
    ) as process:
        eventually(lambda: not os.path.exists(f"/proc/{process.pid}/fd") or _ended(process))
    # Then every look-up finds all results
    for _ in range(2):
        found = read_from_store(app, ids)
        assert [found[i]["result"] for i in ids] == list(range(len(ids)))
    # And a forgotten result stays forgotten, whether it was loose or packed
    app.AsyncResult(ids[3]).forget()
    assert read_from_store(app, ids[3:4])[ids[3]]["status"] == states.PENDING


def _ended(process: subprocesses.Process) -> bool:
    return process._process.poll() is not None


def test_a_frozen_reader_delays_others_for_seconds_and_does_no_harm_later(
    make_app: Apps,
) -> None:
    app = make_app(result_backend_transport_options={"shards": 1})
    ids = new_ids(20)
    for task_id in ids:
        app.backend.store_result(task_id, "kept", states.SUCCESS)
    with subprocesses.start(app, fault_jobs.hold_shard, shard=0) as process:
        assert process.readline() == "holding"
        # When the process that has checked out the shard is frozen
        os.kill(process.pid, signal.SIGSTOP)
        try:
            # Then a look-up is answered in time, and correctly
            assert app.backend._get_task_meta_for(ids[0])["result"] == "kept"
        finally:
            os.kill(process.pid, signal.SIGCONT)
        process.write_line("go on")
        # When it wakes, its operations on the lost connection fail, and change nothing
        with pytest.raises(AssertionError, match="Error"):
            process.answer()
    found = read_from_store(app, ids)
    assert {meta["result"] for meta in found.values()} == {"kept"}


def test_many_concurrent_readers_of_many_shards_find_everything(make_app: Apps) -> None:
    app = make_app(result_backend_transport_options={"shards": 12})
    ids = new_ids(400)
    for number, task_id in enumerate(ids):
        app.backend.store_result(task_id, number, states.SUCCESS)
    outcomes: List[int] = []

    def read() -> None:
        for _ in range(5):
            found = app.backend.layout.store.read(ids)
            outcomes.append(sum(1 for states_of in found.values() if states_of))

    threads = [threading.Thread(target=read, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
        assert not thread.is_alive(), "readers wait for each other"
    assert outcomes == [len(ids)] * 40


def test_readers_never_miss_a_result_while_others_pack(make_app: Apps) -> None:
    app = make_app(result_backend_transport_options={"shards": 2})
    kept = {task_id: number for number, task_id in enumerate(new_ids(8))}
    for task_id, number in kept.items():
        app.backend.store_result(task_id, number, states.SUCCESS)
    job = {"expected": kept, "seconds": 6}
    with (
        subprocesses.start(app, fault_jobs.read_all_the_time, **job) as one,
        subprocesses.start(app, fault_jobs.read_all_the_time, **job) as two,
    ):
        assert (one.readline(), two.readline()) == ("reading", "reading")
        # When enough is stored meanwhile for the readers to pack repeatedly
        writer = Writer(make_app(result_backend_transport_options={"shards": 2}))
        wrong = [*one.answer(), *two.answer()]
        writer.stop()
    assert wrong == []
    assert writer.confirmed


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
@pytest.mark.parametrize("how", ["packed", "cut"])
def test_the_first_success_stays_current_when_packing_moves_it_behind_a_reader(
    make_app: Apps, monkeypatch: pytest.MonkeyPatch, queue_type: str, how: str
) -> None:
    conf: Dict[str, Any] = {
        "result_backend_transport_options": {"shards": 1, "queue_type": queue_type}
    }
    app, writer, second = make_app(**conf), make_app(**conf), make_app(**conf)
    monkeypatch.setattr(store_module, "PACK_SECONDS", 10.0)
    # Given the result of a task, packed or due for packing
    wanted, forgotten, *others_ids = new_ids(WORTH_PACKING)
    for task_id in (wanted, forgotten, *others_ids):
        writer.backend.store_result(task_id, "first", states.SUCCESS)
    if how == "cut":
        read_from_store(app, others_ids[:1])
    kind = shard_read.Removal if how == "cut" else shard_read.LookUp
    finish = kind.finish
    got: List[Any] = []
    in_line = threading.Thread(
        target=lambda: got.append(second.backend._get_task_meta_for(wanted)["result"])
    )

    def finish_late(self: Any, pack_until: float, end: float, done: Any) -> None:
        monkeypatch.setattr(kind, "finish", finish)
        fences: List[str] = []
        receive = self.checkout.channel.callbacks["r"]

        def spy(message: Any) -> None:
            if message.properties.get("type") == FENCE:
                fences.append(message.properties["message_id"])
            receive(message)

        self.checkout.channel.callbacks["r"] = spy
        # When a reader has the shard, the task is stored again, and another reader gets in line
        writer.backend.store_result(wanted, "second", states.SUCCESS)
        in_line.start()
        deadline = time.monotonic() + 20
        while not fences and time.monotonic() < deadline:
            self._link.drain(1.0)
        assert fences
        finish(self, pack_until, end, done)

    monkeypatch.setattr(kind, "finish", finish_late)
    # And the first reader moves the first result behind the second one
    if how == "cut":
        app.AsyncResult(forgotten).forget()
    else:
        assert app.AsyncResult(wanted).state == states.SUCCESS
    in_line.join(30)
    # Then both readers know the current state
    assert got == ["first"]
    assert read_from_store(app, [wanted])[wanted]["result"] == "first"


def test_a_shard_queue_that_is_deleted_is_declared_again(make_app: Apps, raw: Any) -> None:
    app = make_app(result_backend_transport_options={"shards": 1})
    first, second = new_ids(2)
    app.backend.store_result(first, 1, states.SUCCESS)
    raw.channel().queue_delete(app.backend.config.topology.shard_queue(0).name)
    app.backend.store_result(second, 2, states.SUCCESS)
    assert app.backend._get_task_meta_for(second)["result"] == 2
    assert app.backend._get_task_meta_for(first)["status"] == states.PENDING


def test_an_inbox_that_is_deleted_is_replaced(make_app: Apps, raw: Any) -> None:
    app, worker = make_app(), make_app()
    task_id = new_ids(1)[0]
    got: List[Any] = []
    waiter = threading.Thread(
        target=lambda: got.append(app.AsyncResult(task_id).get(timeout=60)), daemon=True
    )
    waiter.start()
    inbox = app.backend.layout.inbox
    eventually(lambda: inbox.covers(task_id))
    # An operator cannot delete an exclusive queue by AMQP; deleting the exchange unbinds it.
    raw.channel().exchange_delete(f"{make_app.prefix}.states")
    worker.backend.store_result(task_id, 3, states.SUCCESS)
    waiter.join(60)
    assert got == [3]


def test_a_reader_that_holds_a_quorum_queue_too_long_is_evicted(
    make_app: Apps, node: rabbitmq.Node
) -> None:
    if node.version.startswith("3."):
        pytest.skip("quorum queues know x-consumer-timeout since RabbitMQ 4.3")
    app = make_app(result_backend_transport_options={"shards": 1, "queue_type": "quorum"})
    (task_id,) = new_ids(1)
    app.backend.store_result(task_id, 1, states.SUCCESS)
    queue = app.backend.config.topology.shard_queue_name(0)
    with app.backend.layout.store._pool.link() as link:
        # Given a live reader that holds the shard for longer than two seconds
        held = Checkout(link, queue, lambda message: None, limits_for("quorum", 2 - GRACE))
        assert held.wait(time.monotonic() + 30)
        # Then other readers get the shard with all its messages
        options = {"shards": 1, "queue_type": "quorum", "lookup_timeout": 60}
        other = make_app(result_backend_transport_options=options)
        assert read_from_store(other, [task_id])[task_id]["result"] == 1
        # And the evicted reader receives basic.cancel

        def hear() -> None:
            for _ in range(60):
                link.drain(1.0)

        with pytest.raises(ConsumerCancelled):
            hear()
