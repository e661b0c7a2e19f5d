"""Decisions of the publisher: what an answer of the broker means, and what to do next."""

from __future__ import annotations

import threading
from typing import Any, Dict, List, Optional

import pytest
from amqp import exceptions as amqp_errors
from hypothesis import given
from hypothesis import strategies as st

from celery_amqp_results.amqp import confirms
from celery_amqp_results.amqp.confirms import ConfirmLog, Outgoing, Publication, Status
from celery_amqp_results.amqp.shared_channel import Waiter
from celery_amqp_results.store.delivery import Delivery, concerns, describe, size_limit

PUSHED = ("states", "key")


def outgoing(
    name: str, queue: str = "q", pushed: bool = True, shard: Optional[int] = 0
) -> Outgoing:
    return Outgoing(
        queue, {"correlation_id": name}, name.encode(), shard, name, PUSHED if pushed else None
    )


def sent(log: ConfirmLog, *names: str, queue: str = "q", waited: bool = True) -> List[Publication]:
    made = [Publication(outgoing(name, queue), waited) for name in names]
    for number, publication in enumerate(made):
        log.sent(publication, float(number))
    return made


def test_a_message_and_its_copy_are_confirmed_each_for_itself() -> None:
    log = ConfirmLog()
    (one,) = sent(log, "a")
    log.acknowledged(2, False)
    assert (one.status, one.copying) == (Status.SENT, False)
    log.acknowledged(1, False)
    assert (one.status, one.settled, len(log)) == (Status.CONFIRMED, True, 0)


def test_one_answer_confirms_all_before_it() -> None:
    log = ConfirmLog()
    made = sent(log, "a", "b", "c")
    log.acknowledged(4, True)
    assert [p.status for p in made] == [Status.CONFIRMED, Status.CONFIRMED, Status.SENT]
    assert [p.copying for p in made] == [False, False, True]


def test_a_refused_copy_leaves_the_state_kept() -> None:
    log = ConfirmLog()
    (one,) = sent(log, "a")
    assert log.refused(2, False) == 1
    log.acknowledged(1, False)
    assert (one.status, one.refusals) == (Status.CONFIRMED, 0)
    (other,) = sent(log, "b")
    assert log.refused(3, False) == 0
    assert (other.status, other.refusals) == (Status.REFUSED, 1)


def test_the_returned_message_is_the_one_that_came_back() -> None:
    log = ConfirmLog()
    first, second, third = sent(log, "a", "b", "c")
    log.came_back("q", {"correlation_id": "b"}, b"b")
    log.came_back("other", {"correlation_id": "a"}, b"a")
    log.acknowledged(6, True)
    assert [p.status for p in (first, second, third)] == [
        Status.CONFIRMED,
        Status.RETURNED,
        Status.CONFIRMED,
    ]


def test_what_nobody_waits_for_strays_unless_it_is_confirmed() -> None:
    log = ConfirmLog()
    made = sent(log, "a", "b", "c", waited=False)
    log.came_back("q", {"correlation_id": "b"}, b"b")
    log.acknowledged(4, True)
    log.refused(5, False)
    assert log.strays == made[1:]
    assert [p.status for p in made[1:]] == [Status.RETURNED, Status.REFUSED]


def test_a_lost_connection_loses_what_is_unsettled_and_copies_that_are_waited_for() -> None:
    log = ConfirmLog()
    kept, waiting, done = sent(log, "a", "b", "c")
    kept.waited = False
    for tag in (1, 3, 5, 6):
        log.acknowledged(tag, False)
    (fourth,) = sent(log, "d")
    failure = OSError("cut")
    # The copies of a and b are unconfirmed, and only that of b is waited for.
    assert log.lost(failure) == [fourth, waiting]
    assert [p.status for p in (kept, done)] == [Status.CONFIRMED] * 2
    assert [p.failure for p in (fourth, waiting)] == [failure] * 2
    assert not any(p.copying for p in (kept, waiting, done, fourth))
    assert len(log) == 0


