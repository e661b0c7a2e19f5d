"""RabbitMQ 3.10 is replaced by 4.3 while there are results and open chords.

RabbitMQ 4 does not start with the data of 3.10: the versions between them are needed. The other way
is a second broker, to which shovels move the messages, as docs/operations.md describes.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List

import pytest
from celery import Celery, chord, group, states
from celery.result import GroupResult

from tests.conftest import LOAD, PATIENCE, Apps, eventually
from tests.worker.chord_tasks import register
from tests.worker.conftest import Worker, launch_worker
from tools import rabbitmq

OLD, NEW = "system", "forky"

pytestmark = pytest.mark.skipif(not LOAD, reason="takes minutes: make test-faults")

#: Tasks that are in the queue and not run when the broker is replaced.
LATER = 3


@pytest.fixture(scope="module")
def versions() -> List[rabbitmq.Distribution]:
    if not {OLD, NEW} <= set(rabbitmq.available()):
        pytest.skip("needs both versions of RabbitMQ: make test-newest-rabbitmq installs the new")
    made = [rabbitmq.distribution(name) for name in (OLD, NEW)]
    if not (made[0].version.startswith("3.") and made[1].version.startswith("4.")):
        pytest.skip("needs RabbitMQ 3 and RabbitMQ 4")
    return made


class Work:
    """Results and open chords on one broker, which are expected on another one."""

    def __init__(self, apps: Apps, queue_type: str, tmp_path: Path) -> None:
        self.apps = apps
        self.tmp_path = tmp_path
        self.conf: Dict[str, Any] = {
            "result_backend_transport_options": {"shards": 2, "queue_type": queue_type},
        }
        self.later = f"{apps.prefix}.later"

    def app(self, url: str) -> Celery:
        """Return an app with the broker *url*, which is the current one."""
        self.apps.url = url
        made = self.apps(**self.conf)
        made.set_current()
        return made

    def worker(self, app: Celery, *queues: str) -> Worker:
        names = ",".join((app.conf.task_default_queue, *queues))
        return launch_worker(app, self.tmp_path, "tests.worker.chord_tasks", args=("-Q", names))

    def begin(self, url: str) -> None:
        """Store results, and leave chords open."""
        app = self.app(url)
        t: SimpleNamespace = register(app)
        worker = self.worker(app)
        many = group(t.same.s(n) for n in range(300)).apply_async()
        assert many.get(timeout=PATIENCE) == list(range(300))
        many.save()
        large = t.payload.delay(400_000)
        failed = t.fail.delay("gone")
        assert len(large.get(timeout=PATIENCE)) == 400_000
        failed.get(timeout=PATIENCE, propagate=False)
        # A reader that is not the sender packs what it reads.
        store = self.app(url).backend.layout.store
        assert all(store.read([task.id for task in many.results]).values())
        app.set_current()
        # Chords with all tasks ended but one, which is in a queue that no worker consumes
        chords = [
            chord(
                [*(t.same.s(n) for n in range(5)), t.same.s(5).set(queue=self.later)],
                t.record.s(str(self.tmp_path / "ran")),
            ).delay()
            for _ in range(LATER)
        ]
        for each in chords:
            eventually(lambda: each.parent.completed_count() == 5)  # noqa: B023
        # And a task that has not run
        waiting = t.same.s(7).set(queue=self.later).delay()
        worker.stop()
        self.many, self.large, self.failed = many.id, large.id, failed.id
        self.chords, self.waiting = [each.id for each in chords], waiting.id
        self.forgotten = t.same.s(1).freeze().id
        app.backend.store_result(self.forgotten, 1, states.SUCCESS)
        app.AsyncResult(self.forgotten).forget()
        self.close()

    def check(self, url: str) -> None:
        """Find all results, and run what has not run."""
        app = self.app(url)
        assert GroupResult.restore(self.many, app=app).get(timeout=PATIENCE) == list(range(300))
        assert len(app.AsyncResult(self.large).get(timeout=PATIENCE)) == 400_000
        with pytest.raises(KeyError, match="gone"):
            app.AsyncResult(self.failed).get(timeout=PATIENCE)
        assert app.AsyncResult(self.waiting).state == states.PENDING
        assert app.AsyncResult(self.forgotten).state == states.PENDING
        worker = self.worker(app, self.later)
        try:
            assert app.AsyncResult(self.waiting).get(timeout=PATIENCE) == 7
            for each in self.chords:
                assert app.AsyncResult(each).get(timeout=PATIENCE) == list(range(6))
        finally:
            worker.stop()
        ran = (self.tmp_path / "ran").read_text().splitlines()
        assert sorted(ran) == sorted(self.chords)
        self.close()

    def close(self) -> None:
        """Close all apps."""
        for made in self.apps.made:
            made.backend.close()
            made.close()


@pytest.fixture(params=["classic", "quorum"])
def queue_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def shovel(source: str, queue: str) -> str:
    """Return the parameters of a shovel that ends when *queue* is empty, as on the page."""
    return json.dumps(
        {
            "src-protocol": "amqp091", "src-uri": source, "src-queue": queue,
            "src-delete-after": "queue-length",
            "dest-protocol": "amqp091", "dest-uri": "amqp://", "dest-queue": queue,
        }
    )  # fmt: skip


def lengths(node: rabbitmq.Node) -> Dict[str, int]:
    """Return the number of messages in each queue."""
    rows = node.ctl("-q", "list_queues", "name", "messages", "--no-table-headers").splitlines()
    return {name: int(count) for name, count in (row.split("\t") for row in rows)}


def test_shovels_move_results_and_open_chords_from_3_10_to_4(
    versions: List[rabbitmq.Distribution], queue_type: str, tmp_path: Path
) -> None:
    old, new = versions
    with rabbitmq.Node(old) as blue, rabbitmq.Node(new, plugins=["rabbitmq_shovel"]) as green:
        apps = Apps(blue.url())
        work = Work(apps, queue_type, tmp_path)
        work.begin(blue.url())
        # When all processes have stopped, and the queues are declared at the new broker
        blue_file = blue.log_path.with_name("definitions.json")
        blue.ctl("export_definitions", blue.distribution.inside(blue_file))
        green_file = green.log_path.with_name("definitions.json")
        shutil.copyfile(blue_file, green_file)
        green.ctl("import_definitions", green.distribution.inside(green_file))
        before = {
            name: count for name, count in lengths(blue).items() if name.startswith(apps.prefix)
        }
        # And a shovel moves each queue
        for name in before:
            green.ctl("set_parameter", "shovel", name, shovel(blue.url().rstrip("/"), name))
        eventually(lambda: green.ctl("list_parameters", "--no-table-headers") == "", 2 * PATIENCE)
        # Then nothing is left behind
        after = lengths(green)
        print(f"RabbitMQ {blue.version} to {green.version}, {queue_type}: {sum(before.values())}")
        assert {name: after[name] for name in before} == before
        assert not any(lengths(blue).values())
        blue.halt()
        work.check(green.url())


@pytest.fixture
def shared_folder(versions: List[rabbitmq.Distribution]) -> Iterator[Path]:
    """A folder that nodes of both versions see."""
    folder = Path(tempfile.mkdtemp(prefix="upgrade-", dir=versions[1].root / "tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_4_refuses_the_data_of_3_10_and_leaves_it_as_it_is(
    versions: List[rabbitmq.Distribution], queue_type: str, tmp_path: Path, shared_folder: Path
) -> None:
    def node(distribution: rabbitmq.Distribution) -> rabbitmq.Node:
        data = {"RABBITMQ_MNESIA_BASE": distribution.inside(shared_folder)}
        return rabbitmq.Node(distribution, name="upgraded", env=data)

    old, new = versions
    with node(old) as before:
        work = Work(Apps(before.url()), queue_type, tmp_path)
        work.begin(before.url())
        before.ctl("enable_feature_flag", "all")
        before.halt()
        refusal = "disabled_required_feature_flag"
        with pytest.raises(rabbitmq.StartError, match=refusal), node(new):
            pass
        before.start()
        work.check(before.url())
