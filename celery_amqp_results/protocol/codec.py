"""Encoding and decoding of metas by the app's serializer settings."""

from __future__ import annotations

import contextlib
import dataclasses
import reprlib
import uuid
from typing import Iterable, Mapping, Optional, Tuple

from kombu import compression as kombu_compression
from kombu import serialization

from celery_amqp_results import errors
from celery_amqp_results.library_types import Meta
from celery_amqp_results.protocol.compression import MAX_DECOMPRESSED, decompress
from celery_amqp_results.protocol.ids import id_text, state_name
from celery_amqp_results.protocol.message import STATE, StateMessage

__all__ = ("Codec",)

#: The fields of a meta that are ids.
ID_FIELDS = ("task_id", "parent_id", "group_id")


@dataclasses.dataclass(frozen=True, eq=False)
class Codec:
    """Encodes and decodes metas by the app's serializer settings."""

    #: kombu's name of the serializer to write with.
    serializer: str
    #: Content types that may be read.
    accept: Optional[Iterable[str]]
    #: kombu's name of the compression to write with.
    compression: Optional[str] = None
    #: The most bytes of a compressed body after decompression.
    max_decompressed: int = MAX_DECOMPRESSED

    def encode(self, meta: Mapping[str, object]) -> Tuple[str, str, Optional[str], bytes]:
        """Return *meta* as (content type, content encoding, compression, body).

        Raises:
            kombu.exceptions.EncodeError: when the serializer cannot encode it.
            ResultTooLarge: when a body to compress is larger than readers would decompress.
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

    def decode(self, message: StateMessage) -> Meta:
        """Return the meta that *message* holds.

        Raises:
            kombu.exceptions.ContentDisallowed: when its content type is not accepted.
            ForeignMessage: when the body is damaged, or is not a meta.
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
            # The serializer or the decompressor may raise anything on a damaged body.
            raise errors.ForeignMessage(
                f"the {message.state} of {message.id!r} cannot be decoded: {exc!r:.300}"
            ) from exc
        if not isinstance(meta, dict) or "status" not in meta or "result" not in meta:
            # repr() of an unpickled object may run foreign code, and is as long as the value.
            raise errors.ForeignMessage(
                f"the {message.state} of {message.id!r} decodes to no meta: {reprlib.repr(meta)}"
            )
        for name in ID_FIELDS:
            # Some serializers turn every text that looks like a UUID into one.
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
    """Refuse encodings that are not text: some of Python's decompress."""
    if name not in ("utf-8", "binary") and name.lower() not in serialization.SKIP_DECODE:
        with contextlib.suppress(UnicodeError):
            # Raises LookupError for an encoding that is not text.
            b"x".decode(name)
