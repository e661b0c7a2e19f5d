"""The app of workers that are killed while they lead chords. For subprocesses only.

The leader of a chord with the body ``mortal`` is killed with SIGKILL at the point that it names,
the first time that a leader gets there.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any, Iterable, List, Mapping

from celery import signals

from celery_amqp_results.chords.firing import BodySender
from celery_amqp_results.chords.session import Session
from tests.worker.chord_tasks import register
from tests.worker.tasks import app_from_environment

app = app_from_environment()
tasks = register(app)


def reach(point: str, body: Any) -> None:
    kwargs = body["kwargs"] if body is not None else {}
    if kwargs.get("point") != point:
        return
    try:
        os.close(os.open(kwargs["once"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


_send = BodySender.send
_acknowledge = Session.acknowledge

_sent: List[Any] = []


def send(self: BodySender, signature: Any, results: List[Any], options: Mapping[str, Any]) -> None:
    reach("before", signature)
    _send(self, signature, results, options)
    _sent[:] = [signature]
    reach("between", signature)


def acknowledge(self: Session, deliveries: Iterable[int]) -> None:
    _acknowledge(self, deliveries)
    if _sent:
        reach("after", _sent.pop())


BodySender.send = send  # type: ignore[method-assign]
Session.acknowledge = acknowledge  # type: ignore[method-assign]

#: Seconds that a handler of the user's takes for each task of a body.
_slowness = float(os.environ.get("SLOW_PUBLISH", "0"))


def _slow_down(sender: Any = None, **kwargs: Any) -> None:
    if sender == tasks.record.name:
        time.sleep(_slowness)


if _slowness:
    signals.before_task_publish.connect(_slow_down, weak=False)
