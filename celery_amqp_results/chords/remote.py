"""A remote-control command of workers: the chords they lead, and the progress of one.

Only the leader of a chord knows its header, and the leader is the main process of some worker. So
the question goes to all workers, by Celery's remote control, and the leader answers.
"""

from __future__ import annotations

from typing import Any, Dict

__all__ = ("COMMAND", "register")

#: Name of the command: ``celery -A proj inspect results_chord ID``.
COMMAND = "results_chord"


def register() -> None:
    """Add the command to the worker in this process."""
    # This imports the worker, which other processes do not need.
    from celery.worker.control import inspect_command

    inspect_command(name=COMMAND, args=[("key", str)], signature="[id of the header or the body]")(
        _answer
    )


def _answer(state: Any, key: str = "", **kwargs: object) -> Dict[str, object]:
    """Return the chords that this worker leads, or the progress of one of them."""
    layout = getattr(state.app.backend, "layout", None)
    chords = getattr(layout, "chords", None)
    if chords is None:
        return {"led": False}
    service = chords.service
    if not key:
        return {
            "led": bool(service.leads),
            "queues": service.leads,
            "open": service.open,
            "oldest_seconds": service.oldest_age(),
        }
    found = service.progress(key)
    if found is None:
        return {"led": False}
    tasks, missing = found
    return {"led": True, "tasks": tasks, "missing": list(missing)}
