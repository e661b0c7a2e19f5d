"""A small client of RabbitMQ's management API, with the standard library only.

A handful of GET requests do not justify a dependency. Redirections are not followed, since the
password would be sent along.
"""

from __future__ import annotations

import base64
import dataclasses
import email.utils
import http.client
import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, Dict, List, Optional

import kombu

__all__ = ("Management", "ManagementError", "find", "guess_url")

#: Time limit of an answer, in seconds; shorter for a guessed address.
TIMEOUT = 15.0
GUESS_TIMEOUT = 2.0

PORT = 15672
TLS_PORT = 15671

#: Queues per request.
PAGE_SIZE = 500


class ManagementError(Exception):
    """Raised when the management API does not answer, or refuses us."""

    def __init__(self, message: str, status: Optional[int] = None) -> None:
        super().__init__(message)
        #: The HTTP status, if there was an answer.
        self.status = status


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: object, **kwargs: object) -> None:
        return None


@dataclasses.dataclass
class Management:
    """The management API of one broker, for one virtual host.

    Its methods raise :class:`ManagementError` when there is no answer, or an error.
    """

    #: Its address, without user and password.
    url: str
    user: str
    password: str = dataclasses.field(repr=False)
    vhost: str
    #: Time limit of an answer, in seconds.
    timeout: float = TIMEOUT
    #: Whether to use the environment's proxies.
    proxies: bool = True
    #: The broker's clock minus ours, in seconds, at the last answer; exact to a second.
    skew: Optional[float] = None

    def get(self, *path: str, **query: object) -> Any:
        """Return the answer to a GET of ``/api/...``; the parts of the path are not quoted."""
        address = "/".join([self.url.rstrip("/"), "api", *(_quote(part) for part in path)])
        if query:
            address += "?" + urllib.parse.urlencode(query)
        request = urllib.request.Request(address)
        token = base64.b64encode(f"{self.user}:{self.password}".encode()).decode("ascii")
        request.add_header("Authorization", f"Basic {token}")
        handlers: List[urllib.request.BaseHandler] = [_NoRedirects()]
        if not self.proxies:
            handlers.append(urllib.request.ProxyHandler({}))
        try:
            with urllib.request.build_opener(*handlers).open(
                request, timeout=self.timeout
            ) as answer:
                self._note_date(answer.headers.get("Date"))
                return json.loads(answer.read())
        except urllib.error.HTTPError as exc:
            with exc:
                status = exc.code
            hint = {
                401: f"; the password of the user {self.user!r} is wrong, or the user lacks a tag",
                403: f"; the user {self.user!r} may not see that",
                404: "; there is no such thing, or no management API at this address",
            }.get(status, "")
            raise ManagementError(f"{self.url} answers {status}{hint}", status) from exc
        except (OSError, ValueError, http.client.HTTPException) as exc:
            raise ManagementError(f"{self.url} does not answer as it should: {exc}") from exc

    def _note_date(self, date: Optional[str]) -> None:
        if date:
            try:
                self.skew = email.utils.parsedate_to_datetime(date).timestamp() - time.time()
            except (TypeError, ValueError):
                self.skew = None

    def queues(self, pattern: str) -> List[Dict[str, Any]]:
        """Return the queues of the virtual host whose names match a regular expression."""
        found: List[Dict[str, Any]] = []
        page = 1
        while True:
            answer = self.get(
                "queues", self.vhost, page=page, page_size=PAGE_SIZE, name=pattern, use_regex="true"
            )
            found += answer["items"]
            if page >= answer["page_count"]:
                return found
            page += 1

    def queues_of(self, exchange: str, *kinds: str) -> List[Dict[str, Any]]:
        """Return the queues of the layout ``shared`` of some kinds, such as ``shard``."""
        return self.queues(f"^{re.escape(exchange)}\\.({'|'.join(kinds)})\\.")

    def bindings(self, exchange: str) -> List[Dict[str, Any]]:
        """Return the bindings of an exchange; none if it does not exist."""
        try:
            found: List[Dict[str, Any]] = self.get(
                "exchanges", self.vhost, exchange, "bindings", "source"
            )
        except ManagementError as exc:
            if exc.status != 404:
                raise
            return []
        return found


def _quote(part: str) -> str:
    return urllib.parse.quote(part, safe="")


def guess_url(connection: kombu.Connection) -> str:
    """Return the default address of a broker's management API, with TLS if the broker uses it."""
    scheme, number = ("https", TLS_PORT) if connection.ssl else ("http", PORT)
    host = str(connection.hostname)
    # A host name has no colon, an IPv6 address has several.
    host = f"[{host}]" if host.count(":") > 1 else host.partition(":")[0]
    return f"{scheme}://{host}:{number}"


def find(connection: kombu.Connection, url: Optional[str], guess: bool) -> Optional[Management]:
    """Return the management API, or ``None`` if a guessed address does not answer.

    A guessed address uses TLS if the connection to the broker does, to protect the password.

    Parameters:
        connection: a connection to the broker; it is not opened.
        url: its address, perhaps with user and password; ``None`` to guess.
        guess: whether to guess.

    Raises:
        ManagementError: when *url* is invalid, or does not answer.
    """
    user, password = connection.userid or "guest", connection.password or "guest"
    vhost = connection.virtual_host or "/"
    if url:
        parts = urllib.parse.urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ManagementError(
                "the management URL is to look like http://user:password@host:15672"
            )
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        if parts.username is not None:
            user = urllib.parse.unquote(parts.username)
            password = urllib.parse.unquote(parts.password or "")
        place = host if port is None else f"{host}:{port}"
        api = Management(f"{parts.scheme}://{place}{parts.path}", user, password, vhost)
        api.get("whoami")
        return api
    if not guess or not connection.hostname:
        return None
    api = Management(guess_url(connection), user, password, vhost, GUESS_TIMEOUT, proxies=False)
    try:
        # Only the list is open to every user with the tag "management".
        if not any(each.get("name") == vhost for each in api.get("vhosts")):
            return None
    except ManagementError:
        return None
    api.timeout = TIMEOUT
    return api
