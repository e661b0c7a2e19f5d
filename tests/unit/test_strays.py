"""Which messages without a waiting caller are published again, and when."""

from __future__ import annotations

import logging
from typing import Any, Optional

import pytest
from amqp.exceptions import PreconditionFailed

from celery_amqp_results.amqp.confirm_log import Outgoing, Publication, Status
from celery_amqp_results.store.strays import MAX_STRAYS, REFUSAL_PAUSES, Strays


def stray(status: Status, shard: Optional[int] = 1, **attributes: Any) -> Publication:
    publication = Publication(Outgoing("q", {}, b"body", shard, "the SUCCESS of x"))
    publication.waited, publication.status = False, status
    for name, value in attributes.items():
        setattr(publication, name, value)
    return publication


@pytest.mark.parametrize("status", [Status.LOST, Status.RETURNED])
def test_what_was_lost_or_came_back_is_published_at_once(status: Status) -> None:
    strays, message = Strays(), stray(status)
    strays.add((message,))
    assert strays.take_due(0.0) == [message]
    assert not strays


def test_what_came_back_from_a_queue_that_need_not_exist_is_dropped() -> None:
    strays = Strays()
    strays.add((stray(Status.RETURNED, None),))
    assert strays.take_due(0.0) == []
    assert not strays


def test_what_was_refused_is_published_after_growing_pauses(caplog: Any) -> None:
    strays, message = Strays(), stray(Status.REFUSED, refusals=2, sent=10.0)
    strays.add((message,))
    assert strays.take_due(10.1) == []
    assert len(strays) == 1
    assert strays.take_due(10.3) == [message]
    message.refusals = len(REFUSAL_PAUSES) + 1
    strays.add((message,))
    with caplog.at_level(logging.ERROR):
        assert strays.take_due(99.0) == []
    assert caplog.messages == ["the SUCCESS of x is lost: the broker refused it 10 times (nack)"]


@pytest.mark.parametrize(("refusals", "pause"), list(enumerate(REFUSAL_PAUSES, start=1)))
def test_each_refusal_has_its_pause(refusals: int, pause: float) -> None:
    strays, message = Strays(), stray(Status.REFUSED, refusals=refusals, sent=8.0)
    strays.add((message,))
    assert strays.take_due(8.0 + pause - 0.125) == []
    assert strays.take_due(8.0 + pause) == [message]


def test_what_waits_or_is_dropped_does_not_hold_up_the_others() -> None:
    strays = Strays()
    early, late = (stray(Status.REFUSED, refusals=5, sent=sent) for sent in (0.0, 9.0))
    lost = stray(Status.LOST)
    strays.add(
        (late, stray(Status.RETURNED, None), stray(Status.REFUSED, refusals=10), early, lost)
    )
    assert strays.take_due(5.0) == [early, lost]
    assert strays.take_due(20.0) == [late]


def test_what_is_too_large_is_not_published_again(caplog: Any) -> None:
    strays = Strays()
    failure = PreconditionFailed("message size 4 larger than configured max size 3")
    with caplog.at_level(logging.ERROR):
        strays.add((stray(Status.LOST, failure=failure),))
    assert not strays
    assert caplog.messages == [
        "the SUCCESS of x is lost: it has 4 bytes, and the broker takes up to 3"
    ]


def test_what_is_just_small_enough_is_published_again() -> None:
    strays = Strays()
    # A larger message has closed the channel.
    failure = PreconditionFailed("message size 5 larger than configured max size 4")
    message = stray(Status.LOST, failure=failure)
    strays.add((message,))
    assert strays.take_due(0.0) == [message]


@pytest.mark.parametrize(
    ("homeless", "refusal", "lost"),
    [
        (True, "cannot declare queue 'q': queue limit in vhost '/' (9) is reached", True),
        # Another queue is refused
        (True, "cannot declare queue 'p': queue limit in vhost '/' (9) is reached", False),
        # The queue may be there
        (False, "cannot declare queue 'q': queue limit in vhost '/' (9) is reached", False),
    ],
)
def test_a_state_whose_missing_queue_the_broker_refuses_is_lost(
    homeless: bool, refusal: str, lost: bool, caplog: Any
) -> None:
    strays = Strays()
    failure = PreconditionFailed(refusal)
    strays.add((stray(Status.LOST, failure=failure, homeless=homeless),))
    assert (len(strays), strays.lost) == (0, 1) if lost else (1, 0)
    assert ("the SUCCESS of x is lost" in caplog.text) is lost


def test_a_lost_connection_loses_no_state_whose_queue_was_missing() -> None:
    strays, message = Strays(), stray(Status.LOST, failure=OSError("queue 'q'"), homeless=True)
    strays.add((message,))
    assert strays.take_due(0.0) == [message]


def test_the_oldest_is_lost_when_there_are_too_many(caplog: Any) -> None:
    strays = Strays()
    messages = [stray(Status.LOST) for _ in range(MAX_STRAYS + 1)]
    with caplog.at_level(logging.ERROR):
        strays.add(messages)
    assert (len(strays), strays.lost) == (MAX_STRAYS, 1)
    assert caplog.messages == [f"the SUCCESS of x is lost: {MAX_STRAYS} later states wait as well"]
    assert strays.take_due(0.0) == messages[1:]


def test_a_process_that_ends_shortens_the_pauses() -> None:
    strays = Strays()
    refused = stray(Status.REFUSED, refusals=len(REFUSAL_PAUSES), sent=8.0)
    strays.add((refused,))
    assert strays.take_due(8.5, 1.0) == []
    assert strays.take_due(9.0) == []
    assert strays.take_due(9.0, 1.0) == [refused]


def test_each_message_is_due_at_its_own_time() -> None:
    strays = Strays()
    late, early = (stray(Status.REFUSED, refusals=n, sent=8.0) for n in (8, 4))
    strays.add((late, early))
    assert strays.take_due(9.0) == [early]
    assert strays.take_due(22.0) == []
    assert strays.take_due(23.0) == [late]
    lost = stray(Status.LOST)
    strays.add((lost,))
    assert strays.take_due(0.0) == [lost]
