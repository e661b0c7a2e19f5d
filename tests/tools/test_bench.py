"""The benchmarks' own logic: statistics, files, the regression check, the table, the plots."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import statistics
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import __main__ as command
from bench import compare, figures, measures, pages, processes, report
from bench.figures import LESS, MORE, Row, Run, percentile, ratios
from bench.measures import endurance, floor, poll_floor
from bench.peers import PEERS, Servers
from bench.place import Place
from bench.ticks import Ticks, ticking
from tests.conftest import eventually
from tools import rabbitmq

ABOUT: Dict[str, Any] = {
    "date": "2026-01-01", "rabbitmq": "3.10.8", "celery": "5.7.0", "cores": 2, "quick": True,
}  # fmt: skip


def make_row(better: str = MORE, size: Optional[int] = None, **peers: List[float]) -> Row:
    return Row("store", "results stored", "/s", better, dict(peers), size)


def make_run(*rows: Row) -> Run:
    return Run(ABOUT, list(rows))


# -- statistics ------------------------------------------------------------------------------------


def test_percentiles_by_nearest_rank() -> None:
    values = [15, 20, 35, 40, 50]
    assert [percentile(values, p) for p in (5, 30, 40, 50, 99, 100)] == [15, 20, 20, 35, 50, 50]
    assert percentile([7.0], 50) == 7.0


@given(st.lists(st.floats(-1e9, 1e9), min_size=1), st.floats(0.01, 100))
def test_a_percentile_is_a_value_that_this_share_does_not_exceed(
    values: List[float], percent: float
) -> None:
    found = percentile(values, percent)
    assert found in values
    assert sum(value <= found for value in values) >= len(values) * percent / 100 - 1e-6
    assert sum(value < found for value in values) < len(values) * percent / 100 + 1e-6


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1.0], 0), ([1.0], 101)])
def test_a_percentile_out_of_range_is_refused(values: List[float], percent: float) -> None:
    with pytest.raises(ValueError, match="percentile"):
        percentile(values, percent)


def test_ratios_are_computed_round_by_round() -> None:
    more = make_row(MORE, amqp=[200.0, 100.0], rpc=[100.0, 200.0])
    less = make_row(LESS, amqp=[200.0, 100.0], rpc=[100.0, 200.0])
    assert ratios(more, "amqp", "rpc") == [2.0, 0.5]
    assert ratios(less, "amqp", "rpc") == [0.5, 2.0]
    # A round that was too fast for the clock has no ratio.
    assert ratios(make_row(LESS, amqp=[0.0, 2.0], rpc=[1.0, 2.0]), "amqp", "rpc") == [1.0]


# -- files -----------------------------------------------------------------------------------------


@given(
    st.lists(
        st.builds(
            Row,
            key=st.text(),
            title=st.text(),
            unit=st.text(),
            better=st.sampled_from([LESS, MORE]),
            figures=st.dictionaries(st.text(), st.lists(st.integers(-999, 999).map(float))),
            size=st.none() | st.integers(1, 10**6),
            absolute=st.booleans(),
        )
    )
)
def test_a_saved_run_reads_back_unchanged(rows: List[Row]) -> None:
    run = make_run(*rows)
    assert Run.from_json(run.to_json()) == run


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", '{"format": 99, "about": {}, "rows": []}', '{"format": 1, "rows": []}',
     '{"format": 1, "about": {}, "rows": [{"key": "x"}]}', "nonsense"],
)  # fmt: skip
def test_a_file_of_another_format_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Run.from_json(text)


def test_figures_are_rounded_to_four_digits() -> None:
    written = json.loads(make_run(make_row(amqp=[1234.5678, 0.000123456])).to_json())
    assert written["rows"][0]["figures"] == {"amqp": [1235.0, 0.0001235]}


def test_recorded_runs_can_be_read_and_agree_with_their_names() -> None:
    for path in command.RECORDED.glob("*.json"):
        run = Run.read(path)
        assert command.recorded_path(run) == path
        assert run.rows
        assert {"date", "rabbitmq", "celery", "python", "cores", "memory"} <= set(run.about)
        # The run can serve as a baseline.
        assert list(compare.changes(run, run))


# -- the regression check --------------------------------------------------------------------------


def test_a_slower_machine_is_no_regression() -> None:
    recorded = make_run(make_row(amqp=[100.0, 110.0], rpc=[50.0, 50.0]))
    now = make_run(make_row(amqp=[10.0, 11.0], rpc=[5.0, 5.0]))
    (change,) = compare.changes(recorded, now)
    assert change.factor == pytest.approx(1.0)
    assert compare.regressions(recorded, now) == []


@pytest.mark.parametrize("better", [LESS, MORE])
def test_a_ratio_worse_in_every_round_is_a_regression(better: str) -> None:
    good, bad = (100.0, 50.0) if better == MORE else (50.0, 100.0)
    recorded = make_run(make_row(better, amqp=[good] * 3, redis=[70.0] * 3))
    now = make_run(make_row(better, amqp=[bad] * 3, redis=[70.0] * 3))
    (worse,) = compare.regressions(recorded, now)
    assert (worse.name, worse.peer, worse.factor) == ("store", "redis", 0.5)
    assert compare.regressions(now, recorded) == []


def test_noise_is_no_regression() -> None:
    # The median is half as good, but one round was as good as a recorded one.
    recorded = make_run(make_row(amqp=[100.0, 100.0, 40.0], rpc=[50.0] * 3))
    now = make_run(make_row(amqp=[50.0, 45.0, 50.0], rpc=[50.0] * 3))
    assert compare.regressions(recorded, now) == []
    assert statistics.median(next(compare.changes(recorded, now)).now) == 1.0


def test_only_measures_of_both_runs_are_compared() -> None:
    recorded = make_run(
        make_row(size=10, amqp=[1.0], rpc=[1.0]),
        Row("memory", "memory", "MB", LESS, {"amqp": [1.0], "rpc": [1.0]}, absolute=True),
    )
    now = make_run(
        make_row(size=20, amqp=[1.0], rpc=[1.0]),
        make_row(size=10, amqp=[1.0], redis=[1.0]),
        Row("memory", "memory", "MB", LESS, {"amqp": [9.0], "rpc": [1.0]}, absolute=True),
    )
    assert list(compare.changes(recorded, now)) == []


def test_only_processor_time_is_compared_on_a_busy_machine() -> None:
    rows = [
        Row(key, key, "µs", LESS, {"amqp": [1.0], "rpc": [1.0]})
        for key in ("store", "store.cpu", "worker.broker")
    ]
    quiet, busy = Run(ABOUT, rows), Run(dict(ABOUT, busy=True), rows)
    for recorded, now in ((quiet, busy), (busy, quiet)):
        names = [change.name for change in compare.changes(recorded, now)]
        assert names == ["store.cpu", "worker.broker"]
    assert len(list(compare.changes(quiet, quiet))) == 3


def test_variants_of_this_backend_are_compared_only_with_other_backends() -> None:
    values = {"amqp": [1.0], "amqp, confirm=False": [1.0], "amqp, per-task": [1.0], "rpc": [1.0]}
    run = make_run(Row("store", "results stored", "/s", MORE, values))
    pairs = {(change.ours, change.peer) for change in compare.changes(run, run)}
    assert pairs == {
        ("amqp", "rpc"),
        ("amqp", "amqp, per-task"),
        ("amqp, confirm=False", "rpc"),
        ("amqp, confirm=False", "amqp, per-task"),
    }


# -- the command -----------------------------------------------------------------------------------


def write(tmp_path: Path, run: Run) -> str:
    path = tmp_path / "run.json"
    path.write_text(run.to_json(), encoding="utf-8")
    return str(path)


def test_the_command_fails_if_a_ratio_became_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "RECORDED", tmp_path / "recorded")
    monkeypatch.setattr(pages, "main", lambda arguments: 0)
    good = make_run(make_row(amqp=[100.0, 100.0], rpc=[50.0, 50.0]))
    bad = make_run(make_row(amqp=[20.0, 20.0], rpc=[50.0, 50.0]))
    # A missing baseline is reported, but is no failure.
    assert command.main(["--from", write(tmp_path, good), "--compare"]) == 0
    assert "no run of this kind is recorded" in capsys.readouterr().out
    assert command.main(["--from", write(tmp_path, good), "--record"]) == 0
    assert (tmp_path / "recorded" / "rabbitmq-3.10-quick.json").exists()
    assert command.main(["--from", write(tmp_path, good), "--compare"]) == 0
    assert "none became worse" in capsys.readouterr().out
    assert command.main(["--from", write(tmp_path, bad), "--compare"]) == 1
    assert "WORSE  results stored: amqp beside rpc was 2 times" in capsys.readouterr().out


def test_the_command_refuses_an_unknown_measure(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        command.main(["stroe"])
    assert "no measure is called 'stroe'" in capsys.readouterr().err


def test_markdown_has_a_line_for_each_peer(tmp_path: Path) -> None:
    target = tmp_path / "table.md"
    run = make_run(make_row(amqp=[100.0, 1200.0], rpc=[0.5]))
    assert command.main(["--from", write(tmp_path, run), "--markdown", str(target)]) == 0
    assert target.read_text().splitlines()[2:] == [
        "| results stored | /s | `amqp` | 650 | 100 to 1,200 |",
        "|  |  | `rpc` | 0.5 |  |",
    ]


@pytest.mark.parametrize("rich", [True, False])
def test_the_table_names_every_peer(rich: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setattr(report, "Console", None)
    stream = io.StringIO()
    values = {"amqp": [10.0, 12.0], "bare py-amqp": [20.0, 24.0]}
    report.Reporter(stream).row(Row("store", "results stored", "/s", MORE, values))
    printed = stream.getvalue()
    assert "results stored (more is better)" in printed
    assert "bare py-amqp" in printed
    assert "0.5" in printed


def test_plots_are_svg_and_the_same_for_the_same_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench import plots

    run = make_run(
        Row("store", "results stored", "/s", MORE, {"amqp": [10.0, 12.0], "rpc": [3.0, 4.0]}),
        *(
            Row("lookup.found", "look-up", "ms", LESS, {"amqp": [size / 100]}, size)
            for size in (1000, 10_000)
        ),
    )
    first = {path.name: path.read_bytes() for path in plots.draw(run, tmp_path / "a")}
    again = {path.name: path.read_bytes() for path in plots.draw(run, tmp_path / "b")}
    assert sorted(first) == ["bench-lookup.svg", "bench-store.svg"]
    assert first == again
    assert b"<svg" in first["bench-store.svg"]


# -- processes -------------------------------------------------------------------------------------


def test_processor_time_of_several_processes_is_added_up() -> None:
    with ticking() as ticks:
        Ticks(ticks.path).add()
        child = os.fork()
        if child == 0:
            # os._exit skips the interpreter's own shutdown.
            try:
                mine = Ticks(ticks.path)
                mine.add()
                mine.add()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert ticks.total() == 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_and_processor_time_of_this_process_are_read() -> None:
    assert os.getpid() in processes.family(os.getppid())
    assert processes.family(os.getpid())[0] == os.getpid()
    assert processes.cpu_seconds(os.getpid()) >= 0
    assert processes.resident_bytes(os.getpid()) > 2**20


def test_the_size_of_a_folder_is_that_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_bytes(b"x" * 100_000)
    assert 100_000 <= processes.folder_bytes(tmp_path) < 200_000


def test_a_long_measure_runs_only_if_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(SimpleNamespace(version="4.3.6"), Servers("", "", ""), True, (), (), ())  # type: ignore[arg-type]
    monkeypatch.setattr(command, "_place", lambda *_: place)
    ran: List[str] = []
    noting = {name: functools.partial(note, ran, name) for name in measures.ALL}
    monkeypatch.setattr(measures, "ALL", noting)
    assert command.main([]) == command.main(["endurance"]) == 0
    assert ran == [name for name in noting if name != "endurance"] + ["endurance"]


def note(ran: List[str], name: str, place: Place) -> Iterator[Row]:
    ran.append(name)
    yield from ()


def test_this_backend_is_one_of_the_peers() -> None:
    assert figures.OURS in PEERS


# -- runs of several parts -------------------------------------------------------------------------


def test_a_run_of_several_parts_names_them_and_the_first_row_counts() -> None:
    first = make_run(make_row(amqp=[1.0], rpc=[1.0]))
    about = dict(ABOUT, date="2026-01-02")
    second = Run(about, [make_row(amqp=[9.0]), make_row(size=10, amqp=[2.0])])
    run = command.merged([first, second])
    assert [row.figures["amqp"] for row in run.rows] == [[1.0], [2.0]]
    assert run.about["date"] == "2026-01-01"
    assert run.about["parts"] == [dict(about, rows=["store.10"])]
    assert command.merged([first]) == first


def test_rows_of_a_busy_part_are_not_compared_by_the_clock() -> None:
    busy = Run(dict(ABOUT, busy=True), [make_row(amqp=[1.0], rpc=[1.0])])
    quiet = make_run(Row("store.cpu", "cpu", "µs", LESS, {"amqp": [1.0], "rpc": [1.0]}))
    run = Run.from_json(command.merged([quiet, busy]).to_json())
    assert [change.name for change in compare.changes(run, run)] == ["store.cpu"]


def test_the_command_line_sets_the_rounds_of_measures_without_a_number_of_their_own() -> None:
    def place_with(usual: int) -> Place:
        nowhere = Servers("", "", "")
        place = Place(None, nowhere, False, (), (), ())  # type: ignore[arg-type]
        place.usual_rounds = usual
        return place

    measures = {"amqp": lambda: {"ms": 1.0}}
    for usual, wanted, rounds in ((0, None, 5), (0, 25, 25), (3, None, 3), (3, 25, 25)):
        found = place_with(usual).alternate(measures, wanted)
        assert len(found["ms"]["amqp"]) == rounds


def test_a_measure_that_fails_leaves_the_rows_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(place: Place) -> Iterator[Row]:
        yield make_row(size=10, amqp=[1.0])
        raise RuntimeError("no worker")

    def good(place: Place) -> Iterator[Row]:
        yield make_row(size=20, amqp=[2.0])

    place = Place(SimpleNamespace(version="4.3.6"), Servers("", "", ""), True, (), (), ())  # type: ignore[arg-type]
    monkeypatch.setattr(command, "_place", lambda *_: place)
    monkeypatch.setattr(measures, "ALL", {"broken": broken, "good": good})
    target = tmp_path / "run.json"
    assert command.main(["--json", str(target)]) == 1
    assert [row.name for row in Run.read(target).rows] == ["store.10", "store.20"]
    assert Run.read(target).about["failed"] == ["broken"]
    assert "RuntimeError: no worker" in capsys.readouterr().out


@pytest.fixture
def place() -> Iterator[Place]:
    """A place with a private node, and no Redis."""
    try:
        rabbitmq.ensure_installed("system")
    except rabbitmq.NotAvailable as exc:
        pytest.skip(str(exc))
    with rabbitmq.Node(rabbitmq.distribution("system")) as node:
        place = Place(node, Servers(node.url(), "", ""), True, [], ["amqp"], ())
        yield place


def test_the_floor_of_chords_handles_every_message(place: Place) -> None:
    for kind in floor.KINDS:
        with contextlib.closing(floor.Bare(place, kind, "amqp, 16 shards")) as bare:
            for rate in (None, 200.0):
                figures = bare.measuring(3, rate)()
                assert sorted(figures) == ["broker", "per second"]
                assert bare.left() == 0


SIXTEEN = "amqp, 16 shards"


def test_results_that_are_kept_in_pages_at_once_are_found(place: Place) -> None:
    ids = [str(uuid.uuid4()) for _ in range(50)]
    with place.assistant(SIXTEEN, "bench-packed") as assistant:
        assistant.ask("keep_packed", ids=ids, size=10)
    with place.assistant(SIXTEEN, "bench-packed") as reader:
        assert reader.ask("look_up", ids=ids)["found"] == len(ids)


def test_a_waiting_process_gets_each_result_that_another_one_stores(place: Place) -> None:
    with contextlib.ExitStack() as stack:
        client, storer = (
            stack.enter_context(place.assistant(SIXTEEN, "bench-waiting")) for _ in range(2)
        )
        assert len(set(endurance.stored(client, storer, 50))) == 50
        (looked_up,) = endurance.pushed(client, 50)
        assert looked_up.name == "endurance.looked_up.50"


def has_copied(bare: poll_floor.Bare) -> bool:
    return bare.copies() == 8


def test_the_floor_of_polls_handles_every_message(place: Place) -> None:
    for kind, barriers in poll_floor.KINDS.items():
        floor_of_kind = poll_floor.Bare(place, kind, 2, "amqp, 16 shards")
        with contextlib.closing(floor_of_kind) as bare:
            figures = bare.measuring(4, 200.0)()
            assert sorted(figures) == (["broker", "p50", "p99"] if barriers else ["broker"])
            if barriers:
                # A copy may reach the inbox that passed no barrier a moment later.
                eventually(functools.partial(has_copied, bare))
