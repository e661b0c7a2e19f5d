"""The app of a worker with the tasks of :mod:`tests.worker.tasks` and those of chords."""

from __future__ import annotations

from tests.worker.chord_tasks import register
from tests.worker.tasks import app

tasks = register(app)
