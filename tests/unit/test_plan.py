"""Plans and amendments: what is written is read again, and nothing else is."""

from __future__ import annotations

from typing import Any, Dict

import pytest
from celery import chord, group
from celery.canvas import Signature, _chain
from celery.result import EagerResult, GroupResult

from celery_amqp_results import errors
from celery_amqp_results.chords.plan import MAX_PROOFS, Amendment, Plan, amended, proofs, tree
from celery_amqp_results.protocol.message import PLAN
from tests.unit.fakes import state

MESSAGE = state("header", "PLAN", 123, kind=PLAN)
BODY = {"task": "body"}


def test_a_plan_is_read_as_it_was_written() -> None:
    plan = Plan("header", "mark", ["a", ["b", "c"]], 5, 6000, True, ("body",), "root")
    content = plan.content(BODY)
    assert content["body"] == BODY
    read = Plan.read(content, MESSAGE)
    assert read == plan
    assert read.message is MESSAGE


def test_a_plan_may_lack_what_is_optional() -> None:
    content = {"mark": "m", "results": ("a",), "began": 5, "body": BODY}
    assert Plan.read(content, MESSAGE) == Plan("header", "m", ["a"], 5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mark": None},
        {"mark": 1},
        {"began": None},
        {"began": True},
        {"began": "5"},
        {"expires": 1.5},
        {"expires": False},
        {"root_id": 7},
        {"results": "a"},
        {"results": None},
        {"proofs": None},
        {"proofs": "body"},
        {"proofs": ["body", 1]},
    ],
)
def test_a_plan_with_a_field_of_a_wrong_type_is_refused(wrong: Dict[str, Any]) -> None:
    content = {**Plan("header", "m", ["a"], 5, 6, proofs=("b",)).content(BODY), **wrong}
    with pytest.raises(
        errors.ForeignMessage, match=r"^the plan of chord 'header' has a field of a wrong type$"
    ):
        Plan.read(content, MESSAGE)


@pytest.mark.parametrize("content", [None, [], {}, {"body": None}, {"mark": "m", "body": "x"}])
def test_a_plan_without_a_body_is_refused(content: Any) -> None:
    with pytest.raises(errors.ForeignMessage, match=r"^the plan of chord 'header' has no body$"):
        Plan.read(content, MESSAGE)


@pytest.mark.parametrize("node", [None, 5, "", {"id": "a"}, ["b", [""]]])
def test_a_result_that_is_no_id_is_refused(node: Any) -> None:
    plan = {**Plan("header", "m", ["a"], 5).content(BODY), "results": ["a", node]}
    with pytest.raises(
        errors.ForeignMessage, match=r"^the plan of chord 'header' has a result that is no id: "
    ):
        Plan.read(plan, MESSAGE)
    amendment = {**Amendment("header", "m", None, []).content(), "results": [node]}
    with pytest.raises(
        errors.ForeignMessage,
        match=r"^the amendment of chord 'header' has a result that is no id: ",
    ):
        Amendment.read(amendment, MESSAGE)


@pytest.mark.parametrize("after", [None, "a"])
@pytest.mark.parametrize("subgroup", [None, "g"])
@pytest.mark.parametrize("expires", [None, 6000])
def test_an_amendment_is_read_as_it_was_written(after: Any, subgroup: Any, expires: Any) -> None:
    made = Amendment("header", "mark", after, ["b", ["c"]], subgroup, MESSAGE.published, expires)
    assert Amendment.read(made.content(), MESSAGE) == made


@pytest.mark.parametrize(
    "wrong",
    [
        {"mark": None},
        {"results": "a"},
        {"after": 1},
        {"subgroup": ["g"]},
        {"expires": "1"},
        {"expires": True},
    ],
)
def test_an_amendment_with_a_field_of_a_wrong_type_is_refused(wrong: Dict[str, Any]) -> None:
    content = {**Amendment("header", "mark", "a", ["b"], "g", 0, 6).content(), **wrong}
    for refused in (content, list(content)):
        with pytest.raises(
            errors.ForeignMessage,
            match=r"^the amendment of chord 'header' has a field of a wrong type$",
        ):
            Amendment.read(refused, MESSAGE)


def test_a_tree_has_the_order_and_nesting_of_the_results() -> None:
    one, two, three = (EagerResult(name, None, "SUCCESS") for name in ("a", "b", "c"))
    assert tree([one, GroupResult("g", [two, three])]) == ["a", ["b", "c"]]


def test_tasks_that_were_added_to_no_known_task_come_last() -> None:
    more = [
        Amendment("header", "x", after, [added])
        for after, added in ((None, "d"), ("d", "e"), ("unknown", "f"), ("a", "g"), ("a", "h"))
    ]
    assert amended([["a"], "b"], more) == [["a", "g", "h"], "b", "d", "e", "f"]
    assert amended(["a"], []) == ["a"]


def task(task_id: str) -> Signature:
    return Signature("task", options={"task_id": task_id})


def test_the_first_tasks_of_a_body_prove_that_it_was_sent() -> None:
    first, second = task("a"), task("b")
    assert proofs(first) == ("a",)
    assert proofs(_chain(first, second)) == ("a",)
    assert proofs(group([first, second, first])) == ("a", "b")
    assert proofs(_chain(group([second, _chain(first, task("c"))]), task("d"))) == ("b", "a")


def test_a_task_without_an_id_of_its_own_proves_nothing() -> None:
    header_gets_new_ids = chord([task("x")], task("y"))
    assert proofs(header_gets_new_ids) == ()
    assert proofs(_chain()) == ()
    assert proofs(Signature("task")) == ()
    assert proofs({"options": None}) == ()
    assert proofs(group([header_gets_new_ids, Signature("task"), _chain(), task("a")])) == ("a",)


def test_a_limited_number_of_tasks_is_looked_up_as_proof() -> None:
    names = [str(number) for number in range(MAX_PROOFS + 1)]
    assert proofs(group([task(name) for name in names])) == tuple(names[:MAX_PROOFS])
