"""Decisions of the publisher: what an answer of the broker means, and what to do next."""

from __future__ import annotations

import math
import threading
from typing import Any, Dict, List, Optional

import pytest
from amqp import exceptions as amqp_errors
from hypothesis import given
from hypothesis import strategies as st

from celery_amqp_results.amqp import confirm_log
from celery_amqp_results.amqp.confirm_log import ConfirmLog, Outgoing, Publication, Status
from celery_amqp_results.amqp.turns import Waiter
from celery_amqp_results.store.delivery import (
    Delivery,
    Verdict,
    concerns,
    describe,
    size_limit,
)

PUSHED = ("states", "key")


def outgoing(
    name: str, queue: str = "q", pushed: bool = True, shard: Optional[int] = 0
) -> Outgoing:
    return Outgoing(
        queue, {"correlation_id": name}, name.encode(), shard, name, PUSHED if pushed else None
    )


def sent(log: ConfirmLog, *names: str, queue: str = "q", waited: bool = True) -> List[Publication]:
    made = [Publication(outgoing(name, queue)) for name in names]
    for number, publication in enumerate(made):
        publication.waited = waited
        log.sent(publication, float(number))
    return made


def test_a_new_publication_has_no_answer_yet() -> None:
    new = Publication(outgoing("a"))
    assert (new.status, new.settled, new.failure) == (Status.UNSENT, True, None)
    assert (new.copying, new.returned, new.refusals, new.sent) == (False, False, 0, 0.0)
    assert (new.waited, new.push, new.homeless) == (True, True, False)


def plain(log: ConfirmLog, *names: str) -> List[Publication]:
    made = [Publication(outgoing(name)) for name in names]
    for publication in made:
        publication.waited, publication.plain = False, True
        log.sent(publication, 0.0)
    return made


def statuses(publications: List[Publication]) -> List[Status]:
    return [publication.status for publication in publications]


def test_an_answer_stands_for_the_plain_messages_before_its_request() -> None:
    log = ConfirmLog()
    before = plain(log, "a", "b")
    assert log.unasked
    log.request_sent()
    between = plain(log, "c")
    log.request_sent()
    after = plain(log, "d")
    assert (len(log), list(log), log.answers) == (4, [*before, *between, *after], 0)
    log.answered()
    assert statuses([*before, *between]) == [Status.CONFIRMED, Status.CONFIRMED, Status.SENT]
    log.answered()
    assert statuses([*between, *after]) == [Status.CONFIRMED, Status.SENT]
    assert (list(log), log.unwaited(), log.unasked, log.busy, log.answers) == (
        after, after, True, True, 2,
    )  # fmt: skip
    log.request_sent()
    log.answered()
    assert (len(log), log.unasked, log.busy) == (0, False, False)


def test_confirms_do_not_stand_for_plain_messages() -> None:
    log = ConfirmLog()
    (one,) = plain(log, "a")
    (other,) = sent(log, "b")
    log.acknowledged(9, True)
    assert statuses([one, other]) == [Status.SENT, Status.CONFIRMED]
    assert not one.copying
    log.request_sent()
    log.answered()
    assert one.status is Status.CONFIRMED


def test_a_plain_message_that_came_back_is_published_again() -> None:
    log = ConfirmLog()
    one, other = plain(log, "a", "b")
    log.request_sent()
    log.came_back("q", {"correlation_id": "b"}, b"b")
    log.answered()
    assert statuses([one, other]) == [Status.CONFIRMED, Status.RETURNED]
    assert log.strays == [other]


def test_plain_messages_are_lost_with_the_connection() -> None:
    log = ConfirmLog()
    made = plain(log, "a", "b")
    log.request_sent()
    assert log.lost(OSError("cut")) == made
    assert statuses(made) == [Status.LOST, Status.LOST]
    assert (len(log), log.unasked, log.busy) == (0, False, False)


def test_a_message_that_is_sent_again_begins_anew() -> None:
    log = ConfirmLog()
    (one,) = sent(log, "a")
    log.came_back("q", {}, b"a")
    log.lost(OSError("cut"))
    one.push = False
    log.sent(one, 7.0)
    assert (one.status, one.returned, one.failure) == (Status.SENT, False, None)
    assert (one.sent, one.copying) == (7.0, False)
    assert list(log) == [one]


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


def test_one_refusal_refuses_all_before_it() -> None:
    log = ConfirmLog()
    made = sent(log, "a", "b", "c")
    assert log.refused(4, True) == 2
    assert [p.status for p in made] == [Status.REFUSED, Status.REFUSED, Status.SENT]
    assert [p.copying for p in made] == [False, False, True]


def test_the_refusals_of_a_message_are_counted() -> None:
    log = ConfirmLog()
    (one,) = sent(log, "a")
    log.refused(1, False)
    log.sent(one, 1.0)
    log.refused(3, False)
    assert one.refusals == 2


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


