"""Waiting for tasks and watching them from coroutines.

::

    from celery_amqp_results import aio

    value = await aio.get(add.delay(2, 2), timeout=10)

    async for meta in aio.watch(task_id):
        print(meta["status"], meta["result"])

    async for task_id, value in aio.as_completed(group_result):
        print(task_id, value)

Nothing here blocks the event loop, and waiting starts no thread per coroutine: one thread for each
event loop and app follows all tasks together. Coroutines are cancelled and timed out like any
other. A program may have several event loops; each object returned here belongs to the loop that
asked for it. Tasks are sent as usual: ``delay()`` talks to the broker, and blocks while it does.
"""

from celery_amqp_results.aio.asking import forget, get_meta, state
from celery_amqp_results.aio.streams import Completed, Watch, as_completed, watch
from celery_amqp_results.aio.values import gather, get
from celery_amqp_results.errors import WaitTimeout

__all__ = (
    "Completed",
    "WaitTimeout",
    "Watch",
    "as_completed",
    "forget",
    "gather",
    "get",
    "get_meta",
    "state",
    "watch",
)
