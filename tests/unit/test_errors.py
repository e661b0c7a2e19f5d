"""Errors travel between processes."""

from __future__ import annotations

import copy
import pickle
from typing import Any, Tuple, Type

import pytest
from celery.exceptions import BackendError, ImproperlyConfigured
from celery.utils.serialization import get_pickleable_exception
from hypothesis import given
from hypothesis import strategies as st
from kombu.exceptions import OperationalError

from celery_amqp_results import errors

every = pytest.mark.parametrize("kind", [getattr(errors, name) for name in errors.__all__])


@every
@given(arguments=st.lists(st.text(st.characters()) | st.integers(), max_size=3).map(tuple))
def test_every_error_survives_pickling_and_copying(
    kind: Type[Exception], arguments: Tuple[Any, ...]
) -> None:
    error = kind(*arguments)
    error.__dict__["hint"] = "an attribute of its own"
    copies = [
        pickle.loads(pickle.dumps(error, protocol))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    ]
    for again in (*copies, copy.copy(error), copy.deepcopy(error)):
        assert again is not error
        assert type(again) is kind
        assert again.args == arguments
        assert (str(again), repr(again)) == (str(error), repr(error))
        assert again.__dict__ == error.__dict__


@every
def test_celery_preserves_the_type_of_every_error(kind: Type[Exception]) -> None:
    error = kind("what was wrong, and what to do")
    assert get_pickleable_exception(error) is error


def test_all_errors_of_the_module_are_listed() -> None:
    found = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert found == set(errors.__all__)


@every
def test_every_error_documents_when_it_is_raised(kind: Type[Exception]) -> None:
    assert (kind.__doc__ or "").startswith("Raised when ")


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        (errors.InvalidOption, ImproperlyConfigured),
        (errors.DeclarationRefused, ImproperlyConfigured),
        (errors.BackendUnavailable, OperationalError),
        (errors.LookupTimeout, errors.BackendUnavailable),
        (errors.NotConfirmed, errors.BackendUnavailable),
        (errors.ForeignMessage, ValueError),
        (errors.ResultTooLarge, BackendError),
        (errors.BacklogLimitExceeded, BackendError),
    ],
)
def test_errors_can_be_caught_as_well_known_types(
    kind: Type[Exception], base: Type[Exception]
) -> None:
    with pytest.raises(base):
        raise kind("what was wrong, and what to do")
