"""A status page and a progress bar by server-sent events, with Flask.

celery -A examples.tasks worker & flask --app examples.flask_views run
"""

from __future__ import annotations

import json
from typing import Any, Dict, Iterator

from flask import Flask, Response, request

from examples.page import PAGE
from examples.tasks import app as celery_app
from examples.tasks import count, describe

app = Flask(__name__)


@app.get("/")
def page() -> str:
    return PAGE


@app.post("/tasks")
def start() -> Dict[str, str]:
    return {"id": count.delay(int(request.args["total"])).id}


@app.get("/tasks/<task_id>")
def status(task_id: str) -> Dict[str, Any]:
    """Return the current state; any process of the server can answer."""
    return describe({**celery_app.backend.get_task_meta(task_id), "task_id": task_id})


@app.get("/tasks/<task_id>/events")
def events(task_id: str) -> Response:
    """Send each state as it happens; the stream occupies a thread of the server while it lasts."""

    def stream() -> Iterator[str]:
        # The server notices that the browser has gone when it sends the next state, so the
        # timeout limits how long the thread is occupied.
        for meta in celery_app.backend.watch(task_id, timeout=600):
            yield f"data: {json.dumps(describe(meta))}\n\n"

    return Response(stream(), mimetype="text/event-stream")
