"""What was trained, saved, loaded again into a fresh base, and held against what it was: by logits, every run.

Adapters lose things in silence (a norm that was only switched to `requires_grad`, a tie that a merge undoes), and only
the logits of the reloaded model show it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ropepatch
from ropepatch.errors import VerificationError
from ropepatch.saving import save_pretrained
from ropepatch.training import loading
from ropepatch.training.folder import ADAPTER, MERGED, MODEL
from ropepatch.training.recipe import Recipe

_TOKENS = 64
# Relative to the logits' own size: float32 in another order of operations, and half precision.
_CLOSE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def probe(model: Any, recipe: Recipe) -> Tensor:
    """Logits of a few random tokens at the first positions and at the last that the model reaches.

    Returns:
        float32 [1, n, vocabulary], on the CPU.
    """
    embedding = model.get_input_embeddings()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, embedding.weight.shape[0], (1, _TOKENS), generator=generator).to(device)
    reached = ropepatch.inspect(model)
    length = reached.target_length or reached.trained_length or _TOKENS
    half = min(_TOKENS, length) // 2
    places = torch.cat((torch.arange(half), torch.arange(length - half, length)))[None].to(device)
    ids = ids[:, : places.shape[1]]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), loading.autocast(model, recipe):
            logits: Tensor = model(
                input_ids=ids, position_ids=places, attention_mask=torch.ones_like(ids), use_cache=False
            ).logits
    finally:
        model.train(was_training)
    return logits.float().cpu()


def save(model: Any, tokenizer: Any, recipe: Recipe, output: Path) -> Path:
    """Save what was trained: `adapter/`, or `model/` where all weights were. There whole or not at all.

    Raises:
        OutputError: the folder cannot be written.
    """
    path = trained_folder(recipe, output)
    with loading.quiet():
        return save_pretrained(model, path, tokenizer=tokenizer)


def trained_folder(recipe: Recipe, output: Path) -> Path:
    """Where a run puts what it trained."""
    return output / (MODEL if recipe.lora is None else ADAPTER)


def reload(recipe: Recipe, output: Path) -> Any:
    """The saved model in a fresh base, in eval mode on its device.

    Raises:
        ModelLoadError, RecordError: it cannot be loaded.
    """
    path = trained_folder(recipe, output)
    dtype = loading.weights_dtype(recipe)
    more = loading.quantized(recipe)
    with loading.quiet():
        if recipe.lora is not None and recipe.patch is None:
            # No patch, so no record: PEFT's own way.
            from peft import PeftModel

            return PeftModel.from_pretrained(loading.load_base(recipe), path).eval()
        model = ropepatch.from_pretrained(path, dtype=dtype, **more)
    return (model if more else model.to(loading.device())).eval()


def verify(model: Any, recipe: Recipe, wanted: Tensor, weights: dict[str, Tensor]) -> None:
    """Hold a reloaded model against the one that was trained.

    Args:
        model: from `reload`.
        wanted: `probe` of the trained model.
        weights: its trained parameters by name; empty to compare logits alone.

    Raises:
        VerificationError: a weight or a logit differs: any bit of them in float32, more than rounding elsewhere.
    """
    places = dict(model.named_parameters())
    for name, value in weights.items():
        place = places.get(name)
        if place is None or not torch.equal(place.detach().cpu(), value.cpu().to(place.dtype)):
            raise VerificationError(f"the saved model has lost what was trained in {name}", hint="report this")
    found = probe(model, recipe)
    exact = _dtype(model) is torch.float32 and recipe.model.quantization is None
    exact = exact and not loading.computes_in_bfloat16(recipe)
    compare("the saved model", found, wanted, None if exact else _CLOSE[torch.bfloat16])


def merge(model: Any, tokenizer: Any, recipe: Recipe, output: Path) -> Path:
    """Merge the adapters into their base, save that to `merged/`, and verify it.

    Args:
        model: from `reload`; it is spent.

    Raises:
        VerificationError: merging, or saving and loading, changes the logits by more than rounding.
        OutputError: the folder cannot be written.
    """
    wanted = probe(model, recipe)
    merged = model.merge_and_unload()
    found = probe(merged, recipe)
    half = _dtype(merged) is not torch.float32 or loading.computes_in_bfloat16(recipe)
    compare("the merged model", found, wanted, _CLOSE[torch.bfloat16 if half else torch.float32])
    with loading.quiet():
        path = save_pretrained(merged, output / MERGED, tokenizer=tokenizer)
        again = ropepatch.from_pretrained(path, dtype=_dtype(merged)).to(loading.device())
    compare(
        "the merged model that was saved", probe(again, recipe), found, None if not half else _CLOSE[torch.bfloat16]
    )
    return path


def compare(what: str, found: Tensor, wanted: Tensor, tolerance: float | None) -> None:
    """Hold logits against others; None: bit for bit, else by the size of the difference relative to theirs.

    Raises:
        VerificationError: they differ by more.
    """
    if tolerance is None:
        if torch.equal(found, wanted):
            return
    elif found.shape == wanted.shape and _distance(found, wanted) <= tolerance:
        return
    raise VerificationError(
        f"{what} has other logits than the model that was trained",
        given=f"a relative difference of {_distance(found, wanted):.2g}",
        allowed="none" if tolerance is None else f"{tolerance:g}",
    )


def _distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))


def _dtype(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
