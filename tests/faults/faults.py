"""Faults of a broker, its network and its clients, as functions that provoke them.

Each fault has a name and a description. A function returns when the cause is gone; its
consequences may continue. :data:`CLUSTER` has the faults that need a cluster, :data:`SINGLE` the
others.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, Callable, Dict, Iterator, List, Optional

import amqp
import kombu
from celery import Celery

from celery_amqp_results.protocol.names import PLAN_QUEUES
from tests.faults.load import Load
from tools import rabbitmq
from tools.proxy import Proxy

__all__ = ("CLUSTER", "SINGLE", "Fault", "Place", "make_app", "place")


@dataclasses.dataclass
class Place:
    """Where faults happen."""

    nodes: List[rabbitmq.Node]
    #: The proxies between the broker and the storing clients, and between it and the reading ones.
    proxies: List[Proxy]
    load: Load
    #: The prefix of all queue names.
    prefix: str
    shards: int
    random: random.Random

    @property
    def node(self) -> rabbitmq.Node:
        """The only node, or the first."""
        return self.nodes[0]

    def hold(self, seconds: float) -> None:
        """Let a fault last long enough to have an effect."""
        self.load.check_processes()
        # A plain sleep: a fault must last for a while, and there is no condition to poll.
        time.sleep(seconds)

    def shard_queue(self) -> str:
        """Return the name of some shard queue."""
        return f"{self.prefix}.shard.{self.random.randrange(self.shards)}"


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault that can be provoked."""

    name: str
    provoke: Callable[[Place], None]
    #: Whether the fault loses results by design, as deleting a shard does. It must be over when
    #: the function returns.
    loses: bool = False
    #: How often it is provoked in a round.
    times: int = 1
    #: Whether it needs a node with a management interface.
    management: bool = False


SINGLE: Dict[str, Fault] = {}
CLUSTER: Dict[str, Fault] = {}


def _fault(where: Dict[str, Fault], name: str, **options: Any) -> Any:
    def note(function: Callable[[Place], None]) -> Callable[[Place], None]:
        where[name] = Fault(name, function, **options)
        return function

    return note


# -- the broker ----------------------------------------------------------------------------------


@_fault(SINGLE, "RabbitMQ killed with -9", times=2)
def _kill(place: Place) -> None:
    _kill_node(place, place.node)
    place.node.start()


def _kill_node(place: Place, node: rabbitmq.Node) -> None:
    place.load.journal.crashed()
    node.kill()
    place.load.journal.crashed()


@_fault(SINGLE, "RabbitMQ restarted in order")
def _restart(place: Place) -> None:
    # After a clean restart, messages without a confirm may be lost too.
    place.load.journal.crashed()
    place.node.halt()
    place.load.journal.crashed()
    place.node.start()


@_fault(SINGLE, "RabbitMQ frozen with SIGSTOP")
def _freeze(place: Place) -> None:
    place.node.pause()
    try:
        place.hold(place.random.uniform(1, 12))
    finally:
        place.node.resume()


@_fault(SINGLE, "memory alarm")
def _memory_alarm(place: Place) -> None:
    with alarm(place.node, "memory"):
        place.hold(place.random.uniform(1, 6))


@_fault(SINGLE, "disk alarm")
def _disk_alarm(place: Place) -> None:
    with alarm(place.node, "disk"):
        place.hold(place.random.uniform(1, 6))


@contextlib.contextmanager
def alarm(node: rabbitmq.Node, kind: str) -> Iterator[None]:
    """Make a node block publishers for the duration of a ``with`` block.

    Parameters:
        kind: ``memory`` or ``disk``.
    """
    module, setter, getter = {
        "memory": (
            "vm_memory_monitor",
            "set_vm_memory_high_watermark",
            "get_vm_memory_high_watermark",
        ),
        "disk": ("rabbit_disk_monitor", "set_disk_free_limit", "get_disk_free_limit"),
    }[kind]
    before = node.eval(f"{module}:{getter}()")
    # This is what rabbitmqctl's commands for alarms do.
    node.eval(f"{module}:{setter}({'0.0000001' if kind == 'memory' else 10**15})")
    try:
        yield
    finally:
        node.eval(f"{module}:{setter}({before})")