def test_copies_that_are_never_confirmed_take_little_memory() -> None:
    log = ConfirmLog()
    made = sent(log, *map(str, range(confirms.MAX_COPIES + 50)))
    assert sum(p.copying for p in made) == confirms.MAX_COPIES
    assert log.has_late_copy(1e9)
    assert not log.has_late_copy(0.0)


@given(st.lists(st.tuples(st.integers(1, 40), st.booleans(), st.booleans()), max_size=60))
def test_any_answers_settle_each_message_once(answers: List[tuple[int, bool, bool]]) -> None:
    log = ConfirmLog()
    made = sent(log, *map(str, range(15)))
    settled: Dict[int, Any] = {}
    for tag, multiple, positive in answers:
        (log.acknowledged if positive else log.refused)(tag, multiple)
        for publication in made:
            if publication.settled:
                assert settled.setdefault(id(publication), publication.status) is publication.status
    assert len(log) == sum(not p.settled for p in made)
    log.acknowledged(100, True)
    assert all(p.settled and not p.copying for p in made)


def test_a_waiter_is_done_when_all_is_settled() -> None:
    log = ConfirmLog()
    made = sent(log, "a", "b")
    waiter, copies = Waiter(made), Waiter(made, copies=True)
    log.acknowledged(3, False)
    assert not waiter.done
    log.acknowledged(1, False)
    assert waiter.done
    assert not copies.done
    log.acknowledged(4, True)
    assert copies.done


def test_a_woken_follower_goes_on() -> None:
    waiter = Waiter([Publication(outgoing("a"))])
    waiter.follow()
    thread = threading.Thread(target=waiter.wake)
    thread.start()
    waiter.wait(60)
    thread.join()


def test_a_returned_message_has_its_shard_declared_once() -> None:
    delivery = Delivery([outgoing("a", shard=3), outgoing("b", shard=3)])
    assert delivery.unsent() == delivery.publications
    for publication in delivery.publications:
        publication.status = Status.RETURNED
    verdict = delivery.judge()
    assert (verdict.again, verdict.declare) == (delivery.publications, [3])
    assert not verdict.homeless
    # Returned once more although its queue was declared
    assert delivery.judge().homeless == delivery.publications


def test_a_returned_message_without_a_shard_is_gone() -> None:
    delivery = Delivery([outgoing("a", "large", shard=None), outgoing("b")])
    delivery.publications[0].status = Status.RETURNED
    delivery.publications[1].status = Status.CONFIRMED
    assert not delivery.judge().again
    assert delivery.gone == {"large"}


def test_only_what_failed_is_published_again() -> None:
    delivery = Delivery([outgoing(name) for name in "abc"])
    first, second, third = delivery.publications
    first.status, second.status, third.status = Status.CONFIRMED, Status.LOST, Status.REFUSED
    second.failure = OSError("cut")
    verdict = delivery.judge()
    assert verdict.again == [second, third]
    assert verdict.refused == [third]
    assert verdict.failure is second.failure


@pytest.mark.parametrize(
    ("text", "size", "concerned"),
    [
        ("message size 70000 is larger than configured max size 50000", 60_000, True),
        ("message size 70000 is larger than configured max size 50000", 40_000, False),
        ("inequivalent arg 'x-queue-type' for queue 'q' in vhost '/'", 1, True),
        ("inequivalent arg 'x-queue-type' for queue 'other' in vhost '/'", 1, False),
        ("inequivalent arg 'alternate-exchange' for exchange 'x' in vhost '/'", 1, True),
    ],
)
def test_an_error_of_the_channel_concerns_those_whose_message_it_is_about(
    text: str, size: int, concerned: bool
) -> None:
    error = amqp_errors.PreconditionFailed(f"PRECONDITION_FAILED - {text}", (60, 40), 406)
    message = Outgoing("q", {}, b"x" * size, 0)
    assert concerns(error, (message,)) is concerned
    assert (size_limit(error) == 50_000) == ("max size" in text)


def test_a_description_names_a_few_messages() -> None:
    assert describe([outgoing(name) for name in "abcde"]) == "a, b, c and 2 more"
    assert describe([]) == "a request about queues"
