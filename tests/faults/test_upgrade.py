"""RabbitMQ is replaced by a newer version while there are results and open chords.

RabbitMQ 4.3 starts with the data of 4.0, but not with those of 3.10. The way from 3.10 is a second
broker, to which shovels move the messages, as docs/operations.md describes.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, Optional

import pytest
from celery import Celery, chord, group, states
from celery.result import GroupResult

from tests.conftest import LOAD, PATIENCE, Apps, eventually
from tests.worker.chord_tasks import register
from tests.worker.conftest import Worker, launch_worker
from tools import rabbitmq

pytestmark = pytest.mark.skipif(not LOAD, reason="takes minutes: make test-faults")

#: Tasks that are in the queue and not run when the broker is replaced.
LATER = 3


def installed(name: str, series: str) -> rabbitmq.Distribution:
    """Return the distribution *name*, if it is installed and is of the *series* of versions."""
    if name not in rabbitmq.available():
        pytest.skip(
            f"needs another RabbitMQ: python tools/rabbitmq.py install --distribution {name}"
        )
    made = rabbitmq.distribution(name)
    if not made.version.startswith(series):
        pytest.skip(f"needs RabbitMQ {series}: {name} has {made.version}")
    return made


@pytest.fixture(scope="module")
def oldest() -> rabbitmq.Distribution:
    return installed("system", "3.")


@pytest.fixture(scope="module")
def between() -> rabbitmq.Distribution:
    return installed("trixie", "4.0.")


@pytest.fixture(scope="module")
def newest() -> rabbitmq.Distribution:
    return installed("forky", "4.3.")


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
    """Return the parameters of a shovel that moves what *queue* holds, as on the page."""
    return json.dumps(
        {
            "src-protocol": "amqp091", "src-uri": source, "src-queue": queue,
            "src-delete-after": "queue-length",
            "dest-protocol": "amqp091", "dest-uri": "amqp://", "dest-queue": queue,
        }
    )  # fmt: skip


def lengths(node: rabbitmq.Node) -> Dict[str, int]:
    """Return the number of messages in each queue, those that are being moved included."""
    rows = node.ctl("-q", "list_queues", "name", "messages", "--no-table-headers").splitlines()
    return {name: int(count) for name, count in (row.split("\t") for row in rows)}


def test_shovels_move_results_and_open_chords_from_3_10_to_4(
    oldest: rabbitmq.Distribution, newest: rabbitmq.Distribution, queue_type: str, tmp_path: Path
) -> None:
    moving = rabbitmq.Node(newest, plugins=["rabbitmq_shovel"])
    with rabbitmq.Node(oldest) as blue, moving as green:
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
        print(f"RabbitMQ {blue.version} to {green.version}, {queue_type}: {sum(before.values())}")
        eventually(lambda: not any(lengths(blue).values()), 2 * PATIENCE)
        # A shovel does not end by itself if messages of its queue have expired.
        left = green.ctl("-q", "list_parameters", "--no-table-headers").splitlines()
        for row in left:
            green.ctl("clear_parameter", "shovel", row.split("\t")[1])
        blue.halt()
        work.check(green.url())


class Data:
    """A data folder that nodes of several versions use, one after the other."""

    def __init__(self) -> None:
        self.folder: Optional[Path] = None

    def node(self, distribution: rabbitmq.Distribution) -> rabbitmq.Node:
        """Return a node with the data of the one before, which has ended."""
        # Each distribution may have a root folder of its own.
        place = distribution.root / "tmp"
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="upgrade-", dir=place))
        elif self.folder.parent != place:
            self.folder = Path(shutil.move(str(self.folder), str(place)))
        data = {"RABBITMQ_MNESIA_BASE": distribution.inside(self.folder)}
        return rabbitmq.Node(distribution, name="upgraded", env=data)


@pytest.fixture
def data() -> Iterator[Data]:
    made = Data()
    yield made
    if made.folder is not None:
        shutil.rmtree(made.folder, ignore_errors=True)


def test_4_0_is_upgraded_to_4_3_in_place(
    between: rabbitmq.Distribution,
    newest: rabbitmq.Distribution,
    data: Data,
    queue_type: str,
    tmp_path: Path,
) -> None:
    with data.node(between) as before:
        work = Work(Apps(before.url()), queue_type, tmp_path)
        work.begin(before.url())
        before.ctl("enable_feature_flag", "all", timeout=4 * PATIENCE)
        before.ctl("enable_feature_flag", "--experimental", "khepri_db", timeout=4 * PATIENCE)
        held = sum(lengths(before).values())
        before.halt()
    with data.node(newest) as after:
        print(f"RabbitMQ {between.version} to {after.version}, {queue_type}: {held}")
        work.check(after.url())


def test_4_3_refuses_the_data_of_3_10_and_leaves_it_as_it_is(
    oldest: rabbitmq.Distribution,
    newest: rabbitmq.Distribution,
    data: Data,
    queue_type: str,
    tmp_path: Path,
) -> None:
    with data.node(oldest) as before:
        work = Work(Apps(before.url()), queue_type, tmp_path)
        work.begin(before.url())
        before.ctl("enable_feature_flag", "all")
        before.halt()
    with pytest.raises(rabbitmq.StartError, match="disabled_required_feature_flag"):
        data.node(newest).start()
    with data.node(oldest) as again:
        work.check(again.url())
