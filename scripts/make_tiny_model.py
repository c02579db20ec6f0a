"""The config and the tokenizer of the tiny model that recipes/tiny trains and extends.

    python scripts/make_tiny_model.py DIR                  # config.json and the tokenizer
    python scripts/make_tiny_model.py DIR --weights RUN    # also the weights that a run of tiny/base ended with

recipes/tiny/model was made with it; tests/recipes/test_tiny_recipe.py fails when the two disagree.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from ropepatch.training.data.synthetic import words

LENGTH = 128
"""Of its longest training window, in tokens."""

THETA = 100.0
"""Slowest plane: 1.7 rad over the trained length, 6.8 rad over four times as many tokens. With the usual 10,000 the
slower planes hardly turn, and the model finds keys well beyond its length untuned."""

INITIALIZER_RANGE = 0.1
"""Near 1 / sqrt(hidden_size), as the rows of a small model need it: with the usual 0.02 it learns no keys."""

PAD, UNKNOWN, END = "[PAD]", "[UNK]", "[END]"


def config(vocabulary: int) -> Any:
    """A LLaMA of two layers; `vocabulary` is its number of tokens."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        architectures=["LlamaForCausalLM"],
    )


def tokenizer() -> Any:
    """A WordPiece tokenizer of the passkey task's words.

    A number of five digits is three tokens, "12", "##34" and "##5", and the space before it is one too, as in many
    large tokenizers. So the first, middle and last token of a number are told apart by what they are, and where a
    number begins is seen before it does: a small model need not learn to count.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Split(Regex(r" (?=\d)|\w+|[^\w\s]"), behavior="removed", invert=True)
    found = [word for text in words("passkey") for word, _ in split.pre_tokenize_str(text)]
    known = dict.fromkeys(word for word in found if not word.isdigit())
    numbers = [*map(str, range(100)), *(f"##{n}" for n in range(10)), *(f"##{n:02d}" for n in range(100))]
    vocabulary = [PAD, UNKNOWN, END, *known, *numbers]
    backend = Tokenizer(models.WordPiece({token: n for n, token in enumerate(vocabulary)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = split
    backend.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=UNKNOWN, pad_token=PAD, eos_token=END, model_max_length=LENGTH
    )


def write(folder: Path, weights: Path | None = None) -> None:
    """Write the files; `weights` is the folder of a finished run of tiny/base."""
    made = tokenizer()
    config(len(made)).save_pretrained(folder)
    made.save_pretrained(folder)
    if weights is not None:
        shutil.copyfile(weights / "model" / "model.safetensors", folder / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", type=Path, metavar="RUN", help="the folder of a finished run of tiny/base")
    arguments = parser.parse_args()
    write(arguments.folder, arguments.weights)


if __name__ == "__main__":
    main()
