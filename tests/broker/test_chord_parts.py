"""The queue of a chord: parts, sizes, and who may fire."""

from __future__ import annotations

import dataclasses
import socket
import threading
import uuid
from types import SimpleNamespace
from typing import Any, Dict, List, Optional

import amqp
import pytest
from amqp.exceptions import AMQPError, MessageNacked, NotFound
from celery import Celery, chain, chord, group, signals, states
from celery.app.task import Context
from celery.exceptions import ChordError, ImproperlyConfigured
from celery.result import AsyncResult
from celery.utils.nodenames import anon_nodename

from celery_amqp_results import errors
from celery_amqp_results.chords.parts import Chords, Gathered
from celery_amqp_results.protocol.message import PART, PLAN, StateMessage
from tests.conftest import PATIENCE, Apps, eventually, raw_connection


@pytest.fixture(params=["classic", "quorum"])
def app(request: pytest.FixtureRequest, make_app: Apps) -> Celery:
    return make_app(result_backend_transport_options={"shards": 2, "queue_type": request.param})


@pytest.fixture
def chords(app: Celery) -> Chords:
    chords: Optional[Chords] = app.backend.layout.chords
    assert chords is not None
    return chords


@pytest.fixture
def group_id() -> str:
    return str(uuid.uuid4())


def message(task_id: str, kind: str = PART, value: Any = 1) -> StateMessage:
    return StateMessage(
        task_id, "SUCCESS", 1, repr(value).encode(), "application/json", "utf-8", kind=kind
    )


def queue_exists(raw: Any, app: Celery, group_id: str) -> bool:
    channel = raw.channel()
    try:
        channel.queue_declare(app.backend._topology.chord_queue(group_id).name, passive=True)
    except NotFound:
        return False
    finally:
        channel.close()
    return True


class Fired:
    """Takes note of what is fired."""

    def __init__(self) -> None:
        self.chords: List[Gathered] = []

    def __call__(self, gathered: Gathered) -> None:
        self.chords.append(gathered)

    @property
    def ids(self) -> List[str]:
        (gathered,) = self.chords
        return [part.task_id for part in gathered.parts]


def test_the_last_part_fires(chords: Chords, app: Celery, group_id: str, raw: Any) -> None:
    fired = Fired()
    chords.declare(group_id, None, size=3)
    assert not chords.publish_plan(message(group_id, PLAN), 3, 3)
    assert not chords.publish_part(group_id, message("c"), 2, 3)
    assert not chords.publish_part(group_id, message("a"), 0, 3)
    assert chords.reads == 0
    assert chords.publish_part(group_id, message("b"), 1, 3)
    assert chords.settle(group_id, fired)
    assert fired.ids == ["a", "b", "c"]
    assert not fired.chords[0].attempted
    eventually(lambda: not queue_exists(raw, app, group_id))


def test_a_plan_is_on_its_way_while_the_tasks_are_sent(chords: Chords, group_id: str) -> None:
    fired = Fired()
    receipt = chords.declare(group_id, None, message(group_id, PLAN), 2)
    assert receipt is not None
    assert not chords.publish_part(group_id, message("a"), 0, 2)
    chords.confirm_plan(group_id, receipt)
    # There is nothing left to be waited for.
    chords.confirm_plan(group_id, receipt)
    assert chords.publish_part(group_id, message("b"), 1, 2)
    assert chords.settle(group_id, fired)
    assert fired.ids == ["a", "b"]


@pytest.mark.parametrize("taken", [False, True], ids=["lost", "taken"])
def test_a_plan_whose_connection_is_lost_or_taken_is_published_again(
    chords: Chords, group_id: str, taken: bool
) -> None:
    fired = Fired()
    receipt = chords.declare(group_id, None, message(group_id, PLAN), 2)
    assert receipt is not None
    if taken:
        chords._publisher._idle.remove(receipt.channel)
    else:
        receipt.channel.link.amqp.transport.sock.shutdown(socket.SHUT_RDWR)
    chords.confirm_plan(group_id, receipt)
    for index, name in enumerate("ab"):
        chords.publish_part(group_id, message(name), index, 2)
    assert chords.settle(group_id, fired)
    assert fired.ids == ["a", "b"]
    if taken:
        receipt.channel.link.drop()


