"""What a perplexity run says: a table for the terminal, sections for the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ropepatch.evaluation import _html as html

if TYPE_CHECKING:
    from rich.table import Table

Summary = Mapping[str, Any]


def form_words(summary: Summary) -> str:
    """How the number was measured: "sliding, window 4,096, stride 512", "single pass"."""
    words = "single pass"
    if summary["form"] == "sliding":
        words = f"sliding, window {summary['window']:,}, stride {summary['stride']:,}"
    if summary["max_tokens"] is not None:
        words += f", first {summary['max_tokens']:,} tokens"
    if summary["bos"] == "true":
        return f"{words}, BOS in front of every window"
    return f"{words}, {'BOS in front' if summary['bos_token'] else 'no BOS'}"


def table(summary: Summary) -> Table:
    """Perplexity at each context length, and over all."""
    from rich.table import Table
    from rich.text import Text

    caption = (
        f"{form_words(summary)}; {summary['bits_per_byte']:.4f} bits per byte, "
        f"{summary['accuracy']:.1%} of tokens predicted exactly"
    )
    made = Table(title=Text(f"{summary['task']}: {summary['title']}"), caption=Text(caption))
    for heading in ("context", "documents", "tokens", "perplexity", "95 % interval"):
        made.add_column(heading, justify="right")
    entries = summary["by_length"] if summary["form"] == "single_pass" else []
    for entry in entries:
        made.add_row(f"{entry['length']:,}", f"{entry['n']:,}", f"{entry['tokens']:,}", *_number_and_interval(entry))
    whole = "whole" if summary["form"] == "single_pass" else f"{summary['window']:,}"
    made.add_row(whole, f"{summary['trials']:,}", f"{summary['tokens_scored']:,}", *_number_and_interval(summary))
    return made


def sections(summary: Summary, figures: Mapping[str, bytes]) -> list[str]:
    """The results of `report.html`."""
    parts = [
        html.section("Perplexity", html.definitions(_headlines(summary)), html.note(_reading(summary))),
        html.section(
            "Loss by position",
            html.image(figures["loss_by_position.png"], "loss against position"),
            _position_table(summary),
        ),
        html.section(
            "Documents",
            html.image(figures["heatmap.png"], "loss of each document by position"),
            _document_table(summary),
        ),
    ]
    if summary["form"] == "single_pass":
        parts.insert(1, html.section("Perplexity by context", _context_table(summary)))
    if "long_short" in summary:
        parts.append(html.section("What the far context gains", *_long_short(summary["long_short"])))
    return parts


_CONTEXT_WORDS = {"intact": "its own far text", "shuffled": "far text, sentences shuffled", "none": "nothing"}
_GAIN_WORDS = {"far_text": "far text at all (nothing minus intact)", "order": "its order (shuffled minus intact)"}


def far_table(summary: Summary) -> Table:
    """Loss and perplexity of the documents' ends for each context, and the gains."""
    from rich.table import Table
    from rich.text import Text

    caption = f"{summary['tokens_scored']:,} tokens at the ends of {summary['trials']:,} documents"
    made = Table(title=Text(f"{summary['task']}: {summary['title']}"), caption=Text(caption))
    made.add_column("before the end")
    for heading in ("loss, nats", "95 % interval", "perplexity"):
        made.add_column(heading, justify="right")
    for line in _far_lines(summary):
        made.add_row(*line)
    return made


def far_sections(summary: Summary, figures: Mapping[str, bytes]) -> list[str]:
    """The results of `report.html` of a `far_context` run."""
    headings = ["before the end", "loss (nats per token)", "95 % interval", "perplexity"]
    documents = [
        [entry["name"], html.Number(f"{entry['length']:,}", entry["length"])]
        + [html.Number(f"{entry[name]:.4f}", entry[name]) for name in _CONTEXT_WORDS]
        for entry in summary["documents"]
    ]
    return [
        html.section(
            "What far text gains",
            html.table(headings, _far_lines(summary)),
            html.note(
                "The same tokens in every line. Gains are differences of losses, paired by document; an order gain "
                "about 0 says that the model makes no use of what the far text says, only of its words, if at all."
            ),
        ),
        html.section(
            "Documents",
            html.image(figures["heatmap.png"], "loss of each document's end by what stands before it"),
            html.table(["document", "tokens", *_CONTEXT_WORDS.values()], documents),
        ),
    ]


def _far_lines(summary: Summary) -> list[list[str]]:
    lines = [
        [_CONTEXT_WORDS[entry["context"]], *_loss_and_interval(entry), _perplexity(entry["perplexity"])]
        for entry in summary["contexts"]
    ]
    return lines + [
        [f"gain of {words}", *_loss_and_interval(summary["gains"][name]), ""] for name, words in _GAIN_WORDS.items()
    ]


