"""Power loss: which confirmed results survive if everything that was not synced to disk is lost.

A broker that is killed is another matter: what it wrote is still in the page cache then.

The node's data is on a file system of its own, in an image. The image has what the kernel wrote to
"disk", and no more: what RabbitMQ wrote without fsync is only in the page cache. A copy of the
image at the moment of the last confirm, mounted in place of the original, is what a power failure
leaves behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import uuid
from pathlib import Path
from typing import Any, Dict, Iterator, List, Set

import pytest
from celery import states

from tests.conftest import LOAD, Apps, eventually
from tools import rabbitmq

# It syncs all disks of the machine, and the node has to recover: not for a machine that is busy.
pytestmark = pytest.mark.skipif(
    not LOAD, reason="takes minutes and a quiet machine: make test-faults"
)

#: Results that are stored and confirmed before the power fails.
COUNT = 200


class Disk:
    """A file system in an image, mounted where a node keeps its data."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._image = base / "disk.img"
        self.path = base / "data"

    def _mount(self) -> None:
        # The defaults of ext4, so that the journal is written every 5 seconds.
        run("mount", "-o", "loop", str(self._image), str(self.path))

    def create(self) -> None:
        """Make the file system and mount it."""
        self.path.mkdir()
        with self._image.open("wb") as image:
            image.truncate(512 * 1024 * 1024)
        run("mkfs.ext4", "-q", str(self._image))
        self._mount()

    def copy(self) -> Path:
        """Return a copy of what is on the disk now."""
        copied = self._base / "copy.img"
        run("cp", "--sparse=always", str(self._image), str(copied))
        return copied

    def replace(self, copied: Path) -> None:
        """Go on with a copy in place of the disk."""
        run("umount", str(self.path))
        copied.replace(self._image)
        self._mount()

    def remove(self) -> None:
        """Unmount and delete everything."""
        subprocess.run(["umount", "-l", str(self.path)], stderr=subprocess.DEVNULL, check=False)
        shutil.rmtree(self._base, ignore_errors=True)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)


@pytest.fixture
def disk() -> Iterator[Disk]:
    root = rabbitmq.distribution(os.environ.get("RABBITMQ_DISTRIBUTION", "system")).root
    made = Disk(Path(tempfile.mkdtemp(prefix="disk-", dir=root / "tmp")))
    try:
        try:
            made.create()
        except (OSError, subprocess.SubprocessError) as exc:
            pytest.skip(f"needs root, mkfs.ext4 and loop devices: {exc}")
        yield made
    finally:
        made.remove()


def lose_power(node: rabbitmq.Node, disk: Disk) -> None:
    """Stop the node at once, and go on with what had reached its disk."""
    node.pause()
    copied = disk.copy()
    node.kill()
    disk.replace(copied)
    node.start()


def survivors(apps: Apps, ids: List[str]) -> Set[str]:
    """Return those of *ids* that a new process finds."""
    reader = apps()

    def read() -> Dict[str, Any]:
        return dict(reader.backend.get_many(ids, timeout=0)) if ids else {}

    with contextlib.suppress(Exception):
        read()
    found = eventually(lambda: [reader.backend.get_task_meta(i)["status"] for i in ids])
    return {i for i, status in zip(ids, found) if status == states.SUCCESS}


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_confirmed_results_survive_a_power_loss_where_the_broker_syncs_them(
    disk: Disk, queue_type: str
) -> None:
    made_of = rabbitmq.distribution(os.environ.get("RABBITMQ_DISTRIBUTION", "system"))
    data = made_of.inside(disk.path)
    with rabbitmq.Node(made_of, env={"RABBITMQ_MNESIA_BASE": data}) as node:
        apps = Apps(node.url(), {"shards": 4, "queue_type": queue_type})
        try:
            writer = apps()
            old = [str(uuid.uuid4()) for _ in range(20)]
            for task_id in old:
                writer.backend.store_result(task_id, "old", states.SUCCESS)
            # Given results that are on the disk for sure
            os.sync()
            ids = [str(uuid.uuid4()) for _ in range(COUNT)]
            # When the power fails at the moment of the last of more confirms
            for task_id in ids:
                writer.backend.store_result(task_id, "new", states.SUCCESS)
            unsynced = disk.path / "unsynced"
            unsynced.write_text("written without fsync")
            lose_power(node, disk)
            # Then what was not synced is lost
            assert not unsynced.exists() or not unsynced.read_text()
            # And the older results are there
            assert survivors(apps, old) == set(old)
            kept = survivors(apps, ids)
            print(f"RabbitMQ {node.version}, {queue_type}: {len(kept)} of {COUNT} survived")
            # RabbitMQ 4 confirms messages in classic queues when the kernel has them: without
            # fsync, they reach the disk up to about half a minute later.
            if queue_type == "quorum" or node.version.startswith("3."):
                assert len(kept) == COUNT
        finally:
            apps.close()
