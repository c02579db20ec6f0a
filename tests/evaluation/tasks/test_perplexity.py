"""Perplexity against brute force: the loss of each token by itself, its context cut by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small import model, tokenizer

import ropepatch
from ropepatch.errors import OptionError, OutputConflictError, PromptError, RopepatchError, UnsupportedModelError
from ropepatch.evaluation import EvaluationResult, evaluate
from ropepatch.evaluation.perplexity.documents import Document, default_documents, read_documents, tokenise
from ropepatch.evaluation.perplexity.job import PerplexityJob
from ropepatch.evaluation.perplexity.loss import token_losses
from ropepatch.evaluation.perplexity.scorer import buckets, scorer
from ropepatch.evaluation.perplexity.summary import loss_interval, summarise
from ropepatch.evaluation.perplexity.windows import windows
from ropepatch.evaluation.prompt import TextEncoder
from ropepatch.evaluation.sharding import Ranks
from ropepatch.evaluation.suites import load_suite
from ropepatch.evaluation.task import Place
from ropepatch.evaluation.tasks.perplexity import PerplexitySuite

WORDS = [
    "the",
    "grass",
    "is",
    "green",
    "sky",
    "blue",
    "sun",
    "here",
    "we",
    "go",
    "there",
    "and",
    "back",
    "é",
    "汉",
    "𝄞",
]
ENDS = [" ", ". ", "\n\n"]
NAME = "byte_level"


def _text(words: int, seed: int = 0) -> str:
    draw = np.random.default_rng(seed)
    return "".join(WORDS[draw.integers(len(WORDS))] + ENDS[draw.integers(len(ENDS))] for _ in range(words))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    texts = tmp_path / "texts"
    (texts / "more").mkdir(parents=True)
    for name, words in (("b.txt", 30), ("a.txt", 60), ("more/c.txt", 9)):
        (texts / name).write_text(_text(words, len(name) + words), encoding="utf-8")
    (texts / "notes.md").write_text("not a document")
    return texts


def _run(net: Any, text: Any, name: str = NAME, **options: Any) -> EvaluationResult:
    return evaluate(net, tokenizer(name), "perplexity", text=text, progress=False, **options)


def _ids(path: Path, name: str = NAME) -> list[int]:
    return tokenizer(name)(path.read_text(encoding="utf-8"), verbose=False)["input_ids"]


@torch.no_grad()
def _loss(net: Any, context: list[int], token: int) -> float:
    """One forward for one token, in float64 from the logits on."""
    logits = net(torch.tensor([context]), use_cache=False).logits[0, -1].double()
    return float(logits.logsumexp(-1) - logits[token])


def _oracle(net: Any, ids: list[int], window: int, stride: int, prefix: list[int]) -> list[float]:
    """By the definition, token by token: the first window that holds a token scores it."""
    room, losses = window - len(prefix), []
    back = stride == room and not prefix  # such a window reaches one token further back
    for token in range(1 - len(prefix), len(ids)):
        start = next(start for start in range(0, len(ids), stride) if start <= token < start + room)
        losses.append(_loss(net, prefix + ids[max(0, start - back) : token], ids[token]))
    return losses


# -- windows


@given(tokens=st.integers(1, 200), window=st.integers(2, 60), data=st.data(), prefix=st.integers(0, 1))
@settings(max_examples=300)
def test_every_token_is_scored_once_with_context(tokens: int, window: int, data: Any, prefix: int) -> None:
    stride = data.draw(st.integers(1, window - prefix))
    found = windows(tokens, window, stride, prefix=prefix)
    scored = [token for w in found for token in range(w.first, w.end)]
    assert scored == list(range(1 - prefix, tokens))
    for number, w in enumerate(found):
        # The last token is predicted, not read.
        assert prefix + w.end - 1 - w.start <= window
        assert 0 <= w.start <= w.first < w.end
        assert prefix + w.first - w.start >= max(1 if number or not prefix else 0, window - stride if number else 0)
        assert w.start % stride == 0 or (stride == window and w.start % stride == stride - 1)


def test_windows_of_the_usual_recipe() -> None:
    """The loop that evaluation scripts share: begin, end, and how many labels count."""
    tokens, window, stride = 103, 32, 8
    expected, before = [], 0
    for begin in range(0, tokens, stride):
        end = min(begin + window, tokens)
        expected.append((begin, max(before, 1), end))
        before = end
        if end == tokens:
            break
    assert [tuple(w) for w in windows(tokens, window, stride)] == expected


# -- losses


@given(rows=st.integers(1, 40), vocabulary=st.integers(2, 300), block=st.integers(1, 2000))
@settings(max_examples=40)
def test_token_losses_are_log_softmax(rows: int, vocabulary: int, block: int) -> None:
    draw = torch.Generator().manual_seed(rows * vocabulary)
    logits = torch.randn(rows, vocabulary, generator=draw) * 10
    targets = torch.randint(0, vocabulary, (rows,), generator=draw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ropepatch.evaluation.perplexity.loss._BLOCK_ELEMENTS", block)
        nll, hits = token_losses(logits, targets.numpy())
    expected = -logits.double().log_softmax(-1)[range(rows), targets]
    np.testing.assert_allclose(nll, expected.numpy(), rtol=1e-5, atol=1e-5)
    assert hits.tolist() == (logits.argmax(-1) == targets).tolist()


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = torch.randn(4, 5000).bfloat16()
    nll, _ = token_losses(logits, np.arange(4))
    expected = -logits.double().log_softmax(-1)[range(4), range(4)]
    np.testing.assert_allclose(nll, expected.numpy(), rtol=1e-5)


def test_of_equal_logits_the_first_is_the_most_likely() -> None:
    logits = torch.randint(0, 3, (200, 7), generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = np.arange(200) % 7
    _, hits = token_losses(logits, targets)
    expected = [
        int(row.tolist().index(max(row.tolist()))) == target for row, target in zip(logits, targets, strict=True)
    ]
    assert hits.tolist() == expected
    assert {True, False} == set(expected)


def _net(kind: str) -> Any:
    """`softcap` is Gemma 2: caps on scores and logits, sliding windows; `granite` scales its logits."""
    import transformers as t

    common = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    if kind == "softcap":
        config = t.Gemma2Config(**common, **heads, head_dim=8, sliding_window=24, final_logit_softcapping=3.0)
        return t.Gemma2ForCausalLM(config).eval()
    if kind == "granite":
        return t.GraniteForCausalLM(t.GraniteConfig(**common, **heads, logits_scaling=4.0)).eval()
    return model(kind)


KINDS = ("llama", "gemma3", "gpt2", "falcon", "mamba", "softcap", "granite")


@pytest.mark.parametrize("rows", [None, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_scorer_equals_one_forward(kind: str, rows: int | None) -> None:
    """Whether in one forward, over a cache, or in several forwards; for any number of scored tokens."""
    net = _net(kind)
    ids = np.random.default_rng(1).integers(5, 500, 90).astype(np.int32)
    with torch.no_grad():
        logits = net(torch.from_numpy(ids.astype("int64"))[None], use_cache=False).logits[0].double()
    expected = -logits.log_softmax(-1)[range(89), ids[1:].astype("int64")].numpy()
    with pytest.MonkeyPatch.context() as patch:
        if rows is not None:
            patch.setattr("ropepatch.evaluation.perplexity.scorer.LOGIT_BYTES", rows * 512 * 4)
        with scorer(net, ids, chunk_size=4096) as ready:
            assert ready.pieces == (kind != "mamba")
            assert (ready.reason is None) == ready.pieces
            seen: list[int] = []
            hook = net.get_output_embeddings().register_forward_hook(lambda m, a, out: seen.append(out.shape[1]))
            for first in (1, 2, 40, 86, 89):
                losses = ready.score(ids, first)
                np.testing.assert_allclose(losses.nll, expected[first - 1 :], atol=2e-3, rtol=1e-4)
            hook.remove()
    if rows is not None:
        assert max(seen) <= rows


@given(
    kind=st.sampled_from(["llama", "gemma3", "softcap", "mamba"]),
    n=st.integers(2, 40),
    window=st.integers(2, 30),
    data=st.data(),
    bos=st.sampled_from(["auto", "true", "false"]),
)
@settings(max_examples=20)
def test_windows_equal_brute_force(kind: str, n: int, window: int, data: Any, bos: str) -> None:
    stride = data.draw(st.integers(1, window - (bos == "true")))
    name, net = "byte_level_bos", _net(kind)
    ids = [int(i) for i in np.random.default_rng(n).integers(5, 400, n)]
    text = tokenizer(name).decode(ids)
    ids = tokenizer(name)(text, add_special_tokens=False)["input_ids"]
    assume(len(ids) > 1)
    suite = PerplexitySuite(task="perplexity", window=window, stride=stride, bos=bos)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ropepatch.evaluation.perplexity.scorer.LOGIT_BYTES", 7 * 512 * 4)
        patch.setattr("ropepatch.evaluation.perplexity.job.default_documents", lambda: [Document("x", "x", text)])
        made = PerplexityJob(net, tokenizer(name), suite)
        (row,) = made.rows(made.places(), Ranks(), progress=False)
    start = [tokenizer(name).bos_token_id]
    whole, prefix = {"auto": (start + ids, []), "true": (ids, start), "false": (ids, [])}[bos]
    expected = _oracle(net, whole, window, stride, prefix)
    assert row["tokens_scored"] == len(expected) == len(whole) + len(prefix) - 1
    assert row["length"] == len(expected) + 1
    assert row["nll"] == pytest.approx(sum(expected), rel=1e-3, abs=1e-2)


# -- from end to end


@pytest.mark.parametrize("stride", [1, 13, 32])
def test_a_run_is_what_brute_force_gives(folder: Path, stride: int) -> None:
    net = model("llama")
    result = _run(net, str(folder), window=32, stride=stride, bucket=10)
    files = [folder / name for name in ("a.txt", "b.txt", "more/c.txt")]
    every, at = [], {}
    for row in result.trials:
        ids = _ids(files[row["trial"]])
        expected = _oracle(net, ids, 32, stride, [])
        assert row["answer"] == files[row["trial"]].relative_to(folder).as_posix()
        assert row["nll"] == pytest.approx(sum(expected), rel=1e-4)
        assert row["tokens_scored"] == len(ids) - 1 == row["length"] - 1
        assert (row["depth"], row["output"]) == (None, "")
        text = files[row["trial"]].read_text(encoding="utf-8")
        assert row["bytes"] == len(text.encode()) - len(tokenizer(NAME).decode(ids[:1]).encode())
        assert sum(bucket["tokens"] for bucket in row["by_position"]) == row["tokens_scored"]
        every += expected
        for token, loss in enumerate(expected, start=1):
            start = next(s for s in range(0, len(ids), stride) if s <= token < s + 32)
            at.setdefault((token - max(0, start - (stride == 32))) // 10, []).append(loss)
    assert [row["trial"] for row in sorted(result.trials, key=lambda row: row["trial"])] == [0, 1, 2]
    summary = result.summary
    assert summary["perplexity"] == pytest.approx(math.exp(np.mean(every)), rel=1e-4)
    assert summary["tokens_scored"] == len(every)
    size = sum(row["bytes"] for row in result.trials)
    assert summary["bits_per_byte"] == pytest.approx(sum(every) / math.log(2) / size, rel=1e-4)
    for bucket in summary["by_position"]:
        losses = at[bucket["start"] // 10]
        assert (bucket["tokens"], bucket["end"]) == (len(losses), bucket["start"] + 10)
        assert bucket["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert [entry["name"] for entry in summary["documents"]] == ["a.txt", "b.txt", "more/c.txt"]
    assert result.tokens_computed == sum(
        w.end - 1 - w.start for file in files for w in windows(len(_ids(file)), 32, stride)
    )


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "softcap", "falcon"])
def test_single_pass_is_one_forward(folder: Path, kind: str) -> None:
    net = _net(kind)
    result = _run(net, [str(folder / "a.txt")], form="single_pass", chunk_size=17, lengths=[16, 64], bucket=50)
    ids = _ids(folder / "a.txt")
    with torch.no_grad():
        logits = net(torch.tensor([ids]), use_cache=False).logits[0].double()
    expected = -logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]].numpy()
    (row,) = result.trials
    assert row["nll"] == pytest.approx(expected.sum(), rel=1e-4)
    assert row["correct"] == pytest.approx(
        float((logits.argmax(-1)[:-1].numpy() == np.asarray(ids[1:])).mean()), abs=0.02
    )
    assert [(b["start"], b["tokens"]) for b in row["by_position"]][:2] == [(0, 49), (50, 50)]
    for entry, length in zip(result.summary["by_length"], (16, 64), strict=True):
        assert (entry["length"], entry["tokens"], entry["n"]) == (length, length - 1, 1)
        assert entry["perplexity"] == pytest.approx(math.exp(expected[: length - 1].mean()), rel=1e-3)
    assert result.tokens_computed == len(ids) - 1
    assert result.summary["ci_low"] is None
    assert "at least two" in result.summary["interval"]


PATCHES: list[tuple[str, dict[str, Any]]] = [
    ("yarn", {"factor": 4, "original_length": 32}),
    ("self_extend", {"factor": 4, "original_length": 32}),
    ("dynamic_ntk", {"original_length": 32}),
    ("lm_infinite", {"original_length": 32}),
    ("streaming", {"original_length": 32}),
]


@pytest.mark.parametrize("form", ["sliding", "single_pass"])
@pytest.mark.parametrize(("method", "options"), PATCHES)
def test_patched_model(folder: Path, method: str, options: dict[str, Any], form: str) -> None:
    net = model("llama")
    unpatched = _run(net, str(folder / "b.txt"), window=64, stride=16).trials[0]["nll"]
    with ropepatch.patched(net, method, **options):
        grid = {"window": 64, "stride": 16} if form == "sliding" else {"form": "single_pass", "chunk_size": 20}
        result = _run(net, str(folder / "b.txt"), **grid)
        ids = _ids(folder / "b.txt")
        reach = 64 if form == "sliding" else 10_000
        expected = _oracle(net, ids, reach, 16 if form == "sliding" else reach, [])
    assert result.trials[0]["nll"] == pytest.approx(sum(expected), rel=1e-3)
    assert abs(sum(expected) - unpatched) > 0.05
    assert result.summary["title"].startswith(method)


def test_transformers_own_dynamic_scaling(folder: Path) -> None:
    """Its angles follow the longest input so far: every window must be scored as if it were the first."""
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    net = model("llama", max_position_embeddings=24, rope_parameters=scaling)
    result = _run(net, str(folder / "b.txt"), window=40, stride=10)
    ids = _ids(folder / "b.txt")
    expected = 0.0
    for w in windows(len(ids), 40, 10):
        with torch.no_grad():
            net(torch.tensor([ids[:1]]))
            logits = net(torch.tensor([ids[w.start : w.end - 1]]), use_cache=False).logits[0].double()
        rows = range(w.first - w.start - 1, w.end - w.start - 1)
        expected -= float(logits.log_softmax(-1)[rows, ids[w.first : w.end]].sum())
    assert result.trials[0]["nll"] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(UnsupportedModelError, match="dynamic rotary embedding.*form=sliding"):
        _run(net, str(folder / "b.txt"), form="single_pass")


def test_bos_settings_agree_on_what_is_counted(folder: Path) -> None:
    net, name = model("llama"), "byte_level_bos"
    size = len(_ids(folder / "a.txt", name)) - 1
    counted = {
        bos: _run(net, str(folder / "a.txt"), name, window=64, bos=bos).summary for bos in ("auto", "true", "false")
    }
    assert {bos: summary["tokens_scored"] for bos, summary in counted.items()} == {
        "auto": size,
        "true": size,
        "false": size - 1,
    }
    assert {bos: summary["bos_token"] for bos, summary in counted.items()} == {
        "auto": True,
        "true": True,
        "false": False,
    }
    assert _run(net, str(folder / "a.txt"), name, window=64, bos=True).summary["bos"] == "true"
    assert len({summary["perplexity"] for summary in counted.values()}) == 3
    # A document that fits one window: in front of the document and in front of the window is the same place.
    one = [_run(net, str(folder / "more"), name, window=500, bos=bos).trials[0]["nll"] for bos in ("auto", "true")]
    assert one[0] == pytest.approx(one[1], rel=1e-6)


def test_max_tokens_and_short_documents(folder: Path) -> None:
    net = model("llama")
    result = _run(net, str(folder), window=500, max_tokens=20)
    for row in result.trials:
        assert row["windows"] == 1
        assert row["tokens_scored"] == 19
    ids = _ids(folder / "a.txt")[:20]
    first = next(row for row in result.trials if row["answer"] == "a.txt")
    assert first["nll"] == pytest.approx(sum(_oracle(net, ids, 500, 62, [])), rel=1e-4)
    assert first["bytes"] == len(tokenizer(NAME).decode(ids[1:]).encode())


def test_the_first_documents(folder: Path) -> None:
    net = model("llama")
    every, found = (
        {row["answer"]: row["nll"] for row in _run(net, str(folder), window=500, documents=number).trials}
        for number in (None, 2)
    )
    assert sorted(every) == ["a.txt", "b.txt", "more/c.txt"]
    assert found == {name: every[name] for name in ("a.txt", "b.txt")}
    with pytest.raises(OptionError, match=r"(?i)not so many documents.*4.*1\.\.3"):
        _run(net, str(folder), window=500, documents=4)


def test_long_short_gap(folder: Path) -> None:
    net = model("llama")
    result = _run(net, str(folder / "a.txt"), form="single_pass", short_context=12)
    ids = _ids(folder / "a.txt")
    long = np.asarray(_oracle(net, ids, 10_000, 10_000, []))
    short = np.asarray(_oracle(net, ids, 15, 3, []))
    gain = (short - long)[14:]  # tokens from position 15 on
    found = result.trials[0]["long_short"]
    assert found["tokens"] == len(gain)
    assert found["gain"] == pytest.approx(gain.sum(), rel=1e-3, abs=0.05)
    key = (gain > 2) & (long[14:] < 2)
    assert found["key_tokens"] == key.sum()
    assert result.summary["long_short"]["mean_gain"] == pytest.approx(gain.mean(), rel=1e-3, abs=1e-3)


def test_key_tokens_are_counted() -> None:
    from ropepatch.evaluation.perplexity.job import _long_short

    long = np.asarray([0.5, 0.5, 3.0, 1.0, 0.1, 9.0])
    short = np.asarray([9.0, 0.5, 9.0, 3.5, 2.0, 9.0])
    found = _long_short(long, short, np.arange(6) + 4, 4)  # position 4 has no more context than the short pass
    assert found == {"tokens": 5, "gain": pytest.approx(10.4), "key_tokens": 1, "key_nll": 1.0}


# -- folder, resuming, sharing


def test_folder_holds_the_contracted_files(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    net = model("llama")
    for form in ({"window": 64}, {"form": "single_pass", "short_context": 8}):
        out = tmp_path / f"run{len(form)}{next(iter(form))}"
        result = _run(net, str(folder), output=out, **form)
        files = {"run.json", "results.jsonl", "summary.json", "heatmap.png", "loss_by_position.png", "report.html"}
        assert files <= {file.name for file in out.iterdir()}
        assert (out / "heatmap.png").read_bytes()[:4] == b"\x89PNG"
        summary = json.loads((out / "summary.json").read_text())
        assert summary == json.loads(json.dumps(result.summary))
        for field in ("perplexity", "bits_per_byte", "tokens_scored", "by_position", "cells", "by_length", "form"):
            assert field in summary
        configuration = json.loads((out / "run.json").read_text())["configuration"]
        assert [entry["path"] for entry in configuration["text"]] == [
            str(folder / name) for name in ("a.txt", "b.txt", "more/c.txt")
        ]
        page = (out / "report.html").read_text()
        assert page.count("data:image/png;base64,") == 2
        assert f"{summary['perplexity']:,.3f}" in page
        assert ("single pass" in page) == ("form" in form)


def test_a_torn_line_is_done_again(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    net, out = model("llama"), tmp_path / "run"
    whole = _run(net, str(folder), window=64, output=out)
    lines = (out / "results.jsonl").read_bytes().splitlines(keepends=True)
    (out / "results.jsonl").write_bytes(lines[0] + lines[1][:30])
    again = _run(net, str(folder), window=64, output=out)
    done = json.loads(lines[0])["length"]
    assert again.trie_size == sum(row["length"] for row in whole.trials) - done
    strip = [{**row, "elapsed_s": 0} for row in again.trials]
    assert strip == [{**row, "elapsed_s": 0} for row in whole.trials]
    with pytest.raises(OutputConflictError, match="stride is 8"):
        _run(net, str(folder), window=64, stride=4, output=out)
    (folder / "a.txt").write_text("another text altogether")
    with pytest.raises(OutputConflictError, match="sha256"):
        _run(net, str(folder), window=64, output=out)


def test_ranks_share_the_documents(folder: Path) -> None:
    suite = PerplexitySuite(task="perplexity", text=(str(folder),), window=64)
    job = PerplexityJob(model("llama"), tokenizer(NAME), suite)
    places = job.places()
    parts = [[Place.of(row) for row in job.rows(places, Ranks(rank, 2), progress=False)] for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == sorted(places)
    assert parts[0] == [places[0]]  # the longest alone
    assert not list(job.rows([], Ranks(), progress=False))


def test_summary_reads_what_the_rows_say() -> None:
    rows = [
        {
            "trial": i,
            "answer": f"{i}.txt",
            "nll": nll,
            "tokens_scored": n,
            "bytes": 4 * n,
            "correct": 0.5,
            "by_position": [{"start": 0, "end": 8, "tokens": n, "nll": nll}],
        }
        for i, (nll, n) in enumerate([(30.0, 10), (50.0, 20)])
    ]
    summary = summarise(rows, {"task": "perplexity", "form": "sliding", "window": 8, "stride": 4})
    assert summary["perplexity"] == pytest.approx(math.exp(80 / 30))
    assert summary["bits_per_byte"] == pytest.approx(80 / math.log(2) / 120)
    assert summary["accuracy"] == 0.5
    assert summary["ci_low"] < summary["perplexity"] < summary["ci_high"]
    assert summary["documents"][1]["loss_by_position"] == [2.5]


def test_interval_is_students_where_documents_are_alike() -> None:
    """Documents of one length: the ratio is a plain mean, and the interval the textbook's."""
    from scipy import stats

    losses = np.random.default_rng(3).normal(3, 0.4, 7)
    low, high = loss_interval((losses * 50).tolist(), [50] * 7) or (0, 0)
    expected = stats.t.interval(0.95, 6, loc=losses.mean(), scale=stats.sem(losses))
    assert (low, high) == pytest.approx(expected, rel=1e-9)
    assert loss_interval([3.0], [1]) is None


