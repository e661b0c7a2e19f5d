"""The parts that all rooms use: retries, reasons of failures, what is remembered or logged once."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from typing import Any, Optional

import pytest
from amqp import exceptions as amqp_errors

from celery_amqp_results.amqp import failures
from celery_amqp_results.options import RetryPolicy
from celery_amqp_results.toolkit import sockets
from celery_amqp_results.toolkit.bounded import BoundedDict, OnceLogger
from celery_amqp_results.toolkit.interrupts import raise_if_from_signal_handler
from celery_amqp_results.toolkit.retry import LEAST_PAUSE, Retry

#: What RabbitMQ 3.10 and 4.3 say.
LIMITS = [
    ("access to vhost 'v' refused for user 'u': connection limit (2) is reached", "connections", 2),
    ("connection refused for user 'u': user connection limit (7) is reached", "connections", 7),
    ("connection refused: node connection limit (1) is reached", "connections", 1),
    (
        "number of channels opened for user 'u' has reached the maximum allowed user limit of (3)",
        "channels",
        3,
    ),
    (
        "number of channels opened for user 'u' has reached the maximum allowed user limit of 3",
        "channels",
        3,
    ),
    (
        "number of channels opened on node 'a@b' has reached the maximum allowed limit of 40",
        "channels",
        40,
    ),
]


@pytest.mark.parametrize(("text", "what", "number"), LIMITS)
def test_a_limit_is_known_by_its_text_and_is_no_refusal(text: str, what: str, number: int) -> None:
    error = amqp_errors.NotAllowed(f"NOT_ALLOWED - {text}", (10, 40), 530)
    assert failures.limit_of(error) == (what, number)
    assert not failures.is_refusal(error)


@pytest.mark.parametrize("place", ["vhost 'v'", "cluster"])
def test_a_limit_on_queues_is_a_refusal_with_a_number(place: str) -> None:
    text = (
        f"PRECONDITION_FAILED - cannot declare queue 'q': queue limit in {place} (100) is reached"
    )
    error = amqp_errors.PreconditionFailed(text, (50, 10), 406)
    assert failures.limit_of(error) == ("queues", 100)
    assert failures.is_refusal(error)


def test_other_refusals_are_no_limits() -> None:
    error = amqp_errors.NotAllowed("NOT_ALLOWED - vhost connection limit not found", (10, 40), 530)
    assert failures.limit_of(error) is None
    assert failures.is_refusal(error)
    assert failures.limit_of(OSError("connection limit (2) is reached")) is None


def test_pauses_grow_as_the_policy_says_and_vary() -> None:
    policy = RetryPolicy(max_retries=3, interval_start=1, interval_step=1, interval_max=2)
    retry = Retry(policy, jitter=lambda: 0.0)
    assert [retry.after(OSError(), 0.0) for _ in range(4)] == [1, 2, 2, None]
    assert retry.failed == 4
    early = Retry(policy, jitter=lambda: 1.0)
    assert early.after(OSError(), 0.0) == pytest.approx(0.8)
    early.succeeded()
    assert early.failed == 0


def test_tries_that_never_end_do_not_follow_each_other_without_a_pause() -> None:
    at_once = Retry(RetryPolicy(max_retries=2, interval_max=0.0))
    assert [at_once.after_success(OSError(), 0.0) for _ in range(4)] == [0.0, *[LEAST_PAUSE] * 3]
    endless = Retry(RetryPolicy(max_retries=None, interval_step=0.0))
    assert [endless.after(OSError(), 0.0) for _ in range(3)] == [0.0, LEAST_PAUSE, LEAST_PAUSE]
    few = Retry(RetryPolicy(max_retries=2, interval_max=0.0))
    assert [few.after(OSError(), 0.0) for _ in range(3)] == [0.0, 0.0, None]


def test_a_pause_that_ends_too_late_is_not_made() -> None:
    retry = Retry(RetryPolicy(interval_start=1), end=10.0, jitter=lambda: 0.0)
    assert retry.after(OSError(), 8.0) == 1
    assert retry.after(OSError(), 9.0) is None


@pytest.mark.parametrize("kind", ["function", "method", "rest"])
def test_what_a_signal_handler_raises_is_no_failure_of_the_broker(kind: str) -> None:
    class Program:
        def on_alarm(self, number: int, frame: Any) -> None:
            self.complain()

        def complain(self) -> None:
            raise TimeoutError("too long")

    def on_alarm(number: int, frame: Any) -> None:
        raise TimeoutError("too long")

    def with_rest(*args: Any) -> None:
        raise TimeoutError("too long")

    handlers: Any = {"function": on_alarm, "method": Program().on_alarm, "rest": with_rest}
    before = signal.signal(signal.SIGUSR1, handlers[kind])
    retry = Retry(RetryPolicy())
    try:
        signal.raise_signal(signal.SIGUSR1)
        caught: Optional[TimeoutError] = None
    except TimeoutError as exc:
        caught = exc
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert caught is not None
    with pytest.raises(TimeoutError, match="too long"):
        retry.after(caught, 0.0)


def test_a_network_error_is_one_whatever_else_was_caught_before() -> None:
    def connect(address: str, *rest: object) -> None:
        raise TimeoutError(address)

    try:
        connect("there", 1, 2)
    except TimeoutError as exc:
        raise_if_from_signal_handler(exc)


def test_a_bounded_dict_forgets_what_was_set_first() -> None:
    kept: BoundedDict[str, int] = BoundedDict(3)
    for number, name in enumerate("abcd"):
        kept[name] = number
    assert list(kept) == ["b", "c", "d"]
    kept["b"] = 7
    kept["e"] = 8
    assert list(kept.items()) == [("d", 3), ("b", 7), ("e", 8)]
    assert kept.pop("b") == 7
    assert (kept.get("b"), kept.pop("b", None)) == (None, None)


def test_a_message_is_logged_once_until_it_is_over(caplog: Any) -> None:
    once = OnceLogger(logging.getLogger("x"))
    with caplog.at_level(logging.DEBUG, "x"):
        for _ in range(3):
            once.log(logging.WARNING, "key", "away %d", 1)
        once.forget("key")
        once.log(logging.WARNING, "key", "away %d", 2)
    levels = [record.levelno for record in caplog.records]
    assert levels == [logging.WARNING, logging.DEBUG, logging.DEBUG, logging.WARNING]


def test_a_wait_ends_when_somebody_rings_or_bytes_come() -> None:
    here, there = socket.socketpair()
    bell = sockets.WakeUp()
    try:
        assert not sockets.readable(here, 0)
        assert not bell.wait(0, here)
        ringing = threading.Thread(target=bell.ring)
        ringing.start()
        assert not bell.wait(60, here)
        ringing.join()
        there.send(b"x")
        assert bell.wait(60, here)
        assert sockets.readable(here, 0)
        assert sockets._peek(here)
        assert here.recv(1) == b"x"
        assert not sockets._peek(here)
        # A socket that the other end has closed is readable.
        there.close()
        assert sockets.readable(here, 60)
        assert sockets._peek(here)
    finally:
        here.close()
        there.close()
        bell.close()


def test_a_wait_for_several_sources_tells_which_are_readable() -> None:
    here, there = socket.socketpair()
    reader, writer = os.pipe()
    bell = sockets.WakeUp()
    try:
        assert bell.wait(0, here, reader) == []
        bell.ring()
        assert bell.wait(60, here, reader) == []
        os.write(writer, b"x")
        assert bell.wait(60, here, reader) == [reader]
        there.send(b"x")
        assert set(bell.wait(60, here, reader)) == {here, reader}
    finally:
        here.close()
        there.close()
        os.close(reader)
        os.close(writer)
        bell.close()
