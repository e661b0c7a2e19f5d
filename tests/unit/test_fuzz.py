"""The fuzzer of ``make fuzz`` runs, and finds nothing in a moment."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_amqp_results.amqp import frames
from tools import fuzz


@given(st.binary(max_size=200))
def test_decoders_refuse_or_read_whatever_comes(data: bytes) -> None:
    fuzz.one_input(data)


def test_a_fault_of_the_handler_is_not_taken_for_one_of_the_message() -> None:
    def broken(frame: frames.Frame) -> bool:
        raise ConnectionResetError

    for kind in (1, 2, 3, 8):
        with pytest.raises(ConnectionResetError):
            frames.tolerant(broken)((kind, 1, struct.pack(">HHQH", 60, 0, 0, 0)))
