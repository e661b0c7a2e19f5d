"""A compressed body is decompressed up to a limit, for every compression of kombu."""

from __future__ import annotations

import tracemalloc
from typing import List

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kombu import compression

from celery_amqp_results import errors
from celery_amqp_results.protocol.codec import Codec
from celery_amqp_results.protocol.compression import decompress
from celery_amqp_results.protocol.message import StateMessage

#: The compressions whose libraries are installed, as content types.
KNOWN: List[str] = sorted(compression.encoders())
LIMIT = 100_000


@pytest.mark.parametrize("name", KNOWN)
def test_compressed_data_is_restored_up_to_the_limit(name: str) -> None:
    for size in (0, 1, 5_000, LIMIT):
        packed, content_type = compression.compress(b"x" * size, name)
        assert decompress(packed, content_type, LIMIT) == b"x" * size
        if size:
            with pytest.raises(ValueError, match="max_decompressed_size"):
                decompress(packed, content_type, size - 1)


@pytest.mark.parametrize("name", KNOWN)
def test_a_decompression_bomb_takes_no_more_memory_than_the_limit(name: str) -> None:
    packed, content_type = compression.compress(bytes(80_000_000), name)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="max_decompressed_size"):
            decompress(packed, content_type, LIMIT)
        # Brotli cannot be stopped within a piece.
        assert tracemalloc.get_traced_memory()[1] < 40_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", KNOWN)
@settings(max_examples=40)
@given(junk=st.binary(max_size=40), size=st.integers(1, 300), data=st.data())
def test_damaged_data_is_an_error_or_at_most_the_limit_of_other_data(
    name: str, junk: bytes, size: int, data: st.DataObject
) -> None:
    packed, content_type = compression.compress(b"ab" * size, name)
    at = data.draw(st.integers(0, len(packed)))
    damaged = packed[:at] + junk
    meta = Codec("json", ["application/json"], None, 4 * size)
    message = StateMessage("t", "SUCCESS", 1, damaged, "application/json", "utf-8", content_type)
    with pytest.raises(errors.ForeignMessage):
        meta.decode(message)


@pytest.mark.parametrize("name", ["application/x-gzip", "application/x-bz2", "application/x-lzma"])
def test_data_that_ends_too_early_is_an_error_even_at_the_limit(name: str) -> None:
    packed, content_type = compression.compress(b"x" * 1000, name)
    with pytest.raises(ValueError, match=r"^the compressed data ends too early$"):
        decompress(packed[:-1], content_type, 1000)


def test_the_errors_of_decompression_give_the_sizes_and_the_name() -> None:
    packed, content_type = compression.compress(b"x" * 1000, "gzip")
    limit = r"to more than 999 \(option max_decompressed_size\)$"
    with pytest.raises(ValueError, match=f"^{len(packed)} bytes decompress {limit}"):
        decompress(packed, content_type, 999)
    with pytest.raises(ValueError, match=r"^no such compression: 'application/x-none'$"):
        decompress(packed, "application/x-none", 1000)


def test_a_compression_of_the_app_itself_is_checked_after_decompressing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("_aliases", "_encoders", "_decoders"):
        monkeypatch.setattr(compression, name, dict(getattr(compression, name)))
    compression.register(lambda body: body[::2], lambda body: body * 2, "application/x-half")
    assert decompress(b"abc", "application/x-half", 6) == b"abcabc"
    with pytest.raises(ValueError, match=r"^3 bytes decompress to more than 5 "):
        decompress(b"abc", "application/x-half", 5)


def test_data_over_the_decompression_limit_is_not_stored() -> None:
    meta = {"status": "SUCCESS", "result": "x" * 1000}
    size = len(Codec("json", None).encode(meta)[3])
    codec = Codec("json", ["application/json"], "gzip", size)
    content_type, encoding, compressed, body = codec.encode(meta)
    stored = StateMessage("t", "SUCCESS", 1, body, content_type, encoding, compressed)
    assert codec.decode(stored) == meta
    with pytest.raises(errors.ResultTooLarge, match="raise the option max_decompressed_size every"):
        codec.encode({"status": "SUCCESS", "result": "x" * 1001})


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "BINARY"])
def test_all_text_encodings_and_binary_are_accepted(encoding: str) -> None:
    body = b'{"status": "SUCCESS", "result": "x"}'
    message = StateMessage("t", "SUCCESS", 1, body, "application/json", encoding)
    assert Codec("json", ["application/json"]).decode(message)["result"] == "x"


@pytest.mark.parametrize("encoding", ["zlib", "bz2", "hex", "rot13", "base64", "nonsense"])
@pytest.mark.parametrize("content_type", ["application/data", "application/json", "text/plain"])
def test_only_text_encodings_are_accepted(encoding: str, content_type: str) -> None:
    body = compression.compress(bytes(1_000_000), "gzip")[0]
    message = StateMessage("t", "SUCCESS", 1, body, content_type, encoding)
    with pytest.raises(errors.ForeignMessage, match="encoding"):
        Codec("json", None).decode(message)
