"""Served models: the same rows as in this process, over real sockets, whatever the network does."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import time
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
import serving
from serving import Server
from small import CHAT_TEMPLATE, model, tokenizer

import ropepatch
from ropepatch.errors import (
    EndpointError,
    OptionError,
    OutputConflictError,
    PromptError,
    UnsupportedModelError,
    UsageError,
)
from ropepatch.evaluation import evaluate
from ropepatch.evaluation.prompt import TextEncoder
from ropepatch.evaluation.served import ServedModel
from ropepatch.evaluation.served import client as client_module
from ropepatch.evaluation.served.prompts import Speller, beyond
from ropepatch.evaluation.task import Grid, Place
from ropepatch.evaluation.tasks.passkey import PasskeyTask

GRID: dict[str, Any] = {"lengths": [150, 200], "depths": [0, 0.5, 1], "trials": 2, "progress": False}
NAME = "byte_level"
OURS = ("task", "length", "depth", "trial", "seed", "answer", "output", "correct", "key_start", "key_end")


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between attempts of a hundredth of a second."""
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0.01)


@pytest.fixture(scope="module")
def plain() -> list[dict[str, Any]]:
    """The rows of the same model in this process."""
    return _ours(evaluate(model("llama"), tokenizer(NAME), "passkey", **GRID).trials)


def _ours(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: row[name] for name in OURS} for row in rows]


def _serving(name: str = NAME, **options: Any) -> Any:
    return serving.serving(model("llama"), tokenizer(name), **options)


def _evaluate(server: Server, served: dict[str, Any] | None = None, name: str = NAME, **options: Any) -> Any:
    subject = ServedModel(server.url, server.name, **{"timeout": 20, **(served or {})})
    return evaluate(subject, tokenizer(name), "passkey", **{**GRID, **options})


@pytest.mark.parametrize("accepts_ids", [True, False])
@pytest.mark.parametrize("concurrency", [1, 3])
def test_rows_are_those_of_the_model_in_this_process(
    accepts_ids: bool, concurrency: int, plain: list[dict[str, Any]]
) -> None:
    with _serving(accepts_ids=accepts_ids) as server:
        result = _evaluate(server, {"concurrency": concurrency})
        assert _ours(result.trials) == plain
        assert server.most_under_way <= concurrency
        assert {type(prompt) for prompt in server.prompts()[2:]} == {list if accepts_ids else str}
    assert result.configuration["endpoint"] == {
        "url": server.url,
        "api": "completions",
        "prompt": "ids" if accepts_ids else "text",
        "served_as": "tiny",
    }
    for row in result.trials:
        assert row["forced"] is None and row["logprob"] is None
        assert row["length_served"] == row["length"]
        assert row.get("same_ids", True)
    assert result.sum_of_prompts == result.tokens_computed == 6 * (150 + 200)
    assert result.trie_size < result.sum_of_prompts
    assert result.summary["by_length"][0]["n"] == 6


def test_requests_share_beginnings_with_the_one_before() -> None:
    with _serving() as server:
        _evaluate(server)
        prompts = server.prompts()[1:]
    assert prompts == sorted(prompts)
    assert len(prompts) == 12


def test_several_requests_are_under_way() -> None:
    with _serving() as server:
        _evaluate(server, {"concurrency": 4}, trials=4)
        assert 1 < server.most_under_way <= 4


@pytest.mark.parametrize("name", ["byte_level_bos", "fused_newlines", "metaspace"])
def test_text_of_a_prompt_is_read_as_its_ids(name: str) -> None:
    """Where it is not (ids were taken out, or the tokenizer appends something) the row says what was read."""
    with _serving(name, accepts_ids=False) as server:
        result = _evaluate(server, name=name, lengths=[170, 171, 172, 173])
        sent = server.prompts()[2:]
    for row in result.trials:
        prompt = PasskeyTask(tokenizer(name), grid=Grid([173])).build(Place.of(row))
        text = tokenizer(name).decode(prompt.ids.tolist(), clean_up_tokenization_spaces=False)
        text = text.removeprefix("<s>")
        assert text in sent
        ids = tokenizer(name)(text)["input_ids"]
        assert row["length_served"] == len(ids)
        if name == "byte_level_bos":
            assert ids[0] == tokenizer(name).bos_token_id != ids[1]
            assert row["same_ids"]
    exact = [row["same_ids"] for row in result.trials]
    if name == "fused_newlines":
        assert not all(exact)


