"""A recipe made small: its architecture with few and narrow layers, short windows, one row and one step a stage."""

from __future__ import annotations

from typing import Any

from ropepatch.training.recipe import Recipe

# Marked for the assistant's turns, so that a conversation can be tried out with it.
_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "<|end|>{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}\n{% endfor %}"
)


def shortened(recipe: Recipe, window: int, *, cache: str | None) -> Recipe:
    """A recipe for one process and one step of each stage; everything that needs an accelerator is left out.

    Args:
        recipe: the whole one.
        window: most tokens of a window; with shifted groups two groups at least.
        cache: a folder for tokenised files in place of the recipe's own; None leaves it.
    """
    train = recipe.train
    if train.shifted_groups is not None:
        group = train.shifted_groups.group
        window = max(window // group, 2) * group
    stages = train.stages and [
        stage.model_copy(update={"steps": 1, "length": min(stage.length, window)}) for stage in train.stages
    ]
    alone = {
        "max_steps": None if stages else 1,
        "stages": stages,
        "batch_size": 1,
        "micro_batch_size": 1,
        "precision": "float32",
        "optim": "adamw_torch",
        "offload_activations": False,
        "loss": train.loss if train.loss in ("chunked", "plain") else "auto",
        "early_stop": None,
        "context_parallel": 1,
        "sharding": "none",
        "processes": None,
        "report_to": [],
    }
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"dtype": "float32", "quantization": None}),
            "data": recipe.data.model_copy(
                update={"length": min(recipe.data.length, window), **({"cache": cache} if cache else {})}
            ),
            "train": train.model_copy(update=alone),
            "eval": recipe.eval.model_copy(update={"runs": []}),
        }
    )


def stand_in() -> Any:
    """A tokenizer of single bytes with a chat template, for a model whose own cannot be had."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = _TEMPLATE
    return tokenizer
