"""Results over TLS: a private certificate authority, host names, client certificates."""

from __future__ import annotations

import dataclasses
import os
import ssl
from pathlib import Path
from typing import Any, Dict, Iterator
from urllib.parse import urlencode

import pytest
import trustme
from celery import Celery, states

from celery_amqp_results import errors
from tests.broker.helpers import LONG, Waiting, new_id, until_watched
from tests.conftest import PATIENT, PATIENT_OPTIONS, eventually
from tools import rabbitmq


@dataclasses.dataclass(frozen=True)
class Secure:
    """A node with TLS, and the files that a client needs."""

    node: rabbitmq.Node
    authority: str
    another_authority: str
    client: str

    def ssl(self, **more: Any) -> Dict[str, Any]:
        """Return a value of ``broker_use_ssl`` that checks the broker and shows a certificate."""
        return {
            "ca_certs": self.authority,
            "certfile": self.client,
            "keyfile": self.client,
            "cert_reqs": ssl.CERT_REQUIRED,
            "server_hostname": "localhost",
            **more,
        }

    def url(self, scheme: str = "amqps") -> str:
        """Return the URL of the TLS listener."""
        return f"{scheme}://guest:guest@localhost:{self.node.amqps_port}//"


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    if os.environ.get("AMQP_URL"):
        pytest.skip("the broker of AMQP_URL is not ours to give certificates")
    folder: Path = tmp_path_factory.mktemp("tls")
    authority, another = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca"))
    another.cert_pem.write_to_path(str(folder / "another"))
    authority.issue_cert("client").private_key_and_cert_chain_pem.write_to_path(
        str(folder / "client")
    )
    server = authority.issue_cert("localhost")
    server.cert_chain_pems[0].write_to_path(str(folder / "certificate"))
    server.private_key_pem.write_to_path(str(folder / "key"))
    tls = rabbitmq.Tls(folder / "ca", folder / "certificate", folder / "key", verify_peer=True)
    name = os.environ.get("RABBITMQ_DISTRIBUTION", "system")
    with rabbitmq.Node(rabbitmq.distribution(name), tls=tls) as node:
        yield Secure(node, str(folder / "ca"), str(folder / "another"), str(folder / "client"))


def make_app(broker: str, backend: str, **conf: Any) -> Celery:
    app = Celery("tls", broker=broker, backend=backend, set_as_current=False)
    app.conf.update(
        result_backend_transport_options={
            "shards": 4,
            "retry_policy": {"max_retries": 1, "interval_step": 0.1},
            **PATIENT_OPTIONS,
        },
        **PATIENT,
        **conf,
    )
    return app


@pytest.mark.parametrize(
    ("broker", "backend"), [("amqps", "amqp://"), ("amqp", "amqps://"), ("amqp", None)]
)
def test_results_are_stored_looked_up_and_pushed_over_tls(
    secure: Secure, broker: str, backend: str | None
) -> None:
    # None stands for a URL that contains the host name.
    app = make_app(secure.url(broker), backend or secure.url(), broker_use_ssl=secure.ssl())
    if backend is None:
        # The setting is for the broker of the tasks.
        app.conf.broker_use_ssl = False
        app.conf.result_backend_transport_options["use_ssl"] = secure.ssl()
    task_id, later = new_id(), new_id()
    try:
        app.backend.store_result(task_id, "x" * 100_000, states.SUCCESS)
        assert app.AsyncResult(task_id).get(timeout=LONG) == "x" * 100_000
        waiting = Waiting(lambda: app.AsyncResult(later).get(timeout=LONG))
        until_watched(app, later, eventually)
        app.backend.store_result(later, 2, states.SUCCESS)
        assert waiting.result() == 2
    finally:
        app.backend.close()


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param({"server_hostname": "elsewhere.example"}, id="host name"),
        pytest.param({"ca_certs": "another"}, id="authority"),
        pytest.param({"certfile": None, "keyfile": None}, id="client certificate"),
    ],
)
def test_an_untrusted_peer_raises_a_clear_error(secure: Secure, wrong: Dict[str, Any]) -> None:
    if wrong.get("ca_certs"):
        wrong = {"ca_certs": secure.another_authority}
    app = make_app(secure.url(), "amqp://", broker_use_ssl=secure.ssl(**wrong))
    try:
        with pytest.raises(errors.BackendUnavailable, match="localhost"):
            app.AsyncResult(new_id()).state  # noqa: B018 - asks the broker
    finally:
        app.backend.close()


def store_and_get(app: Celery) -> None:
    task_id = new_id()
    try:
        app.backend.store_result(task_id, 1, states.SUCCESS)
        assert app.AsyncResult(task_id).get(timeout=LONG) == 1
    finally:
        app.backend.close()


@pytest.mark.parametrize("broker_use_ssl", [True, {"ca_certs": "/nowhere"}])
def test_results_go_to_a_broker_without_tls_while_tasks_have_it(
    secure: Secure, amqp_url: str, broker_use_ssl: Any
) -> None:
    store_and_get(make_app(secure.url(), amqp_url, broker_use_ssl=broker_use_ssl))


def test_results_have_another_authority_than_tasks(secure: Secure) -> None:
    app = make_app(
        secure.url(), secure.url(), broker_use_ssl=secure.ssl(ca_certs=secure.another_authority)
    )
    app.conf.result_backend_transport_options["use_ssl"] = secure.ssl()
    store_and_get(app)


@pytest.mark.parametrize("host", [True, False])
def test_tls_is_set_up_in_the_result_url(secure: Secure, host: bool) -> None:
    given = {f"ssl_{name}": value for name, value in secure.ssl().items()}
    query = urlencode({**given, "ssl_cert_reqs": "required"})
    backend = f"{secure.url()}?{query}" if host else f"amqps://?{query}"
    store_and_get(make_app(secure.url(), backend))
    with pytest.raises(errors.BackendUnavailable, match="certificate"):
        store_and_get(make_app(secure.url(), backend.replace("%2Fca&", "%2Fanother&")))


def test_the_option_counts_more_than_the_setting_on_the_broker_of_the_tasks(
    secure: Secure,
) -> None:
    app = make_app(secure.url(), "amqp://", broker_use_ssl=True)
    app.conf.result_backend_transport_options["use_ssl"] = secure.ssl()
    store_and_get(app)


def test_tls_of_a_redis_broker_is_not_that_of_the_results(amqp_url: str) -> None:
    store_and_get(
        make_app(
            "rediss://localhost:1/0", amqp_url, broker_use_ssl={"ssl_cert_reqs": ssl.CERT_NONE}
        )
    )


def test_an_option_that_only_redis_knows_is_refused(amqp_url: str) -> None:
    app = make_app(amqp_url, "amqp://")
    app.conf.result_backend_transport_options["use_ssl"] = {"ssl_cert_reqs": ssl.CERT_NONE}
    with pytest.raises(errors.InvalidOption, match="ssl_cert_reqs"):
        app.backend  # noqa: B018
