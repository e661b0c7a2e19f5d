"""What the processes of a load and the broker use: memory, file descriptors, threads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Dict, List, NamedTuple

from bench.processes import family, resident_bytes
from tests.faults.faults import Place
from tools import rabbitmq

__all__ = ("Resources", "left")

MIB = 1024 * 1024


class Use(NamedTuple):
    """The use of a process together with all processes that it has started."""

    #: Resident memory in MiB.
    memory: float
    descriptors: int
    threads: int


def use(pid: int) -> Use:
    """Return what *pid* and its children use. Children that end meanwhile do not count."""
    memory, descriptors, threads = 0, 0, 0
    for one in family(pid):
        try:
            used = resident_bytes(one)
            opened = len(os.listdir(f"/proc/{one}/fd"))
            running = len(os.listdir(f"/proc/{one}/task"))
        except OSError:
            continue
        memory, descriptors, threads = memory + used, descriptors + opened, threads + running
    return Use(memory / MIB, descriptors, threads)


def left(nodes: List[rabbitmq.Node]) -> str:
    """Return what a load that has ended has left on the broker."""
    queues = nodes[0].queue_count()
    connections = nodes[0].eval("length(rabbit_connection_tracking:list())")
    return f"{queues} queues, {connections} connections"


class Resources:
    """Samples of a load and its broker. A process that replaces a killed one has its role."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._samples: Dict[str, List[Use]] = {}

    def sample(self) -> None:
        """Take a sample of everything that runs."""
        for role, pid in self._place.load.pids().items():
            self._samples.setdefault(role, []).append(use(pid))
        for number, node in enumerate(self._place.nodes):
            if node.running:
                # Its descriptors belong to another user.
                threads = len(list(Path(f"/proc/{node.pid}/task").iterdir()))
                sample = Use(node.memory() / MIB, 0, threads)
                self._samples.setdefault(f"RabbitMQ {number + 1}", []).append(sample)

    def text(self) -> str:
        """Return a line for each role: the first sample, the last one, and the most memory."""
        lines = ["resources: MiB, descriptors, threads, of the first and the last sample; most MiB"]
        for role, samples in self._samples.items():
            first, last = samples[0], samples[-1]
            most = max(sample.memory for sample in samples)
            lines.append(
                f"{role}: {first.memory:.0f}, {first.descriptors}, {first.threads}; "
                f"{last.memory:.0f}, {last.descriptors}, {last.threads}; {most:.0f}"
            )
        return "\n".join(lines)
