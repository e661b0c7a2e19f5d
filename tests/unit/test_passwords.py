"""Passwords never appear in a repr, URI or exception, and survive pickling of the backend."""

from __future__ import annotations

import pickle
import traceback
from typing import Any, List

import pytest
from celery import Celery

from celery_amqp_results import errors

SECRET = "s3cr3t-of-mine"
#: A port without a listener, and a host that does not exist.
URLS = [
    f"amqp://user:{SECRET}@127.0.0.1:9//",
    f"amqp://user:{SECRET}@127.0.0.1:9/;amqp://other:{SECRET}@127.0.0.1:9/v?shards=4",
    f"amqps://:{SECRET}@127.0.0.1:9/",
]


def make_app(url: str, **conf: Any) -> Celery:
    app = Celery("passwords", broker=url.partition("?")[0], backend=url, set_as_current=False)
    app.conf.update(
        result_backend_transport_options={
            "retry_policy": {"max_retries": 0},
            "lookup_timeout": 1,
        },
        **conf,
    )
    return app


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("backend_url", [None, "amqp://"])
def test_passwords_are_never_shown(
    url: str, backend_url: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(url)
    if backend_url:
        app.conf.result_backend = backend_url
    backend = app.backend
    shown: List[str] = [repr(backend), str(backend), backend.as_uri(include_password=False)]
    shown += [repr(backend.options), repr(backend.config.codec), repr(backend.config.topology)]
    caplog.set_level("DEBUG")

    def attempt(work: Any) -> None:
        with pytest.raises(errors.BackendUnavailable) as caught:
            work()
        exc = caught.value
        shown.extend((str(exc), repr(exc), repr(pickle.loads(pickle.dumps(exc)))))
        # With its causes
        shown.append("".join(traceback.format_exception(type(exc), exc, exc.__traceback__)))

    attempt(lambda: backend.store_result("t", 1, "SUCCESS"))
    attempt(lambda: app.AsyncResult("t").state)
    attempt(lambda: app.AsyncResult("t").get(timeout=5))
    attempt(lambda: app.AsyncResult("t").forget())
    shown.append(repr(backend.layout))
    shown.append(caplog.text)
    backend.close()
    # The source lines of this file are in the tracebacks; the password is not.
    assert not [text for text in shown if SECRET in text]
    assert any("127.0.0.1:9" in text for text in shown)


def test_a_pickled_backend_keeps_its_password_without_showing_it() -> None:
    app = make_app(URLS[0])
    app.set_current()
    function, arguments = app.backend.__reduce__()[:2]
    again = function(*arguments)
    assert again.as_uri() == app.backend.as_uri()
    assert SECRET in again.as_uri()
    assert SECRET not in repr(again)
