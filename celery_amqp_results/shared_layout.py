"""The layout ``shared``: every state kept in one of a fixed number of queues, and pushed."""

from __future__ import annotations

import weakref
from typing import Callable, Collection, Dict, Optional, Sequence

import kombu

from celery_amqp_results.amqp import connections
from celery_amqp_results.amqp.declarations import Declarations
from celery_amqp_results.amqp.pool import Pool
from celery_amqp_results.chords.firing import Firing
from celery_amqp_results.chords.sending import Chords, Plans
from celery_amqp_results.chords.service import Service
from celery_amqp_results.feed.inbox import Inbox
from celery_amqp_results.feed.reads import Reads
from celery_amqp_results.metrics import Metrics
from celery_amqp_results.options import Options
from celery_amqp_results.protocol.codec import Codec
from celery_amqp_results.protocol.message import GROUP, MARK, StateMessage
from celery_amqp_results.protocol.names import Route, Topology
from celery_amqp_results.protocol.ranking import fold
from celery_amqp_results.store import marks as tracking
from celery_amqp_results.store.large_bodies import LargeBodies
from celery_amqp_results.store.lookup import HEARTBEAT as STORE_HEARTBEAT
from celery_amqp_results.store.lookup import Store
from celery_amqp_results.store.publisher import Outgoing, Publisher
from celery_amqp_results.waiting.background import BackgroundFollower
from celery_amqp_results.waiting.follower import Follower
from celery_amqp_results.waiting.tap import Tap

__all__ = ("SharedLayout",)


