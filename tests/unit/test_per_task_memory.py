"""The layout ``per-task`` on transports that need no broker: ``memory://`` and ``filesystem://``."""

from __future__ import annotations

import contextlib
import logging
import threading
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator, List

import kombu
import pytest
from celery import Celery, chord, group, states
from celery.backends.base import Backend
from celery.contrib.testing.worker import start_worker
from celery.exceptions import ChordError, ImproperlyConfigured, TimeoutError
from celery.result import GroupResult
from kombu.exceptions import ContentDisallowed
from kombu.transport import memory

from celery_amqp_results import errors
from celery_amqp_results.amqp import transports
from celery_amqp_results.options import RetryPolicy

#: Seconds after which a wait counts as hanging.
LONG = 60.0


def new_id() -> str:
    return str(uuid.uuid4())


def memory_app(**conf: Any) -> Celery:
    app = Celery("memory", broker="memory://", backend="amqp://", set_as_current=False)
    name = f"test-{uuid.uuid4().hex[:12]}"
    app.conf.update(
        result_exchange=name,
        task_default_queue=name,
        # The interval at which the worker polls for tasks.
        broker_transport_options={"polling_interval": 0.01},
        broker_connection_retry_on_startup=True,
    )
    app.conf.update(conf)
    return app


def filesystem_app(folder: Path) -> Celery:
    messages = folder / "messages"
    messages.mkdir(exist_ok=True)
    app = Celery("files", broker="filesystem://", backend="amqp://", set_as_current=False)
    app.conf.update(
        result_exchange=f"test-{uuid.uuid4().hex[:12]}",
        broker_transport_options={
            "data_folder_in": str(messages),
            "data_folder_out": str(messages),
            "control_folder": str(folder / "control"),
            "polling_interval": 0.01,
        },
        broker_connection_retry_on_startup=True,
    )
    return app


@contextlib.contextmanager
def without_broker_state() -> Iterator[None]:
    """kombu keeps the queues of these transports in the process, and would leave them there."""
    before = set(memory.Channel.queues)
    yield
    for name in set(memory.Channel.queues) - before:
        del memory.Channel.queues[name]


def app_on(transport: str, folder: Path) -> Celery:
    return memory_app() if transport == "memory" else filesystem_app(folder)


@pytest.fixture(params=["memory", "filesystem"])
def app(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Celery]:
    """An app with a broker in this process."""
    with without_broker_state():
        app = app_on(request.param, tmp_path)
        yield app
        app.backend.close()
        app.close()


@pytest.fixture
def memory_only() -> Iterator[Celery]:
    """An app on a transport that keeps the order of messages; files do not within a millisecond."""
    with without_broker_state():
        app = memory_app()
        yield app
        app.backend.close()
        app.close()


class Running:
    """An app, its tasks, and a worker for them in a thread."""

    def __init__(self, app: Celery) -> None:
        self.app = app

        @app.task(shared=False)
        def add(x: int, y: int) -> int:
            return x + y

        @app.task(shared=False)
        def total(numbers: List[int]) -> int:
            return sum(numbers)

        @app.task(shared=False)
        def fail(message: str) -> None:
            raise KeyError(message)

        self.add, self.total, self.fail = add, total, fail


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    """A worker in a thread, shared by all tests, since stopping it takes seconds."""
    app = memory_app()
    running = Running(app)
    level = logging.getLogger().level
    with start_worker(app, perform_ping_check=False, pool="solo", shutdown_timeout=LONG):
        yield running
    # The worker has changed the filters, and later tests rely on warnings.
    logging.getLogger().setLevel(level)
    app.backend.close()
    app.close()


def test_the_broker_s_transport_selects_the_layout(app: Celery) -> None:
    assert app.backend.layout_name == "per-task"


@pytest.mark.parametrize("scheme", ["amqp", "amqps", "pyamqp"])
def test_rabbitmq_gets_the_shared_layout_by_default(scheme: str) -> None:
    for options, layout in (({}, "shared"), ({"layout": "per-task"}, "per-task")):
        app = Celery("it", broker=f"{scheme}://", backend="amqp://", set_as_current=False)
        app.conf.result_backend_transport_options = options
        assert app.backend.layout_name == layout


def test_a_result_url_with_a_server_takes_precedence_over_the_broker() -> None:
    app = Celery("it", broker="memory://", backend="amqp://host//", set_as_current=False)
    assert app.backend.layout_name == "shared"


def test_the_shared_layout_is_refused_on_unsupported_transports() -> None:
    app = memory_app(result_backend_transport_options={"layout": "shared"})
    with pytest.raises(ImproperlyConfigured, match="needs RabbitMQ"):
        app.backend  # noqa: B018


