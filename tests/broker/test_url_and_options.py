"""The result URL, and options that are invalid or point to nothing."""

from __future__ import annotations

import socket
import time
import traceback
import uuid
from typing import Any, Callable, Iterator, Tuple
from urllib.parse import quote

import kombu
import pytest
from celery import states
from celery.exceptions import ImproperlyConfigured, TimeoutError
from kombu.exceptions import OperationalError

from tests import subprocess_jobs, subprocesses
from tests.broker.helpers import LONG, new_id
from tests.conftest import Apps
from tools import rabbitmq

#: A password with characters that must be escaped in a URL.
PASSWORD = "s3cr:t/@?#%"


def parts(url: str) -> kombu.Connection:
    return kombu.Connection(url)


@pytest.fixture
def account(node: rabbitmq.Node) -> Iterator[Tuple[str, str]]:
    """A user with :data:`PASSWORD` and a virtual host, on the broker."""
    user, vhost = f"user-{uuid.uuid4().hex[:8]}", f"/results/{uuid.uuid4().hex[:8]}"
    node.ctl("add_user", user, PASSWORD)
    node.ctl("add_vhost", vhost)
    node.ctl("set_permissions", "-p", vhost, user, ".*", ".*", ".*")
    yield user, vhost
    node.ctl("delete_vhost", vhost)
    node.ctl("delete_user", user)


def url_of(amqp_url: str, user: str, password: str, vhost: str) -> str:
    broker = parts(amqp_url)
    return (
        f"amqp://{quote(user, safe='')}:{quote(password, safe='')}@"
        f"{broker.hostname}:{broker.port}/{quote(vhost, safe='')}"
    )


def test_results_go_to_the_broker_of_the_url_with_its_user_and_virtual_host(
    make_app: Apps, amqp_url: str, account: Tuple[str, str], node: rabbitmq.Node
) -> None:
    user, vhost = account
    app = make_app(url_of(amqp_url, user, PASSWORD, vhost), shards=2)
    task_id = new_id()
    app.backend.store_result(task_id, "there", states.SUCCESS)
    assert subprocesses.run(app, subprocess_jobs.values, ids=[task_id]) == ["there"]
    assert make_app(shards=2).AsyncResult(task_id).state == states.PENDING
    assert ".shard." in node.ctl("list_queues", "-p", vhost, "name")


def test_missing_permissions_raise_a_clear_error(
    make_app: Apps, amqp_url: str, account: Tuple[str, str], node: rabbitmq.Node
) -> None:
    user, vhost = account
    node.ctl("set_permissions", "-p", vhost, user, "", "", "")
    app = make_app(url_of(amqp_url, user, PASSWORD, vhost))
    calls: Tuple[Callable[[], Any], ...] = (
        lambda: app.backend.store_result(new_id(), 1, states.SUCCESS),
        lambda: app.AsyncResult(new_id()).state,
        lambda: app.AsyncResult(new_id()).get(timeout=LONG),
    )
    for ask in calls:
        with pytest.raises(OperationalError, match=r"(?i)permission") as caught:
            ask()
        assert PASSWORD not in shown(caught.value)


def shown(exc: BaseException) -> str:
    return "".join(traceback.format_exception(type(exc), exc, exc.__traceback__)) + repr(exc)


@pytest.mark.parametrize(
    "ask",
    [
        lambda app: app.backend.store_result(new_id(), 1, states.SUCCESS),
        lambda app: app.backend.store_result(new_id(), None, states.STARTED),
        lambda app: app.AsyncResult(new_id()).state,
        lambda app: app.AsyncResult(new_id()).get(timeout=LONG),
        lambda app: app.AsyncResult(new_id()).get(),
        lambda app: app.AsyncResult(new_id()).forget(),
        lambda app: list(app.backend.get_many([new_id()], timeout=LONG)),
    ],
    ids=["store", "store on the way", "state", "get", "get for ever", "forget", "get_many"],
)
class TestUnusableBroker:
    def test_a_wrong_password_raises_an_error_without_showing_it(
        self, make_app: Apps, amqp_url: str, ask: Callable[[Any], Any]
    ) -> None:
        app = make_app(url_of(amqp_url, "guest", "wr0ng-secret", "/"))
        with pytest.raises(OperationalError, match="refuses") as caught:
            ask(app)
        assert "wr0ng-secret" not in shown(caught.value)
        assert "password" in str(caught.value)
        assert "guest:**@" in str(caught.value)

    def test_an_unknown_virtual_host_raises_an_error(
        self, make_app: Apps, amqp_url: str, ask: Callable[[Any], Any]
    ) -> None:
        app = make_app(url_of(amqp_url, "guest", "guest", "/no-such-vhost"))
        with pytest.raises(OperationalError, match="virtual host"):
            ask(app)

    def test_a_missing_broker_raises_an_error_instead_of_hanging(
        self, make_app: Apps, ask: Callable[[Any], Any]
    ) -> None:
        app = make_app(
            "amqp://guest:wr0ng-secret@127.0.0.1:1//",
            result_backend_transport_options={
                "retry_policy": {"max_retries": 2, "interval_step": 0.01},
                "lookup_timeout": 2,
            },
        )
        begun = time.monotonic()
        with pytest.raises(OperationalError, match="cannot be reached") as caught:
            ask(app)
        assert time.monotonic() - begun < LONG
        assert "wr0ng-secret" not in shown(caught.value)

    def test_a_silent_port_raises_an_error_instead_of_hanging(
        self, make_app: Apps, ask: Callable[[Any], Any]
    ) -> None:
        # The kernel accepts connections, but no process answers on them.
        with socket.create_server(("127.0.0.1", 0)) as silent:
            app = make_app(
                f"amqp://guest:guest@127.0.0.1:{silent.getsockname()[1]}//",
                broker_connection_timeout=0.2,
                result_backend_transport_options={
                    "retry_policy": {"max_retries": 1, "interval_step": 0.01},
                    "lookup_timeout": 1,
                },
            )
            begun = time.monotonic()
            with pytest.raises(OperationalError, match="cannot be reached"):
                ask(app)
            assert time.monotonic() - begun < LONG


