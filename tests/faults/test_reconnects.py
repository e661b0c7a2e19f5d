"""No leaks in a process whose connections are closed again and again, and nothing is lost."""

from __future__ import annotations

import contextlib
import logging
import socket
from typing import Callable, Iterator

import pytest

from bench.flat import reconnect
from tests.conftest import LOAD, PATIENCE
from tools import rabbitmq

#: How often all connections are closed.
TIMES = 1000 if LOAD else 30

#: Megabytes by which the second half may grow.
SOME_MEMORY = 8

#: Makes the broker close all its connections for each line that arrives at a port.
CLOSE_AT_EACH_LINE = """
    Caller = self(),
    spawn(fun() ->
        {ok, Listening} = gen_tcp:listen(
            0, [binary, {active, false}, {packet, line}, {ip, {127, 0, 0, 1}}]),
        {ok, Port} = inet:port(Listening),
        Caller ! {port, Port},
        {ok, Socket} = gen_tcp:accept(Listening),
        Serve = fun Again() ->
            case gen_tcp:recv(Socket, 0) of
                {ok, _} ->
                    [rabbit_networking:close_connection(Pid, <<"a test">>)
                     || Pid <- rabbit_networking:connections()],
                    gen_tcp:send(Socket, <<"closed\\n">>),
                    Again();
                _ -> ok
            end
        end,
        Serve()
    end),
    receive {port, Port} -> Port end
"""


@contextlib.contextmanager
def closed_by(node: rabbitmq.Node) -> Iterator[Callable[[], None]]:
    """Yield a function that makes *node* close all connections, faster than rabbitmqctl does."""
    port = int(node.eval(" ".join(CLOSE_AT_EACH_LINE.split())))
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE))
        lines = stack.enter_context(connection.makefile("rb"))

        def close() -> None:
            connection.sendall(b"close\n")
            assert lines.readline() == b"closed\n"

        yield close


@pytest.fixture
def no_log_records() -> Iterator[None]:
    """Log nothing: pytest keeps each record, and with its exception a whole connection."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("how", ["reset", "closed by the broker"])
def test_lost_connections_leave_nothing_behind(
    amqp_url: str, node: rabbitmq.Node, how: str, no_log_records: None
) -> None:
    with contextlib.ExitStack() as stack:
        close = None if how == "reset" else stack.enter_context(closed_by(node))
        # It waits for each result, and looks it up.
        measured = []
        for held in reconnect(TIMES, amqp_url, close):
            print(node.version, how, held)
            measured.append(held)
    first, middle, last = measured[0], measured[len(measured) // 2], measured[-1]
    # Then each connection and its resources have replaced an earlier one. Some may be opening or
    # closing at this moment, or were not needed before; a leak would add up to many more.
    some = 12
    assert last.descriptors <= first.descriptors + some
    assert last.threads <= first.threads + some
    assert last.connections <= first.connections + some
    assert last.memory <= middle.memory + SOME_MEMORY
