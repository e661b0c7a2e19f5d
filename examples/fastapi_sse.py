"""A progress bar by server-sent events, with FastAPI.

celery -A examples.tasks worker & uvicorn examples.fastapi_sse:api
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, AsyncIterator, Dict

from fastapi import FastAPI, HTTPException
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, StreamingResponse

from celery_amqp_results import aio
from examples.page import PAGE
from examples.tasks import app, count, describe

#: Seconds after which a sign of life is sent: proxies close what is silent for long.
SIGN_OF_LIFE = 15.0

api = FastAPI()


@api.get("/", response_class=HTMLResponse)
async def page() -> str:
    return PAGE


@api.post("/tasks")
async def start(total: int = 50) -> Dict[str, str]:
    # Sending speaks with the broker, and blocks while it does.
    result = await run_in_threadpool(count.delay, total)
    return {"id": result.id}


@api.get("/tasks/{task_id}")
async def value(task_id: str, timeout: float = 30.0) -> Dict[str, Any]:
    """Wait for the task and return its value."""
    try:
        return {"value": await aio.get(task_id, timeout=timeout, app=app)}
    except aio.WaitTimeout:
        raise HTTPException(504, "the task is still running") from None
    except ValueError as exc:
        raise HTTPException(422, str(exc)) from exc


@api.get("/tasks/{task_id}/events")
async def events(task_id: str) -> StreamingResponse:
    """Tell how far the task is, until it ends or the browser goes."""
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(stream(task_id), media_type="text/event-stream", headers=headers)


async def stream(task_id: str) -> AsyncIterator[str]:
    async with aio.watch(task_id, app=app) as watch:
        while True:
            try:
                # To be timed out does not end the watch.
                meta = await asyncio.wait_for(watch.__anext__(), SIGN_OF_LIFE)
            except asyncio.TimeoutError:
                yield ": still here\n\n"
            except StopAsyncIteration:
                return
            else:
                yield f"data: {json.dumps(describe(meta))}\n\n"