def test_the_result_of_a_task_can_be_read_any_number_of_times(
    running: Running,
) -> None:
    result = running.add.delay(2, 3)
    assert result.get(timeout=LONG) == 5
    fresh = running.app.AsyncResult(result.id)
    assert [fresh.get(timeout=LONG) for _ in range(3)] == [5, 5, 5]
    assert running.app.AsyncResult(result.id).state == states.SUCCESS


def test_a_failed_task_raises_its_exception(running: Running) -> None:
    result = running.fail.delay("gone")
    with pytest.raises(KeyError, match="gone"):
        result.get(timeout=LONG)
    again = running.app.AsyncResult(result.id)
    assert (again.state, type(again.result)) == (states.FAILURE, KeyError)
    assert "fail" in again.traceback


def test_an_unknown_task_is_pending(app: Celery) -> None:
    result = app.AsyncResult(new_id())
    assert (result.state, result.result) == (states.PENDING, None)
    with pytest.raises(TimeoutError, match="not ready after"):
        result.get(timeout=0.05)
    with pytest.raises(TimeoutError, match="not ready after"):
        result.get(timeout=0)


def test_polling_leaves_no_queue_behind() -> None:
    with without_broker_state():
        app = memory_app()
        before = set(memory.Channel.queues)
        for _ in range(3):
            assert app.AsyncResult(new_id()).state == states.PENDING
        assert set(memory.Channel.queues) == before
        app.backend.close()


def test_forget_deletes_a_result_and_its_queue(app: Celery) -> None:
    task_id = new_id()
    app.backend.store_result(task_id, 1, states.SUCCESS)
    app.AsyncResult(task_id).forget()
    assert app.AsyncResult(task_id).state == states.PENDING
    assert task_id.replace("-", "") not in memory.Channel.queues
    # It can be stored again.
    app.backend.store_result(task_id, 2, states.SUCCESS)
    assert app.AsyncResult(task_id).get(timeout=LONG) == 2


def test_forgetting_an_unknown_task_is_no_error(app: Celery) -> None:
    app.AsyncResult(new_id()).forget()


def test_groups_are_joined_saved_restored_and_deleted(running: Running) -> None:
    result = group(running.add.s(i, i) for i in range(5)).apply_async()
    assert result.get(timeout=LONG) == [0, 2, 4, 6, 8]
    result.save()
    restored = GroupResult.restore(result.id, app=running.app)
    assert restored is not None
    assert restored.get(timeout=LONG) == [0, 2, 4, 6, 8]
    restored.delete()
    assert GroupResult.restore(result.id, app=running.app) is None


def test_a_group_and_a_task_may_share_an_id(app: Celery) -> None:
    task_id = new_id()
    member = app.AsyncResult(new_id())
    app.backend.store_result(task_id, 1, states.SUCCESS)
    app.backend.save_group(task_id, GroupResult(task_id, [member], app=app))
    for _ in range(2):
        assert app.AsyncResult(task_id).get(timeout=LONG) == 1
        assert app.backend.restore_group(task_id).results == [member]


def test_ids_that_differ_only_in_dashes_are_kept_apart(app: Celery) -> None:
    app.backend.store_result("a-bc", 1, states.SUCCESS)
    app.backend.store_result("ab-c", 2, states.SUCCESS)
    for _ in range(2):
        assert app.AsyncResult("a-bc").get(timeout=LONG) == 1
        assert app.AsyncResult("ab-c").get(timeout=LONG) == 2
        assert app.AsyncResult("abc").state == states.PENDING


def test_chords_run(running: Running) -> None:
    result = chord(running.add.s(i, i) for i in range(4))(running.total.s())
    assert result.get(timeout=LONG) == 12


def test_a_failed_chord_names_the_failed_part(running: Running) -> None:
    result = chord([running.add.s(1, 1), running.fail.s("no")])(running.total.s())
    # Without the header, whose failure would be raised first.
    body = running.app.AsyncResult(result.id)
    with pytest.raises(ChordError, match=result.parent[1].id) as raised:
        body.get(timeout=LONG)
    assert "KeyError('no')" in str(raised.value)


def test_intermediate_states_are_seen_and_the_last_one_is_current(memory_only: Celery) -> None:
    app, task_id = memory_only, new_id()
    for step in range(5):
        app.backend.store_result(task_id, {"current": step}, "PROGRESS")
    result = app.AsyncResult(task_id)
    assert (result.state, result.info) == ("PROGRESS", {"current": 4})
    app.backend.store_result(task_id, 5, states.SUCCESS)
    # A second run that finishes later does not hide the result.
    app.backend.store_result(task_id, None, states.STARTED)
    assert app.AsyncResult(task_id).get(timeout=LONG) == 5


