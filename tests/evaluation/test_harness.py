"""lm-evaluation-harness on patched models: its numbers against plain transformers, and what it may not do silently."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ropepatch
from ropepatch.errors import (
    OptionError,
    PromptError,
    RopepatchError,
    UnknownNameError,
    UnsupportedModelError,
    UsageError,
)

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'ropepatch[harness]'")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from small import model as small_model
from small import tokenizer as small_tokenizer

from ropepatch.evaluation.harness import HARNESS_OPTIONS, PatchedLM, find_tasks, run_harness, table

TRAINED = 256
# Unpatched, on each seam, and a second method of the attention seam that bounds what is seen.
PATCHES: list[tuple[str | None, dict[str, Any]]] = [
    (None, {}),
    ("yarn", {"factor": 2}),
    ("self_extend", {"factor": 4, "window": 32}),
]
QUESTION = "The pass key is {key}. Remember it. {key} is the pass key. {filler}\nWhat is the pass key? The pass key is"
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


def subject(patch: str | None = None, options: dict[str, Any] | None = None) -> Any:
    model = small_model("llama", max_position_embeddings=TRAINED)
    return model if patch is None else ropepatch.patch(model, patch, **(options or {}))


def wrapped(model: Any, **more: Any) -> PatchedLM:
    return PatchedLM(model, tokenizer=small_tokenizer("byte_level_bos"), **more)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three tasks over a few local examples: nothing is fetched."""
    folder = tmp_path_factory.mktemp("tasks")
    # One of the prompts is longer than the model was trained for.
    rows = [
        {
            "question": QUESTION.format(key=key, filler=(FILLER * repeats).strip()),
            "choices": [f" {key}", " grass", " the"],
        }
        for key, repeats in (("12345", 1), ("777", 2), ("31", 10))
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    kinds = {
        "small_choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": 0,
            "target_delimiter": "",
        },
        "small_generate": {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"max_gen_toks": 12, "until": ["e"], "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
        "small_rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question}}",
            "metric_list": [{"metric": "byte_perplexity"}],
        },
    }
    for name, kind in kinds.items():
        # JSON is YAML.
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **shared, **kind}))
    return folder


@pytest.fixture(scope="module")
def manager(tasks: Path) -> TaskManager:
    """These tasks only: reading the harness's own takes seconds."""
    return TaskManager(include_defaults=False, include_path=str(tasks))


def plain_loglikelihood(model: Any, context: str, answer: str) -> tuple[float, bool]:
    """One forward of the whole text: log-probability of the answer's tokens, and whether each is the most likely."""
    tokenizer = small_tokenizer("byte_level_bos")
    ids = torch.tensor([tokenizer(context + answer)["input_ids"]])
    start = len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        logits = model(ids).logits[0, start - 1 : -1]
    target = ids[0, start:]
    found = logits.log_softmax(-1)[range(len(target)), target]
    return float(found.sum()), bool((logits.argmax(-1) == target).all())


def plain_generation(model: Any, context: str, tokens: int, stop: str) -> str:
    tokenizer = small_tokenizer("byte_level_bos")
    ids = torch.tensor([tokenizer(context)["input_ids"]])
    with torch.no_grad():
        for _ in range(tokens):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    text: str = tokenizer.decode(ids[0, -tokens:], skip_special_tokens=True)
    return text.split(stop)[0]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("patch", "options"), PATCHES, ids=lambda value: value if isinstance(value, str) else "")
