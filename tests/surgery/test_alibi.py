"""Models with ALiBi of their own: the same outputs through the seam, slopes rescaled, biases swapped, and undone."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ropepatch
from ropepatch.compat import versions
from ropepatch.errors import CacheError
from ropepatch.testing import forward_logits, tiny_inputs, tiny_model

# Six heads are no power of two: each family fills up its slopes in its own way, and Falcon rounds them.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {}),
    "bloom, 6 heads": ("bloom", {"n_head": 6, "hidden_size": 96}),
    "bloom, post norm": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "mpt": ("mpt", {}),
    "mpt, 6 heads": ("mpt", {"n_heads": 6, "d_model": 96}),
    "mpt, clipped": ("mpt", {"attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.3}}),
    "falcon": ("falcon", {"alibi": True}),
    "falcon, 6 heads": ("falcon", {"alibi": True, "num_attention_heads": 6, "hidden_size": 96}),
    "falcon, all key heads": ("falcon", {"alibi": True, "multi_query": False}),
    "falcon, grouped": ("falcon", {"alibi": True, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, serial": ("falcon", {"alibi": True, "parallel_attn": False}),
}
FAMILIES = ["bloom", "mpt", "falcon"]
SWAPS = ["nope", "kerple", "t5_bias", "sandwich", "fire", "rope"]
LENGTH = 64


def build(name: str, **more: Any) -> Any:
    family, fields = MODELS[name]
    return tiny_model(family, **fields, **more)


def patch(model: Any, method: str, **options: Any) -> Any:
    """BLOOM's class states no trained length."""
    return ropepatch.patch(model, method, original_length=LENGTH, **options)


def apart(got: Tensor, wanted: Tensor, real: Tensor | None = None) -> float:
    keep = torch.ones(got.shape[:2], dtype=torch.bool) if real is None else real.bool()
    return float((got - wanted)[keep].abs().max() / wanted[keep].abs().max())


# --- the oracle: attention written out for each family, from its projections' outputs to those of its softmax ---------


def slopes_of(model: Any) -> list[float]:
    """By the papers' rules, in plain Python: interleaved halves, and how each family orders and rounds them."""
    config = model.config
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    below = 2 ** int(math.log2(heads))
    if config.model_type == "mpt" and below != heads:
        double = [2.0 ** (-8 * h / (2 * below)) for h in range(1, 2 * below + 1)]
        return (double[1::2] + double[0::2])[:heads]
    slopes = [2.0 ** (-8 * h / below) for h in range(1, below + 1)]
    slopes += [2.0 ** (-8 * h / (2 * below)) for h in range(1, 2 * (heads - below), 2)]
    if config.model_type == "falcon":
        slopes = [float(torch.tensor(slope).bfloat16()) / math.sqrt(size) for slope in slopes]
    return slopes


