"""Look-ups by a process that did not send the tasks, while more and more results are kept.

The same results serve to measure what they cost the broker: memory, and processor time.
"""

from __future__ import annotations

import collections
import contextlib
import math
import random
import time
import uuid
from typing import Any, Callable, Collection, DefaultDict, Dict, Iterator, List, Mapping

import kombu

from bench import internals, peers, processes
from bench.figures import LESS, OURS, Row, percentile
from bench.place import Place
from bench.programs import Assistant

#: Bytes of the text in each result, so that a body has 300.
SIZE = 300 - 144

#: Other peers are measured with at most this many results: more change nothing for them.
LARGEST_OF_OTHERS = 10_000
LARGEST_PER_TASK = 1_000

#: How many results are kept, where nothing else is said.
QUICK = (10_000,)
FULL = (1000, 100_000)

#: How many ids are looked up at once.
BATCH = 1000

#: Seconds within which memory must have the results that a process asks for again and again.
REMEMBERED_WITHIN = 20.0

#: How many processes store the results.
STORERS = 2

#: More results than this are put into pages at once: the shards are the same in the end, sooner.
LARGEST_STORED = 1_000_000

#: Results for each shard by the rule of docs/sizing.md, and the default number of shards.
RULE, SHARDS = 4000, 256

#: Seconds for which the broker is watched with nothing to do.
IDLE = 3.0


def measure(place: Place) -> Iterator[Row]:
    """Yield milliseconds of look-ups, and what the results kept cost the broker."""
    for kept in place.kept or (QUICK if place.quick else FULL):
        yield from _with_kept(place, kept)


def _with_kept(place: Place, kept: int) -> Iterator[Row]:
    names = place.chosen("amqp", "amqp, per-task", "redis")
    if kept > LARGEST_OF_OTHERS or place.quick:
        names = [name for name in names if not peers.named(name).queue_per_task]
    if kept > LARGEST_PER_TASK:
        names = [name for name in names if not peers.named(name).queue_per_task]
    if kept > LARGEST_OF_OTHERS:
        names = [name for name in names if name == OURS]
    ids = [str(uuid.uuid4()) for _ in range(kept)]
    queues = {name: f"bench-{uuid.uuid4().hex[:8]}" for name in names}
    with contextlib.ExitStack() as stack:
        options = shards_for(kept)
        for name in names:
            if name != OURS:
                store(place, name, queues[name], ids)
        yield from _our_costs(place, queues[OURS], ids)
        readers: Dict[str, Assistant] = {
            name: stack.enter_context(
                place.assistant(name, queues[name], **(options if name == OURS else {}))
            )
            for name in names
        }
        if kept > LARGEST_STORED:
            yield from all_found(place, queues[OURS], readers[OURS], ids)
        else:
            yield from packing(place, queues[OURS], readers[OURS], ids)
        yield from looking_up(place, readers, ids)
        delete(place, OURS, queues[OURS], **options)


def shards_for(kept: int) -> Dict[str, Any]:
    """Return the options for as many shards as docs/sizing.md advises."""
    shards = math.ceil(kept / RULE)
    return {"shards": shards} if shards > SHARDS else {}


def _app(place: Place, queue: str, **options: Any) -> Any:
    return place.app(OURS, queue, result_backend_transport_options=options)


def one_each(place: Place, queue: str, ids: List[str]) -> List[str]:
    """Return one of *ids* for each shard."""
    # These reach every shard. To compute the shards of all ids would take long.
    some = ids[: 100 * (shards_for(len(ids)).get("shards") or SHARDS)]
    return internals.one_id_a_shard(_app(place, queue, **shards_for(len(ids))), some)


def cost(key: str, title: str, unit: str, value: float, kept: int) -> Row:
    """Return a row about RabbitMQ or one process, which says something by itself."""
    title = f"{title}, {kept:,} kept"
    return Row(key, title, unit, LESS, {OURS: [value]}, kept, absolute=True)