# -- connections ---------------------------------------------------------------------------------


def _proxied(name: str, work: Callable[[Place, Proxy], None]) -> None:
    def provoke(place: Place) -> None:
        # On the storing side, on the reading side, or on both.
        chosen = place.random.choice([place.proxies, place.proxies[:1], place.proxies[1:]])
        try:
            for proxy in chosen:
                work(place, proxy)
            # The first one has already waited.
        finally:
            for proxy in chosen:
                proxy.resume()

    SINGLE[name] = Fault(name, provoke)


def _reset(place: Place, proxy: Proxy) -> None:
    for _ in range(5):
        proxy.reset()
        place.hold(place.random.uniform(0, 0.5))


def _halve(place: Place, proxy: Proxy) -> None:
    proxy.halve()


def _swallow(place: Place, proxy: Proxy) -> None:
    proxy.swallow()
    place.hold(place.random.uniform(1, 15))


def _stall(place: Place, proxy: Proxy) -> None:
    proxy.stall()
    place.hold(place.random.uniform(0.5, 8))


def _slow(place: Place, proxy: Proxy) -> None:
    proxy.slow(place.random.choice((20_000, 100_000)))
    place.hold(place.random.uniform(2, 6))


def _refuse(place: Place, proxy: Proxy) -> None:
    proxy.refuse()
    place.hold(place.random.uniform(0.5, 5))


_proxied("connections reset", _reset)
_proxied("connections half-open", _halve)
_proxied("connections black-holed", _swallow)
_proxied("connections stalled", _stall)
_proxied("connections slow", _slow)
_proxied("connections refused", _refuse)


@_fault(SINGLE, "connections closed by rabbitmqctl")
def _close_all(place: Place) -> None:
    place.node.ctl("close_all_connections", "a fault")


@_fault(SINGLE, "connections closed through the management API", management=True)
def _close_through_management(place: Place) -> None:
    closed = 0
    deadline = time.monotonic() + 30
    while not closed and time.monotonic() < deadline:
        # It lists connections a few seconds late.
        for connection in _manage(place.node, "GET", "/api/connections"):
            with contextlib.suppress(urllib.error.HTTPError):
                name = urllib.parse.quote(connection["name"], safe="")
                _manage(place.node, "DELETE", f"/api/connections/{name}")
                closed += 1
    assert closed, "the management interface knows of no connections"


def _manage(node: rabbitmq.Node, method: str, path: str) -> Any:
    request = urllib.request.Request(node.management_url + path, method=method)
    login = base64.b64encode(b"guest:guest").decode()
    request.add_header("Authorization", f"Basic {login}")
    with urllib.request.urlopen(request, timeout=20) as answer:
        body = answer.read()
    return json.loads(body) if body else None


@_fault(SINGLE, "channels killed in the broker")
def _kill_channels(place: Place) -> None:
    # Clients get an internal error (541), which closes the connection.
    place.node.eval("[exit(P, fault) || P <- rabbit_channel:list()]")


# -- what an operator does -----------------------------------------------------------------------


@contextlib.contextmanager
def _operator(place: Place) -> Iterator[amqp.Channel]:
    connection = kombu.Connection(place.node.url()).connection
    try:
        yield connection.channel()
    finally:
        with contextlib.suppress(OSError, amqp.AMQPError):
            connection.close()


@_fault(SINGLE, "exchange deleted")
def _delete_exchange(place: Place) -> None:
    with _operator(place) as channel:
        channel.exchange_delete(f"{place.prefix}.states")


@_fault(SINGLE, "shard queues deleted", loses=True)
def _delete_shards(place: Place) -> None:
    with _operator(place) as channel:
        for _ in range(3):
            channel.queue_delete(place.shard_queue())


