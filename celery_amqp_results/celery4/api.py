"""The public methods of Celery 4's backend that Celery 5 does not call.

Programs written against ``celery.backends.amqp`` find the attributes and methods of its reference
page here, with the documented parameters and defaults. Methods that raised ``NotImplementedError``
in Celery 4 work.
"""

from __future__ import annotations

import contextlib
import socket
import time
from typing import (
    Any,
    Callable,
    ClassVar,
    Dict,
    List,
    Optional,
    Tuple,
    Type,
)

import kombu
from celery import states
from celery.backends.base import Backend

from celery_amqp_results import errors
from celery_amqp_results.celery4 import consumer, producer
from celery_amqp_results.config import BackendConfig
from celery_amqp_results.per_task.layout import BACKLOG_LIMIT, NoCacheQueue
from celery_amqp_results.protocol.ids import id_text
from celery_amqp_results.waiting.waits import Patience

__all__ = ("Celery4API",)

Meta = Dict[str, Any]


class Celery4API(Backend):
    """The methods of Celery 4's backend that Celery 5 does not call."""

    Exchange: ClassVar[Type[producer.Exchange]] = producer.Exchange
    Producer: ClassVar[Type[producer.Producer]] = producer.Producer
    Consumer: ClassVar[Type[consumer.Consumer]] = consumer.Consumer
    #: The queue class that declares a queue at every use.
    Queue: ClassVar[Type[NoCacheQueue]] = NoCacheQueue

    BacklogLimitExceeded = errors.BacklogLimitExceeded

    # Set by the backend.
    config: BackendConfig

    @property
    def exchange(self) -> kombu.Exchange:
        """The exchange that results are published to; in the layout ``shared`` a copy of each."""
        if self.config.layout_name == "per-task":
            return self.config.wire.exchange_entity()
        topology = self.config.topology
        return kombu.Exchange(topology.exchange, "topic", arguments=topology.exchange_arguments)

    @property
    def delivery_mode(self) -> int:
        """2 for messages that survive a restart of the broker, otherwise 1."""
        return self.config.wire.delivery_mode

    @property
    def auto_delete(self) -> bool:
        """Whether a task's queue goes with its last consumer, in the layout ``per-task``."""
        return self.config.wire.auto_delete

    def rkey(self, task_id: str) -> str:
        """Return the routing key of a task.

        In the layout ``per-task`` that is the task id without dashes, which is the name of its
        queue as well. In the layout ``shared`` each state has its own key; this returns the binding
        key for a queue that receives all states of the task.
        """
        task_id = id_text(task_id)
        if self.config.layout_name == "per-task":
            return self.config.wire.rkey(task_id)
        return self.config.topology.task_binding(task_id)

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
        if self.config.layout_name == "per-task":
            return [self.config.wire.queue_entity(task_id)]
        topology = self.config.topology
        spec = topology.shard_queue(topology.shard(task_id))
        return [
            self.Queue(
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

    def revive(self, channel: Any) -> None:
        """Do nothing: lost connections are replaced when they are needed.

        Parameters:
            channel: not used.
        """

    def consume(
        self,
        task_id: str,
        timeout: Optional[float] = None,
        no_ack: bool = True,
        on_interval: Optional[Callable[[], Any]] = None,
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
        patience = Patience(timeout, None, on_interval)
        ((_, state),) = self.waits.follow((task_id,), patience)
        meta: Meta = self.reader.decode(state)
        self._cache[task_id] = meta
        return meta

    def drain_events(
        self,
        connection: Any,
        consumer: kombu.Consumer,
        timeout: Optional[float] = None,
        on_interval: Optional[Callable[[], Any]] = None,
        now: Callable[[], float] = time.monotonic,
        wait: Optional[Callable[..., Any]] = None,
    ) -> Dict[str, Meta]:
        """Read results with the caller's own consumer until at least one final state has come.

        For a private queue that is bound to :attr:`exchange`. A consumer on a task's queue takes
        the result away from all others.

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

        def on_body(body: Any, message: Any) -> None:
            if body["status"] in states.READY_STATES:
                ended[body["task_id"]] = self.meta_from_decoded(body)

        consumer.callbacks[:] = [on_body]
        deadline = None if timeout is None else now() + timeout
        while True:
            pause = 1.0 if deadline is None else min(1.0, deadline - now())
            if pause > 0:
                with contextlib.suppress(socket.timeout):
                    wait(timeout=pause)
                if on_interval is not None:
                    on_interval()
            if ended:
                self._cache.update(ended)
                return ended
            if deadline is not None and now() >= deadline:
                raise socket.timeout(f"no task has ended within {timeout:g} seconds")

    def get_task_meta(
        self, task_id: str, backlog_limit: int = BACKLOG_LIMIT, cache: bool = True
    ) -> Meta:
        """Return the current meta of a task; a pending one if nothing is known of it.

        The second parameter was *backlog_limit* in Celery 4 and is *cache* in Celery 5, whose own
        code always passes it by name. A second positional argument that is ``True`` or ``False`` is
        treated as *cache*.

        Parameters:
            task_id: the task.
            backlog_limit: how many states may be skipped in the layout ``per-task``; the layout
                ``shared`` has no such limit.
            cache: whether a cached result is acceptable, and the result is cached.

        Raises:
            BacklogLimitExceeded: when there are more states.
            BackendUnavailable: when the broker cannot be reached or refuses us.
        """
        if isinstance(backlog_limit, bool):
            cache, backlog_limit = backlog_limit, BACKLOG_LIMIT
        task_id = id_text(task_id)
        if backlog_limit == BACKLOG_LIMIT:
            found: Meta = super().get_task_meta(task_id, cache=cache)
            return found
        self._ensure_not_eager()
        if cache:
            known: Optional[Meta] = self._cache.get(task_id)
            if known is not None:
                return known
        state = self.layout.poll((task_id,), backlog_limit)[task_id]
        if state is None:
            return {"status": states.PENDING, "result": None}
        meta: Meta = self.reader.decode(state)
        if cache and meta["status"] == states.SUCCESS:
            self._cache[task_id] = meta
        return meta

    def poll(self, task_id: str, backlog_limit: int = BACKLOG_LIMIT) -> Meta:
        """Return the current meta of a task, see :meth:`get_task_meta`."""
        return self.get_task_meta(task_id, backlog_limit)

    def reload_task_result(self, task_id: str) -> None:
        """Reload a result into the cache, even if it is there."""
        task_id = id_text(task_id)
        self._cache[task_id] = self.get_task_meta(task_id, cache=False)

    def reload_group_result(self, task_id: str) -> None:
        """Reload a saved group into the cache, even if it is there.

        Parameters:
            task_id: the id of the group.
        """
        task_id = id_text(task_id)
        self._cache[task_id] = self.get_group_meta(task_id, cache=False)
