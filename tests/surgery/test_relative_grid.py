"""Biases over windows of image patches: larger windows, against the bias of every pair worked out by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from transformers import (
    BeitConfig,
    BeitModel,
    Data2VecVisionConfig,
    Data2VecVisionModel,
    DonutSwinConfig,
    DonutSwinModel,
    MaskFormerSwinConfig,
    MaskFormerSwinModel,
    SamVisionConfig,
    SamVisionModel,
    Swin2SRConfig,
    Swin2SRModel,
    SwinConfig,
    SwinForImageClassification,
    SwinModel,
    Swinv2Config,
    Swinv2Model,
)
from transformers.models.auto.modeling_auto import AutoModel

import ropepatch
from ropepatch.errors import OptionError, UnsupportedModelError, VerificationError
from ropepatch.surgery._relative_grid import coordinates_of, windows

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
WHOLE: dict[str, Any] = {**SMALL, "image_size": 32, "patch_size": 8}
# Two stages of 8 x 8 and 4 x 4 patches in windows of 4 x 4: the second is one window.
CUT: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
SHARED = {"use_shared_relative_position_bias": True}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "beit": (BeitConfig, BeitModel, {**WHOLE, "use_relative_position_bias": True}),
    "beit-shared": (BeitConfig, BeitModel, {**WHOLE, **SHARED}),
    "data2vec": (Data2VecVisionConfig, Data2VecVisionModel, {**WHOLE, "use_relative_position_bias": True}),
    "data2vec-shared": (Data2VecVisionConfig, Data2VecVisionModel, {**WHOLE, **SHARED}),
    "swin": (SwinConfig, SwinModel, CUT),
    "donut": (DonutSwinConfig, DonutSwinModel, CUT),
    "maskformer": (MaskFormerSwinConfig, MaskFormerSwinModel, CUT),
}
BEIT_LIKE = [name for name in MODELS if name.startswith(("beit", "data2vec"))]
COMPUTED: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "swinv2": (Swinv2Config, Swinv2Model, CUT),
    "swin2sr": (
        Swin2SRConfig,
        Swin2SRModel,
        {**CUT, "patch_size": 1, "image_size": 16, "num_heads": [2, 2]},
    ),
}


def build(kind: str, **overrides: Any) -> Any:
    config, model, given = (MODELS | COMPUTED)[kind]
    torch.manual_seed(0)
    return stirred(model(config(**{**given, **overrides})))


def stirred(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():  # tables and tokens of zeros would hide what is behind them
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def image(side: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def states(model: Any, side: int, **more: Any) -> torch.Tensor:
    return model(pixel_values=image(side), **more)[0]


def biases(model: Any, window: Any) -> torch.Tensor:
    """The bias of every pair of patches as the model looks it up, [heads, h w (+1), h w (+1)]."""
    module = model.get_submodule(window.path)
    size = math.prod(window.size)
    if "relative_position_index" not in module._buffers:
        return module(window.size)[0].detach()
    index = module.relative_position_index.flatten()
    return module.relative_position_bias_table.detach()[index].unflatten(0, (size, size)).permute(2, 0, 1)


def by_hand(table: torch.Tensor, old: int, new: int, *, cubic: bool) -> torch.Tensor:
    """For each query and key of a window of new x new patches, the bias at their offset in the interpolated grid."""
    span, wide = 2 * old - 1, 2 * new - 1
    extra = table[span * span :]
    grid = table[: span * span].T.reshape(1, -1, span, span)
    mode = "bicubic" if cubic else "bilinear"
    grown = torch.nn.functional.interpolate(grid, size=(wide, wide), mode=mode, align_corners=False)[0]
    first = 1 if len(extra) else 0
    result = torch.empty(table.shape[1], new * new + first, new * new + first)
    for query in range(new * new):
        for key in range(new * new):
            down, across = query // new - key // new, query % new - key % new
            result[:, first + query, first + key] = grown[:, down + new - 1, across + new - 1]
    if first:
        result[:, 0, :], result[:, :, 0], result[:, 0, 0] = extra[0][:, None], extra[1][:, None], extra[2]
    return result


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_pair_has_the_bias_of_its_offset(kind: str, interpolation: str) -> None:
    model = build(kind)
    before, config, keys = states(model, 32), model.config.to_dict(), list(model.state_dict())
    tables = {
        window.path: model.get_submodule(window.path).relative_position_bias_table.detach().clone()
        for window in windows(model)
    }
    assert tables and all(len(table) in (49, 52) for table in tables.values())
    ropepatch.patch(model, "linear", factor=2, interpolation=interpolation)
    found = windows(model)
    assert [window.size for window in found] == [(8, 8)] * len(tables)
    for window in found:
        wanted = by_hand(tables[window.path], 4, 8, cubic=interpolation == "cubic")
        torch.testing.assert_close(biases(model, window), wanted, rtol=0, atol=1e-6)
    assert model.config.image_size == 64 and list(model.state_dict()) == keys
    assert getattr(model.config, "window_size", 8) == 8
    seen = ropepatch.inspect(model)
    assert (seen.mechanism, seen.seam, seen.trained_length, seen.target_length) == ("relative_bias", "embeddings", 4, 8)
    assert "64 x 64" in seen.warnings[0]
    large = states(model, 64)
    copied = copy.deepcopy(model)
    ropepatch.unpatch(model)
    assert states(model, 32).equal(before) and model.config.to_dict() == config
    assert states(copied, 64).equal(large) and states(ropepatch.unpatch(copied), 32).equal(before)


@pytest.mark.parametrize("kind", BEIT_LIKE)
def test_linear_is_what_beit_does_itself_with_a_larger_image(kind: str) -> None:
    model = build(kind)
    native = states(model, 64)
    ropepatch.patch(model, "linear", factor=2)
    assert states(model, 64).equal(native)


def test_the_absolute_table_and_the_biases_grow_together() -> None:
    model = build("beit", use_absolute_position_embeddings=True)
    before, native = states(model, 32), states(model, 64)
    ropepatch.patch(model, "linear", factor=2, interpolation="cubic")
    seen = ropepatch.inspect(model)
    assert (seen.mechanism, seen.target_length) == ("learned+relative_bias", 8)
    assert model.embeddings.position_embeddings.shape[1] == 1 + 64
    assert [window.size for window in windows(model)] == [(8, 8)] * 2
    # BEiT itself takes cubic rows and linear biases.
    assert not states(model, 64).equal(native)
    torch.testing.assert_close(states(model, 64), native, rtol=0, atol=0.5)
    ropepatch.unpatch(model)
    assert states(model, 32).equal(before)


@pytest.mark.parametrize("kind", [*MODELS, *COMPUTED])
@pytest.mark.parametrize("run_before", [False, True])
def test_factor_one_changes_nothing(kind: str, run_before: bool) -> None:
    model = build(kind)
    side = model.config.image_size
    wanted = states(copy.deepcopy(model), side)
    if run_before:  # a layer of Swin drops its shift when it first meets an image of one window
        states(model, side)
    state = {name: vars(module).copy() for name, module in model.named_modules()}
    ropepatch.patch(model, "linear", factor=1)
    assert states(model, side).equal(wanted)
    ropepatch.unpatch(model)
    for name, module in model.named_modules():
        for attribute in ("window_size", "shift_size", "window_area", "num_relative_distance", "image_size"):
            assert vars(module).get(attribute) == state[name].get(attribute)


@pytest.mark.parametrize("kind", ["swin", "donut"])
def test_a_model_built_so_from_its_config_is_the_same(kind: str) -> None:
    model = ropepatch.patch(build(kind), "linear", factor=2)
    plain = type(model)(model.config).eval()
    plain.load_state_dict(model.state_dict())
    for side in (64, 96):
        assert states(plain, side).equal(states(model, side))


def test_a_window_of_seven_becomes_one_of_twelve() -> None:
    model = build("swin", image_size=56, window_size=7)
    ropepatch.patch(model, "linear", factor=12 / 7, interpolation="cubic")
    assert (model.config.image_size, model.config.window_size) == (96, 12)
    assert states(model, 96).shape[1] == 12 * 12


@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_biases_are_transformers_own_for_the_larger_window(kind: str) -> None:
    model = build(kind)
    side = model.config.image_size
    before = states(model, side)
    _, architecture, given = COMPUTED[kind]
    config = type(model.config)(**{**given, "window_size": 8, "image_size": 2 * side})
    twin = architecture(config).eval()
    twin.load_state_dict(model.state_dict())
    sites = ropepatch.inspect(model).sites
    assert {site["mechanism"] for site in sites} == {"relative_bias"} and "computed" in sites[0]["note"]
    ropepatch.patch(model, "linear", factor=2)
    assert (model.config.window_size, model.config.image_size) == (8, 2 * side)
    torch.testing.assert_close(states(model, 2 * side), states(twin, 2 * side), rtol=0, atol=1e-5)
    ropepatch.unpatch(model)
    assert states(model, side).equal(before)


def test_coordinates_span_the_same_range_in_any_window() -> None:
    small, large = coordinates_of((4, 4))[0], coordinates_of((8, 8))[0]
    assert small[0, 0].equal(large[0, 0]) and small[-1, -1].equal(large[-1, -1])
    for offset in range(-7, 8):
        c = 8 * offset / 7
        wanted = math.copysign(math.log2(1 + abs(c)) / 3, c)
        assert large[offset + 7, 0, 0].item() == pytest.approx(wanted, abs=1e-6)


def test_one_part_of_a_larger_model_and_its_head() -> None:
    torch.manual_seed(0)
    model = stirred(SwinForImageClassification(SwinConfig(**CUT)))
    before = states(model, 32)
    ropepatch.patch(model, "linear", factor=2)
    assert states(model, 64).shape == before.shape
    ropepatch.unpatch(model)
    ropepatch.patch(model.swin, "linear", factor=2)
    assert windows(model.swin)[0].size == (8, 8)
    ropepatch.unpatch(model)
    assert states(model, 32).equal(before)


@pytest.mark.parametrize("kind", ["beit", "swin", "donut", "swinv2"])
def test_saved_and_exported_folders_take_larger_images(kind: str, tmp_path: Any) -> None:
    model = build(kind)
    small = states(model, 32)
    ropepatch.patch(model, "linear", factor=2)
    wanted = states(model, 64)
    ropepatch.save_pretrained(model, tmp_path / "saved")
    again = ropepatch.from_pretrained(tmp_path / "saved")
    assert states(again, 64).equal(wanted)
    assert states(ropepatch.unpatch(again), 32).equal(small)
    ropepatch.export(model, tmp_path / "plain")
    plain = AutoModel.from_pretrained(tmp_path / "plain").eval()
    assert type(plain) is type(model) and states(plain, 64).equal(wanted)


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_a_table_that_keeps_its_axes_grows_beside_biases_that_the_model_stretches_itself(interpolation: str) -> None:
    config = SamVisionConfig(**SMALL, image_size=32, patch_size=8, window_size=2, output_channels=8, mlp_dim=16)
    config.global_attn_indexes = [1]
    torch.manual_seed(0)
    model = stirred(SamVisionModel(config))
    assert {site["mechanism"] for site in ropepatch.inspect(model).sites} == {"learned", "relative_bias"}
    before, old = states(model, 32), model.vision_encoder.pos_embed.detach().clone()
    ropepatch.patch(model, "linear", factor=2, interpolation=interpolation)
    mode = "bicubic" if interpolation == "cubic" else "bilinear"
    wanted = torch.nn.functional.interpolate(old.permute(0, 3, 1, 2), size=(8, 8), mode=mode, align_corners=False)
    torch.testing.assert_close(model.vision_encoder.pos_embed.permute(0, 3, 1, 2), wanted)
    assert states(model, 64).shape[-2:] == (8, 8)
    ropepatch.unpatch(model)
    assert states(model, 32).equal(before)


def test_nope_silences_the_table_and_leaves_biases_of_the_same_size_alone() -> None:
    model = build("beit", use_absolute_position_embeddings=True)
    tables = [
        model.get_submodule(window.path).relative_position_bias_table.detach().clone() for window in windows(model)
    ]
    ropepatch.patch(model, "nope")
    assert not model.embeddings.position_embeddings[:, 1:].any()  # the class token keeps its row
    for window, table in zip(windows(model), tables, strict=True):
        assert model.get_submodule(window.path).relative_position_bias_table.equal(table)
    ropepatch.unpatch(model)
    with pytest.raises(UnsupportedModelError, match="biases beside it"):
        ropepatch.patch(model, "nope", factor=2)


def test_training_goes_on_in_the_larger_table() -> None:
    model = ropepatch.patch(build("swin"), "linear", factor=2).train()
    model(pixel_values=image(64))[0].square().sum().backward()
    for window in windows(model):
        gradient = model.get_submodule(window.path).relative_position_bias_table.grad
        assert gradient.shape[0] == 15 * 15 and bool(gradient.any())


def test_what_cannot_be_is_refused_and_changes_nothing() -> None:
    swin, beit, v2 = build("swin"), build("beit"), build("swinv2")
    before = [states(model, 32) for model in (swin, beit, v2)]
    with pytest.raises(OptionError, match="splits a patch.*windows of 4 x 4"):
        ropepatch.patch(swin, "linear", factor=1.1)
    with pytest.raises(OptionError, match="factor"):
        ropepatch.patch(swin, "linear", factor=0.5)
    with pytest.raises(OptionError, match="grid of patches"):
        ropepatch.patch(swin, "linear", factor=2, original_length=4)
    with pytest.raises(OptionError, match="rotary"):
        ropepatch.patch(swin, "linear", factor=2, base="ntk")
    with pytest.raises(UnsupportedModelError, match="offsets within a window"):
        ropepatch.patch(swin, "log_buckets", factor=2)
    with pytest.raises(UnsupportedModelError, match="relative_bias"):
        ropepatch.patch(swin, "nope")
    with pytest.raises(OptionError, match="computed from coordinates"):
        ropepatch.patch(v2, "linear", factor=2, interpolation="cubic")
    with pytest.raises(UnsupportedModelError, match="earlier training"):
        ropepatch.patch(build("swinv2", pretrained_window_sizes=[2, 2]), "linear", factor=2)
    beit.config.image_size = 48
    with pytest.raises(UnsupportedModelError, match="does not match the grid"):
        ropepatch.patch(beit, "linear", factor=2)
    beit.config.image_size = 32
    with pytest.raises(UnsupportedModelError, match="oblong"):
        ropepatch.patch(build("beit", image_size=(32, 48)), "linear", factor=2)
    assert all(states(model, 32).equal(old) for model, old in zip((swin, beit, v2), before, strict=True))


def test_a_table_that_is_tied_cut_or_read_in_another_order_is_refused() -> None:
    model = build("swin")
    first, second = (model.get_submodule(window.path) for window in windows(model)[:2])
    own = second.relative_position_bias_table
    second.relative_position_bias_table = first.relative_position_bias_table
    with pytest.raises(UnsupportedModelError, match="tied to several places"):
        ropepatch.patch(model, "linear", factor=2)
    second.relative_position_bias_table = torch.nn.Parameter(own.detach()[:-1])
    with pytest.raises(UnsupportedModelError, match="no grid of offsets"):
        ropepatch.patch(model, "linear", factor=2)
    second.relative_position_bias_table = own
    second.relative_position_index.copy_(second.relative_position_index.flip(0))
    with pytest.raises(UnsupportedModelError, match="order of the offsets"):
        ropepatch.patch(model, "linear", factor=2)


def test_biases_that_nobody_reads_are_an_error() -> None:
    model = build("swin")
    before = states(model, 32)
    last = windows(model)[-1].path
    deaf = model.get_submodule(last).register_forward_hook(lambda *given: without_nan(given[-1]))
    with pytest.raises(VerificationError, match=f"does not read {last}"):
        ropepatch.patch(model, "linear", factor=2)
    assert windows(model)[-1].size == (4, 4)
    ropepatch.patch(model, "linear", factor=2, verify=False)
    ropepatch.unpatch(model)
    deaf.remove()
    assert states(model, 32).equal(before)


def without_nan(output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(without_nan(part) for part in output)
    return output.nan_to_num()


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_a_table_of_the_same_size_keeps_its_rows_to_the_bit_unless_it_is_silenced(interpolation: str) -> None:
    model = build("beit", use_absolute_position_embeddings=True)
    before, old = states(model, 32), model.embeddings.position_embeddings.detach().clone()
    ropepatch.patch(model, "linear", factor=1, interpolation=interpolation)
    assert model.embeddings.position_embeddings.equal(old) and states(model, 32).equal(before)
    ropepatch.unpatch(model)
    ropepatch.patch(model, "nope")
    assert not states(model, 32).equal(before)
