"""Conversations: what the loss counts, packing, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from data_material import recipe, tokenizer

from ropepatch.errors import PromptError
from ropepatch.training.data import build
from ropepatch.training.data.chat import ChatEncoder

PLAIN = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{% generation %}{{ m['content'] }}<|end|>"
    "{% endgeneration %}{{ '\n' }}{% else %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As templates of thinking models do: what earlier turns said is shortened when another turn follows.
REWRITING = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if loop.last %}{{ m['content'] }}{% else %}-{% endif %}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _tokenizer(template: str | None) -> Any:
    made = copy.deepcopy(tokenizer())
    made.chat_template = template
    return made


def _talk(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]


def _write(path: Path, talks: list[Any], column: str = "messages") -> Path:
    path.write_text("".join(json.dumps({column: talk}) + "\n" for talk in talks))
    return path


def _build(tmp_path: Path, talks: list[Any], template: str | None = PLAIN, **more: Any) -> Any:
    path = _write(tmp_path / "talks.jsonl", talks)
    source = {"kind": "chat", "path": str(path)}
    source.update({name: more.pop(name) for name in ("column", "assistant_only", "packed") if name in more})
    return build(recipe(source, cache=str(tmp_path / "cache"), **more), _tokenizer(template))


def _counted(tok: Any, row: dict[str, Any]) -> str:
    return tok.decode([label for label in row["labels"] if label != -100])


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_only_what_the_assistant_says_counts(tmp_path: Path, template: str) -> None:
    talk = _talk("What is the grass?", "It is green.", "And the sky?", "Blue. <|end|> is no end here")
    tok = _tokenizer(template)
    ids, marks = ChatEncoder(tok, assistant_only=True).encode(talk, "here")
    assert tok.decode(ids) == tok.apply_chat_template(talk, tokenize=False)
    assert tok.decode(ids[marks == 1]) == "It is green.<|end|>Blue. <|end|> is no end here<|end|>"
    row = _build(tmp_path, [talk], template, length=200, steps=1)[0]
    assert _counted(tok, row) == "It is green.<|end|>Blue. <|end|> is no end here<|end|>"
    assert row["documents"] == [1] * len(ids) + [0] * (200 - len(ids))
    assert row["labels"][len(ids) :] == [-100] * (200 - len(ids))


def test_both_ways_to_find_the_assistant_agree() -> None:
    ordered = [{"role": "system", "content": "Be."}, *_talk("x", "y")]
    talks = [_talk("a", "b"), _talk("One two?", " three ", "four", "five\n"), ordered]
    for talk in talks:
        one, two = (ChatEncoder(_tokenizer(t), assistant_only=True).encode(talk, "here") for t in (PLAIN, MARKED))
        assert one[0].tolist() == two[0].tolist()
        assert one[1].tolist() == two[1].tolist()


def test_everything_counts_where_that_is_asked_for(tmp_path: Path) -> None:
    row = _build(tmp_path, [_talk("a", "b")], length=100, assistant_only=False)[0]
    real = sum(number > 0 for number in row["documents"])
    assert row["labels"][:real] == row["input_ids"][:real]
    # A template that rewrites earlier turns does no harm then.
    assert _build(tmp_path, [_talk("a", "b", "c", "d")], REWRITING, length=100, assistant_only=False)[0]


def test_whole_conversations_are_packed(tmp_path: Path) -> None:
    talks = [_talk(f"question {n} " * (1 + n % 5), f"answer {n}") for n in range(40)]
    tok = _tokenizer(PLAIN)
    known = {tok.apply_chat_template(talk, tokenize=False) for talk in talks}
    rows = _build(tmp_path, talks, length=160, steps=6, batch=2, isolate_documents=True)
    seen: list[str] = []
    for row in rows:
        assert len(row["input_ids"]) == 160
        for number in range(1, max(row["documents"]) + 1):
            seen.append(tok.decode([i for i, d in zip(row["input_ids"], row["documents"], strict=True) if d == number]))
    assert set(seen) <= known
    assert len(seen) > len(rows)
    assert len(set(seen[:30])) == 30  # none twice in an epoch
    together = _build(tmp_path, talks, length=160, steps=6, batch=2)
    assert [row["input_ids"] for row in together] == [row["input_ids"] for row in rows]
    assert {number for row in together for number in row["documents"]} <= {0, 1}


def test_one_conversation_a_row(tmp_path: Path) -> None:
    talks = [_talk(f"question {n}", f"answer {n}") for n in range(10)]
    tok = _tokenizer(PLAIN)
    rows = _build(tmp_path, talks, length=160, steps=5, batch=2, packed=False)
    answers = [_counted(tok, row) for row in rows]
    assert sorted(answers) == sorted(f"answer {n}<|end|>" for n in range(10))


def test_a_long_conversation_is_cut_at_its_end_and_left_out_where_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = _talk("q", "a", "q " * 200, "late")
    hopeless = _talk("q " * 200, "late")
    tok = _tokenizer(PLAIN)
    rows = _build(tmp_path, [long, hopeless], length=64)
    assert {_counted(tok, row) for row in rows} == {"a<|end|>"}
    assert "1 conversations are left out" in capsys.readouterr().err
    with pytest.raises(PromptError, match="(?i)no conversation of .* within its first 64 tokens"):
        _build(tmp_path, [hopeless], length=64)


@pytest.mark.parametrize(
    ("talk", "match"),
    [
        (_talk("only a question"), r"row 2 holds nothing that the assistant says.*assistant_only: false"),
        ("text", r"row 2 holds no conversation\. Given: 'text'"),
        ([], "row 2 holds no conversation"),
        ([{"from": "human", "value": "x"}], "holds no conversation.*role"),
        (None, "row 2 holds no conversation"),
        ([{"role": "assistant", "content": "hello"}], "row 2 begins with the assistant"),
    ],
)
def test_conversations_that_cannot_be_trained_on(tmp_path: Path, talk: Any, match: str) -> None:
    with pytest.raises(PromptError, match=match):
        _build(tmp_path, [_talk("a", "b"), talk], length=64)


def test_templates_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="(?i)no chat template"):
        _build(tmp_path, [_talk("a", "b")], None)
    with pytest.raises(PromptError, match=r"rewrites earlier turns .*row 1, message 2.*\{% generation %\}"):
        _build(tmp_path, [_talk("a", "b", "c", "d")], REWRITING)
    with pytest.raises(PromptError, match="(?i)the chat template fails on .*row 1: no system"):
        _build(tmp_path, [_talk("a", "b")], "{{ raise_exception('no system') }}")


def test_conversations_of_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="needs the package datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    talks = [_talk(f"question {n}", f"answer {n}") for n in range(10)]
    of_file = list(_build(tmp_path, talks, length=64))
    (tmp_path / "set").mkdir()
    _write(tmp_path / "set" / "train.jsonl", talks)
    source = {"kind": "chat", "path": f"datasets:{tmp_path / 'set'}"}
    assert list(build(recipe(source, length=64, cache=str(tmp_path / "c")), _tokenizer(PLAIN))) == of_file
    with pytest.raises(PromptError, match="(?i)not the name of a data set"):
        build(recipe({**source, "path": "datasets:"}), _tokenizer(PLAIN))


def test_files_that_hold_no_conversations(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"no column 'talk'\. Allowed: messages"):
        _build(tmp_path, [_talk("a", "b")], column="talk")
    with pytest.raises(PromptError, match="holds no conversation"):
        _build(tmp_path, [])
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(PromptError, match=r"a.txt holds no conversations\. Allowed: files that end in \.jsonl"):
        build(recipe({"kind": "chat", "path": str(tmp_path / "a.txt")}, cache=str(tmp_path / "c")), _tokenizer(PLAIN))
