"""Relative positions in the place of a table: the written-out attention, the cache rule, undo, files, refusals."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ropepatch
from ropepatch.errors import OptionError, RopepatchError, UnsupportedModelError, UsageError, VerificationError
from ropepatch.testing import forward_logits, tiny_inputs, tiny_model

LENGTH, FACTOR = 64, 3
TOLERANCE = 2e-4
SWAPS = ["rope", "alibi", "kerple", "fire", "t5_bias", "sandwich"]
LEARNED = ["kerple", "fire", "t5_bias"]
HEADS = 4


def slow(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


def decoder(kind: str = "gpt2", **more: Any) -> Any:
    model = tiny_model(kind, "causal-lm", **more)
    assert model.config.num_attention_heads == HEADS
    return model


def patch(model: Any, method: str, factor: float = FACTOR, **options: Any) -> Any:
    return ropepatch.patch(model, method, factor=factor, **options)


def row(length: int, seed: int = 0) -> Tensor:
    return torch.randint(5, 120, (1, length), generator=torch.Generator().manual_seed(seed))


def apart(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


def state_of(model: Any) -> dict[str, Any]:
    """All that a patch may touch, by value."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {
        "ids": {name: id(value) for name, value in model.named_parameters()},
        "tensors": {name: value.detach().clone() for name, value in tensors.items()},
        "grads": {name: value.requires_grad for name, value in model.named_parameters()},
        "config": copy.deepcopy(model.config.to_dict()),
        "way": model.config._attn_implementation,
        "hooks": {
            name: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._state_dict_pre_hooks))
            for name, m in model.named_modules()
        },
        "attributes": {name: {*vars(module)} for name, module in model.named_modules()},
    }


def assert_same(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert got["tensors"].keys() == wanted["tensors"].keys()
    assert all(got["tensors"][name].equal(value) for name, value in wanted["tensors"].items())
    assert all(got[name] == wanted[name] for name in ("ids", "grads", "config", "way", "hooks", "attributes"))


# --- the attention written out, in the model's own code and beside it --------------------------------------------


def silenced(model: Any, rows: int) -> Any:
    """A copy of a GPT-2 with a longer table of zeros, without a patch."""
    plain = copy.deepcopy(model)
    plain.transformer.wpe = nn.Embedding(rows, plain.config.n_embd)
    nn.init.zeros_(plain.transformer.wpe.weight)
    return plain


def causal(length: int) -> Tensor:
    return torch.full((length, length), torch.finfo(torch.float32).min).triu(1)


def pairs(length: int) -> Tensor:
    """i - j, [T, T]."""
    return torch.arange(length)[:, None] - torch.arange(length)[None]


@torch.no_grad()
@pytest.mark.parametrize("interpolate", [None, True, False])
def test_alibi_is_a_bias_added_to_the_mask_of_the_plain_model(interpolate: bool | None) -> None:
    model, length = decoder(), FACTOR * LENGTH
    ids = row(length)
    divisor = FACTOR if interpolate else 1
    slopes = torch.tensor([2.0 ** (-8 * h / HEADS) for h in range(1, HEADS + 1)]) / divisor
    bias = causal(length) - slopes[:, None, None] * pairs(length).clamp(min=0)
    wanted = silenced(model, length)(ids, attention_mask=bias[None]).logits
    patch(model, "alibi", interpolate=interpolate)
    assert apart(model(ids).logits, wanted) < 1e-5


@torch.no_grad()
def test_kerple_is_a_bias_added_to_the_mask_of_the_plain_model() -> None:
    model, length = decoder(), FACTOR * LENGTH
    ids, plain = row(length), silenced(model, FACTOR * LENGTH)
    patch(model, "kerple")
    p, a = (parameter.exp() for parameter in model.transformer.h[0].attn.ropepatch_bias.parameters())
    bias = -p[:, None, None] * torch.log1p(a[:, None, None] * pairs(length).clamp(min=0))
    wanted = plain(ids, attention_mask=(causal(length) + bias)[None]).logits
    assert apart(model(ids).logits, wanted) < 1e-5


def turned(x: Tensor, theta: float, dims: int) -> Tensor:
    """Dimension i and i + dims/2 as the parts of a complex number, turned by the position, [1, T, H, D]."""
    half = dims // 2
    positions = torch.arange(x.shape[1], dtype=torch.float64)
    angles = torch.outer(positions, torch.tensor([theta ** (-2 * i / dims) for i in range(half)], dtype=torch.float64))
    x64 = x.double()
    plane = torch.complex(x64[..., :half], x64[..., half:dims]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((plane.real, plane.imag, x64[..., dims:]), dim=-1).to(x)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"rope_theta": 500.0, "rotary_dim": 8}])
