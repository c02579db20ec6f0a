"""The HTML pages in a real browser: nothing is fetched, nothing complains, headings sort, a narrow screen works."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, find_browser
from example_runs import YARN, make_loss_run, make_run, make_tasks_run, trials

from ropepatch.evaluation.compare import compare
from ropepatch.evaluation.overview import overview
from ropepatch.evaluation.report import write_comparison_report, write_overview_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="takes a Chromium: on the path, or named by CHROME_PATH"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(str(find_browser()), tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")

    lengths = (1024, 2048, 4096, 16384)
    grid = make_run(folder / "run", trials(lambda length, *_: float(length < 4096), lengths=lengths), finalize=True)
    runs = [grid]
    for k in range(6):
        rows = trials(lambda length, _, trial, k=k: float(length < 2048 * k + trial), lengths=lengths)
        runs.append(make_run(folder / f"run{k}", rows, patch=YARN))
    losses = [
        make_loss_run(folder / f"loss{k}", [[3.0, 2.0 + k, 1.5], [2.0, 1.5, 1.0 + k]], finalize=True) for k in range(2)
    ]
    tasks = [make_tasks_run(folder / f"tasks{k}", lambda task, *_, k=k: k / 2, finalize=True) for k in range(2)]
    found = {"run": grid / "report.html", "loss": losses[0] / "report.html", "tasks": tasks[0] / "report.html"}
    for name, several in (("compare", runs), ("compare-loss", losses), ("compare-tasks", tasks)):
        found[name] = folder / f"{name}.html"
        write_comparison_report(compare(several), found[name])
    found["overview"] = folder / "overview.html"
    write_overview_report(overview([*runs, *losses, *tasks]), found["overview"])
    return found


TEXT_WIDTH = """
(() => { const range = document.createRange(); range.selectNodeContents(document.querySelector("h1"));
         return range.getBoundingClientRect().width; })()
"""
PAGES = ("run", "loss", "tasks", "compare", "compare-loss", "compare-tasks", "overview")


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_loads_without_errors_or_requests(
    browser: Browser, pages: dict[str, Path], name: str, width: int, tmp_path: Path
) -> None:
    browser.open(pages[name], width=width)
    assert browser.run(TEXT_WIDTH) > 50, "the browser finds no fonts: without text no width means anything"
    assert browser.errors() == []
    assert browser.requests() == [pages[name].resolve().as_uri()]
    # Wide tables and figures scroll in their own boxes, never the page.
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("Array.from(document.images).every(i => i.complete && i.naturalWidth > 0)")
    browser.picture(tmp_path / f"{name}-{width}.png")
    assert (tmp_path / f"{name}-{width}.png").stat().st_size > 5000


def column(browser: Browser, table: int, number: int) -> list[str]:
    rows = f"document.querySelectorAll('table')[{table}].tBodies[0].rows"
    return browser.run(f"Array.from({rows}).map(r => r.cells[{number}].textContent)")


def test_a_click_sorts_numbers_as_numbers_both_ways(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"])
    assert column(browser, 0, 0) == ["1,024", "2,048", "4,096", "16,384"]
    browser.click("table th:nth-child(1)")
    assert column(browser, 0, 0) == ["1,024", "2,048", "4,096", "16,384"]
    browser.click("table th:nth-child(1)")
    assert column(browser, 0, 0) == ["16,384", "4,096", "2,048", "1,024"]
    assert browser.run("document.querySelector('th').getAttribute('aria-sort')") == "descending"
    # Log-probabilities are below 0; a sort of their letters would turn them round.
    last = len(browser.run("Array.from(document.querySelector('tr').cells).map(c => c.textContent)"))
    browser.click(f"table th:nth-child({last})")
    found = [float(value) for value in column(browser, 0, last - 1)]
    assert found == sorted(found)
    assert browser.run("document.querySelectorAll('table:first-of-type th[aria-sort]').length") == 1
    assert browser.errors() == []


def test_empty_cells_stay_last(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["compare"])
    table = "document.querySelectorAll('table')[1]"
    headings = browser.run(f"Array.from({table}.querySelectorAll('th')).map(c => c.textContent)")
    number = headings.index("difference")
    for sign in (1, -1):
        browser.run(f"{table}.querySelectorAll('th')[{number}].click()")
        found = column(browser, 1, number)
        filled = [float(value) for value in found if value]
        assert filled == sorted(filled, key=lambda value, sign=sign: sign * value)
        assert found == [value for value in found if value] + [""] * 4


def test_the_keyboard_sorts_too(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"])
    browser.run("document.querySelector('th').focus()")
    for _ in range(2):
        for kind in ("keyDown", "keyUp"):
            browser.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13)
    assert column(browser, 0, 0)[0] == "16,384"
