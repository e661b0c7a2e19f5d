"""Options are read or refused: a typing error never becomes a silent default."""

from __future__ import annotations

import dataclasses
import ssl
from typing import Any, Dict, List, Tuple
from urllib.parse import parse_qsl, quote, urlencode

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from celery_amqp_results import errors
from celery_amqp_results.options import Options, ResultURL, RetryPolicy, parse_url

SETTING = "result_backend_transport_options"
URL = "the result backend URL"
NAMES = {field.name for field in dataclasses.fields(Options)}

#: Options whose values a URL can hold.
simple = {
    "layout": st.sampled_from(["shared", "per-task"]),
    "shards": st.integers(1, 4096),
    "queue_type": st.sampled_from(["classic", "quorum"]),
    "confirm": st.booleans(),
    "use_ssl": st.booleans(),
    "declare": st.booleans(),
    "lookup_timeout": st.floats(0.1, 3600),
    "page_size": st.integers(1024, 8 * 1024 * 1024),
    "inline_limit": st.integers(1024, 8 * 1024 * 1024),
    "max_decompressed_size": st.integers(1024, 999_999_999),
    "view_memory": st.integers(0, 999_999_999),
    "track_sent": st.booleans(),
}
seconds = st.floats(0, 3600) | st.integers(0, 3600)
policies = st.fixed_dictionaries(
    {},
    optional={
        "max_retries": st.none() | st.integers(0, 10**6),
        "interval_start": seconds,
        "interval_step": seconds,
        "interval_max": seconds,
    },
)
valid_simple = st.fixed_dictionaries({}, optional=simple)
valid = st.fixed_dictionaries({}, optional={**simple, "retry_policy": policies})

# Values of types that no option has. Each has a different repr().
odd = (
    st.none()
    | st.binary(max_size=3)
    | st.lists(st.integers(), max_size=2)
    | st.tuples(st.text(max_size=2))
    | st.complex_numbers()
)
not_whole = odd | st.booleans() | st.floats() | st.sampled_from(["", "-1", "1.5", "0x10", "many"])
not_seconds: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | st.just([]) | st.sampled_from(["", "soon", "nan", "inf"])
)


def whole_outside(low: int, high: int) -> st.SearchStrategy[Any]:
    outside = st.integers(max_value=low - 1) | st.integers(min_value=high + 1)
    return outside | outside.map(str) | not_whole


def seconds_outside(low: float, high: float) -> st.SearchStrategy[Any]:
    outside = st.floats(max_value=low, exclude_max=True) | st.floats(
        min_value=high, exclude_min=True
    )
    return outside | outside.map(str) | st.just(float("nan")) | not_seconds


#: For each option, invalid values, and the requirement that the error must state.
invalid: Dict[str, Tuple[st.SearchStrategy[Any], str]] = {
    "layout": (odd | st.text().filter(lambda t: t not in ("shared", "per-task")), "'per-task'"),
    "shards": (whole_outside(1, 4096), "whole numbers from 1 to 4096"),
    "queue_type": (odd | st.text().filter(lambda t: t not in ("classic", "quorum")), "'quorum'"),
    "confirm": (odd | st.integers() | st.sampled_from(["", "perhaps", "2"]), "true and false"),
    "declare": (odd | st.integers() | st.sampled_from(["", "perhaps", "2"]), "true and false"),
    "lookup_timeout": (seconds_outside(0.1, 3600), "seconds from 0.1 to 3600"),
    "page_size": (whole_outside(1024, 8 * 1024 * 1024), "whole numbers from 1024 to 8388608"),
    "inline_limit": (whole_outside(1024, 8 * 1024 * 1024), "whole numbers from 1024 to 8388608"),
    "view_memory": (whole_outside(0, 999_999_999), "whole numbers from 0 to 999999999"),
    "max_decompressed_size": (
        whole_outside(1024, 999_999_999),
        "whole numbers from 1024 to 999999999",
    ),
    "use_ssl": (st.integers() | st.just({"ssl_cert_reqs": 0}), ""),
    "track_sent": (odd | st.integers() | st.sampled_from(["", "perhaps", "2"]), "true and false"),
    "retry_policy": (
        odd | st.integers() | st.text(),
        "a dict",
    ),
}
bad_options = st.sampled_from(sorted(invalid)).flatmap(
    lambda name: st.tuples(st.just(name), invalid[name][0])
)
bad_entries = st.sampled_from(["max_retries", "interval_start", "interval_step", "interval_max"])


