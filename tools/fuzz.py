"""Feeds the decoders with malformed input for a limited time.

::

    python -m tools.fuzz --seconds 60

If `atheris <https://github.com/google/atheris>`_ is installed, it guides the input by code
coverage; otherwise Hypothesis generates it. Any error that the decoders do not promise stops the
run and prints the input that caused it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import struct
import sys
import time
from typing import Any, List

from amqp.basic_message import Message
from kombu.exceptions import ContentDisallowed

from celery_amqp_results import errors
from celery_amqp_results.amqp import frames
from celery_amqp_results.protocol import codec, compression, message, page
from celery_amqp_results.protocol.codec import Codec
from celery_amqp_results.protocol.message import StateMessage, dated

#: The errors that a decoder may raise for malformed input.
REFUSALS = (errors.ForeignMessage, ContentDisallowed)

CODECS = (Codec("json", ["application/json"], None, 100_000), Codec("json", None, None, 100_000))
TYPES = ("application/json", "application/data", "application/x-msgpack", "text/plain", "nonsense")
ENCODINGS = ("utf-8", "binary", "zlib", "utf-16", "nonsense")
COMPRESSIONS = (None, "application/x-gzip", "application/x-bz2", "application/x-lzma", "nonsense")


def one_input(data: bytes) -> None:
    """Try every decoder with *data*."""
    if not data:
        return
    choice, rest = data[0], data[1:]
    with contextlib.suppress(*REFUSALS):
        page.decode(rest)
    for wanted in ("a", "t"):
        damaged: List[Exception] = []
        with contextlib.suppress(*REFUSALS):
            list(page.find(rest, [wanted], damaged.append))
    # A page whose entries are intact except for their headers and bodies
    with contextlib.suppress(*REFUSALS):
        entry = struct.pack(">I", min(choice, len(rest))) + rest
        head = b"CARpage1" + struct.pack(">I8sII", 1, bytes(8), 28, len(entry))
        for state in page.decode(head + entry):
            state.expired(1)
            page.select([(0, state)], 1)
            page.expiration([state], 1)
            _decode(state)
    state = StateMessage(
        "t",
        "SUCCESS",
        1,
        rest,
        TYPES[choice % len(TYPES)],
        ENCODINGS[choice // 5 % len(ENCODINGS)],
        COMPRESSIONS[choice // 25 % len(COMPRESSIONS)],
    )
    _decode(state)
    _header(rest)


def _decode(state: StateMessage) -> None:
    for each in CODECS:
        with contextlib.suppress(*REFUSALS):
            decoded = each.decode(state)
            assert isinstance(decoded, dict)
            assert {"status", "result"} <= decoded.keys()


def _header(properties: bytes) -> None:
    """Read a header frame with these properties, as from the broker."""
    seen: List[Any] = []

    def on_frame(frame: Any) -> bool:
        message = Message()
        message.inbound_header(frame[2])
        seen.append(message)
        return True

    frames.tolerant(on_frame)((2, 1, struct.pack(">HHQ", 60, 0, 1) + properties))
    (message,) = seen
    with contextlib.suppress(*REFUSALS):
        dated(StateMessage.from_properties(message.properties, b"{}"), 1)


def with_atheris(seconds: int) -> None:
    """Fuzz with atheris, which ends the process."""
    atheris = importlib.import_module("atheris")
    for module in (page, message, codec, compression, frames):
        for name, value in vars(module).items():
            if callable(value) and getattr(value, "__module__", "") == module.__name__:
                with contextlib.suppress(Exception):
                    setattr(module, name, atheris.instrument_func(value))
    arguments = [sys.argv[0], f"-max_total_time={seconds}", "-max_len=4096", "-verbosity=1"]
    atheris.Setup(arguments, one_input)
    atheris.Fuzz()


def with_hypothesis(seconds: int) -> int:
    """Fuzz with Hypothesis; return the number of inputs."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    end = time.monotonic() + seconds
    count = 0
    whole = page.encode([StateMessage("a", "SUCCESS", 1, b"{}", "application/json", "utf-8")])
    octets = st.binary(max_size=300) | st.tuples(
        st.binary(max_size=2), st.just(whole), st.binary(max_size=9)
    ).map(b"".join)

    @settings(
        max_examples=500, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(octets)
    def run(data: bytes) -> None:
        nonlocal count
        count += 1
        one_input(data)

    while time.monotonic() < end:
        run()
    return count


def main() -> None:
    """Parse the command line and fuzz."""
    parser = argparse.ArgumentParser(description="Fuzz the decoders for a bounded time.")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--hypothesis", action="store_true", help="even if atheris is there")
    options = parser.parse_args()
    if importlib.util.find_spec("atheris") is not None and not options.hypothesis:
        with_atheris(options.seconds)
    else:
        print(f"{with_hypothesis(options.seconds)} inputs by Hypothesis; all were refused or read")


if __name__ == "__main__":
    main()
