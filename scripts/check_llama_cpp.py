"""Exported GGUF files in a real llama.cpp, against transformers in float32.

    npm install --prefix /tmp/node --ignore-scripts node-llama-cpp     # brings llama.cpp ready built
    python scripts/check_llama_cpp.py /tmp/node --tiny                 # all methods on tiny random models, a minute
    python scripts/check_llama_cpp.py /tmp/node                        # SmolLM2, 64 tokens
    python scripts/check_llama_cpp.py /tmp/node --lengths 64,9500 --methods none,yarn,abf

The same ids go through both. Over the last tokens of each input (teacher-forced, `--scored`) it compares which token
comes next and the log-probabilities of transformers' five likeliest; and how the exported tokenizer cuts a text. Exit
status 1 when a token is another, or a log-probability differs by more than `--tolerance`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ropepatch
from ropepatch.testing.tiny import tiny_model

HERE = Path(__file__).resolve().parent
PLANES = [1.0 + plane / 4 for plane in range(8)]
OPTIONS: dict[str, dict[str, Any]] = {
    "proportional": {"partial_rotary_factor": 0.5},
    "longrope": {"factor": 4.0, "short_factor": PLANES, "long_factor": PLANES},
}
TINY_LENGTH = 64
# Qwen2's expression and LLaMA 3's, as their tokenizer.json has them.
_WORDS, _REST = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
QWEN2, LLAMA3 = rf"{_WORDS}\p{{N}}{_REST}", rf"{_WORDS}\p{{N}}{{1,3}}{_REST}"
MODEL_METHODS = ("none", "linear", "ntk", "abf", "yarn", "ntk_by_parts", "llama3")
SENTENCES = (
    "Hello there! It's 12:45, isn't it?",
    "  Two  spaces,\n\na new paragraph\tand 1234567 digits.",
    "na\u00efve caf\u00e9 \u2014 \u4f60\u597d, \u043c\u0438\u0440 \U0001f680",
)


@dataclass(frozen=True)
class Case:
    """One model with one method: a name for the table, the model, its tokenizer and what it is fed."""

    name: str
    model: Any
    tokenizer: Any
    inputs: list[list[int]]


def main() -> int:
    arguments = _arguments()
    cases = tiny_cases() if arguments.tiny else model_cases(arguments.model, arguments.methods, arguments.lengths)
    print(f"| {'case':34} | tokens | same next token | largest difference | text |")
    print(f"|{'-' * 36}|{'-' * 8}|{'-' * 17}|{'-' * 20}|{'-' * 6}|")
    failed = False
    for case in cases:
        for length, same, difference, text in check(case, arguments):
            print(
                f"| {case.name:34} | {length:6,} | {same:>7} of {arguments.scored:4} | {difference:18.2g} "
                f"| {'same' if text else 'other'} |",
                flush=True,
            )
            failed |= same < arguments.scored or not difference <= arguments.tolerance or not text
    print("llama.cpp differs" if failed else "llama.cpp agrees")
    return int(failed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("node", type=Path, help="folder whose node_modules has node-llama-cpp")
    parser.add_argument("--tiny", action="store_true", help="tiny random models, every method")
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=MODEL_METHODS)
    parser.add_argument("--lengths", type=lambda text: [int(part) for part in text.split(",")], default=[64])
    parser.add_argument("--scored", type=int, default=32, help="tokens at the end that are compared")
    parser.add_argument("--tolerance", type=float, default=0.01, help="of a log-probability")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def tiny_cases() -> Iterator[Case]:
    """Every method on every architecture that can say it, past the trained length; then every kind of tokenizer."""
    gpt2 = tiny_tokenizers()["gpt-2"]
    names = [info.name for info in ropepatch.methods() if info.seam == "frequencies"]
    for kind in ("llama", "mistral", "qwen2", "qwen3"):
        for method in ("none", *names):
            if kind != "qwen3" or method in ("none", "linear", "ntk", "abf", "yarn"):
                yield _tiny(f"{kind}, {method}", kind, gpt2, method, OPTIONS.get(method, {"factor": 4}))
    for kind in ("llama", "qwen2"):
        yield _tiny(f"{kind}, yarn, no gain", kind, gpt2, "yarn", {"factor": 4, "attention_factor": 1.0})
        yield _tiny(f"{kind}, yarn, other betas", kind, gpt2, "yarn", {"factor": 4, "beta_slow": 0.1})
    yield _tiny("llama, yarn, biases", "llama", gpt2, "yarn", {"factor": 4}, attention_bias=True, mlp_bias=True)
    yield _tiny("qwen2, yarn, tied", "qwen2", gpt2, "yarn", {"factor": 4}, tie_word_embeddings=True)
    for name, tokenizer in tiny_tokenizers().items():
        yield _tiny(f"llama, tokenizer {name}", "llama", tokenizer, "none", {})


def _tiny(name: str, kind: str, tokenizer: Any, method: str, options: dict[str, Any], **config: Any) -> Case:
    if kind == "mistral":
        config["sliding_window"] = None
    model = tiny_model(kind, vocab_size=512, num_key_value_heads=2, **config)
    if method != "none":
        ropepatch.patch(model, method, **options)
    tokens = torch.arange(4 * TINY_LENGTH).mul(37).remainder(len(tokenizer)).tolist()
    return Case(name, model, tokenizer, [tokens])


@cache
def tiny_tokenizers() -> dict[str, Any]:
    """Tokenizers of 400 tokens, by the name that llama.cpp has for how they cut text."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)

    def split(pattern: str) -> Any:
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), bytes_only])

    def finish(backend: Any, pieces: bool = False) -> Any:
        special = ["<unk>", "<s>", "</s>"] if pieces else ["<s>", "</s>", "<unk>"]
        alphabet = [] if pieces else pre_tokenizers.ByteLevel.alphabet()
        bytes_ = [f"<0x{value:02X}>" for value in range(256)] if pieces else []
        trainer = trainers.BpeTrainer(
            vocab_size=450, special_tokens=[*special, *bytes_], initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator([__doc__, *SENTENCES[:2]], trainer)
        if pieces:
            # Trained as special, so that they come first; they are plain tokens that bytes fall back on.
            content = json.loads(backend.to_str())
            content["added_tokens"] = [item for item in content["added_tokens"] if item["content"] in special]
            backend = Tokenizer.from_str(json.dumps(content))
        return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")

    def byte_level(cut: Any, **options: Any) -> Any:
        backend = Tokenizer(models.BPE(**options))
        backend.pre_tokenizer, backend.decoder = cut, decoders.ByteLevel()
        return finish(backend)

    pieces = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    pieces.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return {
        "gpt-2": byte_level(gpt2),
        "smollm": byte_level(pre_tokenizers.Sequence([digits, gpt2])),
        "qwen2": byte_level(split(QWEN2)),
        "llama-bpe": byte_level(split(LLAMA3), ignore_merges=True),
        "smaug-bpe": byte_level(split(LLAMA3)),
        "llama": finish(pieces, pieces=True),
    }


def model_cases(source: str, methods: list[str], lengths: list[int]) -> Iterator[Case]:
    """A real model, method after method, fed with this project's documentation."""
    model, tokenizer = ropepatch.load_model(source, dtype="float32")
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(HERE.parent.glob("docs/*.md")))
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if len(tokens) < max(lengths):
        raise SystemExit(f"the documentation has {len(tokens):,} tokens only")
    for method in methods:
        if method != "none":
            ropepatch.patch(model, method, **OPTIONS.get(method, {"factor": 2}))
        yield Case(method, model, tokenizer, [tokens[:length] for length in lengths])
        if method != "none":
            ropepatch.unpatch(model)