class SharedLayout:
    """Combines publisher, store and inbox.

    Parameters:
        client: the word of this process in routing keys.
        persistent: whether messages survive a restart of the broker.
        app: returns the Celery app, or ``None`` when it is gone.

    Thread-safe. Does no I/O until it is used. After a fork the child must make a new one and never
    use this one again: closing it would write to the parent's connections.
    """

    def __init__(
        self,
        connector: connections.Connector,
        topology: Topology,
        options: Options,
        client: str,
        persistent: bool,
        codec: Codec,
        app: Callable[[], object],
    ) -> None:
        self.connector = connector
        self._topology = topology
        self._options = options
        self._persistent = persistent
        self._declarations = declarations = Declarations(topology, options.declare)
        # One for all threads, so that a process has few connections.
        self._pool = Pool(connector, STORE_HEARTBEAT, "lookups", limit=1)
        # A quorum queue may lose what is not confirmed, and confirms cost it little.
        plain = not options.confirm and topology.queue_type == "classic"
        self.publisher = Publisher(connector, declarations, plain)
        self.store = Store(self._pool, declarations, options, persistent, codec.decode)
        self._large = LargeBodies(self.publisher, self._pool, topology, options, persistent)
        self._marker = tracking.Marker(declarations)
        self.inbox = Inbox(connector, declarations, client, options.view_memory)
        self.reads = Reads(self.inbox, self.store)
        self._taps: weakref.WeakSet[Tap] = weakref.WeakSet()
        self._plans = Plans(app, topology, persistent)
        self._firing = Firing(app, self.store, self._plans.content)
        self._leading = Service(
            connector, declarations, self.store, self._plans.read, self._firing.fire
        )
        #: Chords, fired by the leader of their plan queue.
        self.chords: Optional[Chords] = Chords(self.publisher, self._plans, self._leading)

    def metrics(self) -> Metrics:
        """Return the counts so far. Does no I/O."""
        publisher, store, inbox = self.publisher, self.store, self.inbox
        leading = self._leading
        return Metrics(
            stored=publisher.stored,
            confirmed=publisher.confirmed,
            published_bytes=publisher.published_bytes,
            large=publisher.large,
            retried=publisher.retried,
            refused=publisher.refused,
            failed=publisher.failed + publisher.lost,
            late_copies=publisher.late_copies,
            pushed=inbox.received,
            looked_up=store.looked_up,
            shards_read=store.shards_read,
            messages_read=store.messages_read,
            packed=store.packed,
            rejected=store.rejected + inbox.rejected + leading.rejected,
            waiting=inbox.waited_for,
            remembered=self.reads.remembered,
            barriers=inbox.barriers,
            views=inbox.live_views,
            view_bytes=inbox.memory,
            chords_fired=leading.fired,
            chords_abandoned=leading.abandoned,
            chords_open=leading.open,
            chords_led=leading.leads,
            oldest_chord=int(leading.oldest_age()),
        )

    def note_sent(self, task_id: str) -> None:
        """Note that this process is about to send a task. Does no I/O."""
        self.inbox.note_sent(task_id)

    def mark_sent(self, connection: kombu.Connection, sent: StateMessage) -> None:
        """Publish a mark on a connection that sends tasks. Never waits, never raises."""
        self._marker.publish(connection, self._outgoing_mark(sent))

    def mark(self, marks: Sequence[StateMessage], confirm: bool) -> None:
        """Publish marks; with *confirm*, wait for their confirms."""
        self.publisher.publish([self._outgoing_mark(mark) for mark in marks], confirm)

    def last_mark(self, task_id: str) -> Optional[StateMessage]:
        """Return the last mark of a task, or ``None``."""
        return fold(self.store.read((task_id,), kind=MARK)[task_id])

    def _outgoing_mark(self, mark: StateMessage) -> Outgoing:
        # Without a live copy, since no client waits for a mark.
        shard = self._topology.shard(mark.id)
        return Outgoing(
            self._topology.shard_queue_name(shard),
            mark.properties(self._persistent),
            mark.body,
            shard,
            f"the mark {mark.state} of {mark.id}",
        )

    def stored_state(self, task_id: str) -> Optional[StateMessage]:
        """Return the state that the broker keeps of a task, regardless of pushed states."""
        return self.stored_besides(task_id, ())

    def stored_besides(self, task_id: str, queues: Collection[str]) -> Optional[StateMessage]:
        """Return the state that the broker keeps of a task, without bodies in *queues*."""
        found = self.store.read((task_id,))[task_id]
        return fold(state for state in found if state.body_queue not in queues)

    def fetch(
        self, pointer: StateMessage, deadline: Optional[float] = None
    ) -> Optional[StateMessage]:
        """Return the state that a pointer stands for, or ``None`` if the body is gone."""
        return self._large.fetch(pointer, deadline)

    def publish(
        self,
        state: StateMessage,
        route: Route,
        final: bool,
        part: Optional[StateMessage] = None,
    ) -> None:
        """Publish a state; for a *final* one, return only when the broker has confirmed it."""
        if part is not None:
            part = self._large.detach(part)
        state = self._large.detach(state)
        messages = [self._outgoing(state, route)]
        if part is not None:
            messages.append(self._outgoing(part, Route(group_id=route.group_id, in_chord=True)))
        # A chord waits for this state, and it is not sent again.
        confirm = final and (self._options.confirm or route.in_chord)
        self.publisher.publish(messages, confirm)
        if confirm:
            self._large.clean_up()
        self.inbox.note_stored(state)
        self._note_chord(route, final)

    def publish_part(self, part: StateMessage, group_id: str) -> None:
        """Publish the return value of a chord's header task whose state is not stored."""
        route = Route(group_id=group_id, in_chord=True)
        self.publisher.publish((self._outgoing(self._large.detach(part), route),))
        self._note_chord(route, True)

    def _note_chord(self, route: Route, final: bool) -> None:
        if final and route.in_chord and route.group_id and self.chords is not None:
            self.chords.note_chord(route.group_id)

    def _outgoing(self, state: StateMessage, route: Route) -> Outgoing:
        topology = self._topology
        shard = topology.shard(state.id)
        if route.in_chord and self.chords is not None:
            state = self.chords.with_amendment(state)
        return Outgoing(
            topology.shard_queue_name(shard),
            state.properties(self._persistent),
            state.body,
            shard,
            f"the {state.state} of {state.id}",
            (topology.exchange, topology.routing_key(state.id, state.state, route)),
        )

    def poll(
        self, ids: Collection[str], deadline: Optional[float] = None
    ) -> Dict[str, Optional[StateMessage]]:
        """Return the current state of each of *ids*, or ``None`` where nothing is known."""
        return self.reads.read(ids, deadline)

    def follower(self, submit: Optional[Callable[..., object]] = None) -> Follower:
        """Return a follower without tasks; with *submit*, it never blocks on look-ups."""
        if submit is None:
            return Follower(self.inbox, self.reads)
        return BackgroundFollower(self.inbox, self.reads, self._options.lookup_timeout, submit)

    def tap(self, wanted: Optional[Collection[str]] = None) -> Tap:
        """Return a tap of all published states, or of those with a *wanted* name."""
        tap = Tap(self.connector, self._declarations, wanted)
        self._taps.add(tap)
        return tap

    def forget(self, ids: Collection[str]) -> None:
        """Delete everything about *ids*, on the broker and in the memory of all processes."""
        self.store.remove(ids)
        self.store.announce_removal(ids)
        for task_id in ids:
            self.inbox.forget(task_id)

    def save_group(self, group: StateMessage) -> None:
        """Keep a group: in the shard of its id, and in no inbox."""
        self.publisher.publish(
            (self._outgoing(self._large.detach(group), Route(group_id=group.id)),)
        )

    def read_group(self, group_id: str) -> Optional[StateMessage]:
        """Return the saved group, or ``None``."""
        return fold(self.store.read((group_id,), kind=GROUP)[group_id])

    def forget_group(self, group_id: str) -> None:
        """Delete a saved group."""
        self.store.remove((group_id,), kind=GROUP)

    def close(self, wait: bool = True) -> None:
        """Close all connections and end all threads; with *wait*, return when that is done."""
        for tap in list(self._taps):
            tap.shut()
        # The leader sends bodies until it is closed, and reads the store for that.
        self._leading.close(wait)
        self.inbox.close(wait)
        self.publisher.close()
        self._pool.close()
        self._firing.bodies.close()
