"""The abilities that layouts are registered with are there."""

from __future__ import annotations

import inspect
from typing import Type

import pytest

from celery_amqp_results import layouts
from celery_amqp_results.per_task.layout import PerTaskLayout
from celery_amqp_results.shared_layout import SharedLayout

ABILITIES = (
    layouts.NotesSent,
    layouts.KeepsParts,
    layouts.KeepsMarks,
    layouts.KeepsBodies,
    layouts.LimitsBacklog,
)


@pytest.mark.parametrize("kind", [SharedLayout, PerTaskLayout])
@pytest.mark.parametrize("ability", ABILITIES)
def test_a_layout_has_the_methods_of_its_abilities_and_no_other(
    kind: Type[object], ability: Type[object]
) -> None:
    names = ability.__abstractmethods__  # type: ignore[attr-defined]
    assert names
    if not issubclass(kind, ability):
        assert not any(hasattr(kind, name) for name in names)
        return
    for name in names:
        wanted = inspect.signature(getattr(ability, name)).parameters
        assert list(inspect.signature(getattr(kind, name)).parameters) == list(wanted)
