"""Makes the pictures of the command line in ``docs/images/``, on a private RabbitMQ node.

    python -m tools.screenshots

The pictures show the real output of the commands, recorded by a rich console. The states are
stored as a worker stores them.
"""

from __future__ import annotations

import contextlib
import io
import re
import threading
import uuid
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional
from unittest import mock

import click
from celery import Celery, states
from celery.bin.base import CLIContext
from rich.console import Console

from celery_amqp_results.cli import output, results
from celery_amqp_results.cli.board import Board, picture
from celery_amqp_results.cli.describing import describe
from tools import rabbitmq

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "images"
WIDTH = 100


def recorder() -> Console:
    """Return a console that records and prints nothing."""
    return Console(
        record=True,
        width=WIDTH,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
    )


def save(console: Console, name: str, title: str) -> None:
    """Write what *console* has recorded."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.svg"
    svg = console.export_svg(title=title, unique_id=name)
    # Viewers must not fetch fonts from elsewhere.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S)
    path.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n", encoding="utf-8")
    print(f"{path} ({path.stat().st_size // 1024} KiB)")


def shot(app: Celery, name: str, *arguments: str) -> None:
    """Run a command and write what it prints."""
    console = recorder()

    class Recorded(output.Output):
        def __init__(self, json_lines: bool = False) -> None:
            super().__init__(json_lines)
            self.console = console

    with mock.patch("celery_amqp_results.cli.common.Output", Recorded):
        context = CLIContext(app=app, no_color=False, workdir=None)
        with contextlib.suppress(click.exceptions.Exit):
            results.main(list(arguments), obj=context, standalone_mode=False)
    shown = [a if len(a) < 30 else f"{a[:8]}…" for a in arguments if a != "--no-management"]
    save(console, name, f"celery -A proj results {' '.join(shown)}")


def shot_of_watch(app: Celery, store: Callable[..., str]) -> None:
    """Watch tasks that report their progress, and save a picture of that moment."""
    board = Board()
    bars = [str(uuid.uuid4()) for _ in range(6)]

    def work() -> None:
        for n in range(30):
            store(n * n)
            if n % 10 == 7:
                store(ConnectionError("api.example.com timed out"), states.FAILURE)
        for task_id, done in zip(bars, (93, 71, 64, 48, 22, 5)):
            store({"current": done, "total": 100}, "PROGRESS", task_id)

    tap = app.backend.layout.tap()
    with tap:
        tap.step(None, 0.1)
        thread = threading.Thread(target=work)
        thread.start()
        seen: Dict[str, Any] = {}
        while bars[-1] not in seen:
            for state in tap.step(None, 1.0):
                seen[state.id] = app.backend.reader.decode(state)
                board.take(describe(state.id, seen[state.id]))
        thread.join()
    console = recorder()
    console.print(picture(board, "watching everything"))
    save(console, "watch", "celery -A proj results watch")


def main(distribution: str = "system") -> int:
    """Make all pictures."""
    with rabbitmq.Node(rabbitmq.distribution(distribution)) as node:
        app = Celery("proj", broker=node.url(), backend="amqp://", set_as_current=False)
        app.conf.result_backend_transport_options = {"shards": 16}

        def store(
            value: Any, state: str = states.SUCCESS, task_id: Optional[str] = None, **more: Any
        ) -> str:
            task_id = task_id or str(uuid.uuid4())
            app.backend.store_result(task_id, value, state, **more)
            return task_id

        ids: List[str] = [store({"sum": 42, "rows": 1200})]
        ids.append(
            store(
                KeyError("customer 17"),
                states.FAILURE,
                traceback='Traceback (most recent call last):\n  File "proj/tasks.py", line 12, '
                "in load\n    return customers[key]\nKeyError: 'customer 17'",
            )
        )
        shot_of_watch(app, store)
        for n in range(500):
            store(n)
        shot(app, "get", "get", *ids)
        shot(app, "stats", "stats", "--no-management", "--read", "all")
        shot(app, "doctor", "doctor", "--no-management")
        app.backend.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
