"""Methods of an object that another object carries out."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Callable, TypeVar

if TYPE_CHECKING:
    # Part of typing since Python 3.10; type checkers know it for all versions.
    from typing_extensions import Concatenate, ParamSpec

    P = ParamSpec("P")

__all__ = ("delegated",)

R = TypeVar("R")


def delegated(
    attribute: str, method: Callable[Concatenate[Any, P], R]
) -> Callable[Concatenate[Any, P], R]:
    """Return a method that calls *method* of the object in *attribute*, documented as that is."""

    @functools.wraps(method)
    def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return method(getattr(self, attribute), *args, **kwargs)

    return call
