"""Small real tokenizers and small random models for the evaluation's tests."""

from __future__ import annotations

import functools
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ropepatch.evaluation.haystack import FILLER
from ropepatch.evaluation.tasks.passkey import INSTRUCTION, QUESTION, REPLY

_CORPUS = [
    f"{INSTRUCTION}\n{FILLER} {FILLER}\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n{FILLER}\n"
    f"{QUESTION} {REPLY} {key}"
    for key in (12345, 90876, 67123, 45890, 31415)
]
_SPLIT = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def _byte_level(**special: str) -> PreTrainedTokenizerFast:
    """GPT-2's kind; every digit a token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return _finish_bytes(backend, **special)


def _fused_newlines() -> PreTrainedTokenizerFast:
    """GPT-4's kind: up to three digits a token, and a full stop that takes newlines with it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return _finish_bytes(backend)


def _finish_bytes(backend: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    if special:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", **special)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _word_piece() -> PreTrainedTokenizerFast:
    """BERT's kind: newlines are lost, a special token in front and one behind."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=400,
        special_tokens=["[UNK]", "[CLS]", "[SEP]"],
        initial_alphabet=list("0123456789"),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[SEP]"
    )


def _metaspace() -> PreTrainedTokenizerFast:
    """T5's kind: a mark for the space before a word, white space folded, an end token behind."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(_CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="</s>")


def _letters_only() -> PreTrainedTokenizerFast:
    """A tokenizer that has no digits."""
    backend = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words = [word for text in _CORPUS for word in text.split() if not any(c.isdigit() for c in word)]
    backend.train_from_iterator(words, trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


_MAKERS = {
    "byte_level": _byte_level,
    "byte_level_bos": lambda: _byte_level(bos_token="<s>"),
    "fused_newlines": _fused_newlines,
    "word_piece": _word_piece,
    "metaspace": _metaspace,
    "letters_only": _letters_only,
}
TOKENIZERS = tuple(name for name in _MAKERS if name != "letters_only")


@functools.cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """One of the tokenizers above, made once."""
    return _MAKERS[name]()


def model(kind: str, *, seed: int = 0, **options: Any) -> Any:
    """A small random model of a real class, float32, on the CPU.

    Weights are larger than usual, so that logits depend on the whole context and a wrong cache shows.
    """
    import transformers as t

    common = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, **options}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    torch.manual_seed(seed)
    match kind:
        case "llama":
            made = t.LlamaForCausalLM(t.LlamaConfig(**{**heads, "max_position_embeddings": 4096, **common}))
        case "gemma3":
            layers = {
                "num_hidden_layers": 3,
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            }
            made = t.Gemma3ForCausalLM(
                t.Gemma3TextConfig(**{**heads, "head_dim": 8, "sliding_window": 24, **common, **layers})
            )
        case "gpt2":
            made = t.GPT2LMHeadModel(
                t.GPT2Config(
                    vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=options.get("n_positions", 1024)
                )
            )
        case "mamba":
            made = t.MambaForCausalLM(t.MambaConfig(state_size=8, **common))
        case "falcon":
            made = t.FalconForCausalLM(t.FalconConfig(num_attention_heads=4, alibi=True, **common))
        case _:
            raise ValueError(kind)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 2 and "embed" not in name and "wte" not in name:
                parameter.mul_(8)
    made.generation_config.eos_token_id = None
    return made.eval()
