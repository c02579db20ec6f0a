"""What ropepatch does to one model type, measured on a tiny random model of the real class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from ropepatch.errors import RopepatchError, UnsupportedModelError
from ropepatch.testing._before import one_line, state_of, undone
from ropepatch.testing._sizes import LENGTH
from ropepatch.testing.cache_rule import SEAM_CASES, SeamCase, SeamOutcome, cache_rule
from ropepatch.testing.native import native_twin
from ropepatch.testing.tiny import forward_logits, tiny_inputs, tiny_model

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

FACTOR = 4.0
TOKENS = LENGTH + LENGTH // 2
"""Tokens of a forward: past the trained length, where scaled and unscaled models part."""

CLOSE_FREQUENCIES, CLOSE_LOGITS = 1e-6, 1e-5
"""Largest relative difference of two frequencies, and largest difference of two logits, that count as agreement.

Where the model's frequencies are the plain series of its rope_theta, both compute in the same order and agree to the
last bit; elsewhere they may differ by a rounding or two (6e-8 each), some 1e-5 radians at the last of `TOKENS`
positions. So does a scaling that the model's own config refuses (Phi-3: all but longrope): it is written as divisors,
and takes the values that these give.
"""

CLOSE_RELOADED = 5e-5
"""Largest difference of two logits between a patched model and one built from its config.

`ntk` and others are written there as a new rope_theta or as divisors, from which the frequencies come back with a
rounding or two (6e-8 each): some 1e-5 radians at the last of `TOKENS` positions.
"""

Status = Literal["exact", "close", "differs", "patched", "no effect", "refused", "error"]


@dataclass(frozen=True)
class Case:
    """A method with its options, and the same in transformers' words (None: it has none).

    Attributes:
        name: what the tables call it.
        method: name of the method.
        options: of the method, for a model of `planes` planes.
        scaling: rope parameters for transformers, likewise.
        whole_heads: transformers' words mean the same only where whole heads are rotated.
    """

    name: str
    method: str
    options: dict[str, Any]
    scaling: dict[str, Any] | None
    whole_heads: bool = False

    def fitted(self, planes: int) -> Case:
        """The case for a model that turns so many planes: lists of divisors get their length."""
        divisors = {
            "short_factor": [1.0 + 0.02 * plane for plane in range(planes)],
            "long_factor": [1.0 + 0.5 * plane for plane in range(planes)],
        }
        if self.method != "longrope":
            return self
        # transformers chooses a list in every call, and by the compressed length where a layer compresses.
        static = {**divisors, "short_factor": divisors["long_factor"]}
        return replace(self, options={**self.options, **divisors}, scaling={**(self.scaling or {}), **static})


_TRAINED = {"original_max_position_embeddings": LENGTH}
_LLAMA3 = {"factor": FACTOR, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_MSCALE = {"factor": FACTOR, "mscale": 1.0, "mscale_all_dim": 0.5}

CASES: tuple[Case, ...] = (
    Case("linear", "linear", {"factor": FACTOR}, {"rope_type": "linear", "factor": FACTOR}),
    Case("yarn", "yarn", {"factor": FACTOR}, {"rope_type": "yarn", "factor": FACTOR, **_TRAINED}),
    Case("yarn mscale", "yarn", _MSCALE, {"rope_type": "yarn", **_MSCALE, **_TRAINED}),
    Case("longrope", "longrope", {"factor": FACTOR}, {"rope_type": "longrope", "factor": FACTOR, **_TRAINED}),
    Case("llama3", "llama3", _LLAMA3, {"rope_type": "llama3", **_LLAMA3, **_TRAINED}),
    Case(
        "proportional",
        "proportional",
        {"partial_rotary_factor": 0.5, "factor": FACTOR},
        {"rope_type": "proportional", "partial_rotary_factor": 0.5, "factor": FACTOR},
        whole_heads=True,
    ),
    Case("ntk", "ntk", {"factor": FACTOR}, None),
    Case("ntk_by_parts", "ntk_by_parts", {"factor": FACTOR}, None),
)


@dataclass(frozen=True)
class Outcome:
    """What one case did to one model.

    Attributes:
        status: "exact" or "close": patched, and equal to transformers' own scaling bit for bit, or within
            `CLOSE_FREQUENCIES` and `CLOSE_LOGITS`. "differs": patched, and unlike transformers' own. "patched":
            patched, and transformers has no own way. "no effect": patched, and the logits stayed. "refused": a
            clear error. "error": anything else, a bug.
        logits: largest difference of two logits from transformers' own scaling, None without one.
        frequencies: largest relative difference of two frequencies from transformers' own, None without one.
        reloaded: largest difference of two logits between the patched model and one that plain transformers builds
            from the patched model's config and weights; None when it cannot.
        detail: the reason of a refusal, why there is no native way, what went wrong; or "".
    """

    status: Status
    logits: float | None = None
    frequencies: float | None = None
    reloaded: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class Support:
    """What was measured of one model type.

    Attributes:
        model_type: transformers' name.
        kind: see `model_types`.
        built: whether a tiny model could be built.
        mechanism: as `ropepatch.inspect` names it, "" when not built.
        native_scaling: the scaling that the class's default config carries, or None.
        detail: why it was not built or could not be run; or "".
        outcomes: by case name; empty when the model was not built or could not be run.
        seam: by method of the attention seam; empty but for rotary causal language models.
    """

    model_type: str
    kind: str
    built: bool
    mechanism: str = ""
    native_scaling: str | None = None
    detail: str = ""
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    seam: dict[str, SeamOutcome] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; an outcome without what does not apply to it."""
        outcomes = {
            name: {key: value for key, value in asdict(outcome).items() if value not in (None, "")}
            for name, outcome in self.outcomes.items()
        }
        seam = {name: outcome.to_dict() for name, outcome in self.seam.items()}
        return {**asdict(self), "outcomes": outcomes, "seam": seam}


