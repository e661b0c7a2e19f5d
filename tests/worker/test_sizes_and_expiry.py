"""Large and refused results, and expiry by task, with a real worker."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any, Dict, Iterator, List, NamedTuple, Optional

import pytest
from celery import Celery, chord, group, states
from celery.exceptions import ChordError
from celery.result import AsyncResult

from celery_amqp_results import errors
from celery_amqp_results.protocol.message import StateMessage
from celery_amqp_results.protocol.ranking import fold
from tests.conftest import Apps, eventually
from tests.worker.conftest import Worker, launch_worker
from tools import rabbitmq

LONG = 60.0

#: The broker's limit for messages, in bytes.
BROKER_LIMIT = 1024 * 1024

OPTIONS = {"shards": 2, "inline_limit": 2048}


class Setup(NamedTuple):
    """An app, and a worker for its tasks, on a broker that refuses large messages."""

    app: Celery
    worker: Worker
    node: rabbitmq.Node

    def send(self, name: str, *args: Any, **options: Any) -> AsyncResult:
        return self.app.send_task(f"tests.worker.tasks.{name}", args, **options)

    def s(self, name: str, *args: Any) -> Any:
        return self.app.signature(f"tests.worker.tasks.{name}", args=args)

    def stored(self, task_id: str) -> StateMessage:
        found: Dict[str, List[StateMessage]] = self.app.backend.layout.store.read((task_id,))
        state = fold(found[task_id])
        assert state is not None
        return state

    def body_queue(self, task_id: str) -> Optional[str]:
        return self.stored(task_id).body_queue


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    if os.environ.get("AMQP_URL"):
        pytest.skip("needs a broker with a setting of its own")
    distribution = rabbitmq.distribution(os.environ.get("RABBITMQ_DISTRIBUTION", "system"))
    with contextlib.ExitStack() as stack:
        node = stack.enter_context(
            rabbitmq.Node(distribution, config=f"max_message_size = {BROKER_LIMIT}")
        )
        app = Apps(node.url())(result_backend_transport_options=OPTIONS)
        stack.callback(app.close)
        stack.callback(app.backend.close)
        conf = {"result_backend_transport_options": OPTIONS, "result_extended": True}
        worker = launch_worker(
            app, tmp_path_factory.mktemp("worker"), env={"TEST_CONF": json.dumps(conf)}
        )
        stack.callback(worker.stop)
        yield Setup(app, worker, node)


def test_large_results_of_tasks_and_of_chords(setup: Setup) -> None:
    results = [setup.send("text", size) for size in (10, 3000, 900_000)]
    assert [len(result.get(timeout=LONG)) for result in results] == [10, 3000, 900_000]
    kept_apart = [setup.stored(result.id).body_queue is not None for result in results]
    assert kept_apart == [False, True, True]

    header = [setup.s("text", size) for size in (100_000, 5, 300_000)]
    body = chord(header, app=setup.app)(setup.s("lengths"))
    assert body.get(timeout=LONG) == [100_000, 5, 300_000]
    assert [len(value) for value in body.parent.get(timeout=LONG)] == [100_000, 5, 300_000]


def test_a_refused_result_becomes_a_failure_with_the_reason(setup: Setup) -> None:
    size = 2 * BROKER_LIMIT
    result = setup.send("text", size)
    with pytest.raises(errors.ResultTooLarge) as caught:
        result.get(timeout=LONG)
    assert str(BROKER_LIMIT) in str(caught.value)
    assert result.id in str(caught.value)
    assert str(size)[:4] in str(caught.value)
    assert result.state == states.FAILURE
    eventually(lambda: f"[{result.id}] raised unexpected: ResultTooLarge" in setup.worker.output())
    assert "trying again" not in setup.worker.output()
    # The worker continues
    assert setup.send("text", 1).get(timeout=LONG) == "x"


def test_a_refused_failure_is_stored_without_its_details(setup: Setup) -> None:
    result = setup.send("fail_at_length", 2 * BROKER_LIMIT)
    with pytest.raises(errors.ResultTooLarge, match=str(BROKER_LIMIT)):
        result.get(timeout=LONG)
    # The same applies if the arguments are what is too large
    argument = "y" * (BROKER_LIMIT - 1000)
    long = setup.send("add", argument, 1)
    with pytest.raises((errors.ResultTooLarge, TypeError)):
        long.get(timeout=LONG)
    assert setup.send("report_at_length", 2 * BROKER_LIMIT).get(timeout=LONG) == "ResultTooLarge"


def test_a_chord_with_a_refused_part_fails(setup: Setup) -> None:
    header = group(
        [setup.s("text", 1), setup.s("text", 2 * BROKER_LIMIT), setup.s("text", 2)], app=setup.app
    )
    body = chord(header, app=setup.app)(setup.s("lengths"))
    body.parent = None  # whose failure would be raised instead, if it is known first
    with pytest.raises(ChordError, match="ResultTooLarge"):
        body.get(timeout=LONG)


@pytest.mark.parametrize(
    ("name", "args", "headers", "milliseconds"),
    [
        ("add", (1, 2), None, 86_400_000),
        ("add", (1, 2), {"result_expires": 120}, 120_000),
        ("add", (1, 2), {"result_expires": 4_000_000.5}, 4_000_000_500),
        ("add", (1, 2), {"result_expires": None}, None),
        ("fail", ("on purpose",), {"result_expires": 60}, 60_000),
        ("kept_for_an_hour", (), None, 3_600_000),
        ("kept_for_an_hour", (True,), {"result_expires": 90}, 90_000),
        ("kept_for_an_hour", (), {"result_expires": 60}, 60_000),
        ("kept_for_an_hour", (), {"result_expires": 0}, None),
    ],
)
def test_a_single_result_can_have_its_own_expiry(
    setup: Setup,
    name: str,
    args: Any,
    headers: Optional[Dict[str, Any]],
    milliseconds: Optional[int],
) -> None:
    result = setup.send(name, *args, headers=headers)
    result.get(timeout=LONG, propagate=False)
    assert setup.stored(result.id).expiration == milliseconds


@pytest.mark.parametrize(
    ("name", "headers", "milliseconds", "complaint"),
    [
        ("add", {"result_expires": "soon"}, 86_400_000, "'soon' is not a number"),
        ("add", {"result_expires": -1}, 86_400_000, "-1 is not a number"),
        ("kept_for_an_hour", {"result_expires": -5}, 3_600_000, "-5 is not a number"),
        ("kept_for_nonsense", None, 86_400_000, "tests.worker.tasks.kept_for_nonsense"),
    ],
)
def test_an_invalid_expiry_is_logged_and_the_setting_applies(
    setup: Setup,
    name: str,
    headers: Optional[Dict[str, Any]],
    milliseconds: int,
    complaint: str,
) -> None:
    args = (1, 2) if name == "add" else ()
    result = setup.send(name, *args, headers=headers)
    result.get(timeout=LONG)
    assert setup.stored(result.id).expiration == milliseconds
    eventually(lambda: complaint in setup.worker.output())


def test_a_refused_result_leaves_no_queue_behind(setup: Setup) -> None:
    # The queue is declared, and deleted at once when the message is refused
    result = setup.send("text", 2 * BROKER_LIMIT)
    with pytest.raises(errors.ResultTooLarge):
        result.get(timeout=LONG)
    listed = setup.node.ctl("list_queues", "--quiet", "--no-table-headers", "name", "messages")
    names = [line.split() for line in listed.splitlines() if ".large." in line]
    assert [name for name, messages in names if messages == "0"] == []
    assert [name for name, _ in names if result.id in name] in ([], [setup.body_queue(result.id)])
