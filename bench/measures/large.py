"""Look-ups of small results while large ones, which have queues of their own, are kept too."""

from __future__ import annotations

import contextlib
import random
import uuid
from typing import Callable, Dict, Iterator, List, Mapping

from bench.figures import LESS, OURS, Row, percentile
from bench.measures.stranger import SIZE
from bench.place import Place
from bench.programs import Assistant

#: Bytes of the text in a large result.
LARGE = 1_000_000

#: How many small results are kept beside the large ones.
SMALL = 1000


def measure(place: Place) -> Iterator[Row]:
    """Yield milliseconds of look-ups of small results, and of large ones."""
    count = 20 if place.quick else 1000
    small = [str(uuid.uuid4()) for _ in range(SMALL // 4 if place.quick else SMALL)]
    large = [str(uuid.uuid4()) for _ in range(count)]
    with contextlib.ExitStack() as stack:
        readers: Dict[str, Assistant] = {}
        for name in place.chosen(OURS, "redis"):
            queue = f"bench-{uuid.uuid4().hex[:8]}"
            with place.assistant(name, queue) as storer:
                storer.ask("store", ids=small, size=SIZE)
                storer.ask("store", ids=large, size=LARGE)
            readers[name] = stack.enter_context(place.assistant(name, queue))
        for key, ids, title in (
            ("large.others", small, f"look-up of a small result, {count:,} of 1 MB kept"),
            ("large", large, f"look-up of a result of 1 MB, {count:,} of them kept"),
        ):
            found = place.alternate({n: _looking_up(r, ids) for n, r in readers.items()})
            yield Row(key, f"{title}, median", "ms", LESS, found["median"], count)
            yield Row(f"{key}.p99", f"{title}, 99th percentile", "ms", LESS, found["p99"], count)
        # The next measure is not to find them.
        for reader in readers.values():
            reader.ask("forget", ids=large)


def _looking_up(reader: Assistant, ids: List[str]) -> Callable[[], Mapping[str, float]]:
    def work() -> Dict[str, float]:
        taken = reader.ask("look_up", ids=random.sample(ids, min(len(ids), 100)))["milliseconds"]
        return {"median": percentile(taken, 50), "p99": percentile(taken, 99)}

    return work
