"""The shell of the chord leader, without a broker."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from amqp import exceptions as amqp_errors

from celery_amqp_results.chords import service as services
from celery_amqp_results.options import RetryPolicy
from tests.conftest import PATIENCE


def test_a_refused_binding_is_tried_again_after_the_pause_for_refusals(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refused = threading.Event()

    class RefusedSession:
        """A session that opens, and whose first action the broker refuses."""

        met = found = True

        def __init__(self, *args: object) -> None:
            pass

        def receive(self, *args: object) -> None:
            # No second try.
            service.close(wait=False)
            raise amqp_errors.AccessRefused("ACCESS_REFUSED - read access to exchange", (50, 20))

        def drop(self) -> None:
            refused.set()

    monkeypatch.setattr(services, "Session", RefusedSession)
    connector: Any = SimpleNamespace(policy=RetryPolicy())
    declarations: Any = SimpleNamespace(topology=None, forget=lambda: None)
    unused: Any = None
    service = services.Service(connector, declarations, unused, unused, unused)
    service.start(met=True)
    assert refused.wait(PATIENCE)
    service.close()
    assert "chords cannot be led here, trying again in 30 s" in caplog.text