def _our_costs(place: Place, queue: str, ids: List[str]) -> Iterator[Row]:
    """Store *ids*, and yield what that costs the broker."""
    node, kept = place.node, len(ids)
    app = _app(place, queue, **shards_for(kept))
    before = memory_in_use(node)
    # The exchange and all shards cost memory before there are results.
    first = one_each(place, queue, ids)
    for task_id in first:
        app.backend.store_result(task_id, "x" * SIZE, "SUCCESS", request=peers.context(task_id))
    peers.close(app)
    fixed, disk = memory_in_use(node), processes.folder_bytes(node.log_path.parent)
    known = set(first)
    rest = [task_id for task_id in ids if task_id not in known]
    cpu = processes.cpu_seconds(node.pid)
    if kept > LARGEST_STORED:
        _keep_packed(place, queue, rest, shards_for(kept))
    else:
        store(place, OURS, queue, rest)
    cpu = processes.cpu_seconds(node.pid) - cpu
    after = memory_in_use(node)
    title = f"memory of RabbitMQ for {len(first)} shards"
    yield cost("memory.fixed", title, "MB", (fixed - before) / 1e6, kept)
    title = "memory of RabbitMQ, each result of 300 bytes"
    yield cost("memory.kept", title, "bytes", (after - fixed) / len(rest), kept)
    disk = processes.folder_bytes(node.log_path.parent) - disk
    title = "disk of RabbitMQ, each result of 300 bytes"
    yield cost("disk.kept", title, "bytes", disk / len(rest), kept)
    if kept <= LARGEST_STORED:
        title = "processor time of RabbitMQ, each result stored"
        yield cost("broker.store", title, "µs", cpu / len(rest) * 1e6, kept)
    cpu = processes.cpu_seconds(node.pid)
    time.sleep(IDLE)
    cpu = processes.cpu_seconds(node.pid) - cpu
    title = "processor time of RabbitMQ with nothing to do"
    yield cost("broker.idle", title, "% of a core", cpu / IDLE * 100, kept)


def packing(place: Place, queue: str, reader: Assistant, ids: List[str]) -> Iterator[Row]:
    """Have the shards packed, and yield what the first look-ups take."""
    kept = len(ids)
    first = reader.ask("look_up", ids=random.sample(ids, 20))["milliseconds"]
    title = "first look-up in a shard, nothing packed"
    yield cost("lookup.loose", title, "ms", percentile(first, 50), kept)
    packed = reader.ask("pack", ids=one_each(place, queue, ids))
    title = "packing all shards, each result"
    yield cost("lookup.packing", title, "µs", packed["seconds"] / kept * 1e6, kept)


def all_found(place: Place, queue: str, reader: Assistant, ids: List[str]) -> Iterator[Row]:
    """Look up all *ids*, those of one shard at once, and yield the time for each."""
    kept, started = len(ids), time.monotonic()
    found = sum(
        reader.ask("read_store", ids=some, at_once=True)["found"]
        for some in _by_shard(_app(place, queue, **shards_for(kept)), ids)
    )
    seconds = time.monotonic() - started
    _check(found, kept)
    title = "look-up of all ids, those of a shard at once, each"
    yield cost("lookup.all", title, "µs", seconds / kept * 1e6, kept)


def _by_shard(app: Any, ids: List[str]) -> Collection[List[str]]:
    """Return *ids* in lists, one for each shard."""
    shards: DefaultDict[str, List[str]] = collections.defaultdict(list)
    for task_id in ids:
        shards[internals.shard_queue(app, task_id)].append(task_id)
    return shards.values()


def looking_up(place: Place, readers: Dict[str, Assistant], ids: List[str]) -> Iterator[Row]:
    """Yield milliseconds of look-ups of *ids*, and of unknown ones."""
    count, kept, node = (100 if place.quick else 300), len(ids), place.node

    def one_by_one(name: str, known: bool) -> Callable[[], Mapping[str, float]]:
        # A process that has read often would answer from its memory.
        command = "read_store" if name == OURS else "look_up"

        def work() -> Dict[str, float]:
            chosen = random.sample(ids, count) if known else _unknown(count)
            cpu = processes.cpu_seconds(node.pid)
            answer = readers[name].ask(command, ids=chosen)
            cpu = processes.cpu_seconds(node.pid) - cpu
            _check(answer["found"], count if known else 0)
            taken = answer["milliseconds"]
            return {
                "median": percentile(taken, 50),
                "p99": percentile(taken, 99),
                "broker": cpu / count * 1e6,
            }

        return work

    def together(name: str) -> Callable[[], Mapping[str, float]]:
        command = "read_store" if name == OURS else "look_up"

        def work() -> Dict[str, float]:
            chosen = random.sample(ids, BATCH)
            answer = readers[name].ask(command, ids=chosen, at_once=True)
            _check(answer["found"], BATCH)
            return {"ms": answer["milliseconds"][0]}

        return work

    end = f"{kept:,} kept"
    for key, known in (("found", True), ("unknown", False)):
        found = place.alternate({name: one_by_one(name, known) for name in readers})
        title = f"look-up by a stranger, {'found' if known else 'of an unknown id'}"
        yield Row(f"lookup.{key}", f"{title}, median, {end}", "ms", LESS, found["median"], kept)
        title = f"{title}, 99th percentile, {end}"
        yield Row(f"lookup.{key}.p99", title, "ms", LESS, found["p99"], kept)
        if known:
            figures = {name: found["broker"][name] for name in found["broker"] if name != "redis"}
            title = f"processor time of RabbitMQ, each look-up, {end}"
            yield Row("broker.lookup", title, "µs", LESS, figures, kept, absolute=True)
    batches = {name: together(name) for name in readers if not peers.named(name).queue_per_task}
    found = place.alternate(batches)
    yield Row("lookup.batch", f"look-up of {BATCH:,} ids at once, {end}", "ms", LESS, found["ms"],
              kept)  # fmt: skip
    yield from _remembered(place, readers[OURS], ids)


