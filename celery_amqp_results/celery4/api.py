"""The public methods of Celery 4's backend that Celery 5 does not call.

Programs written against ``celery.backends.amqp`` find the methods of its reference page on the
backend, with the documented parameters and defaults; what they do is here. Methods that raised
``NotImplementedError`` in Celery 4 work.
"""

from __future__ import annotations

import contextlib
import operator
import socket
import time
from typing import (
    Any,
    Callable,
    Container,
    Dict,
    Iterable,
    Iterator,
    List,
    MutableMapping,
    Optional,
    Protocol,
    Tuple,
)

import kombu
from celery import states
from celery.exceptions import TimeoutError

from celery_amqp_results.config import BackendConfig
from celery_amqp_results.library_types import Meta
from celery_amqp_results.per_task.lookups import BACKLOG_LIMIT
from celery_amqp_results.per_task.wire import NoCacheQueue
from celery_amqp_results.protocol.ids import id_text
from celery_amqp_results.reading import Reader
from celery_amqp_results.toolkit.retry import deadline_after
from celery_amqp_results.waiting.waits import DEFAULT_INTERVAL, Patience, Waits

__all__ = ("Celery4API",)


class CeleryBackend(Protocol):
    """What Celery 4's methods need of the backend."""

    config: BackendConfig
    reader: Reader
    waits: Waits
    #: The metas of tasks that have ended, by id.
    _cache: MutableMapping[str, Optional[Meta]]

    def _ensure_not_eager(self) -> None: ...

    def exception_to_python(self, exc: object) -> BaseException:
        """Return a stored exception as an exception."""

    def meta_from_decoded(self, meta: Meta) -> Meta:
        """Return a decoded meta with an exception as the result of a failure."""

    def get_task_meta(
        self, task_id: str, backlog_limit: int = BACKLOG_LIMIT, cache: bool = True
    ) -> Meta:
        """Return the current meta of a task."""

    def get_group_meta(self, group_id: str, cache: bool = True) -> Optional[Meta]:
        """Return the meta of a saved group."""