def test_a_plan_that_no_queue_takes_is_complained_of(
    chords: Chords, app: Celery, group_id: str, raw: Any, caplog: pytest.LogCaptureFixture
) -> None:
    receipt = chords.declare(group_id, None, message(group_id, PLAN), 2)
    assert receipt is not None
    channel = raw.channel()
    channel.queue_delete(app.backend._topology.chord_queue(group_id).name)
    channel.close()
    # It is published again, since another thread has the connection, and there is no queue.
    chords._publisher._idle.remove(receipt.channel)
    chords.confirm_plan(group_id, receipt)
    assert "its body will not run" in caplog.text
    receipt.channel.link.drop()


def test_the_sender_fires_when_the_size_is_known_last(chords: Chords, group_id: str) -> None:
    fired = Fired()
    chords.declare(group_id, None)
    for name in "ab":
        assert not chords.publish_part(group_id, message(name), None, None)
    assert chords.publish_plan(message(group_id, PLAN), 2, None)
    assert chords.settle(group_id, fired)
    assert fired.ids == ["a", "b"]


def test_a_worker_learns_the_size_of_a_generator_once(chords: Chords, group_id: str) -> None:
    fired = Fired()
    chords.declare(group_id, None)
    assert not chords.publish_part(group_id, message("a"), 0, None)
    assert not chords.publish_plan(message(group_id, PLAN), 3, None)
    assert not chords.publish_part(group_id, message("b"), 1, None)
    assert chords._sizes[group_id] == 3
    assert chords.publish_part(group_id, message("c"), 2, None)
    assert chords.settle(group_id, fired)
    assert fired.ids == ["a", "b", "c"]
    assert group_id not in chords._sizes


def test_a_part_that_is_published_again_counts_once(chords: Chords, group_id: str) -> None:
    fired = Fired()
    chords.declare(group_id, None, size=2)
    chords.publish_plan(message(group_id, PLAN), 2, 2)
    chords.publish_part(group_id, message("a", value=1), 0, 2)
    # As long as the complete set: it has to be looked at, and is not enough.
    assert chords.publish_part(group_id, message("a", value=2), 0, 2)
    assert not chords.settle(group_id, fired)
    assert fired.chords == []
    assert chords.publish_part(group_id, message("b"), 1, 2)
    assert chords.settle(group_id, fired)
    assert fired.ids == ["a", "b"]
    # The first result of the task counts.
    assert fired.chords[0].parts[0].state.body == b"1"


def test_a_task_that_is_there_twice_counts_twice(chords: Chords, group_id: str) -> None:
    fired = Fired()
    chords.declare(group_id, None, size=2)
    chords.publish_plan(message(group_id, PLAN), 2, 2)
    chords.publish_part(group_id, message("a"), 0, 2)
    assert chords.publish_part(group_id, message("a"), 1, 2)
    assert chords.settle(group_id, fired)
    assert fired.ids == ["a", "a"]


def test_parts_without_an_index_come_last(chords: Chords, group_id: str) -> None:
    fired = Fired()
    chords.declare(group_id, None, size=2)
    chords.publish_plan(message(group_id, PLAN), 4, 4)
    for name, index in (("x", None), ("b", 1), ("y", None), ("a", 0)):
        chords.publish_part(group_id, message(name), index, 4)
    assert chords.settle(group_id, fired)
    assert fired.ids == ["a", "b", "x", "y"]


def test_added_parts_are_waited_for(chords: Chords, group_id: str) -> None:
    fired = Fired()
    chords.declare(group_id, None, size=2)
    chords.publish_plan(message(group_id, PLAN), 1, 1)
    chords.publish_more(group_id)
    chords.publish_more(group_id)
    for name in "ab":
        assert chords.publish_part(group_id, message(name), 0, 1)
        assert not chords.settle(group_id, fired)
    chords.publish_part(group_id, message("c"), 0, 1)
    assert chords.settle(group_id, fired)
    assert fired.ids == ["a", "b", "c"]


