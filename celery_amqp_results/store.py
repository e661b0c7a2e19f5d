"""Reading the shards: looking up states, and forgetting them.

A shard is read by a :class:`~celery_amqp_results.checkout.Checkout`. Several shards are read at
once, each on a channel of its own that is closed as soon as its own fence has come: a reader that
kept one shard while it waits for another could meet a second reader that does the reverse, and
both would wait for ever.
"""

from __future__ import annotations

import collections
import logging
import time
from typing import Callable, Collection, Deque, Dict, Iterable, List, Optional, Set

import amqp

from celery_amqp_results import connections, errors, meta
from celery_amqp_results.checkout import Checkout
from celery_amqp_results.declarations import Declarations
from celery_amqp_results.meta import StateMessage

__all__ = ("Store",)

logger = logging.getLogger(__name__)

#: Seconds between heartbeats on connections for look-ups. Short, so that a frozen reader loses
#: its shard before those in line behind it have waited for ``lookup_timeout``.
HEARTBEAT = 5.0

#: How many shards one look-up reads at the same time.
PARALLEL = 16

#: A foreign message is logged in full once; so many kinds of them are remembered.
MAX_COMPLAINTS = 100


class _Read:
    """One shard being read."""

    def __init__(
        self,
        store: Store,
        link: connections.Link,
        shard: int,
        wanted: Collection[str],
        kind: str,
        remove: bool,
    ) -> None:
        self.shard = shard
        self.wanted = wanted
        self.found: Dict[str, List[StateMessage]] = {}
        self.removed = 0
        self._kind = kind
        self._remove = remove
        self._store = store
        channel = link.amqp.channel()
        store.declarations.ensure_shard(channel, shard)
        self.checkout = Checkout(
            link,
            channel,
            store.declarations.topology.shard_queue(shard).name,
            self._on_message,
        )

    def _on_message(self, message: amqp.Message) -> None:
        kind = message.properties.get("type")
        if kind != self._kind:
            if kind not in (meta.STATE, meta.GROUP):
                self._store.reject(self.checkout.queue, f"property 'type' is {kind!r}")
            return
        try:
            found = meta.message_id(message.properties)
            if found not in self.wanted:
                return
            state = StateMessage.from_properties(message.properties, message.body)
        except errors.ForeignMessage as exc:
            self._store.reject(self.checkout.queue, str(exc))
            return
        if self._remove:
            self.checkout.acknowledge([message.delivery_tag])
            self.removed += 1
            return
        self.found.setdefault(found, []).append(state)

    @property
    def done(self) -> bool:
        """Whether the whole shard was seen."""
        return self.checkout.fenced

    def close(self) -> None:
        """Let go of the shard."""
        # Only a removal has to be done when the caller goes on.
        self.checkout.close(wait=self._remove)


