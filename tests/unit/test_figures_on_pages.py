"""Figures on the pages are those of the recorded runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench import pages
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
    tables = [match.span("body") for match in pages.TABLE.finditer(text)]
    for match in FIGURE.finditer(re.sub(r"^```.*?^```", blanked, text, flags=re.M | re.S)):
        recorded = any(start <= match.start() < end for start, end in tables)
        assert recorded or match[0] in pages.NOT_MEASURED, text[match.start() - 60 : match.end()]


def blanked(match: re.Match[str]) -> str:
    return " " * len(match[0])


def test_a_table_is_filled_from_the_run_that_its_comment_names(tmp_path: Path) -> None:
    # Given a recorded run, and a page with old figures and a word
    run = Run(
        {"date": "2026-11-28"},
        [
            Row("store", "stored", "/s", "more", {"amqp": [1000.0, 3000.0, 2000.0]}),
            Row("chord", "chord", "ms", "less", {"amqp": [2500.0], "redis": [9.0]}, size=10),
        ],
    )
    (tmp_path / "run.json").write_text(run.to_json())
    page = (
        "<!-- figures: run\ncolumns: amqp | redis\nrows: store | chord.10\n-->\n"
        "| | this | Redis |\n|---|---|---|\n| stored | 7/s | refused |\n| chord of 10 | | 7 ms |\n"
    )

    # When it is updated, then the medians stand in the cells, and the word stays
    assert pages.updated(page, tmp_path).splitlines()[-2:] == [
        "| stored | 2,000/s | refused |",
        "| chord of 10 | 2.5 s | 9 ms |",
    ]


def test_a_row_that_was_not_recorded_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(Run({}, []).to_json())
    page = "<!-- figures: run\ncolumns: amqp\nrows: store\n-->\n| | this |\n|---|---|\n| a | |\n"
    with pytest.raises(ValueError, match="'store'"):
        pages.updated(page, tmp_path)
