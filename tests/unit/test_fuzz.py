"""The fuzzer of ``make fuzz`` runs, and finds nothing in a short run."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_amqp_results.amqp import frames
from tools import fuzz


@given(st.binary(max_size=200))
def test_decoders_refuse_or_read_any_input(data: bytes) -> None:
    fuzz.one_input(data)


def test_a_bug_in_a_handler_is_not_mistaken_for_a_damaged_message() -> None:
    def broken(frame: frames.Frame) -> bool:
        raise ConnectionResetError

    for kind in (1, 2, 3, 8):
        with pytest.raises(ConnectionResetError):
            frames.tolerant(broken)((kind, 1, struct.pack(">HHQH", 60, 0, 0, 0)))
