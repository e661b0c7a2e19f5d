"""What an error means for messages that are being published."""

from __future__ import annotations

from typing import NoReturn, Sequence

from celery_amqp_results import errors
from celery_amqp_results.amqp.confirms import Outgoing
from celery_amqp_results.amqp.declarations import Declarations
from celery_amqp_results.amqp.failures import is_refusal
from celery_amqp_results.store.delivery import concerns, describe, size_limit

__all__ = ("raise_if_final", "raise_not_confirmed")


def raise_if_final(
    exc: BaseException, messages: Sequence[Outgoing], broker: str, declarations: Declarations
) -> None:
    """Raise the error for *exc* if publishing *messages* again cannot help.

    Parameters:
        exc: the error.
        messages: what was published; none for a request about queues.
        broker: the broker's address, for messages.
        declarations: explains refused declarations.
    """
    if isinstance(exc, errors.BackendUnavailable) and not isinstance(exc, errors.NotConfirmed):
        # Connecting retries on its own, by the same policy.
        raise exc
    if not concerns(exc, messages):
        return
    refusal = declarations.refusal(exc)
    if refusal is not None:
        raise refusal from exc
    limit = size_limit(exc)
    if limit is not None and messages:
        largest = max(messages, key=lambda message: len(message.body))
        too_large = errors.ResultTooLarge(
            f"{largest.what} has {len(largest.body)} bytes when encoded, and the broker at "
            f"{broker} takes messages of up to {limit} bytes (max_message_size in its "
            "rabbitmq.conf). Return less, set result_compression, or raise that limit."
        )
        too_large.size, too_large.limit = len(largest.body), limit
        raise too_large from exc
    if limit is None and is_refusal(exc):
        raise errors.BackendUnavailable(
            f"the broker at {broker} refuses {describe(messages)}: {exc}. "
            "Check the user's permissions on the exchange and the queues "
            f"{declarations.topology.prefix}.*, and on the default exchange (amq.default)"
        ) from exc


def raise_not_confirmed(
    exc: BaseException, messages: Sequence[Outgoing], broker: str, tries: int
) -> NoReturn:
    """Raise the error for messages that *tries* tries did not get confirmed."""
    raise errors.NotConfirmed(
        f"the broker at {broker} did not confirm {describe(messages)} in {tries} tries: {exc!r}"
    ) from exc
