"""Decompression with a limit on the size of its result."""

from __future__ import annotations

import bz2
import importlib
import lzma
import reprlib
import zlib
from typing import Any, Callable, Dict

from kombu import compression as kombu_compression

__all__ = ("MAX_DECOMPRESSED", "decompress")

#: The default limit of a decompressed body, in bytes.
MAX_DECOMPRESSED = 128 * 1024 * 1024
#: Additional memory that decompressing LZMA may take; the highest preset takes a fourth of it.
LZMA_MEMORY = 256 * 1024 * 1024
#: Bytes of a Brotli body that are decompressed at a time: 10 bytes may expand to 16 MiB.
BROTLI_PIECE = 32


def _decompress_stream(decompressor: Any, body: bytes, limit: int) -> bytes:
    """Decompress with a decompressor of the standard library."""
    data: bytes = decompressor.decompress(body, limit + 1)
    if len(data) <= limit and not decompressor.eof:
        raise ValueError("the compressed data ends too early")
    return data


def _decompress_brotli(body: bytes, limit: int) -> bytes:
    decompressor = importlib.import_module("brotli").Decompressor()
    pieces = []
    size = 0
    for at in range(0, len(body), BROTLI_PIECE):
        pieces.append(decompressor.process(body[at : at + BROTLI_PIECE]))
        size += len(pieces[-1])
        if size > limit:
            break
    else:
        if not decompressor.is_finished():
            raise ValueError("the compressed data ends too early")
    return b"".join(pieces)


def _decompress_zstd(body: bytes, limit: int) -> bytes:
    for name in ("compression.zstd", "backports.zstd"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        return _decompress_stream(module.ZstdDecompressor(), body, limit)
    # kombu before 5.6
    reader = importlib.import_module("zstandard").ZstdDecompressor().stream_reader(body)
    data: bytes = reader.read(limit + 1)
    return data


#: By content type: functions that stop one byte after the limit. kombu's own functions have no
#: limit and can fill the memory.
_DECOMPRESS: Dict[str, Callable[[bytes, int], bytes]] = {
    "application/x-gzip": lambda body, limit: _decompress_stream(zlib.decompressobj(), body, limit),
    "application/x-bz2": lambda body, limit: _decompress_stream(bz2.BZ2Decompressor(), body, limit),
    "application/x-lzma": lambda body, limit: _decompress_stream(
        lzma.LZMADecompressor(memlimit=LZMA_MEMORY), body, limit
    ),
    "application/x-brotli": _decompress_brotli,
    "application/zstd": _decompress_zstd,
}


def decompress(body: bytes, compression: str, limit: int) -> bytes:
    """Return *body* decompressed.

    Parameters:
        compression: content type of one of kombu's compressions.
        limit: how many bytes it may have. A compression that an app has registered with kombu
            itself is only checked after decompressing everything.

    Raises:
        ValueError: when it has more, or when the compression is unknown.
        Exception: errors of the decompressor on damaged data.
    """
    function = _DECOMPRESS.get(compression)
    if function is not None:
        data = function(body, limit)
    elif compression in kombu_compression.encoders():
        data = kombu_compression.decompress(body, compression)
    else:
        raise ValueError(f"no such compression: {reprlib.repr(compression)}")
    if len(data) > limit:
        raise ValueError(
            f"{len(body)} bytes decompress to more than {limit} (option max_decompressed_size)"
        )
    return data
