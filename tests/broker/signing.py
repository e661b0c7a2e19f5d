"""Signed results: keys, and the settings of Celery's serializer ``auth``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Dict

import celery
import pytest
import trustme
from celery import Celery


def sign_with(app: Celery, folder: str, name: str) -> None:
    """Sign with the key *name*; only the key ``known`` is trusted."""
    # Celery 5.3 calls an API that newer versions of cryptography warn about.
    warnings.filterwarnings("ignore", "Properties that return a na")
    app.conf.update(
        security_key=f"{folder}/{name}.key",
        security_certificate=f"{folder}/{name}.pem",
        security_cert_store=f"{folder}/known*.pem",
    )
    app.setup_security()


def make_keys(folder: Path) -> None:
    """Make the keys and certificates for :func:`sign_with`."""
    # Separate authorities, so that serial numbers and issuers differ.
    for name in ("known", "stranger"):
        issued = trustme.CA().issue_cert(f"{name}.example", key_type=trustme.KeyType.RSA)
        issued.private_key_pem.write_to_path(str(folder / f"{name}.key"))
        issued.cert_chain_pems[0].write_to_path(str(folder / f"{name}.pem"))


#: Settings with which tasks and results are signed.
SIGNING: Dict[str, Any] = {
    "result_serializer": "auth", "task_serializer": "auth", "event_serializer": "auth",
    "accept_content": ["auth"], "result_accept_content": ["auth"],
}  # fmt: skip

signs = pytest.mark.skipif(
    celery.VERSION[:2] == (5, 4), reason="Celery 5.4 cannot read any certificate (a TypeError)"
)
