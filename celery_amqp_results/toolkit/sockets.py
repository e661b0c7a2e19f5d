"""Waiting for sockets with threads or greenlets, and waking a thread that waits.

Nothing stays registered between two waits. gevent's selector would keep watching a socket after an
empty ``select()``, and then spin at the first byte that comes while no thread waits.
"""

from __future__ import annotations

import _socket
import contextlib
import select
import socket
import threading
import types
from typing import TYPE_CHECKING, Any, Iterator, List, Sequence

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike, HasFileno

__all__ = ("SocketWatch", "WakeUp", "readable", "ready")

#: Looks for bytes without waiting and without taking them.
_PEEK = getattr(socket, "MSG_PEEK", 0) | getattr(socket, "MSG_DONTWAIT", 0)


def readable(sock: HasFileno, timeout: float) -> bool:
    """Return whether *sock* has bytes to read, or its end, within *timeout* seconds.

    0 looks once, without a switch of greenlets.
    """
    if timeout <= 0 and not isinstance(getattr(select, "poll", None), types.BuiltinFunctionType):
        return _peek(sock)
    return bool(_wait([sock], timeout))


def ready(sock: HasFileno, timeout: float, read: bool = True) -> bool:
    """Return whether *sock* has room to write, or bytes to *read*, within *timeout* seconds."""
    return bool(_wait([sock], timeout, read, write=True))


def _peek(sock: HasFileno) -> bool:
    # A plain system socket, since a TLS socket takes no flags. gevent's poll() with a timeout of 0
    # does not look at all, and select() switches to other greenlets.
    raw = _socket.socket(fileno=sock.fileno())
    try:
        raw.recv(1, _PEEK)
    except BlockingIOError:
        return False
    except OSError:
        # The next read raises the error.
        return True
    finally:
        raw.detach()
    return True


def _wait(
    socks: Sequence[FileDescriptorLike], timeout: float, read: bool = True, write: bool = False
) -> List[int]:
    """Return the numbers of those of *socks* that became ready within *timeout* seconds."""
    # Looked up at each call: gevent replaces poll, and eventlet removes it.
    make = getattr(select, "poll", None)
    if make is None:
        found = select.select(socks if read else [], socks if write else [], [], timeout)
        return [_number(sock) for sock in {*found[0], *found[1]}]
    poll = make()
    for sock in socks:
        poll.register(sock, select.POLLIN * read | select.POLLOUT * write)
    return [number for number, _ in poll.poll(1000 * timeout)]


def _number(source: FileDescriptorLike) -> int:
    return source if isinstance(source, int) else int(source.fileno())


class WakeUp:
    """Wakes a thread that waits for a socket. Any thread may ring."""

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)

    def ring(self) -> None:
        """End the present wait, or the next one if no thread waits."""
        # A full buffer rings too.
        with contextlib.suppress(OSError):
            self._sender.send(b"\0")

    def wait(self, timeout: float, *sources: FileDescriptorLike) -> List[FileDescriptorLike]:
        """Wait, *timeout* seconds at most, for :meth:`ring` or *sources*; return the readable ones.

        Sources are sockets, and numbers of open files.
        """
        numbers = {_number(source): source for source in (self._receiver, *sources)}
        found = _wait(list(numbers), timeout)
        if self._receiver.fileno() in found:
            found.remove(self._receiver.fileno())
            self._silence()
        return [numbers[number] for number in found]

    def _silence(self) -> None:
        with contextlib.suppress(OSError):
            while self._receiver.recv(4096):
                pass

    def close(self) -> None:
        """Close both sockets."""
        self._receiver.close()
        self._sender.close()


class SocketWatch(WakeUp):
    """Lets a thread wait for a socket that other threads may borrow.

    A thread that has just asked for something reads the answer itself: that saves two switches of
    threads. While a thread borrows the socket, :meth:`wait_for_socket` does not return because of
    it. Only epoll allows that from another thread, so where it is missing nothing is lent.
    """

    def __init__(self, sock: HasFileno) -> None:
        super().__init__()
        self._sock = sock
        self._lent = threading.Lock()
        # gevent and eventlet remove it, since it would block all greenlets.
        make = getattr(select, "epoll", None)
        self._epoll: Any = make and make()
        if self._epoll is not None:
            self._epoll.register(sock.fileno(), select.EPOLLIN)
            self._epoll.register(self._receiver.fileno(), select.EPOLLIN)

    def wait_for_socket(self, timeout: float) -> bool:
        """Wait *timeout* seconds for the socket or :meth:`ring`; return whether it is readable."""
        if self._epoll is None:
            return bool(self.wait(timeout, self._sock))
        found = [number for number, _ in self._epoll.poll(timeout)]
        if not found:
            # An exception from a signal handler may have kept a thread from giving it back.
            self._heed(select.EPOLLIN)
        if self._receiver.fileno() in found:
            self._silence()
        return self._sock.fileno() in found

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[bool]:
        """Lend the socket for a ``with`` block; yield whether the caller has it."""
        if self._epoll is None or not self._lent.acquire(blocking=False):
            yield False
            return
        try:
            self._heed(0)
            yield True
        finally:
            self._heed(select.EPOLLIN)
            self._lent.release()

    def _heed(self, events: int) -> None:
        # Another thread may have closed it, and the socket with it.
        with contextlib.suppress(OSError, ValueError):
            self._epoll.modify(self._sock.fileno(), events)

    def close(self) -> None:
        """Close everything but the socket."""
        super().close()
        if self._epoll is not None:
            self._epoll.close()
