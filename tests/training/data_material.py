"""Recipes, small tokenizers and texts for the tests of training data."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ropepatch.training.data.synthetic import words
from ropepatch.training.recipe import Recipe

_CORPUS = words("mixed")
_SPLIT = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPECIAL = ["<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>"]


def recipe(
    *sources: dict[str, Any], length: int = 32, steps: int = 8, batch: int = 4, seed: int = 0, **data: Any
) -> Recipe:
    """A recipe of these sources; `stages` as pairs of steps and length."""
    stages = data.pop("stages", None)
    train: dict[str, Any] = {"batch_size": batch, "seed": seed}
    if stages:
        train["stages"] = [{"steps": count, "length": tokens} for count, tokens in stages]
    else:
        train["max_steps"] = steps
    section = {"length": length, "sources": list(sources), **data}
    return Recipe.model_validate({"model": {"name": "demo:smollm2"}, "data": section, "train": train})


def files(path: Path | str, **more: Any) -> dict[str, Any]:
    """A source of files."""
    return {"kind": "files", "path": str(path), **more}


def synthetic(task: str = "mixed", **more: Any) -> dict[str, Any]:
    """A source of made-up tasks."""
    return {"kind": "synthetic", "task": task, **more}


def _bytes(kind: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    if kind == "fused":  # GPT-4's kind: a full stop takes newlines with it, up to three digits a token
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:  # GPT-2's kind, every digit a token
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=_SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bos = {}
    if kind == "bos":
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        bos = {"bos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", **bos)


def _metaspace() -> PreTrainedTokenizerFast:
    """Llama 2's kind: a mark for the space before a word, also before the first."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Replace(Regex(" +"), " ")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        [*_CORPUS, "\n"],
        trainers.UnigramTrainer(
            vocab_size=400,
            special_tokens=["<unk>", "</s>"],
            unk_token="<unk>",
            initial_alphabet=["\n"],
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def _words(texts: list[str]) -> PreTrainedTokenizerFast:
    """The kind of a tiny model: a word or digit or mark a token, white space lost."""
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    backend.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["<unk>", "</s>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="</s>")


_MAKERS = {
    "bytes": lambda: _bytes("bytes"),
    "bos": lambda: _bytes("bos"),
    "fused": lambda: _bytes("fused"),
    "metaspace": _metaspace,
    "words": lambda: _words(_CORPUS),
    "passkey_words": lambda: _words(words("passkey")),
}
TOKENIZERS = ("bytes", "bos", "fused", "metaspace", "words")


@functools.cache
def tokenizer(name: str = "bytes") -> PreTrainedTokenizerFast:
    """One of the tokenizers above, made once. Copy it before changing it."""
    return _MAKERS[name]()


def write_documents(folder: Path, count: int, *, most: int = 60) -> list[str]:
    """Documents of different lengths, each with its own number in every word: `count` .txt files."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [" ".join(f"{number}.{word}" for word in range(2 + number * 7 % most)) for number in range(count)]
    for number, text in enumerate(texts):
        (folder / f"{number:04}.txt").write_text(text, encoding="utf-8")
    return texts
