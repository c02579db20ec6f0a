"""One place where a model carries positions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

Kind = Literal["frequencies", "sincos_table", "table", "bias", "slopes", "fixed", "none"]


@dataclass(frozen=True)
class Site:
    """One place where a model carries positions, named so that it can be found again after deepcopy or pickle.

    Attributes:
        path: dotted module path from the PreTrainedModel; "" is the model itself.
        name: attribute on that module: a buffer, a parameter or a submodule; "" where nothing holds it.
        mechanism: "rotary", "alibi", "relative_bias", "learned", "sinusoidal" or "none".
        kind: how it is held: "frequencies" (an inv_freq buffer), "sincos_table" (precomputed sin | cos rows of a
            rotary), "table" (rows added to the embedding), "bias" (added to the scores), "slopes" (ALiBi), "fixed"
            (rotary that cannot be changed; `note` says why), "none".
        layer_type: the label under which the model keeps it, when it keeps several ("full_attention").
        part: "text" for the part that reads tokens, else "vision", "audio" or another modality.
        head_dim: size of an attention head, None where it does not matter.
        rotary_dim: number of rotated dimensions of a head.
        rope_theta: base of the rotary frequencies.
        rope_type: transformers' name for the scaling that the checkpoint itself carries ("default" is none).
        length: rows of a table; None where nothing limits the length.
        dtype: of the buffer or parameter ("float32").
        note: what a reader should know about this site, or "".
    """

    path: str
    name: str
    mechanism: str
    kind: Kind
    layer_type: str | None = None
    part: str = "text"
    head_dim: int | None = None
    rotary_dim: int | None = None
    rope_theta: float | None = None
    rope_type: str | None = None
    length: int | None = None
    dtype: str | None = None
    note: str = ""

    @property
    def where(self) -> str:
        """The site in one word, for messages."""
        place = f"{self.path}.{self.name}" if self.path and self.name else self.path or self.name or "(model)"
        return f"{place}[{self.layer_type}]" if self.layer_type and self.layer_type not in place else place

    def to_dict(self) -> dict[str, Any]:
        """A plain dict, ready for JSON."""
        return asdict(self)


def dtype_name(tensor: torch.Tensor) -> str:
    """ "float32" for torch.float32."""
    return str(tensor.dtype).removeprefix("torch.")