@given(valid)
def test_allowed_values_are_accepted(settings: Dict[str, Any]) -> None:
    options = Options.read(settings)
    for field in dataclasses.fields(Options):
        wanted = settings.get(field.name, field.default)
        if isinstance(wanted, dict):
            wanted = RetryPolicy(**wanted)
        assert getattr(options, field.name) == wanted


@given(valid)
def test_parsed_options_are_accepted_again(settings: Dict[str, Any]) -> None:
    options = Options.read(settings)
    again = {field.name: getattr(options, field.name) for field in dataclasses.fields(Options)}
    # An option that was not given has no value of its own.
    again = {name: value for name, value in again.items() if value is not None}
    assert Options.read(again) == options


@given(valid_simple)
def test_options_in_a_url_are_parsed_from_text(settings: Dict[str, Any]) -> None:
    url = "amqp://?" + urlencode({name: str(value).lower() for name, value in settings.items()})
    assert Options.read({}, parse_url(url).options) == Options.read(settings)


@pytest.mark.parametrize(
    ("word", "value"),
    [("1", True), ("Yes", True), ("on", True), ("0", False), ("NO", False), ("off", False)],
)
def test_booleans_have_several_spellings(word: str, value: bool) -> None:
    assert Options.read({"confirm": word}).confirm is value


def test_every_option_has_a_parser_and_a_default() -> None:
    assert set(simple) | {"retry_policy"} == set(invalid) == NAMES
    assert Options.read() == Options.read({}, {}) == Options.read(None, None) == Options()


@given(valid_simple, valid_simple)
def test_the_url_overrides_the_settings(settings: Dict[str, Any], query: Dict[str, Any]) -> None:
    words = {name: str(value).lower() for name, value in query.items()}
    assert Options.read(settings, words) == Options.read({**settings, **query})


@given(bad_options)
def test_invalid_values_are_refused_with_the_option_s_name(bad: Tuple[str, Any]) -> None:
    name, value = bad
    with pytest.raises(errors.InvalidOption) as caught:
        Options.read({name: value})
    text = str(caught.value)
    assert repr(name) in text
    assert repr(value) in text
    assert SETTING in text
    assert invalid[name][1] in text
    # Users see this error without a chained one.
    assert caught.value.__suppress_context__


# No combination of these letters is a number, a name or a boolean.
@given(st.sampled_from(sorted(invalid)), st.text("xyz.-", max_size=5))
def test_invalid_values_in_a_url_are_refused_as_part_of_the_url(name: str, value: str) -> None:
    with pytest.raises(errors.InvalidOption) as caught:
        Options.read({}, {name: value})
    text = str(caught.value)
    assert repr(name) in text
    assert repr(value) in text
    assert URL in text
    assert SETTING not in text
    assert invalid[name][1] in text


@given(valid, bad_options)
def test_one_bad_option_among_good_ones_is_refused(
    settings: Dict[str, Any], bad: Tuple[str, Any]
) -> None:
    with pytest.raises(errors.InvalidOption, match=bad[0]):
        Options.read({**settings, bad[0]: bad[1]})


@given(policies, bad_entries, st.data())
def test_an_invalid_entry_of_a_retry_policy_is_refused_with_its_name(
    policy: Dict[str, Any], name: str, data: Any
) -> None:
    wrong, allowed = (
        (whole_outside(0, 10**6).filter(lambda v: v is not None), "whole numbers from 0")
        if name == "max_retries"
        else (seconds_outside(0, 3600), "seconds from 0 to 3600")
    )
    policy = {**policy, name: data.draw(wrong)}
    with pytest.raises(errors.InvalidOption) as caught:
        Options.read({"retry_policy": policy})
    text = str(caught.value)
    assert "'retry_policy'" in text
    assert repr(policy) in text
    assert f"entry {name!r}" in text
    assert allowed in text


def test_an_unknown_entry_of_a_retry_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(errors.InvalidOption, match=r"entry 'tries'.*max_retries"):
        Options.read({"retry_policy": {"tries": 1}})


@given(st.text(st.characters(), min_size=1) | st.integers(), st.text(st.characters()))
def test_an_unknown_option_is_refused_with_the_known_ones(name: Any, value: str) -> None:
    assume(name not in NAMES)
    with pytest.raises(errors.InvalidOption) as caught:
        Options.read({name: value})
    text = str(caught.value)
    assert repr(name) in text
    assert repr(value) in text
    assert SETTING in text
    assert all(known in text for known in NAMES)


