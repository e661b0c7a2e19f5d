"""Interrupts calls at chosen lines, as the handler of a signal does."""

from __future__ import annotations

import dis
import inspect
import sys
from types import CodeType
from typing import Any, Callable, Iterator


class Interrupted(BaseException):
    """What the handler raises."""


def at_each_line(function: Any, call: Callable[[], Any]) -> Iterator[int]:
    """Run *call* once for each line of *function*, and interrupt it before that line.

    Yields the number of the line after each call that has reached it. Python itself keeps signals
    from coming between a lock and its ``with`` block, so those lines are left out.
    """
    code = function.__code__
    source, first = inspect.getsourcelines(function)
    for line in sorted({number for _, number in dis.findlinestarts(code) if number}):
        statement = source[line - first].strip()
        if not statement.startswith("with ") and _is_interrupted(code, line, call):
            yield line


def _is_interrupted(code: CodeType, line: int, call: Callable[[], Any]) -> bool:
    def trace(frame: Any, event: str, argument: Any) -> Any:
        if frame.f_code is not code:
            return None
        if event == "line" and frame.f_lineno == line:
            sys.settrace(None)
            raise Interrupted
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interrupted:
        return True
    finally:
        sys.settrace(before)
    return False
