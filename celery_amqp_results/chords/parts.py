"""The parts of a chord, collected in a queue of its own, until whoever completes it fires it.

This is the broker's side: what lies in the queue, when the set is complete, and who may fire. What
firing means to Celery is in :mod:`~celery_amqp_results.chords.native`.

In the queue of a chord there are

``part``
    what a task of the header returned; the state, and the group index in a header
``plan``
    how many parts there will be, in a header, and what is to be done with them; from the sender,
    who knows both when it declares the queue, or, where the header is a generator or has groups
    in it, just before the last task of the header is sent
``more``
    a running task has added a task to the header
``pad``
    nothing; so that there are as many messages as everybody counts on
``firing``
    somebody has begun to send the body

A part is published, and confirmed, and then the queue is asked for its length. What is complete
has one message for each part and the plan. Who sees fewer, and nobody reading, knows that a part
or the plan is still to come, whose publisher will ask in turn: of all that is in the queue the last
message is confirmed before its publisher asks, so at least one of them sees them all. Who sees
enough checks the queue out (see :mod:`~celery_amqp_results.store.checkout`) and counts:
parts of the same task and index count once, since a task that is delivered again publishes again.
Who sees a reader cannot tell how much that one holds, and gets in line behind it.

To know how long is enough a worker has to know the size. It comes with the task where the sender
knew it. A header that is a generator is sent while it runs, so that its size is known at the end
only: then there is a second queue, which is empty until the plan is published and whose length is
asked for instead. When there is something in it the worker reads it, once per chord.

A body must not be lost: so it is sent first, and the queue is deleted after that. Who dies in
between leaves the queue to the next in line, who finds the message ``firing`` and sends the body
again, with the same task id, unless there is a result of the body already. Whose body was sent
twice has one result all the same, since the first one counts.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
import time
import uuid
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Set, Tuple

import amqp
from amqp import exceptions as amqp_errors

from celery_amqp_results import errors
from celery_amqp_results.amqp import connections
from celery_amqp_results.protocol.message import PART, PLAN, StateMessage
from celery_amqp_results.protocol.names import Route, Topology
from celery_amqp_results.store.checkout import PREFETCH, Checkout, longest_prefetch
from celery_amqp_results.store.publisher import Outgoing, Publisher, QueueLength, Receipt

__all__ = ("MAX_QUORUM_PARTS", "Chords", "Gathered", "Part", "Receipt")

logger = logging.getLogger(__name__)

#: Seconds between heartbeats on connections that hold a chord's queue. While a body of many tasks
#: is sent nobody answers them: it may take twice as long. A frozen holder loses the queue then.
HEARTBEAT = 30.0

#: Seconds that a process waits in line behind another that holds a chord's queue.
LINE_TIMEOUT = 3 * HEARTBEAT

#: More parts than this cannot be held by a reader of a quorum queue, which needs a limit.
MAX_QUORUM_PARTS = PREFETCH - 100

#: Chords whose size is remembered by a process, at most.
MAX_SIZES = 10_000

SIZE = "size"
MORE = "more"
PAD = "pad"
FIRING = "firing"

#: Header with the group index of a part.
INDEX_HEADER = "index"
#: Header with the number of parts.
SIZE_HEADER = "size"


class Part(NamedTuple):
    """What a task of the header returned."""

    task_id: str
    #: Its place among the results; ``None`` is at the end.
    group_index: Optional[int]
    state: StateMessage


class Gathered(NamedTuple):
    """A complete chord."""

    #: The parts in the order of the header.
    parts: List[Part]
    plan: StateMessage
    #: Whether somebody began to send the body and did not live to delete the queue.
    attempted: bool


class Chords:
    """Collects the parts of chords.

    Parameters:
        publisher: publishes parts.
        pool: connections for reading the queues of chords, with heartbeats of :data:`HEARTBEAT`.
        topology: names and queue arguments.
        persistent: whether messages survive a restart of the broker.
        outgoing: returns the message for a state and its route.

    Thread-safe. After a fork the child must make a new one.
    """

    def __init__(
        self,
        publisher: Publisher,
        pool: connections.Pool,
        topology: Topology,
        persistent: bool,
        outgoing: Callable[[StateMessage, Route], Outgoing],
    ) -> None:
        self._outgoing = outgoing
        self._publisher = publisher
        self._pool = pool
        self._topology = topology
        self._mode = 2 if persistent else 1
        self._persistent = persistent
        self._lock = threading.Lock()
        #: Sizes that had to be looked up, by group.
        self._sizes: collections.OrderedDict[str, int] = collections.OrderedDict()
        #: How often a queue was read, and how many chords were fired.
        self.reads = 0
        self.fired = 0

    def declare(
        self,
        group_id: str,
        expires: Optional[int],
        plan: Optional[StateMessage] = None,
        size: Optional[int] = None,
    ) -> Optional[Receipt]:
        """Declare the queue of a chord that is about to be sent.

        Returns ``None`` when somebody reads the queue already: the chord was sent before, and is
        being fired. The queue is then about to be deleted, and has to be settled and declared
        anew.

        Parameters:
            group_id: id of the header.
            expires: milliseconds after which an abandoned queue is deleted; ``None`` for never.
            plan: what is to be done, where it is sure now; it is published, and is on its way
                while the tasks are sent. To be confirmed with :meth:`confirm_plan` before the
                last one is. ``None`` where it is to be published with :meth:`publish_plan`.
            size: how many parts there will be, as the tasks of the header are told; ``None``
                where they cannot be.

        Raises:
            DeclarationRefused: when it exists with other properties.
            BackendUnavailable: when the broker cannot be reached or refuses us.
        """
        queues = [self._topology.chord_queue(group_id, expires)]
        if size is None:
            queues.append(self._topology.chord_size_queue(group_id, expires))
        messages = [] if plan is None or size is None else [self._plan(plan, size)]
        return self._publisher.declare(queues, messages)

    def confirm_plan(self, group_id: str, receipt: Receipt) -> None:
        """Wait until the broker has the plan that :meth:`declare` published.

        Parameters:
            group_id: id of the header.
            receipt: what :meth:`declare` returned.

        Raises:
            BackendUnavailable, ResultTooLarge: see
                :meth:`~celery_amqp_results.store.publisher.Publisher.publish`.
        """
        if not self._publisher.wait_for(receipt):
            self._complain(group_id)

    def publish_plan(self, plan: StateMessage, size: int, announced: Optional[int]) -> bool:
        """Publish the plan of a chord, and return whether it may be complete.

        Parameters:
            plan: what is to be done.
            size: how many parts there will be, not counting those that tasks add.
            announced: the size that the tasks of the header were told; ``None`` for none.

        Raises:
            BackendUnavailable, ResultTooLarge: see
                :meth:`~celery_amqp_results.store.publisher.Publisher.publish`.
        """
        queue = self._queue(plan.id)
        messages = [self._plan(plan, size)]
        if announced is None:
            name = self._topology.chord_size_queue(plan.id).name
            messages.append(self._control(SIZE, name, size))
        for _ in range((announced or 0) - size):
            messages.append(self._control(PAD, queue))
        length = self._publisher.publish(messages, count=queue)
        if length is None:
            self._complain(plan.id)
            return False
        return self._enough(length, max(size, announced or 0))

    def _plan(self, plan: StateMessage, size: int) -> Outgoing:
        properties = plan.properties(self._persistent)
        properties["application_headers"][SIZE_HEADER] = size
        what = f"the plan of chord {plan.id}"
        return Outgoing(self._queue(plan.id), properties, plan.body, what=what)

    def _complain(self, group_id: str) -> None:
        logger.error(
            "chord %s: its queue %s is gone before its tasks were sent; its body will not run",
            group_id,
            self._queue(group_id),
        )

    def publish_more(self, group_id: str) -> None:
        """Say that there will be one part more.

        To be called by a task of the header, before it returns its own part.
        """
        queue = self._queue(group_id)
        message = self._control(MORE, queue)
        if self._publisher.publish((message,), count=queue) is None:
            logger.warning("chord %s: a task was added to it when it was over", group_id)

    def _part(self, group_id: str, state: StateMessage, index: Optional[int]) -> Outgoing:
        properties = state.properties(self._persistent)
        if index is not None:
            properties["application_headers"][INDEX_HEADER] = index
        return Outgoing(
            self._queue(group_id),
            properties,
            state.body,
            what=f"the part of {state.id} in chord {group_id}",
        )

    def publish_part(
        self,
        group_id: str,
        part: StateMessage,
        group_index: Optional[int],
        size: Optional[int],
        state: Optional[Tuple[StateMessage, Route]] = None,
    ) -> bool:
        """Publish a part, with the task's state, and return whether the chord may be complete.

        A part of a chord that is over is dropped: it is one of a task that was delivered twice.

        Parameters:
            group_id: id of the header.
            part: what the task returned, of the kind ``part``.
            group_index: the task's place in the header.
            size: the size that the task was told, or ``None``.
            state: the state to store, and its route. Both messages wait for one confirm.

        Raises:
            BackendUnavailable, ResultTooLarge, DeclarationRefused: see
                :meth:`~celery_amqp_results.store.publisher.Publisher.publish`.
        """
        messages = [self._part(group_id, part, group_index)]
        if state is not None:
            messages.insert(0, self._outgoing(*state))
        queue = self._queue(group_id)
        if size is None:
            size = self._sizes.get(group_id)
        sizes = self._topology.chord_size_queue(group_id).name
        length = self._publisher.publish(messages, count=queue if size is not None else sizes)
        if size is None:
            if length is not None and not length.messages and not length.consumers:
                # The plan, and so the end, is still to come.
                return False
            if length is not None:
                size = self._read_size(group_id, sizes)
            if size is None:
                # Over, or of a sender that knows nothing of queues for sizes.
                return True
            length = self._publisher.publish((), count=queue)
        if length is None:
            logger.debug("chord %s is over", group_id)
            self._forget_size(group_id)
            return False
        return self._enough(length, size)

    def is_open(self, group_id: str) -> bool:
        """Return whether there is a chord of this group that was not fired yet.

        Raises:
            BackendUnavailable: when the broker cannot be reached or refuses us.
        """
        return self._publisher.publish((), count=self._queue(group_id)) is not None

    @staticmethod
    def _enough(length: QueueLength, size: int) -> bool:
        return length.consumers > 0 or length.messages > size

    def settle(self, group_id: str, fire: Callable[[Gathered], None]) -> bool:
        """Fire a chord if it is complete, or wait until somebody else has.

        Parameters:
            group_id: id of the header.
            fire: sends the body. Called at most once, while the queue is held; when it returns,
                the queue is deleted; when it raises, everything is put back for the next one.

        Returns:
            Whether the chord was fired here.

        Raises:
            BackendUnavailable: when the broker cannot be reached or refuses us. The chord is as it
                was before.
            Exception: what *fire* raised.
        """
        queue = self._queue(group_id)
        attempt = 0
        while True:
            failure: Optional[Exception] = None
            try:
                with self._pool.link() as link:
                    gathering = _Gathering(link, queue, self._prefetch)
                    self.reads += 1
                    if not gathering.wait(time.monotonic() + LINE_TIMEOUT):
                        # The reader is dropped with the connection.
                        raise errors.BackendUnavailable(
                            f"chord {group_id}: the queue {queue!r} could not be read within "
                            f"{LINE_TIMEOUT:g} s; somebody else holds it, and may fire it"
                        )
                    gathered = gathering.result()
                    if gathered is None:
                        gathering.checkout.close(wait=False)
                        return False
                    gathering.mark(self._control(FIRING, queue))
                    try:
                        fire(gathered)
                    except Exception as exc:
                        failure = exc
                        gathering.checkout.close(wait=False)
                    else:
                        self.fired += 1
                        gathering.checkout.delete(self._topology.chord_size_queue(group_id).name)
                        self._forget_size(group_id)
            except amqp_errors.ConsumerCancelled:
                # Somebody has fired it while this process stood in line, or the queue's leader
                # has moved: look again.
                continue
            except connections.TRANSIENT as exc:
                attempt = self._judge(exc, attempt, f"chord {group_id} was not read")
                continue
            if failure is not None:
                raise failure
            return True

    def _judge(self, exc: Exception, attempt: int, what: str) -> int:
        """Wait before the next try and return its number, or raise where there is to be none."""
        if isinstance(exc, errors.BackendUnavailable):
            raise exc
        pause = self._pool.policy.pause(attempt + 1)
        if pause is None or connections.is_refusal(exc):
            raise errors.BackendUnavailable(f"{what} in {attempt + 1} tries: {exc!r}") from exc
        logger.info("%s, trying again in %.1f s: %r", what, pause, exc)
        time.sleep(pause)
        return attempt + 1

    def _read_size(self, group_id: str, queue: str) -> Optional[int]:
        """Read the size of a chord from its second queue; ``None`` when there is none."""
        attempt = 0
        while True:
            found: List[int] = []

            def on_message(message: amqp.Message, found: List[int] = found) -> None:
                with contextlib.suppress(errors.ForeignMessage):
                    found.append(_size_of(message.properties))

            try:
                with self._pool.link() as link:
                    checkout = Checkout(link, queue, on_message, self._prefetch)
                    if not checkout.wait(time.monotonic() + LINE_TIMEOUT, HEARTBEAT / 2):
                        raise errors.BackendUnavailable(
                            f"chord {group_id}: the queue {queue!r} could not be read within "
                            f"{LINE_TIMEOUT:g} s"
                        )
                    checkout.close(wait=False)
            except amqp_errors.ConsumerCancelled:
                continue
            except connections.TRANSIENT as exc:
                attempt = self._judge(exc, attempt, f"the size of chord {group_id} was not read")
                continue
            if not found:
                return None
            with self._lock:
                self._sizes[group_id] = found[-1]
                while len(self._sizes) > MAX_SIZES:
                    self._sizes.popitem(last=False)
            return found[-1]

    def _forget_size(self, group_id: str) -> None:
        with self._lock:
            self._sizes.pop(group_id, None)

    def _queue(self, group_id: str) -> str:
        return self._topology.chord_queue(group_id).name

    @property
    def _prefetch(self) -> int:
        return longest_prefetch(self._topology.queue_type)

    def _control(self, kind: str, queue: str, size: Optional[int] = None) -> Outgoing:
        properties: Dict[str, object] = {
            "type": kind,
            # Published again after a lost connection it must not count twice.
            "message_id": uuid.uuid4().hex,
            "delivery_mode": self._mode,
        }
        if size is not None:
            properties["application_headers"] = {SIZE_HEADER: size}
        return Outgoing(queue, properties, b"", what=f"a message for {queue}")


class _Gathering:
    """The queue of one chord, being read."""

    def __init__(self, link: connections.Link, queue: str, prefetch: int) -> None:
        self._parts: Dict[Tuple[str, Optional[int]], Part] = {}
        self._plan: Optional[StateMessage] = None
        self._size = 0
        self._more: Set[str] = set()
        self._attempted = False
        self.checkout = Checkout(link, queue, self._on_message, prefetch)

    def wait(self, deadline: float) -> bool:
        """Return whether the queue could be read before *deadline* (``time.monotonic``)."""
        return self.checkout.wait(deadline, HEARTBEAT / 2)

    def _on_message(self, message: amqp.Message) -> None:
        properties = message.properties
        kind = properties.get("type")
        try:
            if kind == PART:
                state = StateMessage.from_properties(properties, message.body)
                index = properties["application_headers"].get(INDEX_HEADER)
                if index is not None and type(index) is not int:
                    raise errors.ForeignMessage(f"header {INDEX_HEADER!r} is {index!r:.100}")
                # The first one of a task counts, whatever it returned when it ran again.
                self._parts.setdefault((state.id, index), Part(state.id, index, state))
            elif kind == PLAN:
                # A chord that was frozen and is sent again has a new plan.
                plan = StateMessage.from_properties(properties, message.body)
                self._size, self._plan = _size_of(properties), plan
            elif kind == MORE:
                if not properties.get("message_id"):
                    raise errors.ForeignMessage("a task that was added has no 'message_id'")
                self._more.add(properties["message_id"])
            elif kind == FIRING:
                self._attempted = True
            elif kind not in (PAD, SIZE):
                raise errors.ForeignMessage(f"property 'type' is {kind!r}, unknown in a chord")
        except errors.ForeignMessage as exc:
            logger.warning(
                "ignored a foreign or damaged message in %s: %s", self.checkout.queue, exc
            )

    def result(self) -> Optional[Gathered]:
        """Return the chord if it is complete."""
        if self._plan is None or len(self._parts) < self._size + len(self._more):
            return None
        # The order is stable: parts with the same index are in the order of returning.
        parts = sorted(
            self._parts.values(), key=lambda part: (part.group_index is None, part.group_index or 0)
        )
        return Gathered(parts, self._plan, self._attempted)

    def mark(self, message: Outgoing) -> None:
        """Leave word for the next in line that the body is about to be sent.

        Nobody waits for the broker to have it: it is on its way before the body is.
        """
        self.checkout.channel.basic_publish(
            amqp.Message(message.body, **message.properties), routing_key=message.queue
        )


def _size_of(properties: Mapping[str, Any]) -> int:
    headers = properties.get("application_headers")
    size = headers.get(SIZE_HEADER) if isinstance(headers, Mapping) else None
    if type(size) is not int or size < 0:
        raise errors.ForeignMessage(f"header {SIZE_HEADER!r} is {size!r:.100}, not a size")
    return size
