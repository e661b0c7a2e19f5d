"""Chords of every shape, on real workers."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator, List, Tuple

import celery
import pytest
from amqp.exceptions import NotFound
from celery import Celery, chain, chord, group
from celery.canvas import StampingVisitor
from celery.exceptions import ChordError, TaskRevokedError

from celery_amqp_results.protocol.names import PLAN_QUEUES
from celery_amqp_results.waiting import rechecks
from tests.conftest import LOAD, PATIENT, Apps, eventually, raw_connection
from tests.worker.chord_tasks import register
from tests.worker.conftest import launch_worker

TIMEOUT = 60

World = Tuple[Celery, SimpleNamespace]


def canvas_of(*version: int) -> Any:
    """Skip a test for older versions of Celery, whose canvas fails with any backend.

    Checked with Redis and Celery 5.3.6, 5.4.0, 5.5.3 and 5.6.3: there these chords also end
    differently, or never.
    """
    said = ".".join(map(str, version))
    reason = f"before {said} Celery's canvas has it wrong"
    return pytest.mark.skipif(celery.VERSION[: len(version)] < version, reason=reason)


#: Pools of workers. CI tries all of them on one RabbitMQ, which alone takes minutes; POOLS=all
#: tries them on any.
POOLS = ["prefork"]
in_ci = os.environ.get("CI") and os.environ.get("RABBITMQ_DISTRIBUTION", "system") == "system"
if in_ci or os.environ.get("POOLS") == "all":
    POOLS += ["threads", "gevent"]
if importlib.util.find_spec("gevent") is None:
    # It has no wheels for the oldest Python.
    POOLS = [pool for pool in POOLS if pool != "gevent"]


@pytest.fixture(scope="module", params=POOLS)
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """An app and its tasks, with one worker for all tests of the module."""
    node = request.getfixturevalue("_session_node")
    apps = Apps(os.environ["AMQP_URL"] if node is None else node.url())
    app = apps()
    app.test_pool = request.param
    worker = launch_worker(
        app,
        tmp_path_factory.mktemp("worker"),
        module="tests.worker.chord_tasks",
        pool=request.param,
        concurrency=4,
    )
    app.set_current()
    try:
        yield app, register(app)
        worker.stop()
        assert plans_left(app) == 0
    finally:
        worker.kill()
        apps.close()


@pytest.fixture
def t(world: World) -> SimpleNamespace:
    return world[1]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "notes"


def lines(path: Path) -> List[str]:
    return path.read_text().splitlines() if path.exists() else []


def plans_left(app: Celery) -> int:
    """Return how many plans are in the plan queues and are held by no leader."""
    topology = app.backend.config.topology
    with raw_connection(app.conf.broker_url) as connection:
        channel = connection.channel()
        try:
            return sum(
                channel.queue_declare(topology.plan_queue(number).name, passive=True).message_count
                for number in range(PLAN_QUEUES)
            )
        except NotFound:
            return 0


SHAPES: List[Tuple[str, Callable[[Any], Any], Any]] = [
    ("one", lambda t: chord([t.add.s(1, 1)], t.same.s()), [2]),
    ("none", lambda t: chord([], t.same.s()), []),
    ("two", lambda t: chord([t.add.s(1, 1), t.add.s(2, 2)], t.same.s()), [2, 4]),
    ("hundred", lambda t: chord([t.same.s(i) for i in range(100)], t.same.s()), list(range(100))),
    ("generator", lambda t: chord((t.same.s(i) for i in range(100)), t.same.s()),
     list(range(100))),
    ("generator of one", lambda t: chord((t.same.s(i) for i in range(1)), t.same.s()), [0]),
    ("generator of none", lambda t: chord((t.same.s(i) for i in range(0)), t.same.s()), []),
    ("group of a generator", lambda t: group(t.same.s(i) for i in range(20)) | t.same.s(),
     list(range(20))),
    ("final states before the end", lambda t: chord([t.claim.s(1), t.claim.s(2)], t.same.s()),
     [1, 2]),
    ("group | task", lambda t: group([t.add.s(1, 1), t.add.s(2, 2)]) | t.total.s(), 6),
    ("group | task | task", lambda t: group([t.add.s(1, 1), t.add.s(2, 2)]) | t.total.s()
     | t.add.s(4), 10),
    ("task | group | task", lambda t: t.add.s(1, 1) | group([t.add.s(1), t.add.s(2)])
     | t.total.s(), 7),
    ("chain of chords", lambda t: chain(
        group([t.add.s(1, 1), t.add.s(2, 2)]), t.total.s(), group([t.add.s(1), t.add.s(2)]),
        t.total.s()), 15),
    ("group | group", lambda t: group([t.add.s(1, 1), t.add.s(2, 2)])
     | group([t.total.s(), t.same.s()]), [6, [2, 4]]),
    ("chord in a group", lambda t: group([chord([t.add.s(1, 1)], t.total.s()), t.same.s(7)]),
     [2, 7]),
    ("chords in groups in chords", lambda t: chord(
        # Celery reverses the order of a group in a header.
        [group([chord([t.add.s(1, 1), t.add.s(2, 2)], t.total.s()), t.same.s(1)])],
        t.total.s()), 7),
    ("chord in a header", lambda t: chord(
        [chord([t.add.s(1, 1), t.add.s(2, 2)], t.total.s()), t.same.s(3)], t.same.s()), [6, 3]),
    ("chord in a header's chain", lambda t: chord(
        [t.same.s(1) | group([t.add.s(1), t.add.s(2)]) | t.total.s(), t.same.s(3)], t.same.s()),
     [5, 3]),
    ("chord in a chord in a chord", lambda t: chord(
        [chord([chord([t.same.s(1)], t.same.s()), t.same.s(2)], t.same.s()), t.same.s(3)],
        t.same.s()), [[[1], 2], 3]),
    ("body is a chord", lambda t: chord(
        [t.add.s(1, 1), t.add.s(2, 2)], chord([t.total.s(), t.same.s()], t.same.s())),
     [6, [2, 4]]),
    ("body is a group", lambda t: chord(
        [t.add.s(1, 1), t.add.s(2, 2)], group([t.total.s(), t.same.s()])), [6, [2, 4]]),
    ("body is a chain", lambda t: chord(
        [t.add.s(1, 1), t.add.s(2, 2)], t.total.s() | t.add.s(1)), 7),
    ("body is a chain with a group", lambda t: chord(
        [t.add.s(1, 1), t.add.s(2, 2)], t.total.s() | group([t.add.s(1), t.add.s(2)])
        | t.total.s()), 15),
    ("chain in a header", lambda t: chord(
        [t.add.s(1, 1) | t.add.s(5), t.same.s(3)], t.same.s()), [7, 3]),
    ("group at the end of a chain in a header", lambda t: chord(
        [chain(t.same.s(42), group([t.same.s(), t.add.s(1)])), t.same.s(7)], t.same.s()),
     [[42, 43], 7]),
    ("immutable body", lambda t: chord([t.same.s(1)], t.same.si(9)), 9),
    ("immutable header", lambda t: t.same.s(1) | chord([t.same.si(2), t.same.si(3)], t.same.s()),
     [2, 3]),
    ("header ignores results", lambda t: chord(
        [t.ignored.s(1), t.add.s(1, 1), t.ignored.s(3)], t.same.s()), [1, 2, 3]),
    ("nested header ignores results", lambda t: chord(
        [chain(t.same.s(1), group([t.ignored.s(), t.ignored.s()])), t.ignored.s(3)], t.same.s()),
     [[1, 1], 3]),
    ("retries", lambda t: chord([t.retried.s(1, 3), t.same.s(2)], t.same.s()), [1, 2]),
    ("autoretry", lambda t: chord([t.autoretried.s(1, 2), t.same.s(2)], t.same.s()), [1, 2]),
    ("replaced by a task", lambda t: chord([t.replaced_by_task.s(1), t.same.s(2)], t.same.s()),
     [101, 2]),
    ("replaced by a chain", lambda t: chord([t.replaced_by_chain.s(1), t.same.s(2)], t.same.s()),
     [12, 2]),
    ("replaced by a group", lambda t: chord([t.replaced_by_group.s(1), t.same.s(2)], t.same.s()),
     [[2, 3], 2]),
    ("replaced by a chord", lambda t: chord([t.replaced_by_chord.s(1), t.same.s(2)], t.same.s()),
     [5, 2]),
    ("body replaced by a chord", lambda t: chord([t.same.s(1)], t.total.s()
     | t.replaced_by_chord.s()), 5),
    ("None as results", lambda t: chord([t.same.s(None), t.same.s(None)], t.same.s()),
     [None, None]),
]  # fmt: skip


#: Before Celery 5.3.6 the tasks of a generator are not numbered, so their order is unknown.
GENERATED = ("generator", "group of a generator")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        pytest.param(make, want, id=name, marks=[canvas_of(5, 3, 6)] if name in GENERATED else [])
        for name, make, want in SHAPES
    ],
)
def test_a_chord_of_any_shape_returns_its_value(
    t: SimpleNamespace, make: Callable[[Any], Any], expected: Any
) -> None:
    assert make(t).delay().get(timeout=TIMEOUT) == expected


@pytest.mark.parametrize("size", [1, 2, 8, 60])
@pytest.mark.parametrize("lazy", [False, pytest.param(True, marks=canvas_of(5, 3, 6))])
def test_the_body_runs_once(t: SimpleNamespace, log: Path, size: int, lazy: bool) -> None:
    header: Any = (t.same.s(i) for i in range(size))
    result = chord(header if lazy else list(header), t.record.s(str(log))).delay()
    assert result.get(timeout=TIMEOUT) == list(range(size))
    # A later chord runs later: by then, a second run of the first body would have happened.
    assert chord([t.same.s(1)], t.same.s()).delay().get(timeout=TIMEOUT) == [1]
    assert lines(log) == [result.id]


def test_many_chords_run_concurrently(t: SimpleNamespace, log: Path) -> None:
    results = [
        chord([t.same.s(i) for i in range(5)], t.record.s(str(log))).delay() for _ in range(30)
    ]
    for result in results:
        assert result.get(timeout=TIMEOUT) == list(range(5))
    assert sorted(lines(log)) == sorted(result.id for result in results)


@canvas_of(5, 3, 6)
def test_a_generator_is_sent_while_it_runs(t: SimpleNamespace) -> None:
    first: List[Any] = []

    def header() -> Iterator[Any]:
        task = t.same.s(1)
        # Celery looks ahead by a few tasks.
        yield from (t.same.s(0) for _ in range(10))
        sent = world_sent[0]
        first.append(sent)
        yield task

    world_sent = [0]
    app = t.same.app
    send = app.amqp.send_task_message

    def counting(*args: Any, **kwargs: Any) -> Any:
        world_sent[0] += 1
        return send(*args, **kwargs)

    app.amqp.send_task_message = counting
    try:
        result = chord(header(), t.same.s()).delay()
    finally:
        app.amqp.send_task_message = send
    assert result.get(timeout=TIMEOUT) == [0] * 10 + [1]
    assert first[0] > 0


@canvas_of(5, 3, 6)
def test_a_slow_generator_whose_parts_finish_before_its_size_is_known(
    t: SimpleNamespace,
) -> None:
    early: List[Any] = []

    def header() -> Iterator[Any]:
        for number in range(6):
            if number == 4:
                eventually(lambda: all(r.state == "SUCCESS" for r in early[:1]))
            signature = t.same.s(number)
            early.append(signature.freeze())
            yield signature

    assert chord(header(), t.same.s()).delay().get(timeout=TIMEOUT) == list(range(6))


@pytest.mark.parametrize("more", [1, 10])
def test_tasks_can_be_added_to_a_running_chord(t: SimpleNamespace, more: int) -> None:
    result = chord([t.adds.s(1, more), t.same.s(2)], t.same.s()).delay()
    found = result.get(timeout=TIMEOUT)
    # Added tasks take the place of the task that added them.
    assert sorted(found) == sorted([1, 2, *range(1000, 1000 + more)])
    assert found[-1] == 2


def test_the_state_of_a_task_that_added_others_names_its_last_amendment(
    t: SimpleNamespace,
) -> None:
    result = chord([t.adds.s(1, 2), t.same.s(2)], t.same.s()).delay()
    assert len(result.get(timeout=TIMEOUT)) == 4
    stored = t.adds.app.backend.layout.stored_state
    adding, other = (stored(task.id) for task in result.parent.results)
    assert re.fullmatch("[0-9a-f]{32}", adding.amended)
    assert other.amended is None


def test_added_tasks_can_add_tasks(t: SimpleNamespace, log: Path) -> None:
    result = chord([t.adds_one_that_adds.s(8)], t.record.s(str(log))).delay()
    assert sorted(result.get(timeout=TIMEOUT)) == list(range(9))
    assert lines(log) == [result.id]


def test_a_failed_part_fails_the_body(t: SimpleNamespace, log: Path) -> None:
    header = [t.same.s(1), t.fail.s("no"), t.same.s(2)]
    result = chord(header, t.record.s(str(log))).delay()
    eventually(result.ready)
    assert result.state == "FAILURE"
    failed = result.parent[1]
    assert isinstance(result.result, ChordError)
    assert str(result.result) == f"Dependency {failed.id} raised KeyError('no')"
    assert lines(log) == []


def test_a_failure_is_reported_once_all_parts_have_finished(t: SimpleNamespace, log: Path) -> None:
    header = [t.fail.s(), t.slow.s(1, 0.7)]
    result = chord(header, t.record.s(str(log))).delay()
    eventually(result.parent[0].ready)
    slow = result.parent[1]
    eventually(result.ready)
    assert slow.ready()
    assert result.state == "FAILURE"


@canvas_of(5, 7)
def test_errbacks_of_the_body_run_once(t: SimpleNamespace, tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    body = t.same.s().on_error(t.on_error.s(str(new))).on_error(t.old_on_error.s(str(old)))
    result = chord([t.fail.s(), t.fail.s(), t.same.s(1)], body).delay()
    eventually(result.ready)
    eventually(lambda: lines(new) and lines(old))
    assert chord([t.same.s(1)], t.same.s()).delay().get(timeout=TIMEOUT) == [1]
    assert lines(new) == [f"{result.id} ChordError"]
    assert lines(old) == [result.id]


def test_errbacks_of_the_header_run(t: SimpleNamespace, log: Path) -> None:
    failing = t.fail.s().on_error(t.on_error.s(str(log)))
    result = chord([failing, t.same.s(1)], t.same.s()).delay()
    eventually(result.ready)
    # A task's part is published before its errbacks are called.
    eventually(lambda: lines(log) == [f"{result.parent[0].id} KeyError"])


def test_links_of_the_body_run(t: SimpleNamespace, tmp_path: Path) -> None:
    header, body = tmp_path / "header", tmp_path / "body"
    linked = t.same.s(1)
    linked.link(t.linked.s(str(header)))
    whole = chord([linked, t.same.s(2)], t.same.s())
    whole.link(t.linked.s(str(body)))
    assert whole.delay().get(timeout=TIMEOUT) == [1, 2]
    eventually(lambda: lines(header) == ["1"] and lines(body) == ["[1, 2]"])


def test_a_failing_body_raises(t: SimpleNamespace, log: Path) -> None:
    body = t.fail_with.s().on_error(t.on_error.s(str(log)))
    result = chord([t.same.s(1)], body).delay()
    with pytest.raises(KeyError, match="body"):
        result.get(timeout=TIMEOUT)
    eventually(lambda: lines(log) == [f"{result.id} KeyError"])


@canvas_of(5, 7)
def test_a_failed_chord_with_a_group_as_its_body(t: SimpleNamespace) -> None:
    result = chord([t.fail.s("no"), t.same.s(1)], group([t.same.s(), t.total.s()])).delay()
    eventually(result.ready)
    assert [member.state for member in result] == ["FAILURE", "FAILURE"]


@canvas_of(5, 6)
def test_a_chain_stops_at_a_failed_chord(t: SimpleNamespace, log: Path) -> None:
    whole = chord([t.fail.s(), t.same.s(1)], t.same.s()) | t.record.s(str(log))
    result = whole.delay()
    eventually(result.ready)
    assert result.state == "FAILURE"
    assert lines(log) == []


@pytest.mark.parametrize(
    "inner_body", ["task", pytest.param("chain", marks=canvas_of(5, 6)), "group", "chord"]
)
def test_a_failure_reaches_the_enclosing_chord(t: SimpleNamespace, inner_body: str) -> None:
    bodies = {
        "task": t.same.s(),
        "chain": t.same.s() | t.same.s(),
        "group": group([t.same.s(), t.same.s()]),
        "chord": chord([t.same.s(), t.same.s()], t.same.s()),
    }
    inner = chord([t.fail.s("deep"), t.same.s(1)], bodies[inner_body])
    result = chord([inner, t.same.s(2)], t.same.s()).delay()
    eventually(lambda: result.state == "FAILURE")
    assert "deep" in str(result.result)


def test_a_header_chain_that_fails_at_its_first_task(t: SimpleNamespace) -> None:
    result = chord([t.fail.s("first") | t.same.s() | t.same.s(), t.same.s(2)], t.same.s()).delay()
    eventually(lambda: result.state == "FAILURE")
    assert "first" in str(result.result)


def test_a_revoked_header_task_fails_the_chord(world: World, t: SimpleNamespace) -> None:
    app = world[0]
    revoked = t.same.s(1)
    task_id = str(uuid.uuid4())
    revoked.set(task_id=task_id)
    app.control.revoke(task_id)
    eventually(lambda: [reply for reply in [app.control.inspect(timeout=2).revoked()] if reply
                        and any(task_id in ids for ids in reply.values())])  # fmt: skip
    result = chord([revoked, t.same.s(2)], t.same.s()).delay()
    eventually(lambda: result.state == "FAILURE")
    assert str(result.result) == f"Dependency {task_id} raised {TaskRevokedError('revoked')!r}"


def test_a_killed_header_task_fails_the_chord(world: World, t: SimpleNamespace) -> None:
    if world[0].test_pool != "prefork":
        pytest.skip("only the children of a prefork pool can be lost")
    result = chord([t.killed.s(), t.same.s(2)], t.same.s()).delay()
    eventually(lambda: result.state == "FAILURE")
    assert "WorkerLostError" in str(result.result)


def test_an_unencodable_result_fails_the_chord(t: SimpleNamespace) -> None:
    result = chord([t.unserializable.s(), t.same.s(2)], t.same.s()).delay()
    eventually(lambda: result.state == "FAILURE")
    assert "EncodeError" in str(result.result)


def test_large_results_reach_the_body(t: SimpleNamespace) -> None:
    size = 300_000
    result = chord([t.payload.s(size) for _ in range(8)], t.length.s()).delay()
    assert result.get(timeout=TIMEOUT) == 8 * size


def test_a_signature_can_be_used_twice_in_a_header(t: SimpleNamespace) -> None:
    signature = t.same.s(5)
    signature.freeze()
    assert chord([signature, signature], t.same.s()).delay().get(timeout=TIMEOUT) == [5, 5]


@canvas_of(5, 7)
def test_the_same_chord_can_be_sent_twice(t: SimpleNamespace, log: Path) -> None:
    whole = chord([t.same.s(1), t.same.s(2)], t.record.s(str(log)))
    assert whole.delay().get(timeout=TIMEOUT) == [1, 2]
    assert whole.delay().get(timeout=TIMEOUT) == [1, 2]
    assert len(lines(log)) == 2


def has_lines(log: Path, number: int) -> bool:
    """Return whether the body has run *number* times."""
    return len(lines(log)) == number


def test_a_frozen_chord_can_be_sent_again(t: SimpleNamespace, log: Path) -> None:
    whole = chord([t.same.s(1), t.same.s(2)], t.record.s(str(log)))
    whole.freeze()
    for number in range(1, 11):
        # The process that fires may not have deleted the queue yet.
        assert whole.delay().get(timeout=TIMEOUT) == [1, 2]
        eventually(functools.partial(has_lines, log, number))


class Stamps(StampingVisitor):
    def on_signature(self, sig: Any, **headers: Any) -> Any:
        return {"tenant": ["t1"]}


def test_chords_can_be_stamped(t: SimpleNamespace) -> None:
    whole = chord([t.same.s(1), t.same.s(2)], t.stamps.s())
    whole.stamp(visitor=Stamps())
    assert whole.delay().get(timeout=TIMEOUT)["tenant"] == ["t1"]


def test_a_process_that_did_not_send_the_chord_can_wait_for_it(
    world: World, t: SimpleNamespace
) -> None:
    result = chord([t.slow.s(1, 0.2), t.same.s(2)], t.same.s()).delay()
    other = Celery(broker=world[0].conf.broker_url, backend="amqp://", set_as_current=False)
    other.conf.update(
        result_exchange=world[0].conf.result_exchange,
        result_backend_transport_options=world[0].conf.result_backend_transport_options,
        **PATIENT,
    )
    try:
        assert other.AsyncResult(result.id).get(timeout=TIMEOUT) == [1, 2]
    finally:
        other.backend.close()
        other.close()


def test_the_body_is_pushed_to_the_process_that_sent_the_chord(
    world: World, t: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a process that is waiting already, and whose next look-up is far away
    monkeypatch.setattr(rechecks, "FIRST_RECHECK", 10.0 * TIMEOUT)
    assert t.same.delay(1).get(timeout=TIMEOUT) == 1
    backend = world[0].backend
    inbox = backend.layout.inbox
    bound = bound_shards(inbox)
    # When it sends chords that a worker fires, successfully or not
    result = chord([t.same.s(1), t.same.s(2)], t.same.s()).delay()
    assert result.get(timeout=TIMEOUT) == [1, 2]
    body = chord([t.same.s(1), t.fail.s("no")], t.same.s()).delay()
    body.parent = None  # whose failure would be raised instead, if it is known first
    with pytest.raises(ChordError):
        body.get(timeout=TIMEOUT)
    with pytest.raises(KeyError, match="body"):
        chord([t.same.s(1), t.same.s(2)], t.fail_with.s()).delay().get(timeout=TIMEOUT)
    # Then no results of other senders were received
    assert bound_shards(inbox) == bound


def bound_shards(inbox: Any) -> List[int]:
    return [shard for shard in range(8) if shard in inbox._table.bindings]


@canvas_of(5, 3, 6)
def test_a_chord_of_many_parts(world: World, t: SimpleNamespace, log: Path) -> None:
    size = 1000 if world[0].test_pool == "prefork" or LOAD else 200
    result = chord((t.same.s(i) for i in range(size)), t.record.s(str(log))).delay()
    assert result.get(timeout=4 * TIMEOUT) == list(range(size))
    assert lines(log) == [result.id]
