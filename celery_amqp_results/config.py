"""The configuration of a backend, from Celery's settings, the result URL and the options.

Nothing here does I/O. It may import ``options`` and what is below it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Iterable, Mapping, NamedTuple, Optional, Tuple

from celery import states
from celery.exceptions import ImproperlyConfigured
from kombu.compression import encoders, get_encoder

from celery_amqp_results import errors
from celery_amqp_results.amqp import transports
from celery_amqp_results.amqp.broker import ResultBroker
from celery_amqp_results.library_types import App
from celery_amqp_results.options import Options, ResultURL, parse_url
from celery_amqp_results.per_task.wire import Wire
from celery_amqp_results.protocol import expiry
from celery_amqp_results.protocol.codec import Codec
from celery_amqp_results.protocol.names import Topology

__all__ = ("BackendConfig", "Expirations", "Location", "Own", "expiry_of")


@dataclasses.dataclass(frozen=True)
class Expirations:
    """Milliseconds after which states expire, ``None`` for never."""

    #: The setting ``result_expires``.
    result: Optional[int]
    #: The setting ``result_failure_expires``, for the state FAILURE.
    failure: Optional[int]
    #: The setting ``result_chord_expires``, for what a chord needs until it is fired.
    chord: Optional[int]

    @classmethod
    def read(cls, conf: Any, expires: Optional[float]) -> Expirations:
        """Read the expirations from the settings *conf*.

        Parameters:
            expires: seconds that results are kept.

        Raises:
            ImproperlyConfigured: when a setting is not an expiry.
        """
        result = expiry.milliseconds(expires)

        def other(name: str) -> Optional[int]:
            value = conf.get(name)
            return result if value is None else expiry.milliseconds(expiry_of(name, value))

        return cls(result, other("result_failure_expires"), other("result_chord_expires"))

    def of(self, state: str) -> Optional[int]:
        """Return the milliseconds after which *state* expires, ``None`` for never."""
        if state == states.FAILURE:
            return self.failure
        if state in states.READY_STATES or self.failure is None:
            return self.result
        # An earlier state must not outlive the final one: the task would seem to run again.
        return self.failure if self.result is None else min(self.result, self.failure)


@dataclasses.dataclass(frozen=True)
class Location:
    """Where results are kept and how they get there: the URL, the options and the layout."""

    url: ResultURL
    options: Options
    broker: ResultBroker = dataclasses.field(repr=False, compare=False)
    #: ``shared`` or ``per-task``.
    layout_name: str
    #: How many connections may be open at once, ``None`` for any number: ``broker_pool_limit``.
    max_connections: Optional[int]

    @classmethod
    def read(cls, app: App, url: Optional[str], given: Optional[Options]) -> Location:
        """Return the location of results for the settings of *app* and the result backend URL.

        Parameters:
            given: options that replace those of the settings and the URL.

        Raises:
            InvalidOption: when an option is unknown or its value is not allowed.
        """
        parsed = parse_url(url)
        options = given or Options.read(
            app.conf.result_backend_transport_options or {}, parsed.options
        )
        broker = ResultBroker(app, parsed, options.use_ssl)
        layout = _choose_layout(broker, options.layout)
        if options.track_sent:
            _check_tracking(app, broker, layout)
        return cls(parsed, options, broker, layout, app.conf.broker_pool_limit or None)


class Own(NamedTuple):
    """The arguments of a backend and the values that follow from them."""

    #: First part of all names; ``None`` for the setting.
    exchange: Optional[str]
    exchange_type: Optional[str]
    persistent: bool
    auto_delete: bool
    #: Seconds that results are kept, ``None`` for ever.
    expires: Optional[float]
    #: Distinguishes backends with connections of their own; empty for those that share the app's.
    purpose: str


@dataclasses.dataclass(frozen=True)
class BackendConfig(Location):
    """Everything that a backend reads from its app's settings, its URL and its arguments."""

    topology: Topology
    #: The objects that the layout ``per-task`` declares and publishes.
    wire: Wire
    codec: Codec
    expirations: Expirations
    #: Content types that may be read.
    accept: Tuple[str, ...]
    #: As in :class:`Own`.
    purpose: str

    @classmethod
    def complete(
        cls,
        conf: Any,
        location: Location,
        own: Own,
        serializer: str,
        accept: Optional[Iterable[str]],
    ) -> BackendConfig:
        """Return the configuration that follows from the settings *conf*, URL and arguments.

        Raises:
            ImproperlyConfigured: when a setting is of no use.
        """
        prefix = own.exchange or conf.result_exchange
        wire = Wire(
            prefix,
            own.exchange_type or conf.result_exchange_type,
            own.persistent,
            own.auto_delete,
            own.expires,
            bool(conf.find_value_for_key("extended", "result")),
        )
        return cls(
            **vars(location),
            topology=Topology(prefix, location.options.shards, location.options.queue_type),
            wire=wire,
            # Celery before 5.7 leaves the setting to the backends.
            codec=codec_of(location, serializer, accept, conf.result_compression),
            expirations=Expirations.read(conf, own.expires),
            accept=tuple(sorted(accept or ())),
            purpose=own.purpose,
        )

    def shape(self, meta: Mapping[str, object]) -> Mapping[str, object]:
        """Return the fields of a meta that are written."""
        return meta if self.layout_name == "shared" else self.wire.shape(meta)

    @functools.cached_property
    def layout_key(self) -> str:
        """The key that is equal for backends that share a layout, and so its connections."""
        parts = (self.options, self.layout_name, self.wire, self.accept, self.purpose)
        return repr((self.url.complete(), *parts))


def codec_of(
    location: Location, serializer: str, accept: Optional[Iterable[str]], compression: Optional[str]
) -> Codec:
    """Return the codec that the settings ask for. Celery 4's messages have no compression.

    Raises:
        ImproperlyConfigured: when kombu does not know the compression.
    """
    if location.layout_name != "shared":
        compression = None
    if compression:
        try:
            get_encoder(compression)
        except KeyError as exc:
            raise ImproperlyConfigured(
                f"result_compression is {compression!r}, which kombu does not know; it knows "
                f"{', '.join(sorted(encoders()))}"
            ) from exc
    return Codec(serializer, accept, compression or None, location.options.max_decompressed_size)


def expiry_of(name: str, value: object) -> Optional[float]:
    """Return the expiry that the setting *name* gives in seconds, ``None`` for never.

    Raises:
        ImproperlyConfigured: when it is not an expiry.
    """
    try:
        return expiry.seconds(value)
    except ValueError as exc:
        raise ImproperlyConfigured(f"{name}: {exc}") from None


def _choose_layout(broker: ResultBroker, wanted: Optional[str]) -> str:
    """Return the *wanted* layout, or the default for the transport."""
    if broker.is_amqp():
        return wanted or "shared"
    if wanted == "shared":
        raise errors.InvalidOption(
            "the layout 'shared' needs RabbitMQ; the transport "
            f"{transports.transport_name(broker.place)!r} can do 'per-task'"
        )
    return "per-task"


def _check_tracking(app: App, broker: ResultBroker, layout: str) -> None:
    if layout != "shared":
        raise errors.InvalidOption(
            f"the option 'track_sent' needs the layout 'shared', and the layout is {layout!r}"
        )
    here, there = app.connection_for_write(), broker.place
    if (here.host, here.virtual_host) != (there.host, there.virtual_host):
        raise errors.InvalidOption(
            "the option 'track_sent' needs results on the broker of the tasks, since the marks go "
            f"with these; here results go to {broker.url.sanitized()} and tasks elsewhere"
        )
