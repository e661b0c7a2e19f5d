"""Bytes that a connection has no room for yet.

While an alarm lasts, RabbitMQ reads nothing that a publisher sends. A message that is larger than
the buffers of the sockets then waits here, and no thread must hold a lock meanwhile.
"""

from __future__ import annotations

import ssl
import time
from typing import Any, Union

from celery_amqp_results.toolkit import sockets
from celery_amqp_results.toolkit.retry import is_over, time_left

__all__ = ("Outbox",)

#: How long sending waits for room, in seconds, before it leaves the rest for later.
ROOM_SECONDS = 1.0

#: What sending raises when there is no room.
_NO_ROOM = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Outbox:
    """Sends what py-amqp writes to a socket, and keeps what there is no room for.

    Not thread-safe.

    Parameters:
        transport: py-amqp's, with an open socket.
    """

    def __init__(self, transport: Any) -> None:
        self._socket = transport.sock
        self._rest = memoryview(b"")
        #: How many bytes were sent.
        self.sent = 0
        transport._write = self.send

    @property
    def waiting(self) -> bool:
        """Whether bytes are kept that :meth:`flush` must send."""
        return bool(self._rest)

    def send(self, octets: Union[bytes, bytearray, memoryview]) -> None:
        """Send *octets*, or keep them behind others; wait a moment for room if there is none."""
        seconds = 0.0 if self._rest else ROOM_SECONDS
        self._rest = memoryview(b"".join((self._rest, octets)) if self._rest else octets)
        end = time.monotonic() + seconds
        while not self.flush() and not is_over(end):
            sockets.ready(self._socket, time_left(end, seconds), read=False)
        # py-amqp writes its next frame into the same buffer.
        self._rest = memoryview(bytes(self._rest))

    def flush(self) -> bool:
        """Send what there is room for now; return whether nothing is left."""
        timeout = self._socket.gettimeout()
        self._socket.settimeout(0.0)
        try:
            while self._rest:
                count = self._socket.send(self._rest)
                if not count:
                    break
                self.sent += count
                self._rest = self._rest[count:]
        except _NO_ROOM:
            pass
        finally:
            self._socket.settimeout(timeout)
        return not self._rest
