"""Publishing without a waiting caller: confirms are collected, and lost messages published again.

The next message on the channel collects confirms, and a thread does so a second later.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from typing import List, Optional

from celery_amqp_results import errors
from celery_amqp_results.amqp import connections
from celery_amqp_results.amqp.confirm_log import ConfirmLog, Publication, Status
from celery_amqp_results.amqp.confirms import ConfirmChannel
from celery_amqp_results.amqp.declarations import Declarations
from celery_amqp_results.amqp.failures import TRANSIENT
from celery_amqp_results.amqp.shared_channel import SharedChannel
from celery_amqp_results.amqp.turns import Waiter
from celery_amqp_results.store.strays import Strays
from celery_amqp_results.toolkit.interrupts import raise_if_from_signal_handler
from celery_amqp_results.toolkit.retry import is_over, time_left
from celery_amqp_results.toolkit.threads import start_helper

__all__ = ("Unwaited",)

logger = logging.getLogger(__name__)

#: The most unconfirmed messages without a waiting caller.
MAX_UNCONFIRMED = 500

#: After this many messages without a waiting caller their confirms are collected.
COLLECT_EVERY = 50

#: Seconds after which a confirm without a waiting caller is collected.
CHECK_SECONDS = 1.0

#: Seconds for which the checking thread tries to connect before it leaves the connection to others
#: for a moment. A process that ends waits for that.
CONNECT_SECONDS = 5.0

#: Seconds that closing waits for other threads to leave the connection.
CLOSE_SECONDS = 1.0

#: Seconds between looks at refused messages while the process ends, and the longest pause before
#: one of them is published again.
REFUSED_SECONDS = 0.05
LAST_PAUSE = 1.0

#: The checking thread ends after this many checks with nothing to do.
IDLE_CHECKS = 10


class Unwaited:
    """Keeps the messages that no caller waits for until the broker has confirmed them.

    Parameters:
        plain: whether they are published without confirms.

    Thread-safe. After a fork the child must make a new one.
    """

    def __init__(
        self, connector: connections.Connector, declarations: Declarations, plain: bool = False
    ) -> None:
        self._declarations = declarations
        self.strays = Strays()
        #: The publishing channel.
        self.channel = SharedChannel(connector, self._on_lost, plain)
        self._lock = threading.Lock()
        self._keeper: Optional[threading.Thread] = None
        self._closed = threading.Event()

    def _on_lost(self, publication: Publication) -> None:
        if publication.failure is not None:
            # A limit on queues is remembered, so that no more are declared for a while.
            self._declarations.refusal(publication.failure)
        self.strays.add((publication,))

    def send(self, channel: ConfirmChannel) -> None:
        """Publish again what must be, on a channel that the caller has to itself."""
        strays, log = self.strays, channel.log
        if channel.mute or not (strays or log.strays):
            # What came back needs an answer of the broker.
            return
        refused, log.strays = log.strays, []
        strays.add(refused)
        longest = LAST_PAUSE if self._closed.is_set() else math.inf
        due = strays.take_due(time.monotonic(), longest)
        for number, publication in enumerate(due):
            returned = publication.status is Status.RETURNED
            try:
                if returned and not self._declare(channel, publication):
                    continue
                # On the channel of the declaration, so that it comes after that.
                publication.plain = publication.plain and not returned
                channel.publish(publication)
            except BaseException:
                strays.add(due[number + (not publication.settled) :])
                raise

    def _declare(self, channel: ConfirmChannel, publication: Publication) -> bool:
        """Declare the shard of a message that came back; return whether that is possible."""
        message = publication.message
        assert message.shard is not None
        full: Optional[Exception] = None
        try:
            if not self._declarations.declare:
                raise self._declarations.missing(f"queue {message.queue}")
            self._declarations.check_limit()
        except (errors.DeclarationRefused, errors.BackendUnavailable) as exc:
            full = exc
        else:
            full = self._declarations.check_room(channel.asking, 1)
        if full is not None:
            self.strays.give_up(publication, full)
            return False
        self._declarations.request_shard(channel.channel, message.shard)
        return True

    def keep_up(self, log: ConfirmLog) -> None:
        """Keep the number of unconfirmed messages limited, and the checking thread running."""
        if len(log) > MAX_UNCONFIRMED:
            self.channel.collect()
            # Only for half of them, so that the broker always has work.
            self.channel.wait(Waiter(log.unwaited()[: MAX_UNCONFIRMED // 2]))
        elif len(log) % COLLECT_EVERY == 0:
            self.channel.collect()
        self._start_keeper()

    def flush(self, timeout: float) -> None:
        """Wait until everything is confirmed, at most *timeout* seconds."""
        end = time.monotonic() + timeout
        left: List[Publication] = []
        try:
            while not is_over(end):
                left = self._collect(end)
                if not left and not self._has_strays(end):
                    return
                self.channel.wait(Waiter(left), end)
                if not left:
                    # Refused messages are published again after a pause.
                    time.sleep(time_left(end, REFUSED_SECONDS))
        except TRANSIENT as exc:
            raise_if_from_signal_handler(exc)
            logger.info("states were not confirmed when the process ended: %r", exc)
        count = len(self.strays) + sum(not p.settled for p in left)
        if count:
            logger.warning("%d states were not confirmed when the process ended", count)

    def close(self, timeout: float) -> None:
        """Wait for outstanding confirms, at most *timeout* seconds, and close the connection."""
        self._closed.set()
        self.flush(timeout)
        self.channel.close(time.monotonic() + CLOSE_SECONDS)

    def _has_strays(self, deadline: Optional[float] = None) -> bool:
        with self.channel.present(deadline) as channel:
            return bool(self.strays or (channel is not None and channel.log.strays))

    def _collect(self, deadline: float) -> List[Publication]:
        """Collect confirms, publish again what must be, and return what is unconfirmed.

        Waits for the end of an alarm, until *deadline* (``time.monotonic``), before it publishes.
        """
        unconfirmed = self.channel.collect(deadline)
        if not self._has_strays(deadline):
            return unconfirmed
        try:
            with self.channel.open(time.monotonic(), deadline=deadline) as channel:
                self._declarations.ensure_exchange(channel.channel)
                self.send(channel)
                channel.ask_about_plain()
                return channel.log.unwaited()
        except errors.NotConfirmed:
            # An alarm goes on.
            raise
        except BaseException:
            self._declarations.forget()
            raise

    def _keep(self) -> None:
        """Collect confirms until there are none for a while."""
        idle = 0
        while not self._closed.wait(CHECK_SECONDS):
            try:
                busy = self._check()
            except Exception as exc:
                busy = True
                logger.info("states that nobody waits for are not published yet: %r", exc)
            idle = 0 if busy else idle + 1
            if idle >= IDLE_CHECKS:
                break
        with self._lock:
            self._keeper = None
        with self.channel.present() as channel:
            left = channel is not None and len(channel.log) > 0
        if left or self._has_strays():
            # Sent, or lost, since the last check.
            self._start_keeper()

    def _start_keeper(self) -> None:
        if self._keeper is None and not self._closed.is_set():
            with self._lock:
                if self._keeper is None:
                    self._keeper = start_helper(self._keep, "confirms")

    def _check(self) -> bool:
        """Publish lost messages again; return whether anything is unconfirmed."""
        unconfirmed = self._collect(time.monotonic() + CONNECT_SECONDS)
        old = [p for p in unconfirmed if time.monotonic() - p.sent > CHECK_SECONDS]
        if old:
            # This closes the connection if no confirm comes for long.
            self.channel.wait(Waiter(old))
        return bool(unconfirmed) or self._has_strays()