@_fault(SINGLE, "inboxes deleted")
def _delete_inboxes(place: Place) -> None:
    # AMQP lets only the owner delete an exclusive queue. rabbitmqctl refuses too.
    place.node.eval(
        '[catch rabbit_amqqueue:delete(Q, false, false, <<"operator">>)'
        " || Q <- rabbit_amqqueue:list(), amqqueue:get_exclusive_owner(Q) =/= none]"
    )


@_fault(SINGLE, "permissions taken away and given back")
def _take_permissions(place: Place) -> None:
    user, pattern = "guest", '<<".*">>'
    place.node.eval(
        f'rabbit_auth_backend_internal:clear_permissions(<<"{user}">>, <<"/">>, <<"op">>)'
    )
    try:
        place.hold(place.random.uniform(0.5, 3))
    finally:
        place.node.eval(
            f'rabbit_auth_backend_internal:set_permissions(<<"{user}">>, <<"/">>, '
            f'{pattern}, {pattern}, {pattern}, <<"op">>)'
        )


# -- clients -------------------------------------------------------------------------------------


@_fault(SINGLE, "storing process killed with -9")
def _kill_storing(place: Place) -> None:
    for slot in (0, 1):
        place.load.kill_storing(slot)


@_fault(SINGLE, "children of a worker killed with -9")
def _kill_children(place: Place) -> None:
    killed = 0
    deadline = time.monotonic() + 30
    while killed < 4 and time.monotonic() < deadline:
        killed += place.load.kill_children()
        place.hold(0.3)
    assert killed, "the worker has no children"


@_fault(SINGLE, "worker killed with -9")
def _kill_worker(place: Place) -> None:
    pool = place.random.choice(place.load.pools)
    place.load.kill_worker(pool)
    place.load.start_worker(pool)


@_fault(SINGLE, "reader frozen with SIGSTOP")
def _freeze_reader(place: Place) -> None:
    role = place.random.choice(["look", "poll0", "join", "wait"])
    with place.load.frozen(role):
        place.hold(place.random.uniform(1, 16))


# -- a cluster -----------------------------------------------------------------------------------


def _leaders(place: Place) -> Dict[str, int]:
    """Return how many shards each running node leads."""
    node = next(node for node in place.nodes if node.running)
    counted = node.eval(
        "lists:foldl(fun(Q, A) -> case amqqueue:get_pid(Q) of {_, N} ->"
        " maps:update_with(N, fun(C) -> C + 1 end, 1, A); _ -> A end end, #{},"
        " rabbit_amqqueue:list())"
    )
    found = {}
    for pair in counted.strip("#{}").split(","):
        name, arrow, count = pair.partition("=>")
        if arrow:
            found[name.strip().strip("'")] = int(count)
    return found


def leader(place: Place) -> rabbitmq.Node:
    """Return the node that leads most shards."""
    leaders = _leaders(place)
    return max(place.nodes, key=lambda node: leaders.get(node.name, 0))


def _until_whole(place: Place) -> None:
    """Return when the cluster can lose any node; a restarted node recovers its queues slowly."""
    for node in place.nodes:
        whole = node.eval(
            "rabbit_upgrade_preparation:await_online_quorum_plus_one(150000)", timeout=180
        )
        assert whole == "true", f"{node.name} has not recovered its quorum queues: {whole}"


@_fault(CLUSTER, "leader of shards killed with -9")
def _kill_leader(place: Place) -> None:
    _until_whole(place)
    node = leader(place)
    _kill_node(place, node)
    try:
        place.load.until_flowing()
    finally:
        node.start()


@_fault(CLUSTER, "node partitioned away")
def _partition(place: Place) -> None:
    _until_whole(place)
    node = place.random.choice([leader(place), place.random.choice(place.nodes)])
    place.load.journal.cut()
    with partitioned(place.nodes, node):
        place.hold(place.random.uniform(1, 5))
        # Celery's own connections are not covered: a process that sends tasks through the node that
        # is cut off blocks together with it.
        place.load.until_flowing(without=("send", "chord"))
    place.load.journal.cut()