@pytest.mark.parametrize("settings", [["shards"], "shards", 5, True, {"shards"}])
def test_settings_that_are_not_a_dict_are_refused(settings: Any) -> None:
    with pytest.raises(errors.InvalidOption, match="must be a dict") as caught:
        Options.read(settings)
    assert repr(settings) in str(caught.value)


def test_a_retry_policy_ends_or_does_not() -> None:
    policy = Options.read(
        {"retry_policy": {"max_retries": 2, "interval_step": 0.5, "interval_max": 0.6}}
    ).retry_policy
    assert [policy.pause(attempt) for attempt in (1, 2, 3)] == [0.0, 0.5, None]
    assert RetryPolicy(max_retries=None).pause(10**6) == 1.0
    assert RetryPolicy(max_retries=0).pause(1) is None


@given(policies)
def test_pauses_grow_up_to_the_limit(given_policy: Dict[str, Any]) -> None:
    policy = Options.read({"retry_policy": given_policy}).retry_policy
    pauses = [policy.pause(attempt) for attempt in range(1, 6)]
    made = [pause for pause in pauses if pause is not None]
    # After giving up there are no more pauses.
    assert pauses == made + [None] * (5 - len(made))
    assert made == sorted(made)
    assert all(0 <= pause <= policy.interval_max for pause in made)


# -- the limits, and what the errors say -------------------------------------------------------

LIMITS = [
    ("shards", 1, 4096, 1),
    ("page_size", 1024, 8 * 1024 * 1024, 1),
    ("inline_limit", 1024, 8 * 1024 * 1024, 1),
    ("view_memory", 0, 999_999_999, 1),
    ("max_decompressed_size", 1024, 999_999_999, 1),
    ("lookup_timeout", 0.1, 3600, 0.001),
]
POLICY_LIMITS = [
    ("max_retries", 0, 10**6, 1),
    ("interval_start", 0, 3600, 0.001),
    ("interval_step", 0, 3600, 0.001),
    ("interval_max", 0, 3600, 0.001),
]


@pytest.mark.parametrize(("name", "low", "high", "step"), LIMITS)
def test_the_limits_of_an_option_are_allowed_and_nothing_beyond(
    name: str, low: Any, high: Any, step: Any
) -> None:
    for value in (low, high):
        assert getattr(Options.read({name: value}), name) == value
        assert getattr(Options.read({}, {name: str(value)}), name) == value
    for value in (low - step, high + step, True, 10**400):
        with pytest.raises(errors.InvalidOption):
            Options.read({name: value})


@pytest.mark.parametrize(("name", "low", "high", "step"), POLICY_LIMITS)
def test_the_limits_of_an_entry_of_a_retry_policy_are_allowed_and_nothing_beyond(
    name: str, low: Any, high: Any, step: Any
) -> None:
    for value in (low, high):
        policy = Options.read({"retry_policy": {name: value}}).retry_policy
        assert getattr(policy, name) == value
    for value in (low - step, high + step, True):
        with pytest.raises(errors.InvalidOption):
            Options.read({"retry_policy": {name: value}})


TLS = "ca_certs, cert_reqs, certfile, ciphers, context, keyfile, server_hostname, ssl_version"
TLS_IN_URL = (
    "ssl_ca_certs, ssl_cert_reqs, ssl_certfile, ssl_ciphers, ssl_keyfile, ssl_server_hostname"
)
ENTRIES = "interval_max, interval_start, interval_step and max_retries"