def _loss_and_interval(entry: Mapping[str, Any]) -> tuple[str, str]:
    interval = "" if entry["ci_low"] is None else f"{entry['ci_low']:.4f} – {entry['ci_high']:.4f}"
    return f"{entry['loss']:.4f}", interval


def _headlines(summary: Summary) -> dict[str, str]:
    number, interval = _number_and_interval(summary)
    return {
        "perplexity": number,
        "interval": f"{interval} ({summary['interval']})" if interval else str(summary["interval"]),
        "bits per byte": f"{summary['bits_per_byte']:.4f}",
        "loss": f"{summary['loss']:.4f} nats per token",
        "tokens scored": f"{summary['tokens_scored']:,} in {summary['trials']:,} documents",
        "predicted exactly": f"{summary['accuracy']:.1%}",
        "form": form_words(summary),
    }


def _reading(summary: Summary) -> str:
    if summary["form"] == "sliding":
        return (
            "Every token but a document's first is scored once; from the second window on it has at least "
            f"{summary['window'] - summary['stride']:,} tokens of context. Compare only with numbers of the same text, "
            "tokenizer, window and stride; bits per byte also across tokenizers."
        )
    return (
        "Each document is read once, every token given all before it. A context's perplexity is that of the first so "
        "many tokens of every document that is as long; the documents differ from one context to the next."
    )


def _position_table(summary: Summary) -> str:
    headings = ["position", "documents", "tokens", "loss", "perplexity", "95 % interval"]
    rows = [
        [
            html.Number(f"{entry['start']:,} – {entry['end'] - 1:,}", entry["start"]),
            html.Number(f"{entry['n']:,}", entry["n"]),
            html.Number(f"{entry['tokens']:,}", entry["tokens"]),
            html.Number(f"{entry['loss']:.4f}", entry["loss"]),
            *_cells(entry),
        ]
        for entry in summary["by_position"]
    ]
    note = "Position: how many tokens the model had read before the one that it predicts."
    return html.note(note) + html.table(headings, rows)


def _context_table(summary: Summary) -> str:
    rows = [
        [
            html.Number(f"{entry['length']:,}", entry["length"]),
            html.Number(f"{entry['n']:,}", entry["n"]),
            html.Number(f"{entry['tokens']:,}", entry["tokens"]),
            *_cells(entry),
        ]
        for entry in summary["by_length"]
    ]
    return html.table(["context", "documents", "tokens", "perplexity", "95 % interval"], rows)


def _document_table(summary: Summary) -> str:
    rows = [
        [
            entry["name"],
            html.Number(f"{entry['tokens']:,}", entry["tokens"]),
            html.Number(_perplexity(entry["perplexity"]), entry["loss"]),
            html.Number(f"{entry['bits_per_byte']:.4f}", entry["bits_per_byte"]),
        ]
        for entry in summary["documents"]
    ]
    return html.table(["document", "tokens", "perplexity", "bits per byte"], rows)


def _long_short(found: Mapping[str, Any]) -> list[str]:
    if not found["tokens"]:
        return [html.note(f"No token has clearly more context than {found['short_context']:,} tokens.")]
    values = {
        "short context": f"{found['short_context']:,} tokens (to a quarter more)",
        "tokens compared": f"{found['tokens']:,}",
        "mean gain": f"{found['mean_gain']:.4f} nats per token",
        "key tokens": f"{found['key_tokens']:,}",
        "perplexity of key tokens": "none" if found["key_perplexity"] is None else f"{found['key_perplexity']:.3f}",
    }
    return [
        html.definitions(values),
        html.note(
            "Gain: the loss with the short context minus the loss with the full one. Key tokens (LongPPL, arXiv "
            "2410.23771) gain more than 2 nats and have a loss below 2; they are chosen by the model itself."
        ),
    ]


def _number_and_interval(entry: Mapping[str, Any]) -> tuple[str, str]:
    if entry["ci_low"] is None:
        return _perplexity(entry["perplexity"]), ""
    return _perplexity(entry["perplexity"]), f"{entry['ci_low']:.3f} – {_perplexity(entry['ci_high'])}"


def _cells(entry: Mapping[str, Any]) -> list[str]:
    number, interval = _number_and_interval(entry)
    return [html.Number(number, entry["loss"]), html.Number(interval, entry["ci_low"] or 0.0)]


def _perplexity(value: float | None) -> str:
    if value is None:
        return "beyond 1e304"
    return f"{value:,.3f}" if value < 1e6 else f"{value:.3g}"