def _remembered(place: Place, reader: Assistant, ids: List[str]) -> Iterator[Row]:
    """Yield what the backend's own look-ups take, of ids that a process has asked for before."""
    kept, count = len(ids), min(len(ids), 100)
    chosen = random.sample(ids, count)
    deadline = time.monotonic() + REMEMBERED_WITHIN
    while reader.ask("look_up", ids=chosen)["remembered"] < count:
        if time.monotonic() > deadline:
            # Memory has no room for all of them.
            return
    answers = [reader.ask("look_up", ids=chosen) for _ in range(place.rounds)]
    figures = {OURS: [percentile(answer["milliseconds"], 50) for answer in answers]}
    title = f"look-up of a result in memory, median, {kept:,} kept"
    yield Row("lookup.remembered", title, "ms", LESS, figures, kept, absolute=True)


def _unknown(count: int) -> List[str]:
    return [str(uuid.uuid4()) for _ in range(count)]


def _check(found: int, wanted: int) -> None:
    if found != wanted:
        raise RuntimeError(f"{found} results were found, not {wanted}")


def _keep_packed(place: Place, queue: str, ids: List[str], options: Dict[str, Any]) -> None:
    """Put results into the pages of their shards, with several processes."""
    shards = list(_by_shard(_app(place, queue, **options), ids))
    with contextlib.ExitStack() as stack:
        storers = [
            stack.enter_context(place.assistant(OURS, queue, **options)) for _ in range(STORERS)
        ]
        for start in range(0, len(shards), STORERS):
            for assistant, some in zip(storers, shards[start:]):
                assistant.tell("keep_packed", ids=some, size=SIZE)
            for assistant, _ in zip(storers, shards[start:]):
                assistant.answer()


def store(place: Place, name: str, queue: str, ids: List[str]) -> None:
    """Store results with several processes, and return when the broker has them.

    This backend does not wait for each confirm; the messages are the same.
    """
    options: Dict[str, Any] = {"confirm": False} if name.startswith(OURS) else {}
    storers = STORERS if len(ids) >= 10_000 else 1
    with contextlib.ExitStack() as stack:
        assistants = [
            stack.enter_context(place.assistant(name, queue, **options)) for _ in range(storers)
        ]
        for number, assistant in enumerate(assistants):
            assistant.tell("store", ids=ids[number::storers], size=SIZE)
        for assistant in assistants:
            assistant.answer()


def memory_in_use(node: Any) -> int:
    """Return what Erlang has in use after a garbage collection of all its processes."""
    return int(
        node.eval(
            "[garbage_collect(P) || P <- processes()], timer:sleep(1000),"
            "[garbage_collect(P) || P <- processes()], erlang:memory(total)",
            timeout=600,
        )
    )


def delete(place: Place, name: str, queue: str, **options: Any) -> None:
    """Delete the shards of a variant of this backend, so that the next measure starts empty."""
    options = {**peers.named(name).options, **options}
    app = place.app(name, queue, result_backend_transport_options=options)
    with kombu.Connection(place.node.url()) as connection:
        channel = connection.channel()
        for shard in internals.shard_queues(app):
            channel.queue_delete(shard)
    peers.close(app)
