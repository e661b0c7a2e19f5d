"""A TCP proxy for tests, which can do to connections what networks do.

    with Proxy(node.amqp_port) as proxy:
        connect_to(proxy.port)
        proxy.reset()

Connections are forwarded unchanged until told otherwise. All methods are thread-safe. The proxy
runs in a thread of its own and needs only the standard library.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from typing import Any, Coroutine, List, Optional, Set, TypeVar

__all__ = ("Proxy",)

_P = TypeVar("_P", bound="Proxy")

#: Bytes to read at once; a slow proxy reads fewer.
_CHUNK = 64 * 1024

#: Closing a socket with this option sends a reset instead of an orderly end.
_RESET = struct.pack("ii", 1, 0)


class _Pair:
    """A client's connection, and the matching one to the server."""

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self.client = client
        self.server: Optional[asyncio.StreamWriter] = None
        #: Whether received bytes are discarded.
        self.deaf = False

    def reset(self, writer: Optional[asyncio.StreamWriter]) -> None:
        if writer is None:
            return
        sock = writer.get_extra_info("socket")
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        writer.transport.abort()

    def end(self) -> None:
        for writer in (self.client, self.server):
            if writer is not None:
                writer.close()


class Proxy:
    """Forwards connections to a port of this machine.

    Parameters:
        target: the port to forward to.
        port: the port to listen on; by default the system chooses one.
    """

    def __init__(self, target: int, port: int = 0) -> None:
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._pairs: Set[_Pair] = set()
        self._tasks: Set[asyncio.Task[None]] = set()
        self._server: Optional[asyncio.AbstractServer] = None
        self._black_hole = False
        self._rate: Optional[float] = None
        self._flowing: asyncio.Event
        #: Connections accepted so far.
        self.accepted = 0
        self.port = port
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._run(self._listen())
        self.resume()

    def __enter__(self: _P) -> _P:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def url(self, url: str) -> str:
        """Return *url* with the proxy's port instead of the target's."""
        old, new = f":{self._target}/", f":{self.port}/"
        if old not in url:
            raise ValueError(f"{url!r} does not name port {self._target}")
        return url.replace(old, new)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    # -- faults --------------------------------------------------------------------------------

    def reset(self) -> None:
        """Reset all connections, on both sides, as a firewall does."""
        self._run(self._reset())

    async def _reset(self) -> None:
        for pair in list(self._pairs):
            pair.reset(pair.client)
            pair.reset(pair.server)

    def halve(self) -> None:
        """Close all connections to the server without telling the clients: half-open."""
        self._run(self._halve())

    async def _halve(self) -> None:
        for pair in self._pairs:
            pair.deaf = True
            pair.reset(pair.server)

    def swallow(self) -> None:
        """Be a black hole: discard everything received, on existing and new connections.

        Neither side is notified. After :meth:`resume`, connections that lost bytes stay dead until
        they are closed, by either side or by :meth:`reset`.
        """
        self._run(self._swallow())

    async def _swallow(self) -> None:
        self._black_hole = True
        for pair in self._pairs:
            pair.deaf = True

    def stall(self) -> None:
        """Hold back everything received until :meth:`resume`; nothing is lost."""
        self._run(self._stall())

    async def _stall(self) -> None:
        self._flowing.clear()

    def slow(self, rate: float) -> None:
        """Forward at most *rate* bytes a second on each connection, in each direction."""
        self._rate = rate

    def refuse(self) -> None:
        """Reset all connections and accept no new ones, like a server that is down."""
        self._run(self._refuse())

    async def _refuse(self) -> None:
        await self._hang_up()
        await self._reset()

    def resume(self) -> None:
        """Forward everything again."""
        self._run(self._resume())

    async def _resume(self) -> None:
        self._black_hole = False
        self._rate = None
        self._flowing.set()
        if self._server is None:
            await self._listen()

    @property
    def open(self) -> int:
        """The number of open connections."""
        return len(self._pairs)

    # -- internals -------------------------------------------------------------------------------

    async def _listen(self) -> None:
        if not hasattr(self, "_flowing"):
            # Before Python 3.10 an event belongs to the loop that runs when it is made.
            self._flowing = asyncio.Event()
        self._server = await asyncio.start_server(
            self._accept, "127.0.0.1", self.port, limit=_CHUNK
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def _hang_up(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        pair = _Pair(writer)
        self._pairs.add(pair)
        self.accepted += 1
        try:
            if self._black_hole:
                pair.deaf = True
                while await reader.read(_CHUNK):
                    pass
                return
            try:
                from_server, pair.server = await asyncio.open_connection(
                    "127.0.0.1", self._target, limit=_CHUNK
                )
            except OSError:
                pair.reset(writer)
                return
            pumps: List[asyncio.Task[None]] = [
                self._loop.create_task(self._pump(pair, reader, pair.server)),
                self._loop.create_task(self._pump(pair, from_server, writer)),
            ]
            try:
                # A black hole hides the server's end of stream too: only the client can end it.
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                if pair.deaf:
                    await pumps[0]
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._pairs.discard(pair)
            self._tasks.discard(task)
            pair.end()

    async def _pump(
        self, pair: _Pair, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError):
            while True:
                rate = self._rate
                # At most a tenth of a second's worth at once.
                data = await reader.read(_CHUNK if rate is None else max(1, int(rate / 10)))
                if not data:
                    return
                await self._flowing.wait()
                if pair.deaf:
                    continue
                if rate is not None:
                    await asyncio.sleep(len(data) / rate)
                writer.write(data)
                await writer.drain()

    def close(self) -> None:
        """Close all connections and end the thread. Calling it twice is harmless."""
        if self._loop.is_closed():
            return
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _close(self) -> None:
        await self._hang_up()
        self._flowing.set()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # Transports close their sockets in the next iteration of the loop.
        await asyncio.sleep(0)
