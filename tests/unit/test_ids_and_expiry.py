"""Ids, names of states and times of expiry, in every form in which users give them."""

from __future__ import annotations

import datetime
import math
import uuid
from typing import Any, Optional

import pytest

from celery_amqp_results.protocol import expiry
from celery_amqp_results.protocol.ids import id_text, plain_ids, state_name

ID = uuid.UUID("0f3b2c4e-8d1a-4a52-9a4b-6f2a1c7d8e90")
TEN_YEARS = 10 * 365 * 24 * 3600


@pytest.mark.parametrize(
    ("value", "seconds", "milliseconds"),
    [
        (None, None, None),
        (0, None, None),
        ("0", None, None),
        (datetime.timedelta(0), None, None),
        (1, 1, 1000),
        (2.5, 2.5, 2500),
        ("2.5", 2.5, 2500),
        (1.9999, 1.9999, 1999),
        (datetime.timedelta(minutes=2), 120, 120_000),
        # The broker counts whole milliseconds, and 0 would expire at once.
        (0.0001, 0.0001, 1),
        (TEN_YEARS, TEN_YEARS, expiry.MAX_MILLISECONDS),
        (TEN_YEARS + 1, TEN_YEARS, expiry.MAX_MILLISECONDS),
    ],
)
def test_an_expiry_is_given_in_several_forms(
    value: Any, seconds: Optional[float], milliseconds: Optional[int]
) -> None:
    assert expiry.seconds(value) == seconds
    assert expiry.milliseconds(value) == milliseconds


@pytest.mark.parametrize("value", ["soon", "", True, False, [1], b"1", 1j])
def test_an_expiry_that_is_no_time_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"is not a number of seconds, nor a timedelta$") as caught:
        expiry.seconds(value)
    assert str(caught.value).startswith(repr(value))


@pytest.mark.parametrize("value", [-1, "-0.5", datetime.timedelta(days=-1), math.nan, math.inf])
def test_an_expiry_in_the_past_or_without_end_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"from now\. Use 0 or None to keep results until they are "
                       r"forgotten\.$") as caught:  # fmt: skip
        expiry.seconds(value)
    assert str(caught.value).startswith(f"{value!r} is not a number of seconds from now")


@pytest.mark.parametrize("value", [str(ID), ID, str(ID).encode()], ids=type)
def test_an_id_is_given_in_several_forms(value: Any) -> None:
    assert id_text(value) == str(ID)


@pytest.mark.parametrize("value", [None, 5, ("a",)])
def test_what_is_no_id_is_refused(value: Any) -> None:
    with pytest.raises(
        TypeError, match=r"is not the id of a task or a group: give text or a UUID$"
    ):
        id_text(value)


def test_every_id_in_a_tree_of_results_is_text() -> None:
    tree = ((ID, None), [(("a", (ID, None)), None), (ID,)])
    text = str(ID)
    assert plain_ids(tree) == [[text, None], [[["a", [text, None]], None], [text]]]


def test_a_state_may_have_no_name() -> None:
    assert state_name("SUCCESS") == "SUCCESS"
    assert state_name(None) == state_name("") == ""
    assert state_name(5) == "5"


class Phase(str):
    def __str__(self) -> str:
        return "Phase.READING"


def test_a_text_of_another_class_names_its_state_by_its_value() -> None:
    assert state_name(Phase("READING")) == "READING"
