"""Options are read or refused: a typing error is never a silent default."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_amqp_results import errors
from celery_amqp_results.options import Options, RetryPolicy, parse_url

valid = st.fixed_dictionaries(
    {},
    optional={
        "layout": st.sampled_from(["shared", "per-task"]),
        "shards": st.integers(1, 4096),
        "queue_type": st.sampled_from(["classic", "quorum"]),
        "confirm": st.booleans(),
        "lookup_timeout": st.floats(0.1, 3600),
        "page_size": st.integers(1024, 8 * 1024 * 1024),
    },
)


@given(valid)
def test_what_is_allowed_is_taken(settings: dict[str, Any]) -> None:
    options = Options.read(settings)
    for field in dataclasses.fields(Options):
        assert getattr(options, field.name) == settings.get(field.name, field.default)


@given(valid)
def test_a_url_says_the_same_in_words(settings: dict[str, Any]) -> None:
    query = {name: str(value).lower() for name, value in settings.items()}
    assert Options.read({}, query) == Options.read(settings)


def test_the_url_wins_over_the_settings() -> None:
    assert Options.read({"shards": 3}, {"shards": "5"}).shards == 5


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("shards", 0, "from 1 to 4096"),
        ("shards", "many", "from 1 to 4096"),
        ("shards", True, "from 1 to 4096"),
        ("shards", 2.5, "from 1 to 4096"),
        ("queue_type", "stream", "'classic' and 'quorum'"),
        ("layout", "other", "'shared' and 'per-task'"),
        ("confirm", "perhaps", "true and false"),
        ("confirm", 1, "true and false"),
        ("lookup_timeout", 0, "from 0.1 to 3600"),
        ("lookup_timeout", float("nan"), "from 0.1 to 3600"),
        ("lookup_timeout", None, "from 0.1 to 3600"),
        ("page_size", 10, "from 1024"),
        ("retry_policy", 5, "a dict"),
        ("retry_policy", {"max_retries": -1}, "whole numbers"),
        ("retry_policy", {"tries": 1}, "'tries'"),
    ],
)
def test_what_is_not_allowed_is_refused_by_name(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(errors.InvalidOption) as caught:
        Options.read({name: value})
    text = str(caught.value)
    assert repr(name) in text
    assert repr(value) in text
    assert allowed in text


@given(st.text(min_size=1), st.text())
def test_an_unknown_option_is_refused_with_those_known(name: str, value: str) -> None:
    if name in {field.name for field in dataclasses.fields(Options)}:
        return
    with pytest.raises(errors.InvalidOption) as caught:
        Options.read({}, {name: value})
    assert repr(name) in str(caught.value)
    assert "lookup_timeout" in str(caught.value)


def test_settings_that_are_no_dict_are_refused() -> None:
    with pytest.raises(errors.InvalidOption, match="must be a dict"):
        Options.read(["shards"])  # type: ignore[arg-type]


def test_a_retry_policy_ends_or_does_not() -> None:
    policy = Options.read(
        {"retry_policy": {"max_retries": 2, "interval_step": 0.5, "interval_max": 0.6}}
    ).retry_policy
    assert [policy.pause(attempt) for attempt in (1, 2, 3)] == [0.0, 0.5, None]
    assert RetryPolicy(max_retries=None).pause(10**6) == 1.0


@pytest.mark.parametrize("url", [None, "amqp://", "amqp:///", "pyamqp://", "amqps://"])
def test_a_url_without_a_server_means_the_broker_of_the_app(url: str | None) -> None:
    assert parse_url(url).broker is None


def test_options_are_taken_out_of_a_url_and_the_rest_is_left() -> None:
    url = parse_url("amqp://u:p@h:1/v?shards=4&ssl_ca_certs=x&confirm=false")
    assert url.broker == "amqp://u:p@h:1/v?ssl_ca_certs=x"
    assert url.options == {"shards": "4", "confirm": "false"}


def test_several_hosts_are_kept_and_may_not_contradict_each_other() -> None:
    url = parse_url("amqp://a//;amqp://b//?shards=4")
    assert url.broker == "amqp://a//;amqp://b//"
    assert url.options == {"shards": "4"}
    with pytest.raises(errors.InvalidOption, match="shards"):
        parse_url("amqp://a//?shards=4;amqp://b//?shards=5")


# No digits and nothing that the rest of the URL has.
secrets = st.text(alphabet="QXZ%@:!", min_size=6, max_size=20)


@given(secrets, st.booleans(), st.integers(1, 3))
def test_no_password_is_shown(secret: str, options: bool, hosts: int) -> None:
    from urllib.parse import quote

    part = f"amqp://user:{quote(secret, safe='')}@host:5672/vhost"
    url = ";".join([part] * hosts) + ("?shards=4" if options else "")
    shown = parse_url(url).sanitized()
    assert quote(secret, safe="") not in shown
    assert secret not in shown
    assert shown.count("user:**@host:5672/vhost") == hosts
    assert parse_url(url).complete() == url