def measure(
    model_type: str,
    kind: str = "causal-lm",
    cases: tuple[Case, ...] = CASES,
    seam_cases: tuple[SeamCase, ...] = SEAM_CASES,
) -> Support:
    """Build, inspect, patch with every case, compare with transformers' own scaling, undo and compare again.

    Methods of the attention seam have no twin in transformers: they are held against the cache rule.

    Args:
        model_type: transformers' name; `model_types(kind)` lists them.
        kind: see `model_types`.
        cases: what to patch with.
        seam_cases: methods of the attention seam, for rotary causal language models.

    Raises:
        UnknownNameError: no such kind or model type.
        Exception: whatever a bug in discovery raises; what a patch raises is in the outcomes.
    """
    import ropepatch

    try:
        model = tiny_model(model_type, kind)
    except UnsupportedModelError as error:
        return Support(model_type, kind, built=False, detail=str(error))
    seen = ropepatch.inspect(model)
    inputs = tiny_inputs(model, length=_tokens(seen.sites, seen.mechanism))
    try:
        before = forward_logits(model, **inputs)
    except Exception as error:  # noqa: BLE001 (a model's own forward may raise anything)
        detail = f"a forward on token ids alone fails ({one_line(error)})"
        return Support(model_type, kind, True, seen.mechanism, seen.native_scaling, detail)
    planes = next((site["rotary_dim"] // 2 for site in seen.sites if site["rotary_dim"] and site["part"] == "text"), 1)
    outcomes = {case.name: _outcome(model, inputs, before, case.fitted(planes)) for case in cases}
    seam = {}
    if kind == "causal-lm" and seen.mechanism.startswith("rotary"):
        length = LENGTH if seen.trained_length is None else None
        seam = cache_rule(model, inputs, before, original_length=length, cases=seam_cases)
    return Support(model_type, kind, True, seen.mechanism, seen.native_scaling, outcomes=outcomes, seam=seam)


def _tokens(sites: Iterable[Mapping[str, Any]], mechanism: str) -> int:
    """Past the trained length where the mechanism allows it, else well within."""
    kinds = {site["kind"] for site in sites if site["part"] == "text"}
    return TOKENS if mechanism.startswith("rotary") and not kinds & {"table", "sincos_table"} else LENGTH // 2


def _outcome(model: PreTrainedModel, inputs: dict[str, Tensor], before: Tensor, case: Case) -> Outcome:
    import ropepatch

    state = state_of(model)
    unscaled = _frequencies(model)
    seen = ropepatch.inspect(model)
    how: dict[str, Any] = {
        "on_scaled": "replace" if seen.native_scaling else None,
        "original_length": LENGTH if seen.trained_length is None else None,
    }
    try:
        ropepatch.patch(model, case.method, **how, **case.options)
    except RopepatchError as error:
        left = undone(model, inputs, before, state)
        return Outcome("error", detail=f"refused, but {left}") if left else Outcome("refused", detail=str(error))
    except Exception as error:  # noqa: BLE001 (a matrix reports bugs, it does not stop at the first)
        return Outcome("error", detail=one_line(error))
    try:
        after = forward_logits(model, **inputs)
        # Not those of modules that were left alone: a model may keep a rotary module that it never calls.
        frequencies = {name: b for name, b in _frequencies(model).items() if not b.equal(unscaled[name])}
    except Exception as error:  # noqa: BLE001
        return Outcome("error", detail=f"the patched model does not run ({one_line(error)})")
    finally:
        again, why = _reloaded(model, inputs, state["attention"])
        ropepatch.unpatch(model)
    left = undone(model, inputs, before, state)
    if left:
        return Outcome("error", detail=f"after unpatch {left}")
    if after.equal(before):
        return Outcome("no effect")
    outcome = Outcome("patched", detail="only part of each head is rotated: transformers has no word for it")
    if not (case.whole_heads and any(_partial(site) for site in seen.sites)):
        outcome = _compared(model, inputs, before, after, frequencies, case)
    detail = "; ".join(text for text in (outcome.detail, why) if text)
    return replace(outcome, reloaded=None if again is None else float((again - after).abs().max()), detail=detail)


def _partial(site: Mapping[str, Any]) -> bool:
    return bool(site["part"] == "text" and site["rotary_dim"] and site["rotary_dim"] != site["head_dim"])


def _frequencies(model: PreTrainedModel) -> dict[str, Tensor]:
    named = ((name, buffer) for name, buffer in model.named_buffers() if name.endswith("inv_freq"))
    return {name: buffer.clone() for name, buffer in named if "original" not in name}


def _reloaded(model: PreTrainedModel, inputs: dict[str, Tensor], attention: str) -> tuple[Tensor | None, str]:
    """Logits of a plain transformers model of the patched config and weights, or None and why."""
    try:
        config = deepcopy(model.config)
        if config._attn_implementation != attention:
            # Which kernels run is not written into a saved config.
            config._attn_implementation = attention
        other = type(model)._from_config(config, dtype=next(model.parameters()).dtype)
        other.load_state_dict(model.state_dict())
        return forward_logits(other.eval(), **inputs), ""
    except Exception as error:  # noqa: BLE001 (transformers may fail in any way on a config it does not support)
        return None, f"transformers cannot use the patched config ({one_line(error)})"


def _compared(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    before: Tensor,
    after: Tensor,
    frequencies: dict[str, Tensor],
    case: Case,
) -> Outcome:
    """What the status is, given that the patch has changed the logits from `before` to `after`."""
    if case.scaling is None:
        return Outcome("patched")
    try:
        twin = native_twin(model, case.scaling)
        native = forward_logits(twin, **inputs) if twin is not None else None
    except Exception as error:  # noqa: BLE001 (transformers may fail in any way on a scaling it does not support)
        return Outcome("patched", detail=f"transformers itself fails with this scaling ({one_line(error)})")
    if twin is None or native is None:
        return Outcome("patched", detail="transformers has no word for it in this config")
    if native.equal(before):
        return Outcome("patched", detail="transformers itself ignores this scaling here")
    off = float((after - native).abs().max())
    relative = _relative(frequencies, _frequencies(twin))
    close = off <= CLOSE_LOGITS and relative <= CLOSE_FREQUENCIES
    return Outcome("exact" if after.equal(native) else "close" if close else "differs", off, relative)


def _relative(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    if any(values.shape != theirs[name].shape for name, values in ours.items()):
        return float("inf")
    off = [((values - theirs[name]).abs() / theirs[name].abs().clamp(min=1e-30)).max() for name, values in ours.items()]
    return float(max(off, default=0.0))