@pytest.mark.parametrize(
    ("settings", "query", "message"),
    [
        (
            {"shard": 4},
            {},
            f"unknown option 'shard' in {SETTING} (its value is 4); known options are: "
            + ", ".join(sorted(NAMES)),
        ),
        (
            {"layout": "x"},
            {},
            f"invalid value 'x' for option 'layout' in {SETTING}: "
            "allowed are 'shared' and 'per-task'",
        ),
        (
            {},
            {"shards": "x"},
            f"invalid value 'x' for option 'shards' in {URL}: "
            "allowed are whole numbers from 1 to 4096",
        ),
        (
            {},
            {"confirm": "x"},
            f"invalid value 'x' for option 'confirm' in {URL}: allowed are true and false",
        ),
        (
            {"lookup_timeout": "x"},
            {},
            f"invalid value 'x' for option 'lookup_timeout' in {SETTING}: "
            "allowed are seconds from 0.1 to 3600",
        ),
        (
            {"use_ssl": {"z": 1, "b": 2}},
            {},
            f"invalid value {{'z': 1, 'b': 2}} for option 'use_ssl' in {SETTING}: "
            f"'b' is unknown to py-amqp; known are {TLS}",
        ),
        (
            {},
            {"ssl_x": "y"},
            f"unknown option 'ssl_x' in {URL} (its value is 'y'); "
            f"known options of TLS are: {TLS_IN_URL}",
        ),
        (
            {},
            {"ssl_cert_reqs": "cert_cert_none"},
            f"invalid value 'cert_cert_none' for option 'ssl_cert_reqs' in {URL}: "
            "allowed are none, optional, required",
        ),
        (
            {"retry_policy": 5},
            {},
            f"invalid value 5 for option 'retry_policy' in {SETTING}: it must be a dict",
        ),
        (
            {"retry_policy": {"x": 1}},
            {},
            f"invalid value {{'x': 1}} for option 'retry_policy' in {SETTING}: "
            f"entry 'x': known entries are {ENTRIES}",
        ),
    ],
)
def test_an_error_names_the_option_its_value_its_source_and_what_is_allowed(
    settings: Dict[str, Any], query: Dict[str, str], message: str
) -> None:
    with pytest.raises(errors.InvalidOption) as caught:
        Options.read(settings, query)
    assert str(caught.value) == message


def test_options_of_tls_are_collected_from_anywhere_in_a_url() -> None:
    query = {"ssl_ca_certs": "x", "shards": "4", "ssl_cert_reqs": "none", "confirm": "false"}
    tls = {"ca_certs": "x", "cert_reqs": ssl.CERT_NONE}
    assert Options.read({}, query) == Options(shards=4, confirm=False, use_ssl=tls)


def test_options_of_tls_in_the_settings_are_those_of_py_amqp() -> None:
    given_tls = {"ca_certs": "x", "context": None}
    used = Options.read({"use_ssl": given_tls}).use_ssl
    assert used == given_tls
    assert used is not given_tls


def test_options_can_be_changed() -> None:
    options = Options(shards=4, retry_policy=RetryPolicy(max_retries=2))
    changed = options.changed({"confirm": False, "layout": "shared"})
    assert changed == dataclasses.replace(options, confirm=False, layout="shared")
    with pytest.raises(errors.InvalidOption, match="unknown option 'shard'"):
        options.changed({"shard": 5})


# -- the URL -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", [None, "", "amqp://", "amqp:///", "amqp:////", "pyamqp://", "amqps://"]
)
def test_a_url_without_a_server_means_the_broker_of_the_app(url: str | None) -> None:
    assert parse_url(url).broker is None
    assert parse_url(url).options == {}


def test_the_scheme_is_taken_from_the_first_url() -> None:
    assert parse_url("amqps://").scheme == "amqps"
    assert parse_url("amqps://a//;b//").broker == "amqps://a//;amqps://b//"
    assert parse_url("amqp://a//; amqps://b//").broker == "amqp://a//;amqps://b//"


@pytest.mark.parametrize(
    ("url", "scheme", "broker", "options"),
    [
        (None, "amqp", None, {}),
        ("X//", "amqp", "amqp://X//", {}),
        ("amqp://XX", "amqp", "amqp://XX", {}),
        ("amqp://?login_method=PLAIN", "amqp", "amqp://?login_method=PLAIN", {}),
        ("amqp://h//?ssl_ca_certs=a?b://c", "amqp", "amqp://h//", {"ssl_ca_certs": "a?b://c"}),
        ("amqps+x://h//?shards=4;?shards=4", "amqps+x", "amqps+x://h//", {"shards": "4"}),
    ],
)
def test_unusual_urls_are_taken_apart(
    url: str | None, scheme: str, broker: str | None, options: Dict[str, str]
) -> None:
    assert parse_url(url) == ResultURL(scheme, broker, options)


