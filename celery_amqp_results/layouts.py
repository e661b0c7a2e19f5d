"""The interface between the backend and a layout: a way to keep results on a broker.

``shared`` keeps all results in a fixed number of queues; ``per-task`` has a queue for each task,
like Celery 4. The backend turns Celery's calls into the methods of :class:`Layout`.
"""

from __future__ import annotations

import abc
import weakref
from typing import Callable, Collection, Dict, Optional, Protocol, Sequence

import kombu
from celery.utils.nodenames import anon_nodename

from celery_amqp_results.amqp import connections, transports
from celery_amqp_results.amqp.pool import Pool
from celery_amqp_results.chords.sending import Chords
from celery_amqp_results.config import BackendConfig
from celery_amqp_results.library_types import App
from celery_amqp_results.metrics import Metrics
from celery_amqp_results.per_task.layout import HEARTBEAT as PER_TASK_HEARTBEAT
from celery_amqp_results.per_task.layout import PerTaskLayout
from celery_amqp_results.per_task.queues import TaskQueues
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.names import Route, client_word
from celery_amqp_results.shared_layout import SharedLayout
from celery_amqp_results.waiting.following import Following

__all__ = (
    "KeepsBodies",
    "KeepsMarks",
    "KeepsParts",
    "Layout",
    "LimitsBacklog",
    "NotesSent",
    "make_layout",
)


class Layout(Protocol):
    """Keeps results on a broker. Thread-safe; made anew after a fork.

    The abilities of some layouts are classes of their own, see below.
    """

    #: Sends and leads chords; ``None`` where Celery's polling task completes chords.
    chords: Optional[Chords]

    def metrics(self) -> Metrics:
        """Return the counts so far."""

    def publish(
        self,
        state: StateMessage,
        route: Route,
        final: bool,
        part: Optional[StateMessage] = None,
    ) -> None:
        """Publish a state; for a *final* one, return only when the broker has confirmed it.

        Parameters:
            route: the other parts of its routing key.
            part: a message for the leader of a chord, where the state itself is not kept as long.

        Raises:
            BackendUnavailable: when the broker cannot be reached, refuses us, or does not confirm
                it.
            DeclarationRefused: when a queue or exchange exists with other properties.
            ResultTooLarge: when the broker refuses a message of this size.
        """

    def poll(
        self, ids: Collection[str], deadline: Optional[float] = None
    ) -> Dict[str, Optional[StateMessage]]:
        """Return the current state of each of *ids*, or ``None`` where nothing is known.

        Parameters:
            deadline: time (``time.monotonic``) at which to give up, if that is before
                ``lookup_timeout`` is over; ``None`` for no earlier end.

        Raises:
            LookupTimeout, BackendUnavailable, DeclarationRefused: when the broker could not be
                asked.
        """

    def follower(self, submit: Optional[Callable[..., object]] = None) -> Following:
        """Return a follower without tasks.

        Parameters:
            submit: calls a function with arguments on another thread; tasks may be looked up there.
        """

    def forget(self, ids: Collection[str]) -> None:
        """Delete everything about *ids*."""

    def save_group(self, group: StateMessage) -> None:
        """Keep a group."""

    def read_group(self, group_id: str) -> Optional[StateMessage]:
        """Return a group that was kept, or ``None``."""

    def forget_group(self, group_id: str) -> None:
        """Delete a group that was kept."""

    def close(self, wait: bool = True) -> None:
        """Close all connections and end all threads; with *wait*, return when that is done."""


class NotesSent(abc.ABC):
    """A layout that pushes the states of a task to the process that has sent it."""

    @abc.abstractmethod
    def note_sent(self, task_id: str) -> None:
        """Note that this process is about to send a task. Does no I/O."""


class KeepsParts(abc.ABC):
    """A layout with chords of its own."""

    @abc.abstractmethod
    def publish_part(self, part: StateMessage, group_id: str) -> None:
        """Publish the return value of a chord's header task whose state is not stored.

        Raises:
            Exception: as :meth:`Layout.publish`.
        """


class KeepsMarks(abc.ABC):
    """A layout that keeps marks: that a task was sent, has ended, or was forgotten."""

    @abc.abstractmethod
    def mark_sent(self, connection: kombu.Connection, sent: StateMessage) -> None:
        """Publish a mark on a connection that sends tasks. Does not wait for anything."""

    @abc.abstractmethod
    def mark(self, marks: Sequence[StateMessage], confirm: bool) -> None:
        """Publish marks; with *confirm*, wait for their confirms.

        Raises:
            BackendUnavailable, DeclarationRefused: as :meth:`Layout.publish`.
        """

    @abc.abstractmethod
    def last_mark(self, task_id: str) -> Optional[StateMessage]:
        """Return the last mark of a task, or ``None``."""

    @abc.abstractmethod
    def stored_state(self, task_id: str) -> Optional[StateMessage]:
        """Return the state that the broker keeps of a task, regardless of pushed states."""


class KeepsBodies(abc.ABC):
    """A layout that keeps the bodies of large states elsewhere."""

    @abc.abstractmethod
    def fetch(
        self, pointer: StateMessage, deadline: Optional[float] = None
    ) -> Optional[StateMessage]:
        """Return the state that a pointer stands for, or ``None`` if the body is gone."""

    @abc.abstractmethod
    def stored_besides(self, task_id: str, queues: Collection[str]) -> Optional[StateMessage]:
        """Return the state that the broker keeps of a task, without bodies in *queues*."""


class LimitsBacklog(abc.ABC):
    """A layout in which a look-up skips the earlier states of a task."""

    @abc.abstractmethod
    def poll_within(self, task_id: str, backlog_limit: int) -> Optional[StateMessage]:
        """Return the current state of a task if that skips at most *backlog_limit* states."""


# Registered, since isinstance() would take 20 to 40 us for a protocol, for each sent task.
for _ability in (NotesSent, KeepsParts, KeepsMarks, KeepsBodies):
    _ability.register(SharedLayout)
LimitsBacklog.register(PerTaskLayout)


def make_layout(app: App, config: BackendConfig) -> Layout:
    """Return the layout that *config* asks for. Does no I/O, and does not keep *app* alive."""
    broker, options = config.broker, config.options
    connector = connections.Connector(
        broker.connection,
        options.retry_policy,
        broker.describe,
        app.main or "celery",
        # A clone, such as that of the command line, must work beside the app's own backend.
        None if config.purpose else config.max_connections,
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
        pool = Pool(connector, PER_TASK_HEARTBEAT, "per-task", connector.slots.limit)
        sessions = transports.AMQPSessions(pool)
    queues = TaskQueues(sessions, connector, config.wire, options)
    return PerTaskLayout(queues, config.codec)
