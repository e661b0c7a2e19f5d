"""The public methods of Celery 4's backend that Celery 5 does not call.

Programs written against ``celery.backends.amqp`` find the methods of its reference page on the
backend, with the documented parameters and defaults; what they do is here. Methods that raised
``NotImplementedError`` in Celery 4 work.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Any, Callable, Collection, Dict, Iterator, List, MutableMapping, Optional, Tuple

import kombu
from celery import states

from celery_amqp_results.config import BackendConfig
from celery_amqp_results.per_task.layout import NoCacheQueue
from celery_amqp_results.protocol.ids import id_text
from celery_amqp_results.reading import Reader
from celery_amqp_results.waiting.waits import Patience, Waits

__all__ = ("Celery4API",)

Meta = Dict[str, Any]


class Celery4API:
    """Does what the methods of Celery 4's backend did.

    Parameters:
        config: the configuration of the backend.
        reader: reads states.
        waits: waits for tasks.
        cache: the metas of tasks that have ended.

    As thread-safe as *cache*.
    """

    def __init__(
        self,
        config: BackendConfig,
        reader: Reader,
        waits: Waits,
        cache: MutableMapping[str, Meta],
    ) -> None:
        self._config = config
        self._reader = reader
        self._waits = waits
        self._cache = cache

    # -- declarations ------------------------------------------------------------------------------

    def exchange(self) -> kombu.Exchange:
        """Return the exchange that results, or copies of them, are published to."""
        if self._config.layout_name == "per-task":
            return self._config.wire.exchange_entity()
        topology = self._config.topology
        return kombu.Exchange(topology.exchange, "topic", arguments=topology.exchange_arguments)

    def rkey(self, task_id: str) -> str:
        """Return the routing key of a task.

        In the layout ``per-task`` that is the task id without dashes, which is the name of its
        queue as well. In the layout ``shared`` each state has its own key; this returns the binding
        key for a queue that receives all states of the task.
        """
        task_id = id_text(task_id)
        if self._config.layout_name == "per-task":
            return self._config.wire.rkey(task_id)
        return self._config.topology.task_binding(task_id)

    def destination_for(self, task_id: str, request: Any) -> Tuple[str, str]:
        """Return the routing key and the correlation id of a task's result.

        Parameters:
            task_id: the task.
            request: its request, or ``None`` where there is none.
        """
        task_id = id_text(task_id)
        return self.rkey(task_id), getattr(request, "correlation_id", None) or task_id

    def on_reply_declare(self, task_id: str) -> List[kombu.Queue]:
        """Return the queues that must be declared before the result of a task is stored.

        That is the task's queue, or in the layout ``shared`` the queue of its shard.
        """
        task_id = id_text(task_id)
        if self._config.layout_name == "per-task":
            return [self._config.wire.queue_entity(task_id)]
        topology = self._config.topology
        spec = topology.shard_queue(topology.shard(task_id))
        return [
            NoCacheQueue(
                spec.name,
                # The default exchange routes by queue name.
                kombu.Exchange(""),
                spec.name,
                durable=spec.durable,
                exclusive=spec.exclusive,
                auto_delete=spec.auto_delete,
                queue_arguments=dict(spec.arguments),
            )
        ]

    # -- waiting -----------------------------------------------------------------------------------

    def wait_for(self, task_id: str, patience: Patience, acceptable: Collection[str] = ()) -> Meta:
        """Wait for a task to end and return its meta; the result stays where it is.

        Parameters:
            task_id: the task.
            patience: how long.
            acceptable: states in which a cached result is acceptable.

        Raises:
            celery.exceptions.TimeoutError: when the timeout is over.
        """
        task_id = id_text(task_id)
        cached = self._cache.get(task_id) if acceptable else None
        if cached and cached["status"] in acceptable:
            return cached
        ((_, state),) = self._waits.follow((task_id,), patience)
        return self._reader.decode(state)

    def get_many(
        self,
        ids: List[str],
        patience: Patience,
        on_message: Optional[Callable[[Meta], Any]],
        acceptable: Collection[str],
    ) -> Iterator[Tuple[str, Meta]]:
        """Wait for tasks; yield ``(id, meta)`` of each as it becomes ready.

        Raises:
            celery.exceptions.TimeoutError: when the timeout is over.
        """
        missing = []
        for task_id in ids:
            meta = self._cache.get(task_id)
            if meta and meta["status"] in acceptable:
                yield task_id, meta
            else:
                missing.append(task_id)
        for task_id, state in self._waits.follow(missing, patience, on_message):
            meta = self._reader.decode(state)
            if meta["status"] == states.SUCCESS:
                self._cache[task_id] = meta
            yield task_id, meta

    def drain_events(
        self,
        consumer: kombu.Consumer,
        wait: Callable[..., Any],
        patience: Patience,
        now: Callable[[], float],
    ) -> Dict[str, Meta]:
        """Read results with the caller's own consumer until at least one final state has come.

        For a private queue that is bound to :meth:`exchange`. A consumer on a task's queue takes
        the result away from all others.

        Parameters:
            consumer: a kombu consumer that is consuming; its callbacks are replaced.
            wait: called with ``timeout=`` seconds to read from the connection.
            patience: how long, and what to call about once a second.
            now: the clock.

        Returns:
            The metas of tasks that have ended, by task id.

        Raises:
            socket.timeout: when the timeout is over.
        """
        ended: Dict[str, Meta] = {}

        def on_body(body: Any, message: Any) -> None:
            if body["status"] in states.READY_STATES:
                ended[body["task_id"]] = self._reader.convert(body)

        consumer.callbacks[:] = [on_body]
        timeout = patience.timeout
        deadline = None if timeout is None else now() + timeout
        while True:
            pause = 1.0 if deadline is None else min(1.0, deadline - now())
            if pause > 0:
                with contextlib.suppress(socket.timeout):
                    wait(timeout=pause)
                if patience.on_interval is not None:
                    patience.on_interval()
            if ended:
                self._cache.update(ended)
                return ended
            if deadline is not None and now() >= deadline:
                raise socket.timeout(f"no task has ended within {timeout:g} seconds")

    # -- reading -----------------------------------------------------------------------------------

    def get_task_meta(self, task_id: str, backlog_limit: int, cache: bool) -> Meta:
        """Return the current meta of a task; a pending one if nothing is known of it.

        Parameters:
            task_id: the task.
            backlog_limit: how many states may be skipped in the layout ``per-task``; the layout
                ``shared`` has no such limit.
            cache: whether a cached result is acceptable, and the result is cached.

        Raises:
            BacklogLimitExceeded: when there are more states.
            BackendUnavailable: when the broker cannot be reached or refuses us.
        """
        known = self._cache.get(task_id) if cache else None
        if known is not None:
            return known
        meta = self._reader.meta(task_id, backlog_limit)
        if cache and meta["status"] == states.SUCCESS:
            self._cache[task_id] = meta
        return meta
