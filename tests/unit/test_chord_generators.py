"""The generators of headers: results of tasks are taken ahead while the tasks are sent."""

from __future__ import annotations

from typing import Iterator, List

from celery.utils.functional import regen

from celery_amqp_results.chords import sending


def test_a_generator_that_sends_tasks_itself_runs_to_its_end() -> None:
    taken: List[int] = []

    def header() -> Iterator[int]:
        for number in range(6):
            # What Celery's signal calls after each task that is published.
            sending._take_ahead()
            taken.append(number)
            yield number

    results = regen(header())
    sending._follow_generator("header", results)
    assert taken
    sending._take_ahead()
    # Only tasks of the header count.
    assert sending._lazy.headers["header"].published == 2
    assert sending._forget_generator("header") is None
    assert list(results) == list(range(6))
