"""Fixtures for all tests: a private RabbitMQ node, and apps that use it.

``RABBITMQ_DISTRIBUTION`` selects the RabbitMQ of the node: ``system`` (the default) for the
installed package, or a Debian suite such as ``forky``. If ``AMQP_URL`` is set, that broker is used
and tests that must stop or kill it are skipped.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import uuid
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, TypeVar

import amqp
import kombu
import kombu.pools
import pytest
from celery import Celery

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from celery_amqp_results.protocol.names import PLAN_QUEUES
from tools import rabbitmq

_T = TypeVar("_T")

#: Seconds within which every operation that should succeed does, even on a busy broker and machine.
#: Anything slower counts as hanging.
PATIENCE = 60.0

#: Whether fault tests repeat what they provoke, and run under load: ``make test-faults``.
LOAD = bool(os.environ.get("LOAD"))

#: Settings of apps for such brokers and machines. The defaults are 4 seconds to open a connection
#: and 10 for a look-up.
PATIENT: Dict[str, Any] = {"broker_connection_timeout": PATIENCE}
PATIENT_OPTIONS: Dict[str, Any] = {"lookup_timeout": PATIENCE}


def pytest_report_header() -> str:
    where = os.environ.get("AMQP_URL") and "AMQP_URL"
    return f"rabbitmq: {where or os.environ.get('RABBITMQ_DISTRIBUTION', 'system')}"


# First, since xdist reads the groups in the same hook.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: List[pytest.Item]) -> None:
    """Keep tests that share a fixture in one process when several processes run tests.

    Each process has its own node. Otherwise a worker or a node that is shared by the tests of a
    file is started in each process. Tests with a ``world`` fixture are kept together by its
    parameter.
    """
    for item in items:
        definitions = item._fixtureinfo.name2fixturedefs  # type: ignore[attr-defined]
        scopes = {name: found[-1].scope for name, found in definitions.items()}
        if "admin" in scopes:
            item.add_marker(pytest.mark.xdist_group("admin"))
        elif "module" in scopes.values():
            callspec = getattr(item, "callspec", None)
            world = callspec and callspec.params.get("world", "")
            item.add_marker(pytest.mark.xdist_group(f"{item.path.name} {world or ''}"))


def eventually(condition: Callable[[], Optional[_T]], timeout: float = PATIENCE) -> _T:
    """Return the value of *condition* once it is true; fail after *timeout* seconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= deadline:
            pytest.fail(f"not true within {timeout} s: {condition}")
        time.sleep(0.02)


@pytest.fixture(name="eventually")
def _eventually() -> Callable[..., Any]:
    return eventually


@pytest.fixture(scope="session")
def _session_node() -> Iterator[Optional[rabbitmq.Node]]:
    if os.environ.get("AMQP_URL"):
        yield None
        return
    name = os.environ.get("RABBITMQ_DISTRIBUTION", "system")
    try:
        rabbitmq.ensure_installed(name)
        node = rabbitmq.Node(rabbitmq.distribution(name))
        node.start()
    except rabbitmq.NotAvailable as exc:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no RabbitMQ: {exc}")
    with node:
        yield node


@pytest.fixture
def node(_session_node: Optional[rabbitmq.Node]) -> rabbitmq.Node:
    """The private RabbitMQ node, which tests may stop, kill and query."""
    if _session_node is None:
        pytest.skip("the broker of AMQP_URL is not ours to control")
    return _session_node


@pytest.fixture
def amqp_url(_session_node: Optional[rabbitmq.Node]) -> str:
    """URL of the broker."""
    return os.environ["AMQP_URL"] if _session_node is None else _session_node.url()


def connect(url: str, **options: Any) -> kombu.Connection:
    """Return a kombu connection to *url* that has :data:`PATIENCE` to open."""
    return kombu.Connection(url, **{"connect_timeout": PATIENCE, **options})


@contextlib.contextmanager
def raw_connection(url: str) -> Iterator[amqp.Connection]:
    """A plain py-amqp connection to *url*, with which tests inspect the broker."""
    connection = connect(url)
    try:
        yield connection.connection
    finally:
        connection.release()


@pytest.fixture
def raw(amqp_url: str) -> Iterator[amqp.Connection]:
    """A plain py-amqp connection, with which tests inspect the broker."""
    with raw_connection(amqp_url) as connection:
        yield connection


class Apps:
    """Makes Celery apps that share one random ``result_exchange``, and cleans up after them."""

    def __init__(self, url: str, options: Optional[Dict[str, Any]] = None) -> None:
        self.url = url
        #: The default options of the backend.
        self.options = {**PATIENT_OPTIONS, **(options or {})}
        self.prefix = f"test-{uuid.uuid4().hex[:12]}"
        self.made: List[Celery] = []

    def __call__(self, backend: str = "amqp://", *, shards: int = 8, **conf: Any) -> Celery:
        """Return an app.

        Parameters:
            backend: the result backend URL.
            shards: the option of that name, unless the transport options are given.
            **conf: Celery settings.
        """
        app = Celery(
            f"app-{len(self.made)}", broker=self.url, backend=backend, set_as_current=False
        )
        app.conf.update(
            result_exchange=self.prefix,
            task_default_queue=f"{self.prefix}-tasks",
            result_backend_transport_options={"shards": shards},
            broker_connection_retry_on_startup=True,
            **PATIENT,
        )
        app.conf.update(conf)
        if "lookup_timeout" not in backend:
            app.conf.result_backend_transport_options = {
                **self.options,
                **app.conf.result_backend_transport_options,
            }
        self.made.append(app)
        return app

    def close(self) -> None:
        """Close the apps and delete what they declared."""
        shards = {1}
        for app in self.made:
            backend = app._backend_cache
            if backend is not None:
                shards.add(backend.options.shards)
                backend.close()
            app.close()
        with raw_connection(self.url) as connection:
            channel = connection.channel()
            for number in range(max(shards)):
                # Deleting what does not exist is no error.
                channel.queue_delete(f"{self.prefix}.shard.{number}")
            for number in range(PLAN_QUEUES):
                channel.queue_delete(f"{self.prefix}.chords.{number}")
            channel.queue_delete(f"{self.prefix}-tasks")
            channel.exchange_delete(f"{self.prefix}.states")
            channel.exchange_delete(self.prefix)
            connection.close()


@pytest.fixture
def new_pools() -> None:
    """Empties kombu's pools of connections, which all apps of a process share.

    An earlier test may have broken a connection in them.
    """
    kombu.pools.reset()


@pytest.fixture
def make_app(amqp_url: str) -> Iterator[Apps]:
    """Makes Celery apps with the result backend, a random ``result_exchange`` and 8 shards."""
    apps = Apps(amqp_url)
    yield apps
    apps.close()


@pytest.fixture
def app(make_app: Apps) -> Celery:
    """A Celery app with the result backend."""
    return make_app()
