"""Passwords are never shown: not in log records, errors, URIs or a repr()."""

from __future__ import annotations

import contextlib
import logging
import traceback
import uuid
from typing import Any, Iterator, List
from urllib.parse import quote

import kombu
import pytest
from celery import states

from tests.broker.helpers import LONG, Waiting, new_id, until_watched
from tests.conftest import Apps, eventually
from tools import rabbitmq

#: A password with characters that must be escaped in a URL.
PASSWORD = "s3cr:t/@?#%"

#: Fail soon, after connecting has been retried once.
OPTIONS = {
    "shards": 1,
    "track_sent": True,
    "lookup_timeout": 3,
    "retry_policy": {"max_retries": 1, "interval_start": 0, "interval_step": 0.1},
}


class Shown:
    """Collects everything that a user or an operator may see."""

    def __init__(self) -> None:
        self.texts: List[str] = []
        self.kinds: List[str] = []

    @contextlib.contextmanager
    def error(self) -> Iterator[None]:
        """Expect an error, and record everything that it shows."""
        with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is not the point
            yield
        exc = caught.value
        self.kinds.append(type(exc).__name__)
        self.texts += ["".join(traceback.format_exception(type(exc), exc, exc.__traceback__))]
        cause: Any = exc
        while cause is not None:
            self.texts += [str(cause), repr(cause), repr(cause.args), repr(vars(cause))]
            cause = cause.__cause__ or cause.__context__

    def backend(self, backend: Any) -> None:
        self.texts += [repr(backend), str(backend), backend.as_uri(include_password=False)]
        self.texts += [repr(value) for value in vars(backend.layout).values()]
        self.texts += [repr(backend.config.url), repr(backend.metrics())]

    def records(self, records: List[logging.LogRecord]) -> None:
        formatter = logging.Formatter("%(name)s %(message)s")
        for record in records:
            self.texts += [formatter.format(record), repr(record.args)]


@pytest.fixture
def user(node: rabbitmq.Node) -> Iterator[str]:
    """A user with :data:`PASSWORD` and all permissions; it is deleted after the test."""
    user = f"user-{uuid.uuid4().hex[:8]}"
    node.ctl("add_user", user, PASSWORD)
    node.ctl("set_permissions", user, ".*", ".*", ".*")
    yield user
    node.ctl("delete_user", user)


def test_passwords_are_never_shown(
    make_app: Apps, node: rabbitmq.Node, user: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    shown = Shown()
    broker = kombu.Connection(node.url())
    credentials = f"{user}:{quote(PASSWORD, safe='')}"
    place = f"{broker.hostname}:{broker.port}"
    good = f"amqp://{credentials}@{place}//"

    # No broker listens; the user is unknown; the virtual host does not exist
    for url in (
        f"amqp://{credentials}@127.0.0.1:1//",
        f"amqp://nobody:{quote(PASSWORD, safe='')}@{place}//",
        f"amqp://{credentials}@{place}/nowhere",
        f"amqp://{credentials}@127.0.0.1:1//;{credentials}@127.0.0.1:2//",
    ):
        # The same broker for tasks, so that errors of task connections are checked too
        app = make_app(
            url,
            broker_url=url,
            result_backend_transport_options=OPTIONS,
            # The time for which kombu tries.
            broker_connection_timeout=1,
        )
        with shown.error():
            app.backend.store_result(new_id(), 1, states.SUCCESS)
        with shown.error():
            app.backend.get_task_meta(new_id())
        with shown.error():
            app.AsyncResult(new_id()).get(timeout=LONG)
        with shown.error():
            app.send_task("task", retry=False)
        shown.backend(app.backend)

    # Invalid options and URLs
    for url in (f"{good}?shards=x", f"{good}?nothing=1", f"amqp://{user}:{PASSWORD}@{place}//"):
        with shown.error():
            _ = make_app(url).backend
    with shown.error():
        _ = make_app(good, result_backend_transport_options=OPTIONS, broker_url=f"{good}x").backend

    # The connection is lost during a wait
    app = make_app(good, broker_url=good, result_backend_transport_options=OPTIONS)
    task_id = new_id()
    waiting = Waiting(lambda: app.AsyncResult(task_id).get(timeout=LONG))
    until_watched(app, task_id, eventually)
    node.ctl("close_all_connections", "for a test")
    app.backend.store_result(task_id, 1, states.SUCCESS)
    assert waiting.result() == 1
    # Another app uses a different number of shards
    other = make_app(
        good, broker_url=good, result_backend_transport_options={**OPTIONS, "shards": 2}
    )
    with shown.error():
        other.backend.store_result(new_id(), 1, states.SUCCESS)
    # Permissions are revoked
    node.ctl("set_permissions", user, "", "", "")
    fresh = make_app(good, broker_url=good, result_backend_transport_options=OPTIONS)
    with shown.error():
        fresh.backend.store_result(new_id(), "x" * 200_000, states.SUCCESS)
    with shown.error():
        fresh.backend.forget(task_id)
    shown.backend(fresh.backend)

    shown.records(caplog.records)
    assert {"BackendUnavailable", "InvalidOption", "DeclarationRefused"} <= set(shown.kinds)
    assert any(record.levelno >= logging.WARNING for record in caplog.records)
    # The user and the host were shown
    assert any(f"{user}:**@{place}" in text for text in shown.texts)
    for text in shown.texts:
        assert PASSWORD not in text
        assert quote(PASSWORD, safe="") not in text
        assert quote(PASSWORD) not in text