def test_exceeding_the_history_limit_raises_once(memory_only: Celery) -> None:
    app, task_id = memory_only, new_id()
    for step in range(6):
        app.backend.store_result(task_id, step, "PROGRESS")
    with pytest.raises(errors.BacklogLimitExceeded, match=task_id):
        app.backend.poll(task_id, 3)
    # The history that was read is removed, so the next read continues after it.
    assert app.backend.poll(task_id, 3)["result"] == 5


def test_a_history_up_to_the_limit_is_read(memory_only: Celery) -> None:
    app, task_id = memory_only, new_id()
    for step in range(3):
        app.backend.store_result(task_id, step, "PROGRESS")
    assert app.backend.poll(task_id, 3)["result"] == 2


def test_a_waiter_gets_intermediate_states(app: Celery, eventually: Callable[..., Any]) -> None:
    task_id = new_id()
    seen: List[Any] = []
    outcome: List[Any] = []

    def wait() -> None:
        result = app.AsyncResult(task_id)
        outcome.append(result.get(timeout=LONG, on_message=lambda m: seen.append(m["status"])))

    thread = threading.Thread(target=wait)
    thread.start()
    app.backend.store_result(task_id, None, states.STARTED)
    eventually(lambda: seen == [states.STARTED])
    app.backend.store_result(task_id, 1, states.SUCCESS)
    thread.join(LONG)
    assert (seen, outcome) == ([states.STARTED, states.SUCCESS], [1])


def test_a_callback_runs_without_a_waiter(running: Running, eventually: Callable[..., Any]) -> None:
    called: List[Any] = []
    result = running.add.delay(1, 1)
    result.then(lambda r: called.append(r.result))
    eventually(lambda: called == [2])


def test_readers_in_many_threads_all_see_the_result(app: Celery) -> None:
    task_id = new_id()
    app.backend.store_result(task_id, 1, states.SUCCESS)
    seen: List[str] = []

    def read() -> None:
        for _ in range(50):
            seen.append(app.backend.get_task_meta(task_id, cache=False)["status"])

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert seen == [states.SUCCESS] * 400


def test_another_app_of_the_process_sees_the_result() -> None:
    with without_broker_state():
        one, two = memory_app(), memory_app()
        two.conf.result_exchange = one.conf.result_exchange
        task_id = new_id()
        one.backend.store_result(task_id, 1, states.SUCCESS)
        assert two.AsyncResult(task_id).get(timeout=LONG) == 1
        assert one.AsyncResult(task_id).get(timeout=LONG) == 1


def test_a_refused_content_type_raises_an_error_and_stays_in_the_queue(app: Celery) -> None:
    task_id = new_id()
    writer = type(app.backend)(app=app, serializer="pickle", accept=["pickle"], url="amqp://")
    writer.store_result(task_id, {1, 2}, states.SUCCESS)
    for _ in range(2):
        with pytest.raises(ContentDisallowed):
            app.AsyncResult(task_id).state  # noqa: B018
    assert writer.get_task_meta(task_id)["result"] == {1, 2}
    writer.close()


def test_closing_the_backend_raises_an_error_in_its_waiters(
    app: Celery, eventually: Callable[..., Any]
) -> None:
    raised: List[BaseException] = []
    waiting = threading.Event()

    def wait() -> None:
        try:
            app.AsyncResult(new_id()).get(timeout=LONG, on_interval=waiting.set, interval=0.01)
        except errors.BackendUnavailable as exc:
            raised.append(exc)

    thread = threading.Thread(target=wait)
    thread.start()
    assert waiting.wait(LONG)
    app.backend.close()
    thread.join(LONG)
    assert len(raised) == 1


@pytest.mark.skipif(
    not hasattr(Backend, "supports_failure_expires"), reason="Celery before 5.7 does not say so"
)
def test_unsupported_settings_are_logged_as_ignored() -> None:
    app = memory_app(result_failure_expires=60)
    with pytest.warns(UserWarning, match="result_failure_expires"):
        app.backend  # noqa: B018


def test_a_lost_connection_takes_the_other_idle_ones_along() -> None:
    made: List[kombu.Connection] = []

    def make() -> kombu.Connection:
        made.append(kombu.Connection("memory://"))
        return made[-1]

    connector: Any = SimpleNamespace(policy=RetryPolicy())
    sessions = transports.KombuSessions(make, connector)
    # Given two idle connections
    with sessions.session(), sessions.session():
        pass
    # When the server has restarted, which the first user notices
    with pytest.raises(ConnectionResetError), sessions.session():
        raise ConnectionResetError
    # Then the next one gets a new connection
    count = len(made)
    with sessions.session():
        assert len(made) == count + 1
    sessions.close()
