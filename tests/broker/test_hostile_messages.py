"""Foreign and damaged messages in every queue that the backend reads.

None of them blocks a queue, hides a good result, or is executed. Each is counted, and logged
once.
"""

from __future__ import annotations

import gc
import json
import logging
import pickle
import struct
import zlib
from typing import Any, Callable, Dict, Iterator, List, Tuple

import amqp
import pytest
from celery import Celery, states
from celery.app.task import Context
from celery.exceptions import SecurityError
from celery.result import AsyncResult
from kombu.exceptions import ContentDisallowed

from celery_amqp_results import errors
from celery_amqp_results.protocol import page
from celery_amqp_results.protocol.message import PART, PLAN, StateMessage
from celery_amqp_results.protocol.names import Route, plan_number
from celery_amqp_results.protocol.ranking import fold
from celery_amqp_results.store import shard_read
from tests.broker.helpers import LONG, Waiting, new_id, until_stored, until_watched
from tests.conftest import Apps, eventually

#: Older than any result that the tests store, so that a forged SUCCESS would become current.
LONG_AGO = 1


class Trap:
    """An object whose pickle leaves a trace when it is loaded."""

    def __reduce__(self) -> Tuple[Any, ...]:
        return pytest.fail, ("a pickle was read",)


@pytest.fixture(autouse=True)
def _no_collection() -> Iterator[None]:
    """Collect no garbage meanwhile: its finalizers would fail at the depth of a nested message."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def state_properties(task_id: str, state: str = states.SUCCESS, **changes: Any) -> Dict[str, Any]:
    """Return the properties of a valid state, with *changes*."""
    properties = StateMessage(
        task_id, state, LONG_AGO, b"", "application/json", "utf-8"
    ).properties(True)
    headers = {**properties["application_headers"], **changes.pop("headers", {})}
    properties["application_headers"] = {k: v for k, v in headers.items() if v is not None}
    properties.update(changes)
    return {name: value for name, value in properties.items() if value is not None}


def state_body(task_id: str, result: Any = "forged", status: str = states.SUCCESS) -> bytes:
    return json.dumps(
        {"task_id": task_id, "status": status, "result": result, "traceback": None}
    ).encode()


def bomb(compress: Callable[[bytes], bytes]) -> bytes:
    return compress(b" " * 4_000_000)


def hostile_states(task_id: str) -> Iterator[Tuple[str, Dict[str, Any], bytes]]:
    """Yield messages about *task_id*: what is wrong with each, its properties and its body."""
    good = state_body(task_id)
    properties = state_properties

    def compressed(content_type: str) -> Dict[str, Any]:
        return properties(task_id, headers={"compression": content_type})

    yield "nothing at all", {}, b""
    yield "no type", properties(task_id, type=None), good
    yield "an unknown type", properties(task_id, type="nonsense"), good
    yield "no headers", properties(task_id, application_headers=None), good
    yield "no id", properties(task_id, correlation_id=None), good
    yield (
        "an id that is no text",
        properties(task_id, correlation_id=None, headers={"id": "zz"}),
        b"",
    )
    yield "no content type", properties(task_id, content_type=None), good
    yield "no state", properties(task_id, headers={"state": None}), good
    yield "a state that is a table", properties(task_id, headers={"state": {"a": [1]}}), good
    yield "a long header", properties(task_id, headers={"published": "9" * 100_000}), good
    yield "a negative time", properties(task_id, headers={"published": -1}), good
    yield "a time that is true", properties(task_id, headers={"published": True}), good
    yield "an empty body", properties(task_id), b""
    yield "a truncated body", properties(task_id), good[:-9]
    yield "garbage", properties(task_id), bytes(range(256))
    yield "a list", properties(task_id), b"[1, 2]"
    yield "another state inside", properties(task_id), state_body(task_id, status="FAILURE")
    yield "another task inside", properties(task_id), state_body("somebody else's")
    yield "a state inside that is no name", properties(task_id), good.replace(b'"SUCCESS"', b"[]")
    yield "a content type that lies", properties(task_id, content_type="text/yaml"), good
    yield "an encoding that is none", properties(task_id, content_encoding="x"), bytes([255])
    yield (
        "a pickle",
        properties(
            task_id, content_type="application/x-python-serialize", content_encoding="binary"
        ),
        pickle.dumps(Trap()),
    )
    yield "a pickle that says it is JSON", properties(task_id), pickle.dumps(Trap())
    yield "a bomb", compressed("application/x-gzip"), bomb(zlib.compress)
    yield (
        "a bomb in the encoding",
        properties(task_id, content_type="application/data", content_encoding="zlib"),
        bomb(zlib.compress),
    )
    yield "no compression", compressed("application/x-gzip"), good
    yield "an unknown compression", compressed("nonsense"), good
    yield "a nest", properties(task_id), b"[" * 100_000
    yield "a chord's part", properties(task_id, type=PART), good


def hostile_pages(task_id: str) -> Iterator[Tuple[str, Dict[str, Any], bytes]]:
    properties = {"type": page.PAGE, "content_type": page.CONTENT_TYPE}
    state = StateMessage(
        task_id, states.SUCCESS, LONG_AGO, state_body(task_id), "application/json", "utf-8"
    )
    good = page.encode([state])
    entry = good[28:]
    digest = good[12:20]
    yield "an empty page", properties, b""
    yield "a page that is none", properties, b"<html>" * 10
    yield "a truncated page", properties, good[:-5]
    yield "too many entries", properties, good[:8] + struct.pack(">I", 2**32 - 1) + good[12:]
    yield "an entry beyond the end", properties, good[:20] + struct.pack(">II", 28, 2**31) + entry
    yield (
        "one entry a thousand times",
        properties,
        b"".join(
            [good[:8], struct.pack(">I", 1000)]
            + [digest + struct.pack(">II", 12 + 16 * 1000, len(entry))] * 1000
            + [entry]
        ),
    )
    yield "a head beyond the entry", properties, good[:28] + struct.pack(">I", 2**31) + good[32:]
    absurd = page.encode([state]).replace(b'"p":1', b'"p":-')
    yield "a head that is no JSON", properties, absurd
    yield (
        "a time of a year that has no name",
        properties,
        page.encode(
            [
                StateMessage(
                    task_id, "STARTED", 10**30, b"{}", "application/json", "utf-8", None, 10**30
                )
            ]
        ),
    )


def publish_to(raw: amqp.Connection, queue: str, messages: Any) -> int:
    channel = raw.channel()
    channel.confirm_select()
    count = 0
    for _, properties, body in messages:
        channel.basic_publish_confirm(amqp.Message(body, **properties), routing_key=queue)
        count += 1
    channel.close()
    return count


def publish_raw(
    raw: amqp.Connection, queue: bytes, exchange: bytes, flags: int, properties: bytes, body: bytes
) -> None:
    """Publish with properties given as bytes, which py-amqp would not write."""
    channel = raw.channel()
    channel.confirm_select()

    def frame(kind: int, payload: bytes) -> bytes:
        return struct.pack(">BHI", kind, channel.channel_id, len(payload)) + payload + b"\xce"

    def short(text: bytes) -> bytes:
        return bytes([len(text)]) + text

    method = struct.pack(">HHH", 60, 40, 0) + short(exchange) + short(queue) + b"\0"
    header = struct.pack(">HHQH", 60, 0, len(body), flags) + properties
    confirmed: List[int] = []
    channel.events["basic_ack"].add(lambda tag, multiple: confirmed.append(tag))
    octets = frame(1, method) + frame(2, header) + (frame(3, body) if body else b"")
    raw.transport.write(octets)
    while not confirmed:
        raw.drain_events(timeout=LONG)
    channel.close()


#: Property flags and bytes that RabbitMQ forwards and py-amqp cannot decode.
UNREADABLE = {
    "an id that is no UTF-8": (1 << 10, b"\x03\xff\xfe\xfd"),
    "a time that is no date": (1 << 6, struct.pack(">Q", 2**62)),
    "a deep table": (1 << 13, b""),
}


def deep_table(depth: int) -> bytes:
    table = b""
    for _ in range(depth):
        table = b"\x01aF" + struct.pack(">I", len(table)) + table
    return struct.pack(">I", len(table)) + table


UNREADABLE["a deep table"] = (1 << 13, deep_table(3000))


def shard_of(app: Celery, task_id: str) -> str:
    topology = app.backend.config.topology
    return str(topology.shard_queue(topology.shard(task_id)).name)


def make(make_app: Apps, **options: Any) -> Celery:
    return make_app(
        result_backend_transport_options={
            "shards": 2, "max_decompressed_size": 1_000_000, **options
        }
    )  # fmt: skip


def read_from_store(app: Celery, ids: List[str]) -> Dict[str, Any]:
    """Return what a new process finds in the store, independent of pushed states."""
    found = app.backend.layout.store.read(ids)
    return {
        task_id: None if state is None else app.backend.reader.decode(state)["result"]
        for task_id, state in ((i, fold(found[i])) for i in ids)
    }


def test_nothing_in_a_shard_hides_a_good_result(
    make_app: Apps, raw: amqp.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    # Given a result, and every hostile message about the same task before and after it
    app = make(make_app)
    task_id, other = new_id(), new_id()
    app.backend.store_result(other, "other", states.SUCCESS)
    app.backend.store_result(task_id, None, "STARTED")
    until_stored(app)
    queue = shard_of(app, task_id)
    hostile = [*hostile_states(task_id), *hostile_pages(task_id)]
    publish_to(raw, queue, hostile)
    app.backend.store_result(task_id, "good", states.SUCCESS)
    publish_to(raw, queue, hostile)
    for flags, octets in UNREADABLE.values():
        publish_raw(raw, queue.encode(), b"", flags, octets, state_body(task_id))
        publish_raw(raw, queue.encode(), b"", flags, octets, b"")
    # When it is read often enough for the shard to be packed
    with caplog.at_level(logging.WARNING, "celery_amqp_results"):
        for _ in range(3):
            assert read_from_store(app, [task_id, other]) == {task_id: "good", other: "other"}
    # Then each bad message was counted, and logged once, briefly, with its queue
    told = [r.getMessage() for r in caplog.records if "foreign or damaged" in r.getMessage()]
    assert len(told) == len(set(told)) >= 25
    assert all(queue in text and len(text) < 600 for text in told)
    assert app.backend.layout.store.rejected > 60
    # And good results can be stored, read and forgotten as before
    app.AsyncResult(task_id).forget()
    assert read_from_store(app, [other]) == {other: "other"}


def test_clearly_foreign_messages_are_removed_from_a_shard_and_others_stay(
    make_app: Apps, raw: amqp.Connection
) -> None:
    app = make(make_app, shards=1)
    task_id = new_id()
    app.backend.store_result(task_id, 1, states.SUCCESS)
    queue = shard_of(app, task_id)
    publish_to(raw, queue, [("", {}, b"event") for _ in range(40)])
    publish_to(raw, queue, [("", state_properties(task_id, type="of-a-later-version"), b"x")])
    assert read_from_store(app, [task_id]) == {task_id: 1}
    app.backend.close()
    length = raw.channel().queue_declare(queue, passive=True).message_count
    assert length == 2


def test_a_state_in_the_wrong_shard_is_not_found_and_is_reported(
    make_app: Apps, raw: amqp.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    app = make(make_app)
    task_id = new_id()
    shard = app.backend.config.topology.shard(task_id)
    other = next(i for i in iter(new_id, "") if app.backend.config.topology.shard(i) != shard)
    app.backend.store_result(other, "other", states.SUCCESS)
    publish_to(raw, shard_of(app, other), [("", state_properties(task_id), state_body(task_id))])
    with caplog.at_level(logging.WARNING, "celery_amqp_results"):
        assert read_from_store(app, [task_id, other]) == {task_id: None, other: "other"}
    assert f"belongs to shard {shard}" in caplog.text


@pytest.mark.parametrize("state", [states.FAILURE, "PROGRESS"])
def test_a_state_from_the_far_future_loses_to_every_other_state(
    make_app: Apps, raw: amqp.Connection, state: str
) -> None:
    app = make(make_app, shards=1)
    task_id, alone = new_id(), new_id()
    real = ValueError("real") if state == states.FAILURE else {"n": 1}
    app.backend.store_result(task_id, real, state)
    app.backend.store_result(alone, None, "STARTED")
    future = [
        ("", state_properties(i, state, headers={"published": 2**62}), state_body(i, "x", state))
        for i in (task_id, alone)
    ]
    # A worker with a wrong clock stores expiring results, enough of them to be packed.
    for _, properties, _ in future:
        properties["expiration"] = "86400000"
    publish_to(raw, shard_of(app, task_id), future)
    for _ in range(shard_read.PACK_AT):
        app.backend.store_result(new_id(), None, states.SUCCESS)
    for _ in range(2):
        found = app.backend.layout.store.read([task_id, alone])
        current = fold(found[task_id])
        assert current is not None
        assert 10**15 < current.published < 2**61
        # Nothing was lost of the task without other states, except what packing removed.
        alone_state = fold(found[alone])
        assert alone_state is not None
        assert (alone_state.state == states.FAILURE) == (state == states.FAILURE)


def test_a_hostile_push_does_not_end_the_inbox(
    make_app: Apps, raw: amqp.Connection, eventually: Callable[..., Any]
) -> None:
    app = make(make_app)
    task_id, other = new_id(), new_id()
    waiting = Waiting(lambda: app.AsyncResult(task_id).get(timeout=LONG))
    until_watched(app, task_id, eventually)
    topology = app.backend.config.topology
    exchange = topology.exchange
    channel = raw.channel()
    key = topology.routing_key(other, states.SUCCESS, Route("all"))
    inbox = app.backend.layout.inbox
    for _, properties, body in hostile_states(other):
        channel.basic_publish(amqp.Message(body, **properties), exchange, key)
    for flags, octets in UNREADABLE.values():
        publish_raw(raw, key.encode(), exchange.encode(), flags, octets, b"x")
    # A routing key that is not valid UTF-8
    for body in (b"", b"x"):
        publish_raw(raw, key.encode() + b"\xff", exchange.encode(), 0, b"", body)
    app.backend.store_result(task_id, "good", states.SUCCESS)
    assert waiting.result() == "good"
    eventually(lambda: inbox.rejected > 10)
    assert inbox.connections == 1


def test_reading_a_damaged_result_raises_and_executes_nothing(
    make_app: Apps, raw: amqp.Connection
) -> None:
    app = make(make_app, shards=1)
    app.backend.store_result("x", 1, states.SUCCESS)
    wrong = {}
    for what, properties, body in hostile_states("x"):
        if what in ("a truncated body", "a bomb", "a bomb in the encoding", "a pickle", "a nest"):
            task_id = wrong[what] = new_id()
            properties["correlation_id"] = task_id
            publish_to(raw, shard_of(app, task_id), [(what, properties, body)])
    assert len(wrong) == 5
    for what, task_id in wrong.items():
        expected = ContentDisallowed if what == "a pickle" else errors.ForeignMessage
        with pytest.raises(expected):
            app.AsyncResult(task_id).get(timeout=LONG)
        with pytest.raises(expected):
            app.AsyncResult(task_id).state  # noqa: B018 - reads it


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"exc_module": "os", "exc_type": "system", "exc_message": "false"}, SecurityError),
        ({"exc_module": "pytest", "exc_type": "fail", "exc_message": "run"}, SecurityError),
        ({"exc_module": "builtins", "exc_type": "object", "exc_message": ""}, SecurityError),
        ({"exc_module": [], "exc_type": "E"}, errors.ForeignMessage),
        ({"exc_type": 1, "exc_message": 1}, errors.ForeignMessage),
        ({"exc_module": "nowhere"}, errors.ForeignMessage),
        ("words", errors.ForeignMessage),
        (17, errors.ForeignMessage),
    ],
)
def test_a_failure_without_an_exception_type_is_refused(
    make_app: Apps, raw: amqp.Connection, result: Any, expected: Any
) -> None:
    app = make(make_app, shards=1)
    task_id = new_id()
    app.backend.store_result("x", 1, states.SUCCESS)
    body = state_body(task_id, result, states.FAILURE)
    forged = ("", state_properties(task_id, states.FAILURE), body)
    publish_to(raw, shard_of(app, task_id), [forged])
    with pytest.raises(expected):
        app.AsyncResult(task_id).get(timeout=LONG)


def test_a_very_large_foreign_message_is_skipped_and_removed(
    make_app: Apps, raw: amqp.Connection
) -> None:
    app = make(make_app, shards=1)
    task_id = new_id()
    app.backend.store_result(task_id, "small", states.SUCCESS)
    queue = shard_of(app, task_id)
    version = int(raw.server_properties["version"].split(".")[0])
    # Since 4.0 a broker accepts 16 MiB at most.
    body = bytes(100_000_000 if version < 4 else 16_000_000)
    publish_to(raw, queue, [("", {}, body)])
    assert read_from_store(app, [task_id]) == {task_id: "small"}
    app.backend.close()
    assert raw.channel().queue_declare(queue, passive=True).message_count == 1


def test_a_pointer_to_a_foreign_queue_neither_reads_nor_deletes_it(
    make_app: Apps, raw: amqp.Connection
) -> None:
    app = make(make_app, shards=1)
    task_id = new_id()
    app.backend.store_result("x", 1, states.SUCCESS)
    precious = make_app.prefix + "-tasks"
    channel = raw.channel()
    channel.queue_declare(precious, auto_delete=False)
    forged = StateMessage(
        task_id, states.SUCCESS, LONG_AGO, b"", "application/json", "utf-8", body_queue=precious
    )
    body = page.encode([forged])
    publish_to(
        raw,
        shard_of(app, task_id),
        [("", forged.properties(True), b""), ("", {"type": page.PAGE}, body)],
    )
    assert app.AsyncResult(task_id).state == states.PENDING
    app.AsyncResult(task_id).forget()
    channel.queue_declare(precious, passive=True)


def test_hostile_messages_in_the_queue_of_a_task_hide_no_good_one(
    make_app: Apps, raw: amqp.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(result_backend_transport_options={"layout": "per-task"})
    task_id = new_id()
    queue = task_id.replace("-", "")
    app.backend.store_result(task_id, None, "STARTED")
    per_task = [m for m in hostile_states(task_id) if m[0] not in ("a long header", "no state")]
    wrong = {"an empty body", "a truncated body", "garbage", "a list", "a pickle",
             "a pickle that says it is JSON", "a nest", "a bomb in the encoding",
             "a state inside that is no name", "an encoding that is none"}  # fmt: skip
    publish_to(raw, queue, [message for message in per_task if message[0] in wrong])
    app.backend.store_result(task_id, "good", states.SUCCESS)
    with caplog.at_level(logging.WARNING, "celery_amqp_results"):
        for _ in range(2):
            assert app.AsyncResult(task_id).get(timeout=LONG) == "good"
    assert app.backend.metrics().rejected >= 2 * len(wrong)
    told = [r.getMessage() for r in caplog.records if "foreign or damaged" in r.getMessage()]
    assert len(told) == len(set(told)) >= 8
    # A damaged message without a good one is reported to its reader
    lonely = new_id()
    app.backend.store_result(lonely, 1, states.SUCCESS)
    channel = raw.channel()
    channel.queue_purge(lonely.replace("-", ""))
    publish_to(raw, lonely.replace("-", ""), [("", {}, pickle.dumps(Trap()))])
    with pytest.raises((errors.ForeignMessage, ContentDisallowed)):
        app.AsyncResult(lonely).state  # noqa: B018 - reads it
    app.AsyncResult(lonely).forget()
    app.AsyncResult(task_id).forget()


def test_hostile_messages_in_a_plan_queue_neither_fire_nor_stop_a_chord(
    make_app: Apps, raw: amqp.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    app = make(make_app)
    chords = app.backend.layout.chords
    group_id, member = new_id(), new_id()
    queue = app.backend.config.topology.plan_queue(plan_number(group_id)).name
    body = app.signature("tests.body")
    body.freeze()

    def plan(content: Any) -> bytes:
        return json.dumps(content).encode()

    right = {"mark": "m", "results": [], "began": 1, "body": {}}
    hostile = [
        *hostile_states(new_id()),
        ("a plan that is empty", state_properties(group_id, type=PLAN), b"{}"),
        *(
            (f"a wrong {name}", state_properties(group_id, type=PLAN), plan({**right, name: wrong}))
            for name, wrong in [
                ("mark", 1), ("results", {}), ("results", [1]), ("results", [[None]]),
                ("began", "0"), ("body", []), ("proofs", [1]), ("expires", "1"), ("root_id", 1),
            ]
        ),
    ]  # fmt: skip
    app.backend.apply_chord((group_id, [AsyncResult(member, app=app)]), body)
    app.backend.set_chord_size(group_id, 1)
    publish_to(raw, queue, hostile)
    for flags, octets in UNREADABLE.values():
        publish_raw(raw, queue.encode(), b"", flags, octets, b"x")
    with caplog.at_level(logging.WARNING, "celery_amqp_results"):
        chords.service.start(met=True)
        eventually(lambda: chords.service.rejected >= len(hostile))
        # The chord waits for its own task, and for no other
        assert chords.service.progress(group_id) == (1, [member])
        request = Context(id=member, group=group_id, chord=dict(body))
        app.backend.mark_as_done(member, 1, request)
        eventually(lambda: app.backend.metrics().chords_fired == 1)


def test_a_watch_of_everything_reads_no_foreign_queue(
    app: Celery, raw: amqp.Connection, eventually: Callable[..., Any]
) -> None:
    # Given a watcher, and a queue of others
    task_id, precious = new_id(), new_id()
    channel = raw.channel()
    channel.queue_declare(precious)
    channel.basic_publish(
        amqp.Message(b'{"status": "SUCCESS"}', **state_properties(task_id)), "", precious
    )
    waiting = Waiting(lambda: next(app.backend.watch(timeout=LONG)))
    taps = app.backend.layout._taps
    eventually(lambda: any(tap._link is not None for tap in list(taps)))
    # When a state is pushed whose body is said to be there
    topology = app.backend.config.topology
    pointer = state_properties(task_id, headers={"body-queue": precious})
    key = topology.routing_key(task_id, states.SUCCESS, Route("all"))
    channel.basic_publish(amqp.Message(b"", **pointer), topology.exchange, key)
    app.backend.store_result(task_id, "good", states.SUCCESS)
    # Then it is left out
    assert waiting.result()["result"] == "good"
    assert channel.queue_declare(precious, passive=True).message_count == 1
