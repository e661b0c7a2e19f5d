"""Helpers that several test modules use."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from types import ModuleType
from typing import Any, Callable, Iterator, Optional

import pytest
from celery import Celery, states

from celery_amqp_results.toolkit.threads import start_thread
from tests.conftest import PATIENCE, raw_connection
from tools import rabbitmq

#: Seconds after which a wait counts as hanging.
LONG = PATIENCE


def new_id() -> str:
    return str(uuid.uuid4())


def flush(app: Celery) -> None:
    """Return when the broker has everything that *app* has published, at most ten seconds."""
    app.backend.layout.publisher._unwaited.flush(10)


@contextlib.contextmanager
def few_channels(node: rabbitmq.Node, number: int) -> Iterator[None]:
    """Have *node* offer *number* channels to each new connection."""
    before = node.eval("{ok, N} = application:get_env(rabbit, channel_max), N")
    node.eval(f"application:set_env(rabbit, channel_max, {number})")
    try:
        yield
    finally:
        node.eval(f"application:set_env(rabbit, channel_max, {before})")


def fail_once(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """Make the first thread that *module* starts fail, as the system does at its limit."""
    failed = threading.Event()

    def fail(*args: Any) -> threading.Thread:
        if failed.is_set():
            return start_thread(*args)
        failed.set()
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(module, "start_thread", fail)


@contextlib.contextmanager
def largest_message(node: rabbitmq.Node, size: int) -> Iterator[None]:
    """Make *node* take messages of up to *size* bytes for the duration of a ``with`` block."""

    def limit(size: object) -> None:
        # RabbitMQ 4 reads it from the second place.
        node.eval(
            f"application:set_env(rabbit, max_message_size, {size}), "
            f"persistent_term:put(max_message_size, {size})"
        )

    before = node.eval(
        "persistent_term:get(max_message_size, application:get_env(rabbit, max_message_size, "
        "134217728))"
    )
    limit(size)
    try:
        yield
    finally:
        limit(before)


@contextlib.contextmanager
def held(url: str, queue: str) -> Iterator[Any]:
    """Hold *queue* with a consumer that stands still, for the duration of a ``with`` block."""
    with raw_connection(url) as connection:
        holds = threading.Event()
        connection.channel().basic_consume(
            queue, no_ack=False, callback=lambda message: holds.set(), on_cancel=print
        )
        while not holds.is_set():
            connection.drain_events(timeout=LONG)
        yield connection


class Waiting:
    """A thread that runs a blocking wait."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.outcome: Any = None
        self.error: Optional[BaseException] = None
        self._function = function
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.outcome = self._function()
        except BaseException as exc:
            self.error = exc

    def result(self) -> Any:
        """Return the value of the function, or raise what it raised."""
        self.thread.join(LONG)
        assert not self.thread.is_alive(), "still waiting"
        if self.error is not None:
            raise self.error
        return self.outcome


def open_inbox(app: Celery) -> None:
    """Return when the inbox of *app* is open."""
    app.backend.layout.inbox.cover([], time.monotonic() + LONG)


def until_watched(app: Celery, task_id: str, eventually: Callable[..., Any], n: int = 1) -> None:
    """Return when *n* waiters wait for the task and this process receives its states."""
    inbox = app.backend.layout.inbox
    eventually(lambda: inbox.covers(task_id) and len(inbox._waiters.by_task.get(task_id, ())) >= n)


def until_stored(app: Celery) -> None:
    """Return when the broker has confirmed everything that *app* has stored.

    Storing a state that is not final does not wait for its confirm. Storing a final state does, and
    everything published before it is confirmed before it.
    """
    app.backend.store_result(new_id(), None, states.SUCCESS)