@pytest.mark.parametrize(
    "url",
    [
        "amqps://?shards=4",
        "amqps://",
        "amqp://a//?shards=4",
        "amqp://a//?login_method=PLAIN&shards=4",
        "amqp://a//?login_method=PLAIN;amqp://b//?shards=4",
    ],
)
def test_a_url_without_a_password_is_shown_as_it_is(url: str) -> None:
    assert parse_url(url).complete() == parse_url(url).sanitized() == url
    assert repr(parse_url(url)) == f"<ResultURL: {url}>"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("amqp://user:a@b:c@h//", "amqp://user:**@h//"),
        ("amqp://user:a:b@h//", "amqp://user:**@h//"),
        ("amqp://us%2Fer:p@h//", "amqp://us%2Fer:**@h//"),
        ("amqp://user@h//", "amqp://user@h//"),
        ("mongodb://u:a://b@h/db", "mongodb://u:**@h/db"),
    ],
)
def test_only_the_password_of_a_url_is_masked(url: str, shown: str) -> None:
    assert parse_url(url).sanitized() == shown


def test_options_are_removed_from_a_url_and_the_rest_stays() -> None:
    url = parse_url("amqp://u:p@h:1/v?shards=4&ssl_ca_certs=x&confirm=false&login_method=PLAIN")
    assert url.broker == "amqp://u:p@h:1/v?login_method=PLAIN"
    assert url.options == {"shards": "4", "ssl_ca_certs": "x", "confirm": "false"}


def test_a_url_may_hold_the_options_of_tls() -> None:
    query = (
        "ssl_ca_certs=/ca.pem&ssl_certfile=/c.pem&ssl_keyfile=/k.pem"
        "&ssl_cert_reqs=CERT_REQUIRED&ssl_server_hostname=h"
    )
    for url in (f"amqps://h//?{query}", f"amqps://?{query}"):
        assert Options.read({"use_ssl": True}, parse_url(url).options).use_ssl == {
            "ca_certs": "/ca.pem",
            "certfile": "/c.pem",
            "keyfile": "/k.pem",
            "cert_reqs": ssl.CERT_REQUIRED,
            "server_hostname": "h",
        }
    assert parse_url("amqps://?ssl_ca_certs=x").broker is None


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (
            "ssl_ca_cert=/ca",
            "unknown option 'ssl_ca_cert' .*known .*: ssl_ca_certs",
        ),
        ("ssl_cert_reqs=yes", "invalid value 'yes' for option 'ssl_cert_reqs'.*required"),
        ("ssl_check_hostname=false", "unknown option 'ssl_check_hostname'"),
    ],
)
def test_a_wrong_option_of_tls_in_a_url_is_refused(query: str, message: str) -> None:
    with pytest.raises(errors.InvalidOption, match=message):
        Options.read({}, parse_url(f"amqps://h//?{query}").options)


@pytest.mark.parametrize("word", ["none", "optional", "required"])
def test_words_for_the_check_of_certificates_are_those_of_redis(word: str) -> None:
    wanted = getattr(ssl, f"CERT_{word.upper()}")
    for written in (word, f"CERT_{word.upper()}"):
        options = Options.read({}, {"ssl_cert_reqs": written})
        assert options.use_ssl == {"cert_reqs": wanted}


def test_an_option_without_a_value_is_refused() -> None:
    url = parse_url("amqp://?shards=")
    with pytest.raises(errors.InvalidOption, match="invalid value '' for option 'shards'"):
        Options.read({}, url.options)


hosts = st.sampled_from(["rabbit", "10.0.0.1:5673", "[::1]:5671", "[fe80::1]", "a.b-c.example"])
vhosts = st.sampled_from(["", "/", "//", "/vhost", "/%2Fvhost"])
users = st.sampled_from(["", "user", "us%40er"])
kombu_queries = st.fixed_dictionaries(
    {},
    optional={
        "login_method": st.sampled_from(["PLAIN", "EXTERNAL"]),
    },
)
option_queries = st.dictionaries(
    st.sampled_from(sorted(NAMES)), st.text("abc12 ;&=?/#%+é", min_size=1), max_size=3
)


@dataclasses.dataclass
class Server:
    """One part of a URL, split into its components."""

    user: str
    host: str
    vhost: str
    query: Dict[str, str]

    def url(self, password: str, query: Dict[str, str]) -> str:
        secret = f"{self.user}:{quote(password, safe='')}@"
        every = {**self.query, **query}
        return f"amqp://{secret}{self.host}{self.vhost}" + (f"?{urlencode(every)}" if every else "")


servers = st.lists(st.builds(Server, users, hosts, vhosts, kombu_queries), min_size=1, max_size=3)
passwords = st.text(min_size=1, max_size=20)