def test_the_first_of_several_hosts_that_answers_is_used(make_app: Apps, amqp_url: str) -> None:
    dead = "amqp://guest:guest@127.0.0.1:1//"
    app = make_app(f"{dead};{amqp_url};{dead}")
    task_id = new_id()
    app.backend.store_result(task_id, 1, states.SUCCESS)
    assert app.AsyncResult(task_id).get(timeout=LONG) == 1
    assert subprocesses.run(app, subprocess_jobs.states, ids=[task_id]) == ["SUCCESS"]


def test_the_url_is_always_shown_without_its_password(make_app: Apps, amqp_url: str) -> None:
    url = url_of(amqp_url, "guest", PASSWORD, "/")
    app = make_app(url + "?shards=4")
    backend = app.backend
    assert PASSWORD not in backend.as_uri(include_password=False)
    assert quote(PASSWORD, safe="") not in backend.as_uri(include_password=False)
    assert quote(PASSWORD, safe="") not in repr(backend)
    assert quote(PASSWORD, safe="") in backend.as_uri()
    assert backend.as_uri() == url + "?shards=4"


def test_options_in_the_url_override_the_setting(make_app: Apps, amqp_url: str) -> None:
    app = make_app(amqp_url + "?shards=3&confirm=false", shards=5)
    assert app.backend.options.shards == 3
    assert app.backend.options.confirm is False


@pytest.mark.parametrize("scheme", ["amqp", "pyamqp"])
def test_these_schemes_mean_the_app_s_broker(make_app: Apps, scheme: str) -> None:
    app = make_app(f"{scheme}://")
    task_id = new_id()
    app.backend.store_result(task_id, 1, states.SUCCESS)
    assert make_app().AsyncResult(task_id).get(timeout=LONG) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shard": 5}, ["'shard'", "5", "known options", "shards"]),
        ({"shards": 0}, ["'shards'", "0", "from 1 to 4096"]),
        ({"shards": "many"}, ["'shards'", "'many'", "from 1 to 4096"]),
        ({"queue_type": "stream"}, ["'queue_type'", "'stream'", "'classic' and 'quorum'"]),
        ({"confirm": "maybe"}, ["'confirm'", "'maybe'", "true and false"]),
        ({"lookup_timeout": -1}, ["'lookup_timeout'", "-1", "seconds"]),
        ({"retry_policy": {"tries": 1}}, ["'retry_policy'", "'tries'", "max_retries"]),
        ({"layout": "both"}, ["'layout'", "'both'", "'shared' and 'per-task'"]),
    ],
)
def test_the_error_for_an_invalid_option_names_it_its_value_and_the_allowed_values(
    make_app: Apps, options: Any, said: Any
) -> None:
    app = make_app(result_backend_transport_options=options)
    with pytest.raises(ImproperlyConfigured) as caught:
        app.backend  # noqa: B018
    for part in said:
        assert part in str(caught.value)


def test_creating_the_backend_needs_no_broker(make_app: Apps) -> None:
    # The worker's main process creates it for its banner.
    app = make_app("amqp://guest:guest@127.0.0.1:1//")
    assert app.backend.as_uri(include_password=False) == "amqp://guest:**@127.0.0.1:1//"
    assert app.backend.thread_safe
    assert app.backend.on_task_call(None, new_id()) == {}


def test_the_module_of_celery_4_can_be_imported() -> None:
    from celery.backends.amqp import AMQPBackend as Old

    from celery_amqp_results import AMQPBackend

    assert Old is AMQPBackend


def test_all_threads_share_one_backend(make_app: Apps) -> None:
    import threading

    app, found = make_app(), []
    threads = [threading.Thread(target=lambda: found.append(app.backend)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert app.backend.thread_safe
    assert app.backend is app.backend
    assert len({id(backend.layout) for backend in [*found, app.backend]}) == 1


@pytest.mark.parametrize("layout", ["shared", "per-task"])
def test_a_wait_times_out_even_if_the_broker_never_answers(make_app: Apps, layout: str) -> None:
    # The kernel accepts connections, but no process answers on them.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        app = make_app(
            f"amqp://guest:guest@127.0.0.1:{silent.getsockname()[1]}//",
            result_backend_transport_options={"layout": layout},
        )
        with pytest.raises(TimeoutError, match=r"not ready after 0\.3 seconds"):
            app.AsyncResult(new_id()).get(timeout=0.3)
