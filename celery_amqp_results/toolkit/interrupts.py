"""Telling errors of the network from those that a program's signal handler raises."""

from __future__ import annotations

from typing import List

__all__ = ("raise_if_from_signal_handler",)


def raise_if_from_signal_handler(exc: BaseException) -> None:
    """Raise *exc* again if a signal handler of the program raised it.

    Such a handler may raise ``TimeoutError`` or another ``OSError``, which would otherwise look
    like a network error, and the interrupted call would go on.
    """
    traceback = exc.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        interrupted, called = traceback.tb_frame, traceback.tb_next.tb_frame
        # Python passes a handler the frame that it interrupts. No other function is passed its
        # caller's.
        given: List[object] = []
        for value in called.f_locals.values():
            given += value if isinstance(value, tuple) else (value,)
        if any(value is interrupted for value in given):
            raise exc
        traceback = traceback.tb_next
