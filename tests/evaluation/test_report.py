"""The HTML report: self-contained, escaped, and saying what the run says."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from example_runs import YARN, make_loss_run, make_run, make_tasks_run, trials

from ropepatch.evaluation.compare import compare
from ropepatch.evaluation.overview import overview
from ropepatch.evaluation.report import write_comparison_report, write_overview_report

EVIL = "</script><script>alert('x')</script><img src=x onerror=alert(1)> & \"quotes\""


class Page(HTMLParser):
    """Elements, their attributes, and the text of cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self._cell: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self.tables[-1][-1].append("".join(self._cell))
            self._cell = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell is not None:
            self._cell.append(data)


def report_of(tmp_path: Path, rows: list[dict[str, Any]], **changes: Any) -> Page:
    return Page((make_run(tmp_path / "run", rows, finalize=True, **changes) / "report.html").read_text("utf-8"))


def test_nothing_is_fetched_from_anywhere(tmp_path: Path) -> None:
    page = report_of(tmp_path, trials(lambda *_: 1.0))
    sources = [
        value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")
    ]
    assert len(sources) == 1
    assert sources[0] is not None
    assert sources[0].startswith("data:image/png;base64,")
    assert base64.b64decode(sources[0].partition(",")[2]) == (tmp_path / "run" / "heatmap.png").read_bytes()
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.elements}
    html = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert not re.search(r"url\(|@import|https?://", html)


def test_tables_hold_the_summary(tmp_path: Path) -> None:
    page = report_of(tmp_path, trials(lambda length, *_: float(length <= 64)))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    by_length, cells = page.tables[0][1:], page.tables[1][1:]
    assert [row[:3] for row in by_length] == [["32", "6", "1.000"], ["64", "6", "1.000"], ["128", "6", "0.000"]]
    assert by_length[2][3] == f"0.000 – {summary['by_length'][2]['ci_high']:.3f}"
    assert len(cells) == len(summary["cells"]) == 9
    assert "64 tokens" in page.text


def test_failures_are_sampled_over_the_grid(tmp_path: Path) -> None:
    page = report_of(tmp_path, trials(lambda length, *_: float(length == 64), n=10))
    failures = page.tables[2][1:]
    assert len(failures) == 8
    assert {row[0] for row in failures} == {"32", "128"}
    assert all(row[4] == "99999" for row in failures)
    assert "8 of 60 wrong trials (of 90 in all)" in page.text


def test_a_perfect_run_says_so(tmp_path: Path) -> None:
    assert "every trial was right" in report_of(tmp_path, trials(lambda *_: 1.0)).text


def test_everything_shown_is_escaped(tmp_path: Path) -> None:
    patch = {**YARN, "options": {"factor": EVIL}}
    page = report_of(tmp_path, trials(lambda *_: 0.0, output=EVIL, answer=EVIL), model=EVIL, text=EVIL, patch=patch)
    tags = [tag for tag, _ in page.elements]
    assert (tags.count("script"), tags.count("img")) == (1, 1)
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert all(row[4] == EVIL for row in page.tables[2][1:])
    assert page.text.count(EVIL) > 10


def test_patch_and_configuration_are_shown(tmp_path: Path) -> None:
    page = report_of(tmp_path, trials(lambda *_: 1.0), patch=YARN, seed=1234)
    for words in ("yarn (factor 2)", "options.factor", "model.rotary_emb", "1234", "chat_template"):
        assert words in page.text
    assert "the model as it was loaded" in report_of(tmp_path / "b", trials(lambda *_: 1.0)).text


def test_a_long_output_is_cut(tmp_path: Path) -> None:
    page = report_of(tmp_path, trials(lambda *_: 0.0, output="y" * 5000))
    assert "y" * 300 in page.text
    assert "y" * 301 not in page.text


def test_the_comparison_page_holds_all_runs(tmp_path: Path) -> None:
    before = make_run(tmp_path / "before", trials(lambda length, *_: float(length <= 64)))
    after = make_run(tmp_path / "after", trials(lambda *_: 1.0), patch=YARN, model=EVIL)
    write_comparison_report(compare([before, after]), tmp_path / "page.html", title="A & B")
    page = Page((tmp_path / "page.html").read_text("utf-8"))
    assert [row[:2] for row in page.tables[0][1:]] == [["before", "unpatched"], ["after", "yarn (factor 2)"]]
    last = page.tables[1][-1]
    assert last[:4] == ["128", "after", "6", "1.000"]
    assert last[5:] == ["+1.000", "+0.448 – +1.000", "6", "6", "0", "0.0312", "0.0938"]
    assert "A & B" in page.text
    tags = [tag for tag, _ in page.elements]
    assert (tags.count("script"), tags.count("img"), tags.count("details")) == (1, 2, 3)
    assert json.loads(page.text.partition("run by run")[2].partition("Accuracy by")[0]) == {"model": ["tiny", EVIL]}
    assert_nothing_is_fetched(page)
    assert [row[0] for row in page.tables[2][1:]] == ["128"] * 6


