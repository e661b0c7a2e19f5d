"""Chords that are led by the process of the test."""

from __future__ import annotations

import threading
import uuid
from types import SimpleNamespace
from typing import Any, Dict, List, Optional

import amqp
import pytest
from celery import Celery, chain, chord, group, signals, states
from celery.app.task import Context
from celery.exceptions import BackendStoreError, ChordError
from celery.result import AsyncResult, GroupResult
from celery.utils.functional import regen
from celery.utils.nodenames import anon_nodename

from celery_amqp_results import errors
from celery_amqp_results.chords import firing, helpers, service, session
from celery_amqp_results.chords.service import Service
from celery_amqp_results.protocol.message import PART
from celery_amqp_results.protocol.names import PLAN_QUEUES, plan_number
from tests.broker.helpers import fail_once
from tests.conftest import PATIENCE, Apps, eventually
from tools.proxy import Proxy


@pytest.fixture(params=["classic", "quorum"])
def app(request: pytest.FixtureRequest, make_app: Apps) -> Celery:
    return make_app(result_backend_transport_options={"shards": 2, "queue_type": request.param})


@pytest.fixture
def group_id() -> str:
    return str(uuid.uuid4())


def service_of(app: Celery) -> Service:
    found: Service = app.backend.layout.chords.service
    return found


def lead(app: Celery) -> Service:
    found = service_of(app)
    found.start(met=True)
    return found


def request(task_id: str, group_id: str, body: Any, **options: Any) -> Context:
    return Context(
        **{"id": task_id, "group": group_id, "chord": dict(body), "ignore_result": False, **options}
    )


def send(app: Celery, group_id: str, ids: List[Any], body: Any = None) -> Any:
    """Send a chord without its header, and return the signature of the body."""
    if body is None:
        body = app.signature("tests.body")
        body.freeze()
    app.backend.apply_chord((group_id, [_result(i, app) for i in ids]), body)
    app.backend.set_chord_size(group_id, len(ids))
    return body


def _result(node: Any, app: Celery) -> Any:
    if isinstance(node, str):
        return AsyncResult(node, app=app)
    return GroupResult(uuid.uuid4().hex, [_result(child, app) for child in node], app=app)