def test_the_harness_sees_the_model_as_it_is(
    patch: str | None, options: dict[str, Any], batch_size: int, manager: TaskManager
) -> None:
    model = subject(patch, options)
    lm = wrapped(model, max_length=1024, batch_size=batch_size)
    results = run_harness(lm, ["small_choice", "small_generate", "small_rolling"], manager=manager)
    samples = results["samples"]
    assert [len(samples[name]) for name in sorted(samples)] == [3, 3, 3]
    for row in samples["small_choice"]:
        for (context, answer), (response,) in zip(row["arguments"], row["resps"], strict=True):
            expected, greedy = plain_loglikelihood(model, context, answer)
            assert response[0] == pytest.approx(expected, rel=1e-4)
            assert response[1] == greedy
    for row in samples["small_generate"]:
        ((context, settings),) = row["arguments"]
        assert row["resps"] == [[plain_generation(model, context, settings["max_gen_toks"], "e")]]
    for row in samples["small_rolling"]:
        # The text after a BOS, in one window; the tokenizer here writes a BOS of its own behind that one.
        ((text,),) = row["arguments"]
        ids = small_tokenizer("byte_level_bos")(text)["input_ids"]
        read = torch.tensor([[ids[0], *ids[:-1]]])
        with torch.no_grad():
            expected = model(read).logits[0].log_softmax(-1)[range(len(ids)), ids].sum()
        assert row["resps"] == [[pytest.approx(float(expected), rel=1e-4)]]


def test_a_patch_changes_the_results() -> None:
    request = Instance("loglikelihood_rolling", {}, (FILLER * 2,), 0)
    found = [wrapped(subject(*patch)).loglikelihood_rolling([request])[0] for patch in PATCHES]
    assert len(set(found)) == len(PATCHES)


@pytest.mark.parametrize(("patch", "options"), PATCHES[1:], ids=lambda value: value if isinstance(value, str) else "")
def test_the_harnesss_own_wrapper_gives_the_same(
    patch: str | None, options: dict[str, Any], manager: TaskManager
) -> None:
    names = ["small_choice", "small_generate", "small_rolling"]
    ours = run_harness(wrapped(subject(patch, options), max_length=1024), names, manager=manager)
    plain = HFLM(
        pretrained=subject(patch, options), tokenizer=small_tokenizer("byte_level_bos"), max_length=1024, batch_size=1
    )
    theirs = run_harness(plain, names, manager=manager)  # type: ignore[arg-type]
    for name in names:
        assert [row["resps"] for row in ours["samples"][name]] == [row["resps"] for row in theirs["samples"][name]]
    assert ours["results"] == theirs["results"]


@pytest.mark.parametrize("name", ["small_choice", "small_generate"])
def test_what_would_be_cut_is_refused(name: str, manager: TaskManager, caplog: pytest.LogCaptureFixture) -> None:
    """The longest prompt is longer than the trained length. `HFLM` alone drops its beginning, with the key in it."""
    with pytest.raises(PromptError, match=r"has \d+ tokens, .* cut to 256.*larger max_length"):
        run_harness(wrapped(subject()), [name], manager=manager)
    plain = HFLM(pretrained=subject(), tokenizer=small_tokenizer("byte_level_bos"))
    run_harness(plain, [name], manager=manager)  # type: ignore[arg-type]
    assert "runcat" in caplog.text


def test_the_limit_is_exact() -> None:
    context, answer = FILLER, " grass"
    tokenizer = small_tokenizer("byte_level_bos")
    read = len(tokenizer(context.strip() + " " + answer)["input_ids"]) - 1
    generated = len(tokenizer(context)["input_ids"]) + 5
    scored = Instance("loglikelihood", {}, (context, answer), 0)
    asked = Instance("generate_until", {}, (context, {"max_gen_toks": 5, "until": []}), 0)
    assert wrapped(subject(), max_length=read).loglikelihood([scored])
    with pytest.raises(PromptError, match=f"has {read} tokens"):
        wrapped(subject(), max_length=read - 1).loglikelihood([scored])
    assert wrapped(subject(), max_length=generated).generate_until([asked])
    with pytest.raises(PromptError, match=f"has {generated} tokens"):
        wrapped(subject(), max_length=generated - 1).generate_until([asked])


def test_perplexity_slides_over_long_texts(manager: TaskManager) -> None:
    results = run_harness(wrapped(subject(), max_length=64), ["small_rolling"], manager=manager)
    assert results["n-samples"]["small_rolling"] == {"original": 3, "effective": 3}


def test_max_length_is_the_target_length() -> None:
    assert wrapped(subject()).max_length == TRAINED
    assert wrapped(subject("yarn", {"factor": 2})).max_length == 2 * TRAINED
    assert wrapped(subject("yarn", {"factor": 2}), max_length=300).max_length == 300
    with pytest.raises(OptionError, match="positive"):
        wrapped(subject(), max_length=0)


