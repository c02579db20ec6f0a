"""Text to token ids and back: how a prompt is written, tokenised, and where in its tokens a piece of text sits.

The tokenizer always sees the whole text; no piece is tokenised alone and glued on. So the ids of a prompt are what
the model would see if a user typed that text, and `Tokens.span` finds a piece by its character offsets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ropepatch.errors import PromptError

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Tokens:
    """A tokenised text.

    Attributes:
        ids: token ids, shape [n], int32.
        starts, ends: character offsets of each token in the text, shape [n]; equal for an added special token.
    """

    ids: Ids
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The tokens that touch the characters start..end: first, and one past the last."""
        touching = np.flatnonzero((self.starts < end) & (self.ends > start))
        if not touching.size:
            raise PromptError("the tokenizer drops a part of the prompt", given=(start, end))
        return int(touching[0]), int(touching[-1]) + 1

    def inside(self, start: int, end: int) -> npt.NDArray[np.int64]:
        """The indices of the tokens that lie wholly within the characters start..end."""
        return np.flatnonzero((self.starts >= start) & (self.ends <= end) & (self.ends > self.starts))


class TextEncoder:
    """A model's own tokenizer, used one way throughout.

    Special tokens that the tokenizer puts in front (BOS) are kept and counted. Those that it appends (EOS, [SEP]) are
    dropped: a text that the model is to continue has not ended.

    Args:
        tokenizer: a fast Hugging Face tokenizer (one that knows character offsets).
        chat_template: put the text into the tokenizer's chat template, as one user turn that awaits its reply.
    """

    def __init__(self, tokenizer: Any, *, chat_template: bool = False) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise PromptError(
                "the tokenizer does not know character offsets", given=type(tokenizer).__name__, hint="use a fast one"
            )
        if chat_template and not getattr(tokenizer, "chat_template", None):
            raise PromptError("the tokenizer has no chat template", hint="turn the chat template off")
        self.tokenizer = tokenizer
        self.chat_template = chat_template

    def encode(self, text: str) -> Tokens:
        """The tokens of a whole text (a chat template writes its special tokens itself, so none are added to it)."""
        encoded = self.tokenizer(
            text,
            add_special_tokens=not self.chat_template,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=False,
            truncation=False,
            verbose=False,
        )
        n = len(encoded["input_ids"])
        offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(n, 2)
        added = np.asarray(encoded["special_tokens_mask"], dtype=bool) & (offsets[:, 0] == offsets[:, 1])
        while n and added[n - 1]:
            n -= 1
        ids = np.asarray(encoded["input_ids"][:n], dtype=np.int32)
        return Tokens(ids, offsets[:n, 0], offsets[:n, 1])

    def decode(self, ids: Any) -> str:
        """The text of some tokens, special ones left out."""
        tokens = [int(i) for i in ids]
        text = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def answer(self, prompt: str, answer: str) -> Ids:
        """The ids of `answer` as they follow `prompt` and a space: what both together have beyond the prompt.

        Raises:
            PromptError: the tokens of the prompt change when the answer follows.
        """
        before = self.encode(prompt).ids
        whole = self.encode(f"{prompt} {answer}").ids
        if not np.array_equal(whole[: len(before)], before) or len(whole) == len(before):
            raise PromptError(
                "the tokenizer fuses the end of the question with the answer, so they cannot be told apart",
                given=f"{prompt[-20:]} {answer}",
            )
        return whole[len(before) :]

    def check_known(self, text: str, tokens: Tokens, start: int, end: int) -> None:
        """Refuse a piece of `text`, characters start..end, that has tokens for unknown characters.

        Raises:
            PromptError: names the first one.
        """
        first, last = tokens.span(start, end)
        unknown = np.flatnonzero(tokens.ids[first:last] == getattr(self.tokenizer, "unk_token_id", None))
        if unknown.size:
            at = first + int(unknown[0])
            piece = text[tokens.starts[at] : tokens.ends[at]]
            context = text[max(start, int(tokens.starts[at]) - 20) : int(tokens.ends[at]) + 20]
            raise PromptError(f"the tokenizer cannot represent {piece!r} of the prompt", given=context)

    def turn(self, user: str, reply: str, *, joint: str = " ") -> str:
        """The text that asks `user` and leaves off after the first words of the answer, `reply`.

        Without a chat template: `user`, `joint`, `reply`. With one: the template around `user`, then `reply` as the
        beginning of the assistant's turn.

        Raises:
            PromptError: the template fails, or does not carry the text unchanged.
        """
        if not self.chat_template:
            return f"{user}{joint}{reply}"
        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": user}], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates are programs: whatever they raise is the template's failure
            raise PromptError(f"the chat template fails: {error}", hint="turn the chat template off") from error
        if user not in text:
            raise PromptError("the chat template changes the text it is given", hint="turn the chat template off")
        return f"{text}{reply}"
