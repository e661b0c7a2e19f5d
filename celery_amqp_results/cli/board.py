"""The summary of the states that a command has seen, as a live picture or as lines."""

from __future__ import annotations

import collections
import contextlib
import time
from typing import Any, Deque, Iterator, List, Optional, Tuple

from celery import states as celery_states

from celery_amqp_results.cli.describing import Described
from celery_amqp_results.cli.output import STYLES, Output, age, clean
from celery_amqp_results.protocol.ranking import is_final

__all__ = ("Board", "line_of", "live", "picture")

#: Seconds over which throughput is averaged.
RATE_SECONDS = 10.0
#: The most progress bars, and lines of recent states, on a terminal.
MAX_BARS = 12
MAX_RECENT = 12
#: Seconds that the bar of an ended task stays.
LINGER_SECONDS = 3.0
#: The most tasks whose progress is remembered.
MAX_REMEMBERED = 1000
#: Frames per second.
FRAMES = 8


def progress_of(described: Described) -> Optional[Tuple[float, float]]:
    """Return ``(current, total)`` of a task that reports them, or ``None``."""
    result = described["result"]
    if not isinstance(result, dict) or described["ready"]:
        return None
    current, total = result.get("current"), result.get("total")
    for number in (current, total):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            return None
    assert current is not None
    assert total is not None
    return (float(current), float(total)) if 0 <= current <= total and total > 0 else None


class Board:
    """A summary of all states seen so far. Does no I/O."""

    def __init__(self, expected: Optional[int] = None) -> None:
        #: How many tasks will end, if that is known.
        self.expected = expected
        self.started = time.monotonic()
        self.counts: collections.Counter[str] = collections.Counter()
        self.recent: Deque[Tuple[float, Described]] = collections.deque(maxlen=MAX_RECENT)
        #: By task id: progress, and the time of the report or of the task's end.
        self.bars: collections.OrderedDict[str, Tuple[float, float, str, float]] = (
            collections.OrderedDict()
        )
        self._ended: Deque[float] = collections.deque()

    def take(self, described: Described) -> None:
        """Note a state."""
        now = time.monotonic()
        task_id, state = described["id"], described["state"]
        self.counts[state] += 1
        progress = progress_of(described)
        if progress is not None:
            self.bars[task_id] = (*progress, state, now)
            if len(self.bars) > MAX_REMEMBERED:
                self.bars.popitem(last=False)
        else:
            self.recent.append((now, described))
        if described["ready"]:
            self._ended.append(now)
            if task_id in self.bars:
                current, total, _, _ = self.bars[task_id]
                done = total if state == celery_states.SUCCESS else current
                self.bars[task_id] = (done, total, state, now)

    @property
    def ended(self) -> int:
        """How many tasks have ended."""
        return sum(count for state, count in self.counts.items() if is_final(state))

    @property
    def failed(self) -> int:
        """How many have failed or were revoked."""
        return sum(
            c
            for s, c in self.counts.items()
            if s in celery_states.PROPAGATE_STATES and s != "RETRY"
        )

    def rate(self) -> float:
        """Return the number of tasks that end per second."""
        now = time.monotonic()
        while self._ended and self._ended[0] < now - RATE_SECONDS:
            self._ended.popleft()
        seconds: float = min(now - self.started, RATE_SECONDS)
        return len(self._ended) / max(seconds, 0.1)

    def live_bars(self) -> List[Tuple[str, float, float, str]]:
        """Return the bars to show: id, current, total and state."""
        now = time.monotonic()
        for task_id, (_, _, state, when) in list(self.bars.items()):
            if is_final(state) and now - when > LINGER_SECONDS:
                del self.bars[task_id]
        return [(i, c, t, s) for i, (c, t, s, _) in list(self.bars.items())[-MAX_BARS:]]


def shorten(value: object, width: int = 60) -> str:
    """Return *value* on one line of at most *width* characters."""
    text = clean(value if isinstance(value, str) else repr(value)).replace("\n", " ")
    return text if len(text) <= width else text[: width - 1] + "…"


