"""Settings for the whole suite: offline, headless, one thread a worker, and property tests without deadlines."""

from __future__ import annotations

import os
import re
from collections.abc import Generator
from importlib import metadata
from pathlib import Path

# Before any test module imports a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
from hypothesis import HealthCheck, settings

from ropepatch.errors import UnknownNameError

PINS = Path(__file__).parent.parent.joinpath("constraints.txt").read_text(encoding="utf-8")
PINNED_TRANSFORMERS = re.findall(r"^transformers==(.+)$", PINS, flags=re.MULTILINE)[0]

# Shared machines stall: a deadline would measure the machine, not the code.
settings.register_profile("ropepatch", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ropepatch")


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as users have them: a random two-layer Llama (trained length 256) with a real byte-level BPE.

    Digits are tokens of their own, as in current models. Do not write to it: copy it.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "model"
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "The grass is green. The sky is blue. The pass key is hidden. Remember it. What is the pass key?"
    backend.train_from_iterator([text] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """On an older transformers, skip a test whose model type is younger. On the pinned one nothing is skipped."""
    try:
        return (yield)
    except UnknownNameError as error:
        older = metadata.version("transformers") != PINNED_TRANSFORMERS
        if older and error.message.startswith("unknown model type"):
            pytest.skip(f"{error.message}: younger than this transformers")
        raise