def test_a_config_without_a_length_needs_one() -> None:
    mamba = small_model("mamba")
    assert ropepatch.inspect(mamba).target_length is None
    with pytest.raises(OptionError, match="Say max_length"):
        wrapped(mamba)
    assert wrapped(mamba, max_length=128).max_length == 128


def test_a_table_of_positions_is_a_limit() -> None:
    with pytest.raises(UnsupportedModelError, match="128 tokens only"):
        wrapped(small_model("gpt2", n_positions=128), max_length=129)


def test_a_named_model_is_loaded_and_patched(tiny_model_folder: Path) -> None:
    lm = PatchedLM(str(tiny_model_folder), "yarn", options='{"factor": 2}', dtype="float32", device="cuda:0")
    assert ropepatch.inspect(lm.model).method == "yarn"
    assert lm.max_length == 512
    assert next(lm.model.parameters()).dtype == torch.float32
    ours = lm.get_model_info()["ropepatch"]
    assert (ours["model"], ours["patch"]["method"], ours["max_length"]) == (str(tiny_model_folder), "yarn", 512)
    assert ours["versions"].keys() == {"ropepatch", "torch", "transformers", "lm_eval", "python"}


def test_model_and_tokenizer_are_left_alone(manager: TaskManager) -> None:
    tokenizer = small_tokenizer("letters_only")
    assert tokenizer.pad_token is None
    model = subject("self_extend", {"factor": 4, "window": 32})
    ids = torch.arange(40)[None]
    with torch.no_grad():
        before = model(ids).logits
        run_harness(wrapped(model, max_length=1024), ["small_choice"], manager=manager)
        PatchedLM(model, tokenizer=tokenizer)
        assert torch.equal(model(ids).logits, before)
        ropepatch.unpatch(model)
        assert torch.equal(model(ids).logits, subject()(ids).logits)
    assert tokenizer.pad_token is None


def test_an_adapter_around_the_model_is_fine() -> None:
    from peft import LoraConfig, get_peft_model

    request = Instance("loglikelihood", {}, (FILLER, "grass"), 0)
    bare = wrapped(subject("yarn", {"factor": 2})).loglikelihood([request])
    adapted = get_peft_model(subject("yarn", {"factor": 2}), LoraConfig(target_modules=["q_proj"]))  # adds zero
    lm = wrapped(adapted)
    assert lm.max_length == 2 * TRAINED
    assert lm.loglikelihood([request]) == bare
    assert lm.get_model_info()["ropepatch"]["patch"]["method"] == "yarn"


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"factor": 2}, OptionError, "no argument 'factor'.*into options"),
        ({"parallelize": True}, OptionError, "no argument 'parallelize'"),
        ({"options": {"factor": 2}}, UsageError, "need a patch"),
        ({"patch": "yarn", "options": "factor=2"}, OptionError, "JSON object"),
        ({"patch": "yarn", "options": "[2]"}, OptionError, "JSON object"),
        ({"patch": "yarm", "options": {"factor": 2}}, UnknownNameError, "mean 'yarn'"),
        ({"patch": "yarn", "options": {"factr": 2}}, OptionError, "factor"),
        ({"tokenizer": "another"}, UsageError, "its own tokenizer"),
    ],
)
def test_bad_arguments_of_a_named_model(
    arguments: dict[str, Any], error: type[RopepatchError], match: str, tiny_model_folder: Path
) -> None:
    with pytest.raises(error, match=match):
        PatchedLM(str(tiny_model_folder), **arguments)


def test_bad_arguments_of_a_loaded_model() -> None:
    with pytest.raises(UsageError, match="loaded already"):
        wrapped(subject(), patch="yarn")
    with pytest.raises(UsageError, match="needs its tokenizer"):
        PatchedLM(subject())


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="one process"):
        wrapped(subject())


def test_the_harness_still_has_these_options() -> None:
    import inspect

    assert set(HARNESS_OPTIONS) <= set(inspect.signature(HFLM.__init__).parameters)


