"""A task's progress over a WebSocket, with FastAPI; with Starlette alone it is the same.

celery -A examples.tasks worker & uvicorn examples.fastapi_websocket:api
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Coroutine

from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from fastapi.concurrency import run_in_threadpool

from celery_amqp_results import aio
from examples.tasks import app, count, describe

#: The largest number that a client may ask for.
MAX_TOTAL = 10_000

#: Close codes of RFC 6455: the client sent something that we do not take, or we have failed.
UNSUPPORTED_DATA = 1003
INTERNAL_ERROR = 1011

api = FastAPI()


@api.websocket("/count")
async def progress(websocket: WebSocket) -> None:
    """Count to the number that the client sends, and tell how far it is."""
    await websocket.accept()
    try:
        total = int(await websocket.receive_text())
        if total > MAX_TOTAL:
            raise ValueError(f"{total} is too large")
    except WebSocketDisconnect:
        return
    except (KeyError, TypeError, ValueError):
        # A binary message has no text.
        await websocket.close(UNSUPPORTED_DATA, f"send a number up to {MAX_TOTAL} as text")
        return
    result = await run_in_threadpool(count.delay, total)

    async def tell() -> None:
        async for meta in aio.watch(result):
            await websocket.send_json(describe(meta))

    await while_connected(websocket, tell())


@api.websocket("/failures")
async def failures(websocket: WebSocket) -> None:
    """Tell of every task that fails, in whichever process it was sent."""
    await websocket.accept()

    async def tell() -> None:
        async for meta in aio.watch(states="FAILURE", app=app):
            await websocket.send_json(describe(meta))

    await while_connected(websocket, tell())


async def while_connected(websocket: WebSocket, work: Coroutine[Any, Any, None]) -> None:
    """Run *work* until it ends or the client goes, then close the WebSocket."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(until_gone(websocket))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if leaving.done():
            return
        try:
            working.result()
        except Exception:
            # Sending fails as well where the client has gone without a word.
            with contextlib.suppress(RuntimeError):
                await websocket.close(INTERNAL_ERROR)
            raise
        await websocket.close()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def until_gone(websocket: WebSocket) -> None:
    """Return when the client has gone, which only receiving tells; ignore what it sends."""
    while (await websocket.receive())["type"] != "websocket.disconnect":
        pass
