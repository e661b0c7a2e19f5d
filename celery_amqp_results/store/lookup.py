"""Reading the shards: look-ups of states, and their removal.

A shard is read by a :class:`~celery_amqp_results.store.checkout.Checkout`. Several shards are read
at once, each on its own channel, which closes as soon as the shard's fence has come. If a reader
held one shard while it waited for another, two readers could wait for each other for ever.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import logging
import math
import threading
import time
from typing import Any, Callable, Collection, Deque, Dict, Iterable, List, Optional, Set

import amqp
from celery import states
from kombu.exceptions import ContentDisallowed

from celery_amqp_results import errors
from celery_amqp_results.amqp import connections
from celery_amqp_results.amqp.confirms import ConfirmChannel, Outgoing, Publication, Status
from celery_amqp_results.amqp.declarations import Declarations
from celery_amqp_results.amqp.failures import TRANSIENT
from celery_amqp_results.amqp.link import Link
from celery_amqp_results.amqp.pool import Pool
from celery_amqp_results.protocol import page
from celery_amqp_results.protocol.message import STATE, UNKNOWN_TIME, StateMessage, dated
from celery_amqp_results.protocol.ranking import fold, is_final
from celery_amqp_results.store.announcing import announce
from celery_amqp_results.store.checkout import Checkout, longest_hold, longest_prefetch
from celery_amqp_results.toolkit.interrupts import raise_if_from_signal_handler
from celery_amqp_results.toolkit.retry import time_left

__all__ = ("Store",)

logger = logging.getLogger(__name__)

#: Seconds between heartbeats on connections for look-ups. Short, so that a frozen reader loses
#: its shard before those in line behind it have waited for ``lookup_timeout``.
HEARTBEAT = 3.0

#: A look-up may take at least this many seconds, even if its caller has less time. Otherwise
#: callers that poll with short timeouts would never get an answer.
LEAST_SECONDS = 0.1

#: A connection on which the broker sent nothing for this many seconds of a look-up is not used
#: again: the broker answers at least the opening of a channel, even while another reader holds the
#: shard.
SILENT_SECONDS = 1.0

#: How many shards one look-up reads at the same time.
PARALLEL = 16

#: A reader packs a shard that has at least this many loose results.
PACK_AT = 32

#: Seconds of packing in one look-up before it leaves the rest to the next reader: others wait in
#: line.
PACK_SECONDS = 0.03

#: A shard with this many messages counts as long. If the last shard of a look-up is long, packing
#: it may take this share of the reading time: others have waited for long anyway, and the next
#: reads become faster.
LONG_SHARD = 10_000
LONG_PACK_SHARE = 0.2

#: How many seconds a reader waits for its own published pages to come back. They do not come if it
#: holds as many messages as it may; going on is harmless unless a task has two results.
PAGE_SECONDS = 1.0

#: The most bytes of messages that a reader keeps in memory for packing.
MAX_RETAINED = 2 * 1024 * 1024

#: A foreign message is logged in full once; this many kinds of them are remembered.
MAX_COMPLAINTS = 100


def lookup_seconds(shards: int, lookup_timeout: float) -> float:
    """Return the time limit of a look-up, in seconds.

    It grows with the number of shards, so that the last of many shards is not late.
    """
    return lookup_timeout * math.ceil(shards / PARALLEL)


@dataclasses.dataclass
class _Request:
    """The ids that a look-up reads or removes."""

    #: The ids, by their shards.
    shards: Dict[int, Set[str]]
    kind: str
    #: Called after reading each shard.
    take: Callable[[_Read], None]
    remove: bool = False
    #: The shards to take a census of.
    census: Collection[int] = ()


class _Read:
    """The read of one shard, which may pack it or remove messages on the way."""

    def __init__(
        self,
        store: Store,
        link: Link,
        shard: int,
        request: _Request,
    ) -> None:
        self.shard = shard
        self.wanted: Collection[str] = request.shards[shard]
        #: The content of the whole shard, if a census is wanted.
        self.census = page.Census() if shard in request.census else None
        self._in_pages = page.Wanted(self.wanted)
        self.found: Dict[str, List[StateMessage]] = {}
        self.removed = 0
        self._kind = request.kind
        self._remove = request.remove
        self._store = store
        self._link = link
        #: Loose messages that packing would replace, by delivery tag.
        self._loose: Dict[int, StateMessage] = {}
        self._small_pages: Dict[int, bytes] = {}
        self._retained = 0
        #: When the first message came.
        self._began: Optional[float] = None
        #: Time limit of the look-up.
        self._end = 0.0
        #: Pages to rewrite without the removed states, by delivery tag.
        self._cut_pages: Dict[int, bytes] = {}
        #: Pointers to remove, after their queues have been deleted.
        self._removed_pointers: List[int] = []
        self._body_queues: Set[str] = set()
        # A missing queue counts as empty: a look-up declares nothing.
        topology = store.declarations.topology
        self.checkout = Checkout(
            link,
            topology.shard_queue_name(shard),
            self._on_message,
            longest_prefetch(topology.queue_type),
            look_again=self._incomplete,
            arguments=longest_hold(topology.queue_type, store.lookup_timeout),
        )

    def _on_message(self, message: amqp.Message) -> None:
        if self._began is None:
            self._began = time.monotonic()
        properties = message.properties
        tag = message.delivery_tag
        try:
            if properties.get("type") == page.PAGE:
                self._on_page(tag, message.body)
            else:
                self._on_state(tag, StateMessage.from_properties(properties, message.body))
        except errors.ForeignMessage as exc:
            self._reject(exc)
            if properties.get("type") is None:
                # No version of this package has written it, and without an expiration it would slow
                # down every reader for ever. A message with a type stays: another version may know
                # it.
                self.checkout.acknowledge((tag,))

    def _reject(self, why: Exception) -> None:
        self._store.reject(self.checkout.queue, str(why))

    def _on_state(self, tag: int, state: StateMessage) -> None:
        topology = self._store.declarations.topology
        shard = topology.shard(state.id)
        if shard != self.shard:
            raise errors.ForeignMessage(f"{state.id!r:.100} belongs to shard {shard}")
        topology.check_body_queue(state)
        now = time.time_ns() // 1000
        state = dated(state, now)
        undated = state.published == UNKNOWN_TIME
        if state.id in self.wanted and state.kind == self._kind:
            if self._remove:
                self.removed += 1
                if state.body_queue is None:
                    self.checkout.acknowledge((tag,))
                else:
                    self._removed_pointers.append(tag)
                    self._body_queues.add(state.body_queue)
                return
            # The broker drops an expired message only when it is first in the queue.
            if undated or not state.expired(now):
                self.found.setdefault(state.id, []).append(state)
        if self.census is not None and (undated or not state.expired(now)):
            self.census.add(state)
        # A page cannot tell when a state without a date expires; for a loose state the broker can.
        if not undated and self._retain(len(state.body)):
            self._loose[tag] = state

    def _on_page(self, tag: int, body: bytes) -> None:
        now = time.time_ns() // 1000
        hits = [
            state
            for state in page.find(body, self._in_pages, self._reject)
            if state.kind == self._kind and not state.expired(now) and self._points_right(state)
        ]
        if self._remove:
            if hits:
                self.removed += len(hits)
                self._body_queues.update(queue for s in hits if (queue := s.body_queue))
                self._cut_pages[tag] = body
            return
        if self.census is not None:
            self.census.add_page(body)
        for state in hits:
            self.found.setdefault(state.id, []).append(dated(state, now))
        if self._retain(len(body)):
            self._small_pages[tag] = body

    def _points_right(self, state: StateMessage) -> bool:
        try:
            self._store.declarations.topology.check_body_queue(state)
        except errors.ForeignMessage as exc:
            self._reject(exc)
            return False
        return True

    def _retain(self, size: int) -> bool:
        """Return whether a message of *size* bytes is worth packing and may be kept in memory."""
        page_size = self._store.page_size
        if size > page_size // 2 or self._retained + size > MAX_RETAINED:
            return False
        self._retained += size
        return True

    @property
    def done(self) -> bool:
        """Whether the whole shard was seen."""
        return self.checkout.fenced

    def _incomplete(self) -> bool:
        """Return whether a wanted state may lie in a page behind the fence."""
        if self._remove or self._kind != STATE or self.census is not None:
            return True
        return not all(
            any(state.state == states.SUCCESS for state in self.found.get(task_id, ()))
            for task_id in self.wanted
        )

    def long_packing_end(self, packed: float, end: float) -> float:
        """Return until when the shard may be packed as the last of a look-up; 0 if it is not long.

        Parameters:
            packed: seconds of packing since the look-up has read everything.
            end: the look-up's time limit (``time.monotonic``). A page confirmed too late would stay
                beside the messages that it was to replace, and the shard would grow.
        """
        if self._began is None or self.checkout.seen < LONG_SHARD:
            return 0.0
        now = time.monotonic()
        reading = now - self._began - packed
        return min(now + LONG_PACK_SHARE * reading - packed, end - PAGE_SECONDS)

    def finish(self, pack_until: float, end: float) -> None:
        """Write pages and removals, and release the shard.

        Parameters:
            pack_until: time (``time.monotonic``) after which packing is left to the next reader.
            end: time after which it no longer waits for the broker.

        Raises:
            NotConfirmed: when the broker has not confirmed a page by then.
        """
        self._end = end
        if self._remove:
            self._delete_bodies()
            self._cut()
        elif len(self._loose) >= PACK_AT and time.monotonic() < pack_until:
            self._pack(pack_until)
        # Only a removal must be complete before the caller goes on.
        self.checkout.close(wait=self._remove)

    def _delete_bodies(self) -> None:
        """Delete the queues of large results, and only then their pointers."""
        if self._body_queues:
            channel = self._link.channel()
            for queue in self._body_queues:
                channel.queue_delete(queue)
            channel.close()
        self.checkout.acknowledge(self._removed_pointers)

    def _cut(self) -> None:
        cut = dict(self._cut_pages)
        published = False
        for body in cut.values():
            kept = [
                state
                for state in page.decode(body, self._reject)
                if not (state.id in self.wanted and state.kind == self._kind)
            ]
            if kept:
                self._publish_page(kept)
                published = True
        if published:
            self._wait_for_pages()
        self.checkout.acknowledge(cut)

    def _wait_for_pages(self) -> None:
        """Wait until the published pages have come back.

        The fences of readers in line lie in front of the pages. Such a reader may have received the
        other states of a task: it must learn that this reader held the queue meanwhile.
        """
        self.checkout.set_fence()
        until = min(time.monotonic() + PAGE_SECONDS, self._end)
        while not self.checkout.fenced and time.monotonic() < until:
            self._link.drain(time_left(until, PAGE_SECONDS))

    def _pack(self, until: float) -> None:
        """Replace loose results, and small pages, by full pages.

        Each page is confirmed before the messages that it replaces are acknowledged. A crash in
        between leaves results twice, which the fold makes harmless.
        """
        now = time.time_ns() // 1000
        store = self._store
        sources: Dict[int, List[StateMessage]] = {
            tag: [state] for tag, state in self._loose.items()
        }
        for tag, body in self._small_pages.items():
            try:
                sources[tag] = page.decode(body)
            except errors.ForeignMessage as exc:
                self._reject(exc)
        keep, drop = page.select(self.credible(itertools.chain(*sources.values())), now)
        if len(keep) + len(drop) < PACK_AT:
            # Almost all of them are states of unfinished tasks.
            return
        settled = {id(state) for state in drop}
        batch: List[StateMessage] = []
        size = 0
        # Publish at least one page if there is time for it to come back. Otherwise nothing would
        # ever be packed where the selection takes all the time.
        stop = max(until, self._end - PAGE_SECONDS)
        for state in keep:
            if batch and size + len(state.body) > store.page_size:
                if time.monotonic() >= stop:
                    break
                self._publish_page(batch)
                settled.update(map(id, batch))
                batch, size = [], 0
                stop = until
            batch.append(state)
            size += len(state.body) + page.OVERHEAD
        else:
            if batch:
                self._publish_page(batch)
                settled.update(map(id, batch))
        done = [
            tag
            for tag, states_of in sources.items()
            if all(id(state) in settled for state in states_of)
        ]
        if done:
            self._wait_for_pages()
        self._drop_bodies(drop, sources, done)
        self.checkout.acknowledge(done)
        store.count(packed=len(settled))

    def _drop_bodies(
        self,
        drop: List[StateMessage],
        sources: Dict[int, List[StateMessage]],
        done: List[int],
    ) -> None:
        """Delete queues whose only pointers are dropped and that would not expire."""
        dropped = {id(state) for state in drop}
        settled = set(done)
        gone: Set[str] = set()
        # The same pointer may occur twice.
        kept: Set[str] = set()
        for tag, states_of in sources.items():
            for state in states_of:
                if state.body_queue is not None and state.expiration is None:
                    superseded = tag in settled and id(state) in dropped
                    (gone if superseded else kept).add(state.body_queue)
        gone -= kept
        if not gone:
            return
        channel = self._link.channel()
        try:
            for queue in gone:
                channel.queue_delete(queue)
        except amqp.exceptions.AccessRefused as exc:
            # A user that only reads may lack the permission.
            logger.info("superseded large results were not deleted: %s", exc)
        channel.close()

    def credible(self, states_of: Iterable[StateMessage]) -> List[StateMessage]:
        """Return *states_of* without undecodable final states that would hide others."""
        known = list(states_of)
        ends: Dict[str, List[StateMessage]] = {}
        for state in known:
            if state.kind == STATE and is_final(state.state):
                ends.setdefault(state.id, []).append(state)
        damaged: Set[int] = set()
        for several in ends.values():
            if len(several) > 1:
                damaged.update(map(id, several))
                damaged.difference_update(
                    map(id, self._store.readable(self.checkout.queue, several))
                )
        return [state for state in known if id(state) not in damaged]

    def _publish_page(self, content: List[StateMessage]) -> None:
        """Publish a page to the shard, and wait for its confirm."""
        expires = page.expiration(content, time.time_ns() // 1000)
        properties: Dict[str, Any] = {
            "type": page.PAGE,
            "content_type": page.CONTENT_TYPE,
            "delivery_mode": 2 if self._store.persistent else 1,
        }
        if expires is not None:
            properties["expiration"] = str(expires)
        channel = self._store.confirm_channel(self._link)
        published = Publication(
            Outgoing(self.checkout.queue, properties, page.encode(content), self.shard)
        )
        channel.publish(published)
        channel.wait((published,), self._end)
        if published.status is not Status.CONFIRMED:
            raise errors.NotConfirmed(f"the broker did not take a page for {self.checkout.queue!r}")


class Store:
    """Reads the states kept in the shards.

    Parameters:
        pool: connections for look-ups.
        declarations: knows the topology, and checks the exchange once; no shard is declared here.
        lookup_timeout: time limit of a look-up, in seconds.
        page_size: the most bytes of results that are packed into one page.
        persistent: whether pages survive a restart of the broker.
        check: raises an error for a state that cannot be decoded; such a state hides no other.

    Thread-safe. After a fork the child must make a new store.
    """

    def __init__(
        self,
        pool: Pool,
        declarations: Declarations,
        lookup_timeout: float,
        page_size: int,
        persistent: bool,
        check: Optional[Callable[[StateMessage], Any]] = None,
    ) -> None:
        #: Raises an error for a state that cannot be decoded.
        self.check = check
        self._pool = pool
        self.declarations = declarations
        self.lookup_timeout = lookup_timeout
        self.page_size = page_size
        self.persistent = persistent
        #: States that were packed into pages, or dropped as superseded or expired.
        self.packed = 0
        #: Foreign or damaged messages in the shards, counted at each encounter.
        self.rejected = 0
        #: Ids that were looked up, shards that were read, and messages in them.
        self.looked_up = 0
        self.shards_read = 0
        self.messages_read = 0
        # Guards the counts, which are changed by several threads.
        self._counting = threading.Lock()
        self._complaints: Set[str] = set()

    def count(self, **more: int) -> None:
        """Add to the counts with these names."""
        with self._counting:
            for name, value in more.items():
                setattr(self, name, getattr(self, name) + value)

    def read(
        self,
        ids: Iterable[str],
        deadline: Optional[float] = None,
        kind: str = STATE,
        censuses: Optional[Dict[int, page.Census]] = None,
    ) -> Dict[str, List[StateMessage]]:
        """Look up *ids*.

        Parameters:
            ids: ids of tasks, or of groups.
            deadline: time (``time.monotonic``) at which to give up, if that is before
                ``lookup_timeout`` is over; ``None`` for no earlier end.
            kind: :data:`~celery_amqp_results.protocol.message.STATE` or
                :data:`~celery_amqp_results.protocol.message.GROUP`.
            censuses: its keys are the shards to take a census of; the values are set to the
                results. A shard that keeps none of *ids* is read as well.

        Returns:
            For each id its states, in the order in which the broker keeps them; an empty list for
            an unknown id.

        Raises:
            LookupTimeout: when a shard could not be read in time.
            DeclarationRefused: when a shard exists with other properties.
            BackendUnavailable: when the broker cannot be reached or refuses us.
        """
        found: Dict[str, List[StateMessage]] = {}
        wanted_censuses = {} if censuses is None else censuses

        def take(read: _Read) -> None:
            for task_id in read.wanted:
                found[task_id] = self.readable(read.checkout.queue, read.found.get(task_id, []))
            if read.census is not None:
                read.census.loose = read.credible(read.census.loose)
                wanted_censuses[read.shard] = read.census

        shards = self._by_shard(ids)
        for shard in wanted_censuses:
            shards.setdefault(shard, set())
        self._run(_Request(shards, kind, take, census=frozenset(wanted_censuses)), deadline)
        return found

    def remove(
        self, ids: Iterable[str], deadline: Optional[float] = None, kind: str = STATE
    ) -> int:
        """Delete every message about *ids* and return how many there were.

        Parameters and errors are those of :meth:`read`. After an error some messages may be
        deleted.
        """
        removed = 0

        def take(read: _Read) -> None:
            nonlocal removed
            removed += read.removed

        self._run(_Request(self._by_shard(ids), kind, take, remove=True), deadline)
        return removed

    def announce_removal(self, ids: Collection[str]) -> None:
        """Announce to all processes that *ids* were removed, and wait briefly for the confirm.

        A process that misses the announcement notices the removal when it checks its view. Without
        write permission for the exchange there is no announcement.

        Raises:
            BackendUnavailable: when the broker cannot be reached.
        """
        end = time.monotonic() + self.lookup_timeout
        tries = connections.LookupTries(self._pool.policy, end, self.declarations.topology.prefix)
        while True:
            try:
                with self._pool.link(end) as link:
                    announce(link, self.declarations.topology, ids)
                return
            except errors.BackendUnavailable:
                raise
            except amqp.exceptions.ChannelError as exc:
                logger.info("other processes are not told what was forgotten: %s", exc)
                return
            except TRANSIENT as exc:
                raise_if_from_signal_handler(exc)
                tries.wait(exc, "what was forgotten")

    def readable(self, queue: str, found: List[StateMessage]) -> List[StateMessage]:
        """Return *found* without undecodable states that would hide a decodable one.

        A final state only gives way to another final state: with an earlier state the task would
        seem to run for ever. Instead the reader gets the error.
        """
        decodable = found
        while self.check is not None and len(decodable) > 1:
            current = fold(decodable)
            # Pointers and marks have nothing to decode here.
            if current is None or current.kind != STATE or current.body_queue is not None:
                break
            try:
                self.check(current)
                break
            except (ContentDisallowed, errors.ForeignMessage) as exc:
                self.reject(queue, str(exc))
                decodable = [state for state in decodable if state is not current]
        if any(is_final(s.state) for s in found) and not any(is_final(s.state) for s in decodable):
            return found
        return decodable

    def reject(self, where: str, why: str) -> None:
        """Count a foreign message; log it unless the same was logged before."""
        self.count(rejected=1)
        complaint = f"{where}: {why}"
        if complaint not in self._complaints and len(self._complaints) < MAX_COMPLAINTS:
            self._complaints.add(complaint)
            logger.warning("ignored a foreign or damaged message in %s: %s", where, why)

    def _by_shard(self, ids: Iterable[str]) -> Dict[int, Set[str]]:
        shards: Dict[int, Set[str]] = {}
        for task_id in ids:
            shards.setdefault(self.declarations.topology.shard(task_id), set()).add(task_id)
        return shards

    def _run(self, request: _Request, deadline: Optional[float]) -> None:
        shards = request.shards
        started = time.monotonic()
        end = started + lookup_seconds(len(shards), self.lookup_timeout)
        if deadline is not None:
            end = min(end, max(deadline, started + LEAST_SECONDS))
        todo: Deque[int] = collections.deque(sorted(shards))
        # A caller with less time than a page may take leaves packing to others. An unconfirmed page
        # would stay beside the messages that it was to replace, one more with each short wait.
        pack_end = math.inf if deadline is None else deadline - PAGE_SECONDS
        prefix = self.declarations.topology.prefix
        tries = connections.LookupTries(self._pool.policy, end, prefix)
        while todo:
            late = None
            try:
                with self._pool.link(end) as link:
                    # Time spent on connecting must not end the look-up before it has read anything.
                    end = max(end, time.monotonic() + LEAST_SECONDS)
                    late = self._read_on(link, request, todo, end, pack_end)
            except errors.LookupTimeout:
                raise
            except TRANSIENT as exc:
                # Shards read completely are done; the others are read again.
                self.declarations.forget()
                if not todo:
                    # All shards were read; only the packing failed, and the next reader can do
                    # that.
                    logger.warning("a shard was read and could not be packed: %r", exc)
                    return
                if isinstance(exc, errors.BackendUnavailable):
                    raise
                tries.wait(exc, f"{len(todo)} of {len(shards)} shards")
            if late is not None:
                raise late

    def _read_on(
        self,
        link: Link,
        request: _Request,
        todo: Deque[int],
        end: float,
        pack_end: float,
    ) -> Optional[errors.LookupTimeout]:
        """Read the shards *todo*; return an error if that takes longer than until *end*.

        All shards are released, so the connection can be used again.
        """
        if not self.declarations.exchange_checked:
            channel = link.channel()
            self.declarations.check_exchange(channel)
            channel.close()
        remove = request.remove
        running: List[_Read] = []
        waiting = collections.deque(todo)
        started = time.monotonic()
        frames_before = link.frames_received
        # Seconds of packing: in total, and since the last shard was read.
        packed = packed_last = 0.0
        while waiting or running:
            with link.corked():
                while waiting and len(running) < PARALLEL and link.has_room():
                    running.append(_Read(self, link, waiting.popleft(), request))
            now = time.monotonic()
            if now >= end:
                late = self._late(link, running, now - started)
                silent = link.frames_received == frames_before and now - started >= SILENT_SECONDS
                if link.blocked or silent:
                    # This connection is of no use: pending writes would wait for the end of the
                    # alarm, or the broker no longer answers.
                    raise late
                for read in running:
                    read.checkout.close(wait=False)
                return late
            finished = [read for read in running if read.done]
            if not finished:
                link.drain(min(end - now, HEARTBEAT / 2))
                link.tick()
                for read in running:
                    read.checkout.renew_fence()
                continue
            for read in finished:
                running.remove(read)
                if not remove:
                    todo.remove(read.shard)
                    request.take(read)
                started_packing = time.monotonic()
                pack_until = started_packing + PACK_SECONDS - packed
                all_read = not waiting and all(other.done for other in running)
                if all_read:
                    pack_until = max(pack_until, read.long_packing_end(packed_last, end))
                read.finish(min(pack_until, pack_end), end)
                spent = time.monotonic() - started_packing
                packed += spent
                packed_last += spent if all_read else 0.0
                if remove:
                    todo.remove(read.shard)
                    request.take(read)
                self.count(
                    looked_up=0 if remove else len(read.wanted),
                    shards_read=1,
                    messages_read=read.checkout.seen,
                )
        return None

    def confirm_channel(self, link: Link) -> ConfirmChannel:
        """Return the channel for publishing on a connection for look-ups."""
        if link.publishing is None:
            link.publishing = ConfirmChannel(link)
        channel: ConfirmChannel = link.publishing
        return channel

    def _late(self, link: Link, running: List[_Read], seconds: float) -> errors.LookupTimeout:
        slow = running[0]
        queue = self.declarations.topology.shard_queue_name(slow.shard)
        if link.blocked:
            why = f"the broker blocks publishers ({link.blocked}: a memory or disk alarm)"
        elif slow.checkout.seen:
            why = f"{slow.checkout.seen} messages were read by then, and more are kept in it"
        else:
            why = "another reader holds it, or the broker does not answer"
        return errors.LookupTimeout(
            f"queue {queue!r} could not be read within {seconds:.1f} s (lookup_timeout is "
            f"{self.lookup_timeout:g} s): {why}. The state of the task is unknown; asking again "
            "is safe."
        )
