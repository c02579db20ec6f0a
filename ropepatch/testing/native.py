"""The twin of a model that transformers itself scales: the oracle for what a patch claims to equal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from ropepatch.testing._shrink import parts_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SCALING_KEYS = frozenset(
    (
        *("type", "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        *("low_freq_factor", "high_freq_factor", "short_factor", "long_factor"),
    )
)
_LOCAL = ("sliding", "chunked", "local")
_OTHER_MODALITIES = ("vision", "audio", "image", "speech", "protein")


def native_twin(model: PreTrainedModel, scaling: Mapping[str, Any]) -> PreTrainedModel | None:
    """A second model of the same class, weights and config, but for rope parameters that ask for `scaling`.

    Built the way a user of transformers would: the words are written into the config, then the model is built.
    Nothing of ropepatch's methods, discovery or surgery is used.

    Args:
        model: unpatched.
        scaling: rope parameters of transformers: `rope_type` and what it needs. A scaling that is there is dropped.
            Where the model keeps parameters per layer type, they are written for all but local layers.

    Returns:
        The twin, in evaluation mode; None when the config has no words for it: it has no rope parameters, or its
        rotary is of transformers' "proportional" form, which takes no other scaling than a factor.
    """
    config = deepcopy(model.config)
    if not _rescale(config, scaling):
        return None
    twin = type(model)._from_config(config, dtype=next(model.parameters()).dtype)
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def _rescale(config: Any, scaling: Mapping[str, Any]) -> bool:
    changed = False
    for part in _text_parts(config):
        parameters = getattr(part, "rope_parameters", None)
        if parameters:
            new = _with_scaling(parameters, scaling)
            if new is None:
                return False
            part.rope_parameters = new
            changed = True
    return changed


def _text_parts(config: Any) -> Iterator[Any]:
    yield config
    for name, part in parts_of(config):
        if not any(word in f"{name} {part.model_type}" for word in _OTHER_MODALITIES):
            yield from _text_parts(part)


def _with_scaling(parameters: Mapping[str, Any], scaling: Mapping[str, Any]) -> dict[str, Any] | None:
    labels = [label for label, inner in parameters.items() if isinstance(inner, dict)]
    if labels:
        far = [label for label in labels if not any(word in label for word in _LOCAL)] or labels
        changed = {label: _with_scaling(parameters[label], scaling) for label in far}
        return None if None in changed.values() else {**parameters, **changed}
    if parameters.get("rope_type") == "proportional":
        return {**parameters, "factor": scaling["factor"]} if scaling["rope_type"] == "linear" else None
    return {**{key: value for key, value in parameters.items() if key not in _SCALING_KEYS}, **scaling}
