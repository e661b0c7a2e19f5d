"""The app of workers that are killed while they fire a chord. For subprocesses only.

A process that fires a chord with the body ``mortal`` is killed with SIGKILL at the point that the
body names, the first time that any process reaches it.
"""

from __future__ import annotations

import os
import signal
from typing import Any, List

from celery_amqp_results.chords.native import BodySender, NativeChords
from celery_amqp_results.store.checkout import Checkout
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
_delete = Checkout.delete
_settle = NativeChords._settle

_sent: List[Any] = []


def settle(self: NativeChords, group_id: str, body: Any) -> bool:
    reach("published", body)
    return _settle(self, group_id, body)


def send(self: BodySender, signature: Any, results: List[Any]) -> None:
    reach("before", signature)
    _send(self, signature, results)
    _sent[:] = [signature]
    reach("between", signature)


def delete(self: Checkout, *others: str) -> None:
    _delete(self, *others)
    if _sent:
        reach("after", _sent.pop())


NativeChords._settle = settle  # type: ignore[method-assign]
BodySender.send = send  # type: ignore[method-assign]
Checkout.delete = delete  # type: ignore[method-assign]
