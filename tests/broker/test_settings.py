"""Celery's settings for results: each is honoured."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import json
import socket
import threading
import time
import zlib
from typing import Any, Callable, Dict, Iterator, List

import amqp
import pytest
from celery import Celery, states
from celery.exceptions import BackendGetMetaError, BackendStoreError, ImproperlyConfigured
from celery.result import GroupResult
from kombu.exceptions import ContentDisallowed, OperationalError

from tests import subprocess_jobs, subprocesses
from tests.broker.helpers import LONG, Waiting, new_id, until_stored, until_watched
from tests.conftest import Apps


class Tap:
    """A queue that receives every published state, as ``docs/wire.md`` describes."""

    def __init__(self, connection: amqp.Connection, app: Celery) -> None:
        self._channel = connection.channel()
        exchange = f"{app.conf.result_exchange}.states"
        arguments = app.backend.config.topology.exchange_arguments
        self._channel.exchange_declare(
            exchange, "topic", durable=True, auto_delete=False, arguments=arguments
        )
        self._queue = self._channel.queue_declare("", exclusive=True).queue
        self._channel.queue_bind(self._queue, exchange, "#")

    def message(self, eventually: Callable[..., Any]) -> amqp.Message:
        """Return the next message."""
        message: amqp.Message = eventually(lambda: self._channel.basic_get(self._queue, True))
        return message


@pytest.fixture
def tap(raw: amqp.Connection) -> Callable[[Celery], Tap]:
    return lambda app: Tap(raw, app)


# -- serializers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("serializer", "module", "content_type"),
    [
        ("json", "json", "application/json"),
        ("pickle", "pickle", "application/x-python-serialize"),
        ("yaml", "yaml", "application/x-yaml"),
        ("msgpack", "msgpack", "application/x-msgpack"),
    ],
)
def test_result_serializer(
    make_app: Apps,
    tap: Callable[[Celery], Tap],
    eventually: Callable[..., Any],
    serializer: str,
    module: str,
    content_type: str,
) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    conf: Dict[str, Any] = {"result_serializer": serializer, "result_accept_content": [serializer]}
    app = make_app(**conf)
    tapped = tap(app)
    value = {"text": "ünï", "list": [1, 2.5, None, True]}
    done, failed, group = new_id(), new_id(), GroupResult(new_id(), [], app=app)
    app.backend.store_result(done, value, states.SUCCESS)
    app.backend.store_result(failed, KeyError("k"), states.FAILURE)
    group.save()
    reader = make_app(**conf)
    assert reader.AsyncResult(done).get(timeout=LONG) == value
    assert isinstance(reader.AsyncResult(failed).result, KeyError)
    assert GroupResult.restore(group.id, app=reader) is not None
    assert tapped.message(eventually).properties["content_type"] == content_type


def test_pickle_preserves_types_that_json_cannot(make_app: Apps) -> None:
    conf: Dict[str, Any] = {"result_serializer": "pickle", "result_accept_content": ["pickle"]}
    app, task_id = make_app(**conf), new_id()
    value = {("a", 1): {2, 3}, "when": datetime.date(2026, 11, 22)}
    app.backend.store_result(task_id, value, states.SUCCESS)
    assert make_app(**conf).AsyncResult(task_id).get(timeout=LONG) == value


# -- result_accept_content -----------------------------------------------------------------------


def id_in_shard_of(app: Celery, task_id: str) -> str:
    """Return a new id whose state goes to the same shard."""
    shard = app.backend.config.topology.shard
    return next(i for i in iter(new_id, None) if shard(i) == shard(task_id))


def test_reading_content_that_is_not_accepted_raises(
    make_app: Apps,
) -> None:
    pickles = make_app(result_serializer="pickle", result_accept_content=["pickle"])
    reader = make_app(result_accept_content=["json"])
    bad = new_id()
    pickles.backend.store_result(bad, {1, 2}, states.SUCCESS)
    for ask in (
        lambda: reader.AsyncResult(bad).state,
        lambda: reader.AsyncResult(bad).get(timeout=LONG),
        lambda: reader.AsyncResult(bad).get(timeout=0),
        lambda: list(reader.backend.get_many([bad], timeout=LONG)),
    ):
        with pytest.raises(ContentDisallowed):
            ask()
    # It is stored nevertheless, and a process that accepts it can read it.
    assert reader.backend.task_result_exists(bad)
    assert pickles.AsyncResult(bad).get(timeout=LONG) == {1, 2}


def test_content_that_is_not_accepted_does_not_affect_its_shard(make_app: Apps) -> None:
    pickles = make_app(result_serializer="pickle", result_accept_content=["pickle"])
    writer, reader = make_app(), make_app(result_accept_content=["json"])
    bad = new_id()
    before, after = id_in_shard_of(reader, bad), id_in_shard_of(reader, bad)
    writer.backend.store_result(before, 1, states.SUCCESS)
    pickles.backend.store_result(bad, 0, states.SUCCESS)
    writer.backend.store_result(after, 2, states.SUCCESS)
    for _ in range(3):
        assert reader.AsyncResult(before).get(timeout=LONG) == 1
        assert reader.AsyncResult(after).get(timeout=LONG) == 2
    assert dict(reader.backend.get_many([before, after], timeout=LONG)).keys() == {before, after}


def test_content_that_is_not_accepted_fails_only_its_own_waiter(
    make_app: Apps, eventually: Callable[..., Any]
) -> None:
    pickles = make_app(result_serializer="pickle", result_accept_content=["pickle"])
    writer, reader = make_app(), make_app(result_accept_content=["json"])
    bad = new_id()
    good = id_in_shard_of(reader, bad)
    for_bad = Waiting(lambda: reader.AsyncResult(bad).get(timeout=LONG))
    for_good = Waiting(lambda: reader.AsyncResult(good).get(timeout=LONG))
    until_watched(reader, bad, eventually)
    until_watched(reader, good, eventually)
    pickles.backend.store_result(bad, 1, states.SUCCESS)
    with pytest.raises(ContentDisallowed):
        for_bad.result()
    writer.backend.store_result(good, 2, states.SUCCESS)
    assert for_good.result() == 2


def test_accept_content_applies_if_result_accept_content_is_not_set(
    make_app: Apps,
) -> None:
    app = make_app(result_serializer="pickle", accept_content=["pickle", "json"])
    task_id = new_id()
    app.backend.store_result(task_id, {1}, states.SUCCESS)
    assert app.AsyncResult(task_id).get(timeout=LONG) == {1}


# -- expiry --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expires", "milliseconds"),
    [
        (60, "60000"),
        (1.5, "1500"),
        (datetime.timedelta(minutes=2), "120000"),
        (datetime.timedelta(milliseconds=250), "250"),
        ("3600", "3600000"),
        (" 1.5 ", "1500"),
        ("0", None),
        (datetime.timedelta(days=60), "5184000000"),
        (10**12, "315360000000"),
        (0, None),
        (None, None),
    ],
)
def test_result_expires(
    make_app: Apps,
    tap: Callable[[Celery], Tap],
    eventually: Callable[..., Any],
    expires: Any,
    milliseconds: Any,
) -> None:
    app = make_app(result_expires=expires)
    tapped = tap(app)
    for state in (states.STARTED, states.SUCCESS, states.REVOKED):
        app.backend.store_result(new_id(), None, state)
        assert tapped.message(eventually).properties.get("expiration") == milliseconds
    app.backend.store_result(new_id(), KeyError(), states.FAILURE)
    assert tapped.message(eventually).properties.get("expiration") == milliseconds
    GroupResult(new_id(), [], app=app).save()
    assert tapped.message(eventually).properties.get("expiration") == milliseconds


def test_an_expired_result_is_pending_and_its_neighbours_are_kept(
    make_app: Apps, eventually: Callable[..., Any]
) -> None:
    # Given results that expire, between others that do not.
    short, long = make_app(shards=1, result_expires=0.5), make_app(shards=1, result_expires=600)
    kept, gone = [new_id() for _ in range(5)], [new_id() for _ in range(5)]
    for keep, go in zip(kept, gone):
        long.backend.store_result(keep, 1, states.SUCCESS)
        short.backend.store_result(go, 1, states.SUCCESS)
    # After the expiry no process finds them, whether it has read them before or not.
    readers = [short, long, make_app(shards=1)]
    for reader in readers:
        eventually(lambda r=reader: all(r.AsyncResult(i).state == "PENDING" for i in gone))
        assert [reader.AsyncResult(i).state for i in kept] == ["SUCCESS"] * 5
        assert not reader.backend.task_result_exists(gone[0])


def test_many_expired_results_are_pending_after_they_have_been_packed(
    make_app: Apps, eventually: Callable[..., Any]
) -> None:
    short, long = make_app(shards=1, result_expires=2), make_app(shards=1)
    ids = [new_id() for _ in range(300)]
    for task_id in ids:
        short.backend.store_result(task_id, 1, states.SUCCESS)
    kept = new_id()
    long.backend.store_result(kept, 1, states.SUCCESS)
    for _ in range(3):
        assert make_app(shards=1).AsyncResult(kept).state == states.SUCCESS
    reader = make_app(shards=1)
    eventually(lambda: not any(reader.backend.get_many(ids, max_iterations=1)))
    assert make_app(shards=1).AsyncResult(kept).state == states.SUCCESS


@pytest.mark.parametrize("expires", [-1, "", "soon", float("nan"), float("inf"), True, [1]])
@pytest.mark.parametrize(
    "name", ["result_expires", "result_failure_expires", "result_chord_expires"]
)
def test_an_expiry_that_is_no_number_of_seconds_is_refused(
    make_app: Apps, name: str, expires: Any
) -> None:
    app = make_app(**{name: expires})
    with pytest.raises(ImproperlyConfigured, match=name):
        app.backend  # noqa: B018


def test_result_failure_expires(
    make_app: Apps, tap: Callable[[Celery], Tap], eventually: Callable[..., Any]
) -> None:
    app = make_app(result_expires=60, result_failure_expires=7200)
    tapped = tap(app)
    app.backend.store_result(new_id(), KeyError(), states.FAILURE)
    assert tapped.message(eventually).properties["expiration"] == "7200000"
    app.backend.store_result(new_id(), 1, states.SUCCESS)
    assert tapped.message(eventually).properties["expiration"] == "60000"


def test_result_failure_expires_of_zero_keeps_failures(
    make_app: Apps, tap: Callable[[Celery], Tap], eventually: Callable[..., Any]
) -> None:
    app = make_app(result_expires=60, result_failure_expires=0)
    tapped = tap(app)
    app.backend.store_result(new_id(), KeyError(), states.FAILURE)
    assert "expiration" not in tapped.message(eventually).properties


# -- result_persistent ---------------------------------------------------------------------------


@pytest.mark.parametrize(("persistent", "mode"), [(None, 2), (True, 2), (False, 1)])
def test_result_persistent_affects_messages_but_not_queues(
    make_app: Apps,
    raw: amqp.Connection,
    tap: Callable[[Celery], Tap],
    eventually: Callable[..., Any],
    persistent: Any,
    mode: int,
) -> None:
    app = make_app(shards=1, result_persistent=persistent)
    tapped = tap(app)
    app.backend.store_result(new_id(), 1, states.SUCCESS)
    assert tapped.message(eventually).properties["delivery_mode"] == mode
    assert app.backend.persistent is (persistent is not False)
    # Declaring them durable does not conflict with the existing queues.
    channel = raw.channel()
    channel.queue_declare(
        f"{app.conf.result_exchange}.shard.0",
        durable=True,
        auto_delete=False,
        arguments={"x-queue-type": "classic", "x-single-active-consumer": True},
    )


def test_apps_that_differ_in_result_persistent_share_their_results(make_app: Apps) -> None:
    task_id = new_id()
    make_app(result_persistent=False).backend.store_result(task_id, 1, states.SUCCESS)
    assert make_app(result_persistent=True).AsyncResult(task_id).get(timeout=LONG) == 1


# -- result_extended -----------------------------------------------------------------------------


def test_result_extended(make_app: Apps) -> None:
    from celery.app.task import Context

    request = Context(
        id="x", task="tests.add", args=[1, 2], kwargs={"z": 3}, hostname="w1", retries=2,
        delivery_info={"routing_key": "q"}, origin=None,
    )  # fmt: skip
    for extended in (True, False):
        app, task_id = make_app(result_extended=extended), new_id()
        app.backend.store_result(task_id, 1, states.SUCCESS, request=request)
        result = make_app().AsyncResult(task_id)
        assert result.state == states.SUCCESS
        found = (result.name, result.args, result.kwargs, result.worker, result.retries)
        if extended:
            assert found == ("tests.add", [1, 2], {"z": 3}, "w1", 2)
            assert result.queue == "q"
        else:
            assert found == (None,) * 5
        assert isinstance(result.date_done, datetime.datetime)


# -- result_compression --------------------------------------------------------------------------


def test_result_compression(
    make_app: Apps, tap: Callable[[Celery], Tap], eventually: Callable[..., Any]
) -> None:
    app, task_id = make_app(result_compression="zlib"), new_id()
    tapped = tap(app)
    app.backend.store_result(task_id, "x" * 10_000, states.SUCCESS)
    message = tapped.message(eventually)
    assert len(message.body) < 1000
    assert json.loads(zlib.decompress(message.body))["result"] == "x" * 10_000
    assert message.properties["application_headers"]["compression"] == "application/x-gzip"
    # A reader without compression can read it, and vice versa.
    plain = make_app()
    assert plain.AsyncResult(task_id).get(timeout=LONG) == "x" * 10_000
    other = new_id()
    plain.backend.store_result(other, "y", states.SUCCESS)
    assert app.AsyncResult(other).get(timeout=LONG) == "y"


# -- result_cache_max ----------------------------------------------------------------------------


def test_without_result_cache_max_nothing_is_cached(app: Celery) -> None:
    task_id = new_id()
    app.backend.store_result(task_id, 1, states.SUCCESS)
    assert app.AsyncResult(task_id).get(timeout=LONG) == 1
    assert app.AsyncResult(task_id).state == states.SUCCESS
    assert not app.backend.is_cached(task_id)


def test_result_cache_max_limits_the_cache(make_app: Apps) -> None:
    app = make_app(result_cache_max=2)
    ids = [new_id() for _ in range(3)]
    for task_id in ids:
        app.backend.store_result(task_id, 1, states.SUCCESS)
        assert app.AsyncResult(task_id).state == states.SUCCESS
    assert [app.backend.is_cached(i) for i in ids] == [False, True, True]
    # Cached results are not requested again; reloading requests them.
    subprocesses.run(app, subprocess_jobs.forget, ids=ids)
    assert app.AsyncResult(ids[2]).state == states.SUCCESS
    app.backend.reload_task_result(ids[2])
    assert app.AsyncResult(ids[2]).state == states.PENDING


def test_a_pending_state_is_not_cached(make_app: Apps) -> None:
    app, task_id = make_app(result_cache_max=10), new_id()
    assert app.AsyncResult(task_id).state == states.PENDING
    app.backend.store_result(task_id, None, states.STARTED)
    until_stored(app)
    assert app.AsyncResult(task_id).state == states.STARTED
    app.backend.store_result(task_id, 1, states.SUCCESS)
    assert app.AsyncResult(task_id).state == states.SUCCESS
    assert app.backend.is_cached(task_id)


def test_forget_empties_the_cache_as_well(make_app: Apps) -> None:
    app, task_id = make_app(result_cache_max=10), new_id()
    app.backend.store_result(task_id, 1, states.SUCCESS)
    assert app.AsyncResult(task_id).state == states.SUCCESS
    app.AsyncResult(task_id).forget()
    assert not app.backend.is_cached(task_id)
    assert app.AsyncResult(task_id).state == states.PENDING


# -- result_exchange -----------------------------------------------------------------------------


def test_result_exchange_keeps_apps_apart(make_app: Apps, raw: amqp.Connection) -> None:
    one = make_app(shards=1)
    two = make_app(shards=1, result_exchange=f"{make_app.prefix}-two")
    task_id = new_id()
    try:
        one.backend.store_result(task_id, "one", states.SUCCESS)
        assert two.AsyncResult(task_id).state == states.PENDING
        two.backend.store_result(task_id, "two", states.SUCCESS)
        assert one.AsyncResult(task_id).get(timeout=LONG) == "one"
        assert two.AsyncResult(task_id).get(timeout=LONG) == "two"
    finally:
        two.backend.close()
        channel = raw.channel()
        channel.queue_delete(f"{make_app.prefix}-two.shard.0")
        channel.exchange_delete(f"{make_app.prefix}-two.states")


# -- result_backend_always_retry -----------------------------------------------------------------


class Door:
    """A port that refuses connections until it is opened, then forwards to the broker."""

    def __init__(self, host: str, port: int) -> None:
        self._broker = (host, port)
        self._server = socket.socket()
        self._server.bind(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._sockets: List[socket.socket] = [self._server]
        self._threads: List[threading.Thread] = []

    def open(self) -> None:
        """Forward connections from now on."""
        self._server.listen()
        self._start(self._accept)

    def _start(self, function: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=function, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            broker = socket.create_connection(self._broker)
            self._sockets += [client, broker]
            self._start(self._copy, client, broker)
            self._start(self._copy, broker, client)

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self) -> None:
        """Close all sockets."""
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(LONG)
        for sock in self._sockets:
            sock.close()


@pytest.fixture
def door(amqp_url: str) -> Iterator[Door]:
    import kombu

    broker = kombu.Connection(amqp_url)
    door = Door(broker.hostname or "127.0.0.1", int(broker.port or 5672))
    yield door
    door.close()


def behind(door: Door, url: str) -> str:
    """Return the URL of the broker through the door."""
    import kombu

    broker = kombu.Connection(url)
    userid, password = broker.userid or "guest", broker.password or "guest"
    return f"amqp://{userid}:{password}@127.0.0.1:{door.port}/{broker.virtual_host}"


#: The backend itself gives up immediately, so every retry is Celery's.
IMPATIENT = {"shards": 8, "retry_policy": {"max_retries": 0}, "lookup_timeout": 1.0}


def test_result_backend_always_retry_stores_once_the_broker_is_back(
    make_app: Apps, amqp_url: str, door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(
        behind(door, amqp_url),
        result_backend_transport_options=IMPATIENT,
        result_backend_always_retry=True,
        result_backend_base_sleep_between_retries_ms=20,
        result_backend_max_sleep_between_retries_ms=50,
    )
    task_id = new_id()
    storing = Waiting(lambda: app.backend.store_result(task_id, 1, states.SUCCESS))
    asking = Waiting(lambda: app.backend.get_task_meta(new_id())["status"])
    storing.thread.join(0.5)
    assert storing.thread.is_alive()
    assert asking.thread.is_alive()
    door.open()
    assert storing.result() == 1
    assert asking.result() == states.PENDING
    assert make_app().AsyncResult(task_id).get(timeout=LONG) == 1


def test_result_backend_max_retries_limits_the_retries(
    make_app: Apps, amqp_url: str, door: Door
) -> None:
    app = make_app(
        behind(door, amqp_url),
        result_backend_transport_options=IMPATIENT,
        result_backend_always_retry=True,
        result_backend_max_retries=2,
        result_backend_base_sleep_between_retries_ms=1,
        result_backend_max_sleep_between_retries_ms=2,
    )
    with pytest.raises(BackendStoreError):
        app.backend.store_result(new_id(), 1, states.SUCCESS)
    with pytest.raises(BackendGetMetaError):
        app.backend.get_task_meta(new_id())


def test_without_result_backend_always_retry_the_error_is_raised_immediately(
    make_app: Apps, amqp_url: str, door: Door
) -> None:
    app = make_app(behind(door, amqp_url), result_backend_transport_options=IMPATIENT)
    with pytest.raises(OperationalError):
        app.backend.store_result(new_id(), 1, states.SUCCESS)
    with pytest.raises(OperationalError):
        app.backend.get_task_meta(new_id())


def test_the_retry_policy_of_the_backend_covers_a_broker_outage(
    make_app: Apps, amqp_url: str, door: Door
) -> None:
    policy = {"max_retries": 1000, "interval_start": 0.01, "interval_step": 0}
    app = make_app(
        behind(door, amqp_url),
        result_backend_transport_options={"shards": 8, "retry_policy": policy},
    )
    task_id = new_id()
    storing = Waiting(lambda: app.backend.store_result(task_id, 1, states.SUCCESS))
    getting = Waiting(lambda: app.AsyncResult(task_id).get(timeout=LONG))
    storing.thread.join(0.3)
    assert storing.thread.is_alive()
    door.open()
    assert storing.result() == 1
    assert getting.result() == 1


def test_get_times_out_while_the_broker_is_down(make_app: Apps, amqp_url: str, door: Door) -> None:
    app = make_app(behind(door, amqp_url))
    begun = time.monotonic()
    with pytest.raises(Exception, match=r"timed out|cannot be reached"):
        app.AsyncResult(new_id()).get(timeout=0.5)
    assert time.monotonic() - begun < LONG
