"""`evaluate` from end to end: against plain generation, resumed, interrupted, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small import model, tokenizer

import ropepatch
from ropepatch.errors import OptionError, OutputConflictError, PromptError, UnsupportedModelError
from ropepatch.evaluation import EvaluationResult, evaluate
from ropepatch.evaluation.task import Grid, Place
from ropepatch.evaluation.tasks.passkey import PasskeyTask

GRID: dict[str, Any] = {"lengths": [150, 260], "depths": [0, 0.5, 1], "trials": 2, "progress": False}
NAME = "byte_level"


def _evaluate(net: Any, **options: Any) -> EvaluationResult:
    return evaluate(net, tokenizer(NAME), "passkey", **{**GRID, **options})


def _key(row: dict[str, Any]) -> tuple[int, float, int]:
    return row["length"], row["depth"], row["trial"]


def _comparable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what may differ between two runs: time, and the last digits of a sum."""
    return [{**row, "elapsed_s": 0, "logprob": pytest.approx(row["logprob"], abs=1e-3)} for row in rows]


def test_rows_are_what_plain_generation_gives() -> None:
    net = model("llama")
    result = _evaluate(net)
    assert [_key(row) for row in result.trials] == [
        (n, d, t) for n in (150, 260) for d in (0.0, 0.5, 1.0) for t in (0, 1)
    ]
    task = PasskeyTask(tokenizer(NAME), grid=Grid([260]))
    for row in result.trials:
        prompt = task.build(Place.of(row))
        ids = torch.from_numpy(prompt.ids.astype("int64"))[None]
        output = net.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, pad_token_id=0
        )
        text = tokenizer(NAME).decode(output[0, ids.shape[1] :].tolist(), skip_special_tokens=True).strip()
        assert row["output"] == text[:5]
        assert row["correct"] == int(row["output"] == row["answer"])
        assert row["answer"] == prompt.expected
        assert ids.shape[1] == row["length"]
    assert result.tokens_computed == result.trie_size < result.sum_of_prompts
    assert result.reuse
    assert result.summary["work"]["trie_size"] == result.trie_size
    assert [cell["n"] for cell in result.summary["cells"]] == [2] * 6


def test_a_model_that_finds_the_key_scores_one() -> None:
    """A head that looks up what followed the same three tokens earlier in its input: perfect recall, made by hand."""
    net = model("llama")
    task = PasskeyTask(tokenizer(NAME), grid=Grid([260]))
    prompts = [task.build(Place("passkey", n, d, t)) for n in (150, 260) for d in (0.0, 0.5, 1.0) for t in (0, 1)]
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
    result = _evaluate(net)
    assert all(row["correct"] == 1 and row["forced"] and row["output"] == row["answer"] for row in result.trials)
    assert all(row["logprob"] == pytest.approx(0, abs=1e-3) for row in result.trials)
    assert result.summary["effective_length"] == 260
    assert result.tokens_decoded == 0


def test_folder_holds_the_contracted_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = _evaluate(model("llama"), output=tmp_path / "run")
    assert {"run.json", "results.jsonl", "summary.json", "heatmap.png", "report.html"} <= {
        file.name for file in (tmp_path / "run").iterdir()
    }
    rows = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert sorted(rows, key=_key) == result.trials
    for field in ("task", "length", "depth", "trial", "seed", "answer", "output", "correct", "elapsed_s", "forced"):
        assert all(field in row for row in rows)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == result.summary
    assert _comparable(_evaluate(model("llama")).trials) == _comparable(result.trials)


def test_an_interrupt_loses_nothing_and_the_run_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    net = model("llama")
    whole = _evaluate(net)
    forwards = 0

    def interrupt(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == 40:
            raise KeyboardInterrupt

    hook = net.register_forward_pre_hook(interrupt, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        _evaluate(net, output=tmp_path)
    hook.remove()
    assert net.config._attn_implementation == "sdpa"
    lines = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    assert 0 < len(lines) < 12
    (tmp_path / "results.jsonl").write_text("".join(lines) + lines[0][:30])  # and a torn line
    resumed = _evaluate(net, output=tmp_path)
    assert _comparable(resumed.trials) == _comparable(whole.trials)
    kept = {_key(json.loads(line)): json.loads(line) for line in lines}
    assert all(row == kept.get(_key(row), row) for row in resumed.trials)
    assert 0 < resumed.sum_of_prompts < whole.sum_of_prompts
    again = _evaluate(net, output=tmp_path)
    assert again.trials == resumed.trials
    assert (again.tokens_computed, again.reuse) == (0, None)
    assert again.summary["work"] == resumed.summary["work"]


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    net = model("llama")
    _evaluate(net, output=tmp_path, lengths=[150])
    before = {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    for change in ({"seed": 1}, {"digits": 6}, {"lengths": [151]}, {"chat_template": True}):
        with pytest.raises(OutputConflictError):
            _evaluate(net, output=tmp_path, **{"lengths": [150], **change})
    with ropepatch.patched(net, "linear", factor=2), pytest.raises(OutputConflictError):
        _evaluate(net, output=tmp_path, lengths=[150])
    assert {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"lengths": [20]}, PromptError),
        ({"depths": [1.2]}, OptionError),
        ({"trials": 0}, OptionError),
        ({"text": "does-not-exist.txt"}, PromptError),
        ({"dtype": "bfloat16"}, OptionError),
        ({"chunk_size": 0}, OptionError),
    ],
)
def test_bad_input_leaves_no_folder(tmp_path: Path, options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        _evaluate(model("llama"), output=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_table_that_is_too_short_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="positions for 200 tokens"):
        _evaluate(model("gpt2", n_positions=200), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_patch_is_recorded_and_counts() -> None:
    net = model("llama")
    plain = _evaluate(net)
    with ropepatch.patched(net, "linear", factor=4):
        patched = _evaluate(net)
    assert plain.configuration["patch"] is None
    assert patched.configuration["patch"]["method"] == "linear"
    assert patched.configuration["trained_length"] == plain.configuration["trained_length"] == 4096
    assert [row["logprob"] for row in patched.trials] != [row["logprob"] for row in plain.trials]


def test_text_and_template_are_recorded(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"Line {i} is here." for i in range(300)))
    result = _evaluate(model("llama"), lengths=[260], text=tmp_path / "text.txt", chat_template=True)
    assert result.configuration["chat_template"] is True
    assert len(result.configuration["text"]["sha256"]) == 64


def test_a_peft_model() -> None:
    peft = pytest.importorskip("peft")
    net = model("llama")
    plain = _evaluate(net)
    wrapped = peft.get_peft_model(net, peft.LoraConfig(target_modules=["q_proj"]))
    result = _evaluate(wrapped)
    assert result.reuse
    assert [row["output"] for row in result.trials] == [row["output"] for row in plain.trials]


@pytest.mark.parametrize("kind", ["gemma3", "gpt2", "mamba"])
def test_other_architectures(kind: str) -> None:
    result = _evaluate(model(kind), lengths=[150], trials=1)
    assert len(result.trials) == 3
    assert result.reuse == (kind != "mamba")
    assert (result.reuse_refused is None) == result.reuse


def test_table_and_figure(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib")
    result = _evaluate(model("llama"), lengths=[150])
    table = result.to_pandas()
    assert list(table["answer"]) == [row["answer"] for row in result.trials]
    result.plot(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    _evaluate(model("llama"), lengths=[150], progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "100%" in captured.err