def test_chat_template(manager: TaskManager) -> None:
    results = run_harness(wrapped(subject()), ["small_choice"], manager=manager, limit=1, chat_template=True)
    assert results["samples"]["small_choice"][0]["arguments"][0][0].startswith("<s><|user|>\n")
    bare = PatchedLM(subject(), tokenizer=small_tokenizer("word_piece"))
    with pytest.raises(PromptError, match="no chat template"):
        run_harness(bare, ["small_choice"], manager=manager, chat_template=True)


@pytest.mark.parametrize(("limit", "n"), [(1, 1), (2.0, 2), (0.5, 2)])
def test_limit(limit: float, n: int, manager: TaskManager) -> None:
    results = run_harness(wrapped(subject(), max_length=1024), ["small_ch*"], manager=manager, limit=limit)
    assert results["n-samples"]["small_choice"]["effective"] == n


@pytest.mark.parametrize("limit", [0, -1, float("nan")])
def test_limit_out_of_range(limit: float, manager: TaskManager) -> None:
    with pytest.raises(OptionError, match="positive"):
        run_harness(wrapped(subject()), ["small_choice"], manager=manager, limit=limit)


def test_results_are_strict_json_and_a_table(manager: TaskManager) -> None:
    results = run_harness(wrapped(subject(), max_length=1024), ["small_rolling"], manager=manager)
    json.dumps(results, allow_nan=False)
    assert "byte_perplexity" in table(results)
    assert results["config"]["ropepatch"]["patch"] is None
    # One text has a standard error of NaN in the harness, which JSON cannot say.
    json.dumps(run_harness(wrapped(subject()), ["small_choice"], manager=manager, limit=1), allow_nan=False)


def test_a_task_without_its_data_is_one_error(tasks: Path, tmp_path: Path) -> None:
    broken = json.loads((tasks / "small_choice.yaml").read_text())
    broken["dataset_kwargs"]["data_files"]["test"] = str(tmp_path / "missing.jsonl")
    (tmp_path / "broken.yaml").write_text(json.dumps({**broken, "task": "broken"}))
    manager = TaskManager(include_defaults=False, include_path=str(tmp_path))
    with pytest.raises(RopepatchError, match=r"lm-eval failed: FileNotFoundError.*missing\.jsonl"):
        run_harness(wrapped(subject()), ["broken"], manager=manager)


def test_find_tasks(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Few(TaskManager):
        def __init__(self, **more: Any) -> None:
            super().__init__(include_defaults=False, **more)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Few)
    found = find_tasks(["small_choice", "small_g*", str(tasks / "small_rolling.yaml")], include_path=tasks)
    assert found.all_tasks == ["small_choice", "small_generate", "small_rolling"]
    assert find_tasks(["small_choice"], include_path=tasks, metadata={"key": 1}).metadata == {"key": 1}
    with pytest.raises(UnknownNameError, match="no task 'smal_choice'.*Did you mean 'small_choice'"):
        find_tasks(["smal_choice"], include_path=tasks)
    with pytest.raises(UnknownNameError, match="List them with: lm-eval ls tasks"):
        find_tasks(["xyz"], include_path=tasks)
    with pytest.raises(UsageError, match="No task is named"):
        find_tasks([])
    with pytest.raises(UsageError, match="no such folder of tasks"):
        find_tasks(["small_choice"], include_path=tasks / "nowhere")


@pytest.mark.slow
def test_the_harnesss_own_command_line(tiny_model_folder: Path, tasks: Path, tmp_path: Path) -> None:
    arguments = {"pretrained": str(tiny_model_folder), "patch": "yarn", "options": {"factor": 8}, "dtype": "float32"}
    command = [sys.executable, "-m", "ropepatch.evaluation.harness", "run", "--model", "ropepatch"]
    command += ["--model_args", json.dumps(arguments), "--tasks", "small_choice", "--include_path", str(tasks)]
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "small_choice" in done.stdout
    (written,) = tmp_path.rglob("results*.json")
    ours = json.loads(written.read_text())["config"]["ropepatch"]
    assert (ours["patch"]["method"], ours["max_length"]) == ("yarn", 2048)
