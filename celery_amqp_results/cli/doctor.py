"""``results doctor``: finds present and future problems, with advice."""

from __future__ import annotations

from typing import Callable, Iterable, Iterator, List

import click
from amqp import exceptions as amqp_errors

from celery_amqp_results.cli import amqp_checks, inspection, management, management_checks, probe
from celery_amqp_results.cli.common import Exit, Failed, Session, command, management_options
from celery_amqp_results.cli.findings import Finding, show

__all__ = ("doctor",)

NO_MANAGEMENT = Finding(
    "management",
    "info",
    "the management API was not asked: policies and leftovers are unknown",
    "give its address with --management http://user:password@host:15672",
)


@command(name="doctor")
@click.option("--no-probe", is_flag=True, help="Do not store and read a result.")
@click.option("--strict", is_flag=True, help="Exit with 1 for warnings as well.")
@management_options
def doctor(session: Session, no_probe: bool, strict: bool) -> None:
    """Look for what is wrong, or will be, and say what to do.

    One result is stored, waited for, looked up and forgotten, unless --no-probe is given. Policies
    and leftovers are known from RabbitMQ's management API alone. Exits with 1 when there is an
    error.
    """
    findings: List[Finding] = []
    with inspection.Broker(session) as broker:

        def take(check: Callable[[], Iterable[Finding]]) -> bool:
            """Note the findings of a check; return whether there is no error among them."""
            before = len(findings)
            findings.extend(_run_check(check, broker))
            return all(finding.severity != "error" for finding in findings[before:])

        api = broker.management()
        take(lambda: amqp_checks.broker_findings(broker.properties))
        take(lambda: amqp_checks.embedding_findings(broker.properties, broker.topology.queue_type))
        # First, before anything is stored: shards cannot be changed afterwards.
        fits = take(lambda: management_checks.limit_findings(session, broker, api))
        # While publishers are blocked reads do not work either, and would time out.
        usable = take(lambda: amqp_checks.alarm_findings(broker))
        usable = take(lambda: amqp_checks.declaration_findings(session, broker)) and usable
        if usable:
            usable = take(lambda: amqp_checks.content_findings(session, broker))
            take(lambda: amqp_checks.chord_findings(broker))
        fresh = broker.exists(broker.topology.exchange) is False
        if usable and not no_probe and (fits or not fresh):
            take(lambda: probe.findings(session))
            if fresh:
                probe.remove_traces(session, broker)
        take(lambda: amqp_checks.old_exchange_findings(broker))
        if api is None:
            findings.append(NO_MANAGEMENT)
        else:
            for check in management_checks.checks(session, broker.topology, api):
                take(check)
    take(lambda: amqp_checks.setting_findings(session))
    worst = {finding.severity for finding in findings}
    show(session.output, findings)
    if "error" in worst or (strict and "warning" in worst):
        session.end(Exit.FAILED)


def _run_check(
    check: Callable[[], Iterable[Finding]], broker: inspection.Broker
) -> Iterator[Finding]:
    """Yield the findings of a check; a refusal is a finding as well."""
    try:
        yield from check()
    except amqp_errors.AccessRefused as exc:
        yield amqp_checks.refused(broker.topology, exc)
    except management.ManagementError as exc:
        yield management_checks.refused(exc)
    except Failed as exc:
        yield Finding(
            "contents",
            "error",
            exc.message,
            "try again later; if it stays so, find the reader that holds the queue (`rabbitmqctl "
            "list_consumers`), shorten result_expires or use more shards",
        )