def test_interval_covers() -> None:
    """Documents of unequal length: the true mean lies within it in about 95 of 100 samples."""
    draw, covered = np.random.default_rng(0), 0
    for _ in range(400):
        tokens = draw.integers(50, 500, 25)
        nll = tokens * draw.normal(3, 0.5, 25)
        low, high = loss_interval(nll.tolist(), tokens.tolist()) or (0, 0)
        covered += low <= 3 <= high
    assert 0.9 < covered / 400 < 0.98


def test_buckets_leave_out_what_is_empty() -> None:
    found = buckets(np.asarray([1, 2, 9, 30]), np.asarray([1.0, 2.0, 4.0, 8.0]), 5)
    assert found == [
        {"start": 0, "end": 5, "tokens": 2, "nll": 3.0},
        {"start": 5, "end": 10, "tokens": 1, "nll": 4.0},
        {"start": 30, "end": 35, "tokens": 1, "nll": 8.0},
    ]


# -- documents and refusals


def test_documents_are_read_as_they_stand(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("\ufeff  spaces kept \r\nand lines\n".encode())
    (document,) = read_documents([str(tmp_path / "x.txt")])
    assert document.text == "  spaces kept \nand lines\n"
    made = tokenise(document, TextEncoder(tokenizer(NAME)), bos="auto")
    assert made.ids.tolist() == tokenizer(NAME)(document.text)["input_ids"]
    assert made.ends[-1] == len(document.text)


@given(st.text(min_size=1, max_size=60).filter(str.strip))
def test_bytes_are_utf8(text: str) -> None:
    from ropepatch.evaluation.perplexity.documents import _bytes_before

    assert _bytes_before(text, np.arange(len(text) + 1)).tolist() == [
        len(text[:i].encode()) for i in range(len(text) + 1)
    ]


def test_default_documents_are_there() -> None:
    documents = default_documents()
    assert documents
    assert all(len(document.text) > 100_000 and document.identity["sha256"] for document in documents)


@pytest.mark.parametrize(
    ("content", "match"),
    [(None, "Cannot read"), (b" \n", "is empty"), (b"PNG\0", "not UTF-8"), (b"\xff\xfe", "not UTF-8")],
)
def test_unusable_documents(tmp_path: Path, content: bytes | None, match: str) -> None:
    path = tmp_path / "x.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PromptError, match=match):
        read_documents([str(path)])


def test_refused_documents(folder: Path, tmp_path: Path) -> None:
    net = model("llama")
    (tmp_path / "one.txt").write_text("e")
    with pytest.raises(PromptError, match=r"one\.txt has nothing to score.*1 tokens"):
        _run(net, str(tmp_path / "one.txt"))
    with pytest.raises(PromptError, match="given twice"):
        _run(net, [str(folder), str(folder / "a.txt")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(PromptError, match=r"no \.txt file"):
        _run(net, str(tmp_path / "empty"))
    with pytest.raises(PromptError, match="no BOS token"):
        _run(net, str(folder), bos="true")
    with pytest.raises(OptionError, match="No document is that long"):
        _run(net, str(folder), form="single_pass", lengths=[64, 100_000])


@pytest.mark.parametrize(
    ("given_settings", "match"),
    [
        ({"window": 64, "stride": 65}, "at most window"),
        ({"window": 64, "stride": 64, "bos": "true"}, "BOS token stands in front"),
        ({"window": 1}, "window"),
        ({"stride": 0}, "stride"),
        ({"form": "single_pass", "window": 64}, "only form=sliding has windows"),
        ({"form": "single_pass", "stride": 64}, "only form=sliding has windows"),
        ({"lengths": [64]}, "use window"),
        ({"form": "strided"}, "form"),
        ({"trials": 3}, "no such setting"),
        ({"window": 64, "short_context": 60}, "five quarters"),
        ({"max_tokens": 1}, "max_tokens"),
        ({"documents": 0}, "documents"),
        ({"windw": 64}, "window"),
        ({"text": []}, "text"),
    ],
)
def test_refused_settings(given_settings: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        load_suite("perplexity", given_settings)


def test_defaults_are_recorded() -> None:
    suite = load_suite("perplexity")
    assert isinstance(suite, PerplexitySuite)
    assert (suite.window, suite.stride, suite.bucket, suite.bos) == (4096, 512, 512, "auto")
    small = load_suite("perplexity", {"window": 80})
    assert isinstance(small, PerplexitySuite)
    assert (small.window, small.stride, small.bucket) == (80, 10, 10)
    single = load_suite("perplexity", {"form": "single_pass"})
    assert isinstance(single, PerplexitySuite)
    assert (single.window, single.stride, single.bucket) == (None, None, 512)


def test_refused_models(folder: Path, tmp_path: Path) -> None:
    table = model("gpt2", n_positions=64)
    with pytest.raises(UnsupportedModelError, match="positions for 64 tokens"):
        _run(table, str(folder / "a.txt"), form="single_pass", output=tmp_path / "no")
    with pytest.raises(UnsupportedModelError, match="positions for 64 tokens"):
        _run(table, str(folder / "a.txt"), window=66)
    assert _run(table, str(folder / "a.txt"), window=64, stride=64).summary["tokens_scored"] > 64
    with pytest.raises(UnsupportedModelError, match="in pieces, which this model does not allow"):
        _run(model("mamba"), str(folder / "a.txt"), form="single_pass", output=tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_loss_that_is_no_number_is_refused(folder: Path) -> None:
    net = model("llama")
    with torch.no_grad():
        net.lm_head.weight[3] = float("nan")
    with pytest.raises(RopepatchError, match=r"The loss of a\.txt is not finite from token 1 on"):
        _run(net, str(folder / "a.txt"), window=64)


def test_the_model_is_as_before(folder: Path) -> None:
    net = model("llama").train()
    before = dict(vars(net.config))
    _run(net, str(folder / "a.txt"), form="single_pass")
    assert vars(net.config) == before
    assert net.training


def test_command_line(tiny_model_folder: Path, folder: Path, tmp_path: Path) -> None:
    from ropepatch.cli.app import command

    arguments = ["eval", "perplexity", "--model", str(tiny_model_folder), "--text", str(folder / "a.txt")]
    arguments += [
        "--text",
        str(folder / "b.txt"),
        "--window",
        "64",
        "--stride",
        "32",
        "--output",
        str(tmp_path / "run"),
    ]
    command(arguments, standalone_mode=False)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["window"], summary["stride"], summary["trials"]) == (64, 32, 2)
    assert summary["perplexity"] == pytest.approx(math.exp(summary["loss"]))
