"""Views for Django 4.2 and later, asynchronous and threaded, in a project of one file.

celery -A examples.tasks worker & uvicorn examples.django_views:application
celery -A examples.tasks worker & python -m examples.django_views runserver
"""

from __future__ import annotations

import json
import sys
from typing import Any, AsyncIterator, Dict, Iterator

import django
from asgiref.sync import sync_to_async
from celery.exceptions import TimeoutError
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.management import execute_from_command_line
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path
from django.views.decorators.csrf import ensure_csrf_cookie

from celery_amqp_results import aio
from examples.page import PAGE
from examples.tasks import app, count, describe

settings.configure(
    ROOT_URLCONF=__name__,
    ALLOWED_HOSTS=["*"],
    SECRET_KEY="for the example alone",
    # As in any project: a POST without the token of the cookie is refused.
    MIDDLEWARE=["django.middleware.csrf.CsrfViewMiddleware"],
)

#: The largest number that a browser may ask for.
MAX_TOTAL = 10_000


# Without a form on the page, Django must be asked to set the cookie that the script sends back.
@ensure_csrf_cookie
def page(request: HttpRequest) -> HttpResponse:
    return HttpResponse(PAGE)


def event(meta: Dict[str, Any]) -> str:
    return f"data: {json.dumps(describe(meta))}\n\n"


# -- asynchronous: under an ASGI server, any number at once ----------------------------------------


async def start(request: HttpRequest) -> JsonResponse:
    if request.method != "POST":
        return JsonResponse({"error": "use POST"}, status=405, headers={"Allow": "POST"})
    try:
        total = int(request.GET.get("total", "50"))
        if total > MAX_TOTAL:
            raise ValueError(f"{total} is too large")
    except ValueError as exc:
        return JsonResponse({"error": str(exc)}, status=400)
    # Sending speaks with the broker, and blocks while it does.
    result = await sync_to_async(count.delay)(total)
    return JsonResponse({"id": result.id})


async def value(request: HttpRequest, task_id: str) -> JsonResponse:
    try:
        return JsonResponse({"value": await aio.get(task_id, timeout=30, app=app)})
    except TimeoutError:
        return JsonResponse({"error": "the task is still running"}, status=504)
    except ValueError as exc:
        # What the task raised.
        return JsonResponse({"error": str(exc)}, status=422)


async def events(request: HttpRequest, task_id: str) -> StreamingHttpResponse:
    async def stream() -> AsyncIterator[str]:
        async with aio.watch(task_id, app=app) as watch:
            async for meta in watch:
                yield event(meta)

    return StreamingHttpResponse(stream(), content_type="text/event-stream")


# -- threaded: under a WSGI server, each takes a thread while it lasts -----------------------------


def events_by_threads(request: HttpRequest, task_id: str) -> StreamingHttpResponse:
    def stream() -> Iterator[str]:
        # That the browser has gone is noticed at the next event: so it is bounded.
        for meta in app.backend.watch(task_id, timeout=600):
            yield event(meta)

    return StreamingHttpResponse(stream(), content_type="text/event-stream")


urlpatterns = [
    path("", page),
    path("tasks", start),
    path("tasks/<task_id>", value),
    path("tasks/<task_id>/events", events),
    path("tasks/<task_id>/events-by-threads", events_by_threads),
]

if __name__ == "__main__":
    execute_from_command_line(sys.argv)
else:
    django.setup(set_prefix=False)
    application = get_asgi_application()