@pytest.mark.parametrize("field", ["correlation_id", "message_id", "application_headers"])
def test_returned_messages_with_one_body_are_told_apart_by_their_properties(field: str) -> None:
    log, properties = ConfirmLog(), [{field: {"published": 1}}, {field: {"published": 2}}]
    made = [Publication(Outgoing("q", each, b"same")) for each in properties]
    for publication in made:
        log.sent(publication, 0.0)
    log.came_back("q", properties[1], b"same")
    assert [p.returned for p in made] == [False, True]


def test_a_message_without_headers_comes_back_with_none() -> None:
    log = ConfirmLog()
    made = [
        Publication(Outgoing("q", {"application_headers": {"published": 1}}, b"same")),
        Publication(Outgoing("q", {}, b"same")),
    ]
    for publication in made:
        log.sent(publication, 0.0)
    log.came_back("q", {"application_headers": {}}, b"same")
    assert [p.returned for p in made] == [False, True]


def test_each_return_is_another_message() -> None:
    log = ConfirmLog()
    made = sent(log, "a", "a", "b")
    log.came_back("q", {"correlation_id": "a"}, b"a")
    assert [p.returned for p in made] == [True, False, False]
    log.came_back("q", {"correlation_id": "a"}, b"a")
    assert [p.returned for p in made] == [True, True, False]


def test_a_returned_message_that_cannot_be_identified_is_the_oldest_to_its_queue() -> None:
    log = ConfirmLog()
    made = [*sent(log, "a", queue="other"), *sent(log, "b", "c", "d")]
    # The body is that of one message, but the properties differ.
    log.came_back("q", {"correlation_id": "unknown"}, b"c")
    assert [p.returned for p in made] == [False, False, True, False]
    log.came_back("q", {"correlation_id": "d"}, b"unknown")
    assert [p.returned for p in made] == [False, True, True, False]


def test_the_copy_of_a_confirmed_message_has_a_delivery_tag_of_its_own() -> None:
    log = ConfirmLog()
    one = Publication(outgoing("a"))
    one.push = False
    log.sent(one, 0.0)
    log.acknowledged(1, False)
    assert (one.status, one.copying) == (Status.CONFIRMED, False)
    log.copy_sent(one)
    assert (one.push, one.copying) == (True, True)
    log.acknowledged(1, False)
    assert one.copying
    log.acknowledged(2, False)
    assert not one.copying


def test_a_channel_is_busy_while_something_that_matters_is_unconfirmed() -> None:
    log = ConfirmLog()
    assert not log.busy
    sent(log, "a")
    assert log.busy
    log.acknowledged(1, False)
    # A caller waits for the copy.
    assert log.busy
    log.acknowledged(2, False)
    assert not log.busy
    (unwaited,) = sent(log, "b", waited=False)
    assert log.unwaited() == [unwaited]
    assert log.busy
    log.acknowledged(3, False)
    # No caller waits for the copy.
    assert unwaited.copying
    assert not log.busy
    assert log.unwaited() == []
    sent(log, "c", waited=False)
    log.refused(6, True)
    # The message must be published again.
    assert log.busy


def test_only_publications_without_a_caller_are_unwaited() -> None:
    log = ConfirmLog()
    sent(log, "a")
    (unwaited,) = sent(log, "b", waited=False)
    sent(log, "c")
    assert log.unwaited() == [unwaited]


def test_a_copy_is_late_if_it_was_routed_before_a_time_and_is_unconfirmed() -> None:
    log = ConfirmLog()
    assert not log.has_late_copy(math.inf)
    (first,) = sent(log, "a")
    log.copy_request_sent()
    (second,) = sent(log, "b")
    log.copy_request_sent()
    # A copy that a slow connection still carries is not late.
    assert not log.has_late_copy(math.inf)
    assert (first.routed, second.routed) == (False, False)
    log.copies_routed(3.0)
    assert (first.routed, second.routed) == (True, False)
    log.copies_routed(4.0)
    assert second.routed
    assert not log.has_late_copy(3.0)
    assert log.has_late_copy(3.1)
    log.acknowledged(2, False)
    assert not log.has_late_copy(4.0)
    assert log.has_late_copy(4.1)
    assert first.routed


def test_a_request_about_copies_says_nothing_of_later_ones_and_ends_with_the_connection() -> None:
    log = ConfirmLog()
    log.copy_request_sent()
    (first,) = sent(log, "a")
    log.copy_request_sent()
    answers = log.answers
    log.copies_routed(1.0)
    assert (first.routed_at, log.answers) == (None, answers + 1)
    log.lost(OSError("cut"))
    assert first.routed
    log.sent(first, 2.0)
    assert not first.routed
    log.copy_request_sent()
    log.copies_routed(3.0)
    assert first.routed_at == 3.0


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
    assert [p.copying for p in (kept, waiting, done, fourth)] == [False] * 4
    assert len(log) == 0


