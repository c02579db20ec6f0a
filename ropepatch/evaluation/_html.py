"""The page that reports share: one HTML file, no request to anywhere, everything shown is escaped."""

from __future__ import annotations

import base64
import html
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0; --band: #f6f8fa; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: #fff; margin: 2rem auto; max-width: 76rem;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; overflow-wrap: anywhere; }
p.lead { color: var(--soft); margin: .2rem 0 1rem; overflow-wrap: anywhere; }
p.note { color: var(--soft); font-size: .9rem; max-width: 48rem; overflow-wrap: anywhere; }
figure { margin: 1rem 0; overflow-x: auto; } img { max-width: 100%; height: auto; display: block; }
div.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: .3rem .5rem; text-align: left; vertical-align: top; }
th { background: var(--band); } td.n, th.n { text-align: right; white-space: nowrap; }
table.sortable th { cursor: pointer; user-select: none; }
table.sortable th::after { content: "\\2195"; color: #8c959f; padding-left: .35em; font-weight: normal; }
table.sortable th[aria-sort=ascending]::after { content: "\\2191"; color: var(--ink); }
table.sortable th[aria-sort=descending]::after { content: "\\2193"; color: var(--ink); }
td code { white-space: pre-wrap; overflow-wrap: anywhere; display: block; min-width: 8rem; max-width: 32rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
details { margin: .4rem 0; } summary { cursor: pointer; overflow-wrap: anywhere; }
pre { background: var(--band); padding: .8rem; overflow-x: auto; font-size: .85rem; }
@media (max-width: 40rem) { body { margin: 1rem auto; } dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin: 0 0 .4rem 1rem; } }
@media print { body { margin: 0; max-width: none; } details { display: none; } }
"""

_SORT = """
document.querySelectorAll("table.sortable th").forEach(function (head) {
  function sort() {
    var body = head.closest("table").tBodies[0], column = head.cellIndex;
    var sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    head.parentNode.querySelectorAll("th").forEach(function (other) { other.removeAttribute("aria-sort"); });
    head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
    Array.from(body.rows).map(function (row) {
      var cell = row.cells[column], number = cell.dataset.value;
      return { row: row, text: cell.textContent, number: number === undefined ? NaN : Number(number) };
    }).sort(function (a, b) {
      // Empty cells stay at the end in both directions, and numbers come before words.
      if (!a.text || !b.text) { return (a.text ? 0 : 1) - (b.text ? 0 : 1); }
      if (isNaN(a.number) || isNaN(b.number)) {
        return isNaN(a.number) && isNaN(b.number) ? sign * a.text.localeCompare(b.text, undefined, { numeric: true })
          : (isNaN(a.number) ? 1 : 0) - (isNaN(b.number) ? 1 : 0);
      }
      return sign * (a.number - b.number);
    }).forEach(function (entry) { body.appendChild(entry.row); });
  }
  head.tabIndex = 0;
  head.addEventListener("click", sort);
  head.addEventListener("keydown", function (event) { if (event.key === "Enter") { sort(); } });
});
"""

_DOTS_PER_PIXEL = 1.5
_LEGIBLE = 640
"""A figure is shown no narrower than so many pixels: it scrolls sideways instead."""


class Number(str):
    """A table cell's text that is sorted by its `value`."""

    value: float

    def __new__(cls, text: str, value: float) -> Number:
        cell = super().__new__(cls, text)
        cell.value = value
        return cell


class Code(str):
    """A table cell's text that is shown letter by letter."""


def page(title: str, lead: str, sections: Iterable[str]) -> str:
    """A whole document from sections of ready HTML; `title` and `lead` are plain text."""
    body = "\n".join(sections)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{html.escape(title)}</h1>\n<p class="lead">{html.escape(lead)}</p>\n{body}\n'
        f"<script>{_SORT}</script>\n</body>\n</html>\n"
    )


def section(heading: str, *parts: str) -> str:
    """A heading and ready HTML below it."""
    return f"<h2>{html.escape(heading)}</h2>\n" + "\n".join(parts)


def subheading(text: str) -> str:
    """A heading inside a section."""
    return f"<h3>{html.escape(text)}</h3>"


def note(text: str) -> str:
    """A small paragraph."""
    return f'<p class="note">{html.escape(text)}</p>'


def image(png: bytes, description: str) -> str:
    """A PNG inside the page."""
    data = base64.b64encode(png).decode("ascii")
    # The header says the size, so that the page does not jump while it is read.
    width, height = (round(dots / _DOTS_PER_PIXEL) for dots in struct.unpack(">II", png[16:24]))
    size = f'width="{width}" height="{height}" style="min-width: {min(width, _LEGIBLE)}px"'
    return f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(description)}" {size}></figure>'


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose columns sort at a click on their heading."""
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "\n".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    content = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    return f'<div class="scroll"><table class="sortable">{content}</table></div>'


def definitions(values: Mapping[str, Any]) -> str:
    """Names and values; a nested mapping is written with dots ("patch.options.factor")."""
    entries = "\n".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in _flat(values))
    return f"<dl>\n{entries}\n</dl>"


def raw(caption: str, value: Any) -> str:
    """JSON that opens at a click."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return fold(caption, f"<pre>{html.escape(text)}</pre>")


def fold(caption: str, *parts: str) -> str:
    """Ready HTML that opens at a click."""
    content = "\n".join(parts)
    return f"<details><summary>{html.escape(caption)}</summary>{content}</details>"


def _cell(text: str) -> str:
    if isinstance(text, Number):
        return f'<td class="n" data-value="{text.value!r}">{html.escape(text)}</td>'
    if isinstance(text, Code):
        return f"<td><code>{html.escape(text)}</code></td>"
    return f"<td>{html.escape(text)}</td>"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    entries: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            entries += _flat(value, f"{name}.")
        else:
            entries.append((name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return entries