def check(case: Case, arguments: argparse.Namespace) -> Iterator[tuple[int, int, float, bool]]:
    """For each input: its length, how many next tokens agree, the largest difference, whether text is cut alike."""
    scored = arguments.scored
    with tempfile.TemporaryDirectory() as folder:
        done = ropepatch.export(case.model, folder, "gguf", tokenizer=case.tokenizer, dtype="float32")
        request = {
            "model": str(done.path),
            "threads": arguments.threads,
            "texts": SENTENCES,
            "inputs": [{"tokens": tokens, "scored": scored} for tokens in case.inputs],
        }
        reply = llama_cpp([request], arguments.node, Path(folder))[0]
    cut = [case.tokenizer.encode(text, add_special_tokens=False) for text in SENTENCES]
    for tokens, rows in zip(case.inputs, reply["logits"], strict=True):
        found = torch.tensor(rows).log_softmax(-1)
        wanted = reference(case.model, tokens, scored)
        same = int((found.argmax(-1) == wanted.argmax(-1)).sum())
        best = wanted.topk(5).indices
        difference = float((found.gather(-1, best) - wanted.gather(-1, best)).abs().max())
        yield len(tokens), same, difference, cut == reply["ids"]


def llama_cpp(requests: list[dict[str, Any]], node: Path, folder: Path) -> list[dict[str, Any]]:
    """Replies of llama_cpp_logits.mjs; both are kept in `folder` on the way."""
    asked, answers = folder / "requests.json", folder / "replies.json"
    asked.write_text(json.dumps(requests), encoding="utf-8")
    command = ["node", str(HERE / "llama_cpp_logits.mjs"), str(node), str(asked), str(answers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"llama.cpp did not run:\n{done.stderr[-2000:]}")
    replies: list[dict[str, Any]] = json.loads(answers.read_text(encoding="utf-8"))["replies"]
    return replies


@torch.inference_mode()
def reference(model: Any, tokens: list[int], scored: int) -> Tensor:
    """Log-probabilities after each of the last tokens, [scored, vocabulary]."""
    output = model(input_ids=torch.tensor([tokens]), logits_to_keep=scored, use_cache=False)
    return output.logits[0].float().log_softmax(-1)


if __name__ == "__main__":
    sys.exit(main())
