"""The interface between the backend and a layout: a way to keep results on a broker.

``shared`` keeps all results in a fixed number of queues; ``per-task`` has a queue for each task,
like Celery 4. The backend turns Celery's calls into the methods of :class:`Layout`.
"""

from __future__ import annotations

import weakref
from typing import (
    Any,
    Callable,
    Collection,
    Dict,
    Mapping,
    Optional,
    Protocol,
    Sequence,
)

from celery.utils.nodenames import anon_nodename

from celery_amqp_results.amqp import connections, transports
from celery_amqp_results.amqp.pool import Pool
from celery_amqp_results.chords.sending import Chords
from celery_amqp_results.config import BackendConfig
from celery_amqp_results.metrics import Metrics
from celery_amqp_results.per_task.layout import HEARTBEAT as PER_TASK_HEARTBEAT
from celery_amqp_results.per_task.layout import PerTaskLayout
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.names import Route, client_word
from celery_amqp_results.shared_layout import SharedLayout
from celery_amqp_results.waiting.following import Following
from celery_amqp_results.waiting.tap import Tap

__all__ = ("Layout", "make_layout")


class Layout(Protocol):
    """Keeps results on a broker. Thread-safe; made anew after a fork."""

    #: Sends and leads chords; ``None`` where Celery's polling task completes chords.
    chords: Optional[Chords]

    def metrics(self) -> Metrics:
        """Return the counts so far."""

    def shape(self, result_meta: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the fields of a meta that are written."""

    def note_sent(self, task_id: str) -> None:
        """Note that this process is about to send a task. Does no I/O."""

    def publish(
        self,
        state: StateMessage,
        route: Route,
        final: bool,
        part: Optional[StateMessage] = None,
    ) -> None:
        """Publish a state; for a *final* one, return only when the broker has confirmed it.

        Parameters:
            state: the state.
            route: the other parts of its routing key.
            final: whether to wait for the confirm.
            part: a message for the leader of a chord, where the state itself is not kept as long.
        """

    def publish_part(self, part: StateMessage, group_id: str) -> None:
        """Publish the return value of a chord's header task whose state is not stored."""

    def mark_sent(self, connection: Any, sent: StateMessage) -> None:
        """Publish a mark on a connection that sends tasks. Does not wait for anything."""

    def mark(self, marks: Sequence[StateMessage], confirm: bool) -> None:
        """Publish marks."""

    def last_mark(self, task_id: str) -> Optional[StateMessage]:
        """Return the last mark of a task, or ``None``."""

    def stored_state(self, task_id: str, besides: Collection[str] = ()) -> Optional[StateMessage]:
        """Return the state that the broker keeps of a task, regardless of pushed states.

        Parameters:
            task_id: the task.
            besides: queues with bodies that cannot be decoded, whose states are left out.
        """

    def detach(self, state: StateMessage) -> StateMessage:
        """Return *state*, or if it is large a pointer to its body, which is now kept elsewhere."""

    def fetch(self, pointer: StateMessage) -> Optional[StateMessage]:
        """Return the state that a pointer stands for, or ``None`` if the body is gone."""

    def poll(
        self, ids: Collection[str], backlog_limit: Optional[int] = None
    ) -> Dict[str, Optional[StateMessage]]:
        """Return the current state of each of *ids*, or ``None`` where nothing is known.

        Parameters:
            backlog_limit: how many states of one task may be skipped, where that is limited.
        """

    def follower(self, submit: Optional[Callable[..., Any]] = None) -> Following:
        """Return a follower without tasks.

        Parameters:
            submit: calls a function with arguments on another thread; tasks may be looked up there.
        """

    def tap(self, wanted: Optional[Collection[str]] = None) -> Tap:
        """Return a tap of all published states.

        Parameters:
            wanted: names of the states to get, ``None`` for all.

        Raises:
            Unsupported: where the layout has no tap.
        """

    def forget(self, ids: Collection[str]) -> None:
        """Delete everything about *ids*."""

    def save_group(self, group: StateMessage) -> None:
        """Keep a group."""

    def read_group(self, group_id: str) -> Optional[StateMessage]:
        """Return a group that was kept, or ``None``."""

    def forget_group(self, group_id: str) -> None:
        """Delete a group that was kept."""

    def flush(self) -> None:
        """Wait until the broker has all published messages, at most a few seconds."""

    def close(self, wait: bool = True) -> None:
        """Close all connections and end all threads."""


def make_layout(app: Any, config: BackendConfig) -> Layout:
    """Return the layout that *config* asks for. Does no I/O.

    Parameters:
        app: the Celery app, which is not kept alive.
    """
    broker, options = config.broker, config.options
    connector = connections.Connector(
        broker.connection, options.retry_policy, broker.describe, app.main or "celery"
    )
    if config.layout_name == "shared":
        return SharedLayout(
            connector,
            config.topology,
            options,
            client_word(anon_nodename()),
            config.wire.persistent,
            config.codec,
            weakref.ref(app),
        )
    sessions: transports.Sessions = transports.KombuSessions(broker.connection, connector)
    if broker.is_amqp():
        pool = Pool(connector, PER_TASK_HEARTBEAT, "per-task")
        sessions = transports.AMQPSessions(pool)
    return PerTaskLayout(sessions, connector, config.wire, config.codec, options)
