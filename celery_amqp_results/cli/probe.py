"""The probe of ``results doctor``: a result is stored, waited for, looked up and forgotten."""

from __future__ import annotations

import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Callable, Iterator, List, Tuple, TypeVar

from amqp import exceptions as amqp_errors
from celery import states
from celery.app.task import Context
from celery.exceptions import TimeoutError

from celery_amqp_results import errors
from celery_amqp_results.cli import inspection
from celery_amqp_results.cli.amqp_checks import permissions
from celery_amqp_results.cli.common import Session
from celery_amqp_results.cli.findings import Finding
from celery_amqp_results.cli.limits import advice_on_refusal
from celery_amqp_results.feed.inbox import Inbox
from celery_amqp_results.library_types import Meta
from celery_amqp_results.protocol import expiry

__all__ = ("findings", "remove_traces")

_T = TypeVar("_T")

#: Time limit for the result of the probe, in seconds.
PROBE_TIMEOUT = 20.0
PROBE_EXPIRES = 60

#: Seconds until the exchange that the probe has declared must be without bindings.
TRACES_TIMEOUT = 5.0


def findings(session: Session) -> Iterator[Finding]:
    """Wait for a result, store it, look it up and forget it.

    Raises:
        amqp.AccessRefused: when the broker refuses an operation for which the backend has no error.
    """
    backend, topology = session.backend, session.backend.config.topology
    task_id = f"doctor-{uuid.uuid4()}"
    took: List[Tuple[str, float]] = []

    def timed(name: str, function: Callable[[], _T]) -> _T:
        started = time.monotonic()
        value = function()
        took.append((name, time.monotonic() - started))
        return value

    # The result expires by itself if this process is killed.
    request = Context(id=task_id, **{expiry.NAME: PROBE_EXPIRES})
    layout = session.shared_layout()
    # The result is waited for before it is stored, so that it is pushed. Closing the backend, or
    # the timeout, ends the thread.
    executor = ThreadPoolExecutor(1, "doctor")
    waiting = executor.submit(lambda: list(backend.get_many([task_id], timeout=PROBE_TIMEOUT)))
    try:
        timed("open an inbox", lambda: _wait_for_inbox(layout.inbox, task_id, waiting))
        timed(
            "store",
            lambda: backend.store_result(task_id, "probe", states.SUCCESS, request=request),
        )
        waited = timed("wait", waiting.result)
        found = timed("look up", lambda: layout.store.read((task_id,))[task_id])
        timed("forget", lambda: backend.forget(task_id))
    except (errors.BackendUnavailable, errors.DeclarationRefused, TimeoutError) as exc:
        done = ", ".join(name for name, _ in took) or "nothing"
        yield Finding(
            "probe",
            "error",
            f"a result could not be stored and read: {exc} (worked: {done})",
            advice_on_refusal(str(exc), backend.options.shards)
            or f"check alarms, policies and permissions: {permissions(topology)}",
        )
        return
    finally:
        executor.shutdown(wait=False)
    if waited and found:
        spent = ", ".join(f"{name} {seconds * 1000:.0f} ms" for name, seconds in took)
        yield Finding("probe", "ok", f"a result was waited for, looked up and forgotten: {spent}")
    else:
        yield _lost("found any more" if waited else "pushed to who waits", topology.prefix)


def _lost(what: str, prefix: str) -> Finding:
    return Finding(
        "probe",
        "error",
        f"a result was stored, and is not {what}",
        "look for a policy that drops messages of these queues (message-ttl, max-length), and for "
        f"what deletes them: `rabbitmqctl list_queues name policy | grep {prefix}`",
    )


def _wait_for_inbox(inbox: Inbox, task_id: str, waiting: Future[List[Tuple[str, Meta]]]) -> None:
    """Wait until the broker pushes new states of a task to this process."""
    end = time.monotonic() + PROBE_TIMEOUT
    while not inbox.covers(task_id):
        if waiting.done():
            waiting.result()
            return
        if time.monotonic() > end:
            raise TimeoutError(f"no inbox within {PROBE_TIMEOUT:g} s")
        time.sleep(0.005)


def remove_traces(session: Session, broker: inspection.Broker) -> None:
    """Delete the exchange that the probe has declared, unless it is in use by now.

    Otherwise a look at a new broker would settle the number of shards. The probe's shard stays: a
    result that is routed to a queue while it is deleted is confirmed and lost.
    """
    session.backend.close()
    refusals = (amqp_errors.AccessRefused, amqp_errors.NotFound)
    # The binding of the probe's inbox goes a moment after its connection.
    end = time.monotonic() + TRACES_TIMEOUT
    while time.monotonic() < end:
        try:
            broker.channel.exchange_delete(broker.topology.exchange, if_unused=True)
        except amqp_errors.PreconditionFailed:
            time.sleep(0.02)
        except refusals:
            return
        else:
            return
