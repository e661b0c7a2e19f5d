"""Reading one shard: collecting states while it is held, packing it, removing states from it."""

from __future__ import annotations

import itertools
import logging
import time
from typing import Callable, Collection, Dict, Iterable, List, Optional, Protocol, Set

import amqp
from celery import states

from celery_amqp_results import errors
from celery_amqp_results.amqp.confirm_log import Outgoing, Publication, Status
from celery_amqp_results.amqp.confirms import ConfirmChannel
from celery_amqp_results.amqp.declarations import Declarations
from celery_amqp_results.amqp.link import Link
from celery_amqp_results.protocol import page
from celery_amqp_results.protocol.clock import wall
from celery_amqp_results.protocol.message import STATE, UNKNOWN_TIME, StateMessage, dated
from celery_amqp_results.store.checkout import Checkout, limits_for
from celery_amqp_results.store.packing import Packing, damaged_in, split

__all__ = ("LookUp", "Removal", "ShardRead", "Shelf")

logger = logging.getLogger(__name__)

#: A reader packs a shard that has at least this many loose results.
PACK_AT = 32

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


class Shelf(Protocol):
    """What a read needs to know of the store."""

    declarations: Declarations
    lookup_timeout: float
    page_size: int
    persistent: bool

    def reject(self, where: str, why: str) -> None:
        """Count a foreign message."""

    def readable(self, queue: str, found: List[StateMessage]) -> List[StateMessage]:
        """Return *found* without undecodable states that would hide a decodable one."""

    def count(self, **more: int) -> None:
        """Add to the counts with these names."""

    def confirm_channel(self, link: Link) -> ConfirmChannel:
        """Return the channel for publishing on a connection for look-ups."""


