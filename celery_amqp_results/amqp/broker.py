"""The broker that keeps the results: its address, and connections that are not open yet."""

from __future__ import annotations

import functools
import weakref
from typing import Dict, Mapping, Union

import kombu

from celery_amqp_results import errors, options
from celery_amqp_results.amqp import transports
from celery_amqp_results.library_types import App

__all__ = ("ResultBroker",)

#: How TLS is set up: as ``broker_use_ssl``.
TLS = Union[bool, Mapping[str, object], None]


class ResultBroker:
    """Makes connections to the broker that keeps the results. Does no I/O itself.

    Parameters:
        app: the Celery app, which is not kept alive.
    """

    def __init__(self, app: App, url: options.ResultURL, use_ssl: TLS) -> None:
        self._app = weakref.ref(app)
        self.url = url
        self._use_ssl = use_ssl

    def connection(self, heartbeat: float = 0.0) -> kombu.Connection:
        """Return a connection that is not open.

        Parameters:
            heartbeat: seconds between heartbeats; 0 for none.

        Raises:
            BackendUnavailable: when the app is gone.
        """
        app = self._app()
        if app is None:
            raise errors.BackendUnavailable("the Celery app of this result backend is gone")
        return app.connection_for_write(self.url.broker, heartbeat=heartbeat, **self._tls(app))

    def _tls(self, app: App) -> Dict[str, object]:
        if self._use_ssl is not None:
            return {"ssl": self._use_ssl}
        secure = self.url.scheme in ("amqps", "pyamqps")
        if self.url.broker is not None:
            # The setting broker_use_ssl is for the broker of the tasks, perhaps another one.
            return {"ssl": secure}
        return {"ssl": True} if secure and not app.conf.broker_use_ssl else {}

    @functools.cached_property
    def place(self) -> kombu.Connection:
        """A connection that is never opened: it knows transport, host, user and virtual host."""
        return self.connection()

    def is_amqp(self) -> bool:
        """Return whether the broker speaks AMQP 0-9-1."""
        return transports.is_amqp(self.place)

    def is_that_of(self, connection: kombu.Connection) -> bool:
        """Return whether *connection* leads to this broker."""
        return (
            transports.is_amqp(connection)
            and connection.virtual_host == self.place.virtual_host
            and (
                connection.host == self.place.host
                or connection.as_uri(include_password=True) in (self.place.alt or ())
            )
        )

    def describe(self) -> str:
        """Return the broker's address without passwords, for messages."""
        app = self._app()
        if self.url.broker is not None or app is None:
            return self.url.sanitized()
        # The app's own broker: its address is more helpful than "amqp://".
        connection = app.connection_for_write()
        hosts = connection.alt or [connection.as_uri(include_password=True)]
        return options.parse_url(";".join(map(str, hosts))).sanitized()
