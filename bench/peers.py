"""The result backends that are measured beside each other, and apps that use them."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from celery import Celery
from celery.app.task import Context

from bench import ticks

__all__ = (
    "PEERS",
    "VARIANTS",
    "WITH_WORKER",
    "Peer",
    "Servers",
    "app_from_environment",
    "available",
    "close",
    "close_backend",
    "context",
    "environment",
    "make_app",
    "named",
)

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Peer:
    """A result backend."""

    name: str
    #: URL of the result backend; ``{redis}`` is the address of a private Redis that keeps
    #: everything in memory, ``{lasting}`` that of one which writes it to the disk.
    backend: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    conf: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    #: Whether it declares a queue for each task: it is then measured with fewer of them.
    queue_per_task: bool = False
    #: Whether any process can read a result.
    anybody_reads: bool = True
    #: Whether ``task_ignore_result`` is set.
    ignored: bool = False
    #: Whether it is left out where there is little time.
    thorough: bool = False
    #: Module that has to be there.
    module: Optional[str] = None
    #: Whether its broker is the one with other settings.
    tuned: bool = False


#: In the order of tables.
PEERS: Dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("amqp", "amqp://"),
        Peer("amqp, confirm=False", "amqp://", {"confirm": False}),
        # Confirmed, but gone with the broker: as lasting as what the other peers keep.
        Peer("amqp, transient", "amqp://", conf={"result_persistent": False}),
        Peer("amqp, per-task", "amqp://", {"layout": "per-task"}, queue_per_task=True),
        Peer("rpc", "rpc://", anybody_reads=False),
        Peer("redis", "redis://{redis}/0", module="redis"),
        # As lasting as what RabbitMQ has confirmed of persistent messages.
        Peer("redis, lasting", "redis://{lasting}/0", module="redis", thorough=True),
        Peer(
            "celery-amqp-backend",
            "celery_amqp_backend.AMQPBackend://",
            queue_per_task=True,
            module="celery_amqp_backend",
        ),
        Peer("ignored", "disabled://", anybody_reads=False, ignored=True),
    )
}

#: This backend with options that only some measures use.
VARIANTS: Dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("amqp, quorum", "amqp://", {"queue_type": "quorum", "shards": 16}),
        # Small messages are not kept in the queue's index; see bench.services.
        Peer("amqp, tuned broker", "amqp://", thorough=True, tuned=True),
        *(
            Peer(f"amqp, {shards} shards", "amqp://", {"shards": shards})
            for shards in (16, 64, 256)
        ),
    )
}

#: Those that are measured with a worker that stores results and waits for their confirms.
WITH_WORKER = tuple(name for name in PEERS if name not in ("amqp, confirm=False", "ignored"))


def named(name: str) -> Peer:
    """Return the peer *name*, of :data:`PEERS` or :data:`VARIANTS`."""
    return PEERS.get(name) or VARIANTS[name]


def available(name: str) -> bool:
    """Return whether the module is installed that the peer *name* needs."""
    module = named(name).module
    return module is None or importlib.util.find_spec(module) is not None


@dataclasses.dataclass(frozen=True)
class Servers:
    """Where the servers are.

    Parameters:
        broker: URL of RabbitMQ.
        redis: address of a Redis that keeps everything in memory.
        lasting: address of a Redis that writes to the disk before it confirms.
        tuned: URL of a RabbitMQ with other settings, or nothing.
    """

    broker: str
    redis: str
    lasting: str
    tuned: str = ""


def make_app(name: str, servers: Servers, queue: str, **conf: Any) -> Celery:
    """Return an app with the result backend of the peer *name*.

    Parameters:
        name: of :data:`PEERS` or :data:`VARIANTS`.
        servers: where the servers are.
        queue: name of the queue of tasks; names for the results are made from it.
        **conf: further settings.
    """
    peer = named(name)
    broker = servers.tuned if peer.tuned else servers.broker
    app = Celery("bench", broker=broker, set_as_current=False)
    app.conf.update(
        result_backend=peer.backend.format(redis=servers.redis, lasting=servers.lasting),
        result_backend_transport_options=dict(peer.options),
        result_exchange=f"results-{queue}",
        result_exchange_type="direct",
        task_default_queue=queue,
        task_ignore_result=peer.ignored,
        broker_connection_retry_on_startup=True,
        worker_prefetch_multiplier=16,
    )
    app.conf.update(peer.conf)
    app.conf.update(conf)

    @app.task(name="bench.noop", shared=False)
    def noop() -> None:
        return None

    @app.task(name="bench.tick", shared=False)
    def tick(path: str) -> None:
        ticks.of_file(path).add()

    @app.task(name="bench.count", shared=False)
    def count(results: List[Any]) -> int:
        return len(results)

    return app


def context(task_id: str, reply_to: str = "", origin: str = "gen1@bench") -> Context:
    """Return the request of a task as a worker has it when it stores the result."""
    return Context(
        id=task_id, correlation_id=task_id, reply_to=reply_to, hostname="bench",
        origin=origin, children=[], delivery_info={},
    )  # fmt: skip


def close(app: Celery) -> None:
    """Close an app and what its result backend has opened."""
    close_backend(app)
    app.close()


def close_backend(app: Celery) -> None:
    """Close what the result backend of an app has opened; it may be used again."""
    shut = getattr(app.backend, "close", None)
    if shut is not None:
        shut()


def environment(
    name: str, servers: Servers, queue: str, options: Optional[Mapping[str, Any]] = None
) -> Dict[str, str]:
    """Return the environment in which :func:`app_from_environment` makes an app."""
    return dict(
        os.environ,
        PYTHONPATH=f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        BENCH_PEER=name,
        BENCH_QUEUE=queue,
        BENCH_OPTIONS=json.dumps({**named(name).options, **(options or {})}),
        **{f"BENCH_{key.upper()}": value for key, value in dataclasses.asdict(servers).items()},
    )


def app_from_environment() -> Celery:
    """Return the app that the environment of this process describes."""
    servers = {
        field.name: os.environ[f"BENCH_{field.name.upper()}"]
        for field in dataclasses.fields(Servers)
    }
    return make_app(
        os.environ["BENCH_PEER"],
        Servers(**servers),
        os.environ["BENCH_QUEUE"],
        result_backend_transport_options=json.loads(os.environ["BENCH_OPTIONS"]),
    )