class ShardRead:
    """The read of one shard."""

    def __init__(
        self, store: Shelf, link: Link, shard: int, wanted: Collection[str], kind: str
    ) -> None:
        self.shard = shard
        self.wanted = wanted
        self._in_pages = page.Wanted(wanted)
        self._kind = kind
        self._store = store
        self._link = link
        #: When the first message came.
        self._began: Optional[float] = None
        #: Time limit of the look-up.
        self._end = 0.0
        # A missing queue counts as empty: a look-up declares nothing.
        topology = store.declarations.topology
        self.checkout = Checkout(
            link,
            topology.shard_queue_name(shard),
            self._on_message,
            limits_for(topology.queue_type, store.lookup_timeout),
            self._incomplete,
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
        self._on_own_state(tag, state)

    def _on_own_state(self, tag: int, state: StateMessage) -> None:
        """Handle a state that belongs to this shard."""
        raise NotImplementedError

    def _on_page(self, tag: int, body: bytes) -> None:
        """Handle a page."""
        raise NotImplementedError

    def _is_wanted(self, state: StateMessage) -> bool:
        return state.id in self.wanted and state.kind == self._kind

    def _hits(self, body: bytes, now: int) -> List[StateMessage]:
        """Return the wanted states in a page."""
        return [
            state
            for state in page.find(body, self._in_pages, self._reject)
            if state.kind == self._kind and not state.expired(now) and self._points_right(state)
        ]

    def _points_right(self, state: StateMessage) -> bool:
        try:
            self._store.declarations.topology.check_body_queue(state)
        except errors.ForeignMessage as exc:
            self._reject(exc)
            return False
        return True

    def _incomplete(self) -> bool:
        """Return whether a wanted state may lie in a page behind the fence."""
        return True

    @property
    def done(self) -> bool:
        """Whether the whole shard was seen."""
        return self.checkout.fenced

    def finish(self, pack_until: float, end: float, done: Callable[[], None]) -> None:
        """Write pages and removals, and release the shard.

        Parameters:
            pack_until: time (``time.monotonic``) after which packing is left to the next reader.
            end: time after which it no longer waits for the broker.
            done: called when nothing that follows can make another read necessary.

        Raises:
            NotConfirmed: when the broker has not confirmed a page by then.
            amqp.PreconditionFailed: when a page is too large for the broker.
        """
        raise NotImplementedError

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

    def _wait_for_pages(self) -> None:
        """Wait until the published pages have come back.

        The fences of readers in line lie in front of the pages. Such a reader may have received the
        other states of a task: it must learn that this reader held the queue meanwhile.
        """
        self.checkout.set_fence()
        self.checkout.wait(min(time.monotonic() + PAGE_SECONDS, self._end))

    def _publish_page(self, content: List[StateMessage]) -> bool:
        """Publish a page to the shard; return whether the broker has taken it."""
        expires = page.expiration(content, wall())
        properties: Dict[str, object] = {
            "type": page.PAGE,
            "content_type": page.CONTENT_TYPE,
            "delivery_mode": 2 if self._store.persistent else 1,
        }
        if expires is not None:
            properties["expiration"] = str(expires)
        channel = self._store.confirm_channel(self._link)
        published = Publication(Outgoing(self.checkout.queue, properties, page.encode(content)))
        channel.publish(published)
        channel.wait((published,), self._end)
        if published.status is Status.CONFIRMED:
            return True
        logger.info("the broker did not take a page for %r", self.checkout.queue)
        return False


class LookUp(ShardRead):
    """A read that finds states, and packs the shard on the way.

    Parameters:
        census: takes the content of the whole shard, or ``None``.
    """

    def __init__(
        self,
        store: Shelf,
        link: Link,
        shard: int,
        wanted: Collection[str],
        kind: str,
        census: Optional[page.Census] = None,
    ) -> None:
        self.census = census
        self.found: Dict[str, List[StateMessage]] = {}
        #: Loose messages that packing would replace, by delivery tag.
        self._loose: Dict[int, StateMessage] = {}
        self._small_pages: Dict[int, bytes] = {}
        self._retained = 0
        super().__init__(store, link, shard, wanted, kind)

    def _on_own_state(self, tag: int, state: StateMessage) -> None:
        now = wall()
        state = dated(state, now)
        undated = state.published == UNKNOWN_TIME
        # The broker drops an expired message only when it is first in the queue.
        current = undated or not state.expired(now)
        if current and self._is_wanted(state):
            self.found.setdefault(state.id, []).append(state)
        if current and self.census is not None:
            self.census.add(state)
        # A page cannot tell when a state without a date expires; for a loose state the broker can.
        if not undated and self._retain(len(state.body)):
            self._loose[tag] = state

    def _on_page(self, tag: int, body: bytes) -> None:
        now = wall()
        if self.census is not None:
            self.census.add_page(body)
        for state in self._hits(body, now):
            self.found.setdefault(state.id, []).append(dated(state, now))
        if self._retain(len(body)):
            self._small_pages[tag] = body

    def _retain(self, size: int) -> bool:
        """Return whether a message of *size* bytes is worth packing and may be kept in memory."""
        page_size = self._store.page_size
        if size > page_size // 2 or self._retained + size > MAX_RETAINED:
            return False
        self._retained += size
        return True

    def _incomplete(self) -> bool:
        if self._kind != STATE or self.census is not None:
            return True
        return not all(
            any(state.state == states.SUCCESS for state in self.found.get(task_id, ()))
            for task_id in self.wanted
        )

    def finish(self, pack_until: float, end: float, done: Callable[[], None]) -> None:
        """Pack the shard, and release it. The states found are complete before that."""
        done()
        self._end = end
        if len(self._loose) >= PACK_AT and time.monotonic() < pack_until:
            self._pack(pack_until)
        # No caller waits until the broker has put everything back.
        self.checkout.close(wait=False)

    def _pack(self, until: float) -> None:
        """Replace loose results, and small pages, by full pages.

        Each page is confirmed before the messages that it replaces are acknowledged. A crash in
        between leaves results twice, which the fold makes harmless.
        """
        sources: Dict[int, List[StateMessage]] = {
            tag: [state] for tag, state in self._loose.items()
        }
        for tag, body in self._small_pages.items():
            try:
                sources[tag] = page.decode(body)
            except errors.ForeignMessage as exc:
                self._reject(exc)
        damaged = self._damaged_in(itertools.chain.from_iterable(sources.values()))
        packing = Packing(sources, damaged, wall())
        if packing.size < PACK_AT:
            # Almost all of them are states of unfinished tasks.
            return
        # Publish at least one page if there is time for it to come back. Otherwise nothing would
        # ever be packed where the selection takes all the time.
        stop = max(until, self._end - PAGE_SECONDS)
        for content in packing.pages(self._store.page_size):
            if not packing.is_last(content) and time.monotonic() >= stop:
                break
            if not self._publish_page(content):
                break
            packing.wrote(content)
            stop = until
        replaced = packing.replaced()
        if replaced:
            self._wait_for_pages()
        self._drop_bodies(packing.orphans(replaced))
        self.checkout.acknowledge(replaced)
        self._store.count(packed=packing.settled)

    def _drop_bodies(self, queues: Set[str]) -> None:
        """Delete the queues of superseded large results that would not expire."""
        if not queues:
            return
        channel = self._link.channel()
        try:
            for queue in queues:
                channel.queue_delete(queue)
        except amqp.exceptions.AccessRefused as exc:
            # A user that only reads may lack the permission.
            logger.info("superseded large results were not deleted: %s", exc)
        channel.close()

    def credible(self, known: List[StateMessage]) -> List[StateMessage]:
        """Return the states *known* without undecodable final states that would hide others."""
        damaged = self._damaged_in(known)
        return [state for state in known if state not in damaged] if damaged else known

    def _damaged_in(self, known: Iterable[StateMessage]) -> Set[StateMessage]:
        return damaged_in(known, lambda several: self._store.readable(self.checkout.queue, several))


class Removal(ShardRead):
    """A read that removes what it finds."""

    def __init__(
        self, store: Shelf, link: Link, shard: int, wanted: Collection[str], kind: str
    ) -> None:
        self.removed = 0
        #: Pages to rewrite without the removed states, by delivery tag.
        self._cut_pages: Dict[int, bytes] = {}
        #: Pointers to remove, after their queues have been deleted.
        self._removed_pointers: List[int] = []
        self._body_queues: Set[str] = set()
        super().__init__(store, link, shard, wanted, kind)

    def _on_own_state(self, tag: int, state: StateMessage) -> None:
        if not self._is_wanted(state):
            return
        self.removed += 1
        if state.body_queue is None:
            self.checkout.acknowledge((tag,))
        else:
            self._removed_pointers.append(tag)
            self._body_queues.add(state.body_queue)

    def _on_page(self, tag: int, body: bytes) -> None:
        hits = self._hits(body, wall())
        if hits:
            self.removed += len(hits)
            self._body_queues.update(queue for s in hits if (queue := s.body_queue))
            self._cut_pages[tag] = body

    def finish(self, pack_until: float, end: float, done: Callable[[], None]) -> None:
        """Remove the states, and release the shard."""
        self._end = end
        self._delete_bodies()
        self._cut()
        # A removal must be complete before the caller goes on.
        self.checkout.close(wait=True)
        done()

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
                state for state in page.decode(body, self._reject) if not self._is_wanted(state)
            ]
            for content in split(kept, self._store.page_size):
                if not self._publish_page(content):
                    raise errors.NotConfirmed(f"{self.checkout.queue!r} does not take a page")
                published = True
        if published:
            self._wait_for_pages()
        self.checkout.acknowledge(cut)
