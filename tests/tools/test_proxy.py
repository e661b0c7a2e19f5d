"""The proxy does to connections what its methods say."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Iterator

import pytest

from tools.proxy import Proxy


class Echo:
    """A server that sends back what it gets."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        #: How connections ended.
        self.ends: list[str] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                thread = threading.Thread(
                    target=self._serve, args=(self.socket.accept()[0],), daemon=True
                )
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(65536):
                    connection.sendall(data)
                self.ends.append("end")
            except OSError as exc:
                self.ends.append(type(exc).__name__)

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        for thread in self._threads:
            thread.join(10)


@pytest.fixture
def echo() -> Iterator[Echo]:
    echo = Echo()
    yield echo
    echo.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy(echo.port) as proxy:
        yield proxy


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=10)


def receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = connection.recv(65536)
        assert piece, "the connection has ended"
        data += piece
    return data


def is_silent(connection: socket.socket) -> bool:
    connection.settimeout(0.2)
    try:
        connection.recv(1)
    except socket.timeout:
        return True
    finally:
        connection.settimeout(10)
    return False


def test_it_forwards_everything_in_both_directions(proxy: Proxy) -> None:
    sent = bytes(range(256)) * 4096
    with connect(proxy) as one, connect(proxy) as two:
        threading.Thread(target=one.sendall, args=(sent,), daemon=True).start()
        assert receive(one, len(sent)) == sent
        two.sendall(b"two")
        assert receive(two, 3) == b"two"
    assert proxy.accepted == 2


def test_a_reset_reaches_both_sides(proxy: Proxy, echo: Echo) -> None:
    with connect(proxy) as connection:
        connection.sendall(b"x")
        assert receive(connection, 1) == b"x"
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    deadline = time.monotonic() + 10
    while not echo.ends and time.monotonic() < deadline:
        time.sleep(0.01)
    assert echo.ends == ["ConnectionResetError"]


def test_a_half_open_connection_is_silent_to_the_client(proxy: Proxy, echo: Echo) -> None:
    with connect(proxy) as connection:
        connection.sendall(b"x")
        assert receive(connection, 1) == b"x"
        proxy.halve()
        connection.sendall(b"y")
        assert is_silent(connection)
        # New connections work.
        with connect(proxy) as another:
            another.sendall(b"z")
            assert receive(another, 1) == b"z"


def test_a_black_hole_answers_no_client_until_it_is_turned_off(proxy: Proxy) -> None:
    with connect(proxy) as before:
        proxy.swallow()
        before.sendall(b"x")
        with connect(proxy) as meanwhile:
            meanwhile.sendall(b"y")
            assert is_silent(meanwhile)
        proxy.resume()
        assert is_silent(before)
    with connect(proxy) as after:
        after.sendall(b"z")
        assert receive(after, 1) == b"z"


def test_stalled_bytes_arrive_later(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        proxy.stall()
        connection.sendall(b"x")
        assert is_silent(connection)
        proxy.resume()
        assert receive(connection, 1) == b"x"


def test_a_slow_connection_delivers_everything(proxy: Proxy) -> None:
    proxy.slow(20_000)
    with connect(proxy) as connection:
        began = time.monotonic()
        connection.sendall(b"x" * 8_000)
        assert receive(connection, 8_000) == b"x" * 8_000
        # It cannot be faster than that.
        assert time.monotonic() - began > 0.3


def test_a_refusing_proxy_accepts_no_connections_until_it_resumes(proxy: Proxy) -> None:
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    proxy.resume()
    with connect(proxy) as connection:
        connection.sendall(b"x")
        assert receive(connection, 1) == b"x"


def test_a_client_is_reset_if_the_server_is_down() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # The reset may arrive while the client is still connecting.
    with Proxy(port) as proxy, pytest.raises(ConnectionResetError), connect(proxy) as connection:
        connection.recv(1)


def test_its_url_replaces_the_target_s_port() -> None:
    with Proxy(5672) as proxy:
        assert proxy.url("amqp://u:p@127.0.0.1:5672//") == f"amqp://u:p@127.0.0.1:{proxy.port}//"
        with pytest.raises(ValueError, match="5672"):
            proxy.url("amqp://localhost/")