@pytest.mark.parametrize("accepts_ids", [True, False])
def test_a_templated_prompt_goes_out_whole(accepts_ids: bool) -> None:
    """The beginning token that the template writes is not doubled by the server's tokenizer."""
    name = "byte_level_bos"
    options = {**GRID, "lengths": [200], "chat_template": True}
    with _serving(name, accepts_ids=accepts_ids) as server:
        rows = _evaluate(server, name=name, **options).trials
    assert _ours(rows) == _ours(evaluate(model("llama"), tokenizer(name), "passkey", **options).trials)
    assert all(row["length_served"] == 200 and row.get("same_ids", True) for row in rows)


def test_a_server_that_does_not_count_is_counted_for() -> None:
    with _serving("fused_newlines", accepts_ids=False, says_usage=False) as server:
        result = _evaluate(server, name="fused_newlines", lengths=[170, 173])
    for row in result.trials:
        prompt = PasskeyTask(tokenizer("fused_newlines"), grid=Grid([173])).build(Place.of(row))
        text = tokenizer("fused_newlines").decode(prompt.ids.tolist(), clean_up_tokenization_spaces=False)
        assert row["length_served"] == len(tokenizer("fused_newlines")(text)["input_ids"])


def test_a_server_that_cuts_prompts_is_an_error(tmp_path: Path) -> None:
    with _serving(context=160) as server, pytest.raises(EndpointError, match="read 160 of 200 tokens"):
        _evaluate(server, output=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert all(row["length"] == 150 for row in rows)


@pytest.mark.parametrize("facts", [{"max_model_len": 180}, {"meta": {"n_ctx": 180}}])
def test_a_context_that_is_too_short_is_refused_first(facts: dict[str, Any], tmp_path: Path) -> None:
    with _serving(facts=facts) as server, pytest.raises(UnsupportedModelError, match="context of 180 tokens"):
        _evaluate(server, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_trained_length_is_the_servers_or_the_callers() -> None:
    with _serving(facts={"meta": {"n_ctx_train": 4096}}) as server:
        assert _evaluate(server, lengths=[150]).configuration["trained_length"] == 4096
        result = _evaluate(server, {"original_length": 2048}, lengths=[150], model_name="my model")
    assert result.configuration["trained_length"] == result.summary["trained_length"] == 2048
    assert (result.configuration["model"], result.configuration["patch"]) == ("my model", None)
    with _serving(facts=None) as server:
        assert _evaluate(server, lengths=[150]).configuration["trained_length"] is None


# Chat


def test_a_chat_sends_the_users_turn_alone() -> None:
    task = PasskeyTask(tokenizer(NAME), grid=Grid([200]), chat_template=True)
    with _serving() as server:
        result = _evaluate(server, {"api": "chat"}, chat_template=True)
        sent = server.prompts()[1:]
    users = set()
    for row in result.trials:
        prompt = task.build(Place.of(row))
        text = tokenizer(NAME).decode(prompt.ids.tolist(), clean_up_tokenization_spaces=False)
        user = text.removeprefix("<|user|>\n").removesuffix("<|end|>\n<|assistant|>\nThe pass key is")
        users.add(user)
        assert user.startswith("There is an important info") and user.endswith("What is the pass key?")
        # What the reply was to begin with is not sent, and not counted.
        begun = tokenizer(NAME)("The pass key is", add_special_tokens=False)["input_ids"]
        assert row["length_served"] == row["length"] - len(begun)
        assert row["same_ids"]
    assert {message["content"] for messages in sent for message in messages} == users
    assert {message["role"] for messages in sent for message in messages} == {"user"}
    assert result.configuration["endpoint"]["api"] == "chat"


@pytest.mark.parametrize(
    ("reply", "output", "correct", "found"),
    [
        ("{k}", "{k}", 1, 1),
        ("The pass key is {k}.", "{k}", 1, 1),
        (" the pass key is: **{k}**", "{k}", 1, 1),
        ("Sure! It is {k}.", "Sure!", 0, 1),
        ("I do not know.", "I do ", 0, 0),
        ("", "", 0, 0),
    ],
)
def test_what_a_chat_replies_is_graded_twice(reply: str, output: str, correct: int, found: int) -> None:
    task = PasskeyTask(tokenizer(NAME), grid=Grid([200]), chat_template=True)
    key = task.build(Place("passkey", 200, 0.5, 0)).expected
    with _serving(chat_reply=lambda text: reply.format(k=key)) as server:
        result = _evaluate(server, {"api": "chat"}, chat_template=True, lengths=[200], depths=[0.5], trials=1)
    (row,) = result.trials
    assert row["reply"] == reply.format(k=key)
    assert (row["output"], row["correct"], row["found"]) == (output.format(k=key), correct, found)


def test_a_chat_without_template_is_refused() -> None:
    with _serving() as server:
        with pytest.raises(OptionError, match="chat template"):
            _evaluate(server, {"api": "chat"})
        with pytest.raises(PromptError, match="no chat template"):
            _evaluate(server, {"api": "chat"}, name="word_piece", chat_template=True)
    assert server.requests == []


def test_a_server_with_another_template_says_what_it_read() -> None:
    """Templates differ by as much as a system prompt; a prompt that was cut lacks more."""
    name = "byte_level"
    own = copy.deepcopy(tokenizer(name))
    own.chat_template = "<|user|>You are a helpful assistant, always and to everyone.<|end|>\n" + CHAT_TEMPLATE
    extra = len(own("<|user|>You are a helpful assistant, always and to everyone.<|end|>\n")["input_ids"])
    assert extra > 8
    with _serving() as server:
        served = ServedModel(server.url, server.name, api="chat")
        grid = {**GRID, "lengths": [200]}
        rows = evaluate(served, own, "passkey", **grid, chat_template=True).trials
        begun = len(own("The pass key is")["input_ids"])
        assert {row["length_served"] for row in rows} == {200 - begun - extra}
        server.context = 100
        with pytest.raises(EndpointError, match="read 100 of"):
            evaluate(served, own, "passkey", **grid, chat_template=True)


def test_beyond() -> None:
    assert beyond("The pass key is", "The pass key is **12345**.") == "12345**."
    assert beyond("", "\n12345") == "12345"
    assert beyond("The pass key is", "The pass") == "The pass"


def test_a_template_that_is_not_given_back_is_refused() -> None:
    encoder = TextEncoder(tokenizer(NAME), chat_template=True)
    ids = TextEncoder(tokenizer(NAME)).encode("no template around this").ids
    with pytest.raises(PromptError, match="template around"):
        Speller(encoder, "chat").spell(ids)


# What the network does

PASSING = {
    "too many requests": [serving.status(429, Retry_After="0")],
    "500 twice": [serving.status(500), serving.status(503)],
    "closed in the middle": [serving.broken],
    "no JSON": [serving.garbage],
    "silence": [serving.silence(1.5)],
}


@pytest.mark.usefixtures("pauses")
@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_tried_again(fault: str, plain: list[dict[str, Any]]) -> None:
    with _serving() as server:
        original = server.generate
        served = 0

        def generate(ids: list[int], most_tokens: int) -> Any:
            nonlocal served
            served += 1
            if served == 4:  # in the midst of the run
                server.faults.extend(PASSING[fault])
            return original(ids, most_tokens)

        server.generate = generate  # type: ignore[method-assign]
        assert _ours(_evaluate(server, {"timeout": 0.7 if fault == "silence" else 20}).trials) == plain
        assert not server.faults


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_server_says_how_long_to_wait(form: str) -> None:
    import datetime

    asked = (
        "1"
        if form == "seconds"
        else format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=2), usegmt=True)
    )
    with _serving() as server:
        server.faults.append(serving.status(429, Retry_After=asked))
        began = time.monotonic()
        _evaluate(server, lengths=[150], depths=[0.5], trials=1)
        assert 0.9 <= time.monotonic() - began < 5


