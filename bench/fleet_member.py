"""A process of the measure *fleet*: a web process, or one that stores results.

It is an assistant with two more commands, whose arguments are those of a
:class:`~bench.schedule.Timetable`:

- ``browse``: send and poll as web process *number*; answer with the polls
- ``store_on_time``: store as storing process *number*; answer when each ``store_result`` returned

Both begin at *start*, a time of the machine's monotonic clock.
"""

from __future__ import annotations

import time
from typing import Any, Dict, List, Mapping, Tuple

from celery.result import AsyncResult
from celery.utils.nodenames import anon_nodename

from bench import assistant, peers
from bench.schedule import SEND, Timetable


class Member(assistant.Server):
    """Does what the measure *fleet* commands."""

    def origin(self) -> Dict[str, str]:
        """Return the name under which this process sends tasks."""
        return {"origin": anon_nodename(), "reply_to": self._app.thread_oid}

    def metrics(self) -> Dict[str, int]:
        """Return what the backend has counted; nothing if it is not this one."""
        metrics = getattr(self._app.backend, "metrics", None)
        return dict(metrics().as_dict()) if metrics is not None else {}

    def browse(self, number: int, start: float, timetable: Mapping[str, Any]) -> Dict[str, Any]:
        """Send and poll as the timetable says."""
        table = Timetable(**timetable)
        polls: List[Tuple[int, float, float, bool]] = []
        late = 0.0
        steps = [(step, table.task_id(step.task)) for step in table.steps(number)]
        with self._app.amqp.producer_pool.acquire(block=True) as producer:
            for step, task_id in steps:
                late = max(late, _wait_until(start + step.at))
                if step.action == SEND:
                    self._app.backend.on_task_call(producer, task_id)
                    AsyncResult(task_id, app=self._app)
                else:
                    polls.append((step.task, *self._poll(task_id)))
        return {"polls": polls, "late": late}

    def _poll(self, task_id: str) -> Tuple[float, float, bool]:
        asked = time.monotonic()
        state = AsyncResult(task_id, app=self._app).state
        return asked, time.monotonic(), state == "SUCCESS"

    def store_on_time(
        self,
        number: int,
        start: float,
        timetable: Mapping[str, Any],
        senders: List[Dict[str, str]],
    ) -> Dict[str, Any]:
        """Store results as the timetable says."""
        table = Timetable(**timetable)
        stored: List[Tuple[int, float]] = []
        late = 0.0
        for at, task in table.stores(number):
            task_id = table.task_id(task)
            request = peers.context(task_id, **senders[table.sender(task)])
            late = max(late, _wait_until(start + at))
            self._app.backend.store_result(task_id, "x" * 50, "SUCCESS", request=request)
            stored.append((task, time.monotonic()))
        return {"stored": stored, "late": late}


def _wait_until(moment: float) -> float:
    """Wait until *moment*; return by how many seconds it had passed already."""
    left = moment - time.monotonic()
    if left > 0:
        time.sleep(left)
        return 0.0
    return -left


if __name__ == "__main__":
    assistant.serve(Member)
