"""Several patches in one run: what single runs give, with one model, resumed, and with variants that are refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small import model, tokenizer

import ropepatch
from ropepatch._data import data_names
from ropepatch.errors import AlreadyPatchedError, OptionError, PromptError, RecordError, UnknownNameError, UsageError
from ropepatch.evaluation import MatrixResult, evaluate, evaluate_matrix
from ropepatch.evaluation.folder import RunFolder
from ropepatch.evaluation.variants import Variant, load_matrix, parse_variants

pytest.importorskip("matplotlib")

GRID: dict[str, Any] = {"lengths": [150, 260], "depths": [0, 1], "trials": 2, "progress": False}
VARIANTS: list[Any] = [
    "unpatched",
    {"method": "yarn", "options": {"factor": 2}},
    {
        "name": "far",
        "method": "dca",
        "options": {"chunk": 96, "layers": [0], "base": {"method": "ntk", "factor": 2}},
    },
]
FOLDERS = ["unpatched", "yarn-2", "far"]


def _matrix(net: Any, variants: Any = VARIANTS, **options: Any) -> MatrixResult:
    return evaluate_matrix(net, tokenizer("byte_level"), "passkey", variants, **{**GRID, **options})


def _rows(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return sorted(({**row, "elapsed_s": 0} for row in rows), key=lambda r: (r["length"], r["depth"], r["trial"]))


def _configuration(folder: Path) -> Any:
    return json.loads((folder / "run.json").read_text())["configuration"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MatrixResult]:
    folder = tmp_path_factory.mktemp("matrix")
    return folder, _matrix(model("llama"), output=folder)


def test_a_matrix_is_its_single_runs(finished: tuple[Path, MatrixResult], tmp_path: Path) -> None:
    folder, result = finished
    assert list(result.results) == FOLDERS
    assert result.folders == {name: folder / name for name in FOLDERS}
    assert not result.refused
    for variant in parse_variants(VARIANTS):
        net = model("llama")
        if variant.method:
            ropepatch.patch(net, variant.method, **variant.options)
        single = tmp_path / variant.name
        alone = evaluate(net, tokenizer("byte_level"), "passkey", output=single, **GRID)
        assert _rows(single) == _rows(folder / variant.name)
        assert _configuration(single) == _configuration(folder / variant.name)
        assert alone.summary == result.results[variant.name].summary
    # Either goes on with what the other began: nothing is left, nothing is refused.
    assert evaluate(net, tokenizer("byte_level"), "passkey", output=folder / variant.name, **GRID).reuse is None
    again = _matrix(model("llama"), output=tmp_path)
    assert all(run.reuse is None for run in again.results.values())


def test_the_comparison_is_written(finished: tuple[Path, MatrixResult]) -> None:
    folder, result = finished
    assert result.comparison is not None
    assert [run.name for run in result.comparison.runs] == FOLDERS
    table = (folder / "comparison.md").read_text()
    assert all(name in table for name in FOLDERS)
    assert "<html" in (folder / "comparison.html").read_text()


def test_one_model_comes_back_as_it_was() -> None:
    net = model("llama")
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    ids = torch.arange(50)[None]
    with torch.no_grad():
        wanted = net(input_ids=ids).logits
        result = _matrix(net, lengths=[150])
        assert torch.equal(net(input_ids=ids).logits, wanted)
    assert ropepatch.record_of(net) is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert result.folders == {} and result.comparison is None
    logprobs = [[row["logprob"] for row in run.trials] for run in result.results.values()]
    assert all(a != b for a, b in itertools.pairwise(logprobs))


def test_a_killed_matrix_goes_on(
    finished: tuple[Path, MatrixResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = model("llama")
    append, count = RunFolder.append, 0

    def kill(self: RunFolder, row: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        if count == 12:  # in the midst of the second variant
            raise KeyboardInterrupt
        append(self, row)

    monkeypatch.setattr(RunFolder, "append", kill)
    with pytest.raises(KeyboardInterrupt):
        _matrix(net, output=tmp_path)
    monkeypatch.undo()
    assert ropepatch.record_of(net) is None
    assert [len(_rows(tmp_path / name)) for name in FOLDERS[:2]] == [8, 3]
    assert not (tmp_path / FOLDERS[2]).exists()
    kept = [(tmp_path / name / "results.jsonl").read_bytes() for name in FOLDERS[:2]]
    result = _matrix(net, output=tmp_path)
    assert (tmp_path / FOLDERS[0] / "results.jsonl").read_bytes() == kept[0]
    assert (tmp_path / FOLDERS[1] / "results.jsonl").read_bytes().startswith(kept[1])
    assert list(result.results) == FOLDERS
    for name in FOLDERS:
        for mine, other in zip(_rows(tmp_path / name), _rows(finished[0] / name), strict=True):
            assert mine == {**other, "logprob": pytest.approx(other["logprob"], abs=1e-3)}


def test_a_refused_variant_is_told_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = model("llama")
    variants = ["unpatched", {"method": "dca", "options": {"layers": [7]}}, "rerope"]
    result = _matrix(net, variants, output=tmp_path, progress=True, lengths=[150])
    assert list(result.results) == ["unpatched", "rerope"]
    assert list(result.refused) == ["dca-layers-7"]
    assert isinstance(result.refused["dca-layers-7"], OptionError)
    assert "dca-layers-7 is left out: " in capsys.readouterr().err
    assert not (tmp_path / "dca-layers-7").exists()
    assert result.comparison is not None
    assert [run.name for run in result.comparison.runs] == ["unpatched", "rerope"]
    assert ropepatch.record_of(net) is None


def test_a_folder_of_another_run_is_told_and_kept(tmp_path: Path) -> None:
    net = model("llama")
    _matrix(net, ["rerope"], output=tmp_path, lengths=[150], seed=1)
    before = (tmp_path / "rerope" / "results.jsonl").read_bytes()
    result = _matrix(net, ["unpatched", "rerope"], output=tmp_path, lengths=[150])
    assert list(result.results) == ["unpatched"]
    assert "seed is 1 there and 0 here" in str(result.refused["rerope"])
    assert (tmp_path / "rerope" / "results.jsonl").read_bytes() == before
    assert result.comparison is None
    assert not (tmp_path / "comparison.md").exists()
    assert ropepatch.record_of(net) is None


@pytest.mark.parametrize(
    ("options", "error"),
    [({"lengths": [20]}, PromptError), ({"trials": 0}, OptionError), ({"dtype": "bfloat16"}, OptionError)],
)
def test_what_holds_for_all_is_refused_at_once(tmp_path: Path, options: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        _matrix(model("llama"), output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_patched_model_is_refused(tmp_path: Path) -> None:
    net = ropepatch.patch(model("llama"), "yarn", factor=2)
    with pytest.raises(AlreadyPatchedError):
        _matrix(net, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_budget_is_shared(tmp_path: Path) -> None:
    result = _matrix(model("llama"), ["unpatched", "rerope"], output=tmp_path, budget=10, lengths=[150])
    spent = [run.summary["budget"] for run in result.results.values()]
    assert spent[0]["minutes"] == pytest.approx(5, abs=0.1)
    assert 8 < spent[1]["minutes"] < 10  # what the first one left
    assert [entry["trials_left"] for entry in spent] == [0, 0]


def test_a_budget_that_is_too_short_is_told_for_each(tmp_path: Path) -> None:
    result = _matrix(model("llama"), ["unpatched", "rerope"], output=tmp_path, budget=1e-9)
    assert list(result.refused) == ["unpatched", "rerope"]
    assert all("budget" in str(error) for error in result.refused.values())


# The variants themselves


@pytest.mark.parametrize(
    ("item", "name"),
    [
        ("unpatched", "unpatched"),
        ({"name": "base", "method": "unpatched"}, "base"),
        ({"name": "base", "method": None}, "base"),
        ("rerope", "rerope"),
        ({"method": "yarn", "options": {"factor": 2}}, "yarn-2"),
        ({"method": "yarn", "options": {"factor": 2.5, "truncate": False}}, "yarn-2.5-truncate-false"),
        ({"method": "rerope", "options": {"base": {"method": "ntk", "factor": 4}}}, "rerope-base-ntk-4"),
        ({"method": "dca", "options": {"layers": [0, 1]}}, "dca-layers-0_1"),
        ({"method": "rerope", "options": {"base": "ntk"}}, "rerope-base-ntk"),
        (Variant(name="mine", method="logn"), "mine"),
    ],
)
def test_names(item: Any, name: str) -> None:
    assert [variant.name for variant in parse_variants([item])] == [name]


@pytest.mark.parametrize(
    ("items", "error", "words"),
    [
        ([], OptionError, "at least one"),
        (["yarrn"], UnknownNameError, "Did you mean 'yarn'"),
        ([{"method": "yarn", "options": {"factr": 2}}], OptionError, "factr"),
        ([{"method": "yarn", "options": {"factor": 0}}], OptionError, "factor"),
        ([{"method": "rerope", "options": {"base": {"method": "ntkk"}}}], UnknownNameError, "ntk"),
        ([{"method": "yarn", "options": {"factor": 2, "model": 1}}], OptionError, "not an option"),
        (["rerope", "rerope"], OptionError, "same name"),
        ([{"name": "A", "method": "logn"}, {"name": "a", "method": "rerope"}], OptionError, "same name"),
        ([{"name": "../up", "method": "logn"}], OptionError, "folder"),
        ([{"name": "a/b", "method": "logn"}], OptionError, "folder"),
        ([{"name": "", "method": "logn"}], OptionError, "folder"),
        ([{"name": ".hidden", "method": "logn"}], OptionError, "folder"),
        ([{"name": 3, "method": "logn"}], OptionError, "ariant 1 is wrong: name"),
        ([{"method": "yarn", "factor": 2}], OptionError, "factor"),
        ([{"method": "yarn", "options": [2]}], OptionError, "options"),
        ([{"options": {"factor": 2}}], OptionError, "names no method"),
        ([{"name": "x", "method": "unpatched", "options": {"factor": 2}}], OptionError, "no method"),
        ([3], OptionError, "ariant 1 is no variant"),
        ([None], OptionError, "ariant 1 is no variant"),
    ],
)
def test_wrong_variants_are_refused(items: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        parse_variants(items)


def test_matrix_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(VARIANTS))
    assert load_matrix(file) == parse_variants(VARIANTS)
    file.write_text("method: yarn")
    with pytest.raises(RecordError, match="not a list"):
        load_matrix(file)
    file.write_text("- {")
    with pytest.raises(RecordError, match="cannot be read"):
        load_matrix(file)
    with pytest.raises(UsageError, match=r"none\.yaml"):
        load_matrix(tmp_path / "none.yaml")
    with pytest.raises(UnknownNameError, match="untuned"):
        load_matrix("untund")


def test_shipped_matrices_are_sound_and_patch_a_real_class() -> None:
    assert "untuned" in data_names("matrices")
    for name in data_names("matrices"):
        variants = load_matrix(name)
        assert len(variants) > 1
        net = model("llama", num_hidden_layers=1)
        for variant in variants:
            if variant.method:
                with ropepatch.patched(net, variant.method, **variant.options):
                    assert ropepatch.inspect(net).method == variant.method
