"""Structural discovery of position tables, biases and slopes: every mechanism but rotary frequencies.

A table is told by what it is called and by what it holds: rows whose halves (or pairs) have sin^2 + cos^2 = 1 in
every plane are sinusoidal, others are learned.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ropepatch.families._rotary import part_of
from ropepatch.families._site import Site, dtype_name

_TABLE_NAME = re.compile(
    r"(^|_)(wpe|pos_emb|pos_embed|pos_encoding|pos_embedding|position_embeddings?|positional_embeddings?|embed_positions?|"
    r"positions_embed|position_encodings?|positional_encodings?|embed_pos)($|_)"
)
_NOT_POSITION = re.compile(r"(token_type|word|2d|x_position|y_position|h_position|w_position|visual)")
_BIAS_NAME = re.compile(
    r"(relative_attention_bias|rel_embeddings|r_r_bias|relative_position_bias|relative_bias|rel_pos_bias|"
    r"distance_embedding|relative_attention_embedding|pos_bias_v|relative_buckets|rel_logits_proj)"
)


def table_sites(host: nn.Module) -> Iterator[Site]:
    """Position tables that are added to the embedding, learned or sinusoidal."""
    for path, module in host.named_modules():
        last = path.rpartition(".")[2]
        if not _TABLE_NAME.search(last) or _NOT_POSITION.search(last):
            continue
        for name in ("weight", "weights", "pe", "pos_encoding"):
            table = getattr(module, name, None)
            if isinstance(table, Tensor) and table.dim() == 2:
                yield _table_site(host, path, name, table)
                break
    for path, module in host.named_modules():
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, table in tensors:
            # What a patch keeps for its undo is no table of the model.
            kept = name.startswith("ropepatch_")
            if not kept and _TABLE_NAME.search(name) and not _NOT_POSITION.search(name) and table.dim() >= 2:
                yield _table_site(host, path, name, table.reshape(-1, table.shape[-1]))


def _table_site(host: nn.Module, path: str, name: str, table: Tensor) -> Site:
    mechanism = "sinusoidal" if is_sinusoidal(table) else "learned"
    return Site(
        path=path,
        name=name,
        mechanism=mechanism,
        kind="table",
        part=part_of(host, path),
        length=table.shape[0],
        dtype=dtype_name(table),
    )


def first_row(host: nn.Module, path: str) -> int:
    """The row of the table at `path` that position 0 reads.

    fairseq's models keep rows for padding before the first: a fixed offset (OPT, BART), or the padding token's id and
    one more (RoBERTa, M2M100). Nystromformer's kin have the offset in their position ids.
    """
    module = host.get_submodule(path)
    padding = getattr(module, "padding_idx", None)
    counts_tokens = hasattr(module, "create_position_ids_from_input_ids")
    offset = getattr(module, "offset", None)
    if isinstance(padding, int) and (counts_tokens or offset is None):
        return padding + 1
    if isinstance(offset, int):
        return offset
    parent = host.get_submodule(path.rpartition(".")[0]) if path else module
    ids = getattr(parent, "position_ids", None)
    if isinstance(ids, Tensor) and ids.numel() and not ids.is_meta:
        return int(ids.flatten()[0])
    return 0


def adds_offset(host: nn.Module, path: str) -> bool:
    """Whether the module at `path` adds its offset to the position ids that it is given."""
    module = host.get_submodule(path)
    return isinstance(getattr(module, "offset", None), int) and not hasattr(
        module, "create_position_ids_from_input_ids"
    )


def is_sinusoidal(table: Tensor) -> bool:
    """Whether the rows of a [positions, d] table are sines and cosines, in halves or in pairs.

    Rows of zeros (padding, offsets) are passed over.
    """
    if table.is_meta or table.shape[-1] < 2 or table.shape[-1] % 2:
        return False
    rows = table.detach()[: min(64, table.shape[0])].float()
    rows = rows[rows.abs().sum(-1) > 0]
    if len(rows) < 2:
        return False
    half = rows.shape[-1] // 2
    halves = rows[:, :half] ** 2 + rows[:, half:] ** 2
    pairs = rows[:, 0::2] ** 2 + rows[:, 1::2] ** 2
    return any(bool(torch.allclose(sums / sums.mean(), torch.ones_like(sums), atol=2e-2)) for sums in (halves, pairs))


def bias_sites(host: nn.Module) -> Iterator[Site]:
    """Learned functions of distance that are added to the attention scores."""
    for path, module in host.named_modules():
        named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        owner = path.rpartition(".")[2]
        for name, tensor in named:
            if tensor.is_floating_point() and (_BIAS_NAME.search(name) or _BIAS_NAME.search(owner)):
                yield Site(
                    path=path,
                    name=name,
                    mechanism="relative_bias",
                    kind="bias",
                    part=part_of(host, path),
                    length=tensor.shape[0] if tensor.dim() == 2 else None,
                    dtype=dtype_name(tensor),
                )
