"""Measures the backend beside others on this machine, in one run.

The rounds of the peers alternate, so that a machine that gets slower gets slower for all. Given
are medians over the rounds, with the least and the largest. A private RabbitMQ and a private Redis
without persistence are started, and stopped in the end.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import platform
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import amqp
import celery
import kombu

from bench import compare, measures, pages, peers, services
from bench.figures import Row, Run
from bench.place import Place
from bench.report import Reporter, markdown
from tools import rabbitmq

#: Runs that later ones are compared with.
RECORDED = Path(__file__).resolve().parent / "recorded"


def _parser() -> argparse.ArgumentParser:
    # fmt: off
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("measures", nargs="*", metavar="MEASURE",
        help=f"of {', '.join(measures.ALL)}; by default all but {', '.join(measures.ON_REQUEST)}")
    add("--quick", action="store_true", help="smaller and fewer rounds: under three minutes")
    add("--distribution", default="system", metavar="NAME",
        help="the RabbitMQ: system (default), or a Debian suite such as forky")
    add("--peers", default=",".join(n.replace(",", ";") for n in peers.PEERS), metavar="NAMES",
        help="separated by commas, with ';' for a comma in a name; default: %(default)s")
    add("--kept", default="", metavar="N,N",
        help="how many results are kept for look-ups; default: 10000 with --quick, 1000 and 100000 "
             "without; 1000000 takes ten minutes, 5000000 half an hour")
    add("--fleet", default="", metavar="NxM,NxM",
        help="web processes and tasks a second of the measure fleet, such as 8x50")
    add("--rounds", type=int, default=0, metavar="N",
        help="rounds of each peer, but for chords and the fleet; default: 5, with --quick 3")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    add("--markdown", type=Path, metavar="FILE", help="write a table there")
    add("--plots", type=Path, metavar="FOLDER", help="write SVG files there; needs matplotlib")
    add("--compare", action="store_true",
        help="compare ratios with the recorded run of its kind; fail if one became worse")
    add("--record", action="store_true",
        help="make this the recorded run of its kind, and update the pages and plots")
    add("--from", dest="source", type=Path, nargs="+", metavar="FILE",
        help="measure nothing; take each row from the first of these JSON files that has it")
    # fmt: on
    return parser


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run what the command line says; return the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    unknown = [name for name in options.measures if name not in measures.ALL]
    if unknown:
        parser.error(f"no measure is called {unknown[0]!r}; there are {', '.join(measures.ALL)}")
    reporter = Reporter()
    if options.source:
        run = merged([Run.read(path) for path in options.source])
        for row in run.rows:
            reporter.row(row)
    else:
        try:
            run = _measure(options, reporter)
        except rabbitmq.NotAvailable as exc:
            print(exc, file=sys.stderr)
            return 2
    return _finish(run, options, reporter)


def _measure(options: argparse.Namespace, reporter: Reporter) -> Run:
    with contextlib.ExitStack() as stack:
        place = _place(stack, options, reporter)
        about = _about(place.node, options.quick)
        reporter.line(", ".join(f"{name} {value}" for name, value in about.items()))
        started = time.monotonic()
        rows: List[Row] = []
        failed: List[str] = []
        try:
            for row in _rows(place, options, reporter, failed):
                rows.append(row)
                reporter.row(row)
                if options.json:
                    options.json.write_text(Run(about, rows).to_json(), encoding="utf-8")
        except KeyboardInterrupt:
            reporter.line("interrupted: these are the rows so far")
        if failed:
            about["failed"] = failed
        about["seconds"] = round(time.monotonic() - started)
        about["busy"] = about["busy"] or _busy()
        about["load"] = f"{about['load']}; at the end {_load()}"
    return Run(about, rows)


def _rows(
    place: Place, options: argparse.Namespace, reporter: Reporter, failed: List[str]
) -> Iterator[Row]:
    left_out = {*measures.ON_REQUEST, *(measures.THOROUGH if options.quick else ())}
    for name in options.measures or [name for name in measures.ALL if name not in left_out]:
        begun = time.monotonic()
        try:
            yield from measures.ALL[name](place)
        except Exception:
            # The other measures are worth having.
            reporter.line(f"-- {name} has failed:\n{traceback.format_exc()}")
            failed.append(name)
        reporter.line(f"-- {name}: {time.monotonic() - begun:.0f} s, load {_load()}")


def _place(stack: contextlib.ExitStack, options: argparse.Namespace, reporter: Reporter) -> Place:
    """Start the servers, which *stack* stops, and return the place where measures run."""
    node = stack.enter_context(services.private_rabbitmq(options.distribution))
    redis = stack.enter_context(services.private_redis())
    lasting = stack.enter_context(services.private_redis(lasting=True))
    servers = peers.Servers(node.url(), redis.address, lasting.address)
    here = []
    for name in (name.strip().replace(";", ",") for name in options.peers.split(",")):
        if peers.available(name):
            here.append(name)
        else:
            reporter.line(f"{name} is left out: pip install -e '.[bench]' installs it")
    kept = [int(number) for number in options.kept.split(",") if number]
    place = Place(node, servers, options.quick, kept, here, (redis.pid, lasting.pid))
    place.usual_rounds = options.rounds
    place.fleet = [_pair(text) for text in options.fleet.split(",") if text]
    if not options.quick and not node.version.startswith("3."):
        tuned = stack.enter_context(services.private_rabbitmq(options.distribution, services.TUNED))
        place.servers = dataclasses.replace(servers, tuned=tuned.url())
        place.tuned_pid = tuned.pid
    stack.callback(place.end_workers)
    return place


def _pair(text: str) -> Tuple[int, int]:
    first, _, second = text.partition("x")
    return int(first), int(second)


def _about(node: rabbitmq.Node, quick: bool) -> Dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "rabbitmq": node.version,
        "celery": celery.__version__,
        "kombu": kombu.__version__,
        "amqp": amqp.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "memory": f"{memory / 2**30:.0f} GiB",
        "quick": quick,
        "load": _load(),
        "busy": _busy(),
    }


def _busy() -> bool:
    # The benchmarks by themselves keep about one process and a half for each core busy.
    return os.getloadavg()[0] > 3 * (os.cpu_count() or 1)


def _load() -> str:
    # The average of the last minute; a process that computes all the time counts as 1.
    return f"{os.getloadavg()[0]:.1f}"


def merged(runs: Sequence[Run]) -> Run:
    """Return one run with the rows of several.

    If two runs have the same row, the first run's counts. The first run describes the result; the
    others are described in ``parts``, with the names of their rows.
    """
    rows: Dict[str, Row] = {}
    parts: List[Dict[str, Any]] = []
    for number, run in enumerate(runs):
        new = [row for row in run.rows if row.name not in rows]
        for row in new:
            rows[row.name] = dataclasses.replace(row, busy=True) if run.busy else row
        part = dict(run.about)
        parts += part.pop("parts", ())
        if number and new:
            parts.append({**part, "rows": [row.name for row in new]})
    about = {**runs[0].about, "parts": parts} if parts else runs[0].about
    return Run(about, list(rows.values()))


def recorded_path(run: Run) -> Path:
    """Return the file that runs of the same kind are recorded in."""
    version = ".".join(str(run.about["rabbitmq"]).split(".")[:2])
    return RECORDED / f"rabbitmq-{version}-{'quick' if run.about['quick'] else 'full'}.json"


def _finish(run: Run, options: argparse.Namespace, reporter: Reporter) -> int:
    if options.json:
        options.json.write_text(run.to_json(), encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(markdown(run), encoding="utf-8")
    if options.plots:
        from bench import plots

        for path in plots.draw(run, options.plots):
            reporter.line(f"wrote {path}")
    path = recorded_path(run)
    code = 1 if run.about.get("failed") else 0
    if options.compare:
        try:
            recorded = Run.read(path)
        except FileNotFoundError:
            reporter.line(f"\nno run of this kind is recorded: {path} is not there")
        else:
            worse = compare.regressions(recorded, run)
            compared = sum(1 for _ in compare.changes(recorded, run))
            reporter.regressions(worse, compared, recorded)
            code = 1 if worse else code
    if options.record:
        path.parent.mkdir(exist_ok=True)
        path.write_text(run.to_json(), encoding="utf-8")
        reporter.line(f"recorded in {path}")
        # The pages show what is recorded.
        pages.main([])
    return code


if __name__ == "__main__":
    sys.exit(main())