class Sent:
    """Takes note of the bodies that an app sends."""

    def __init__(self, app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
        self.results: List[Any] = []

        def note(sender: Any, signature: Any, results: Any, options: Any) -> None:
            self.results.append(results)
            self.options = options

        monkeypatch.setattr(firing.BodySender, "send", note)

    def once(self) -> Any:
        eventually(lambda: self.results)
        (results,) = self.results
        return results


@pytest.fixture
def sent(app: Celery, monkeypatch: pytest.MonkeyPatch) -> Sent:
    return Sent(app, monkeypatch)


def new_ids(count: int) -> List[str]:
    return [str(uuid.uuid4()) for _ in range(count)]


def plans_left(raw: Any, app: Celery) -> int:
    channel = raw.channel()
    names = [app.backend.config.topology.plan_queue(number).name for number in range(PLAN_QUEUES)]
    return sum(channel.queue_declare(name, passive=True).message_count for name in names)


def test_a_chord_is_fired_when_its_last_task_has_ended(
    app: Celery, group_id: str, sent: Sent, raw: Any
) -> None:
    leading = lead(app)
    ids = new_ids(3)
    body = send(app, group_id, ids)
    for number in (2, 0):
        app.backend.mark_as_done(ids[number], number, request(ids[number], group_id, body))
    eventually(lambda: leading.progress(group_id) == (3, [ids[1]]))
    assert leading.progress(body.id) == (3, [ids[1]])
    metrics = app.backend.metrics()
    assert (metrics.chords_open, metrics.chords_fired, metrics.chords_led) == (1, 0, 1)
    app.backend.mark_as_done(ids[1], 1, request(ids[1], group_id, body))
    assert sent.once() == [0, 1, 2]
    eventually(lambda: leading.open == 0)
    assert leading.progress(group_id) is None
    assert app.backend.metrics().chords_fired == 1
    app.backend.close()
    assert plans_left(raw, app) == 0


def test_a_leader_that_starts_late_finds_all_in_the_store(
    app: Celery, group_id: str, sent: Sent
) -> None:
    ids = new_ids(4)
    body = send(app, group_id, [ids[0], [ids[1], ids[2]], ids[3]])
    for number, task_id in enumerate(ids):
        options = {"ignore_result": number == 3}
        app.backend.mark_as_done(task_id, number, request(task_id, group_id, body, **options))
    # It asks the broker whether there are chords
    service_of(app).start(met=False)
    assert sent.once() == [0, [1, 2], 3]


def test_a_leader_without_plan_queues_that_it_may_not_declare_pauses(
    make_app: Apps, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(result_backend_transport_options={"shards": 2, "declare": False})
    lead(app)
    eventually(lambda: "chords cannot be led here, trying again in" in caplog.text)
    assert "queues for the plans of chords" in caplog.text


def test_another_leader_takes_over(make_app: Apps, group_id: str, raw: Any) -> None:
    first, second = make_app(), make_app()
    ids = new_ids(2)
    lead(first)
    body = send(first, group_id, ids)
    eventually(lambda: service_of(first).open == 1)
    lead(second)
    first.backend.mark_as_done(ids[0], 1, request(ids[0], group_id, body))
    first.backend.close()
    eventually(lambda: service_of(second).open == 1)
    second.backend.mark_as_done(ids[1], 2, request(ids[1], group_id, body))
    eventually(lambda: second.backend.metrics().chords_fired == 1)
    eventually(lambda: service_of(second).open == 0)
    second.backend.close()
    assert plans_left(raw, second) == 0


@pytest.mark.parametrize("lost", ["plan queue", "exchange"])
def test_a_leader_that_starts_declares_what_was_deleted(
    make_app: Apps, group_id: str, raw: Any, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, lost: str,
) -> None:  # fmt: skip
    sender, app = make_app(), make_app()
    sent = Sent(app, monkeypatch)
    (task_id,) = new_ids(1)
    body = send(sender, group_id, [task_id])
    topology = app.backend.config.topology
    if lost == "exchange":
        raw.channel().exchange_delete(topology.exchange)
    else:
        other = 1 if plan_number(group_id) != 1 else 2
        raw.channel().queue_delete(topology.plan_queue(other).name)
    service_of(app).start(met=False)
    eventually(lambda: service_of(app).progress(group_id))
    app.backend.mark_as_done(task_id, 1, request(task_id, group_id, body))
    assert sent.once() == [1]
    assert not [r for r in caplog.records if r.name.startswith("celery_amqp_results.chords")]


def test_a_body_that_was_sent_by_a_leader_that_died_is_not_sent_again(
    app: Celery, group_id: str, sent: Sent
) -> None:
    (task_id,) = new_ids(1)
    body = send(app, group_id, [task_id])
    app.backend.mark_as_done(task_id, 1, request(task_id, group_id, body))
    # The body has run
    app.backend.store_result(body.id, "done", states.SUCCESS)
    leading = lead(app)
    eventually(lambda: leading.leads == 1 and leading.open == 0)
    assert sent.results == []


def test_a_task_without_a_stored_result_stores_a_part(
    app: Celery, group_id: str, sent: Sent
) -> None:
    ids = new_ids(2)
    lead(app)
    body = send(app, group_id, ids)
    ignoring = request(ids[0], group_id, body, ignore_result=True)
    app.backend.mark_as_done(ids[0], "ignored", ignoring)
    assert app.AsyncResult(ids[0]).state == states.PENDING
    (part,) = app.backend.layout.store.read([ids[0]], kind=PART)[ids[0]]
    assert part.state == states.SUCCESS
    app.backend.mark_as_done(ids[1], 1, request(ids[1], group_id, body))
    assert sent.once() == ["ignored", 1]


@pytest.mark.parametrize("state", [states.SUCCESS, states.FAILURE])
@pytest.mark.parametrize("late", [False, True], ids=["pushed", "looked up"])
def test_a_final_state_that_a_task_stores_itself_does_not_end_it(
    app: Celery, group_id: str, sent: Sent, state: str, late: bool
) -> None:
    ids = new_ids(2)
    body = send(app, group_id, ids)
    requests = [request(task_id, group_id, body) for task_id in ids]
    if not late:
        lead(app)
    # As update_state does
    app.backend.store_result(ids[0], {"p": 1}, state, request=requests[0])
    app.backend.mark_as_done(ids[1], 2, requests[1])
    leading = lead(app)
    eventually(lambda: leading.progress(group_id) == (2, [ids[0]]))
    app.backend.mark_as_done(ids[0], 1, requests[0])
    assert sent.once() == [1, 2]
    # A state that was read as SUCCESS stays, as with Redis
    expected = {"p": 1} if state == states.SUCCESS else 1
    assert app.AsyncResult(ids[0]).get(timeout=PATIENCE) == expected


def test_a_result_that_expires_before_its_chord_is_kept_as_a_part(
    make_app: Apps, group_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app(result_expires=1, result_chord_expires=600)
    sent = Sent(app, monkeypatch)
    ids = new_ids(2)
    body = send(app, group_id, ids)
    app.backend.mark_as_done(ids[0], 1, request(ids[0], group_id, body))
    reader = make_app(result_expires=1, result_chord_expires=600)
    eventually(lambda: reader.AsyncResult(ids[0]).state == states.PENDING)
    lead(app)
    app.backend.mark_as_done(ids[1], 2, request(ids[1], group_id, body))
    assert sent.once() == [1, 2]


def test_a_part_is_stored_even_if_a_leader_cannot_be_looked_for(
    app: Celery, group_id: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(queue: str) -> None:
        raise errors.BackendUnavailable("the broker is away")

    (task_id,) = new_ids(1)
    body = send(app, group_id, [task_id])
    monkeypatch.setattr(app.backend.layout.publisher, "length", fail)
    app.backend.mark_as_done(task_id, 1, request(task_id, group_id, body))
    assert app.AsyncResult(task_id).get(timeout=PATIENCE) == 1
    assert app.backend.layout.store.read([task_id], kind=PART) == {task_id: []}
    assert "the broker is away" in caplog.text


def test_a_result_is_stored_once_where_it_lives_as_long_as_the_chord(
    app: Celery, group_id: str
) -> None:
    body = send(app, group_id, new_ids(2))
    (task_id,) = new_ids(1)
    before = app.backend.metrics().published_bytes
    app.backend.mark_as_done(task_id, "x" * 1000, request(task_id, group_id, body))
    assert 1000 < app.backend.metrics().published_bytes - before < 2000
    assert app.backend.layout.store.read([task_id], kind=PART)[task_id] == []


def test_an_added_task_is_waited_for_and_has_its_place(
    app: Celery, group_id: str, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, added, members = new_ids(2), new_ids(1), new_ids(2)
    lead(app)
    body = send(app, group_id, ids)
    running = SimpleNamespace(request=SimpleNamespace(id=ids[0], root_id=None))
    monkeypatch.setattr(type(app), "current_worker_task", property(lambda self: running))
    app.backend.add_to_chord(group_id, AsyncResult(added[0], app=app))
    nested = _result(members, app)
    app.backend.add_to_chord(group_id, nested)
    for value, task_id in enumerate((*ids, added[0])):
        app.backend.mark_as_done(task_id, value, request(task_id, group_id, body))
    # The tasks of a group have that group's id
    for value, task_id in enumerate(members, 10):
        app.backend.mark_as_done(task_id, value, request(task_id, nested.id, body))
    assert sent.once() == [0, 2, 10, 11, 1]


def test_a_header_that_raises_leaves_nothing(make_app: Apps, raw: Any) -> None:
    app = make_app(result_expires=0)
    task = app.signature("tests.task")

    def header() -> Any:
        yield from (task.clone() for _ in range(5))
        raise LookupError("no more")

    with pytest.raises(LookupError):
        chord(header(), app=app)(app.signature("tests.body"))
    refused = chord([task.clone(), app.signature("tests.task", args=(object(),))], app=app)
    with pytest.raises(Exception, match="not JSON serializable"):
        refused(app.signature("tests.body"))
    # A plan is published with the last task. The second header had its last task refused.
    send(app, uuid.uuid4().hex, new_ids(1))
    assert plans_left(raw, app) <= 2


def test_threads_of_a_new_process_that_send_chords_at_once(
    make_app: Apps, group_id: str, raw: Any
) -> None:
    app = make_app()
    task, body = app.signature("tests.task"), app.signature("tests.body")
    barrier = threading.Barrier(8)

    def send_one() -> None:
        barrier.wait(PATIENCE)
        # Celery makes a backend for each thread that asks for the first one
        chord([task.clone() for _ in range(5)], app=app)(body.clone())

    threads = [threading.Thread(target=send_one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert plans_left(raw, app) == 8


def test_apply_chord_and_set_chord_size_may_be_called_on_different_backends(
    app: Celery, group_id: str, raw: Any
) -> None:
    one, other = (type(app.backend)(app, url="amqp://") for _ in range(2))
    body = app.signature("tests.body")
    body.freeze()
    one.apply_chord((group_id, [AsyncResult("a", app=app)]), body)
    other.set_chord_size(group_id, 1)
    assert plans_left(raw, app) == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 86_400_000),
        ({"result_expires": 60}, 60_000),
        ({"result_expires": 60, "result_chord_expires": 7}, 7_000),
        ({"result_expires": 0}, None),
        ({"result_expires": None}, None),
        ({"result_expires": 60, "result_chord_expires": 0}, None),
    ],
)
def test_how_long_an_abandoned_chord_is_kept(
    make_app: Apps, settings: Dict[str, Any], expected: Optional[int], group_id: str
) -> None:
    assert make_app(**settings).backend.config.expirations.chord == expected


def test_an_abandoned_chord_is_given_up(
    make_app: Apps, group_id: str, raw: Any, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(result_chord_expires=1)
    lead(app)
    ids = new_ids(2)
    body = send(app, group_id, ids)
    app.backend.mark_as_done(ids[0], 1, request(ids[0], group_id, body))
    eventually(lambda: app.backend.metrics().chords_abandoned == 1)
    assert f"chord {group_id} is given up: 1 of 2 tasks have not ended" in caplog.text
    # The part that comes too late does no harm, and its state is stored.
    app.backend.mark_as_done(ids[1], 2, request(ids[1], group_id, body))
    assert app.AsyncResult(ids[1]).get(timeout=PATIENCE) == 2
    app.backend.close()
    assert plans_left(raw, app) == 0


def test_a_body_that_cannot_be_sent_fails_the_chord(
    app: Celery, group_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def refuse(*args: Any) -> None:
        tries.append(1)
        raise OSError("no route to the broker")

    monkeypatch.setattr(firing.BodySender, "send", refuse)
    lead(app)
    (task_id,) = new_ids(1)
    body = send(app, group_id, [task_id])
    app.backend.mark_as_done(task_id, 1, request(task_id, group_id, body))
    result = app.AsyncResult(body.id)
    eventually(result.ready)
    assert isinstance(result.result, ChordError)
    assert "Callback error" in str(result.result)
    assert "no route" in str(result.result)
    assert len(tries) == firing.TRIES


def fail_header(app: Celery, group_id: str, errback: Any) -> Any:
    """Send a chord whose header fails, and return the result of its body."""
    body = app.signature("tests.body", options={"link_error": [errback]})
    body.freeze()
    (task_id,) = new_ids(1)
    send(app, group_id, [task_id], body)
    app.backend.mark_as_failure(
        task_id, ValueError("x"), request=request(task_id, group_id, body), call_errbacks=False
    )
    return app.AsyncResult(body.id)


def test_an_errback_that_ends_its_thread_keeps_no_chord_from_ending(
    app: Celery, group_id: str, sent: Sent, raw: Any
) -> None:
    @app.task(name=f"errback-{group_id}", shared=False)
    def errback(request: Any, exc: Any, traceback: Any) -> None:
        raise SystemExit(1)

    leading = lead(app)
    result = fail_header(app, group_id, errback.s())
    eventually(result.ready)
    assert isinstance(result.result, ChordError)
    assert "ValueError" in str(result.result)
    second = str(uuid.uuid4())
    (task_id,) = new_ids(1)
    body = send(app, second, [task_id])
    app.backend.mark_as_done(task_id, 1, request(task_id, second, body))
    assert sent.once() == [1]
    eventually(lambda: leading.open == 0)
    app.backend.close()
    assert plans_left(raw, app) == 0


@pytest.mark.parametrize(
    "failure",
    [
        errors.BackendUnavailable("away"),
        BackendStoreError("failed to store result on the backend"),
        errors.DeclarationRefused("refused"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_a_failure_that_could_not_be_stored_is_stored_later_and_errbacks_are_called_once(
    make_app: Apps, group_id: str, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    app = make_app()
    called: List[Any] = []
    tries: List[str] = []

    @app.task(name=f"errback-{group_id}", shared=False)
    def errback(request: Any, exc: Any, traceback: Any) -> None:
        called.append(request.id)

    backend = type(app.backend)
    fail_from_current_stack = backend.fail_from_current_stack

    def fail_twice(self: Any, task_id: str, exc: Any = None) -> Any:
        tries.append(task_id)
        if len(tries) <= 2:
            raise failure
        return fail_from_current_stack(self, task_id, exc)

    monkeypatch.setattr(backend, "fail_from_current_stack", fail_twice)
    leading = lead(app)
    result = fail_header(app, group_id, errback.s())
    eventually(result.ready)
    assert isinstance(result.result, ChordError)
    assert len(tries) == 3
    assert called == [result.id]
    eventually(lambda: leading.open == 0)


def test_a_result_that_cannot_be_decoded_fails_the_chord(make_app: Apps, group_id: str) -> None:
    app = make_app()
    pickling = make_app(result_serializer="pickle", result_accept_content=["pickle", "json"])
    lead(app)
    ids = new_ids(2)
    body = send(app, group_id, ids)
    pickling.backend.mark_as_done(ids[0], 1, request(ids[0], group_id, body))
    app.backend.mark_as_done(ids[1], 1, request(ids[1], group_id, body))
    result = app.AsyncResult(body.id)
    eventually(result.ready)
    assert "Join error: ContentDisallowed" in str(result.result)


def test_a_result_that_the_broker_refuses_fails_the_chord(
    app: Celery, group_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lead(app)
    (task_id,) = new_ids(1)
    body = send(app, group_id, [task_id])
    publisher = app.backend.layout.publisher
    publish = publisher.publish

    def refuse_large(messages: Any, *args: Any, **kwargs: Any) -> Any:
        if any(len(message.body) > 5_000 for message in messages):
            raise errors.ResultTooLarge("too large")
        return publish(messages, *args, **kwargs)

    monkeypatch.setattr(publisher, "publish", refuse_large)
    context = request(task_id, group_id, body)
    with pytest.raises(errors.ResultTooLarge) as refused:
        app.backend.mark_as_done(task_id, "x" * 9_000, context)
    # Celery takes it for a result that cannot be encoded
    app.backend.mark_as_failure(task_id, refused.value, request=context)
    result = app.AsyncResult(body.id)
    eventually(result.ready)
    assert isinstance(result.result, ChordError)
    assert "too large" in str(result.result)


def test_a_body_has_the_parent_and_root_that_other_backends_give_it(
    app: Celery, group_id: str, sent: Sent
) -> None:
    lead(app)
    ids = new_ids(2)
    body = send(app, group_id, ids)
    for task_id in ids:
        app.backend.mark_as_done(task_id, 1, request(task_id, group_id, body))
    sent.once()
    assert sent.options == {"parent_id": ids[1], "root_id": ids[1]}


def test_a_body_keeps_the_process_that_sent_its_chord(make_app: Apps, group_id: str) -> None:
    # Given a process that leads the chord of another
    sender, app = make_app(), make_app()
    lead(app)
    body = sender.signature("tests.body")
    body.freeze()
    sender.backend.apply_chord((group_id, [AsyncResult("a", app=sender)]), body)
    assert body.options["origin"] == anon_nodename()
    assert sender.backend.layout.inbox._table.is_own(body.id)
    body.options["origin"] = "gen1@elsewhere"
    sender.backend.set_chord_size(group_id, 1)
    # When it sends the body, and a task of its own
    noted: Dict[str, Any] = {}

    def note(headers: Any = None, **kwargs: Any) -> None:
        noted[headers["id"]] = headers["origin"]

    signals.before_task_publish.connect(note)
    try:
        app.backend.mark_as_done("a", 1, request("a", group_id, body))
        eventually(lambda: body.id in noted)
        own = app.send_task("tests.own")
    finally:
        signals.before_task_publish.disconnect(note)
    # Then the body's states go to who sent the chord, and it counts on getting its own only
    assert noted == {body.id: "gen1@elsewhere", own.id: anon_nodename()}
    assert app.backend.layout.inbox._table.is_own(own.id)
    assert not app.backend.layout.inbox._table.is_own(body.id)


def test_a_body_of_several_tasks_or_of_a_task_is_not_counted_on(
    app: Celery, group_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = app.signature("tests.body")
    for body in (group([task, task.clone()]), chain(task, task.clone()), chord([task], task)):
        body.freeze()
        app.backend.apply_chord((uuid.uuid4().hex, [AsyncResult("a", app=app)]), body)
        assert "origin" not in body.options
    running = SimpleNamespace(request=SimpleNamespace(id="x", root_id=None))
    monkeypatch.setattr(type(app), "current_worker_task", property(lambda self: running))
    body = send(app, group_id, ["a"])
    assert "origin" not in body.options
    assert not len(app.backend.layout.inbox._table._sent)


def test_nothing_is_taken_of_a_generator_but_what_celery_takes(app: Celery, group_id: str) -> None:
    taken = []

    def results() -> Any:
        for _ in range(100):
            taken.append(1)
            yield AsyncResult("a", app=app)

    body = app.signature("tests.body")
    body.freeze()
    app.backend.apply_chord((group_id, regen(results())), body)
    assert len(taken) <= 4


def test_a_body_may_have_arguments_that_a_result_may_not_have(
    make_app: Apps, group_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app(task_serializer="pickle", accept_content=["pickle", "json"])
    sent = Sent(app, monkeypatch)
    lead(app)
    body = app.signature("tests.body", kwargs={"kept": {1, 2}})
    body.freeze()
    send(app, group_id, ["a"], body)
    app.backend.mark_as_done("a", 1, request("a", group_id, body))
    assert sent.once() == [1]


def test_open_plans_are_taken_again_before_the_broker_finds_them_held_for_too_long(
    app: Celery, group_id: str, sent: Sent, raw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "RETAKE_SECONDS", 0.2)
    monkeypatch.setattr(session, "HEARTBEAT", 0.4)
    leading = lead(app)
    ids, added = new_ids(2), new_ids(1)
    body = send(app, group_id, ids)
    app.backend.add_to_chord(group_id, AsyncResult(added[0], app=app))
    retaken: List[int] = []
    requeued = leading._leader.requeued

    def noted() -> None:
        requeued()
        retaken.append(1)

    monkeypatch.setattr(leading._leader, "requeued", noted)
    app.backend.mark_as_done(ids[0], 1, request(ids[0], group_id, body))
    eventually(lambda: len(retaken) >= 3)
    for task_id in (ids[1], *added):
        app.backend.mark_as_done(task_id, 2, request(task_id, group_id, body))
    assert sent.once() == [1, 2, 2]
    eventually(lambda: leading.open == 0)
    app.backend.close()
    assert plans_left(raw, app) == 0


def test_a_plan_that_only_others_accept_is_taken_again_before_it_is_held_for_too_long(
    make_app: Apps, group_id: str, raw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "RETAKE_SECONDS", 0.2)
    monkeypatch.setattr(session, "HEARTBEAT", 0.4)
    app = make_app(accept_content=["json"])
    send(make_app(task_serializer="pickle", accept_content=["pickle"]), group_id, new_ids(1))
    leading = lead(app)
    eventually(lambda: leading.unreadable >= 3)
    app.backend.close()
    assert plans_left(raw, app) == 1


def test_a_chord_is_fired_after_a_helper_thread_could_not_be_started(
    app: Celery, group_id: str, sent: Sent, raw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helpers, "HELPER_IDLE", 0.01)
    monkeypatch.setattr(service, "REFUSED_SECONDS", 0.1)
    leading = lead(app)
    (task_id,) = new_ids(1)
    body = send(app, group_id, [task_id])
    eventually(lambda: leading.progress(group_id) and not leading._helpers._threads)
    fail_once(monkeypatch, helpers)
    app.backend.mark_as_done(task_id, 1, request(task_id, group_id, body))
    assert sent.once() == [1]
    eventually(lambda: leading.open == 0)
    app.backend.close()
    assert plans_left(raw, app) == 0


def test_a_foreign_message_in_a_plan_queue_is_dropped(
    app: Celery, group_id: str, raw: Any, sent: Sent, caplog: pytest.LogCaptureFixture
) -> None:
    body = send(app, group_id, ["a"])
    channel = raw.channel()
    for number in range(PLAN_QUEUES):
        queue = app.backend.config.topology.plan_queue(number).name
        for properties in ({}, {"type": "part"}, {"type": "plan"}, {"type": "fence"}):
            channel.basic_publish(amqp.Message(b"junk", **properties), routing_key=queue)
    lead(app)
    app.backend.mark_as_done("a", 1, request("a", group_id, body))
    assert sent.once() == [1]
    assert "a plan of a chord cannot be read here" in caplog.text
    app.backend.close()
    assert plans_left(raw, app) == 0


def test_the_number_of_queues_does_not_change_with_the_number_of_chords(
    app: Celery, raw: Any, node: Any
) -> None:
    send(app, uuid.uuid4().hex, new_ids(2))
    before = node.queue_count()
    for _ in range(30):
        send(app, uuid.uuid4().hex, new_ids(2))
    assert node.queue_count() == before


def test_a_leader_that_is_cut_off_loses_its_chords_to_another_one(
    make_app: Apps, node: Any, group_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "HEARTBEAT", 1.0)
    with Proxy(node.amqp_port) as proxy:
        far, near = make_app(broker_url=proxy.url(node.url())), make_app()
        # Given a leader behind a network that fails, and another process that consumes plans
        lead(far)
        ids = new_ids(2)
        body = send(near, group_id, ids)
        eventually(lambda: service_of(far).open == 1)
        lead(near)
        # When the leader is cut off, and the chord is completed
        proxy.stall()
        for task_id in ids:
            near.backend.mark_as_done(task_id, 1, request(task_id, group_id, body))
        # Then the other process fires it, and the first one fires none
        eventually(lambda: near.backend.metrics().chords_fired == 1)
        proxy.reset()
        proxy.resume()
        again = uuid.uuid4().hex
        (task_id,) = new_ids(1)
        body = send(near, again, [task_id])
        near.backend.mark_as_done(task_id, 1, request(task_id, again, body))

        def fired() -> int:
            return sum(each.backend.metrics().chords_fired for each in (near, far))

        eventually(lambda: fired() == 2)
        eventually(lambda: service_of(near).open + service_of(far).open == 0)
        assert fired() == 2
        far.backend.close()
