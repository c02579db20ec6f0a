"""Conversations through the model's chat template, with marks on what the assistant says."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from ropepatch.errors import PromptError, first_line
from ropepatch.training.data.store import Writer
from ropepatch.training.data.tokenising import Advance

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_NO_MARKS = "use a template that marks the assistant's turns with {% generation %}, or set assistant_only: false"

Messages = list[dict[str, Any]]


class ChatEncoder:
    """Turns a conversation into ids and marks.

    Where the template marks what the assistant generates (`{% generation %}`), those marks count. Where it does not,
    the conversation is written once up to before each of the assistant's turns, as for a reply, and once up to behind
    it: the turn is what the second has beyond the first, without white space behind it. That is sound only where each
    of them is the beginning of the next; a template that rewrites earlier turns is refused.

    Args:
        tokenizer: a fast one with a chat template.
        assistant_only: mark what the assistant says; otherwise everything.

    Raises:
        PromptError: no chat template, or a slow tokenizer.
    """

    def __init__(self, tokenizer: Any, *, assistant_only: bool) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise PromptError(
                "the tokenizer has no chat template", hint="set model.tokenizer to one that has, or train on texts"
            )
        if assistant_only and not getattr(tokenizer, "is_fast", False):
            raise PromptError("the tokenizer does not know character offsets", hint="use a fast one")
        self.tokenizer, self.assistant_only = tokenizer, assistant_only
        self._marked = bool(_GENERATION.search(tokenizer.get_chat_template()))

    def encode(self, messages: Any, where: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids and marks (0 or 1) of a conversation, each [n].

        Raises:
            PromptError: no list of messages with role and content, a template that fails or rewrites earlier turns, or
                nothing that the assistant says.
        """
        checked = _checked(messages, where)
        if not self.assistant_only:
            ids, _ = self._tokenise(self._write(checked, where))
            return ids, np.ones(len(ids), dtype=np.uint8)
        ids, marks = self._by_template(checked, where) if self._marked else self._by_turns(checked, where)
        if not marks[1:].any():
            raise PromptError(
                f"{where} holds nothing that the assistant says, so there is nothing to train on",
                given=[message["role"] for message in checked],
                hint="leave such conversations out, or set assistant_only: false",
            )
        return ids, marks

    def _by_template(self, messages: Messages, where: str) -> tuple[np.ndarray, np.ndarray]:
        encoded = self._apply(messages, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return np.asarray(encoded["input_ids"]), np.asarray(encoded["assistant_masks"], dtype=np.uint8)

    def _by_turns(self, messages: Messages, where: str) -> tuple[np.ndarray, np.ndarray]:
        whole = self._write(messages, where)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._write(messages[:number], where, reply=True)
                behind = self._write(messages[: number + 1], where)
                if not (whole.startswith(behind) and behind.startswith(before)):
                    raise PromptError(
                        f"the chat template rewrites earlier turns ({where}, message {number + 1}), so what the "
                        "assistant says cannot be told apart",
                        hint=_NO_MARKS,
                    )
                spans.append((len(before), len(behind.rstrip())))
        ids, offsets = self._tokenise(whole)
        marks = np.zeros(len(ids), dtype=np.uint8)
        for start, end in spans:
            marks[(offsets[:, 0] >= start) & (offsets[:, 1] <= end) & (offsets[:, 1] > offsets[:, 0])] = 1
        return ids, marks

    def _tokenise(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        # The template writes special tokens itself.
        fast = self.tokenizer.is_fast
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=fast, return_attention_mask=False, verbose=False
        )
        offsets = np.asarray(encoded["offset_mapping"] if fast else [], dtype=np.int64).reshape(-1, 2)
        return np.asarray(encoded["input_ids"], dtype=np.int64), offsets

    def _write(self, messages: Messages, where: str, *, reply: bool = False) -> str:
        if not messages:  # many templates refuse an empty conversation
            raise PromptError(f"{where} begins with the assistant", hint=_NO_MARKS)
        return str(self._apply(messages, where, tokenize=False, add_generation_prompt=reply))

    def _apply(self, messages: Messages, where: str, **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except Exception as error:  # templates are programs: whatever they raise is the template's failure
            raise PromptError(f"the chat template fails on {where}: {first_line(error)}") from error


def write_chats(
    rows: Iterable[tuple[str, Any]], encoder: ChatEncoder, writer: Writer, name: str, advance: Advance
) -> None:
    """Write conversations into a marked store, a document each.

    Args:
        rows: where each stands, and its messages.

    Raises:
        PromptError: there is none, or as `ChatEncoder.encode`.
    """
    for where, messages in rows:
        writer.add(*encoder.encode(messages, where))
        advance(1)
    if not writer.ends:
        raise PromptError(f"{name} holds no conversation")


def _checked(messages: Any, where: str) -> Messages:
    fine = isinstance(messages, list) and messages
    if not fine or not all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in messages):
        raise PromptError(
            f"{where} holds no conversation",
            given=str(messages)[:80],
            allowed='a list of messages such as {"role": "user", "content": "..."}',
        )
    return list(messages)