def test_rope_turns_what_the_plain_model_projects(options: dict[str, Any]) -> None:
    model, length = decoder(), FACTOR * LENGTH
    ids, plain = row(length), silenced(model, FACTOR * LENGTH)
    theta, dims = options.get("rope_theta", 10000.0), options.get("rotary_dim", 16)

    def turn(module: Any, args: Any, mixed: Tensor) -> Tensor:
        q, k, v = mixed.chunk(3, dim=-1)
        q, k = (turned(part.unflatten(-1, (HEADS, -1)), theta, dims).flatten(-2) for part in (q, k))
        return torch.cat((q, k, v), dim=-1)

    for block in plain.transformer.h:
        block.attn.c_attn.register_forward_hook(turn)
    patch(model, "rope", **options)
    assert apart(model(ids).logits, plain(ids).logits) < 1e-5


# --- the cache rule ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def stepwise(model: Any, ids: Tensor, cuts: list[int]) -> Tensor:
    parts, cache, start = [], None, 0
    for stop in cuts:
        out = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True)
        parts.append(out.logits)
        cache, start = out.past_key_values, stop
    return torch.cat(parts, dim=1)


def padded(ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The row with padding on its left, beside a neighbour without."""
    rows = torch.cat((torch.full((1, count), 1), ids), dim=1)
    mask = torch.ones_like(rows)
    mask[:, :count] = 0
    return torch.cat((rows, row(rows.shape[1], seed=9))), torch.cat((mask, torch.ones_like(mask)))


def table_of(model: Any) -> Tensor:
    site = next(site for site in ropepatch.inspect(model).sites if site["kind"] == "table")
    table: Tensor = getattr(model.get_submodule(site["path"]), site["name"])
    return table


CASES = [
    *(("gpt2", method) for method in SWAPS),
    *((kind, "rope") for kind in ("gpt_bigcode", "opt", "bart", "roberta")),
    *(pytest.param(kind, "rope", marks=pytest.mark.slow) for kind in ("biogpt", "bert", "whisper", "marian")),
]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "method"), CASES)
def test_the_same_tokens_give_the_same_logits_however_they_come_and_the_undo_is_exact(kind: str, method: str) -> None:
    model = tiny_model(kind, "causal-lm")
    before, logits = state_of(model), forward_logits(model, **tiny_inputs(model, length=50))
    patch(model, method)
    found = ropepatch.inspect(model)
    mechanism = {"rope": "rotary", "alibi": "alibi"}.get(method, "relative_bias")
    assert (found.mechanism, found.method, found.seam) == (mechanism, method, "attention")
    assert found.trained_length and found.target_length == FACTOR * found.trained_length
    assert any("finetune" in warning for warning in found.warnings)
    assert not bool(table_of(model).any())
    length, padding = found.target_length - 40, 40
    ids = row(length)
    whole = model(input_ids=ids).logits
    assert bool(torch.isfinite(whole).all())
    assert apart(stepwise(model, ids, [70, 71, 120, *range(length - 8, length + 1)]), whole) < TOLERANCE
    rows, mask = padded(ids, padding)
    assert apart(model(input_ids=rows, attention_mask=mask).logits[:1, padding:], whole) < TOLERANCE
    alone = model(input_ids=rows[:1], attention_mask=mask[:1]).logits[:, padding:]
    assert apart(alone, whole) < TOLERANCE
    ropepatch.unpatch(model)
    assert_same(state_of(model), before)
    assert forward_logits(model, **tiny_inputs(model, length=50)).equal(logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "opt", *slow("bart", "roberta")])
def test_greedy_generation_is_that_of_full_forwards(kind: str) -> None:
    model = patch(decoder(kind), "alibi")
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    ids, count = row(LENGTH - 3), 6
    rows, mask = padded(ids, 20)
    wanted = ids
    for _ in range(count):
        wanted = torch.cat((wanted, model(input_ids=wanted).logits[:, -1:].argmax(-1)), dim=1)
    words = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 1}
    assert model.generate(ids, **words).equal(wanted)
    beside = model.generate(rows, attention_mask=mask, **words)
    assert beside[:1, 20:].equal(wanted)


@torch.no_grad()
def test_explicit_positions_are_those_of_the_scheme() -> None:
    """Two documents in one row: each as by itself."""
    model = patch(decoder(), "rope")
    first, second = row(50, seed=1), row(60, seed=2)
    packed = model(
        torch.cat((first, second), dim=1), position_ids=torch.cat((torch.arange(50), torch.arange(60)))[None]
    ).logits
    assert apart(packed[:, :50], model(first).logits) < TOLERANCE
    assert apart(packed[:, 50:], model(second).logits) < TOLERANCE


@torch.no_grad()
def test_only_the_scheme_knows_of_order() -> None:
    """With no layer changed but the last, the first one gives what it gives without positions."""
    model = decoder()
    ids = row(40)
    seen: list[Tensor] = []
    model.transformer.h[0].attn.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    silent = silenced(model, LENGTH)
    patch(model, "rope", layers=[-1])
    seen.clear()
    model(ids)
    silent(ids)
    assert apart(*seen) < 1e-5


# --- encoders ---------------------------------------------------------------------------------------------------------


def encoder(kind: str = "bert") -> Any:
    return tiny_model(kind, "encoder")


def silent_encoder(rows: int) -> Any:
    """A BERT with a table of zeros, without a patch."""
    plain = tiny_model("bert", "encoder", max_position_embeddings=rows)
    plain.load_state_dict(
        {name: x for name, x in encoder().state_dict().items() if "position" not in name}, strict=False
    )
    nn.init.zeros_(plain.bert.embeddings.position_embeddings.weight)
    return plain


@torch.no_grad()
@pytest.mark.parametrize("method", ["alibi", "kerple", "t5_bias"])
def test_a_bias_of_an_encoder_is_added_to_the_mask_of_the_plain_model(method: str) -> None:
    model, length = encoder(), FACTOR * LENGTH
    ids, plain = row(length), silent_encoder(length)
    patch(model, method)
    away = pairs(length)
    learned = getattr(model.bert.encoder.layer[0].attention.self, "ropepatch_bias", None)
    if method == "alibi":
        slopes = torch.tensor([2.0 ** (-8 * h / HEADS) for h in range(1, HEADS + 1)])
        bias = -slopes[:, None, None] * away.abs()
    elif method == "kerple":
        p, a = (parameter.exp() for parameter in learned.parameters())
        bias = -p[:, None, None] * torch.log1p(a[:, None, None] * away.abs())
    else:
        from transformers.models.t5.modeling_t5 import T5Attention

        bias = learned.table[T5Attention._relative_position_bucket(-away)].permute(2, 0, 1)
    wanted = plain(input_ids=ids, attention_mask=bias[None]).logits
    assert apart(model(input_ids=ids).logits, wanted) < 1e-5


@torch.no_grad()
def test_rope_of_an_encoder_turns_what_the_plain_model_projects() -> None:
    model, length = encoder(), FACTOR * LENGTH
    ids, plain = row(length), silent_encoder(length)

    def turn(module: Any, args: Any, out: Tensor) -> Tensor:
        return turned(out.unflatten(-1, (HEADS, -1)), 10000.0, 16).flatten(-2)

    for layer in plain.bert.encoder.layer:
        layer.attention.self.query.register_forward_hook(turn)
        layer.attention.self.key.register_forward_hook(turn)
    patch(model, "rope")
    assert apart(model(input_ids=ids).logits, plain(input_ids=ids).logits) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "albert", *slow("roberta", "distilbert", "electra")])
def test_an_encoder_reads_a_row_alike_wherever_it_is_padded(kind: str) -> None:
    model = encoder(kind)
    before, logits = state_of(model), forward_logits(model, **tiny_inputs(model, length=50))
    patch(model, "rope")
    assert ropepatch.inspect(model).mechanism == "rotary"
    length = ropepatch.inspect(model).target_length - 40
    ids = row(length)
    whole = model(input_ids=ids).logits
    rows, mask = padded(ids, 40)
    left = model(input_ids=rows, attention_mask=mask).logits[:1, 40:]
    right = model(input_ids=rows.roll(-40, 1), attention_mask=mask.roll(-40, 1)).logits[:1, :-40]
    assert max(apart(left, whole), apart(right, whole)) < TOLERANCE
    assert apart(model(input_ids=ids.flip(1)).logits.flip(1), whole) > 1e-2
    ropepatch.unpatch(model)
    assert_same(state_of(model), before)
    assert forward_logits(model, **tiny_inputs(model, length=50)).equal(logits)


def test_an_encoder_saved_and_loaded(tmp_path: Path) -> None:
    model = patch(encoder(), "t5_bias")
    ids = row(FACTOR * LENGTH)
    wanted = forward_logits(model, input_ids=ids)
    ropepatch.save_pretrained(model, tmp_path)
    assert forward_logits(ropepatch.from_pretrained(tmp_path), input_ids=ids).equal(wanted)


# --- what the model says of itself, and the way back ------------------------------------------------------------------


def test_copies_carry_their_own_patch() -> None:
    model = decoder()
    ids, before = row(100), forward_logits(model, input_ids=row(60))
    patch(model, "rope")
    wanted = forward_logits(model, input_ids=ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert forward_logits(twin, input_ids=ids).equal(wanted)
        ropepatch.unpatch(twin)
        assert forward_logits(twin, input_ids=row(60)).equal(before)
    assert forward_logits(model, input_ids=ids).equal(wanted)


@pytest.mark.parametrize("method", ["rope", "fire"])
@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_saved_loaded_undone(kind: str, method: str, tmp_path: Path) -> None:
    model = decoder(kind)
    before, ids = forward_logits(model, input_ids=row(60)), row(FACTOR * LENGTH)
    patch(model, method)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ropepatch" in name:
                parameter.add_(0.1)
    wanted = forward_logits(model, input_ids=ids)
    ropepatch.save_pretrained(model, tmp_path)
    again = ropepatch.from_pretrained(tmp_path)
    assert forward_logits(again, input_ids=ids).equal(wanted)
    assert ropepatch.inspect(again).to_dict() == ropepatch.inspect(model).to_dict()
    with pytest.raises(ValueError, match="ropepatch"):
        type(model).from_pretrained(tmp_path)
    ropepatch.unpatch(again)
    assert forward_logits(again, input_ids=row(60)).equal(before)


def test_no_config_can_say_it(tmp_path: Path) -> None:
    model = patch(decoder(), "rope")
    with pytest.raises(UnsupportedModelError, match="changes the attention itself"):
        ropepatch.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_input_beyond_the_rows_is_refused_and_leaves_nothing_behind(recwarn: pytest.WarningsRecorder) -> None:
    model = patch(decoder(), "rope")
    wanted = forward_logits(model, input_ids=row(50))
    with pytest.raises(UsageError, match="beyond"):
        model(row(FACTOR * LENGTH + 1))
    assert forward_logits(model, input_ids=row(50)).equal(wanted)
    assert not [warning for warning in recwarn if "always_call" in str(warning.message)]


def test_a_factor_of_one_keeps_the_table_as_long_as_it_was() -> None:
    model = ropepatch.patch(decoder(), "rope")
    assert model.transformer.wpe.weight.shape[0] == LENGTH == ropepatch.inspect(model).target_length


# --- training ---------------------------------------------------------------------------------------------------------


def steps(model: Any, count: int = 2) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(count):
        ids = row(50, seed=3)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("method", SWAPS)
def test_training_learns_the_bias_and_leaves_the_table_silent(method: str) -> None:
    model = patch(decoder(), method)
    biases = {name: p.detach().clone() for name, p in model.named_parameters() if "ropepatch_bias" in name}
    assert bool(biases) == (method in LEARNED)
    model.requires_grad_(True).eval()
    losses = steps(model)
    assert losses[-1] < losses[0]
    assert not bool(model.transformer.wpe.weight.any())
    # FIRE's units that no distance has reached get no gradient.
    assert all(not dict(model.named_parameters())[name].equal(old) for name, old in biases.items())


def test_nope_leaves_its_table_silent_too() -> None:
    model = ropepatch.patch(decoder(), "nope", factor=2).train()
    steps(model)
    assert not bool(model.transformer.wpe.weight.any())


@pytest.mark.parametrize("method", ["rope", "kerple"])
def test_gradient_checkpointing_gives_the_same_gradients(method: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model = patch(decoder(), method)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        ids = row(80)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.allclose(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-6) for name in grads[0])


@pytest.mark.parametrize("first", ["patch", "adapter"])
def test_peft_in_either_order(first: str) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    model = decoder()
    before = forward_logits(model, input_ids=row(60))
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    torch.manual_seed(0)
    if first == "patch":
        wrapped = peft.get_peft_model(patch(model, "rope"), config)
    else:
        wrapped = patch(peft.get_peft_model(model, config), "rope")
    wrapped.eval()  # without dropout, whose draws a loss of three steps would feel
    losses = steps(wrapped, count=8)
    assert losses[-1] < losses[0]
    ropepatch.unpatch(wrapped)
    with wrapped.disable_adapter():
        assert apart(forward_logits(wrapped, input_ids=row(60)), before) < 1e-6


# --- refusals ---------------------------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[str, str, str, dict[str, Any], type[RopepatchError], str]] = {
    "no interface": ("gpt_neo", "causal-lm", "rope", {}, UnsupportedModelError, "attention interface"),
    "mask by itself": ("xglm", "causal-lm", "rope", {}, UnsupportedModelError, "attention interface"),
    "two parts": ("bart", "encoder-decoder", "rope", {}, UnsupportedModelError, "decoder alone"),
    "odd": ("gpt2", "causal-lm", "rope", {"rotary_dim": 7}, OptionError, "rotary_dim"),
    "wide": ("gpt2", "causal-lm", "rope", {"rotary_dim": 32}, OptionError, "rotary_dim"),
    "no layer": ("gpt2", "causal-lm", "rope", {"layers": [2]}, OptionError, "o such attention layers"),
    "layers of a table": ("gpt2", "causal-lm", "linear", {"factor": 2, "layers": [0]}, OptionError, "layers"),
    "shorter": ("gpt2", "causal-lm", "alibi", {"original_length": 32}, OptionError, "shrink"),
    "base": ("gpt2", "causal-lm", "alibi", {"base": "ntk"}, OptionError, "ase speaks of rotary"),
    "no table": ("bloom", "causal-lm", "rope", {"factor": 2, "original_length": 64}, OptionError, "position tables"),
    "no table, rotary": ("llama", "causal-lm", "alibi", {"interpolate": True}, OptionError, "position tables"),
    "rotary has one": ("llama", "causal-lm", "rope", {}, UnsupportedModelError, "rope"),
    "fire both ways": ("bert", "encoder", "fire", {}, UnsupportedModelError, "look ahead"),
    "logn both ways": ("bert", "encoder", "rope", {"logn": True}, OptionError, "in an encoder"),
    "biases beside": ("mpnet", "encoder", "alibi", {}, UnsupportedModelError, "biases by distance"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_the_model_as_before(case: str) -> None:
    kind, auto, method, options, error, words = REFUSED[case]
    model = tiny_model(kind, auto)
    before, logits = state_of(model), forward_logits(model, **tiny_inputs(model, length=50))
    with pytest.raises(error, match=words):
        ropepatch.patch(model, method, **options)
    assert_same(state_of(model), before)
    assert forward_logits(model, **tiny_inputs(model, length=50)).equal(logits)


@pytest.mark.parametrize("kind", ["ViT", "TimeSeriesTransformer"])
def test_tables_of_pictures_and_of_time_are_left_alone(kind: str) -> None:
    import transformers

    small: dict[str, dict[str, Any]] = {
        "ViT": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
        "TimeSeriesTransformer": {"prediction_length": 4, "context_length": 8, "d_model": 16},
    }
    config = getattr(transformers, f"{kind}Config")(**small[kind])
    model = getattr(transformers, f"{kind}Model")(config)
    before = state_of(model)
    with pytest.raises(UnsupportedModelError, match="models of text"):
        patch(model, "rope")
    assert_same(state_of(model), before)


def test_a_swap_without_effect_is_an_error() -> None:
    model = decoder()
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight.zero_()
            block.attn.c_attn.bias.zero_()
    with pytest.raises(VerificationError, match="changes nothing"):
        patch(model, "rope")
    assert math.isclose(float(model.transformer.wpe.weight.shape[0]), LENGTH)


@torch.no_grad()
def test_attention_that_the_interface_does_not_give_is_noticed() -> None:
    """A layer that adds to its output what only its own attention knows of."""
    model = decoder()
    attention = model.transformer.h[0].attn
    plain = type(attention).forward

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        out, weights = plain(attention, hidden, *args, **kwargs)
        return (out if attention.config._attn_implementation == "ropepatch" else 2 * out), weights

    attention.forward = forward
    wanted = forward_logits(model, input_ids=row(50))
    with pytest.raises(VerificationError, match="its own outputs"):
        patch(model, "rope")
    assert forward_logits(model, input_ids=row(50)).equal(wanted)
