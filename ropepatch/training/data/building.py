"""`build`: from a recipe's data section to rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ropepatch.demo_model import cache_root
from ropepatch.errors import OptionError
from ropepatch.evaluation.texts import DATASETS
from ropepatch.training.data import files, hub
from ropepatch.training.data.chat import ChatEncoder, write_chats
from ropepatch.training.data.mixture import allot
from ropepatch.training.data.packing import CutWindows, choose
from ropepatch.training.data.plan import Plan, plan_rows, share
from ropepatch.training.data.store import Store, Writer, open_store
from ropepatch.training.data.streaming import StreamedWindows
from ropepatch.training.data.synthetic import SyntheticWindows
from ropepatch.training.data.synthetic.gluing import Gluer
from ropepatch.training.data.synthetic.hay import Filler, Hay, Text
from ropepatch.training.data.tokenising import progress, tokenizer_hash, write_texts
from ropepatch.training.data.whole import WholeWindows
from ropepatch.training.data.window import Numbers, Source, to_row
from ropepatch.training.recipe import ChatSource, DataSection, HubSource, Recipe, SyntheticSource, TextSource


class Rows(Dataset[dict[str, Any]]):
    """The rows of a whole run, in order: row i belongs to optimizer step i // batch_size.

    Each is `input_ids`, `labels` (not shifted, -100 where the loss does not count), `documents` (1, 2, ... by packed
    document where documents are isolated, else 1; 0 for padding), all lists of a stage's length, and `index`. A row
    depends on the recipe and its index alone.
    """

    def __init__(self, plan: Plan, sources: list[Source], allotted: tuple[Numbers, Numbers], pad: int) -> None:
        self.plan, self.sources, self.pad = plan, sources, pad
        self._source, self._number = allotted

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        window = self.sources[self._source[index]].window(int(self._number[index]))
        return to_row(window, index, self.plan.place(index).length, self.pad)


def build(recipe: Recipe, tokenizer: Any) -> Rows:
    """The rows that a recipe trains on, tokenised (or found in the cache) before this returns.

    Args:
        recipe: one that `ropepatch.training.checks` passes; `data` and of `train` steps, stages, batch size and seed
            are read.
        tokenizer: the model's own.

    Raises:
        OptionError: the recipe does not say how many rows, or combines what cannot be.
        PromptError: a source that is missing, empty, no text, without the column or split named, or too short.
        DependencyError: a package that a source needs is not installed.
        OutputError: the cache folder cannot be written.
    """
    plan = plan_rows(recipe)
    allotted = allot([source.weight for source in recipe.data.sources], len(plan))
    sources = [
        _source(recipe, number, tokenizer, share(plan, allotted[0] == number))
        for number in range(len(recipe.data.sources))
    ]
    return Rows(plan, sources, allotted, _pad(tokenizer))


def _source(recipe: Recipe, number: int, tokenizer: Any, plan: Plan) -> Source:
    data, source = recipe.data, recipe.data.sources[number]
    what = (recipe.train.seed, number)
    match source:
        case TextSource():
            store, where = _text_store(source.path, source.column, tokenizer, data), source.path
        case HubSource() if source.streaming:
            if data.long_tokens is not None:
                raise OptionError(
                    "data.long_tokens cannot be used with a stream", hint="set streaming: false, or leave it out"
                )
            return StreamedWindows(
                source,
                tokenizer,
                plan,
                what=what,
                least=data.min_tokens,
                isolate=data.isolate_documents,
                keep=recipe.train.batch_size,
            )
        case HubSource():
            store, where = _hub_store(source, tokenizer, data), f"the data set {source.name}"
        case SyntheticSource():
            hay = _hay(source, tokenizer, data)
            return SyntheticWindows(source.task, hay, tokenizer, plan, what=what, answer_only=source.answer_only)
        case ChatSource():
            store = _chat_store(source, tokenizer, data)
            chosen = choose(store, source.path, least=data.min_tokens, long=data.long_tokens, times=data.long_times)
            return WholeWindows(
                store,
                chosen,
                plan,
                what=what,
                where=source.path,
                packed=source.packed,
                isolate=data.isolate_documents,
            )
    chosen = choose(store, where, least=data.min_tokens, long=data.long_tokens, times=data.long_times)
    return CutWindows(store, chosen, plan, what=what, where=where, isolate=data.isolate_documents)


def _hay(source: SyntheticSource, tokenizer: Any, data: DataSection) -> Hay:
    if source.haystack == "filler":
        return Filler(Gluer(tokenizer))
    return Text(_text_store(source.haystack, "text", tokenizer, data), tokenizer, source.haystack)


def _text_store(path: str, column: str, tokenizer: Any, data: DataSection) -> Store:
    if path == "stdlib":
        topics = files.stdlib_texts()
        texts, content, total = iter(topics), files.digest_of(topics), sum(map(len, topics))
    else:
        found = files.find_files(path)
        texts, content, total = found.texts(column), found.digest(), found.size

    def make(folder: Path) -> None:
        with Writer(folder, len(tokenizer), marked=False) as writer, progress(path, total) as advance:
            write_texts(texts, tokenizer, writer, path, advance)
        writer.finish({"source": path})

    settings = {"kind": "text", "content": content, "column": column, "tokenizer": tokenizer_hash(tokenizer)}
    return open_store(_cache(data), settings, make)


def _hub_store(source: HubSource, tokenizer: Any, data: DataSection) -> Store:
    loaded = hub.load(source)

    def make(folder: Path) -> None:
        with Writer(folder, len(tokenizer), marked=False) as writer, progress(source.name, None) as advance:
            write_texts(hub.texts(loaded, source), tokenizer, writer, f"the data set {source.name}", advance)
        writer.finish({"source": source.name})

    # datasets keeps a hash of what a data set holds and of what was done to it.
    settings = {"kind": "dataset", "content": loaded._fingerprint, "tokenizer": tokenizer_hash(tokenizer)}
    return open_store(_cache(data), settings, make)


def _chat_store(source: ChatSource, tokenizer: Any, data: DataSection) -> Store:
    encoder = ChatEncoder(tokenizer, assistant_only=source.assistant_only)
    if source.path.startswith(DATASETS):
        named = hub.named(source.path, source.column)
        loaded = hub.load(named)
        rows, content, total = hub.values(loaded, named), loaded._fingerprint, len(loaded)
    else:
        found = files.find_files(source.path)
        rows, content, total = found.values(source.column), found.digest(), None

    def make(folder: Path) -> None:
        with Writer(folder, len(tokenizer), marked=True) as writer, progress(source.path, total) as advance:
            write_chats(rows, encoder, writer, source.path, advance)
        writer.finish({"source": source.path})

    settings = {
        "kind": "chat",
        "content": content,
        "column": source.column,
        "assistant_only": source.assistant_only,
        "tokenizer": tokenizer_hash(tokenizer),
    }
    return open_store(_cache(data), settings, make)


def _cache(data: DataSection) -> Path:
    return Path(data.cache).expanduser() if data.cache else cache_root() / "tokens"


def _pad(tokenizer: Any) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