def test_single_tasks_have_their_own_table(tmp_path: Path) -> None:
    runs = [make_tasks_run(tmp_path / name, lambda task, *_: 0.5 * (task == "vt")) for name in ("a", "b")]
    write_comparison_report(compare(runs), tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text("utf-8"))
    assert [len(table) - 1 for table in page.tables[:3]] == [2, 4, 12]
    assert page.tables[2][-1][:5] == ["fwe", "128", "b", "4", "0.000"]
    assert "Accuracy by length and task" in page.text
    assert page.tables[3][0] == ["task", "length", "trial", "score", "answer", "output"]
    assert "trials that are not wholly right" in page.text


def test_losses_have_pages_too(tmp_path: Path) -> None:
    losses = [[3.0, 2.0], [2.0, 1.5]]
    runs = [make_loss_run(tmp_path / name, losses, finalize=True) for name in ("a", "b")]
    write_comparison_report(compare(runs), tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text("utf-8"))
    assert page.tables[1][0][:6] == ["position", "run", "documents", "loss", "95 % interval", "perplexity"]
    assert page.tables[1][1][:4] == ["all", "a", "2", "2.1250"]
    assert page.tables[1][1][5] == "8.373"
    assert_nothing_is_fetched(page)
    assert_nothing_is_fetched(Page((runs[0] / "report.html").read_text("utf-8")))


def test_several_suites_are_one_table_and_then_one_by_one(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "keys", trials(lambda *_: 0.0, lengths=(64,))),
        make_run(tmp_path / "yarn", trials(lambda *_: 1.0, lengths=(64,)), patch=YARN),
        make_loss_run(tmp_path / "loss", [[3.0, 2.0], [2.0, 1.5]], finalize=True),
    ]
    write_overview_report(overview(runs), tmp_path / "page.html", title=EVIL)
    text = (tmp_path / "page.html").read_text("utf-8")
    page = Page(text)
    assert page.tables[0][0][:3] == ["setting", "passkey 64 (n=6)", "perplexity all (n=2)"]
    # Losses 2.5 and 1.75 of as many tokens: 2.125 -+ 12.706 * 0.375, by Student's t with one degree of freedom.
    assert [row[:3] for row in page.tables[0][1:]] == [
        ["unpatched (base)", "0.00 [0.00, 0.39]", "8.373 [0.07137, 982.2]"],
        ["yarn (factor 2)", "1.00 [0.61, 1.00]*", ""],
    ]
    assert page.tables[1][1:] == [["yarn (factor 2)", "+1.00 [+0.45, +1.00]*"]]
    for heading in ("passkey: Differences", "passkey: Failures", "perplexity: Loss by position"):
        assert heading in page.text
    assert f'data-value="{2.125!r}"' in text
    assert [tag for tag, _ in page.elements].count("img") == 3
    assert_nothing_is_fetched(page)


def test_a_run_of_several_tasks_says_which(tmp_path: Path) -> None:
    make_tasks_run(tmp_path / "run", lambda task, *_: float(task == "vt"), finalize=True)
    page = Page((tmp_path / "run" / "report.html").read_text("utf-8"))
    assert_nothing_is_fetched(page)
    assert "niah_single_1" in page.text


def test_numbers_carry_what_they_sort_by(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", trials(lambda *_: 1.0, lengths=(1024, 16384)), finalize=True)
    page = Page((run / "report.html").read_text("utf-8"))
    cells = [attributes.get("data-value") for tag, attributes in page.elements if tag == "td"]
    assert cells[:3] == ["1024", "6", "1.0"]


def assert_nothing_is_fetched(page: Page) -> None:
    for tag, attributes in page.elements:
        assert tag not in {"link", "iframe", "object", "embed", "base"}
        assert (attributes.get("src") or "data:image/png;base64,").startswith("data:image/png;base64,")
        assert "href" not in attributes


@pytest.mark.parametrize("lengths", [(32,), (32, 64)])
def test_sections_come_in_order(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    text = report_of(tmp_path, trials(lambda *_: 1.0, lengths=lengths)).text
    headings = ["Accuracy by prompt length", "Accuracy by length and depth", "Cells", "Failures", "Patch"]
    places = [text.index(heading) for heading in headings]
    assert places == sorted(places)
