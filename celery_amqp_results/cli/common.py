"""The common part of all commands: the backend, exit codes, and errors as one line."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import logging
import math
import sys
from typing import Any, Callable, Iterator, NoReturn, Optional, Sequence, TypeVar

import amqp
import click
from celery.exceptions import CeleryError, ImproperlyConfigured, TimeoutError
from kombu.exceptions import KombuError, OperationalError

from celery_amqp_results import errors
from celery_amqp_results.backend import AMQPBackend
from celery_amqp_results.cli.output import Output, clean
from celery_amqp_results.library_types import App
from celery_amqp_results.options import RetryPolicy
from celery_amqp_results.shared_layout import SharedLayout

__all__ = ("Exit", "Failed", "Seconds", "Session", "command", "management_options")

_F = TypeVar("_F", bound=Callable[..., Any])

#: Short, since a user waits for the answer: an unreachable broker is reported soon.
RETRY_POLICY = RetryPolicy(max_retries=2, interval_start=0.2, interval_step=0.5)

#: The most seconds of an option, 23 days: a poll takes 2**31 ms, and nan and inf are no durations.
MAX_SECONDS = 2_000_000


class Exit(enum.IntEnum):
    """Exit codes. The last ones are those of ``sysexits.h`` that Celery uses as well."""

    OK = 0
    #: A task failed, or a problem was found.
    FAILED = 1
    USAGE = 2
    #: A task has not ended, or is unknown.
    NOT_READY = 3
    UNAVAILABLE = 69
    CONFIGURATION = 78
    INTERRUPTED = 130


class Seconds(click.FloatRange):
    """A number of seconds, at most as many as a poll of the system takes."""

    def __init__(self, min_open: bool = False) -> None:
        super().__init__(min=0, max=MAX_SECONDS, min_open=min_open)

    def convert(
        self, value: Any, param: Optional[click.Parameter], ctx: Optional[click.Context]
    ) -> Any:
        """Return the number, or fail."""
        seconds = super().convert(value, param, ctx)
        if math.isnan(seconds):
            self.fail(f"{value!r} is not a number of seconds.", param, ctx)
        return seconds


class Failed(click.ClickException):
    """Ends a command with a message and an exit code."""

    def __init__(self, message: str, code: Exit) -> None:
        super().__init__(clean(message))
        self.exit_code = code  # type: ignore[misc]


@dataclasses.dataclass
class Session:
    """The context of a command."""

    app: App
    backend: AMQPBackend
    output: Output
    #: The address of RabbitMQ's management API, and whether to guess it.
    management_url: Optional[str]
    guess_management: bool

    def shared_layout(self) -> SharedLayout:
        """The layout of the app's results.

        Raises:
            Failed: when it is another one.
        """
        layout = self.backend.layout
        if not isinstance(layout, SharedLayout):
            raise Failed(
                f"{click.get_current_context().info_name} works on the layout 'shared'; this app's "
                f"is {self.backend.layout_name!r}",
                Exit.CONFIGURATION,
            )
        return layout

    def end(self, code: Exit) -> NoReturn:
        """End the command with an exit code."""
        click.get_current_context().exit(code)


@contextlib.contextmanager
def report_errors() -> Iterator[None]:
    """Report foreign errors as one line, each with its exit code."""
    try:
        yield
    except (click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except KeyboardInterrupt:
        click.echo(err=True)
        click.get_current_context().exit(Exit.INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has closed it.
        with contextlib.suppress(OSError):
            sys.stdout.close()
        click.get_current_context().exit(Exit.OK)
    except (ImproperlyConfigured, errors.Unsupported) as exc:
        raise Failed(str(exc), Exit.CONFIGURATION) from exc
    except TimeoutError as exc:
        raise Failed(str(exc), Exit.NOT_READY) from exc
    except (OperationalError, amqp.AMQPError, OSError) as exc:
        raise Failed(str(exc) or repr(exc), Exit.UNAVAILABLE) from exc
    except (CeleryError, KombuError, errors.ForeignMessage) as exc:
        raise Failed(f"{type(exc).__name__}: {exc}", Exit.FAILED) from exc


def _open(app: App) -> AMQPBackend:
    """Return a backend for the command alone, configured like that of *app*."""
    try:
        theirs = app.backend
    except ImportError as exc:
        text = f"the app's result backend cannot be loaded: {exc}"
        raise Failed(text, Exit.CONFIGURATION) from exc
    except KeyError as exc:
        raise Failed(f"unknown result backend: {exc}", Exit.CONFIGURATION) from exc
    if not isinstance(theirs, AMQPBackend):
        kind = type(theirs)
        raise Failed(
            f"the app {app.main or 'default'!r} keeps its results in {kind.__module__}."
            f"{kind.__qualname__}, not in celery-amqp-results. Name your app with -A, as in "
            "`celery -A proj results ...`, and set result_backend = 'amqp://' in it.",
            Exit.CONFIGURATION,
        )
    # Its connections are closed with the command, and it gives up sooner.
    return theirs.clone("the command line", retry_policy=RETRY_POLICY)


def command(**attributes: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a function a command with the option ``--json``; it receives a :class:`Session`."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        @functools.wraps(function)
        def run(
            json_lines: bool,
            management_url: Optional[str] = None,
            no_management: bool = False,
            **kwargs: Any,
        ) -> Any:
            context = click.get_current_context()
            # In tests with click a context has no object; with Celery it always has.
            app = getattr(context.obj, "app", context.obj)
            # Standard output is for people or programs. With -q only errors are logged.
            logging.getLogger("celery_amqp_results").addHandler(logging.NullHandler())
            with report_errors():
                backend = _open(app)
                try:
                    output = Output(json_lines)
                    if getattr(context.obj, "no_color", False):
                        output.console = None
                    url = None if no_management else management_url
                    session = Session(app, backend, output, url, not no_management)
                    return function(session, **kwargs)
                finally:
                    backend.close()

        option = click.option(
            "--json", "json_lines", is_flag=True, help="Print JSON, for programs."
        )
        made: click.Command = click.command(**attributes)(option(run))
        return made

    return decorate


def management_options(function: _F) -> _F:
    """Add the options of commands that may use the management API; :class:`Session` has them."""
    function = click.option(
        "--management",
        "management_url",
        metavar="URL",
        envvar="RABBITMQ_MANAGEMENT_URL",
        help="RabbitMQ's management API, such as http://user:password@host:15672; by default it "
        "is looked for on the broker's host, with the broker's user.",
    )(function)
    return click.option("--no-management", is_flag=True, help="Ask nothing of the management API.")(
        function
    )


def check_ids(ids: Sequence[str], group: Optional[str] = None) -> None:
    """Fail if neither ids nor a group were given, or if an id is empty."""
    if not ids and group is None:
        raise click.UsageError("give the id of a task, or several")
    if any(not task_id.strip() for task_id in ids):
        raise click.UsageError("an id is empty")