class Celery4API:
    """The methods of Celery 4's backend that Celery 5 does not call."""

    def __init__(self, backend: CeleryBackend) -> None:
        self._backend = backend

    def exchange(self) -> kombu.Exchange:
        """Return the exchange that results are published to; in ``shared`` a copy of each."""
        config = self._backend.config
        if config.layout_name == "per-task":
            return config.wire.exchange_entity()
        topology = config.topology
        return kombu.Exchange(topology.exchange, "topic", arguments=topology.exchange_arguments)

    def rkey(self, task_id: str) -> str:
        """Return the routing key of a task.

        In the layout ``per-task`` that is the task id without dashes, which is the name of its
        queue as well. In the layout ``shared`` each state has its own key; this returns the binding
        key for a queue that receives all states of the task.
        """
        task_id = id_text(task_id)
        if self._backend.config.layout_name == "per-task":
            return self._backend.config.wire.rkey(task_id)
        return self._backend.config.topology.task_binding(task_id)

    def destination_for(self, task_id: str, request: object) -> Tuple[str, str]:
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
        if self._backend.config.layout_name == "per-task":
            return [self._backend.config.wire.queue_entity(task_id)]
        topology = self._backend.config.topology
        spec = topology.shard_queue(topology.shard(task_id))
        return [
            NoCacheQueue(
                spec.name,
                # The default exchange routes by queue name.
                kombu.Exchange(""),
                spec.name,
                queue_arguments=dict(spec.arguments),
            )
        ]

    def revive(self, channel: object) -> None:
        """Do nothing: lost connections are replaced when they are needed.

        Parameters:
            channel: not used.
        """

    def consume(
        self,
        task_id: str,
        timeout: Optional[float] = None,
        no_ack: bool = True,
        on_interval: Optional[Callable[[], object]] = None,
    ) -> Meta:
        """Wait for a task to end and return its meta; the result stays where it is.

        Parameters:
            task_id: the task.
            timeout: seconds to wait; ``None`` for no end, 0 to poll once.
            no_ack: accepted for compatibility; reading never removes a result.
            on_interval: called about twice a second while waiting.

        Raises:
            celery.exceptions.TimeoutError: when *timeout* is over.
        """
        task_id = id_text(task_id)
        meta = self._end_of(task_id, Patience(timeout, None, on_interval))
        # After any other final state the task may run again, and succeed.
        if meta["status"] == states.SUCCESS:
            self._backend._cache[task_id] = meta
        return meta

    def _end_of(self, task_id: str, patience: Patience) -> Meta:
        deadline = patience.deadline()
        ((_, state),) = self._backend.waits.follow((task_id,), patience)
        return self._backend.reader.decode(state, deadline)

    def wait_for(
        self,
        /,
        task_id: str,
        timeout: Optional[float] = None,
        cache: bool = True,
        no_ack: bool = True,
        on_interval: Optional[Callable[[], object]] = None,
        READY_STATES: Container[str] = states.READY_STATES,
        PROPAGATE_STATES: Container[str] = states.PROPAGATE_STATES,
        interval: Optional[float] = None,
        **kwargs: object,
    ) -> Any:
        """Wait for a task and return its result, or raise its exception.

        Parameters:
            task_id: the task.
            timeout: seconds to wait; ``None`` for no end, 0 to poll once.
            cache: whether a cached result is acceptable.
            no_ack: accepted for compatibility; reading never removes a result.
            on_interval: called about every *interval* seconds while waiting.
            interval: seconds, 0.5 by default.

        Raises:
            celery.exceptions.TimeoutError: when *timeout* is over.
            Exception: the exception of the task, if it failed.
        """
        task_id = id_text(task_id)
        meta = self._backend._cache.get(task_id) if cache else None
        if not meta or meta["status"] not in READY_STATES:
            meta = self._end_of(task_id, Patience(timeout, interval, on_interval))
        if meta["status"] in PROPAGATE_STATES:
            raise self._backend.exception_to_python(meta["result"])
        return meta["result"]

    def get_many(
        self,
        /,
        task_ids: Iterable[str],
        timeout: Optional[float] = None,
        no_ack: bool = True,
        on_message: Optional[Callable[[Meta], object]] = None,
        on_interval: Optional[Callable[[], object]] = None,
        now: Callable[[], float] = time.monotonic,
        getfields: Callable[[Meta], Tuple[str, str]] = operator.itemgetter("status", "task_id"),
        READY_STATES: Container[str] = states.READY_STATES,
        PROPAGATE_STATES: Container[str] = states.PROPAGATE_STATES,
        interval: Optional[float] = None,
        max_iterations: Optional[int] = None,
        **kwargs: object,
    ) -> Iterator[Tuple[str, Meta]]:
        """Wait for tasks; yield ``(id, meta)`` of each as it becomes ready.

        Parameters:
            task_ids: the tasks.
            timeout: seconds for all of them; ``None`` for no end, 0 to poll once.
            interval: seconds between calls of *on_interval*, 0.5 by default.
            no_ack, now, getfields, PROPAGATE_STATES: accepted for compatibility; reading never
                removes a result, and deadlines are monotonic.
            READY_STATES: states in which a cached result is acceptable.
            on_message: called with the meta of every state.
            on_interval: called periodically while waiting.
            max_iterations: how many intervals to wait; then the iteration ends. 1 polls once.

        Raises:
            celery.exceptions.TimeoutError: when *timeout* is over.
        """
        self._backend._ensure_not_eager()
        cache, missing = self._backend._cache, []
        for task_id in [id_text(task_id) for task_id in task_ids]:
            meta = cache.get(task_id)
            if meta and meta["status"] in READY_STATES:
                yield task_id, meta
            else:
                missing.append(task_id)
        if max_iterations is not None:
            timeout = (max_iterations - 1) * (interval or DEFAULT_INTERVAL)
        patience = Patience(timeout, interval, on_interval)
        deadline = patience.deadline()
        try:
            for task_id, state in self._backend.waits.follow(missing, patience, on_message):
                meta = self._backend.reader.decode(state, deadline)
                if meta["status"] == states.SUCCESS:
                    cache[task_id] = meta
                yield task_id, meta
        except TimeoutError:
            if max_iterations is None:
                raise

    def drain_events(
        self,
        connection: kombu.Connection,
        consumer: kombu.Consumer,
        timeout: Optional[float] = None,
        on_interval: Optional[Callable[[], object]] = None,
        now: Callable[[], float] = time.monotonic,
        wait: Optional[Callable[..., object]] = None,
    ) -> Dict[str, Meta]:
        """Read results with the caller's own consumer until at least one final state has come.

        For a private queue that is bound to the exchange of results. A consumer on a task's queue
        takes the result away from all others.

        Parameters:
            connection: a kombu connection.
            consumer: a consumer on it that is consuming; its callbacks are replaced.
            timeout: seconds to wait; ``None`` for no end.
            on_interval: called about once a second while waiting.
            now: the clock.
            wait: called with ``timeout=`` seconds to read from the connection;
                ``connection.drain_events`` by default.

        Returns:
            The metas of tasks that have ended, by task id.

        Raises:
            socket.timeout: when *timeout* is over.
        """
        wait = wait or connection.drain_events
        ended: Dict[str, Meta] = {}

        def on_body(body: Meta, message: object) -> None:
            if body["status"] in states.READY_STATES:
                ended[body["task_id"]] = self._backend.meta_from_decoded(body)

        consumer.callbacks[:] = [on_body]
        deadline = deadline_after(timeout, now)
        while True:
            pause = 1.0 if deadline is None else min(1.0, deadline - now())
            if pause > 0:
                with contextlib.suppress(socket.timeout):
                    wait(timeout=pause)
                if on_interval is not None:
                    on_interval()
            if ended:
                self._backend._cache.update(ended)
                return ended
            if deadline is not None and now() >= deadline:
                raise socket.timeout(f"no task has ended within {timeout:g} seconds")

    def get_task_meta(self, task_id: str, backlog_limit: int, cache: bool) -> Meta:
        """Return the current meta of a task; a pending one if nothing is known of it.

        Parameters:
            backlog_limit: how many states may be skipped in the layout ``per-task``; the layout
                ``shared`` has no such limit.
        """
        self._backend._ensure_not_eager()
        known: Optional[Meta] = self._backend._cache.get(task_id) if cache else None
        if known is not None:
            return known
        meta = self._backend.reader.meta(task_id, backlog_limit)
        if cache and meta["status"] == states.SUCCESS:
            self._backend._cache[task_id] = meta
        return meta

    def poll(self, task_id: str, backlog_limit: int = BACKLOG_LIMIT) -> Meta:
        """Return the current meta of a task, as the backend's ``get_task_meta`` does."""
        return self._backend.get_task_meta(task_id, backlog_limit)

    def reload_task_result(self, task_id: str) -> None:
        """Reload a result into the cache, even if it is there."""
        meta = self._backend.get_task_meta(task_id, cache=False)
        self._backend._cache[id_text(task_id)] = meta

    def reload_group_result(self, task_id: str) -> None:
        """Reload a saved group into the cache, even if it is there.

        Parameters:
            task_id: the id of the group.
        """
        meta = self._backend.get_group_meta(task_id, cache=False)
        self._backend._cache[id_text(task_id)] = meta