@contextlib.contextmanager
def partitioned(nodes: List[rabbitmq.Node], node: rabbitmq.Node) -> Iterator[None]:
    """Cut a node off from the others of its cluster, but not from its clients."""
    others = [other.name for other in nodes if other is not node]
    names = ", ".join(f"'{name}'" for name in others)
    # With a different cookie for the others, it can neither call them nor be called.
    node.eval(
        f"[begin erlang:set_cookie(N, 'not-the-cookie'), erlang:disconnect_node(N) end"
        f" || N <- [{names}]]"
    )
    try:
        yield
    finally:
        node.eval(
            f"[begin erlang:set_cookie(N, erlang:get_cookie()), net_kernel:connect_node(N) end"
            f" || N <- [{names}]]"
        )


@_fault(CLUSTER, "node frozen with SIGSTOP")
def _freeze_node(place: Place) -> None:
    _until_whole(place)
    node = leader(place)
    node.pause()
    try:
        place.hold(place.random.uniform(1, 20))
    finally:
        node.resume()


@_fault(CLUSTER, "rolling restart")
def _rolling_restart(place: Place) -> None:
    for node in place.nodes:
        _until_whole(place)
        place.load.journal.crashed()
        node.halt()
        place.load.journal.crashed()
        node.start()
        place.load.until_stored(20)


# -- places --------------------------------------------------------------------------------------


def make_app(
    broker: List[str], results: List[str], prefix: str, **transport_options: Any
) -> Celery:
    """Return an app whose result queues begin with *prefix*.

    Parameters:
        broker: URLs for tasks. They go around the proxies: a task message that is lost has no
            result, and delivering tasks is not under test.
        results: URLs for results.
    """
    app = Celery("faults", broker=";".join(broker), set_as_current=False)
    app.conf.update(
        result_backend=";".join(results),
        result_exchange=prefix,
        task_default_queue=f"{prefix}-tasks",
        result_backend_transport_options=transport_options,
    )
    return app


@contextlib.contextmanager
def place(
    nodes: List[rabbitmq.Node],
    *,
    queue_type: str = "classic",
    shards: int = 16,
    seed: Optional[int] = None,
    expires: Optional[float] = None,
    **options: Any,
) -> Iterator[Place]:
    """Put a load on a broker, and clean up at the end.

    Parameters:
        nodes: the nodes of the broker.
        queue_type: the type of the shards.
        seed: the seed of all random choices.
        expires: seconds after which results expire.
        **options: for :class:`~tests.faults.load.Load`.
    """
    chance = random.Random(seed)
    prefix = f"faults-{chance.getrandbits(32):08x}"
    with contextlib.ExitStack() as stack:
        apps = []
        sides = []
        for _ in range(2):
            proxies = [stack.enter_context(Proxy(node.amqp_port)) for node in nodes]
            sides.append(proxies)
            urls = [proxy.url(node.url()) for proxy, node in zip(proxies, nodes)]
            app = make_app(
                [node.url() for node in nodes], urls, prefix, shards=shards, queue_type=queue_type
            )
            app.conf.result_expires = expires
            # The queue of tasks must survive a node failure as those of results do.
            app.conf.task_default_queue_type = "quorum" if len(nodes) > 1 else "classic"
            apps.append(app)
        stack.callback(_clean_up, nodes, prefix, shards)
        load = stack.enter_context(Load(*apps, **options))
        yield Place(
            nodes, [proxy for side in sides for proxy in side], load, prefix, shards, chance
        )


def _clean_up(nodes: List[rabbitmq.Node], prefix: str, shards: int) -> None:
    connection = kombu.Connection(nodes[0].url()).connection
    channel = connection.channel()
    for number in range(shards):
        channel.queue_delete(f"{prefix}.shard.{number}")
    for number in range(PLAN_QUEUES):
        channel.queue_delete(f"{prefix}.chords.{number}")
    channel.queue_delete(f"{prefix}-tasks")
    channel.exchange_delete(f"{prefix}.states")
    connection.close()
