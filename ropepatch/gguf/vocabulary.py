"""A tokenizer in the words of a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ropepatch.errors import OptionError, UnsupportedModelError
from ropepatch.gguf._dependency import require_gguf

_SPACE = "\u2581"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_WORDS}\p{{N}}{_REST}"
_LLAMA3 = rf"{_WORDS}\p{{N}}{{1,3}}{_REST}"

# How a byte-level tokenizer cuts text before merging, and whether whole words skip the merges -> `tokenizer.ggml.pre`,
# the word under which llama.cpp has that expression (src/llama-vocab.cpp).
_PRE: dict[tuple[Any, ...], str] = {
    (("ByteLevel", True), False): "gpt-2",
    (("Digits", True), ("ByteLevel", True), False): "smollm",
    (("Split", _QWEN2), ("ByteLevel", False), False): "qwen2",
    (("Split", _LLAMA3), ("ByteLevel", False), True): "llama-bpe",
    (("Split", _LLAMA3), ("ByteLevel", False), False): "smaug-bpe",
}


def write_vocabulary(writer: Any, tokenizer: Any, size: int, pre: str | None) -> None:
    """Write every `tokenizer.*` key.

    Args:
        writer: a gguf.GGUFWriter.
        tokenizer: a fast tokenizer of transformers, byte-level BPE (GPT-2's kind) or BPE over characters with bytes to
            fall back on (LLaMA 2's kind, from SentencePiece).
        size: rows of the model's embedding; ids without a token are marked unused.
        pre: the word for how it cuts text, where we do not know it.

    Raises:
        OptionError: no tokenizer, or one whose cutting we have no word for.
        UnsupportedModelError: another kind of tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise OptionError("a GGUF file holds the tokenizer too", given=tokenizer, hint="pass tokenizer=..., a fast one")
    content = json.loads(backend.to_str())
    if content["model"]["type"] != "BPE":
        raise UnsupportedModelError(
            "no GGUF export for this kind of tokenizer", given=content["model"]["type"], allowed="BPE"
        )
    pieces = bool(content["model"].get("byte_fallback"))
    if pieces and pre is not None:
        raise OptionError("tokenizer_pre is for byte-level tokenizers, and this one is of SentencePiece", given=pre)
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    if pieces:
        _write_pieces(writer, content)
    else:
        writer.add_tokenizer_pre(pre or _pre(content))
        # Two characters of the byte alphabet never hold a space, so a space parts them.
        writer.add_token_merges([" ".join(_pair(merge)) for merge in content["model"]["merges"]])
    tokens, types = _tokens(content, size, pieces)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if pieces:
        writer.add_token_scores(_scores(content, tokens))
    _write_special(writer, tokenizer)


def _tokens(content: Mapping[str, Any], size: int, pieces: bool) -> tuple[list[str], list[int]]:
    kinds = require_gguf().TokenType
    unknown = content["model"].get("unk_token")
    tokens, types = [f"[PAD{index}]" for index in range(size)], [int(kinds.UNUSED)] * size
    known: dict[str, int] = content["model"]["vocab"]
    added = {item["id"]: item for item in content["added_tokens"]}
    largest = max((*known.values(), *added))
    if largest >= size:
        raise UnsupportedModelError(
            "the tokenizer has tokens that the model has no embedding for", given=largest, allowed=f"ids below {size}"
        )
    for token, index in known.items():
        tokens[index], types[index] = token, int(kinds.NORMAL)
        if pieces and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[index] = int(kinds.BYTE)
    for index, item in added.items():
        tokens[index] = item["content"]
        types[index] = int(kinds.CONTROL if item["special"] else kinds.USER_DEFINED)
    if pieces and unknown in known:
        types[known[unknown]] = int(kinds.UNKNOWN)
    return tokens, types


# -- byte-level


def _pre(content: Mapping[str, Any]) -> str:
    """`tokenizer.ggml.pre`, from the steps themselves: a finetune with tokens of its own cuts as its base does."""
    steps = _flat(content.get("pre_tokenizer"), "pretokenizers")
    normalizers = [step["type"] for step in _flat(content.get("normalizer"), "normalizers")]
    # llama.cpp normalises no text; NFC alone is left out by its own converter too.
    if set(normalizers) <= {"NFC"}:
        key = (*map(_step, steps), bool(content["model"].get("ignore_merges")))
        if key in _PRE:
            return _PRE[key]
    raise OptionError(
        "no word of llama.cpp is known for how this tokenizer cuts text",
        given=[_step(step) for step in steps] + normalizers,
        allowed=sorted(_PRE.values()),
        hint="pass tokenizer_pre=..., the name that llama.cpp has for it ('tekken', 'deepseek-llm', ...)",
    )


def _step(step: Mapping[str, Any]) -> tuple[str, Any]:
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return kind, step["use_regex"]
    if kind == "Digits":
        return kind, step["individual_digits"]
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return kind, step["pattern"].get("Regex")
    return kind, None


def _flat(step: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return [part for item in step[name] for part in _flat(item, name)] if step["type"] == "Sequence" else [step]


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


# -- SentencePiece


def _write_pieces(writer: Any, content: Mapping[str, Any]) -> None:
    """llama.cpp writes spaces as U+2581 by itself, and one in front of the text where the file says so."""
    normalizers = _flat(content.get("normalizer"), "normalizers")
    steps = _flat(content.get("pre_tokenizer"), "pretokenizers")
    kinds = {step["type"] for step in (*normalizers, *steps)}
    if not kinds <= {"Prepend", "Replace", "Metaspace"}:
        raise UnsupportedModelError("llama.cpp does not prepare text as this tokenizer does", given=sorted(kinds))
    prefixed = any(step["type"] == "Prepend" for step in normalizers) or any(
        step.get("prepend_scheme") in ("first", "always") for step in steps
    )
    writer.add_add_space_prefix(prefixed)


def _scores(content: Mapping[str, Any], tokens: list[str]) -> list[float]:
    """llama.cpp joins the neighbours whose piece scores best: minus the rank of the first merge that makes it."""
    rank: dict[str, int] = {}
    for merge in content["model"]["merges"]:
        rank.setdefault("".join(_pair(merge)), len(rank))
    return [-float(rank[token]) if token in rank else -float(len(rank)) for token in tokens]


# -- both


def _write_special(writer: Any, tokenizer: Any) -> None:
    for name in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{name}_token_id", None)
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    # What it does, not what it says: the option of that name is not what fast tokenizers go by.
    bare, full = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    start, end = full[:1] == [tokenizer.bos_token_id], full[-1:] == [tokenizer.eos_token_id]
    if full != [*full[:1] * start, *bare, *full[-1:] * end]:
        raise UnsupportedModelError(
            "the tokenizer puts other tokens around a text than its bos and eos",
            given=full,
            allowed=f"{bare} and those",
        )
    writer.add_add_bos_token(start)
    writer.add_add_eos_token(end)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    if template:
        writer.add_chat_template(template)