def split(model: Any, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, float64, [T, H, D], from one row's fused projection [T, width]."""
    config = model.config
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    mixed, rows = mixed.double(), mixed.shape[0]
    if config.model_type == "mpt":
        q, k, v = (part.view(rows, heads, size) for part in mixed.chunk(3, dim=-1))
    elif config.model_type == "falcon":
        split = mixed.view(rows, heads + 2, size)
        q, k, v = split[:, :-2], split[:, -2:-1].expand(-1, heads, -1), split[:, -1:].expand(-1, heads, -1)
    else:
        q, k, v = mixed.view(rows, heads, 3, size).unbind(2)
    return q, k, v


def attended(model: Any, mixed: Tensor, factor: float) -> Tensor:
    """Softmax attention with slopes / factor, float64, [T, H D] from one row's fused projection [T, width]."""
    q, k, v = split(model, mixed)
    rows, heads, size = q.shape
    out = torch.empty(rows, heads, size, dtype=torch.float64)
    for h, slope in enumerate(slopes_of(model)):
        for i in range(rows):
            distance = i - torch.arange(i + 1, dtype=torch.float64)
            scores = k[: i + 1, h] @ q[i, h] / math.sqrt(size) - slope / factor * distance
            out[i, h] = torch.softmax(scores, 0) @ v[: i + 1, h]
    return out.flatten(1)


def turned(x: Tensor, theta: float, dims: int) -> Tensor:
    """Dimension i and i + dims/2 as the parts of a complex number, turned by its position, [T, H, D]."""
    half = dims // 2
    angles = torch.outer(
        torch.arange(x.shape[0], dtype=torch.float64),
        torch.tensor([theta ** (-2 * i / dims) for i in range(half)], dtype=torch.float64),
    )
    plane = torch.complex(x[..., :half], x[..., half:dims]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((plane.real, plane.imag, x[..., dims:]), dim=-1)


def attended_rotary(model: Any, mixed: Tensor, theta: float, dims: int) -> Tensor:
    """Softmax attention of rotated queries and keys, float64, [T, H D] from one row's fused projection [T, width]."""
    q, k, v = split(model, mixed)
    q, k = turned(q, theta, dims), turned(k, theta, dims)
    scores = torch.einsum("thd,nhd->htn", q, k) / math.sqrt(q.shape[-1])
    hidden = torch.ones(len(q), len(q)).triu(1).bool()
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("htn,nhd->thd", weights, v).flatten(1)


NAMES = {"bloom": ("query_key_value", "dense"), "falcon": ("query_key_value", "dense"), "mpt": ("Wqkv", "out_proj")}


def watch(model: Any) -> list[tuple[Tensor, Tensor]]:
    """What goes out of each fused projection and into each output projection, one pair a layer and call."""
    first, last = NAMES[model.config.model_type]
    pairs: list[tuple[Tensor, Tensor]] = []
    held: list[Tensor] = []
    for path, module in model.named_modules():
        if path.endswith(f".{first}"):
            module.register_forward_hook(lambda _m, _a, out: held.append(out.detach()[0]))
        elif path.endswith(f".{last}"):
            module.register_forward_pre_hook(lambda _m, args: pairs.append((held.pop(), args[0].detach()[0])))
    return pairs


# --- the same model through the seam ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_alibi_is_the_model_itself(name: str) -> None:
    model = build(name)
    inputs = tiny_inputs(model, length=60, batch=2)
    before = forward_logits(model, **inputs)
    masks = torch.ones(3, 2, 60, dtype=torch.long)
    masks[0, 0, :9], masks[1, 0, -9:], masks[2, 1, 20:30] = 0, 0, 0  # left, right, and a hole
    wanted = [forward_logits(model, input_ids=inputs["input_ids"], attention_mask=mask) for mask in masks]
    patch(model, "alibi")
    assert apart(forward_logits(model, **inputs), before) < 1e-5
    for mask, logits in zip(masks, wanted, strict=True):
        assert apart(forward_logits(model, input_ids=inputs["input_ids"], attention_mask=mask), logits, mask) < 1e-5


def test_falcon_takes_no_positions_but_those_of_its_mask() -> None:
    model = build("falcon")
    ids = tiny_inputs(model, length=20)["input_ids"]
    jump = torch.arange(20)[None] + 30 * (torch.arange(20) >= 10)
    before = forward_logits(model, input_ids=ids, position_ids=jump)
    assert apart(forward_logits(patch(model, "alibi"), input_ids=ids, position_ids=jump), before) < 1e-5


def test_falcon_in_its_eager_way_follows_its_sdpa_way() -> None:
    """The eager way adds the bias twice, once to the scores and once inside the mask."""
    plain = build("falcon")
    inputs = tiny_inputs(plain, length=30)
    sdpa = forward_logits(plain, **inputs)
    model = type(plain)._from_config(copy.deepcopy(plain.config), attn_implementation="eager").eval()
    model.load_state_dict(plain.state_dict())
    eager = forward_logits(model, **inputs)
    assert apart(eager, sdpa) > 1e-3
    assert apart(forward_logits(patch(model, "alibi"), **inputs), sdpa) < 1e-5
    assert torch.equal(forward_logits(ropepatch.unpatch(model), **inputs), eager)


@pytest.mark.parametrize("method", ["alibi", "linear"])
@pytest.mark.parametrize("factor", [1, 4])
@pytest.mark.parametrize("name", ["bloom, 6 heads", "mpt, 6 heads", "falcon, 6 heads"])
def test_slopes_over_factor_at_three_times_the_trained_length(name: str, factor: int, method: str) -> None:
    model = build(name)
    pairs = watch(patch(model, method, factor=factor))
    forward_logits(model, **tiny_inputs(model, length=3 * LENGTH))
    assert len(pairs) == model.config.num_hidden_layers
    for mixed, got in pairs:
        wanted = attended(model, mixed, factor)
        assert float((got.double() - wanted).abs().max() / wanted.abs().max()) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_and_alibi_say_the_same(family: str) -> None:
    model = build(family)
    inputs = tiny_inputs(model, length=100)
    with ropepatch.patched(model, "linear", factor=3, original_length=LENGTH):
        linear = forward_logits(model, **inputs)
        record = ropepatch.inspect(model)
        assert (record.mechanism, record.seam, record.method) == ("alibi", "attention", "linear")
        assert (record.trained_length, record.target_length) == (LENGTH, 3 * LENGTH)
        assert record.warnings == ()
    with ropepatch.patched(model, "alibi", factor=3, original_length=LENGTH):
        assert torch.equal(forward_logits(model, **inputs), linear)


def test_mpt_runs_past_the_length_that_stops_it_unpatched() -> None:
    model = build("mpt")
    inputs = tiny_inputs(model, length=LENGTH + 1)
    with pytest.raises(RuntimeError):
        forward_logits(model, **inputs)
    assert torch.isfinite(forward_logits(patch(model, "alibi"), **inputs)).all()


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in numbers."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.numel())
        return out


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_quadratic_in_the_length(family: str) -> None:
    if family == "falcon" and versions()["transformers"].split(".")[:2] != ["5", "23"]:
        pytest.skip("needs transformers 5.23: the Falcon of 5.6 and 5.13 makes a matrix of its own")
    model = patch(build(family), "alibi", factor=4)
    sizes = []
    for length in (3072, 6144):
        with Largest() as largest, torch.no_grad():
            model.base_model(**tiny_inputs(model, length=length))
        sizes.append(largest.size)
    assert sizes[1] <= 2.1 * sizes[0]
    assert sizes[1] < 6144 * 6144 / 2


# --- swaps, the cache rule, training ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*SWAPS, "alibi"])
@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon", "falcon, grouped"])
def test_the_cache_rule_and_what_a_swap_computes(name: str, method: str) -> None:
    model = build(name)
    ids = tiny_inputs(model, length=100, batch=2)["input_ids"]
    patch(model, method)
    with torch.no_grad():
        full = model(ids).logits
        start = model(ids[:, :40], use_cache=True)
        parts, cache = [start.logits], start.past_key_values
        for low, high in ((40, 93), *((t, t + 1) for t in range(93, 100))):
            parts.append(model(ids[:, low:high], past_key_values=cache, use_cache=True).logits)
        assert apart(torch.cat(parts, 1), full) < 1e-5
        # A shorter row beside a longer one, in one call and in two; padding before it and inside it.
        for hidden in (slice(0, 11), slice(35, 45)):
            mask = torch.ones_like(ids)
            mask[0, hidden] = 0
            whole = model(ids, attention_mask=mask).logits
            start = model(ids[:, :40], attention_mask=mask[:, :40], use_cache=True)
            rest = model(ids[:, 40:], attention_mask=mask, past_key_values=start.past_key_values, use_cache=True)
            assert apart(torch.cat((start.logits, rest.logits), 1), whole, mask) < 1e-5
            if hidden.start == 0 or model.config.model_type != "mpt":  # MPT counts padding inside as distance
                alone = model(ids[:1][:, mask[0].bool()]).logits
                assert apart(whole[:1][:, mask[0].bool()], alone) < 1e-5
            assert apart(whole[1:], full[1:]) < 1e-5
    expected = [] if method == "alibi" else ["finetune"]
    assert [word for text in ropepatch.inspect(model).warnings for word in expected if word in text] == expected


@pytest.mark.parametrize("options", [{}, {"rope_theta": 500.0, "rotary_dim": 6}], ids=["whole heads", "partial"])
@pytest.mark.parametrize("name", ["bloom, 6 heads", "mpt, 6 heads", "falcon, 6 heads"])
def test_rope_rotates_queries_and_keys(name: str, options: dict[str, Any]) -> None:
    model = build(name)
    pairs = watch(patch(model, "rotary", **options))
    forward_logits(model, **tiny_inputs(model, length=3 * LENGTH))
    size = model.config.hidden_size // model.config.num_attention_heads
    assert len(pairs) == model.config.num_hidden_layers
    for mixed, got in pairs:
        wanted = attended_rotary(model, mixed, options.get("rope_theta", 1e4), options.get("rotary_dim", size))
        assert float((got.double() - wanted).abs().max() / wanted.abs().max()) < 1e-5
    found = ropepatch.inspect(model)
    assert (found.mechanism, found.method, found.trained_length, found.target_length) == ("rotary", "rope", 64, 64)


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_a_rotary_model_needs_no_rope(family: str) -> None:
    model = tiny_model(family)
    before = snapshot(model)
    with pytest.raises(ropepatch.UnsupportedModelError, match=r"makes a model rotary.*abf"):
        ropepatch.patch(model, "rope")
    assert same(snapshot(model), before)
    with pytest.raises(ropepatch.UnsupportedModelError, match="changes alibi or learned .*relative_bias"):
        ropepatch.patch(tiny_model("t5", "encoder-decoder"), "rope")


@pytest.mark.parametrize("family", FAMILIES)
def test_nope_knows_no_order(family: str) -> None:
    """In the first layer the last token's attention must not feel in which order the tokens before it come."""
    model = patch(build(family), "nope")
    pairs = watch(model)
    ids = tiny_inputs(model, length=50)["input_ids"]
    shuffled = torch.cat((ids[:, torch.randperm(49, generator=torch.Generator().manual_seed(0))], ids[:, -1:]), 1)
    forward_logits(model, input_ids=ids)
    forward_logits(model, input_ids=shuffled)
    torch.testing.assert_close(pairs[0][1][-1], pairs[len(pairs) // 2][1][-1], rtol=0, atol=1e-5)
    assert not torch.allclose(pairs[0][1][:-1], pairs[len(pairs) // 2][1][:-1], atol=1e-3)


@pytest.mark.parametrize("cache", ["dynamic", "static", "beams"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_generation_without_a_cache(family: str, side: str, cache: str) -> None:
    model = patch(build(family), "alibi", factor=2)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    ids = tiny_inputs(model, length=12, batch=2)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, slice(0, 5) if side == "left" else slice(8, 12)] = 0
    how: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False}
    how |= {"return_dict_in_generate": True, "output_logits": True}
    if cache == "beams":
        how["num_beams"] = 3
    static = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    with_cache = model.generate(ids, use_cache=True, **static, **how)
    without = model.generate(ids, use_cache=False, **how)
    assert torch.equal(with_cache.sequences, without.sequences)
    for one, other in zip(with_cache.logits, without.logits, strict=True):
        assert apart(one[:, None], other[:, None]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_models_own(family: str) -> None:
    model = build(family)
    ids = tiny_inputs(model, length=40, batch=2)["input_ids"]

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    wanted = gradients()
    patch(model, "alibi")
    got = gradients()
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    ropepatch.unpatch(model)
    patch(model, "kerple")
    model(ids, labels=ids).loss.backward()
    learned = {name: p.grad for name, p in model.named_parameters() if "ropepatch" in name}
    assert len(learned) == 2 * model.config.num_hidden_layers
    assert all(grad is not None and bool((grad != 0).any()) for grad in learned.values())


def test_layers_that_are_not_named_keep_their_slopes() -> None:
    model = build("bloom")
    pairs = watch(patch(model, "alibi", factor=8, layers=[-1]))
    forward_logits(model, **tiny_inputs(model, length=50))
    for (mixed, got), factor in zip(pairs, (1, 8), strict=True):
        wanted = attended(model, mixed, factor)
        assert float((got.double() - wanted).abs().max() / wanted.abs().max()) < 1e-5
    assert [site["changed"] for site in ropepatch.record_of(model)["sites"]] == [False, True]  # type: ignore[index]


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_stays_close_to_float32_at_length(family: str) -> None:
    """The model itself rounds its bias to bfloat16, whose neighbours are many tokens apart at this length."""
    exact, model = patch(build(family), "alibi", factor=2), build(family).to(torch.bfloat16)
    exact.to(torch.bfloat16).to(torch.float32)  # the same rounded weights
    inputs = tiny_inputs(model, length=700)
    ours = forward_logits(patch(model, "alibi", factor=2), **inputs).float()
    assert apart(ours, forward_logits(exact, **inputs)) < 5e-2


# --- undo, copies, hooks, refusals --------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "config": copy.deepcopy(model.config.to_dict()),  # type: ignore[union-attr, operator]
        "way": model.config._attn_implementation,  # type: ignore[union-attr]
        "keys": [sorted(vars(module)) for module in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    }


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    states = left["state"].keys() == right["state"].keys()
    states = states and all(torch.equal(value, right["state"][key]) for key, value in left["state"].items())
    return states and all(left[part] == right[part] for part in ("config", "way", "keys", "hooks"))


@pytest.mark.parametrize("method", ["alibi", "linear", *SWAPS])
@pytest.mark.parametrize("family", FAMILIES)
def test_undo_copies_and_pickles(family: str, method: str) -> None:
    model = build(family)
    inputs = tiny_inputs(model, length=40)
    before, logits = snapshot(model), forward_logits(model, **inputs)
    assert ropepatch.inspect(model).mechanism == "alibi"
    patch(model, method, **({"factor": 4} if method in ("alibi", "linear") else {}))
    swapped = {"nope": "none", "alibi": "alibi", "linear": "alibi", "rope": "rotary"}.get(method, "relative_bias")
    assert ropepatch.inspect(model).mechanism == swapped
    patched = forward_logits(model, **inputs)
    assert not torch.equal(patched, logits)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    ropepatch.unpatch(model)
    assert same(snapshot(model), before)
    assert torch.equal(forward_logits(model, **inputs), logits)
    for twin in copies:
        assert torch.equal(forward_logits(twin, **inputs), patched)
        ropepatch.unpatch(twin)
        assert same(snapshot(twin), before)
        assert torch.equal(forward_logits(twin, **inputs), logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hook_around_an_attention_module_stays(family: str) -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    class Counting(hooks.ModelHook):  # type: ignore[name-defined]
        calls = 0

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    model, hook = build(family), Counting()
    path = NAMES[family][0]
    place = next(name.removesuffix(f".{path}") for name, _ in model.named_modules() if name.endswith(f".{path}"))
    module = model.get_submodule(place)
    hooks.add_hook_to_module(module, hook)
    inputs = tiny_inputs(model, length=10)
    logits = forward_logits(model, **inputs)
    patch(model, "linear", factor=4)
    seen = hook.calls
    changed = forward_logits(model, **inputs)
    assert hook.calls == seen + 1 and not torch.equal(changed, logits)
    ropepatch.unpatch(model)
    seen = hook.calls
    assert torch.equal(forward_logits(model, **inputs), logits) and hook.calls == seen + 1


def test_adapters_on_the_projections_take_part() -> None:
    peft = pytest.importorskip("peft")
    model = build("bloom")
    inputs = tiny_inputs(model, length=30)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query_key_value", "dense"], r=2))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
    wrapped.eval()
    before = forward_logits(wrapped, **inputs)
    patch(wrapped, "alibi")
    assert apart(forward_logits(wrapped, **inputs), before) < 1e-5
    ropepatch.unpatch(wrapped)
    assert torch.equal(forward_logits(wrapped, **inputs), before)


def test_without_a_trained_length_only_what_needs_it_is_refused() -> None:
    model = build("bloom")
    before = snapshot(model)
    needy: list[tuple[str, dict[str, Any]]] = [("fire", {}), ("alibi", {"logn": True})]
    for method, options in needy:
        with pytest.raises(ropepatch.OptionError, match="original_length"):
            ropepatch.patch(model, method, **options)
    assert same(snapshot(model), before)
    others: list[tuple[str, dict[str, Any]]] = [("linear", {"factor": 4}), ("kerple", {}), ("rope", {})]
    for method, options in others:
        with ropepatch.patched(model, method, **options):
            assert ropepatch.inspect(model).trained_length is None
    assert same(snapshot(model), before)


@pytest.mark.parametrize(
    ("method", "options", "error", "words"),
    [
        ("yarn", {"factor": 4}, ropepatch.UnsupportedModelError, "alibi"),
        ("self_extend", {"factor": 4}, ropepatch.UnsupportedModelError, "alibi"),
        ("linear", {}, ropepatch.OptionError, "factor"),
        ("linear", {"factor": 2, "base": "yarn"}, ropepatch.OptionError, "rotary frequencies"),
        ("alibi", {"layer_types": ["full_attention"]}, ropepatch.OptionError, "layer_types"),
        ("alibi", {"layers": [7]}, ropepatch.OptionError, "layers"),
        ("fire", {"threshold": 1e4}, ropepatch.OptionError, "threshold"),
        ("rope", {"rotary_dim": 7}, ropepatch.OptionError, "even"),
        ("rope", {"rotary_dim": 64}, ropepatch.OptionError, "rotary_dim"),
        ("rope", {"base": "ntk"}, ropepatch.OptionError, "rotary frequencies"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_refusals_leave_the_model_alone(
    family: str, method: str, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = build(family)
    before = snapshot(model)
    with pytest.raises(error, match=words):
        patch(model, method, **options)
    assert same(snapshot(model), before)


def test_an_attention_that_is_built_otherwise_is_refused() -> None:
    model = build("bloom")
    for block in model.transformer.h:
        block.self_attention.inv_norm_factor = 0.5  # not what its config says: still the model's own outputs
    inputs = tiny_inputs(model, length=20)
    before = forward_logits(model, **inputs)
    with ropepatch.patched(model, "alibi"):
        assert apart(forward_logits(model, **inputs), before) < 1e-5
    for block in model.transformer.h:
        block.self_attention.beta = 3.0  # a bias that no slope of the function explains
    state = snapshot(model)
    with pytest.raises(ropepatch.VerificationError, match="slopes"):
        ropepatch.patch(model, "alibi")
    assert same(snapshot(model), state)
    for block in model.transformer.h:
        del block.self_attention.inv_norm_factor
    with pytest.raises(ropepatch.UnsupportedModelError, match="not built"):
        ropepatch.patch(model, "alibi")


def test_a_cache_from_before_the_patch_is_refused() -> None:
    model = build("falcon")
    ids = tiny_inputs(model, length=20)["input_ids"]
    cache = model(ids, use_cache=True).past_key_values
    patch(model, "linear", factor=2)
    with pytest.raises(CacheError):
        model(ids, past_key_values=cache)
    cache = model(ids, use_cache=True).past_key_values
    ropepatch.unpatch(model)
    with pytest.raises(CacheError):
        model(ids, past_key_values=cache)


def test_mpt_has_alibi_whatever_its_config_says() -> None:
    """transformers builds the bias without a look at these fields."""
    plain = build("mpt")
    odd = tiny_model("mpt", attn_config={"alibi": False, "alibi_bias_max": 20})
    inputs = tiny_inputs(plain, length=40)
    before = forward_logits(odd, **inputs)
    assert torch.equal(before, forward_logits(plain, **inputs))
    assert ropepatch.inspect(odd).mechanism == "alibi"
    assert apart(forward_logits(patch(odd, "alibi"), **inputs), before) < 1e-5