def saying(described: Described, width: int = 60) -> str:
    """Return a summary of a state, in one line."""
    if described["error"] is not None:
        error = described["error"]
        if isinstance(error, BaseException):
            return shorten(f"{type(error).__name__}: {error}", width)
        return shorten(error, width)
    progress = progress_of(described)
    if progress is not None:
        return f"{progress[0]:g} of {progress[1]:g}"
    return "" if described["result"] is None else shorten(repr(described["result"]), width)


def picture(board: Board, title: str) -> Any:
    """Return the live picture for a terminal, as a rich object."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    parts = _summary(board)
    for grid in (_bars(board), _recent(board)):
        if grid is not None:
            parts += [Text(), grid]
    return Panel(
        Group(*parts),
        title=Text(title, style="bold"),
        title_align="left",
        border_style="red" if board.failed else "cyan",
        padding=(0, 1),
    )


def _summary(board: Board) -> List[Any]:
    """Return the lines with counts, and the bar of all tasks."""
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    head = Text()
    head.append(f"{board.ended:,}", style="bold")
    head.append(f" of {board.expected:,} ended" if board.expected else " ended")
    head.append(f"   {board.rate():,.1f}/s", style="bold cyan")
    head.append("   ")
    head.append(f"{board.failed:,} failed", style="bold red" if board.failed else "dim")
    head.append(f"   {age(time.monotonic() - board.started)}", style="dim")
    counts = Text()
    for state, count in sorted(board.counts.items()):
        counts.append(f" {clean(state)} ", style=f"reverse {STYLES.get(state, 'blue')}")
        counts.append(f" {count:,}   ")
    parts: List[Any] = [head, counts]
    if board.expected:
        done = board.ended == board.expected
        parts.append(
            ProgressBar(
                total=board.expected,
                completed=board.ended,
                complete_style="green" if done else "cyan",
                finished_style="red" if board.failed else "green",
            )
        )
    return parts


def _bars(board: Board) -> Any:
    """Return the progress of tasks that report it, or ``None``."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    bars = board.live_bars()
    if not bars:
        return None
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(no_wrap=True, style="dim", width=12)
    grid.add_column(no_wrap=True, width=10)
    grid.add_column(ratio=1)
    grid.add_column(justify="right", no_wrap=True)
    for task_id, current, total, state in bars:
        finished = "red" if state == "FAILURE" else "green"
        grid.add_row(
            Text(clean(task_id)[:12]),
            Text(clean(state)[:10], style=STYLES.get(state, "blue")),
            ProgressBar(total, current, complete_style="cyan", finished_style=finished),
            Text(f"{current / total:4.0%}  {current:g}/{total:g}"),
        )
    return grid


def _recent(board: Board) -> Any:
    """Return the latest states, or ``None``."""
    from rich.table import Table
    from rich.text import Text

    if not board.recent:
        return None
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(no_wrap=True, style="dim", width=8)
    grid.add_column(no_wrap=True, width=36)
    grid.add_column(no_wrap=True, width=10)
    grid.add_column(no_wrap=True, ratio=1, overflow="ellipsis")
    for when, described in board.recent:
        state = described["state"]
        grid.add_row(
            f"{when - board.started:7.1f}s",
            Text(clean(described["id"])[:36]),
            Text(clean(state)[:10], style=STYLES.get(state, "blue")),
            Text(saying(described, 80)),
        )
    return grid


@contextlib.contextmanager
def live(output: Output, board: Board, title: str, transient: bool = False) -> Iterator[None]:
    """Show the live picture while the block runs, on a terminal; a *transient* one disappears."""
    if output.console is None:
        yield
        return
    from rich.live import Live

    with Live(
        get_renderable=lambda: picture(board, title),
        console=output.console,
        refresh_per_second=FRAMES,
        transient=transient,
    ):
        yield


def line_of(described: Described) -> str:
    """Return a state as one line, for people."""
    now = time.strftime("%H:%M:%S")
    return f"{now} {described['id']} {described['state']} {saying(described, 100)}".rstrip()