class Store:
    """Reads what is kept in the shards.

    Parameters:
        pool: connections for look-ups.
        declarations: declares the shards before they are first used.
        lookup_timeout: seconds within which a look-up has to be answered.

    Thread-safe. After a fork the child must make a new store.
    """

    def __init__(
        self,
        pool: connections.Pool,
        declarations: Declarations,
        lookup_timeout: float,
    ) -> None:
        self._pool = pool
        self.declarations = declarations
        self.lookup_timeout = lookup_timeout
        #: Messages in the shards that are not ours or are damaged, as often as they were met.
        self.rejected = 0
        self._complaints: Set[str] = set()

    def read(
        self,
        ids: Iterable[str],
        deadline: Optional[float] = None,
        kind: str = meta.STATE,
        on_shard: Optional[Callable[[Dict[str, List[StateMessage]]], None]] = None,
    ) -> Dict[str, List[StateMessage]]:
        """Look up *ids*.

        Parameters:
            ids: ids of tasks, or of groups.
            deadline: time (``time.monotonic``) at which to give up, if that is before
                ``lookup_timeout`` is over; ``None`` for no earlier end.
            kind: :data:`~celery_amqp_results.meta.STATE` or
                :data:`~celery_amqp_results.meta.GROUP`.
            on_shard: called with what was found in each shard as soon as it is read; every id
                of the shard is a key.

        Returns:
            For each id the states found, in the order in which the broker keeps them; an empty
            list for an id that nothing is known of.

        Raises:
            LookupTimeout: when a shard could not be read in time.
            DeclarationRefused: when a shard exists with other properties.
            BackendUnavailable: when the broker cannot be reached or refuses us.
        """
        found: Dict[str, List[StateMessage]] = {}

        def take(checkout: _Read) -> None:
            part = {task_id: checkout.found.get(task_id, []) for task_id in checkout.wanted}
            found.update(part)
            if on_shard is not None:
                on_shard(part)

        self._run(self._by_shard(ids), deadline, kind, False, take)
        return found

    def remove(
        self, ids: Iterable[str], deadline: Optional[float] = None, kind: str = meta.STATE
    ) -> int:
        """Delete every message about *ids* and return how many there were.

        Parameters and errors are those of :meth:`read`. After an error some may be deleted.
        """
        removed = 0

        def take(checkout: _Read) -> None:
            nonlocal removed
            removed += checkout.removed

        self._run(self._by_shard(ids), deadline, kind, True, take)
        return removed

    def reject(self, where: str, why: str) -> None:
        """Count a message that is not ours; log it unless the same was logged before."""
        self.rejected += 1
        complaint = f"{where}: {why}"
        if complaint not in self._complaints and len(self._complaints) < MAX_COMPLAINTS:
            self._complaints.add(complaint)
            logger.warning("ignored a foreign or damaged message in %s: %s", where, why)

    def _by_shard(self, ids: Iterable[str]) -> Dict[int, Set[str]]:
        shards: Dict[int, Set[str]] = {}
        for task_id in ids:
            shards.setdefault(self.declarations.topology.shard(task_id), set()).add(task_id)
        return shards

    def _run(
        self,
        shards: Dict[int, Set[str]],
        deadline: Optional[float],
        kind: str,
        remove: bool,
        take: Callable[[_Read], None],
    ) -> None:
        started = time.monotonic()
        # Each shard has its time; of many, those at the end of the line are not to be late.
        allowance = self.lookup_timeout * (1 + len(shards) // PARALLEL)
        end = started + allowance
        if deadline is not None:
            end = min(end, deadline)
        todo: Deque[int] = collections.deque(sorted(shards))
        attempt = 0
        while todo:
            try:
                with self._pool.link(end) as link:
                    self._read_on(link, shards, todo, end, kind, remove, take)
            except errors.LookupTimeout:
                raise
            except connections.TRANSIENT as exc:
                # Shards read completely are done; the others are read again.
                self.declarations.forget()
                if isinstance(exc, errors.BackendUnavailable):
                    raise
                if connections.is_refusal(exc):
                    raise errors.BackendUnavailable(
                        f"the broker refuses a look-up: {exc}. Check the user's permissions on "
                        f"the queues {self.declarations.topology.prefix}.*, and on the default "
                        "exchange (amq.default)"
                    ) from exc
                attempt += 1
                pause = self._pool.policy.pause(attempt)
                if pause is None or time.monotonic() + pause >= end:
                    raise errors.LookupTimeout(
                        f"{len(todo)} of {len(shards)} shards could not be read in "
                        f"{time.monotonic() - started:.1f} s: the connection was lost {attempt} "
                        f"times, at last with {exc!r}"
                    ) from exc
                logger.info("a look-up is repeated after %r", exc)
                time.sleep(pause)

    def _read_on(
        self,
        link: connections.Link,
        shards: Dict[int, Set[str]],
        todo: Deque[int],
        end: float,
        kind: str,
        remove: bool,
        take: Callable[[_Read], None],
    ) -> None:
        running: List[_Read] = []
        waiting = collections.deque(todo)
        started = time.monotonic()
        while waiting or running:
            while waiting and len(running) < PARALLEL:
                shard = waiting.popleft()
                running.append(_Read(self, link, shard, shards[shard], kind, remove))
            now = time.monotonic()
            if now >= end:
                raise self._late(link, running, now - started)
            if not any(checkout.done for checkout in running):
                link.drain(min(end - now, HEARTBEAT / 2))
                link.tick()
            finished = [checkout for checkout in running if checkout.done]
            for checkout in finished:
                running.remove(checkout)
                # Closed before anything else is done with it: others wait in line.
                checkout.close()
                todo.remove(checkout.shard)
                take(checkout)

    def _late(
        self, link: connections.Link, running: List[_Read], seconds: float
    ) -> errors.LookupTimeout:
        slow = running[0]
        queue = self.declarations.topology.shard_queue(slow.shard).name
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
