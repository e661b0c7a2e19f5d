"""Reading states: from memory after a barrier where that is safe, otherwise by a look-up.

Everything that reads a state goes through here: polls, groups, waiting clients, the command line.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Collection, Dict, Iterable, List, Optional

from kombu.exceptions import ContentDisallowed

from celery_amqp_results import errors
from celery_amqp_results.amqp.pool import AllInUse
from celery_amqp_results.feed.inbox import Inbox
from celery_amqp_results.feed.views import Look
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.page import Census
from celery_amqp_results.protocol.ranking import fold, is_final
from celery_amqp_results.store.lookup import Store
from celery_amqp_results.toolkit.threads import start_helper

__all__ = ("Reads",)

logger = logging.getLogger(__name__)


class Reads:
    """Reads the states of tasks.

    Thread-safe.
    """

    def __init__(self, inbox: Inbox, store: Store) -> None:
        self._inbox = inbox
        self._store = store
        # Guards the attributes below.
        self._lock = threading.Lock()
        self._counting: Optional[threading.Thread] = None
        #: Ids that were answered from memory.
        self.remembered = 0

    def read(
        self, ids: Iterable[str], deadline: Optional[float] = None
    ) -> Dict[str, Optional[StateMessage]]:
        """Return the current state of each of *ids*, or ``None`` where nothing is stored.

        No answer is older than the states stored by any ``store_result`` before this call.

        Parameters:
            deadline: see :meth:`~celery_amqp_results.store.lookup.Store.read`.

        Raises:
            LookupTimeout: when the store could not be read in time.
            BackendUnavailable: when the broker cannot be reached or refuses us.
            DeclarationRefused: when something on the broker exists with other properties.
        """
        return {task_id: fold(found) for task_id, found in self.states(ids, deadline).items()}

    def states(
        self,
        ids: Iterable[str],
        deadline: Optional[float] = None,
        stored: Collection[str] = (),
    ) -> Dict[str, List[StateMessage]]:
        """Return the known states of each of *ids*, including the current one.

        Parameters and errors are those of :meth:`read`.

        Parameters:
            stored: those of *ids* to read from the store, even if they are in memory.
        """
        wanted = list(dict.fromkeys(ids))
        known = self._from_memory([each for each in wanted if each not in stored], deadline)
        missing = [task_id for task_id in wanted if task_id not in known]
        if not missing:
            return known
        found = self._look_up(missing, deadline)
        self._count_rest()
        return {
            task_id: known[task_id] if task_id in known else found[task_id] for task_id in wanted
        }

    def _from_memory(
        self, ids: Collection[str], deadline: Optional[float]
    ) -> Dict[str, List[StateMessage]]:
        if not ids:
            return {}
        known = self._inbox.answer(ids, deadline)
        readable = {
            task_id: [] if state is None else [state]
            for task_id, state in known.items()
            if state is None or self._is_readable(state)
        }
        with self._lock:
            self.remembered += len(readable)
        return readable

    def _is_readable(self, state: StateMessage) -> bool:
        """Whether a state can be decoded. One that cannot may hide another in the store."""
        if not is_final(state.state) or state.body_queue is not None or self._store.check is None:
            return True
        try:
            self._store.check(state)
        except (ContentDisallowed, errors.ForeignMessage):
            return False
        return True

    def _count_rest(self) -> None:
        """Start a thread that takes a census of the shards that the next reads will need."""
        if not self._inbox.uncounted():
            return
        with self._lock:
            if self._counting is None:
                self._counting = start_helper(self._count, "views")

    def _count(self) -> None:
        try:
            for _ in self._inbox.uncounted():
                # Checked each time: the inbox may be closed, and reads take censuses as well.
                shards = self._inbox.uncounted()[:1]
                if not shards:
                    return
                self._look_up((), None, shards)
        except (errors.BackendUnavailable, errors.DeclarationRefused) as exc:
            logger.info("shards could not be read ahead: %s", exc)
        finally:
            with self._lock:
                self._counting = None

    def _look_up(
        self, ids: Collection[str], deadline: Optional[float], shards: Collection[int] = ()
    ) -> Dict[str, List[StateMessage]]:
        look = self._inbox.begin(ids, shards)
        found: Dict[str, List[StateMessage]] = {}
        censuses = {shard: Census() for shard in look.census}
        try:
            found = self._store.read(ids, deadline, censuses=censuses)
        except BaseException as exc:
            censuses.clear()
            if self._is_silence(exc, look):
                self._inbox.doubt(look, str(exc))
            raise
        finally:
            self._inbox.end(look, found, censuses)
        return found

    def _is_silence(self, exc: BaseException, look: Look) -> bool:
        """Whether the store did not answer, and had its full time for that."""
        if not isinstance(exc, errors.LookupTimeout) or isinstance(exc, AllInUse):
            return False
        return time.monotonic() - look.began >= self._store.lookup_timeout
