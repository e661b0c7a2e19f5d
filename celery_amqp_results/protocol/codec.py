"""Encoding and decoding of metas by the app's serializer settings."""

from __future__ import annotations

import contextlib
import reprlib
import uuid
from typing import Any, Dict, Iterable, Mapping, Optional, Tuple

from kombu import compression as kombu_compression
from kombu import serialization

from celery_amqp_results import errors
from celery_amqp_results.protocol.compression import MAX_DECOMPRESSED, decompress
from celery_amqp_results.protocol.ids import id_text, state_name
from celery_amqp_results.protocol.message import STATE, StateMessage

__all__ = ("Codec",)

#: What of a meta are ids.
ID_FIELDS = ("task_id", "parent_id", "group_id")


class Codec:
    """Encodes and decodes metas by the app's serializer settings.

    Parameters:
        serializer: kombu's name of the serializer to write with.
        accept: content types that may be read.
        compression: kombu's name of the compression to write with, or ``None``.
        max_decompressed: bytes that a compressed body may have when it is decompressed.
    """

    def __init__(
        self,
        serializer: str,
        accept: Optional[Iterable[str]],
        compression: Optional[str] = None,
        max_decompressed: int = MAX_DECOMPRESSED,
    ) -> None:
        self.serializer = serializer
        self.accept = accept
        self.compression = compression
        self.max_decompressed = max_decompressed

    def encode(self, meta: Mapping[str, Any]) -> Tuple[str, str, Optional[str], bytes]:
        """Return *meta* as (content type, content encoding, compression, body).

        Raises:
            kombu.exceptions.EncodeError: when the serializer cannot encode it.
            ResultTooLarge: when it is to be compressed, and nobody would decompress so much.
        """
        content_type, content_encoding, payload = serialization.dumps(
            meta, serializer=self.serializer
        )
        compression = None
        if self.compression:
            if len(payload) > self.max_decompressed:
                raise errors.ResultTooLarge(
                    f"a result of {len(payload)} bytes cannot be stored compressed: readers "
                    f"decompress {self.max_decompressed} at most. Return less, or raise the "
                    "option max_decompressed_size everywhere."
                )
            payload, compression = kombu_compression.compress(payload, self.compression)
        if isinstance(payload, str):
            payload = payload.encode("utf-8")
        return content_type, content_encoding, compression, payload

    def decode(self, message: StateMessage) -> Dict[str, Any]:
        """Return the meta that *message* holds.

        Raises:
            kombu.exceptions.ContentDisallowed: when its content type is not accepted.
            ForeignMessage: when the body is damaged, or is no meta.
        """
        if message.decoded is not None:
            return dict(message.decoded)
        body = message.body
        try:
            if message.compression:
                body = decompress(body, message.compression, self.max_decompressed)
            _check_encoding(message.content_encoding)
            meta = serialization.loads(
                body,
                content_type=message.content_type,
                content_encoding=message.content_encoding,
                accept=self.accept,
            )
        except serialization.ContentDisallowed:
            raise
        except Exception as exc:
            # Whatever the serializer or the decompressor raises on a damaged body.
            raise errors.ForeignMessage(
                f"the {message.state} of {message.id!r} cannot be decoded: {exc!r:.300}"
            ) from exc
        if not isinstance(meta, dict) or "status" not in meta or "result" not in meta:
            # Of a pickle, repr() may be anybody's; and it is as long as the value.
            raise errors.ForeignMessage(
                f"the {message.state} of {message.id!r} decodes to no meta: {reprlib.repr(meta)}"
            )
        for name in ID_FIELDS:
            # Some serializers make a UUID of every text that looks like one.
            if isinstance(meta.get(name), uuid.UUID):
                meta[name] = id_text(meta[name])
        if isinstance(meta["status"], (list, dict)):
            # Celery looks states up in sets, where such a value raises a TypeError.
            raise errors.ForeignMessage(
                f"the {message.state} of {message.id!r} names no state: "
                f"{reprlib.repr(meta['status'])}"
            )
        if message.kind == STATE and message.id:
            said = state_name(meta["status"]), meta.get("task_id", message.id)
            if said != (message.state, message.id):
                raise errors.ForeignMessage(
                    f"the {message.state} of {message.id!r} says that it is the "
                    f"{reprlib.repr(said[0])} of {reprlib.repr(said[1])}"
                )
        return meta


def _check_encoding(name: str) -> None:
    """Refuse encodings that are no text: among Python's are some that decompress."""
    if name not in ("utf-8", "binary") and name.lower() not in serialization.SKIP_DECODE:
        with contextlib.suppress(UnicodeError):
            # A LookupError for what is no text encoding.
            b"x".decode(name)
