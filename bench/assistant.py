"""A process that stores results or waits for them; its commands are lines of JSON.

Commands:

- ``store``: the results *ids*, each with a text of *size* bytes, for *reply_to* and *origin*
- ``send``: take note of *count* tasks as sent, and answer with their ids and who sent them
- ``join``: say that it begins, then wait for the results of all tasks sent last
- ``look_up``: *ids* one after the other, or, with *at_once*, together
- ``forget``: *ids*
- ``pack``: all shards that keep *ids*
- ``memory``: of this process
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import uuid
from typing import Any, Dict, List, Type

from celery import Celery
from celery.result import AsyncResult, ResultSet
from celery.utils.nodenames import anon_nodename

from bench import peers, processes
from celery_amqp_results.store import lookup as store

TIMEOUT = 600


class Server:
    """Executes commands.

    Parameters:
        app: the app whose result backend is used.
    """

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._sent = ResultSet([], app=app)

    def store(
        self, ids: List[str], size: int, reply_to: str = "", origin: str = "gen1@bench"
    ) -> Dict[str, Any]:
        """Store results, and return when the broker can be expected to have them."""
        store_result = self._app.backend.store_result
        value = "x" * size
        started = time.perf_counter()
        for task_id in ids:
            request = peers.context(task_id, reply_to, origin)
            store_result(task_id, value, "SUCCESS", request=request)
        # Ours waits for its confirms then, and may be used again.
        close = getattr(self._app.backend, "close", None)
        if close is not None:
            close()
        return {"seconds": time.perf_counter() - started}

    def send(self, count: int) -> Dict[str, Any]:
        """Do what sending tasks does in the result backend, without sending any."""
        backend = self._app.backend
        ids = [str(uuid.uuid4()) for _ in range(count)]
        with self._app.amqp.producer_pool.acquire(block=True) as producer:
            for task_id in ids:
                backend.on_task_call(producer, task_id)
        self._sent = ResultSet([AsyncResult(task_id, app=self._app) for task_id in ids],
                               app=self._app)  # fmt: skip
        return {"ids": ids, "reply_to": self._app.thread_oid, "origin": anon_nodename()}

    def join(self) -> Dict[str, Any]:
        """Wait for what was sent."""
        answer({"joining": True})
        cpu, started = time.process_time(), time.perf_counter()
        values = self._sent.join_native(timeout=TIMEOUT)
        return {
            "count": len(values),
            "seconds": time.perf_counter() - started,
            "cpu": time.process_time() - cpu,
        }

    def look_up(self, ids: List[str], at_once: bool = False) -> Dict[str, Any]:
        """Look up results, and return how many milliseconds each look-up took."""
        backend = self._app.backend
        taken, found = [], 0
        if at_once:
            started = time.perf_counter()
            layout = getattr(backend, "layout", None)
            if layout is not None:
                found = sum(1 for state in layout.poll(ids).values() if state is not None)
            else:
                keys = [backend.get_key_for_task(task_id) for task_id in ids]
                found = sum(1 for value in backend.mget(keys) if value is not None)
            taken.append((time.perf_counter() - started) * 1e3)
        else:
            for task_id in ids:
                started = time.perf_counter()
                meta = backend._get_task_meta_for(task_id)
                taken.append((time.perf_counter() - started) * 1e3)
                found += meta["status"] == "SUCCESS"
        return {"milliseconds": taken, "found": found}

    def forget(self, ids: List[str]) -> Dict[str, Any]:
        """Forget results."""
        for task_id in ids:
            self._app.backend.forget(task_id)
        return {"forgotten": len(ids)}

    def pack(self, ids: List[str]) -> Dict[str, Any]:
        """Look up an id of each shard until all are packed; that counts for no other measure.

        A look-up packs for some milliseconds and leaves the rest to the next one. Here each packs
        all that it reads, so that it takes as many look-ups as there are shards, and not many times
        more: what is there in the end is the same.
        """
        layout = self._app.backend.layout
        one_each = {self._app.backend._topology.shard(task_id): task_id for task_id in ids}
        limit, store.PACK_SECONDS = store.PACK_SECONDS, 60.0
        started = time.perf_counter()
        try:
            for task_id in one_each.values():
                layout.poll((task_id,))
        finally:
            store.PACK_SECONDS = limit
        return {"seconds": time.perf_counter() - started, "packed": layout.store.packed}

    def memory(self) -> Dict[str, Any]:
        """Return the memory of this process in bytes."""
        gc.collect()
        return {"bytes": processes.resident_bytes(os.getpid())}


def answer(what: Dict[str, Any]) -> None:
    """Write an answer."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def serve(server_class: Type[Server]) -> None:
    """Obey commands until standard input ends."""
    app = peers.app_from_environment()
    server = server_class(app)
    for line in sys.stdin:
        command = json.loads(line)
        answer(getattr(server, command.pop("command"))(**command))
    peers.close(app)


if __name__ == "__main__":
    serve(Server)
