"""A node with RabbitMQ's management API, and users and policies created through it.

``rabbitmqctl`` takes seconds for each command, the API milliseconds.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import urllib.parse
import urllib.request
import uuid
from typing import Any, Iterator, Mapping

import pytest

from tests.conftest import PATIENCE, Apps
from tools import rabbitmq


class Administrator:
    """Administers a broker through its management API.

    Parameters:
        node: a node with the plugin ``rabbitmq_management``.
    """

    def __init__(self, node: rabbitmq.Node) -> None:
        self.node = node

    @property
    def url(self) -> str:
        """Address of the management API, with user and password."""
        return self.node.management_url.replace("http://", "http://guest:guest@")

    @property
    def port(self) -> int:
        """Port of the management API."""
        return int(urllib.parse.urlsplit(self.node.management_url).port or 0)

    def ask(self, method: str, *path: str, body: Any = None) -> Any:
        """Send a request to ``/api/...`` and return the answer, ``None`` if it is empty."""
        quoted = "/".join(urllib.parse.quote(part, safe="") for part in path)
        request = urllib.request.Request(
            f"{self.node.management_url}/api/{quoted}",
            data=None if body is None else json.dumps(body).encode(),
            method=method,
        )
        token = base64.b64encode(b"guest:guest").decode("ascii")
        request.add_header("Authorization", f"Basic {token}")
        request.add_header("Content-Type", "application/json")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=PATIENCE) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    @contextlib.contextmanager
    def user(self, tags: str = "") -> Iterator[str]:
        """Create a user without permissions for the duration of a ``with`` block.

        Yields:
                The name, which is also the password.
        """
        name = f"u{uuid.uuid4().hex[:8]}"
        self.ask("PUT", "users", name, body={"password": name, "tags": tags})
        try:
            yield name
        finally:
            self.ask("DELETE", "users", name)

    def permit(self, user: str, patterns: Mapping[str, str]) -> None:
        """Set what *user* may configure, write and read."""
        self.ask("PUT", "permissions", "/", user, body=dict(patterns))

    @contextlib.contextmanager
    def policy(
        self,
        pattern: str,
        definition: Mapping[str, Any],
        kind: str = "policies",
        **more: Any,
    ) -> Iterator[str]:
        """Set a policy for the duration of a ``with`` block; yield its name.

        Parameters:
            pattern: regular expression for names of queues and exchanges.
            definition: what it sets.
            kind: ``policies`` or ``operator-policies``.
            more: other fields of the policy.
        """
        name = f"p{uuid.uuid4().hex[:8]}"
        body = {"pattern": pattern, "definition": dict(definition), "apply-to": "all", **more}
        self.ask("PUT", kind, "/", name, body=body)
        try:
            yield name
        finally:
            self.ask("DELETE", kind, "/", name)


@pytest.fixture(scope="session")
def admin() -> Iterator[Administrator]:
    """A private node with the management API."""
    if os.environ.get("AMQP_URL"):
        pytest.skip("the broker of AMQP_URL is not ours to control")
    name = os.environ.get("RABBITMQ_DISTRIBUTION", "system")
    try:
        rabbitmq.ensure_installed(name)
        made = rabbitmq.Node(rabbitmq.distribution(name), plugins=["rabbitmq_management"])
    except rabbitmq.NotAvailable as exc:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no RabbitMQ: {exc}")
    with made as node:
        yield Administrator(node)


@pytest.fixture
def managed_apps(admin: Administrator) -> Iterator[Apps]:
    """Makes apps on the node with the management API."""
    apps = Apps(admin.node.url())
    yield apps
    apps.close()