def written(parts: List[Server], at: int, password: str, options: Dict[str, str]) -> ResultURL:
    """Return the parsed URL of *parts*, with the options in part number *at*."""
    at %= len(parts)
    return parse_url(
        ";".join(
            part.url(password, options if number == at else {}) for number, part in enumerate(parts)
        )
    )


@given(servers, st.integers(0, 2), passwords, option_queries)
@example(
    [Server("u", "a", "/", {"login_method": "PLAIN"}), Server("u", "b", "/", {})],
    1,
    "p",
    {"shards": "4"},
)
def test_a_url_is_preserved(
    parts: List[Server], at: int, password: str, options: Dict[str, str]
) -> None:
    url = written(parts, at, password, options)
    assert url.options == options
    assert url.broker is not None
    for part, broker in zip(parts, url.broker.split(";")):
        # Without the options, each part is unchanged, for kombu to parse.
        location, _, query = broker.partition("?")
        assert location == part.url(password, {}).partition("?")[0]
        assert dict(parse_qsl(query)) == part.query
    assert len(url.broker.split(";")) == len(parts)
    assert parse_url(url.complete()) == url


@given(servers, st.integers(0, 2), passwords, passwords, option_queries)
def test_the_displayed_url_does_not_depend_on_the_password(
    parts: List[Server], at: int, one: str, other: str, options: Dict[str, str]
) -> None:
    shown = written(parts, at, one, options).sanitized()
    assert shown == written(parts, at, other, options).sanitized()
    # And it shows everything else.
    again = parse_url(shown)
    assert again.options == options
    assert again.broker is not None
    assert [part.partition("@")[2] for part in again.broker.split(";")] == [
        part.url("", {}).partition("@")[2].partition("?")[0]
        + (f"?{urlencode(part.query)}" if part.query else "")
        for part in parts
    ]


# No digits, and nothing that occurs in the rest of the URL.
secrets = st.text(alphabet="QXZ%@:!$&+,= ", min_size=6, max_size=20)


@given(secrets, st.booleans())
def test_passwords_are_never_shown(secret: str, escaped: bool) -> None:
    # Some users write their passwords unquoted. kombu accepts that if it can be parsed.
    password = quote(secret, safe="") if escaped else secret
    shown = parse_url(f"amqp://user:{password}@host:5672/vhost?shards=4").sanitized()
    assert shown == "amqp://user:**@host:5672/vhost?shards=4"


@given(st.text("QXZ", min_size=3), st.text("QXZ", min_size=3), st.sampled_from("/?#;"))
def test_a_url_broken_by_its_password_is_refused_without_showing_it(
    one: str, other: str, breaking: str
) -> None:
    with pytest.raises(errors.InvalidOption, match="'%2F'") as caught:
        parse_url(f"amqp://user:{one}{breaking}{other}@host//?shards=4")
    assert caught.value.__suppress_context__
    assert str(caught.value) == (
        "the result backend URL is not valid: what should be a host and the number of a port is "
        "not. Are characters such as '/', '?', '#' and ';' in the user name and the password "
        "written as '%2F', '%3F', '%23' and '%3B'?"
    )
    assert one not in str(caught.value)
    assert other not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["amqp://h:99999//", "amqps://h:port", "pyamqp://[::1/", "amqp+x://h:p"]
)
def test_an_invalid_host_is_refused(url: str) -> None:
    with pytest.raises(errors.InvalidOption, match="not valid"):
        parse_url(url)


def test_hosts_of_other_transports_are_left_to_kombu() -> None:
    # Messages show the broker's address, for every transport.
    assert parse_url("mongodb://u:p@a:1,b:2/db").sanitized() == "mongodb://u:**@a:1,b:2/db"
    assert parse_url("filesystem:///tmp/x").broker == "filesystem:///tmp/x"


@given(servers, option_queries, st.data())
def test_an_option_may_be_repeated_in_a_url_with_the_same_value(
    parts: List[Server], options: Dict[str, str], data: Any
) -> None:
    assume(options)
    every = ";".join(part.url("p", options) for part in parts)
    assert parse_url(every).options == options
    name = data.draw(st.sampled_from(sorted(options)))
    with pytest.raises(errors.InvalidOption) as caught:
        parse_url(every + ";" + parts[0].url("p", {name: options[name] + "x"}))
    text = str(caught.value)
    assert repr(name) in text
    assert repr(options[name]) in text
    assert repr(options[name] + "x") in text
