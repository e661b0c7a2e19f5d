"""A task's progress over a WebSocket, with FastAPI; with Starlette alone it is the same.

celery -A examples.tasks worker & uvicorn examples.fastapi_websocket:api
"""

from __future__ import annotations

import asyncio

from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from fastapi.concurrency import run_in_threadpool

from celery_amqp_results import aio
from examples.tasks import app, count, describe

api = FastAPI()


@api.websocket("/count")
async def progress(websocket: WebSocket) -> None:
    """Count to the number that the client sends, and tell how far it is."""
    await websocket.accept()
    total = int(await websocket.receive_text())
    result = await run_in_threadpool(count.delay, total)

    async def tell() -> None:
        async for meta in aio.watch(result):
            await websocket.send_json(describe(meta))
        await websocket.close()

    telling = asyncio.create_task(tell())
    try:
        # Only by receiving is it noticed that the client goes: then the watch ends as well.
        while True:
            await websocket.receive_text()
    except WebSocketDisconnect:
        pass
    finally:
        telling.cancel()


@api.websocket("/failures")
async def failures(websocket: WebSocket) -> None:
    """Tell of every task that fails, whoever has sent it."""
    await websocket.accept()

    async def tell() -> None:
        async for meta in aio.watch(states="FAILURE", app=app):
            await websocket.send_json(describe(meta))

    telling = asyncio.create_task(tell())
    try:
        while True:
            await websocket.receive_text()
    except WebSocketDisconnect:
        pass
    finally:
        telling.cancel()
