"""The command frame: verbs, help, errors, exit statuses, value parsing; and the verbs inspect and methods."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner, Result

import ropepatch
from ropepatch.cli import _shared
from ropepatch.cli.app import VERBS, app
from ropepatch.errors import OptionError, UsageError


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), prog_name="ropepatch")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_help_lists_every_verb_with_its_line() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for verb, line in VERBS.items():
        assert f"{verb} " in result.stdout
        assert line in result.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples(verb: str) -> None:
    result = run(verb, "--help")
    assert result.exit_code == 0
    assert f"ropepatch {verb}" in result.stdout
    assert "Examples:" in result.stdout
    assert importlib.import_module(f"ropepatch.cli.{verb.replace('-', '_')}").main.__doc__


def test_every_verb_file_is_listed() -> None:
    folder = Path(importlib.import_module("ropepatch.cli").__file__ or "").parent
    files = {path.stem for path in folder.glob("*.py")} - {"app"}
    assert {name.replace("_", "-") for name in files if not name.startswith("_")} == set(VERBS)


def test_no_arguments_print_the_help() -> None:
    result = run()
    assert result.exit_code == 2
    assert "Commands:" in result.output


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"ropepatch {ropepatch.__version__}\n")


def test_python_dash_m() -> None:
    done = subprocess.run([sys.executable, "-m", "ropepatch", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"ropepatch {ropepatch.__version__}\n"


def test_unknown_verb_suggests() -> None:
    result = run("mehtods")
    assert result.exit_code == 2
    assert "Did you mean 'methods'?" in result.stderr


@pytest.mark.parametrize("arguments", [("--nonsense",), ("methods", "--nonsense"), ("inspect",)])
def test_wrong_usage_exits_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr


def test_an_error_is_one_line_on_stderr() -> None:
    result = run("methods", "yarm")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("ropepatch: error: Unknown method 'yarm'.")


def test_debug_lets_the_error_through() -> None:
    result = run("--debug", "methods", "yarm")
    assert isinstance(result.exception, ropepatch.UnknownNameError)


def test_an_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ropepatch.api.methods", interrupt)
    assert run("methods").exit_code == 130


def test_a_bug_is_not_dressed_up_as_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("ropepatch.api.methods", bug)
    assert isinstance(run("methods").exception, ZeroDivisionError)


# --- value parsing


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4), ("-1", -1), ("4.0", 4.0), (".5", 0.5), ("1e-4", 1e-4), ("true", True), ("False", False),
        ("none", None), ("null", None), ("[1, 2.5]", [1, 2.5]), ("half", "half"), ("a=b", "a=b"), ("", ""),
        ('"4"', "4"),
    ],
)  # fmt: skip
def test_set_values_are_typed(text: str, value: Any) -> None:
    parsed = _shared.parse_settings([f"key={text}"])["key"]
    assert parsed == value
    assert type(parsed) is type(value)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]+", fullmatch=True),
        st.one_of(st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False), st.lists(st.integers())),
    )
)
def test_set_round_trips_json(options: dict[str, Any]) -> None:
    assert _shared.parse_settings([f"{key}={json.dumps(value)}" for key, value in options.items()]) == options


@pytest.mark.parametrize("items", [["factor"], ["=4"], [" = 4"], ["factor=4", "factor=8"]])
def test_malformed_settings_are_refused(items: list[str]) -> None:
    with pytest.raises(OptionError, match="--set"):
        _shared.parse_settings(items)


def test_number_lists() -> None:
    assert _shared.parse_ints("1024, 2048", name="--lengths") == [1024, 2048]
    assert _shared.parse_floats("0,0.5,1", name="--depths") == [0.0, 0.5, 1.0]
    for text in ("", "1024,", "1,two", "1.5"):
        with pytest.raises(UsageError, match="--lengths takes whole numbers"):
            _shared.parse_ints(text, name="--lengths")


def test_json_refuses_what_json_cannot_say() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        _shared.print_json({"x": float("nan")})


# --- methods


def test_methods_table_and_json_agree() -> None:
    document = json.loads(run("methods", "--json").stdout)
    table = run("methods").stdout
    assert [info["name"] for info in document] == [info.name for info in ropepatch.methods()]
    for info in document:
        assert f"\n{info['name']} " in table
        assert info["summary"] in table


def test_one_method_by_alias() -> None:
    document = json.loads(run("methods", "pi", "--json").stdout)
    assert document["name"] == "linear"
    text = run("methods", "pi").stdout
    assert document["summary"] in text
    assert "factor" in text


# --- inspect


def test_inspect_table(llama: Path) -> None:
    result = run("inspect", str(llama))
    assert result.exit_code == 0, result.stderr
    assert "rotary" in result.stdout
    assert "128 tokens" in result.stdout


def test_inspect_reads_the_config_and_not_the_weights(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    bare = json.loads(run("inspect", str(tmp_path), "--json").stdout)
    whole = LlamaForCausalLM.from_pretrained(llama)
    assert bare == ropepatch.inspect(whole).to_dict()


def test_inspect_with_a_patch_leaves_the_folder_alone(llama: Path) -> None:
    before = {path.name: path.read_bytes() for path in llama.iterdir()}
    result = run("inspect", str(llama), "--patch", "linear", "--set", "factor=4", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert (document["method"], document["trained_length"], document["target_length"]) == ("linear", 128, 512)
    assert document["options"] == {"factor": 4.0}
    assert before == {path.name: path.read_bytes() for path in llama.iterdir()}


def test_inspect_names_the_mechanism_of_models_that_no_causal_lm_loader_takes(tmp_path: Path) -> None:
    bert = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    t5 = T5Config(vocab_size=64, d_model=32, d_kv=16, num_layers=1, num_heads=2, d_ff=32)
    for model, mechanism in ((BertModel(bert), "learned"), (T5ForConditionalGeneration(t5), "relative_bias")):
        folder = tmp_path / mechanism
        model.save_pretrained(folder)
        assert json.loads(run("inspect", str(folder), "--json").stdout)["mechanism"] == mechanism


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("--set", "factor=4"), 2, "--set needs --patch"),
        (("--patch", "linaer"), 2, "Did you mean 'linear'?"),
        (("--patch", "linear", "--set", "facter=4"), 2, "facter"),
        (("--patch", "linear", "--set", "factor=-1"), 2, "factor"),
        (("--patch", "linear", "--set", "factor"), 2, "--set takes NAME=VALUE"),
        (("--patch", "linear", "--set", "model=x"), 2, "not an option"),
    ],
)
def test_inspect_refuses_a_wrong_patch(arguments: tuple[str, ...], status: int, words: str, llama: Path) -> None:
    result = run("inspect", str(llama), *arguments)
    assert result.exit_code == status
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert words in result.stderr


def test_inspect_of_a_missing_or_corrupt_folder(tmp_path: Path) -> None:
    (tmp_path / "corrupt").mkdir()
    (tmp_path / "corrupt" / "config.json").write_text("{not json", encoding="utf-8")
    (tmp_path / "alien").mkdir()
    (tmp_path / "alien" / "config.json").write_text('{"model_type": "alien"}', encoding="utf-8")
    for name, words in {"absent": "is not a model folder", "corrupt": "Cannot read", "alien": "Cannot read"}.items():
        result = run("inspect", str(tmp_path / name))
        assert result.exit_code == 1
        assert words in result.stderr
        assert result.stderr.count("\n") == 1
