"""Celery's serializer ``auth`` signs results: a forged or altered one is refused."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any, List

import celery
import pytest
import trustme
from celery import Celery, states

from celery_amqp_results import errors
from celery_amqp_results.store.publisher import Outgoing
from tests import subprocesses
from tests.broker.helpers import new_id
from tests.conftest import Apps


def sign_and_forge(app: Celery, folder: str) -> List[str]:
    """Store a valid result, one with an unknown signer, and altered ones; read all of them.

    Setting up security changes kombu for the whole process, so this runs in a process of its own.
    """

    # Celery 5.3 calls an API that newer versions of cryptography warn about.
    warnings.filterwarnings("ignore", "Properties that return a na")

    def sign_with(name: str) -> Any:
        app.conf.update(
            security_key=f"{folder}/{name}.key",
            security_certificate=f"{folder}/{name}.pem",
            security_cert_store=f"{folder}/known*.pem",
        )
        app.setup_security()

    def read(task_id: str) -> str:
        try:
            return str(app.AsyncResult(task_id).get(timeout=60))
        except errors.ForeignMessage as exc:
            return type(exc).__name__

    sign_with("stranger")
    forged = new_id()
    app.backend.store_result(forged, "forged", states.SUCCESS)
    sign_with("known")
    signed = new_id()
    app.backend.store_result(signed, "signed", states.SUCCESS)
    layout = app.backend.layout
    ((state,),) = layout.store.read([signed]).values()
    found = [read(signed), read(forged)]
    for at in (len(state.body) // 8, len(state.body) // 2, -9):
        altered = new_id()
        octets = bytearray(state.body)
        octets[at] = octets[at] ^ 1 if chr(octets[at] ^ 1).isalnum() else ord("A")
        wrong = dataclasses.replace(state, id=altered, body=bytes(octets))
        topology = app.backend.config.topology
        shard = topology.shard(altered)
        layout.publisher.publish(
            [Outgoing(topology.shard_queue_name(shard), wrong.properties(True), wrong.body, shard)]
        )
        found.append(read(altered))
    return found


@pytest.mark.skipif(
    celery.VERSION[:2] == (5, 4), reason="Celery 5.4 cannot read any certificate (a TypeError)"
)
def test_a_forged_or_altered_result_is_refused(make_app: Apps, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    for name in ("known", "stranger"):
        # A separate authority, so that serial numbers and issuers differ.
        issued = trustme.CA().issue_cert(f"{name}.example", key_type=trustme.KeyType.RSA)
        issued.private_key_pem.write_to_path(str(tmp_path / f"{name}.key"))
        issued.cert_chain_pems[0].write_to_path(str(tmp_path / f"{name}.pem"))
    app = make_app(
        shards=1,
        result_serializer="auth",
        task_serializer="auth",
        accept_content=["auth"],
        result_accept_content=["auth"],
        event_serializer="auth",
    )
    found = subprocesses.run(app, sign_and_forge, folder=str(tmp_path))
    assert found == ["signed", *["ForeignMessage"] * 4]
