"""Large results: each in a queue of its own, with a small pointer to it in the shard.

A reader of a shard receives every message in it. A result of a megabyte would make each look-up of
its neighbours slower by some milliseconds, and be sent again for each of them. So the body of a
state over ``inline_limit`` is published to a queue of its own. The shard and the inboxes receive a
*pointer*: the same message without a body, but with the queue's name.

The body is confirmed before the pointer is published, so a visible pointer always leads to a body.
A publisher that dies in between leaves a queue without a pointer, which expires. Body and queue
expire a little later than the pointer.

A body is read by a checkout, like a shard: any number of readers can read it, one after the other
and repeatedly, and none of them finds a queue that only looks empty.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import time
import uuid
from typing import Deque, List, Optional

import amqp

from celery_amqp_results import errors
from celery_amqp_results.amqp import connections
from celery_amqp_results.amqp.failures import TRANSIENT
from celery_amqp_results.amqp.link import Link
from celery_amqp_results.amqp.pool import Pool
from celery_amqp_results.options import Options
from celery_amqp_results.protocol import expiry
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.names import Topology
from celery_amqp_results.store.checkout import Checkout, limits_for
from celery_amqp_results.store.publisher import Outgoing, Publisher
from celery_amqp_results.toolkit.retry import time_left

__all__ = ("LargeBodies",)

logger = logging.getLogger(__name__)

#: A body outlives its pointer, which is published later, by this many milliseconds.
LINGER = 60_000

#: This many queues of bodies that were not stored are remembered until they can be deleted.
MAX_ORPHANS = 1000


class LargeBodies:
    """Keeps bodies out of the shards, and reads them.

    Parameters:
        persistent: whether messages survive a restart of the broker.

    Thread-safe. After a fork the child must make a new one.
    """

    def __init__(
        self,
        publisher: Publisher,
        pool: Pool,
        topology: Topology,
        options: Options,
        persistent: bool,
    ) -> None:
        self._publisher = publisher
        self._pool = pool
        self._topology = topology
        self._persistent = persistent
        self._limit = options.inline_limit
        self._lookup_timeout = options.lookup_timeout
        #: Queues of bodies that were not stored, and that would never expire.
        self._orphans: Deque[str] = collections.deque(maxlen=MAX_ORPHANS)

    def detach(self, state: StateMessage) -> StateMessage:
        """Return *state*, or if it is large a pointer to its body, after publishing the body.

        If that fails, there will be no pointer, and the queue of a body that never expires is
        deleted by :meth:`clean_up`.

        Raises:
            ResultTooLarge: when the broker refuses a message of this size.
            BackendUnavailable: when the broker could not be reached or refuses us.
        """
        if len(state.body) <= self._limit:
            return state
        expires = None
        if state.expiration is not None:
            expires = min(state.expiration + LINGER, expiry.MAX_MILLISECONDS)
        # One queue for each store operation: retries use the same queue, another run of the task
        # uses another one.
        queue = self._topology.large_queue(state.id, uuid.uuid4().hex[:16], expires)
        body = dataclasses.replace(state, expiration=expires)
        try:
            self._publisher.publish_apart(
                queue,
                Outgoing(
                    queue.name,
                    body.properties(self._persistent),
                    body.body,
                    what=f"the {state.state} of {state.id}",
                ),
            )
        except errors.ResultTooLarge:
            self._publisher.delete((queue.name,))
            raise
        except BaseException:
            # The broker may be away, so it is not asked now.
            if expires is None:
                self._orphans.append(queue.name)
            raise
        return dataclasses.replace(state, body=b"", body_queue=queue.name)

    def clean_up(self) -> None:
        """Delete queues that were left behind. To be called when the broker confirms messages."""
        while self._orphans:
            try:
                queue = self._orphans.popleft()
            except IndexError:
                # Another thread has taken it.
                return
            try:
                self._publisher.delete((queue,))
            except errors.NotConfirmed:
                self._orphans.append(queue)
                return
            except errors.BackendUnavailable as exc:
                logger.warning("queue %r is left, whose result was not stored: %s", queue, exc)

    def fetch(
        self, pointer: StateMessage, deadline: Optional[float] = None
    ) -> Optional[StateMessage]:
        """Return the state that *pointer* stands for, or ``None`` if the body is gone.

        Parameters:
            deadline: time (``time.monotonic``) at which to give up, if that is before
                ``lookup_timeout`` is over; ``None`` for no earlier end.

        Raises:
            LookupTimeout: when it could not be read in time.
            BackendUnavailable: when the broker cannot be reached or refuses us.
        """
        queue = pointer.body_queue
        assert queue is not None
        end = time.monotonic() + time_left(deadline, self._lookup_timeout)
        tries = connections.LookupTries(self._pool.policy, end, self._topology.prefix)
        while True:
            try:
                with self._pool.link(end) as link:
                    return self._read(link, queue, pointer, end)
            except errors.BackendUnavailable:
                raise
            except TRANSIENT as exc:
                # One cause is a queue deleted while we waited in line: the next try finds it
                # missing.
                tries.wait(exc, f"the large result in {queue!r}")

    def _read(
        self, link: Link, queue: str, pointer: StateMessage, end: float
    ) -> Optional[StateMessage]:
        found: List[StateMessage] = []

        def take(message: amqp.Message) -> None:
            try:
                state = StateMessage.from_properties(message.properties, message.body)
            except errors.ForeignMessage as exc:
                logger.warning("ignored a foreign or damaged message in %s: %s", queue, exc)
                return
            if state.id == pointer.id and state.published == pointer.published:
                # Published twice, if the connection was lost before the confirm came.
                found[:] = [state]

        limits = limits_for(self._topology.queue_type, self._lookup_timeout)
        checkout = Checkout(link, queue, take, limits)
        if not checkout.wait(end):
            raise errors.LookupTimeout(
                f"the large result in {queue!r} could not be read in time (lookup_timeout is "
                f"{self._lookup_timeout:g} s): other readers are in front, the broker does not "
                "answer or blocks publishers, or it takes that long to transfer. Asking again is "
                "safe."
            )
        checkout.close(wait=False)
        return found[0] if found else None
