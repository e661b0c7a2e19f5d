"""The page on Celery 4's reference has every documented name, and tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Dict, List, Set

import pytest

from celery_amqp_results import AMQPBackend

ROOT = Path(__file__).resolve().parent.parent.parent
TESTS = ROOT / "tests" / "broker"

#: The names on the reference page of Celery 4.3, by class.
NAMES: Dict[str, str] = {
    "AMQPBackend": """
        BacklogLimitExceeded Consumer Exchange Producer Queue as_uri consume delete_group
        destination_for drain_events get_many get_task_meta on_reply_declare persistent poll
        reload_group_result reload_task_result restore_group retry_policy revive rkey save_group
        store_result supports_autoexpire supports_native_join wait_for
    """,
    "Consumer": """
        ContentDisallowed accept add_queue auto_declare callbacks cancel cancel_by_queue channel
        close connection consume consuming_from declare flow no_ack on_decode_error on_message
        prefetch_count purge qos queues receive recover register_callback revive tag_prefix
    """,
    "Exchange": """
        Message PERSISTENT_DELIVERY_MODE TRANSIENT_DELIVERY_MODE arguments attrs auto_delete bind_to
        binding can_cache_declaration channel declare delete delivery_mode durable name no_declare
        passive publish type unbind_from
    """,
    "Producer": """
        auto_declare channel close compression connection declare exchange maybe_declare on_return
        publish release revive routing_key serializer
    """,
}

#: Attributes of instances only.
OF_INSTANCES = {"Consumer.tag_prefix", "Exchange.arguments"}


def documented() -> Set[str]:
    """Return all names, as ``Class.name``."""
    return {f"{owner}.{name}" for owner, names in NAMES.items() for name in names.split()}


def table() -> Dict[str, List[str]]:
    """Return the tests that the page lists for each name."""
    found: Dict[str, List[str]] = {}
    page = (ROOT / "docs" / "celery4-reference.md").read_text(encoding="utf-8")
    for line in page.splitlines():
        match = re.fullmatch(r"\| `([\w.]+)` \| (.+) \| (.+) \|", line)
        if match:
            name, says, tests = match.groups()
            assert name not in found, f"{name} is there twice"
            assert says.strip()
            found[name] = re.findall(r"`([\w./]+::\w+)`", tests)
    return found


def functions(path: Path) -> Set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_documented_name_is_on_the_page_and_no_other() -> None:
    assert set(table()) == documented() | {"AMQPBackend"}


@pytest.mark.parametrize("name", sorted(documented()))
def test_every_documented_name_is_an_attribute(name: str) -> None:
    owner, _, attribute = name.partition(".")
    if name in OF_INSTANCES:
        instance = AMQPBackend.Exchange() if owner == "Exchange" else AMQPBackend.Consumer(None)
        assert hasattr(instance, attribute)
    else:
        cls = AMQPBackend if owner == "AMQPBackend" else getattr(AMQPBackend, owner)
        assert hasattr(cls, attribute)


def test_every_test_on_the_page_exists() -> None:
    rows = table()
    known = {path.name: functions(path) for path in TESTS.glob("test_*.py")}
    for name, tests in rows.items():
        assert tests, f"no test for {name}"
        for test in tests:
            file, _, function = test.partition("::")
            assert function in known.get(file, ()), f"{test}, for {name}, does not exist"


def test_every_test_of_the_documented_entities_is_on_the_page() -> None:
    named = {test for tests in table().values() for test in tests}
    for kind in ("consumer", "exchange", "producer", "restart"):
        file = f"test_documented_{kind}.py"
        for function in functions(TESTS / file):
            if function.startswith("test_"):
                assert f"{file}::{function}" in named