def test_copies_that_are_never_confirmed_take_little_memory() -> None:
    log = ConfirmLog()
    made = sent(log, *map(str, range(confirm_log.MAX_COPIES + 50)))
    assert sum(p.copying for p in made) == confirm_log.MAX_COPIES
    log.copy_request_sent()
    log.copies_routed(1.0)
    assert log.has_late_copy(1e9)
    assert not log.has_late_copy(1.0)


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
    waiter, copies = Waiter(made), Waiter(made, lambda p: not p.copying)
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
    messages = [outgoing("a", shard=3), outgoing("b", shard=3)]
    delivery = Delivery(messages)
    assert delivery.messages == [p.message for p in delivery.publications] == messages
    assert delivery.judge().again == delivery.publications
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


def test_the_first_of_several_failures_is_reported() -> None:
    delivery = Delivery([outgoing(name) for name in "abc"])
    unsent, *lost = delivery.publications
    for publication in lost:
        publication.status = Status.LOST
        publication.failure = OSError(publication.message.what)
    verdict = delivery.judge()
    assert verdict.again == [unsent, *lost]
    assert verdict.failure is lost[0].failure


def test_a_message_that_is_gone_does_not_hide_the_ones_after_it() -> None:
    delivery = Delivery([outgoing("a", shard=None), outgoing("b", shard=5), outgoing("c", shard=4)])
    for publication in delivery.publications:
        publication.status = Status.RETURNED
    verdict = delivery.judge()
    assert verdict.again == delivery.publications[1:]
    assert verdict.declare == [5, 4]
    assert verdict.failure is None


def test_a_delivery_is_done_when_each_message_is_confirmed_or_gone() -> None:
    delivery = Delivery([outgoing("a"), outgoing("b", shard=None)])
    first, second = delivery.publications
    first.status = Status.CONFIRMED
    for status in Status:
        second.status = status
        assert delivery.done is (status in (Status.CONFIRMED, Status.RETURNED))
    # The queue of a shard is declared, and its message published again.
    first.status = Status.RETURNED
    assert not delivery.done


@pytest.mark.parametrize(
    ("confirm", "known", "declared", "at_once", "unknown"),
    [
        (True, False, False, False, []),
        (True, True, False, True, []),
        (True, False, True, True, []),
        (False, False, False, True, [3]),
        (False, True, False, True, []),
        (False, False, True, True, []),
    ],
)
def test_a_live_copy_is_held_if_a_caller_waits_and_its_shard_may_have_no_queue(
    confirm: bool, known: bool, declared: bool, at_once: bool, unknown: List[int]
) -> None:
    delivery = Delivery([outgoing("a", shard=3), outgoing("b", shard=None)])
    verdict = Verdict(delivery.publications, [3] if declared else [], None, [], [])
    assert delivery.choose_copies(verdict, confirm, lambda shard: known and shard == 3) == unknown
    # A queue without a shard is not declared either.
    assert [p.push for p in delivery.publications] == [at_once, True]


def test_held_copies_are_those_of_messages_that_have_one() -> None:
    delivery = Delivery([outgoing("a"), outgoing("b", pushed=False), outgoing("c")])
    first, second, _ = delivery.publications
    first.push = second.push = False
    assert delivery.held_copies() == [first]


@pytest.mark.parametrize(
    ("text", "size", "concerned"),
    [
        ("message size 70000 is larger than configured max size 50000", 60_000, True),
        ("message size 70000 is larger than configured max size 50000", 50_000, False),
        ("message size 70000 is larger than configured max size 50000", 50_001, True),
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


def test_a_size_limit_is_only_read_from_the_error_that_reports_one() -> None:
    text = "PRECONDITION_FAILED - message size 7 is larger than configured max size 5"
    assert size_limit(amqp_errors.PreconditionFailed(text)) == 5
    assert size_limit(amqp_errors.AccessRefused(text)) is None
    assert size_limit(None) is None


def test_a_request_about_queues_is_concerned_by_every_error_about_queues() -> None:
    other = "PRECONDITION_FAILED - inequivalent arg 'durable' for queue 'other' in vhost '/'"
    assert concerns(amqp_errors.PreconditionFailed(other), ())
    assert not concerns(amqp_errors.PreconditionFailed(other), [outgoing("a"), outgoing("b")])
    large = "PRECONDITION_FAILED - message size 7 is larger than configured max size 5"
    assert not concerns(amqp_errors.PreconditionFailed(large), ())


def test_a_description_names_a_few_messages() -> None:
    assert describe([outgoing(name) for name in "ab"]) == "a, b"
    assert describe([outgoing(name) for name in "abc"]) == "a, b, c"
    assert describe([outgoing(name) for name in "abcd"]) == "a, b, c and 1 more"
    assert describe([outgoing(name) for name in "abcde"]) == "a, b, c and 2 more"
    assert describe([]) == "a request about queues"
