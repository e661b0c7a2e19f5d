"""The parts of connections that need no broker."""

from __future__ import annotations

import time
import types
from typing import Any, List, Type

import kombu
import pytest
from amqp import exceptions as amqp_errors
from hypothesis import given
from hypothesis import strategies as st

from celery_amqp_results import errors, options
from celery_amqp_results.amqp import connections
from celery_amqp_results.amqp.failures import TRANSIENT, is_refusal
from celery_amqp_results.amqp.link import RECEIVE_SIZE, _Received
from celery_amqp_results.toolkit import retry
from celery_amqp_results.toolkit.retry import is_over, time_left

#: Refusals of a broker, under py-amqp's names for the codes of the protocol.
REFUSALS = {403: "access refused", 406: "precondition failed", 530: "not allowed"}


@pytest.mark.parametrize("code", sorted(amqp_errors.ERROR_MAP))
def test_permanent_errors_are_refusals(code: int) -> None:
    error = amqp_errors.error_for_code(code, "text", (10, 11), amqp_errors.ConnectionError)
    assert error.code == code
    assert is_refusal(error) == (code in REFUSALS)
    # Callers that open a connection catch these, and then check which kind it is.
    assert isinstance(error, TRANSIENT)


@pytest.mark.parametrize(
    "kind",
    [
        OSError,
        ConnectionResetError,
        ConnectionRefusedError,
        TimeoutError,
        EOFError,
        ValueError,
        KeyboardInterrupt,
        amqp_errors.RecoverableConnectionError,
        amqp_errors.MessageNacked,
        errors.BackendUnavailable,
        errors.LookupTimeout,
    ],
)
def test_other_errors_are_not_refusals(kind: Type[BaseException]) -> None:
    assert not is_refusal(kind("text"))


@pytest.mark.parametrize("kind", [ValueError, TypeError, AttributeError, RuntimeError, KeyError])
def test_a_programming_error_is_no_lost_connection(kind: Type[Exception]) -> None:
    assert not issubclass(kind, TRANSIENT)


times = st.floats(0, 1e6)


@given(times, st.none() | times, times)
def test_the_time_left_is_bounded_on_both_sides(
    now: float, deadline: float | None, at_most: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry, "time", types.SimpleNamespace(monotonic=lambda: now))
        left = time_left(deadline, at_most)
    assert 0 <= left <= at_most
    if deadline is None:
        assert left == at_most
    elif deadline <= now:
        assert left == 0
    else:
        assert left == min(at_most, deadline - now)


def test_the_time_left_decreases() -> None:
    deadline = time.monotonic() + 3600
    first = time_left(deadline, 7200)
    assert 0 < time_left(deadline, 7200) <= first <= 3600
    assert time_left(deadline, 10) == 10


def test_a_deadline_is_over_at_its_time() -> None:
    now = time.monotonic()
    assert is_over(now)
    assert not is_over(now + 3600)
    assert not is_over(None)


def test_connecting_is_abandoned_at_the_deadline_and_not_before() -> None:
    # However long the next pause would be: a wait that ends early would not be a timeout.
    policy = options.RetryPolicy(max_retries=None, interval_start=3600, interval_max=3600)
    nobody = connections.Connector(
        lambda heartbeat: kombu.Connection("amqp://127.0.0.1:1//"), policy, lambda: "there"
    )
    deadline = time.monotonic() + 0.2
    with pytest.raises(errors.BackendUnavailable, match="there cannot be reached"):
        nobody.open(0.0, deadline)
    assert is_over(deadline)


class Transport:
    """Returns a stream in the pieces in which the network delivers it."""

    def __init__(self, pieces: List[bytes]) -> None:
        self._pieces = pieces
        self._quick_recv: Any = self._receive
        self.asked: List[int] = []

    def _receive(self, size: int) -> bytes:
        self.asked.append(size)
        if not self._pieces:
            return b""
        piece, self._pieces[0] = self._pieces[0][:size], self._pieces[0][size:]
        if not self._pieces[0]:
            del self._pieces[0]
        return piece


@given(
    st.lists(st.binary(min_size=1, max_size=40), max_size=8),
    st.lists(st.integers(1, 30) | st.integers(4, 6).map(lambda n: n * 16 * 1024), max_size=60),
)
def test_reading_in_large_pieces_does_not_change_the_data(
    pieces: List[bytes], sizes: List[int]
) -> None:
    stream = b"".join(pieces)
    transport = Transport(pieces)
    received = _Received(transport)
    # py-amqp calls its transport, not this class.
    assert transport._quick_recv is received
    read = b""
    for size in sizes:
        waiting = received.pending()
        before = len(transport.asked)
        piece = transport._quick_recv(size)
        assert type(piece) is bytes
        assert len(piece) <= size
        # An empty answer means the end of the stream, and nothing else.
        assert piece or read == stream
        # Available data is returned without waiting for more.
        assert not waiting or len(transport.asked) == before
        # Data that is larger than a piece is not copied twice.
        assert waiting or size < RECEIVE_SIZE or transport.asked[-1] == size
        read += piece
        assert stream.startswith(read)
    assert all(size >= RECEIVE_SIZE for size in transport.asked)


def test_many_small_reads_cause_one_read_of_the_socket() -> None:
    transport = Transport([b"0123456789"])
    received = _Received(transport)
    assert [received(4), received(4), received(4)] == [b"0123", b"4567", b"89"]
    assert not received.pending()
    assert len(transport.asked) == 1
