"""Signals: what a program's handlers raise, and which thread receives them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, Type

import pytest

from celery_amqp_results.amqp.shared_channel import SharedChannel
from celery_amqp_results.amqp.turns import Turns
from celery_amqp_results.toolkit.threads import start_thread
from tests import interrupts
from tests.broker.helpers import new_id, open_inbox
from tests.conftest import Apps
from tools import rabbitmq
from tools.proxy import Proxy


@pytest.fixture
def alarm() -> Iterator[Any]:
    """Raises an error in the main thread after a moment."""
    before = signal.getsignal(signal.SIGALRM)

    def set_alarm(error: Type[Exception], seconds: float = 1.5) -> None:
        def handler(number: int, frame: Any) -> None:
            raise error("the program's own time limit")

        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, seconds)

    yield set_alarm
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


#: Operations that wait for a broker that is away.
OPERATIONS: Dict[str, Callable[[Any], Any]] = {
    "store": lambda app: app.backend.store_result(new_id(), 1, "SUCCESS"),
    "state": lambda app: app.backend.get_state(new_id()),
    "get": lambda app: app.AsyncResult(new_id()).get(timeout=60),
    "watch": lambda app: list(app.backend.watch([new_id()], timeout=60)),
    "large": lambda app: app.backend.store_result(new_id(), "x" * 300_000, "SUCCESS"),
}


@pytest.mark.parametrize("error", [TimeoutError, ConnectionResetError])
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("when", ["never there", "gone"])
def test_an_error_of_an_alarm_handler_ends_the_call(
    error: Type[Exception],
    name: str,
    when: str,
    make_app: Apps,
    alarm: Any,
    node: rabbitmq.Node,
) -> None:
    # Given a broker that is away
    with Proxy(node.amqp_port) as proxy:
        app = make_app(proxy.url(node.url()), shards=1)
        if when != "never there":
            app.backend.store_result(new_id(), 1, "SUCCESS")
            app.backend.get_state(new_id())
            open_inbox(app)
        proxy.refuse()
        proxy.reset()
        # When an alarm of the program goes off
        started = time.monotonic()
        alarm(error)
        # Then the call ends with the error of its handler
        with pytest.raises(error, match="the program's own time limit"):
            OPERATIONS[name](app)
        assert time.monotonic() - started < 30
        app.backend.layout.close(wait=False)


def test_an_error_of_an_alarm_handler_ends_connecting_to_a_host_with_two_addresses(
    make_app: Apps, alarm: Any, node: rabbitmq.Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a host with two addresses, of which the first does not answer
    with Proxy(node.amqp_port) as proxy, contextlib.ExitStack() as stack:
        silent = stack.enter_context(socket.socket())
        silent.bind(("127.0.0.2", proxy.port))
        silent.listen(0)
        for _ in range(3):
            # They fill its queue of connections.
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(silent.getsockname())
        resolve = socket.getaddrinfo

        def two_addresses(host: str, port: int, *rest: Any) -> Any:
            if host != "two.example":
                return resolve(host, port, *rest)
            return [*resolve("127.0.0.2", port, *rest), *resolve("127.0.0.1", port, *rest)]

        monkeypatch.setattr(socket, "getaddrinfo", two_addresses)
        app = make_app(proxy.url(node.url()).replace("127.0.0.1", "two.example"), shards=1)
        # When an alarm of the program goes off while it connects to the first
        alarm(TimeoutError)
        # Then the call ends with the error of its handler, and does not try the second
        with pytest.raises(TimeoutError, match="the program's own time limit"):
            app.backend.store_result(new_id(), 1, "SUCCESS")
        assert not proxy.accepted
        # And without an alarm the second is used
        app.conf.broker_connection_timeout = 1.0
        app.backend.store_result(new_id(), 1, "SUCCESS")
        assert proxy.accepted
        app.backend.close()


def test_a_store_that_is_interrupted_at_any_line_leaves_its_turn_to_others(make_app: Apps) -> None:
    # Given a thread that waits for a confirm, and so reads for all threads of the process
    backend = make_app(shards=1).backend
    channel = backend.layout.publisher._channel

    def store() -> None:
        backend.store_result(new_id(), 1, "SUCCESS")

    store()
    # When it is interrupted
    lines = []
    for function in (SharedChannel._take_turn, Turns.lead):
        for line in interrupts.at_each_line(function, store):
            # Then another one can read
            assert channel._turns._leader is None, line
            lines.append(line)
    assert len(lines) > 5


def test_no_thread_of_the_backend_receives_signals(make_app: Apps) -> None:
    # Given a backend with all its threads
    app = make_app()
    before = set(threading.enumerate())
    app.backend.store_result(new_id(), {}, "STARTED")
    app.backend.get_state(new_id())
    open_inbox(app)
    app.AsyncResult(new_id()).then(lambda result: None)
    threads = [t for t in threading.enumerate() if t not in before]
    assert {t.name for t in threads} >= {"celery-results-inbox", "celery-results-callbacks"}
    # Then all of them block the signals that a server may wait for
    for thread in threads:
        with open(f"/proc/{os.getpid()}/task/{thread.native_id}/status") as status:
            blocked = next(int(line.split()[1], 16) for line in status if "SigBlk" in line)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
            assert blocked & 1 << (number - 1), (thread.name, number)
    # And the thread that started them does not
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGTERM, signal.SIGINT}


def test_a_thread_can_still_be_ended_by_its_own_faults() -> None:
    masks: List[Any] = []
    thread = start_thread(lambda: masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ())), "x")
    thread.join()
    assert signal.SIGSEGV not in masks[0]
    assert signal.SIGTERM in masks[0]
