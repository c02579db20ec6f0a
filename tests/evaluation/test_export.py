"""Trials as tables for other tools: what is written is what is read back."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from example_runs import YARN, make_loss_run, make_run, trials

from ropepatch.errors import DependencyError, OutputError
from ropepatch.evaluation.compare import compare
from ropepatch.evaluation.comparison import Run
from ropepatch.evaluation.export import trials_table, write_csv, write_parquet

pandas = pytest.importorskip("pandas", reason="tables are pandas's")

HOSTILE = 'a,"b"\n=1+1 ü </td>'


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    base = make_run(tmp_path / "base", trials(lambda *_: 1.0, output=HOSTILE))
    other = make_run(tmp_path / "other", trials(lambda *_: 0.0, answer=None), patch=YARN, dtype="float32")
    return [compare([path], least=1).runs[0] for path in (base, other)]


def rows_of(table: Any) -> list[dict[str, Any]]:
    return json.loads(table.to_json(orient="records"))


def test_a_row_for_each_trial_with_its_run(runs: list[Run]) -> None:
    table = trials_table(runs)
    assert len(table) == 36
    assert list(table["run"].unique()) == ["base", "other"]
    assert set(table.loc[table["run"] == "other", "method"]) == {"yarn"}
    assert json.loads(table["options"].iloc[-1]) == YARN["options"]
    assert list(table.columns[:6]) == ["run", "model", "method", "options", "dtype", "trained_length"]


def test_csv_round_trip(runs: list[Run], tmp_path: Path) -> None:
    write_csv(runs, tmp_path / "a.csv")
    # Keys may begin with 0: whoever reads the file says that they are text.
    found = pandas.read_csv(tmp_path / "a.csv", dtype={"answer": "string"})
    assert rows_of(found) == rows_of(trials_table(runs))
    assert found["output"].iloc[0] == HOSTILE
    assert found["answer"].iloc[0] == "00032"


def test_parquet_round_trip(runs: list[Run], tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="Parquet takes pyarrow")
    write_parquet(runs, tmp_path / "a.parquet")
    assert rows_of(pandas.read_parquet(tmp_path / "a.parquet")) == rows_of(trials_table(runs))


def test_nested_fields_are_json_text(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="Parquet takes pyarrow")
    run = compare([make_loss_run(tmp_path / "a", [[3.0, 2.0]])], least=1).runs[0]
    write_parquet([run], tmp_path / "a.parquet")
    (text,) = pandas.read_parquet(tmp_path / "a.parquet")["by_position"]
    assert json.loads(text) == run.rows[0]["by_position"]


def test_results_read_with_pandas_alone(runs: list[Run]) -> None:
    lines = (runs[0].path / "results.jsonl").read_text("utf-8")
    found = pandas.read_json(io.StringIO(lines), lines=True, dtype={"answer": "string"})
    assert rows_of(found) == runs[0].rows


def test_results_go_into_a_metric_of_evaluate(tmp_path: Path) -> None:
    evaluate = pytest.importorskip("evaluate", reason="a metric is one of the package evaluate (extra: dev)")
    datasets = pytest.importorskip("datasets", reason="results are read with the package datasets")
    text = datasets.Value("string")

    class ExactMatch(evaluate.Metric):  # type: ignore[misc, name-defined]
        def _info(self) -> Any:
            features = datasets.Features(predictions=text, references=text)
            return evaluate.MetricInfo(description="", citation="", features=features)

        def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
            return {"exact_match": sum(p == r for p, r in zip(predictions, references, strict=True)) / len(references)}

    run = make_run(tmp_path / "run", trials(lambda length, depth, trial: float(trial == 0), lengths=(64, 128)))
    file = str(run / "results.jsonl")
    rows = datasets.load_dataset("json", data_files=file, split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.features["answer"] == text  # 00032 stays what it is
    metric = ExactMatch(cache_dir=str(tmp_path / "cache"))
    found = metric.compute(predictions=rows["output"], references=rows["answer"])
    assert found["exact_match"] == pytest.approx(sum(rows["correct"]) / len(rows))
    assert 0 < found["exact_match"] < 1


def test_without_pyarrow_it_is_named_and_nothing_written(
    runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ImportError("Unable to find a usable engine")

    monkeypatch.setattr(pandas.DataFrame, "to_parquet", refuse)
    with pytest.raises(DependencyError, match="pip install pyarrow"):
        write_parquet(runs, tmp_path / "a.parquet")
    assert not (tmp_path / "a.parquet").exists()


def test_a_folder_that_is_not_there_is_named(runs: list[Run], tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="annot write"):
        write_csv(runs, tmp_path / "none" / "a.csv")
