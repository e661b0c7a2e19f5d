"""A progress bar with celery-progress, in a project of Django in one file.

celery -A examples.django_progress worker & python -m examples.django_progress runserver
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import django
from celery import Celery
from celery_progress.backend import ProgressRecorder
from django.conf import settings
from django.core.management import execute_from_command_line
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import include, path
from django.views.decorators.csrf import ensure_csrf_cookie

settings.configure(
    ROOT_URLCONF=__name__,
    ALLOWED_HOSTS=["*"],
    SECRET_KEY="for the example alone",
    INSTALLED_APPS=["django.contrib.staticfiles", "celery_progress"],
    MIDDLEWARE=["django.middleware.csrf.CsrfViewMiddleware"],
    STATIC_URL="static/",
    DEBUG=True,
)

app = Celery(
    "progress",
    broker=os.environ.get("BROKER_URL", "amqp://guest:guest@localhost//"),
    backend="amqp://",
)
# celery-progress asks the default app, in whichever thread a view runs.
app.set_default()


# A name of its own, since this module is __main__ for the web server and not for the worker.
@app.task(bind=True, name="progress.count")
def count(self: Any, total: int) -> int:
    """Count to *total*, and record the progress as celery-progress expects it."""
    recorder = ProgressRecorder(self)
    for current in range(total):
        time.sleep(0.1)
        recorder.set_progress(current + 1, total, f"{current + 1} of {total}")
    return total


PAGE = """<!doctype html>
<title>Progress</title>
<script src="/static/celery_progress/celery_progress.js"></script>
<button>Count to 50</button>
<div id="progress-bar">&nbsp;</div><div id="progress-bar-message"></div>
<script>
document.querySelector("button").onclick = async () => {
  const token = document.cookie.match(/(?:^|; )csrftoken=([^;]+)/)[1];
  const headers = {"X-CSRFToken": token};
  const {url} = await (await fetch("/tasks?total=50", {method: "POST", headers})).json();
  CeleryProgressBar.initProgressBar(url);
};
</script>
"""


@ensure_csrf_cookie
def page(request: HttpRequest) -> HttpResponse:
    return HttpResponse(PAGE)


def start(request: HttpRequest) -> JsonResponse:
    if request.method != "POST":
        return JsonResponse({"error": "use POST"}, status=405)
    result = count.delay(int(request.GET.get("total", "50")))
    return JsonResponse({"id": result.id, "url": f"/progress/{result.id}/"})


urlpatterns = [
    path("", page),
    path("tasks", start),
    path("progress/", include("celery_progress.urls")),
]

if __name__ == "__main__":
    django.setup(set_prefix=False)
    execute_from_command_line(sys.argv)
