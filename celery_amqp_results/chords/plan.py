"""Plans: a leader's knowledge of a chord, and amendments to it.

A plan is the durable message that describes one sending of a chord. An amendment adds tasks to the
header of a chord that is running. This module does no I/O.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Tuple, Union

from celery.canvas import Signature, _chain, chord, group
from celery.result import ResultSet

from celery_amqp_results import errors
from celery_amqp_results.protocol.message import StateMessage

__all__ = ("Amendment", "Nested", "Plan", "fill", "leaves", "proofs", "tree")

#: The results of a header: the id of a task, or a list of these for a group in the header.
Nested = Union[str, List["Nested"]]

#: The most tasks of a body that are looked up as proof that it was sent.
MAX_PROOFS = 10


@dataclasses.dataclass(frozen=True)
class Plan:
    """One sending of a chord."""

    #: Id of the header.
    group_id: str
    #: Distinguishes two sendings of the same chord.
    mark: str
    #: The ids of the header's tasks, in order and nesting.
    results: List[Nested]
    #: When the sender began to send the chord, in microseconds since 1970.
    began: int
    #: Milliseconds without a new result after which the chord is abandoned; ``None`` for never.
    expires: Optional[int] = None
    #: Whether the sender has sent a chord with this id before, whose results may be in the store.
    again: bool = False
    #: Tasks of the body: a state of one of them, published since ``began``, proves that the body
    #: was sent.
    proofs: Tuple[str, ...] = ()
    #: Id of the first task of the workflow, ``None`` if that is a task of the header.
    root_id: Optional[str] = None
    #: The message, which holds the signature of the body.
    message: Optional[StateMessage] = dataclasses.field(default=None, compare=False, repr=False)

    def content(self, body: Mapping[str, object]) -> Dict[str, object]:
        """Return the content of the message, for the body with the signature *body*."""
        return {
            "mark": self.mark,
            "results": self.results,
            "began": self.began,
            "expires": self.expires,
            "again": self.again,
            "proofs": list(self.proofs),
            "root_id": self.root_id,
            "body": dict(body),
        }

    @classmethod
    def read(cls, content: object, message: StateMessage) -> Plan:
        """Read the plan from *message*, whose decoded body is *content*.

        Raises:
            ForeignMessage: when a field is missing or has a wrong type.
        """
        where = f"the plan of chord {message.id!r:.100}"
        if not isinstance(content, Mapping) or not isinstance(content.get("body"), Mapping):
            raise errors.ForeignMessage(f"{where} has no body")
        expires, began = content.get("expires"), content.get("began")
        proofs, root_id = content.get("proofs", []), content.get("root_id")
        if not (
            isinstance(content.get("mark"), str)
            and type(began) is int
            and (expires is None or type(expires) is int)
            and (root_id is None or isinstance(root_id, str))
            and isinstance(content.get("results"), (list, tuple))
            and isinstance(proofs, (list, tuple))
            and all(isinstance(proof, str) for proof in proofs)
        ):
            raise errors.ForeignMessage(f"{where} has a field of a wrong type")
        return cls(
            message.id,
            content["mark"],
            _checked(content["results"], where),
            began,
            expires,
            bool(content.get("again")),
            tuple(proofs),
            root_id,
            message,
        )


@dataclasses.dataclass(frozen=True)
class Amendment:
    """Tasks that a running task has added to the header of its chord."""

    group_id: str
    mark: str
    #: The task that has added them.
    after: Optional[str]
    #: Their ids, in order and nesting.
    results: List[Nested]
    #: Id of the group that they are in, where that is not the header.
    subgroup: Optional[str] = None
    #: When they were added, in microseconds since 1970, and the longest time to keep that.
    began: int = 0
    expires: Optional[int] = None

    def content(self) -> Dict[str, object]:
        """Return the content of the message."""
        return {
            "mark": self.mark,
            "after": self.after,
            "results": self.results,
            "subgroup": self.subgroup,
            "expires": self.expires,
        }

    @classmethod
    def read(cls, content: object, message: StateMessage) -> Amendment:
        """Read the amendment from *message*.

        Raises:
            ForeignMessage: when a field is missing or has a wrong type.
        """
        where = f"the amendment of chord {message.id!r:.100}"
        if not (
            isinstance(content, Mapping)
            and isinstance(content.get("mark"), str)
            and isinstance(content.get("results"), (list, tuple))
            and isinstance(content.get("after"), (str, type(None)))
            and isinstance(content.get("subgroup"), (str, type(None)))
            and type(content.get("expires")) in (int, type(None))
        ):
            raise errors.ForeignMessage(f"{where} has a field of a wrong type")
        return cls(
            message.id,
            content["mark"],
            content["after"],
            _checked(content["results"], where),
            content["subgroup"],
            message.published,
            content["expires"],
        )


def _checked(results: Iterable[object], where: str) -> List[Nested]:
    checked: List[Nested] = []
    for node in results:
        if isinstance(node, str) and node:
            checked.append(node)
        elif isinstance(node, (list, tuple)):
            checked.append(_checked(node, where))
        else:
            raise errors.ForeignMessage(f"{where} has a result that is no id: {node!r:.100}")
    return checked


def tree(results: Iterable[Any]) -> List[Nested]:
    """Return the ids of Celery's *results*, in the same order and nesting."""
    return [
        tree(result.results) if isinstance(result, ResultSet) else result.id for result in results
    ]


def leaves(results: Iterable[Nested]) -> Iterator[str]:
    """Yield all ids in *results*, in order."""
    for node in results:
        if isinstance(node, str):
            yield node
        else:
            yield from leaves(node)


def amended(results: List[Nested], amendments: Iterable[Amendment]) -> List[Nested]:
    """Return *results* with the tasks of *amendments*, each behind the task that added it."""
    added: Dict[Optional[str], List[str]] = {}
    for amendment in amendments:
        added.setdefault(amendment.after, []).extend(leaves(amendment.results))
    if not added:
        return results

    def extend(nodes: Iterable[Nested]) -> Iterator[Nested]:
        for node in nodes:
            if isinstance(node, str):
                yield node
                yield from extend(added.pop(node, ()))
            else:
                yield list(extend(node))

    extended = list(extend(results))
    # Amendments of unknown tasks come last.
    while added:
        extended.extend(extend(added.pop(next(iter(added)))))
    return extended


def fill(results: Iterable[Nested], values: Mapping[str, object]) -> List[object]:
    """Return the values of all ids, in the order and nesting of *results*."""
    return [values[node] if isinstance(node, str) else fill(node, values) for node in results]


def proofs(body: Signature) -> Tuple[str, ...]:
    """Return ids of tasks of a frozen *body* whose states prove that it was sent.

    Older states than the chord prove nothing: a task that replaces itself by a chord gives its own
    id to the body.
    """
    return tuple(dict.fromkeys(_first_tasks(body)))[:MAX_PROOFS]


def _first_tasks(signature: Signature) -> Iterator[str]:
    if isinstance(signature, _chain):
        if signature.tasks:
            yield from _first_tasks(signature.tasks[0])
    elif isinstance(signature, group):
        for task in signature.tasks:
            yield from _first_tasks(task)
    elif isinstance(signature, chord):
        # Its header gets new ids when it is sent.
        return
    else:
        task_id = (signature.get("options") or {}).get("task_id")
        if isinstance(task_id, str):
            yield task_id
