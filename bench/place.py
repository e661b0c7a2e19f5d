"""Where measures run: the servers, the workers, how large and how often."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import uuid
from typing import (
    Any,
    Callable,
    DefaultDict,
    Dict,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Set,
    Tuple,
)

import kombu

from bench import peers, processes, programs
from bench.figures import OURS, Figures
from tools import rabbitmq

__all__ = ("Place",)


@dataclasses.dataclass
class Place:
    """Where measures run.

    Parameters:
        node: the private RabbitMQ.
        servers: where it and the private Redis servers are.
        quick: whether sizes and rounds are small.
        kept: how many results are kept for look-ups; empty for the measure's own sizes.
        peers: names of the peers that are installed and wanted.
        redis_pids: processes of the Redis servers.
        tuned_pid: process of the RabbitMQ with other settings, or 0.
        fleet: web processes and tasks a second of the measure *fleet*; empty for its own.
        usual_rounds: rounds of a measure that has no number of its own; 0 for 5, or 3 if *quick*.
    """

    node: rabbitmq.Node
    servers: peers.Servers
    quick: bool
    kept: Sequence[int]
    peers: Sequence[str]
    redis_pids: Sequence[int]
    tuned_pid: int = 0
    usual_rounds: int = 0
    fleet: Sequence[Tuple[int, int]] = ()
    #: Peers whose workers have run enough tasks to be measured.
    warm: Set[str] = dataclasses.field(default_factory=set)
    _workers: Dict[str, programs.Worker] = dataclasses.field(default_factory=dict)

    @property
    def rounds(self) -> int:
        """How many rounds of each peer are measured, unless a measure has its own number."""
        return self.usual_rounds or (3 if self.quick else 5)

    def chosen(self, *names: str) -> List[str]:
        """Return those of *names* that are measured in this run.

        A variant of this backend is measured wherever this backend is.
        """
        return [
            name
            for name in names
            if (name in self.peers or (name in peers.VARIANTS and OURS in self.peers))
            and not (self.quick and peers.named(name).thorough)
            and (self.servers.tuned or not peers.named(name).tuned)
        ]

    def broker_seconds(self, name: str = OURS) -> float:
        """Return the processor time that Redis and the RabbitMQ of a peer have used so far."""
        broker = self.tuned_pid if peers.named(name).tuned else self.node.pid
        return processes.cpu_seconds(broker, *self.redis_pids)

    @property
    def port(self) -> int:
        """The AMQP port of RabbitMQ."""
        return int(kombu.Connection(self.servers.broker).port)

    def workers(self, *names: str) -> Dict[str, programs.Worker]:
        """Return a worker for each of *names* that is measured; they live until the end."""
        names_here = self.chosen(*names)
        new = [name for name in names_here if name not in self._workers]
        for name in new:
            self._workers[name] = programs.Worker(name, self.servers)
        for name in new:
            self._workers[name].wait()
        return {name: self._workers[name] for name in names_here}

    @contextlib.contextmanager
    def worker(
        self,
        name: str,
        concurrency: int,
        pool: str = "prefork",
        arguments: Sequence[str] = (),
        queue: str = "",
    ) -> Iterator[programs.Worker]:
        """Run a worker of the peer *name* for the duration of a ``with`` block."""
        worker = programs.Worker(name, self.servers, concurrency, pool, arguments, queue)
        try:
            worker.wait()
            yield worker
        finally:
            worker.stop()

    def app(self, name: str, queue: Optional[str] = None, **conf: Any) -> Any:
        """Return an app of the peer *name*; names on the broker are its own, or made of *queue*."""
        queue = queue or f"bench-{uuid.uuid4().hex[:8]}"
        return peers.make_app(name, self.servers, queue, **conf)

    @contextlib.contextmanager
    def assistant(
        self, name: str, queue: str, module: str = "bench.assistant", **options: Any
    ) -> Iterator[programs.Assistant]:
        """Run an assistant of the peer *name* for the duration of a ``with`` block.

        The *options* replace those of the peer.
        """
        assistant = programs.Assistant(name, self.servers, queue, module, options)
        try:
            yield assistant
        finally:
            assistant.stop()

    def alternate(
        self,
        measures: Mapping[str, Callable[[], Mapping[str, float]]],
        rounds: Optional[int] = None,
        warm_up: bool = True,
    ) -> Dict[str, Figures]:
        """Measure each peer in turn, as often as there are rounds.

        Parameters:
            measures: by peer, what returns one or more figures by their names.
            rounds: how many; the place's by default.
            warm_up: whether there is a round before that does not count.

        Returns:
            By the names of the figures, the figures of each peer.
        """
        if warm_up:
            for measure in measures.values():
                measure()
        found: DefaultDict[str, Figures] = collections.defaultdict(dict)
        for _ in range(rounds or self.rounds):
            for peer, measure in measures.items():
                for name, value in measure().items():
                    found[name].setdefault(peer, []).append(value)
        return dict(found)

    def end_workers(self) -> None:
        """End the workers that :meth:`workers` has started."""
        for worker in self._workers.values():
            worker.stop()
        self._workers.clear()
        self.warm.clear()
        # Results in cycles tell their backends that they go: now, while these are there.
        gc.collect()
