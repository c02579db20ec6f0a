"""Position tables made longer in live models: every row read, every neighbour of its length, every undo."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import ropepatch
from ropepatch.errors import (
    AlreadyPatchedError,
    OptionError,
    RopepatchError,
    UnsupportedModelError,
    UsageError,
    VerificationError,
)
from ropepatch.testing import forward_logits, tiny_inputs, tiny_model

LENGTH, FACTOR = 64, 4
LEARNED = {
    "bert": "encoder",
    "roberta": "encoder",
    "electra": "encoder",
    "mpnet": "encoder",
    "nystromformer": "encoder",
    "clip_text_model": "encoder",
    "gpt2": "causal-lm",
    "gpt_neo": "causal-lm",
    "gpt_bigcode": "causal-lm",
    "openai-gpt": "causal-lm",
    "opt": "causal-lm",
    "biogpt": "causal-lm",
    "bart": "encoder-decoder",
    "mbart": "encoder-decoder",
    "led": "encoder-decoder",
    "prophetnet": "encoder-decoder",
    "whisper": "causal-lm",
}
SINES = {
    "marian": "encoder-decoder",
    "pegasus": "encoder-decoder",
    "m2m_100": "encoder-decoder",
    "fsmt": "encoder-decoder",
    "xglm": "causal-lm",
    "ctrl": "causal-lm",
}
DECODERS = ("gpt2", "gpt_neo", "gpt_bigcode", "opt", "biogpt", "xglm", "whisper")
KINDS = LEARNED | SINES


def build(kind: str, **overrides: Any) -> Any:
    return tiny_model(kind, KINDS[kind], **overrides)


def first_table(model: Any) -> torch.Tensor:
    site = next(s for s in ropepatch.inspect(model).sites if s["kind"] == "table")
    return getattr(model.get_submodule(site["path"]), site["name"]).detach()


def logits(model: Any, length: int = 50) -> torch.Tensor:
    return forward_logits(model, **tiny_inputs(model, length=length, batch=2))


@pytest.mark.parametrize("kind", KINDS)
def test_longer_inputs_run_and_the_undo_is_exact(kind: str) -> None:
    model = build(kind)
    before, config, keys = logits(model), model.config.to_dict(), list(model.state_dict())
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    plain = {name: vars(module).copy() for name, module in model.named_modules()}
    parameters = dict(model.named_parameters())
    trained = ropepatch.inspect(model).trained_length
    ropepatch.patch(model, "linear", factor=FACTOR)
    found = ropepatch.inspect(model)
    assert (found.method, found.seam) == ("linear", "embeddings")
    assert (found.trained_length, found.target_length) == (trained, trained * FACTOR)
    assert list(model.state_dict()) == keys
    long = logits(model, trained * FACTOR - (kind == "prophetnet"))
    assert bool(torch.isfinite(long).all())
    ropepatch.unpatch(model)
    assert logits(model).equal(before)
    assert model.config.to_dict() == config
    assert {name: id(p) for name, p in parameters.items()} == {name: id(p) for name, p in model.named_parameters()}
    after = dict(model.named_buffers())
    assert buffers.keys() == after.keys() and all(buffers[name].equal(after[name]) for name in buffers)
    for name, module in model.named_modules():
        ints = {key: value for key, value in plain[name].items() if type(value) is int}
        assert ints.items() <= vars(module).items()
        assert not module._forward_pre_hooks and not module._forward_hooks


@pytest.mark.parametrize("kind", KINDS)
def test_position_p_adds_what_position_p_over_s_added(kind: str) -> None:
    """The old rows stand at every s-th position, to the last bit; rows before the first position stay."""
    model = build(kind)
    old = first_table(model).clone()
    site = ropepatch.inspect(model).sites[0]
    trained = ropepatch.inspect(model).trained_length
    ropepatch.patch(model, "linear", factor=FACTOR)
    new, start = first_table(model), model._ropepatch_record.sites[0]["first_row"]
    assert site["path"] == model._ropepatch_record.sites[0]["path"]
    assert new[:start].equal(old[:start])
    assert new[start : start + FACTOR * trained : FACTOR].equal(old[start : start + trained])
    assert len(new) - len(old) == (FACTOR - 1) * trained
    if kind in LEARNED:
        middle = (old[start] + old[start + 1]) / 2
        torch.testing.assert_close(new[start + FACTOR // 2], middle)


@pytest.mark.parametrize("kind", KINDS)
def test_factor_one_is_the_identity_to_the_last_bit(kind: str) -> None:
    model = build(kind)
    before = logits(model)
    for method in ("linear", "hierarchical", "sinusoidal"):
        if kind in (SINES if method == "hierarchical" else LEARNED if method == "sinusoidal" else ()):
            continue
        with ropepatch.patched(model, method, factor=1):
            assert logits(model).equal(before)


def stepwise(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """One call with half of the tokens, then one call a token, with a cache."""
    half = ids.shape[1] // 2
    out = model(input_ids=ids[:, :half], use_cache=True)
    steps, cache = [out.logits], out.past_key_values
    for t in range(half, ids.shape[1]):
        out = model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    return torch.cat(steps, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("kind", DECODERS)
def test_cached_generation_is_a_full_forward_past_the_old_limit(kind: str) -> None:
    model = ropepatch.patch(build(kind), "linear", factor=2)
    ids = tiny_inputs(model, length=LENGTH + 6)["input_ids"]
    whole = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(stepwise(model, ids), whole, rtol=0, atol=2e-4)


@torch.no_grad()
def test_an_encoder_decoder_decodes_past_the_old_limit_with_a_cache() -> None:
    model = ropepatch.patch(build("bart"), "hierarchical", factor=2)
    ids = tiny_inputs(model, length=LENGTH + 6)["input_ids"]
    whole = model(input_ids=ids, decoder_input_ids=ids).logits
    states, cache, steps = model.get_encoder()(ids), None, []
    for t in range(ids.shape[1]):
        out = model(encoder_outputs=states, decoder_input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "bart", "m2m_100", "openai-gpt"])
def test_beyond_the_new_limit_there_is_one_clear_error(kind: str) -> None:
    model = ropepatch.patch(build(kind), "linear", factor=2)
    reach = ropepatch.inspect(model).target_length
    logits(model, reach)
    with pytest.raises(UsageError, match=f"beyond the model's position table.*up to {reach}"):
        logits(model, reach + 1)


@torch.no_grad()
def test_the_limit_counts_the_cache_and_reads_position_ids() -> None:
    model = ropepatch.patch(build("gpt2"), "linear", factor=2)
    ids = torch.full((1, 2 * LENGTH), 40)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(UsageError, match=r"129 tokens"):
        model(input_ids=ids[:, :1], past_key_values=cache)
    # A packed row is longer than the table, and its positions are not.
    packed = torch.arange(2 * LENGTH).repeat(2)[None]
    model(input_ids=ids.repeat(1, 2), position_ids=packed)
    with pytest.raises(UsageError, match=r"130 position ids"):
        model(input_ids=ids[:, :2], position_ids=torch.tensor([[0, 2 * LENGTH + 1]]))


@pytest.mark.parametrize(("kind", "method"), [("gpt2", "hierarchical"), ("bert", "sinusoidal"), ("roberta", "nope")])
def test_other_methods_take_effect_and_are_undone(kind: str, method: str) -> None:
    model = build(kind)
    before = logits(model)
    ropepatch.patch(model, method, factor=FACTOR)
    found = ropepatch.inspect(model)
    logits(model, found.target_length)
    assert found.mechanism == {"hierarchical": "learned", "sinusoidal": "sinusoidal", "nope": "none"}[method]
    # Hierarchical keeps the rows that were trained.
    assert logits(model).equal(before) == (method == "hierarchical")
    assert any("useless untuned" in line for line in found.warnings) == (method != "hierarchical")
    assert any("model_max_length" in line for line in found.warnings)
    ropepatch.unpatch(model)
    assert logits(model).equal(before)


def test_nope_makes_an_encoder_blind_to_order() -> None:
    model = ropepatch.patch(build("bert"), "nope")
    ids = tiny_inputs(model, length=20)["input_ids"]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    straight, mixed = (forward_logits(model, input_ids=given) for given in (ids, ids[:, order]))
    torch.testing.assert_close(mixed, straight[:, order], rtol=0, atol=1e-5)


def test_table_and_relative_bias_are_scaled_together() -> None:
    model = build("mpnet")
    ropepatch.patch(model, "linear", factor=FACTOR)
    attention = model.mpnet.encoder
    scaled = attention.compute_position_bias(torch.zeros(1, 40, 4))
    ropepatch.unpatch(model)
    own = attention.compute_position_bias(torch.zeros(1, 40, 4))
    i, j = 7, 31
    assert scaled[0, :, i, j].equal(own[0, :, i, i + (j - i) // FACTOR])


def test_copies_are_patched_models_of_their_own() -> None:
    model = build("gpt2")
    before = logits(model)
    ropepatch.patch(model, "linear", factor=2)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert logits(copied, 2 * LENGTH).equal(logits(model, 2 * LENGTH))
    ropepatch.unpatch(copied)
    assert logits(copied).equal(before) and not logits(model).equal(before)
    logits(model, 2 * LENGTH)
    with pytest.raises(UsageError, match="position table"):
        logits(model, 2 * LENGTH + 1)


def test_undo_follows_a_cast() -> None:
    model = build("bert")
    wanted = logits(copy.deepcopy(model).to(torch.bfloat16))
    ropepatch.patch(model, "linear", factor=2)
    assert logits(ropepatch.unpatch(model.to(torch.bfloat16))).equal(wanted)


def test_a_table_in_bfloat16_keeps_its_rows_and_its_dtype() -> None:
    model = tiny_model("gpt2", dtype=torch.bfloat16)
    old = first_table(model).clone()
    ropepatch.patch(model, "linear", factor=2)
    new = first_table(model)
    assert new.dtype == torch.bfloat16 and new[::2].equal(old)


@pytest.mark.parametrize("patch_first", [True, False])
def test_lora_in_either_order(patch_first: bool) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    model = build("gpt2")
    before = logits(model)
    adapter = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    if patch_first:
        ropepatch.patch(model, "linear", factor=2)
    wrapped = peft.get_peft_model(model, adapter)
    if not patch_first:
        ropepatch.patch(wrapped, "linear", factor=2)
    loss = wrapped(input_ids=torch.full((1, 100), 40), labels=torch.full((1, 100), 41)).loss
    loss.backward()
    ropepatch.unpatch(wrapped)
    assert logits(wrapped.unload()).equal(before)


def test_the_longer_table_learns() -> None:
    model = build("gpt2").train()
    ropepatch.patch(model, "linear", factor=2)
    table = model.transformer.wpe.weight
    ids = torch.full((1, 2 * LENGTH), 40)
    model(input_ids=ids, labels=ids).loss.backward()
    assert table.grad is not None and table.grad.shape == table.shape and bool(table.grad[-2].any())
    ropepatch.unpatch(model)
    assert model.transformer.wpe.weight is table and table.grad is None
    ids = ids[:, :LENGTH]
    model(input_ids=ids, labels=ids).loss.backward()


def speech(kind: str) -> Any:
    import transformers

    halves = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}
    sizes: dict[str, Any] = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in halves.items()}
    sizes |= {"vocab_size": 60, "d_model": 16, "max_source_positions": 20, "max_target_positions": 12}
    sizes |= {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    torch.manual_seed(0)
    if kind == "whisper":
        config = transformers.WhisperConfig(**sizes, num_mel_bins=8, decoder_start_token_id=2)
        return transformers.WhisperForConditionalGeneration(config).eval()
    config = transformers.Speech2TextConfig(**sizes, input_feat_per_channel=8, conv_channels=16)
    return transformers.Speech2TextForConditionalGeneration(config).eval()


@torch.no_grad()
@pytest.mark.parametrize(("kind", "frames"), [("whisper", (1, 8, 80)), ("speech_to_text", (1, 160, 8))])
def test_speech_and_its_transcript_may_be_twice_as_long(kind: str, frames: tuple[int, ...]) -> None:
    model = speech(kind)
    keys = {name: value.clone() for name, value in model.state_dict().items()}
    sound = torch.randn(frames, generator=torch.Generator().manual_seed(0))
    for method in ("linear", "sinusoidal"):
        ropepatch.patch(model, method, factor=2)
        out = model(input_features=sound, decoder_input_ids=torch.full((1, 24), 40)).logits
        assert bool(torch.isfinite(out).all())
        with pytest.raises(UsageError, match="up to 24"):
            model(input_features=sound, decoder_input_ids=torch.full((1, 25), 40))
        ropepatch.unpatch(model)
        assert all(value.equal(keys[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_reads_the_longer_table_in_one_graph() -> None:
    model = ropepatch.patch(build("gpt2"), "linear", factor=2)
    ids = tiny_inputs(model, length=100)["input_ids"]
    wanted = model(input_ids=ids, use_cache=False).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, wanted)


# -- what cannot be


@pytest.mark.parametrize(
    ("kind", "method", "options", "message"),
    [
        ("bert", "linear", {"factor": 2, "original_length": 16}, "would shrink"),
        ("bert", "linear", {"factor": 2, "original_length": 65}, "longer than the position table"),
        ("bert", "linear", {"factor": 2, "interpolation": "spline"}, "interpolation must be 'linear' or 'cubic'"),
        ("bert", "hierarchical", {"factor": 100}, "count to 4096"),
        ("bert", "nope", {"logn": True}, "'logn'.*does not apply"),
        ("bert", "nope", {"scale": 2.0}, "'scale'.*does not apply"),
        ("bert", "linear", {"factor": 2, "base": "ntk"}, "rotary"),
        ("bert", "yarn", {"factor": 2}, "learned ones"),
        ("marian", "hierarchical", {"factor": 2}, "'sinusoidal' makes such a table longer"),
        ("marian", "linear", {"factor": 2, "interpolation": "cubic"}, "not interpolated"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(
    kind: str, method: str, options: dict[str, Any], message: str
) -> None:
    model = build(kind)
    before, config = logits(model), model.config.to_dict()
    with pytest.raises(RopepatchError, match=message):
        ropepatch.patch(model, method, **options)
    assert logits(model).equal(before) and model.config.to_dict() == config
    assert ropepatch.inspect(model).method is None


@pytest.mark.parametrize(
    ("method", "options"),
    [("linear", {"factor": 2, "interpolation": "cubic"}), ("nope", {"factor": 2}), ("hierarchical", {"factor": 2})],
)
def test_words_of_tables_are_refused_by_rotary_models(method: str, options: dict[str, Any]) -> None:
    with pytest.raises((OptionError, UnsupportedModelError), match="table|learned"):
        ropepatch.patch(tiny_model("llama"), method, **options)


def test_original_length_takes_the_first_rows() -> None:
    model = build("gpt2")
    old = first_table(model).clone()
    ropepatch.patch(model, "linear", factor=4, original_length=32)
    new = first_table(model)
    assert len(new) == 128 and new[::4].equal(old[:32])
    found = ropepatch.inspect(model)
    assert (found.trained_length, found.target_length) == (32, 128)


def test_a_second_patch_is_refused() -> None:
    model = ropepatch.patch(build("bert"), "linear", factor=2)
    with pytest.raises(AlreadyPatchedError):
        ropepatch.patch(model, "hierarchical", factor=2)


def test_shared_and_tied_tables_are_refused() -> None:
    model = build("bart")
    model.model.decoder.embed_positions.weight = model.model.encoder.embed_positions.weight
    with pytest.raises(UnsupportedModelError, match="Two modules share one position table"):
        ropepatch.patch(model, "linear", factor=2)
    model = build("gpt2", vocab_size=LENGTH)
    model.transformer.wpe.weight = model.transformer.wte.weight
    with pytest.raises(UnsupportedModelError, match=r"tied to transformer\.wte"):
        ropepatch.patch(model, "linear", factor=2)


def test_a_table_that_nobody_reads_is_an_error() -> None:
    model = build("gpt2")
    before = logits(model)
    model.transformer.wpe.forward = lambda ids: torch.zeros(*ids.shape, model.config.n_embd)
    with pytest.raises(VerificationError, match="does not read row 0 of transformer.wpe"):
        ropepatch.patch(model, "linear", factor=2)
    del model.transformer.wpe.forward
    assert logits(model).equal(before)


def test_a_model_that_still_cannot_run_longer_is_an_error() -> None:
    model = build("gpt2")

    def short_only(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[1] > LENGTH:
            raise ValueError("another limit")

    handle = model.transformer.register_forward_pre_hook(short_only, with_kwargs=True)
    with pytest.raises(VerificationError, match="does not run on 65 tokens.*another limit"):
        ropepatch.patch(model, "linear", factor=2)
    handle.remove()
    assert model.config.n_positions == LENGTH and len(first_table(model)) == LENGTH


def test_what_is_no_table_is_refused() -> None:
    for kind, group in (("reformer", "causal-lm"), ("pegasus_x", "encoder-decoder")):
        with pytest.raises(UnsupportedModelError, match="no table with a row for each"):
            ropepatch.patch(tiny_model(kind, group), "linear", factor=2)
