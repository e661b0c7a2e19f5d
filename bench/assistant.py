"""A process that stores results or waits for them; its commands are lines of JSON.

Commands:

- ``store``: the results *ids*, each with a text of *size* bytes, for *reply_to* and *origin*
- ``keep_packed``: the same results, as readers leave them after packing
- ``store_together``: the results *ids*, in several *threads*
- ``send``: take note of *count* tasks as sent, and answer with their ids and who sent them
- ``join``: say that it begins, then wait for the results of all tasks sent last
- ``look_up``: *ids* one after the other, or, with *at_once*, together
- ``forget``: *ids*
- ``pack``: all shards that keep *ids*
- ``memory``: of this process
- ``metrics``: of the result backend
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
import uuid
from typing import Any, Dict, List, Type

from celery import Celery
from celery.app.task import Context
from celery.result import AsyncResult, ResultSet
from celery.utils.nodenames import anon_nodename

from bench import internals, peers, processes

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

    def keep_packed(self, ids: List[str], size: int) -> Dict[str, Any]:
        """Keep results in pages."""

        def store(task_id: str) -> None:
            request = peers.context(task_id)
            self._app.backend.store_result(task_id, "x" * size, "SUCCESS", request=request)

        internals.keep_packed(self._app, ids, store)
        return {"kept": len(ids)}

    def store_together(
        self,
        ids: List[str],
        threads: int,
        value: Any = 42,
        reply_to: str = "",
        origin: str = "gen1@bench",
    ) -> Dict[str, Any]:
        """Store results in several threads at once; each waits for its confirm."""
        store_result = self._app.backend.store_result
        barrier = threading.Barrier(threads + 1)

        def store(requests: List[Context]) -> None:
            barrier.wait()
            for request in requests:
                store_result(request.id, value, "SUCCESS", request=request)

        requests = [peers.context(task_id, reply_to, origin) for task_id in ids]
        running = [
            threading.Thread(target=store, args=(requests[number::threads],))
            for number in range(threads)
        ]
        for thread in running:
            thread.start()
        barrier.wait()
        started = time.perf_counter()
        for thread in running:
            thread.join()
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
        remembered = internals.remembered(self._app)
        if at_once:
            started = time.perf_counter()
            if hasattr(backend, "mget"):
                # Redis: Celery's get_many() sleeps after it has read everything.
                keys = [backend.get_key_for_task(task_id) for task_id in ids]
                found = sum(1 for value in backend.mget(keys) if value is not None)
            else:
                found = len(dict(backend.get_many(ids, timeout=0)))
            taken.append((time.perf_counter() - started) * 1e3)
        else:
            for task_id in ids:
                started = time.perf_counter()
                meta = backend._get_task_meta_for(task_id)
                taken.append((time.perf_counter() - started) * 1e3)
                found += meta["status"] == "SUCCESS"
        remembered = internals.remembered(self._app) - remembered
        return {"milliseconds": taken, "found": found, "remembered": remembered}

    def forget(self, ids: List[str]) -> Dict[str, Any]:
        """Forget results."""
        for task_id in ids:
            self._app.backend.forget(task_id)
        return {"forgotten": len(ids)}

    def pack(self, ids: List[str]) -> Dict[str, Any]:
        """Pack all shards, by one look-up in each."""
        chosen = internals.one_id_a_shard(self._app, ids)
        started = time.perf_counter()
        with internals.packing_everything():
            for task_id in chosen:
                internals.read_store(self._app, (task_id,))
        return {"seconds": time.perf_counter() - started}

    def read_store(self, ids: List[str], at_once: bool = False) -> Dict[str, Any]:
        """Read results from the shards; return how many milliseconds each read took."""
        taken, found = [], 0
        for some in [ids] if at_once else [[task_id] for task_id in ids]:
            started = time.perf_counter()
            found += internals.read_store(self._app, some)
            taken.append((time.perf_counter() - started) * 1e3)
        return {"milliseconds": taken, "found": found}

    def memory(self) -> Dict[str, Any]:
        """Return the memory of this process in bytes."""
        gc.collect()
        return {"bytes": processes.resident_bytes(os.getpid())}

    def metrics(self) -> Dict[str, Any]:
        """Return what this backend has counted in this process."""
        return dict(self._app.backend.metrics().as_dict())


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
