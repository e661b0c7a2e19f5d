"""``celery -A proj results ...``: the command line, found by Celery by its entry point.

Celery imports this package at every ``celery`` command. Only rich is imported when it is needed.
"""

from __future__ import annotations

import click

from celery_amqp_results.cli.chord import chord
from celery_amqp_results.cli.doctor import doctor
from celery_amqp_results.cli.migrate import migrate
from celery_amqp_results.cli.purge import purge
from celery_amqp_results.cli.reading import forget, get
from celery_amqp_results.cli.stats import stats
from celery_amqp_results.cli.watch import watch

__all__ = ("results",)


@click.group(name="results")
def results() -> None:
    """Read, watch and look after task results that are kept in RabbitMQ.

    Exit codes: 0 all is well, 1 a task failed or something is wrong, 2 wrong usage, 3 a task has
    not ended or is not known, 69 the broker cannot be reached or refuses us, 78 the app's
    configuration is wrong or has another result backend, 130 interrupted.
    """


for _command in (get, watch, forget, chord, stats, doctor, purge, migrate):
    results.add_command(_command)
