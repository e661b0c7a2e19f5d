"""The options of the backend, read and checked.

They come from two places: the setting ``result_backend_transport_options`` and the query of the
result URL (``amqp://host/vhost?shards=64``); the URL wins. An option that is unknown or has a bad
value is an error that names the option, the value and the allowed values: a typing error must not
become a silent default. This module does no I/O.
"""

from __future__ import annotations

import dataclasses
import math
import re
import ssl
from typing import Any, Callable, Dict, Mapping, Optional, Tuple, Union
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from celery_amqp_results import errors

__all__ = ("Options", "ResultURL", "RetryPolicy", "parse_url")

LAYOUTS = ("shared", "per-task")
QUEUE_TYPES = ("classic", "quorum")

#: More shards than this cost more to declare than they save in look-ups.
MAX_SHARDS = 4096

#: Schemes of a result URL that mean AMQP 0-9-1; ``+`` and what follows it is a transport's own.
AMQP_SCHEMES = frozenset({"amqp", "amqps", "pyamqp", "pyamqps"})

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


@dataclasses.dataclass(frozen=True)
class RetryPolicy:
    """How often, and with which pauses, a failed operation on the broker is retried.

    The names are those of kombu's ``retry_policy`` and of Celery's other backends.
    """

    #: How many times to try again before giving up; ``None`` is for ever.
    max_retries: Optional[int] = 20
    #: Seconds before the first new try.
    interval_start: float = 0.0
    #: Seconds added to the pause at each further try.
    interval_step: float = 1.0
    #: The longest pause, in seconds.
    interval_max: float = 1.0

    def pause(self, attempt: int) -> Optional[float]:
        """Return the seconds to wait before try number *attempt* (1 is the first new try).

        Returns ``None`` if there must be no further try.
        """
        if self.max_retries is not None and attempt > self.max_retries:
            return None
        return min(self.interval_start + self.interval_step * (attempt - 1), self.interval_max)


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the backend beyond Celery's own settings.

    All processes that share results must have the same ``layout``, ``shards`` and ``queue_type``.
    """

    #: ``shared``, ``per-task``, or ``None``: shared on AMQP brokers, per-task on other transports.
    layout: Optional[str] = None
    #: How many queues hold the results.
    shards: int = 256
    #: Type of these queues: ``classic``, or ``quorum`` for a cluster.
    queue_type: str = "classic"
    #: Whether ``store_result`` of a final state waits until the broker has it.
    confirm: bool = True
    #: Time limit of a look-up, in seconds.
    lookup_timeout: float = 10.0
    #: Bytes of results that are packed into one message, at most.
    page_size: int = 256 * 1024
    #: Bytes of an encoded result up to which it is kept in a shard; a larger one has its own queue.
    inline_limit: int = 128 * 1024
    #: About how many bytes of memory a process uses for its knowledge of tasks.
    view_memory: int = 32 * 1024 * 1024
    #: Most bytes of a compressed result after decompression.
    max_decompressed_size: int = 128 * 1024 * 1024
    #: Whether to record that a task was sent, has ended, or was forgotten.
    track_sent: bool = False
    #: Whether the backend declares the exchange and the shard queues; otherwise they must exist.
    declare: bool = True
    #: TLS of the connections for results, as in ``broker_use_ssl``; ``None`` to follow the URL.
    use_ssl: Union[bool, Mapping[str, object], None] = None
    #: How connecting and publishing are retried.
    retry_policy: RetryPolicy = RetryPolicy()

    @classmethod
    def read(
        cls,
        settings: Optional[Mapping[str, object]] = None,
        query: Optional[Mapping[str, str]] = None,
    ) -> Options:
        """Return the options given by *settings* and, winning over them, by a URL's *query*.

        Parameters:
            settings: the value of ``result_backend_transport_options``.
            query: the pairs of a URL's query; all values are strings.

        Raises:
            InvalidOption: when an option is unknown or its value is not allowed.
        """
        if settings is not None and not isinstance(settings, Mapping):
            raise errors.InvalidOption(
                f"result_backend_transport_options must be a dict, not {settings!r}"
            )
        values: Dict[str, Any] = {}
        for source, given in (
            ("result_backend_transport_options", settings or {}),
            ("the result backend URL", _with_tls(query or {})),
        ):
            for name, value in given.items():
                parser = _PARSERS.get(name)
                if parser is None:
                    raise errors.InvalidOption(
                        f"unknown option {name!r} in {source} (its value is {value!r}); "
                        f"known options are: {', '.join(sorted(_PARSERS))}"
                    )
                try:
                    values[name] = parser(value)
                except ValueError as exc:
                    raise errors.InvalidOption(
                        f"invalid value {value!r} for option {name!r} in {source}: {exc}"
                    ) from None
        return cls(**values)

    def changed(self, changes: Mapping[str, object]) -> Options:
        """Return these options with *changes*.

        Raises:
            InvalidOption: when an option is unknown or its value is not allowed.
        """
        given = {name: value for name, value in vars(self).items() if value is not None}
        return Options.read({**given, **changes})


def _one_of(*allowed: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if value not in allowed:
            raise ValueError(f"allowed are {' and '.join(map(repr, allowed))}")
        return str(value)

    return parse


def _integer(low: int, high: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"allowed are whole numbers from {low} to {high}")
        return value

    return parse


def _seconds(low: float, high: float) -> Callable[[object], float]:
    def parse(value: Any) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not low <= number <= high:
            raise ValueError(f"allowed are seconds from {low:g} to {high:g}")
        return number

    return parse


def _boolean(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        if value.lower() in _TRUE:
            return True
        if value.lower() in _FALSE:
            return False
    raise ValueError("allowed are true and false")


def _tls(value: object) -> Union[bool, Mapping[str, object]]:
    if not isinstance(value, Mapping):
        return _boolean(value)
    unknown = sorted(set(value) - _TLS_NAMES)
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is unknown to py-amqp; known are {', '.join(sorted(_TLS_NAMES))}"
        )
    return dict(value)


def _with_tls(query: Mapping[str, str]) -> Mapping[str, object]:
    """Return *query* with ``use_ssl`` in place of its ``ssl_...``, which redis:// has as well.

    Raises:
        InvalidOption: when there is no such option or its value is not allowed.
    """
    rest: Dict[str, object] = {}
    tls: Dict[str, object] = {}
    for name, value in query.items():
        if not name.startswith("ssl_"):
            rest[name] = value
            continue
        if name not in _TLS_QUERY:
            raise errors.InvalidOption(
                f"unknown option {name!r} in the result backend URL (its value is {value!r}); "
                f"known options of TLS are: {', '.join(sorted(_TLS_QUERY))}"
            )
        tls[name[len("ssl_") :]] = value
    if "cert_reqs" in tls:
        value = query["ssl_cert_reqs"]
        try:
            tls["cert_reqs"] = ssl.VerifyMode["CERT_" + value.upper().replace("CERT_", "", 1)]
        except KeyError:
            raise errors.InvalidOption(
                f"invalid value {value!r} for option 'ssl_cert_reqs' in the result backend URL: "
                "allowed are none, optional, required"
            ) from None
    return {**rest, "use_ssl": tls} if tls else rest


def _retry_policy(value: object) -> RetryPolicy:
    if isinstance(value, RetryPolicy):
        return value
    if not isinstance(value, Mapping):
        raise ValueError("it must be a dict")
    retries = _integer(0, 10**6)
    seconds = _seconds(0, 3600)
    policy: Dict[str, Any] = {}
    for name, item in value.items():
        try:
            if name == "max_retries":
                # None is kombu's word for "for ever".
                policy[name] = None if item is None else retries(item)
            elif name in ("interval_start", "interval_step", "interval_max"):
                policy[name] = seconds(item)
            else:
                raise ValueError(
                    "known entries are interval_max, interval_start, interval_step and max_retries"
                )
        except ValueError as exc:
            raise ValueError(f"entry {name!r}: {exc}") from None
    return RetryPolicy(**policy)


#: The TLS options that py-amqp accepts.
_TLS_NAMES = frozenset(
    {
        "ca_certs",
        "cert_reqs",
        "certfile",
        "ciphers",
        "context",
        "keyfile",
        "server_hostname",
        "ssl_version",
    }
)

#: Those that a URL's query may hold.
_TLS_QUERY = frozenset(f"ssl_{name}" for name in _TLS_NAMES - {"context", "ssl_version"})

_PARSERS: Dict[str, Callable[[object], object]] = {
    "layout": _one_of(*LAYOUTS),
    "shards": _integer(1, MAX_SHARDS),
    "queue_type": _one_of(*QUEUE_TYPES),
    "confirm": _boolean,
    "lookup_timeout": _seconds(0.1, 3600),
    "page_size": _integer(1024, 8 * 1024 * 1024),
    "track_sent": _boolean,
    "inline_limit": _integer(1024, 8 * 1024 * 1024),
    "view_memory": _integer(0, 999_999_999),
    "max_decompressed_size": _integer(1024, 999_999_999),
    "declare": _boolean,
    "use_ssl": _tls,
    "retry_policy": _retry_policy,
}


@dataclasses.dataclass(frozen=True)
class ResultURL:
    """A result backend URL taken apart.

    ``broker`` is what kombu connects to, without our options: one URL, or several separated by
    ``;``. It is ``None`` where the URL names no server of its own, so the app's broker is meant.
    """

    scheme: str
    broker: Optional[str]
    options: Mapping[str, str]

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.sanitized()}>"

    def sanitized(self) -> str:
        """Return the URL with every password masked, and our options kept."""
        return self._text(_mask_password)

    def complete(self) -> str:
        """Return the URL with its passwords, and our options kept."""
        return self._text(lambda url: url)

    def _text(self, show: Callable[[str], str]) -> str:
        text = ";".join(show(url) for url in (self.broker or f"{self.scheme}://").split(";"))
        if self.options:
            # They go to the last of several URLs, whatever the query of another is.
            last = text.rpartition(";")[2]
            text += ("&" if "?" in last else "?") + urlencode(self.options)
        return text


def parse_url(url: Optional[str]) -> ResultURL:
    """Take apart the value of ``result_backend``.

    The query may hold our options and what kombu reads from it (``login_method``).

    Raises:
        InvalidOption: when two of several URLs give different values for one option, or when one is
            not a URL, for example because its password contains a ``/`` or ``?``.
    """
    brokers = []
    options: Dict[str, str] = {}
    scheme = "amqp"
    for number, part in enumerate((url or "amqp://").split(";")):
        part_scheme, separator, rest = part.strip().partition("://")
        if not separator:
            part_scheme, rest = scheme, part_scheme
        if number == 0:
            scheme = part_scheme
        location, _, query = rest.partition("?")
        if part_scheme.partition("+")[0] in AMQP_SCHEMES:
            _check_location(location)
        kept: list[Tuple[str, str]] = []
        for name, value in parse_qsl(query, keep_blank_values=True):
            if name in _KOMBU_QUERY:
                kept.append((name, value))
            elif options.setdefault(name, value) != value:
                raise errors.InvalidOption(
                    f"option {name!r} is {options[name]!r} in one part of the result backend URL "
                    f"and {value!r} in another; give it once"
                )
        if location.strip("/") or kept:
            brokers.append(f"{part_scheme}://{location}" + ("?" + urlencode(kept) if kept else ""))
    return ResultURL(scheme, ";".join(brokers) or None, options)


def _check_location(location: str) -> None:
    try:
        urlsplit(f"//{location}").port  # noqa: B018
    except ValueError:
        # kombu would refuse it later. Until then half a password would be parsed as a port, an
        # option or another host, and be shown; so this message repeats nothing of it.
        raise errors.InvalidOption(
            "the result backend URL is not valid: what should be a host and the number of a port "
            "is not. Are characters such as '/', '?', '#' and ';' in the user name and the "
            "password written as '%2F', '%3F', '%23' and '%3B'?"
        ) from None


#: Names in a URL's query that kombu's Connection takes as parameters of its own.
_KOMBU_QUERY = frozenset({"login_method"})


def _mask_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    credentials, at, location = rest.rpartition("@")
    if not at:
        return url
    user, colon, _ = credentials.partition(":")
    return f"{scheme}://{quote(unquote(user), safe='')}{colon and ':**'}@{location}"
