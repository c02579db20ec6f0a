"""What the tests of the tasks share: tokenizers that know all of ASCII, a text whose sentences are known, and a model
that gives the right answers."""

from __future__ import annotations

import functools
import string
from collections.abc import Sequence
from typing import Any

import torch
from small import tokenizer as small_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ropepatch.evaluation.task import Prompt, Retrieval
from ropepatch.evaluation.texts import RealText

_CORPUS = [string.printable, string.printable[::-1], *(a + b for a in string.ascii_letters for b in "aeiou0189")] * 2
_CORPUS += [
    "The quick brown fox jumps over the lazy dog. What is the special magic number for the word in the list?"
] * 9

SUBJECTS = ("The farmer", "Mr. Brown", "A teacher of J. K. Green", "Nobody in the U.S. Senate", "The old ship")
ENDS = ("saw the harbor.", "paid $3.50 for it!", "asked: is it so?", "said “never again.”", "went home, i.e. away.")
SENTENCES = tuple(f"{who} in year {year} {end}" for year in range(1790, 1900) for who in SUBJECTS for end in ENDS)
PARAGRAPHS = tuple(" ".join(SENTENCES[i : i + 7]) for i in range(0, len(SENTENCES), 7))
STORY = RealText("\n\n".join(PARAGRAPHS), "story.txt", "0" * 64)


def _word_piece() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    backend.train_from_iterator(_CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


def _metaspace() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(_CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


BYTES = ("byte_level", "byte_level_bos", "fused_newlines")
TOKENIZERS = (*BYTES, "word_piece", "metaspace")


@functools.cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The byte-level ones of `small`, and the two other kinds with a wider alphabet."""
    if name in BYTES:
        return small_tokenizer(name)
    return {"word_piece": _word_piece, "metaspace": _metaspace}[name]()


def decoded(name: str, ids: Any) -> str:
    """The text of some ids."""
    tokens = [int(i) for i in ids]
    return tokenizer(name).decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def flat(text: str) -> str:
    """Without case and white space."""
    return "".join(text.split()).lower()


def every_prompt(task: Retrieval) -> list[Prompt]:
    """All prompts of a grid."""
    return [task.build(place) for place in task.places()]


def teach(net: Any, prompts: Sequence[Prompt]) -> None:
    """Make a model continue these prompts with their ideal answers: what was read so far decides the next token."""
    after: dict[tuple[int, ...], int] = {}
    for prompt in prompts:
        whole = [*prompt.ids.tolist(), *prompt.answer.tolist()]
        for end in range(len(prompt.ids), len(whole)):
            after[tuple(whole[:end])] = whole[end]
    read: list[int] = []

    def remember(module: Any, args: Any, kwargs: Any) -> None:
        past = kwargs["past_key_values"].get_seq_length() if kwargs.get("past_key_values") is not None else 0
        del read[past:]
        read.extend(kwargs["input_ids"][0].tolist())

    def recall(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        rows = output.logits.shape[1]
        for row in range(rows):
            known = after.get(tuple(read[: len(read) - rows + 1 + row]))
            if known is not None:
                output.logits[0, row, known] = 1e4
        return output

    net.register_forward_pre_hook(remember, with_kwargs=True)
    net.register_forward_hook(recall, with_kwargs=True)


def generated(net: Any, name: str, prompt: Prompt) -> str:
    """What transformers' own greedy generation makes of a prompt."""
    ids = torch.from_numpy(prompt.ids.astype("int64"))[None]
    mask = torch.ones_like(ids)
    output = net.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=prompt.most_tokens, pad_token_id=0)
    return decoded(name, output[0, ids.shape[1] :])
