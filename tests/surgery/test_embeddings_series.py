"""Time-series models on a longer context, against a model that was built for it: the same weights, and a table that is
filled by the closed form."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoformerConfig,
    AutoformerForPrediction,
    InformerConfig,
    InformerForPrediction,
    PatchTSMixerConfig,
    PatchTSMixerModel,
    PatchTSTConfig,
    PatchTSTForClassification,
    PatchTSTForPrediction,
    PatchTSTForPretraining,
    PatchTSTForRegression,
    PatchTSTModel,
    TimeSeriesTransformerConfig,
    TimeSeriesTransformerForPrediction,
    TimeSeriesTransformerModel,
    TimesFm2_5Config,
    TimesFm2_5ModelForPrediction,
    TimesFmConfig,
    TimesFmModelForPrediction,
)

import ropepatch
from ropepatch.errors import OptionError, RopepatchError, UnsupportedModelError, UsageError, VerificationError

WIDTH, CONTEXT, HORIZON, LAGS, FEATURES = 16, 20, 4, 3, 2

FORECAST: dict[str, Any] = {
    "context_length": CONTEXT,
    "prediction_length": HORIZON,
    "lags_sequence": [1, 2, LAGS],
    "num_time_features": FEATURES,
    "num_parallel_samples": 2,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}
PATCHED: dict[str, Any] = {
    "context_length": CONTEXT,
    "prediction_length": HORIZON,
    "num_input_channels": 2,
    "patch_length": 4,
    "patch_stride": 3,
    "d_model": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "ffn_dim": 16,
}
TIMESFM: dict[str, Any] = {
    "context_length": CONTEXT,
    "horizon_length": HORIZON,
    "patch_length": 4,
    "hidden_size": WIDTH,
    "intermediate_size": 16,
    "head_dim": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "use_positional_embedding": True,
}
WITH_LAGS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "time_series_transformer": (TimeSeriesTransformerForPrediction, TimeSeriesTransformerConfig, {}),
    "informer": (InformerForPrediction, InformerConfig, {}),
    "autoformer": (AutoformerForPrediction, AutoformerConfig, {"label_length": 6, "moving_average": 5}),
}
TABLES = ("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight")
RANDOM: dict[str, Any] = {"positional_encoding_type": "random"}
HEADS: dict[str, tuple[Any, dict[str, Any]]] = {
    "model": (PatchTSTModel, {}),
    "forecast": (PatchTSTForPrediction, {"use_cls_token": True, "pooling_type": None}),
    "distribution": (PatchTSTForPrediction, {"loss": "nll"}),
    "classes": (PatchTSTForClassification, {"use_cls_token": True}),
    "regression": (PatchTSTForRegression, {"pooling_type": "max"}),
    "pretraining": (PatchTSTForPretraining, {"do_mask_input": True, "random_mask_ratio": 0.4}),
    "channels": (PatchTSTModel, {"channel_attention": True, "norm_type": "layernorm"}),
}


def build(kind: str, **more: Any) -> Any:
    """A tiny random model of a type with lags."""
    model, config, own = WITH_LAGS[kind]
    return made(model, config, {**FORECAST, **own, **more})


def made(model: Any, config: Any, entries: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return model(config(**entries)).eval()


def patched_series(**more: Any) -> Any:
    return made(PatchTSTModel, PatchTSTConfig, {**PATCHED, **more})


def history(context: int, *, future: bool = True, variates: int = 1) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=random)

    axes = (variates,) if variates > 1 else ()
    past = context + LAGS
    given = {
        "past_values": draw(past, *axes).cumsum(1),
        "past_time_features": draw(past, FEATURES),
        "past_observed_mask": torch.ones(2, past, *axes),
        "future_time_features": draw(HORIZON, FEATURES),
    }
    return given | ({"future_values": draw(HORIZON, *axes)} if future else {})


@torch.no_grad()
def outputs(model: Any, **given: Any) -> list[torch.Tensor]:
    """Every tensor that comes out. Informer samples queries, and pretraining patches: from one seed."""
    torch.manual_seed(3)
    return flat(model(**given))


def flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if hasattr(value, "values") else value if isinstance(value, tuple | list) else ()
    return [tensor for part in parts for tensor in flat(part)]


def same(found: list[torch.Tensor], wanted: list[torch.Tensor], atol: float = 1e-5) -> None:
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=atol)


def sines(positions: torch.Tensor, width: int = WIDTH, *, halves: bool = True) -> torch.Tensor:
    """Rows of sines and cosines by the definition, number by number."""
    rows = torch.zeros(len(positions), width, dtype=torch.float64)
    for row, position in zip(rows, positions.tolist(), strict=True):
        for i in range(width // 2):
            angle = position / 10000 ** (2 * i / width)
            at = (i, width // 2 + i) if halves else (2 * i, 2 * i + 1)
            row[at[0]], row[at[1]] = math.sin(angle), math.cos(angle)
    return rows


def longer(model: Any, context: int, tables: dict[str, torch.Tensor]) -> Any:
    """A model of the same class that was built for another context, with the same weights and these tables."""
    config = copy.deepcopy(model.config)
    config.context_length = context
    other = type(model)(config).eval()
    other.load_state_dict({**model.state_dict(), **{name: rows.float() for name, rows in tables.items()}})
    return other


def snapshot(model: Any) -> tuple[Any, ...]:
    attributes = {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, int | float)
    }
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    return model.config.to_dict(), attributes, hooks, [name for name, _ in model.named_buffers()]


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def alike(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return state.keys() == other.keys() and all(state[name].equal(other[name]) for name in state)


def unchanged(model: Any, before: tuple[Any, ...], state: dict[str, torch.Tensor]) -> bool:
    return snapshot(model) == before and alike(bits(model), state)


# -- TimeSeriesTransformer, Informer, Autoformer


@pytest.mark.parametrize("kind", WITH_LAGS)
@pytest.mark.parametrize("method", ["linear", "sinusoidal", "nope"])
@pytest.mark.parametrize("factor", [2, 1.5])
def test_equals_a_model_that_was_built_for_the_longer_context(kind: str, method: str, factor: float) -> None:
    model = build(kind)
    context = int(CONTEXT * factor)
    places = torch.arange(context + HORIZON).double()
    rows = {
        "linear": lambda: sines(places / factor),
        "sinusoidal": lambda: sines(places),
        "nope": lambda: torch.zeros(len(places), WIDTH),
    }[method]()
    oracle = longer(model, context, dict.fromkeys(TABLES, rows))
    ropepatch.patch(model, method, factor=factor)
    assert model.config.context_length == context and model.config.prediction_length == HORIZON
    given = history(context)
    same(outputs(model, **given), outputs(oracle, **given))
    seen = ropepatch.inspect(model)
    assert (seen.trained_length, seen.target_length) == (CONTEXT, context)
    assert seen.mechanism == ("none" if method == "nope" else "sinusoidal")


@pytest.mark.parametrize("kind", WITH_LAGS)
def test_the_forecast_continues_on_the_scale_of_the_context(kind: str) -> None:
    """The first row that follows the context is, at every factor, the one that it was."""
    model = build(kind)
    old = model.model.decoder.embed_positions.weight[CONTEXT].clone()
    ropepatch.patch(model, "linear", factor=4)
    table = model.model.decoder.embed_positions.weight
    assert table.shape[0] == 4 * CONTEXT + HORIZON
    assert table[4 * CONTEXT].equal(old)
    one_step = sines(torch.tensor([CONTEXT + 0.25]))[0].float()
    torch.testing.assert_close(table[4 * CONTEXT + 1], one_step, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", WITH_LAGS)
def test_generates_on_the_longer_context(kind: str) -> None:
    model = build(kind)
    rows = sines(torch.arange(2 * CONTEXT + HORIZON).double() / 2)
    oracle = longer(model, 2 * CONTEXT, dict.fromkeys(TABLES, rows))
    ropepatch.patch(model, "linear", factor=2)
    given = history(2 * CONTEXT, future=False)
    drawn = []
    for one in (model, oracle):
        torch.manual_seed(5)
        drawn.append(one.generate(**given).sequences)
    assert drawn[0].shape == (2, 2, HORIZON)
    torch.testing.assert_close(*drawn, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", WITH_LAGS)
@pytest.mark.parametrize("method", ["linear", "sinusoidal", "nope"])
def test_undone_to_the_last_bit(kind: str, method: str) -> None:
    model = build(kind)
    before, state = snapshot(model), bits(model)
    given = history(CONTEXT)
    wanted, random = outputs(model, **given), torch.get_rng_state()
    ropepatch.patch(model, method, factor=3)
    assert torch.get_rng_state().equal(random)
    ropepatch.unpatch(model)
    assert unchanged(model, before, state)
    assert all(one.equal(other) for one, other in zip(outputs(model, **given), wanted, strict=True))


@pytest.mark.parametrize("kind", WITH_LAGS)
def test_factor_one_changes_nothing(kind: str) -> None:
    model, given = build(kind), history(CONTEXT)
    wanted = outputs(model, **given)
    ropepatch.patch(model, "linear", factor=1)
    assert all(one.equal(other) for one, other in zip(outputs(model, **given), wanted, strict=True))


def test_a_copy_and_an_adapter_follow() -> None:
    peft = pytest.importorskip("peft")
    model = build("time_series_transformer")
    given, wanted = history(2 * CONTEXT), outputs(model, **history(CONTEXT))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    ropepatch.patch(adapted, "linear", factor=2)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(adapted)))
    same(outputs(copied, **given), outputs(adapted, **given), atol=0)
    adapted(**given).loss.backward()
    ropepatch.unpatch(copied)
    same(outputs(copied, **history(CONTEXT)), wanted, atol=1e-6)


def test_many_variates_and_static_features() -> None:
    more = {"input_size": 2, "num_static_real_features": 1, "num_static_categorical_features": 1}
    model = build(
        "time_series_transformer",
        **more,
        cardinality=[5],
        embedding_dimension=[2],
        num_dynamic_real_features=1,
        scaling="std",
        num_time_features=FEATURES - 1,
        distribution_output="normal",
    )
    static = {"static_real_features": torch.ones(2, 1), "static_categorical_features": torch.tensor([[1], [4]])}
    rows = sines(torch.arange(2 * CONTEXT + HORIZON).double() / 2)
    oracle = longer(model, 2 * CONTEXT, dict.fromkeys(TABLES, rows))
    ropepatch.patch(model, "linear", factor=2)
    given = history(2 * CONTEXT, variates=2) | static
    same(outputs(model, **given), outputs(oracle, **given))


def test_counts_that_some_distributions_ask_for() -> None:
    ropepatch.patch(build("time_series_transformer", distribution_output="negative_binomial"), "linear", factor=2)


@pytest.mark.parametrize("kind", WITH_LAGS)
@pytest.mark.parametrize("past", [CONTEXT + LAGS, 2 * CONTEXT + LAGS + 1])
def test_a_past_of_another_length_is_one_clear_error(kind: str, past: int) -> None:
    model = build(kind)
    ropepatch.patch(model, "linear", factor=2)
    given = history(past - LAGS)
    with pytest.raises(UsageError, match=f"{past} past values.*{2 * CONTEXT + LAGS} past values"):
        model(**given)
    with pytest.raises(UsageError, match="past values"):
        model.model(*given.values())
    ropepatch.unpatch(model)
    outputs(model, **history(CONTEXT))


@pytest.mark.parametrize("half", [torch.bfloat16])
def test_in_half_precision(half: torch.dtype) -> None:
    model = build("time_series_transformer").to(half)
    old = model.model.encoder.embed_positions.weight.clone()
    ropepatch.patch(model, "linear", factor=2)
    table = model.model.encoder.embed_positions.weight
    assert table.dtype == half and table[: 2 * len(old) - HORIZON : 2].equal(old[: len(table[::2])])
    wanted = sines(torch.arange(len(table)).double() / 2)
    torch.testing.assert_close(table.double(), wanted, rtol=0, atol=1e-2)


def test_the_bare_model_and_its_parts() -> None:
    whole = made(TimeSeriesTransformerModel, TimeSeriesTransformerConfig, FORECAST)
    before = snapshot(whole)
    for part in (whole.encoder, whole.decoder):
        with pytest.raises(UnsupportedModelError, match="part of a time-series model.*whole model"):
            ropepatch.patch(part, "linear", factor=2)
    assert snapshot(whole) == before
    ropepatch.patch(whole, "linear", factor=2)
    assert outputs(whole, **history(2 * CONTEXT))[0].shape == (2, HORIZON, WIDTH)


# -- PatchTST


def patches(context: int) -> int:
    return (context - 4) // 3 + 1


POSITIONS = "encoder.positional_encoder.position_enc"


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("learned", [False, True])
def test_patches_at_fractions_of_the_old_ones(head: str, learned: bool) -> None:
    kind, more = HEADS[head]
    model = made(kind, PatchTSTConfig, {**PATCHED, **more, **(RANDOM if learned else {})})
    name = next(key for key in model.state_dict() if key.endswith(POSITIONS))
    old = model.state_dict()[name].double()
    first = int(bool(more.get("use_cls_token")))
    places = torch.arange(patches(2 * CONTEXT)).double() / 2
    if learned:
        below = places.floor().long().clamp(max=len(old) - first - 1)
        above = (below + 1).clamp(max=len(old) - first - 1)
        share = (places - below).clamp(max=1)[:, None]
        rows = old[first:][below] * (1 - share) + old[first:][above] * share
    else:
        # The model centres and scales its whole table: by the numbers of the one that it was trained with.
        plain = sines(torch.arange(len(old)).double(), halves=False)
        rows = (sines(places + first, halves=False) - plain.mean()) / (10 * (plain - plain.mean()).std())
    oracle = longer(model, 2 * CONTEXT, {name: torch.cat((old[:first], rows))})
    ropepatch.patch(model, "linear", factor=2)
    past = torch.randn(2, 2 * CONTEXT, 2, generator=torch.Generator().manual_seed(1))
    same(outputs(model, past_values=past), outputs(oracle, past_values=past))
    assert model.config.context_length == 2 * CONTEXT


def test_more_patches_of_its_own_law_keep_the_old_rows() -> None:
    model = patched_series()
    old = model.encoder.positional_encoder.position_enc.clone()
    ropepatch.patch(model, "sinusoidal", factor=3)
    table = model.encoder.positional_encoder.position_enc
    assert len(table) == patches(3 * CONTEXT) and table[: len(old)].equal(old)
    plain = sines(torch.arange(len(old)).double(), halves=False)
    wanted = (sines(torch.arange(len(table)).double(), halves=False) - plain.mean()) / (
        10 * (plain - plain.mean()).std()
    )
    torch.testing.assert_close(table.double(), wanted, rtol=0, atol=1e-5)
    assert not table.requires_grad and len(ropepatch.inspect(model).warnings) == 1


def test_sines_that_were_overwritten_are_interpolated() -> None:
    model = patched_series()
    table = model.encoder.positional_encoder.position_enc
    with torch.no_grad():
        table.add_(torch.randn_like(table))
    old = table.clone()
    ropepatch.patch(model, "linear", factor=2)
    torch.testing.assert_close(table[1], (old[0] + old[1]) / 2)


def test_learned_patches_by_two_digits() -> None:
    model = patched_series(**RANDOM, use_cls_token=True)
    old = model.encoder.positional_encoder.position_enc.detach().clone()
    ropepatch.patch(model, "hierarchical", factor=3)
    table = model.encoder.positional_encoder.position_enc
    assert len(table) == patches(3 * CONTEXT) + 1 and table[: len(old)].equal(old)
    assert table.requires_grad


def test_patches_are_switched_off() -> None:
    model = patched_series(use_cls_token=True)
    first = model.encoder.positional_encoder.position_enc[0].clone()
    ropepatch.patch(model, "nope", factor=2)
    table = model.encoder.positional_encoder.position_enc
    assert table[0].equal(first) and not table[1:].any()


def test_training_does_not_fill_learned_patches_that_are_switched_off() -> None:
    model = patched_series(**RANDOM)
    ropepatch.patch(model, "nope", factor=2)
    table = model.encoder.positional_encoder.position_enc
    loss = model(**patch_input(2 * CONTEXT)).last_hidden_state.square().sum()
    loss.backward()
    assert table.grad is None and not table.requires_grad
    assert any(parameter.grad is not None for parameter in model.parameters())
    assert ropepatch.unpatch(model).encoder.positional_encoder.position_enc.requires_grad


@pytest.mark.parametrize("more", [{}, RANDOM, {"use_cls_token": True}])
@pytest.mark.parametrize("method", ["linear", "sinusoidal", "nope"])
def test_patches_undone_to_the_last_bit(more: dict[str, Any], method: str) -> None:
    model = patched_series(**more)
    before, state = snapshot(model), bits(model)
    random = torch.get_rng_state()
    ropepatch.patch(model, method, factor=2)
    assert torch.get_rng_state().equal(random)
    with pytest.raises((RopepatchError, ValueError), match=str(CONTEXT)):
        model(past_values=torch.zeros(1, CONTEXT, 2))
    ropepatch.unpatch(model)
    assert unchanged(model, before, state)


def test_heads_as_large_as_the_context_are_refused() -> None:
    model = made(PatchTSTForPrediction, PatchTSTConfig, {**PATCHED, "pooling_type": None})
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=r"head\.projection\.weight.*as large as its context.*pooling_type"):
        ropepatch.patch(model, "linear", factor=2)
    assert snapshot(model) == before
    # The part that has no head takes it.
    ropepatch.patch(model.model, "linear", factor=2)


def test_mixed_patches_are_refused() -> None:
    names = ("context_length", "patch_length", "patch_stride", "d_model", "num_input_channels")
    entries = {name: PATCHED[name] for name in names} | {"use_positional_encoding": True}
    model = made(PatchTSMixerModel, PatchTSMixerConfig, entries)
    with pytest.raises(UnsupportedModelError, match="mixer.*as large as its context"):
        ropepatch.patch(model, "linear", factor=2)


# -- TimesFM


@pytest.mark.parametrize("method", ["linear", "sinusoidal", "nope"])
def test_timesfm_computes_its_positions(method: str) -> None:
    model = made(TimesFmModelForPrediction, TimesFmConfig, TIMESFM)
    before, state = snapshot(model), bits(model)
    config = copy.deepcopy(model.config)
    config.context_length = 2 * CONTEXT
    oracle = TimesFmModelForPrediction(config).eval()
    oracle.load_state_dict(state)
    # Positions divided by two are time scales times two.
    scales = oracle.decoder.position_emb.inv_timescales
    scales.copy_({"linear": scales / 2, "sinusoidal": scales, "nope": scales}[method])
    oracle.config.use_positional_embedding = method != "nope"
    series = [torch.randn(length, generator=torch.Generator().manual_seed(length)) for length in (50, 2 * CONTEXT, 9)]
    ropepatch.patch(model, method, factor=2)
    assert model.context_len == model.config.context_length == 2 * CONTEXT and model.horizon_len == HORIZON
    same(outputs(model, past_values=series), outputs(oracle, past_values=series))
    found = ropepatch.inspect(model)
    assert (found.trained_length, found.target_length) == (CONTEXT, 2 * CONTEXT)
    ropepatch.unpatch(model)
    assert unchanged(model, before, state)


def test_timesfm_refusals() -> None:
    model = made(TimesFmModelForPrediction, TimesFmConfig, TIMESFM)
    before = snapshot(model)
    with pytest.raises(OptionError, match="splits a patch.*30 time steps"):
        ropepatch.patch(model, "linear", factor=1.5)
    with pytest.raises(OptionError, match="interpolation"):
        ropepatch.patch(model, "linear", factor=2, interpolation="cubic")
    with pytest.raises(OptionError, match="'scale'"):
        ropepatch.patch(model, "sinusoidal", factor=2, scale=0.5)
    with pytest.raises(UnsupportedModelError, match="learned"):
        ropepatch.patch(model, "hierarchical", factor=2)
    without = made(TimesFmModelForPrediction, TimesFmConfig, {**TIMESFM, "use_positional_embedding": False})
    with pytest.raises(UnsupportedModelError, match="none"):
        ropepatch.patch(without, "linear", factor=2)
    assert snapshot(model) == before


def test_rotary_timesfm_is_verified_and_reads_a_context_that_is_asked_for() -> None:
    entries = {name: value for name, value in TIMESFM.items() if name != "use_positional_embedding"}
    model = made(
        TimesFm2_5ModelForPrediction, TimesFm2_5Config, {**entries, "num_key_value_heads": 2, "output_quantile_len": 4}
    )
    config = copy.deepcopy(model.config)
    config.context_length = 2 * CONTEXT
    oracle = TimesFm2_5ModelForPrediction(config).eval()
    oracle.load_state_dict(model.state_dict())
    oracle.model.rotary_emb.inv_freq.div_(2)
    past = list(patch_input(2 * CONTEXT)["past_values"][..., 0])
    wanted = outputs(oracle, past_values=past)
    ropepatch.patch(model, "linear", factor=2, original_length=CONTEXT // 4)
    same(outputs(model, past_values=past, forecast_context_len=2 * CONTEXT), wanted)
    assert ropepatch.inspect(model).target_length == 2 * CONTEXT // 4


# -- every model: refusals, saving, export


@pytest.mark.parametrize(
    ("method", "options", "error", "words"),
    [
        ("hierarchical", {"factor": 2}, UnsupportedModelError, "sinusoidal"),
        ("linear", {"factor": 2, "interpolation": "cubic"}, OptionError, "computed between rows"),
        ("linear", {"factor": 2, "original_length": 10}, OptionError, "context_length"),
        ("linear", {"factor": 0.5}, OptionError, "factor"),
        ("alibi", {"factor": 2}, UnsupportedModelError, "alibi"),
        ("yarn", {"factor": 2}, UnsupportedModelError, "yarn"),
    ],
)
def test_refused_with_the_model_unchanged(method: str, options: dict[str, Any], error: Any, words: str) -> None:
    model = build("time_series_transformer")
    before, state = snapshot(model), bits(model)
    with pytest.raises(error, match=words):
        ropepatch.patch(model, method, **options)
    assert unchanged(model, before, state)


def test_a_shared_or_cut_table_is_refused() -> None:
    model = build("time_series_transformer")
    model.model.decoder.embed_positions.weight = model.model.encoder.embed_positions.weight
    with pytest.raises(UnsupportedModelError, match="share one position table"):
        ropepatch.patch(model, "linear", factor=2)
    model = build("time_series_transformer")
    table = model.model.encoder.embed_positions.weight
    table.data = table.data[:-1]
    with pytest.raises(UnsupportedModelError, match="not as long as the config says"):
        ropepatch.patch(model, "linear", factor=2)


def test_verify_sees_a_table_that_is_not_read() -> None:
    model = build("time_series_transformer")
    model.model.decoder.embed_positions.forward = lambda shape, **_: torch.zeros(*shape[:2], WIDTH)
    before = snapshot(model)
    with pytest.raises(VerificationError, match=r"none of the rows 0, 40 of model\.decoder\.embed_positions"):
        ropepatch.patch(model, "linear", factor=2)
    assert snapshot(model) == before
    ropepatch.patch(model, "linear", factor=2, verify=False)


def patch_input(context: int) -> dict[str, torch.Tensor]:
    past = torch.randn(2, context, 2, generator=torch.Generator().manual_seed(1))
    return {"past_values": past}


def time_input(context: int) -> dict[str, torch.Tensor]:
    return {"past_values": patch_input(context)["past_values"][..., 0]}


SAVED: dict[str, tuple[Any, Any]] = {
    **{kind: (partial(build, kind), history) for kind in WITH_LAGS},
    "patchtst": (partial(made, PatchTSTForRegression, PatchTSTConfig, PATCHED), patch_input),
    "patchtst learned": (partial(patched_series, **RANDOM, use_cls_token=True), patch_input),
    "timesfm": (partial(made, TimesFmModelForPrediction, TimesFmConfig, TIMESFM), time_input),
}


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize("method", ["linear", "sinusoidal", "nope"])
def test_saved_loaded_exported_undone(kind: str, method: str, tmp_path: Path) -> None:
    construct, make = SAVED[kind]
    model = construct()
    before, state = outputs(model, **make(CONTEXT)), bits(model)
    ropepatch.patch(model, method, factor=2)
    wanted = outputs(model, **make(2 * CONTEXT))
    ropepatch.save_pretrained(model, tmp_path / "saved")
    again = ropepatch.from_pretrained(tmp_path / "saved")
    # Products differ in the last bit by where weights lie in memory; the weights do not.
    assert alike(bits(again), bits(model))
    same(outputs(again, **make(2 * CONTEXT)), wanted, atol=1e-6)
    assert ropepatch.inspect(again).to_dict() == ropepatch.inspect(model).to_dict()
    native = getattr(transformers, type(model).__name__)
    if kind == "timesfm" and method == "linear":
        # The rows are computed from the config, which has no word for it.
        with pytest.raises(ValueError, match="ropepatch"):
            native.from_pretrained(tmp_path / "saved")
        with pytest.raises(UnsupportedModelError, match="[Nn]o config can say"):
            ropepatch.export(model, tmp_path / "plain")
    else:
        ropepatch.export(model, tmp_path / "plain")
        for folder in ("saved", "plain"):
            plain = native.from_pretrained(tmp_path / folder)
            assert plain.config.context_length == 2 * CONTEXT
            same(outputs(plain, **make(2 * CONTEXT)), wanted, atol=1e-6)
    ropepatch.unpatch(again)
    assert alike(bits(again), state)
    same(outputs(again, **make(CONTEXT)), before, atol=1e-6)


def test_a_table_that_was_trained_after_the_patch_is_saved_as_it_is(tmp_path: Path) -> None:
    model = patched_series(**RANDOM)
    ropepatch.patch(model, "linear", factor=2)
    model(**patch_input(2 * CONTEXT)).last_hidden_state.square().mean().backward()
    table = model.encoder.positional_encoder.position_enc
    assert table.grad is not None and bool(table.grad.any(-1).all())
    with torch.no_grad():
        table.sub_(table.grad)
    ropepatch.save_pretrained(model, tmp_path)
    assert ropepatch.from_pretrained(tmp_path).encoder.positional_encoder.position_enc.equal(table)


@pytest.mark.parametrize("kind", ["autoformer", "patchtst", "timesfm"])
def test_what_the_model_saves_by_itself(kind: str, tmp_path: Path) -> None:
    """A longer, unpatched model where the weights hold the rows; the patch where nothing but the config knows it."""
    construct, make = SAVED[kind]
    model = construct()
    ropepatch.patch(model, "linear", factor=2)
    model.save_pretrained(tmp_path)
    again = ropepatch.from_pretrained(tmp_path)
    found = ropepatch.inspect(again)
    assert found.method == ("linear" if kind == "timesfm" else None) and found.target_length == 2 * CONTEXT
    same(outputs(again, **make(2 * CONTEXT)), outputs(model, **make(2 * CONTEXT)), atol=1e-6)
