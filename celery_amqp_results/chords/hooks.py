"""Celery's calls about chords, passed on to the chords of the layout.

Celery calls its backend when a chord is sent, when a task of its header ends, and when its body
fails. :class:`ChordHooks` says what these calls mean here.
"""

from __future__ import annotations

from typing import Any, Callable, Iterable, Iterator, Mapping, Optional, Protocol, Tuple

from celery import signals
from celery.app.task import Context
from celery.canvas import Signature

from celery_amqp_results.chords import remote
from celery_amqp_results.chords.firing import last_links
from celery_amqp_results.chords.sending import Chords, expect_body
from celery_amqp_results.library_types import App

__all__ = ("ChordHooks",)


class RecordsParts(Protocol):
    """What notes and publishes the states of a chord's tasks."""

    def note_awaited(self, task_id: str) -> None:
        """Have the states of a task pushed to this process."""

    def record_part(self, task_id: str, group_id: str, meta: Mapping[str, Any]) -> None:
        """Publish what a task returned, unless its state was just stored."""


class ChordHooks:
    """Takes Celery's calls about chords. Thread-safe.

    Parameters:
        chords: returns the chords of the layout, ``None`` if that leaves them to Celery.
        expires: milliseconds without a new result after which a chord is abandoned.
    """

    def __init__(
        self,
        app: App,
        chords: Callable[[], Optional[Chords]],
        recorder: RecordsParts,
        expires: Optional[int],
    ) -> None:
        self._app = app
        self._chords_if_any = chords
        self._recorder = recorder
        self._expires = expires

    @property
    def _chords(self) -> Chords:
        chords = self._chords_if_any()
        assert chords is not None, "this layout leaves chords to Celery"
        return chords

    @property
    def supported(self) -> bool:
        """Whether the layout has chords. Otherwise Celery's base class polls with a task."""
        return self._chords_if_any() is not None

    def apply(self, header_result_args: Tuple[str, Iterable[object]], body: Signature) -> None:
        """Note a chord whose header is about to be sent. Does no I/O, and keeps no task of it."""
        expect_body(self._app, body, self._recorder.note_awaited)
        current = self._app.current_worker_task
        root_id = None if current is None else current.request.root_id or current.request.id
        self._chords.prepare(*header_result_args, body, self._expires, root_id)

    def publish_plan(self, group_id: str) -> None:
        """Publish the plan of a chord, just before the last task of its header is sent."""
        self._chords.publish_plan(group_id)

    def add(self, group_id: str, result: object) -> None:
        """Add one task or group to a chord; the present task is of its header."""
        current = self._app.current_worker_task
        after = None if current is None else current.request.id
        self._chords.publish_amendment(group_id, result, after, self._expires)

    def part_returned(self, request: Context, state: str, result: object) -> None:
        """Tell the leader of a chord what a task of its header returned.

        Publishes nothing if the stored state says so and is kept long enough. May be called any
        number of times for a task.
        """
        if request.id and request.group:
            meta = {"status": state, "result": result, "task_id": request.id}
            self._recorder.record_part(request.id, request.group, meta)

    def enclosing(self, callback: Signature) -> Iterator[Context]:
        """Yield a request for each chord that waits for a body which has failed.

        A body may be a task of the header of another chord, which would wait for ever. Celery
        stores the failure of the body alone.
        """
        for signature in last_links(callback, self._app):
            options = signature.options
            if options.get("chord"):
                yield Context(
                    id=options.get("task_id"),
                    group=options.get("group_id"),
                    group_index=options.get("group_index"),
                    chord=options["chord"],
                )

    def lead(self) -> None:
        """Start to lead chords, in the main process of a worker that is ready."""
        if self.supported:
            remote.register()
            self._chords.service.start(met=False)


def _on_worker_ready(sender: Any = None, **kwargs: object) -> None:
    hooks = getattr(sender.app.backend, "chords", None)
    if isinstance(hooks, ChordHooks):
        hooks.lead()


signals.worker_ready.connect(_on_worker_ready, weak=False)