def test_fewer_tasks_than_were_announced(chords: Chords, group_id: str) -> None:
    fired = Fired()
    chords.declare(group_id, None, size=2)
    assert not chords.publish_plan(message(group_id, PLAN), 2, 5)
    assert not chords.publish_part(group_id, message("a"), 0, 5)
    assert chords.publish_part(group_id, message("b"), 1, 5)
    assert chords.settle(group_id, fired)
    assert fired.ids == ["a", "b"]


def test_a_part_of_a_chord_that_is_over_is_dropped(
    chords: Chords, app: Celery, group_id: str, raw: Any
) -> None:
    fired = Fired()
    chords.declare(group_id, None, size=2)
    chords.publish_plan(message(group_id, PLAN), 1, 1)
    assert chords.publish_part(group_id, message("a"), 0, 1)
    assert chords.settle(group_id, fired)
    eventually(lambda: not queue_exists(raw, app, group_id))
    assert not chords.publish_part(group_id, message("a"), 0, 1)
    assert not chords.settle(group_id, fired)
    assert len(fired.chords) == 1
    assert not queue_exists(raw, app, group_id)


def test_everything_is_put_back_when_firing_fails(
    app: Celery, chords: Chords, group_id: str, raw: Any
) -> None:
    fired = Fired()

    def refuse(gathered: Gathered) -> None:
        raise LookupError("not now")

    chords.declare(group_id, None, size=2)
    chords.publish_plan(message(group_id, PLAN), 1, 1)
    chords.publish_part(group_id, message("a"), 0, 1)
    with pytest.raises(LookupError):
        chords.settle(group_id, refuse)
    # The plan, the part, and the note that firing has begun, published without a confirm.
    channel, queue = raw.channel(), app.backend._topology.chord_queue(group_id).name
    eventually(lambda: channel.queue_declare(queue, passive=True).message_count == 3)
    assert chords.settle(group_id, fired)
    assert fired.ids == ["a"]
    assert fired.chords[0].attempted


