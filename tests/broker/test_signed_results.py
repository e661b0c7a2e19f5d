"""Celery's serializer ``auth`` signs results: a forged or altered one is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import List

import pytest
from celery import Celery, states

from celery_amqp_results import errors
from celery_amqp_results.store.publisher import Outgoing
from tests import subprocesses
from tests.broker.helpers import new_id
from tests.broker.signing import SIGNING, make_keys, sign_with, signs
from tests.conftest import Apps


def sign_and_forge(app: Celery, folder: str) -> List[str]:
    """Store a valid result, one with an unknown signer, and altered ones; read all of them.

    Setting up security changes kombu for the whole process, so this runs in a process of its own.
    """

    def read(task_id: str) -> str:
        try:
            return str(app.AsyncResult(task_id).get(timeout=60))
        except errors.ForeignMessage as exc:
            return type(exc).__name__

    sign_with(app, folder, "stranger")
    forged = new_id()
    app.backend.store_result(forged, "forged", states.SUCCESS)
    sign_with(app, folder, "known")
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


@signs
def test_a_forged_or_altered_result_is_refused(make_app: Apps, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    make_keys(tmp_path)
    app = make_app(shards=1, **SIGNING)
    found = subprocesses.run(app, sign_and_forge, folder=str(tmp_path))
    assert found == ["signed", *["ForeignMessage"] * 4]