def test_a_server_that_asks_for_an_hour_is_an_error() -> None:
    with _serving() as server:
        server.faults.append(serving.status(429, {"error": {"message": "quota"}}, Retry_After="3600"))
        with pytest.raises(EndpointError, match="asks to wait 3600 s.*quota"):
            _evaluate(server)


@pytest.mark.usefixtures("pauses")
def test_retries_are_bounded() -> None:
    with _serving() as server:
        server.faults.extend([serving.status(500, {"error": "out of luck"})] * 50)
        with pytest.raises(EndpointError, match="after 3 attempts.*out of luck.*same command goes on"):
            _evaluate(server, {"retries": 2})
        # The same for ids and for text, then no more.
        assert len(server.prompts()) == 6


def test_pauses_double_and_differ() -> None:
    import random

    waited: list[float] = []
    with _serving() as server:
        subject = ServedModel(server.url, "tiny", retries=8)
        client = subject.client()
        client._stopping.wait = waited.append  # type: ignore[assignment, method-assign]
        server.faults.extend([serving.status(500)] * 9)
        random.seed(0)
        with pytest.raises(EndpointError):
            client.post("/completions", {})
    assert len(waited) == 8
    for attempt, seconds in enumerate(waited):
        assert min(60, 2**attempt) / 2 <= seconds <= min(60, 2**attempt)