def test_one_of_many_that_complete_it_at_once_fires(make_app: Apps, group_id: str) -> None:
    for size in (2, 4, 16) * 4:
        identity = f"{group_id}-{uuid.uuid4().hex}"
        apps = [make_app() for _ in range(4)]
        apps[0].backend.layout.chords.declare(identity, None, size=1)
        apps[0].backend.layout.chords.publish_plan(message(identity, PLAN), size, size)
        barrier = threading.Barrier(size)
        fired = Fired()
        failures: List[BaseException] = []

        def complete(
            number: int,
            apps: Any = apps,
            identity: str = identity,
            size: int = size,
            barrier: threading.Barrier = barrier,
            fired: Fired = fired,
            failures: List[BaseException] = failures,
        ) -> None:
            chords = apps[number % 4].backend.layout.chords
            try:
                barrier.wait(PATIENCE)
                if chords.publish_part(identity, message(f"{number:02}"), number, size):
                    chords.settle(identity, fired)
            except BaseException as exc:
                failures.append(exc)

        threads = [threading.Thread(target=complete, args=(n,)) for n in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        assert not failures
        assert fired.ids == [f"{number:02}" for number in range(size)]


def test_the_next_in_line_takes_over_from_a_reader_that_is_gone(
    make_app: Apps, group_id: str
) -> None:
    first, second = make_app(), make_app()
    chords = first.backend.layout.chords
    chords.declare(group_id, None, size=2)
    chords.publish_plan(message(group_id, PLAN), 1, 1)
    chords.publish_part(group_id, message("a"), 0, 1)
    fired = Fired()
    holding = threading.Event()
    go = threading.Event()

    def die(gathered: Gathered) -> None:
        holding.set()
        go.wait(PATIENCE)
        # What a killed process leaves of its connection.
        raise ConnectionResetError("killed")

    def first_in_line() -> None:
        with pytest.raises(ConnectionResetError):
            chords.settle(group_id, die)

    other = second.backend.layout.chords
    reader = threading.Thread(target=first_in_line)
    reader.start()
    assert holding.wait(PATIENCE)
    waiting = threading.Thread(target=other.settle, args=(group_id, fired))
    waiting.start()
    go.set()
    reader.join(PATIENCE)
    waiting.join(PATIENCE)
    assert not waiting.is_alive()
    assert fired.ids == ["a"]
    assert fired.chords[0].attempted


def test_a_chord_sent_again_while_it_is_being_fired(
    make_app: Apps, group_id: str, raw: Any
) -> None:
    """Its queue, declared again, must not go with the first one."""
    first, second = make_app(), make_app()
    body = send(first, group_id, ["a"])
    sending, go = threading.Event(), threading.Event()

    def send_slowly(signature: Any, results: Any) -> None:
        sending.set()
        assert go.wait(PATIENCE)

    first.backend._bodies.send = send_slowly
    firing = threading.Thread(
        target=first.backend.mark_as_done, args=("a", 1, request("a", group_id, 0, dict(body)))
    )
    firing.start()
    assert sending.wait(PATIENCE)
    again = threading.Thread(target=send, args=(second, group_id, ["a"]))
    again.start()
    again.join(0.5)
    assert again.is_alive()
    go.set()
    again.join(PATIENCE)
    firing.join(PATIENCE)
    assert not again.is_alive()
    assert not firing.is_alive()
    assert queue_exists(raw, second, group_id)
    fired = Fired()
    chords = second.backend.layout.chords
    assert chords.publish_part(group_id, message("a"), 0, 1)
    assert chords.settle(group_id, fired)
    assert fired.ids == ["a"]


def test_a_foreign_message_is_ignored(
    chords: Chords, app: Celery, group_id: str, raw: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fired = Fired()
    chords.declare(group_id, None, size=2)
    channel = raw.channel()
    queue = app.backend._topology.chord_queue(group_id).name
    for properties in ({}, {"type": "part"}, {"type": "plan"}, {"type": "fence"}):
        channel.basic_publish(amqp.Message(b"junk", **properties), routing_key=queue)
    chords.publish_plan(message(group_id, PLAN), 1, 1)
    chords.publish_part(group_id, message("a"), 0, 1)
    assert chords.settle(group_id, fired)
    assert fired.ids == ["a"]
    assert "ignored a foreign" in caplog.text


# -- through the backend ---------------------------------------------------------------------------


def request(task_id: str, group_id: str, index: int, body: Dict[str, Any]) -> Context:
    return Context(id=task_id, group=group_id, group_index=index, chord=body, ignore_result=False)


def send(app: Celery, group_id: str, ids: List[str]) -> Any:
    body = app.signature("tests.body")
    body.freeze()
    app.backend.apply_chord((group_id, [AsyncResult(i, app=app) for i in ids]), body)
    app.backend.set_chord_size(group_id, len(ids))
    return body


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
    make_app: Apps, settings: Dict[str, Any], expected: Optional[int], group_id: str, raw: Any
) -> None:
    app = make_app(**settings)
    topology = app.backend._topology
    send(app, group_id, ["a", "b"])
    channel = raw.channel()
    spec = topology.chord_queue(group_id, expected)
    # Refused if the arguments differ.
    channel.queue_declare(spec.name, durable=True, auto_delete=False, arguments=spec.arguments)
    assert spec.arguments.get("x-expires") == expected
    channel.queue_delete(spec.name)


def test_an_expiry_that_the_broker_cannot_take(make_app: Apps) -> None:
    app = make_app(result_chord_expires=10**8)
    with pytest.raises(ImproperlyConfigured, match="result_chord_expires"):
        app.backend  # noqa: B018


def takes_messages(url: str, queue: str) -> bool:
    """Return whether there is a queue, without using it, which would keep it alive."""
    returned = []
    try:
        # A connection of its own: RabbitMQ may close it over a quorum queue that is being deleted.
        with raw_connection(url) as connection:
            channel = connection.channel()
            channel.events["basic_return"].add(lambda *args: returned.append(args))
            channel.basic_publish_confirm(amqp.Message(b""), routing_key=queue, mandatory=True)
    except (AMQPError, MessageNacked):
        return True
    return not returned


@pytest.mark.parametrize(
    ("content_type", "content"),
    [
        ("application/json", b"junk"),
        ("application/json", b'{"status": "CHORD", "result": {}}'),
        ("application/json", b'{"status": "CHORD", "result": 1}'),
        ("application/x-python-serialize", b"\x80\x04N."),
    ],
    ids=["no json", "without a body", "no dict", "pickled"],
)
def test_a_plan_that_cannot_be_read_fails_its_chord(
    app: Celery, group_id: str, raw: Any, caplog: pytest.LogCaptureFixture, content_type: str,
    content: bytes,
) -> None:  # fmt: skip
    # Given a chord whose plan was overwritten
    body = send(app, group_id, ["a"])
    damaged = dataclasses.replace(
        message(group_id, PLAN), content_type=content_type, content_encoding="binary", body=content
    )
    app.backend.layout.chords.publish_plan(damaged, 1, 1)
    # When it is complete, its body fails, and nothing is left behind
    app.backend.mark_as_done("a", 1, request("a", group_id, 0, dict(body)))
    eventually(lambda: not queue_exists(raw, app, group_id))
    with pytest.raises(ChordError, match="Plan error"):
        app.AsyncResult(body.id).get(timeout=PATIENCE)
    assert f"Chord {group_id!r} fails" in caplog.text


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
@pytest.mark.parametrize("lazy", [False, True])
def test_an_abandoned_chord_goes_away(
    make_app: Apps, group_id: str, raw: Any, amqp_url: str, queue_type: str, lazy: bool
) -> None:
    app = make_app(
        result_chord_expires=1,
        result_backend_transport_options={"shards": 1, "queue_type": queue_type},
    )
    topology = app.backend._topology
    body = send(app, group_id, ["a", "b"])
    app.backend.mark_as_done("a", 1, request("a", group_id, 0, dict(body)))
    if lazy:
        app.backend.layout.chords.declare(group_id, 1000)
    assert queue_exists(raw, app, group_id)
    eventually(lambda: not takes_messages(amqp_url, topology.chord_queue(group_id).name))
    eventually(lambda: not takes_messages(amqp_url, topology.chord_size_queue(group_id).name))
    # The part that comes too late does no harm, and its state is stored.
    app.backend.mark_as_done("b", 2, request("b", group_id, 1, dict(body)))
    assert app.AsyncResult("b").get(timeout=PATIENCE) == 2


def test_state_and_part_wait_for_one_confirm(app: Celery, group_id: str) -> None:
    body = send(app, group_id, ["a", "b"])
    publisher = app.backend.layout.publisher
    calls = []
    publish = publisher.publish

    def noting(messages: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(messages))
        return publish(messages, *args, **kwargs)

    publisher.publish = noting
    app.backend.mark_as_done("a", 1, request("a", group_id, 0, dict(body)))
    assert calls == [2]
    assert app.AsyncResult("a").get(timeout=PATIENCE) == 1


def test_a_body_that_cannot_be_published_fails_the_chord(app: Celery, group_id: str) -> None:
    body = send(app, group_id, ["a"])

    def refuse(signature: Any, results: Any) -> None:
        raise OSError("no route to the broker")

    app.backend._bodies.send = refuse
    app.backend.mark_as_done("a", 1, request("a", group_id, 0, dict(body)))
    result = app.AsyncResult(body.id)
    eventually(result.ready)
    assert isinstance(result.result, ChordError)
    assert "Callback error" in str(result.result)
    assert "no route" in str(result.result)


def test_a_result_that_the_broker_refuses_fails_the_chord(
    app: Celery, group_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = send(app, group_id, ["a"])
    publisher = app.backend.layout.publisher
    publish = publisher.publish

    def refuse_large(messages: Any, *args: Any, **kwargs: Any) -> Any:
        if any(len(message.body) > 5_000 for message in messages):
            raise errors.ResultTooLarge("too large")
        return publish(messages, *args, **kwargs)

    publisher.publish = refuse_large
    with pytest.raises(errors.ResultTooLarge):
        app.backend.mark_as_done("a", "x" * 9_000, request("a", group_id, 0, dict(body)))
    result = app.AsyncResult(body.id)
    eventually(result.ready)
    assert isinstance(result.result, ChordError)
    assert "too large" in str(result.result)


def test_a_part_that_cannot_be_decoded_fails_the_chord(make_app: Apps, group_id: str) -> None:
    app = make_app()
    pickling = make_app(result_serializer="pickle", result_accept_content=["pickle", "json"])
    body = send(app, group_id, ["a", "b"])
    pickling.backend.mark_as_done("a", 1, request("a", group_id, 0, dict(body)))
    app.backend.mark_as_done("b", 1, request("b", group_id, 1, dict(body)))
    result = app.AsyncResult(body.id)
    eventually(result.ready)
    assert "Join error: ContentDisallowed" in str(result.result)


def test_who_waits_for_the_body_looks_after_the_chord(app: Celery, group_id: str) -> None:
    body = send(app, group_id, ["a"])
    backend = app.backend
    # A worker that has published the last part and is gone.
    backend.layout.chords.publish_part(
        group_id,
        backend._encode_state(
            "a", states.FAILURE, {"status": "FAILURE", "result": {"exc_type": "KeyError",
            "exc_message": ["k"], "exc_module": "builtins"}, "task_id": "a"}, PART, None
        ),
        0,
        1,
    )  # fmt: skip
    backend.settle_body(body.id)
    result = app.AsyncResult(body.id)
    eventually(result.ready)
    assert str(result.result) == "Dependency a raised KeyError('k')"
    # Neither this nor a body that was never sent has any effect.
    backend.settle_body(body.id)
    backend.settle_body("unknown")


def test_a_body_keeps_the_process_that_sent_its_chord(make_app: Apps, group_id: str) -> None:
    # Given a process that fires the chord of another
    sender, app = make_app(), make_app()
    body = send(sender, group_id, ["a"])
    assert body.options["origin"] == anon_nodename()
    assert sender.backend.layout.inbox.is_own(body.id)
    forwarded = dict(body, options=dict(body.options, origin="gen1@elsewhere"))
    # When it sends the body, and a task of its own
    noted: Dict[str, Any] = {}

    def note(headers: Any = None, **kwargs: Any) -> None:
        noted[headers["id"]] = headers["origin"]

    signals.before_task_publish.connect(note)
    try:
        app.backend.mark_as_done("a", 1, request("a", group_id, 0, forwarded))
        own = app.send_task("tests.own")
    finally:
        signals.before_task_publish.disconnect(note)
    # Then the body's states go to who sent the chord, and it counts on getting its own only
    assert noted == {body.id: "gen1@elsewhere", own.id: anon_nodename()}
    assert app.backend.layout.inbox.is_own(own.id)
    assert not app.backend.layout.inbox.is_own(body.id)


def test_a_body_of_several_tasks_or_of_a_task_is_not_counted_on(
    app: Celery, group_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = app.signature("tests.body")
    for body in (group([task, task.clone()]), chain(task, task.clone()), chord([task], task)):
        body.freeze()
        app.backend.apply_chord((uuid.uuid4().hex, [AsyncResult("a", app=app)]), body)
        assert "origin" not in body.options
    running = SimpleNamespace(request=SimpleNamespace(id="x"))
    monkeypatch.setattr(type(app), "current_worker_task", property(lambda self: running))
    body = send(app, group_id, ["a"])
    assert "origin" not in body.options
    assert not app.backend.layout.inbox._table._sent


def test_a_chord_too_large_for_a_quorum_queue(make_app: Apps, group_id: str) -> None:
    app = make_app(result_backend_transport_options={"shards": 1, "queue_type": "quorum"})
    results = [AsyncResult("a", app=app)] * 70_000
    with pytest.raises(ChordError, match="quorum"):
        app.backend.apply_chord((group_id, results), app.signature("tests.body"))


def test_nothing_is_taken_of_a_generator(app: Celery, group_id: str) -> None:
    from celery.utils.functional import regen

    taken = []

    def results() -> Any:
        taken.append(1)
        yield AsyncResult("a", app=app)

    body = app.signature("tests.body")
    body.freeze()
    app.backend.apply_chord((group_id, regen(results())), body)
    assert taken == []
    assert "chord_size" not in body
