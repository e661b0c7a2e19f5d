"""Reading the shards: look-ups of states, and their removal.

A shard is read by a :class:`~celery_amqp_results.store.checkout.Checkout`. Several shards are read
at once, each on its own channel, which closes as soon as the shard's fence has come. If a reader
held one shard while it waited for another, two readers could wait for each other for ever.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import math
import threading
import time
from typing import Any, Callable, Collection, Deque, Dict, Iterable, List, Optional, Set

import amqp
from kombu.exceptions import ContentDisallowed

from celery_amqp_results import errors
from celery_amqp_results.amqp import connections
from celery_amqp_results.amqp.confirms import ConfirmChannel
from celery_amqp_results.amqp.declarations import Declarations
from celery_amqp_results.amqp.failures import TRANSIENT
from celery_amqp_results.amqp.link import Link
from celery_amqp_results.amqp.pool import Pool
from celery_amqp_results.options import Options
from celery_amqp_results.protocol import page
from celery_amqp_results.protocol.message import STATE, StateMessage
from celery_amqp_results.protocol.ranking import fold, is_final
from celery_amqp_results.store.delivery import size_limit
from celery_amqp_results.store.marks import announce
from celery_amqp_results.store.shard_read import PAGE_SECONDS, LookUp, Removal, ShardRead
from celery_amqp_results.toolkit.interrupts import raise_if_from_signal_handler

__all__ = ("Store",)

logger = logging.getLogger(__name__)

#: Seconds between heartbeats on connections for look-ups. Short, so that a frozen reader loses
#: its shard before those in line behind it have waited for ``lookup_timeout``.
HEARTBEAT = 3.0

#: A look-up may take at least this many seconds, even if its caller has less time. Otherwise
#: callers that poll with short timeouts would never get an answer.
LEAST_SECONDS = 0.1

#: A connection on which no message came in this many seconds of a look-up is not used again.
SILENT_SECONDS = 1.0

#: How many shards one look-up reads at the same time.
PARALLEL = 16

#: Seconds of packing in one look-up before it leaves the rest to the next reader: others wait in
#: line.
PACK_SECONDS = 0.03

#: A foreign message is logged in full once; this many kinds of them are remembered.
MAX_COMPLAINTS = 100


def lookup_seconds(shards: int, lookup_timeout: float) -> float:
    """Return the time limit of a look-up, in seconds.

    It grows with the number of shards, so that the last of many shards is not late.
    """
    return lookup_timeout * math.ceil(shards / PARALLEL)


@dataclasses.dataclass
class _Request:
    """The ids that are read or removed, by their shards."""

    shards: Dict[int, Set[str]]
    #: Begins the read of a shard.
    begin: Callable[[Link, int], ShardRead]
    #: Called when a shard is done.
    take: Callable[[Any], None]
    #: The time limit (``time.monotonic``).
    end: float = math.inf
    #: Time after which packing is left to the next reader.
    pack_end: float = math.inf
    #: The shards that are not done.
    todo: Deque[int] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.todo = collections.deque(sorted(self.shards))

    def done(self, read: ShardRead) -> None:
        """Note that a shard need not be read again."""
        self.todo.remove(read.shard)
        self.take(read)


class Store:
    """Reads the states kept in the shards.

    Parameters:
        declarations: knows the topology, and checks the exchange once; no shard is declared here.
        persistent: whether pages survive a restart of the broker.
        check: raises an error for a state that cannot be decoded; such a state hides no other.

    Thread-safe. After a fork the child must make a new store.
    """

    def __init__(
        self,
        pool: Pool,
        declarations: Declarations,
        options: Options,
        persistent: bool,
        check: Optional[Callable[[StateMessage], object]] = None,
    ) -> None:
        #: Raises an error for a state that cannot be decoded.
        self.check = check
        self._pool = pool
        self.declarations = declarations
        self.lookup_timeout = options.lookup_timeout
        #: Smaller where the broker takes smaller messages only.
        self.page_size = options.page_size
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

        def begin(link: Link, shard: int) -> LookUp:
            census = page.Census() if shard in wanted_censuses else None
            return LookUp(self, link, shard, shards[shard], kind, census)

        def take(read: LookUp) -> None:
            self.count(looked_up=len(read.wanted))
            for task_id in read.wanted:
                found[task_id] = self.readable(read.checkout.queue, read.found.get(task_id, []))
            if read.census is not None:
                read.census.loose = read.credible(read.census.loose)
                wanted_censuses[read.shard] = read.census

        shards = self._by_shard(ids)
        for shard in wanted_censuses:
            shards.setdefault(shard, set())
        self._run(_Request(shards, begin, take), deadline)
        return found

    def remove(
        self, ids: Iterable[str], deadline: Optional[float] = None, kind: str = STATE
    ) -> int:
        """Delete every message about *ids* and return how many there were.

        Parameters and errors are those of :meth:`read`. After an error some messages may be
        deleted.
        """
        removed = 0
        shards = self._by_shard(ids)

        def begin(link: Link, shard: int) -> Removal:
            return Removal(self, link, shard, shards[shard], kind)

        def take(read: Removal) -> None:
            nonlocal removed
            removed += read.removed

        self._run(_Request(shards, begin, take), deadline)
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
                    announce(self.confirm_channel(link), self.declarations.topology, ids)
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
        request.end = started + lookup_seconds(len(shards), self.lookup_timeout)
        if deadline is not None:
            request.end = min(request.end, max(deadline, started + LEAST_SECONDS))
            # A caller with less time than a page may take leaves packing to others. An unconfirmed
            # page would stay beside the messages that it was to replace, one more with each short
            # wait.
            request.pack_end = deadline - PAGE_SECONDS
        prefix = self.declarations.topology.prefix
        tries = connections.LookupTries(self._pool.policy, request.end, prefix)
        while request.todo:
            late = None
            try:
                with self._pool.link(request.end) as link:
                    # Time spent on connecting must not end the look-up before it has read anything.
                    request.end = max(request.end, time.monotonic() + LEAST_SECONDS)
                    self._check_exchange(link)
                    late = _Reading(self, link, request).run()
            except errors.LookupTimeout:
                raise
            except TRANSIENT as exc:
                raise_if_from_signal_handler(exc)
                # Shards read completely are done; the others are read again.
                self.declarations.forget()
                shrunk = self._shrink_pages(exc)
                if not request.todo:
                    # All shards were read; only the packing failed, and the next reader can do
                    # that.
                    logger.warning("a shard was read and could not be packed: %r", exc)
                    return
                if shrunk:
                    continue
                # A page that is not confirmed concerns only this connection.
                refused = isinstance(exc, errors.BackendUnavailable)
                if refused and not isinstance(exc, errors.NotConfirmed):
                    raise
                tries.wait(exc, f"{len(request.todo)} of {len(shards)} shards")
            if late is not None:
                raise late

    def _shrink_pages(self, exc: BaseException) -> bool:
        """Write smaller pages from now on, if the broker says that it takes none so large."""
        limit = size_limit(exc)
        if limit is None or not self.page_size:
            return False
        # Half of it, since entries may be longer than a page counts them.
        self.page_size = min(self.page_size, limit) // 2
        logger.warning(
            "the broker takes messages of up to %d bytes (max_message_size in its rabbitmq.conf): "
            "results are packed into pages of up to %d bytes from now on",
            limit,
            self.page_size,
        )
        return True

    def _check_exchange(self, link: Link) -> None:
        if not self.declarations.exchange_checked:
            channel = link.channel()
            self.declarations.check_exchange(channel)
            channel.close()

    def confirm_channel(self, link: Link) -> ConfirmChannel:
        """Return the channel for publishing on a connection for look-ups."""
        if link.publishing is None:
            link.publishing = ConfirmChannel(link)
        channel: ConfirmChannel = link.publishing
        return channel


class _Reading:
    """One try to read the shards of a request, on one connection."""

    def __init__(self, store: Store, link: Link, request: _Request) -> None:
        self._store = store
        self._link = link
        self._request = request
        self._running: List[ShardRead] = []
        self._waiting = collections.deque(request.todo)
        # Seconds of packing: in total, and since the last shard was read.
        self._packed = self._packed_last = 0.0

    def run(self) -> Optional[errors.LookupTimeout]:
        """Read the shards; return an error if that takes too long.

        All shards are released, so the connection can be used again.
        """
        request, link, running = self._request, self._link, self._running
        started = time.monotonic()
        while self._waiting or running:
            with link.corked():
                while self._waiting and len(running) < PARALLEL and link.has_room():
                    running.append(request.begin(link, self._waiting.popleft()))
            now = time.monotonic()
            if now >= request.end:
                late = self._late(now - started)
                unheard = not any(read.checkout.seen for read in running)
                if link.blocked or (unheard and now - started >= SILENT_SECONDS):
                    # This connection is of no use: pending writes would wait for the end of the
                    # alarm, or the broker no longer answers, or its node is cut off from that of
                    # the queues. The pool tries another host then.
                    raise late
                for read in running:
                    read.checkout.close(wait=False)
                return late
            finished = [read for read in running if read.done]
            if not finished:
                link.drain(min(request.end - now, HEARTBEAT / 2))
                link.tick()
                for read in running:
                    read.checkout.renew_fence()
            for read in finished:
                self._finish(read)
        return None

    def _finish(self, read: ShardRead) -> None:
        """Write to a shard that was read, and release it."""
        request = self._request
        self._running.remove(read)
        began = time.monotonic()
        pack_until = began + PACK_SECONDS - self._packed
        all_read = not self._waiting and all(other.done for other in self._running)
        if all_read:
            long_end = read.long_packing_end(self._packed_last, request.end)
            pack_until = max(pack_until, long_end)
        done = functools.partial(request.done, read)
        read.finish(min(pack_until, request.pack_end), request.end, done)
        spent = time.monotonic() - began
        self._packed += spent
        self._packed_last += spent if all_read else 0.0
        self._store.count(shards_read=1, messages_read=read.checkout.seen)

    def _late(self, seconds: float) -> errors.LookupTimeout:
        slow = self._running[0]
        queue = slow.checkout.queue
        if self._link.blocked:
            why = f"the broker blocks publishers ({self._link.blocked}: a memory or disk alarm)"
        elif slow.checkout.seen:
            why = f"{slow.checkout.seen} messages were read by then, and more are kept in it"
        else:
            why = "another reader holds it, or the broker does not answer"
        return errors.LookupTimeout(
            f"queue {queue!r} could not be read within {seconds:.1f} s (lookup_timeout is "
            f"{self._store.lookup_timeout:g} s): {why}. The state of the task is unknown; asking "
            "again is safe."
        )
