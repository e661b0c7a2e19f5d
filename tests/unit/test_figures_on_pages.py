"""Figures on the pages are those of the recorded runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench import pages
from bench.drawn import stamp
from bench.figures import Row, Run

#: A measured figure: a number with a unit of time, rate or memory, or a ratio.
FIGURE = re.compile(r"\d[\d.,]* ?(?:µs|ms\b|s\b|/s|bytes|[KM]i?B|times|% of)")


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: str(page.name))
def test_the_figures_on_the_page_are_the_recorded_ones(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert pages.updated(text) == text, "run: python -m bench.pages"


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: str(page.name))
def test_no_measured_figure_is_outside_a_recorded_table(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    tables = [match.span() for match in pages.BLOCK.finditer(text)]
    for match in FIGURE.finditer(re.sub(r"^```.*?^```", blanked, text, flags=re.M | re.S)):
        recorded = any(start <= match.start() < end for start, end in tables)
        assert recorded or match[0] in pages.NOT_MEASURED, text[match.start() - 60 : match.end()]


def blanked(match: re.Match[str]) -> str:
    return " " * len(match[0])


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: str(page.name))
def test_the_plots_of_the_page_show_the_recorded_figures(page: Path) -> None:
    for name, run in pages.plots(page.read_text(encoding="utf-8")):
        drawn = (pages.ROOT / "docs" / "plots" / f"bench-{name}.svg").read_text(encoding="utf-8")
        assert stamp(run, name) in drawn, "run: python -m bench.pages"


def test_every_table_carries_a_date() -> None:
    for page in pages.PAGES:
        for match in pages.BLOCK.finditer(page.read_text(encoding="utf-8")):
            if match["body"]:
                assert re.search(r"^RabbitMQ [\d.]+, \d{4}-\d\d-\d\d.*:$", match["body"], re.M)


PAGE = """
<!-- figures: new | old
columns: this = amqp | Redis = redis | `rpc://` = rpc | other = other
row: stored = store
row: chord of 10 = chord.10
row: never measured = join.10
word: rpc chord.10 = refused
plot: store = Stored
plot: join = Joins
text: Text in front.
-->
| an old table |
<!-- end -->
"""


def test_a_table_is_written_from_the_run_that_its_comment_names(tmp_path: Path) -> None:
    # Given a recorded run, with one row from a busy machine on another day
    part = {"date": "2026-11-29", "rows": ["chord.10"]}
    run = Run(
        {"date": "2026-11-28", "rabbitmq": "4.3.6", "parts": [part]},
        [
            Row("store", "stored", "/s", "more", {"amqp": [1000.0, 3000.0, 2000.0]}),
            Row("chord", "chord", "ms", "less", {"amqp": [2500.0], "redis": [9.0]}, 10, busy=True),
        ],
    )
    (tmp_path / "new.json").write_text(run.to_json())

    # When the page is updated, then it has the medians, and nothing for what was not measured
    body = pages.updated(PAGE, tmp_path).partition("-->\n")[2]
    assert body.strip().splitlines() == [
        "Text in front.",
        "",
        "RabbitMQ 4.3.6, 2026-11-28 and 2026-11-29, while the machine had other work too:",
        "",
        "| | this | Redis | `rpc://` |",
        "|---|---|---|---|",
        "| stored | 2,000/s | | |",
        "| chord of 10 | 2.5 s | 9 ms | refused |",
        "",
        "![Stored](plots/bench-store.svg)",
        "",
        "<!-- end -->",
    ]


def test_a_table_without_figures_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "new.json").write_text(Run({}, []).to_json())
    assert pages.updated(PAGE, tmp_path).endswith("-->\n<!-- end -->\n")


def test_an_older_run_fills_a_table_that_the_newer_one_has_no_rows_for(tmp_path: Path) -> None:
    about = {"date": "2026-11-23", "rabbitmq": "3.10.8"}
    old = Run(about, [Row("store", "stored", "/s", "more", {"amqp": [7.0]})])
    (tmp_path / "new.json").write_text(Run({}, []).to_json())
    (tmp_path / "old.json").write_text(old.to_json())
    assert "RabbitMQ 3.10.8, 2026-11-23:" in pages.updated(PAGE, tmp_path)


def test_a_line_of_a_comment_that_is_not_known_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="colums"):
        pages.updated("<!-- figures: run\ncolums: a = b\n-->\n<!-- end -->\n", tmp_path)
