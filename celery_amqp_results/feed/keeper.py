"""The inbox's thread: it keeps a connection open, and opens another one when it is lost."""

from __future__ import annotations

import logging
import threading
import time
from typing import Optional

from celery_amqp_results import errors
from celery_amqp_results.amqp import connections
from celery_amqp_results.amqp.declarations import Declarations
from celery_amqp_results.amqp.failures import TRANSIENT, is_refusal
from celery_amqp_results.feed import session
from celery_amqp_results.toolkit.bounded import OnceLogger
from celery_amqp_results.toolkit.retry import Retry
from celery_amqp_results.toolkit.threads import start_thread

__all__ = ("Keeper",)

logger = logging.getLogger(__name__)

#: Seconds after which a read restarts a keeper that has given up.
RESTART = 30.0


class Keeper:
    """Keeps one session open. The owner calls all methods but :meth:`join` with its lock held.

    Parameters:
        changed: the owner's lock; notified when the owner is closed.
    """

    def __init__(
        self,
        owner: session.Owner,
        changed: threading.Condition,
        connector: connections.Connector,
        declarations: Declarations,
        client: str,
    ) -> None:
        self._owner = owner
        self._changed = changed
        self._connector = connector
        self._declarations = declarations
        self._client = client
        self.thread: Optional[threading.Thread] = None
        #: Logs repeated connection failures once.
        self._once = OnceLogger(logger)
        #: Whether to end. Set by the owner.
        self.closing = False
        #: Why and when the thread gave up, until it is started again.
        self.failure: Optional[Exception] = None
        self._failed_at = 0.0

    def start(self) -> None:
        """Start the thread, unless it runs."""
        if self.thread is None and not self.closing:
            self.failure = None
            self.thread = start_thread(self._run, "inbox")

    def is_hopeless(self, now: float) -> bool:
        """Return whether the thread has given up a short time ago."""
        return self.failure is not None and now - self._failed_at < RESTART

    def join(self) -> None:
        """Wait until the thread has ended, for some seconds at most."""
        thread = self.thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(5.0)

    def _run(self) -> None:
        tries = Retry(self._connector.policy)
        while not self.closing:
            opened: Optional[session.Session] = None
            try:
                opened = session.Session(
                    self._owner, self._connector, self._declarations, self._client
                )
                tries.succeeded()
                self._once = OnceLogger(logger)
                opened.read()
            except Exception as exc:
                self._owner.on_lost()
                if opened is not None:
                    opened.drop()
                if not self.closing and not self._wait_before_retry(tries, exc):
                    self.give_up(exc, tries.failed)
                    return
            else:
                opened.close()
        closed = errors.BackendUnavailable("the result backend was closed")
        self._owner.on_lost()
        with self._changed:
            self.thread = None
            self._owner.on_end(closed)

    def _wait_before_retry(self, tries: Retry, exc: Exception) -> bool:
        """Wait before the next connection; return ``False`` if there must be none."""
        limited = self._connector.is_limited(exc)
        # Before the first success the URL may well be wrong: give up as the policy says.
        stood = bool(self._owner.connections)
        pause = (tries.after_success if stood or limited else tries.after)(exc, time.monotonic())
        refused = isinstance(exc, (errors.BackendUnavailable, errors.DeclarationRefused))
        if pause is None or refused or is_refusal(exc) or not isinstance(exc, TRANSIENT):
            return False
        self._once.log(
            logging.DEBUG if limited else logging.WARNING,
            type(exc).__name__,
            "the connection that results are pushed on is lost, opening another in %.1f s [%d]: %r",
            pause,
            tries.failed,
            exc,
        )
        with self._changed:
            if not self.closing:
                self._changed.wait(pause)
        return True

    def give_up(self, exc: Exception, attempts: int) -> None:
        """End with an error that says what to do about *exc*."""
        failure = self._explained(exc, attempts)
        with self._changed:
            self.thread = None
            self.failure = failure
            self._failed_at = time.monotonic()
            self._owner.on_end(failure)

    def _explained(self, exc: Exception, attempts: int) -> Exception:
        if isinstance(exc, (errors.BackendUnavailable, errors.DeclarationRefused)):
            return exc
        broker = self._connector.describe()
        if is_refusal(exc):
            failure = errors.BackendUnavailable(
                f"the broker at {broker} refuses to push results: {exc}. Check the user's "
                f"permissions on the exchange {self._declarations.topology.exchange!r} and on "
                "queues that the broker names (amq.gen-*)."
            )
        elif isinstance(exc, TRANSIENT):
            failure = errors.BackendUnavailable(
                f"the broker at {broker} cannot be reached for results to be pushed, after "
                f"{attempts} tries: {exc!r}. Is RabbitMQ running there, and is the result backend "
                "URL right?"
            )
        else:
            logger.error("the thread that results are pushed to has failed", exc_info=exc)
            return exc
        failure.__cause__ = exc
        return failure