def test_a_refusal_is_not_tried_again() -> None:
    with _serving() as server:
        server.faults.extend([serving.status(400, {"error": {"message": "no such thing"}})] * 2)
        with pytest.raises(EndpointError, match="refuses: status 400: no such thing") as caught:
            _evaluate(server)
        assert len(server.prompts()) == 2
        assert caught.value.status == 400
        server.faults.extend([serving.nonsense] * 2)
        with pytest.raises(EndpointError, match="without a text"):
            _evaluate(server)


def test_an_unknown_model_suggests() -> None:
    with (
        serving.serving(None, tokenizer(NAME), "my-model") as server,
        pytest.raises(EndpointError, match="Did you mean 'my-model'"),
    ):
        evaluate(ServedModel(server.url, "my-modle"), tokenizer(NAME), "passkey", **GRID)


def test_nobody_there_is_said_at_once(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(EndpointError, match="cannot be reached"):
        evaluate(
            ServedModel(f"http://127.0.0.1:{port}/v1", "tiny"),
            tokenizer(NAME),
            "passkey",
            **GRID,
            output=tmp_path / "r",
        )
    assert time.monotonic() - began < 1
    assert not (tmp_path / "r").exists()


@pytest.mark.usefixtures("pauses")
@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_server_that_dies_loses_no_trial(concurrency: int, tmp_path: Path, plain: list[dict[str, Any]]) -> None:
    options = {"concurrency": concurrency, "retries": 2}
    with _serving(dies_after=6) as server:
        with pytest.raises(EndpointError, match="(?i)finished trials are kept"):
            _evaluate(server, options, output=tmp_path)
        port = server.port
    kept = (tmp_path / "results.jsonl").read_text()
    assert kept.count("\n") == 5  # and one request was the first try
    with _serving(port=port) as server:
        result = _evaluate(server, options, output=tmp_path)
        assert len(server.prompts()) == 1 + 7
    assert _ours(result.trials) == plain
    assert (tmp_path / "results.jsonl").read_text().startswith(kept)
    assert json.loads((tmp_path / "summary.json").read_text())["trials"] == 12


def test_another_way_or_server_is_another_configuration(tmp_path: Path) -> None:
    with _serving() as server:
        _evaluate(server, output=tmp_path, lengths=[150])
        server.accepts_ids = False
        with pytest.raises(OutputConflictError, match='endpoint.prompt is "ids" there and "text" here'):
            _evaluate(server, output=tmp_path, lengths=[150])
    with pytest.raises(OutputConflictError, match="endpoint"):
        evaluate(model("llama"), tokenizer(NAME), "passkey", **{**GRID, "lengths": [150]}, output=tmp_path)


@pytest.mark.usefixtures("pauses")
def test_an_interrupt_does_not_wait_for_the_server(tmp_path: Path) -> None:
    """What is under way is dropped at once, what is finished is kept."""
    with _serving() as server:
        original = server.generate
        count = 0

        def generate(ids: list[int], most_tokens: int) -> Any:
            nonlocal count
            count += 1
            if count > 4:
                time.sleep(3)
            return original(ids, most_tokens)

        server.generate = generate  # type: ignore[method-assign]
        served = ServedModel(server.url, server.name, concurrency=2)
        from ropepatch.evaluation.served import served_job
        from ropepatch.evaluation.sharding import Ranks
        from ropepatch.evaluation.suites import load_suite

        settings = {name: value for name, value in GRID.items() if name != "progress"}
        job = served_job(served, load_suite("passkey", settings), tokenizer(NAME), dtype=None, chunk_size=None)
        rows = job.rows(job.places(), Ranks(), progress=False)
        assert next(rows)["length"] in (150, 200)
        began = time.monotonic()
        rows.close()
        assert time.monotonic() - began < 2


# The key


def test_the_key_is_sent_and_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "sk-very-secret-0123456789"
    monkeypatch.setenv("MY_KEY", secret)
    with _serving(key=secret) as server:
        _evaluate(server, {"api_key_env": "MY_KEY"}, output=tmp_path, lengths=[150], progress=True)
        assert all(headers["Authorization"] == f"Bearer {secret}" for _, headers, _ in server.requests)
        assert secret not in repr(ServedModel(server.url, "tiny", api_key_env="MY_KEY"))
        # A server that repeats a wrong key does not spread it either.
        server.key = "another"
        with pytest.raises(EndpointError, match=r"status 401: wrong key: Bearer \*\*\*") as caught:
            _evaluate(server, {"api_key_env": "MY_KEY"})
    assert secret not in f"{caught.value}{caught.value.__cause__}{capsys.readouterr()}"
    assert all(secret.encode() not in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    with _serving() as server:
        _evaluate(server, lengths=[150])
        assert all("Authorization" not in headers for _, headers, _ in server.requests)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"endpoint": "127.0.0.1:8080/v1"}, "no base URL"),
        ({"endpoint": "ftp://host/v1"}, "no base URL"),
        ({"endpoint": "http://host:port/v1"}, "no base URL"),
        ({"endpoint": "http://me:secret@host/v1"}, "holds credentials"),
        ({"endpoint": "http://host/v1?key=secret"}, "holds credentials"),
        ({"model": ""}, "name at the server"),
        ({"api": "chats"}, "did you mean 'chat'"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"retries": -1}, "retries"),
        ({"concurrency": 0}, "concurrency"),
        ({"original_length": 0}, "original_length"),
        ({"api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY holds no API key"),
        ({"api_key_env": "SPOILT_KEY"}, "cannot be sent"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPOILT_KEY", "secret key\n")
    with pytest.raises(OptionError, match=f"(?i){words}") as caught:
        ServedModel(**{"endpoint": "http://127.0.0.1:1/v1", "model": "tiny", **options})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("suite", "options", "error", "words"),
    [
        ("passkey", {"dtype": "float32"}, OptionError, "dtype"),
        ("passkey", {"chunk_size": 5}, OptionError, "chunk_size"),
        ("passkey", {"lengths": [20]}, PromptError, "too short"),
        ("perplexity", {}, UsageError, "perplexity needs the model's probabilities"),
    ],
)
def test_what_a_served_model_cannot(suite: str, options: dict[str, Any], error: type[Exception], words: str) -> None:
    if suite == "perplexity":
        from ropepatch.evaluation.suites import suite_names

        if suite not in suite_names():
            pytest.skip("needs the suite perplexity")
        options = {"text": __file__}
    grid = GRID if suite == "passkey" else {"progress": False}
    with _serving() as server, pytest.raises(error, match=f"(?i){words}"):
        evaluate(ServedModel(server.url, "tiny"), tokenizer(NAME), suite, **{**grid, **options})
    assert server.prompts() == [] or words == "too short"


def test_a_redirect_takes_the_key_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with _serving() as elsewhere, _serving() as server:
        server.faults.extend([serving.status(307, Location=f"{elsewhere.url}/completions")] * 2)
        with pytest.raises(EndpointError, match="status 307"):
            _evaluate(server)
    assert elsewhere.requests == []


def test_a_budget(tmp_path: Path) -> None:
    with _serving() as server:
        result = _evaluate(server, {"concurrency": 2}, budget=1, output=tmp_path)
    assert len(result.trials) == 12
    assert result.summary["budget"]["trials_left"] == 0


@pytest.mark.slow
def test_transformers_serve(tiny_model_folder: Path, tmp_path: Path) -> None:
    """transformers' own server, which takes text, against the same model in this process."""
    missing = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"transformers serve needs {', '.join(missing)}: pip install 'transformers[serving]'")
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    net, own = ropepatch.load_model(folder, dtype="float32")
    own.chat_template = CHAT_TEMPLATE
    own.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    command += ["--port", str(port), "--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32"]
    grid = {**GRID, "lengths": [200, 220], "depths": [0, 1]}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait_for(port, process, tmp_path / "log")
            served = ServedModel(f"http://127.0.0.1:{port}/v1", str(folder), timeout=60)
            result = evaluate(served, own, "passkey", **grid)
            chat = ServedModel(served.endpoint, str(folder), timeout=60, api="chat")
            replies = evaluate(chat, own, "passkey", **grid, chat_template=True).trials
        finally:
            process.terminate()
            process.wait()
    assert _ours(result.trials) == _ours(evaluate(net, own, "passkey", **grid).trials)
    assert result.configuration["endpoint"]["prompt"] == "text"
    assert all(row["length_served"] == row["length"] for row in result.trials)
    task = PasskeyTask(own, grid=Grid([220]), chat_template=True)
    for row in replies:
        ids = task.build(Place.of(row)).ids[: row["length_served"]]
        assert row["same_ids"] and own.decode(ids).endswith("<|assistant|>\n")
        # Cut short, a text may end within a character.
        assert row["reply"].startswith(Server(net, own).generate(ids.tolist(), 20)[0].rstrip("\ufffd"))


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(log.read_text())
