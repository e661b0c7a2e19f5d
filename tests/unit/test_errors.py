"""Errors travel between processes."""

from __future__ import annotations

import copy
import pickle

import pytest
from celery.exceptions import ImproperlyConfigured
from kombu.exceptions import OperationalError

from celery_amqp_results import errors


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_survives_pickling(name: str) -> None:
    error = getattr(errors, name)("what was wrong, and what to do")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is type(error)
        assert str(again) == str(error)


def test_errors_are_caught_as_what_callers_know() -> None:
    assert issubclass(errors.InvalidOption, ImproperlyConfigured)
    assert issubclass(errors.DeclarationRefused, ImproperlyConfigured)
    assert issubclass(errors.LookupTimeout, OperationalError)
    assert issubclass(errors.NotConfirmed, errors.BackendUnavailable)
