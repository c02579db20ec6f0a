"""From a config class to a tiny instance of it: the defaults, made small by what each field is called.

Sizes come from one table of field names, so the parts of a composite model still fit each other. Lists that hold
one entry a layer are cut down together, to the fewest layers that still show every kind of layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import fields
from typing import Any

from ropepatch.errors import OptionError, did_you_mean
from ropepatch.testing._overrides import OVERRIDES
from ropepatch.testing._sizes import HEAD_DIM, HIDDEN, LENGTH, SPECIAL_TOKENS, WHERE_UNSET, is_token_id, small

_FIRST_SPECIAL = 8


def shrink(config_class: type, overrides: Mapping[str, Any], source: Any = None, **fixed: Any) -> Any:
    """A tiny instance of `config_class`.

    Args:
        config_class: a PreTrainedConfig subclass.
        overrides: fields that win over everything else. In a composite config, a field that the class itself does
            not know goes to its text part.
        source: the instance to shrink; by default one with the class's own defaults.
        fixed: fields that win over the general rules, besides those of `OVERRIDES`.

    Raises:
        OptionError: a field that neither the class nor its text part knows.
    """
    model_type = config_class.model_type  # type: ignore[attr-defined]
    source = source if source is not None else config_class()
    source.allow_global_per_layer_attribute_access = True  # we want the value that most layers share
    fixed = {**OVERRIDES.get(model_type, {}), **fixed}
    mine, text = split_overrides(source, overrides)
    values = {**_small_fields(source), **_layer_lists(source)}
    values |= _rope(source, values)
    values |= fixed
    for name, part in parts_of(source):
        values[name] = shrink(type(part), text if part is text_part(source) else {}, part, **fixed.get(name, {}))
    return config_class(**{**values, **mine})


def field_names(config: Any) -> set[str]:
    """Every name that a config's constructor takes, with the standard spellings of its own names."""
    return {field.name for field in fields(config)} | set(config.attribute_map)


def parts_of(config: Any) -> Iterator[tuple[str, Any]]:
    """The configs nested directly in `config`, with their names."""
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if hasattr(part, "sub_configs"):
            yield name, part


def text_part(config: Any) -> Any:
    """The config of the part that reads and writes tokens: the decoder's where there are two."""
    return config.get_text_config(decoder=True)


def split_overrides(config: Any, overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`overrides` for the config itself, and those for its text part.

    Raises:
        OptionError: a field that neither knows.
    """
    known = field_names(config)
    text = text_part(config)
    mine = {name: value for name, value in overrides.items() if name in known}
    rest = {name: value for name, value in overrides.items() if name not in known}
    unknown = sorted(set(rest) - (field_names(text) if text is not config else set()))
    if unknown:
        near = did_you_mean(unknown[0], known | field_names(text))
        raise OptionError(f"{type(config).__name__} has no field {unknown[0]!r}", hint=near)
    return mine, rest


def _small_fields(source: Any) -> dict[str, Any]:
    standard = {held: name for name, held in source.attribute_map.items()}
    heads = getattr(source, "num_attention_heads", None)
    values: dict[str, Any] = {}
    special = iter(range(_FIRST_SPECIAL, SPECIAL_TOKENS))
    for field in fields(source):
        value = getattr(source, field.name, None)
        if is_token_id(field.name):
            reduced = _small_token(value, special)
        elif value is None:
            reduced = WHERE_UNSET.get(field.name)
        elif field.default is None:
            continue  # the class works it out, and shall do so again from the small sizes
        else:
            reduced = small(standard.get(field.name, field.name), value, heads)
        # Measured against the class, not the source: a part's source may differ from its class's defaults.
        if reduced != field.default:
            values[field.name] = reduced
    return values


def _small_token(value: Any, special: Iterator[int]) -> Any:
    if isinstance(value, (list, tuple)):
        return [_small_token(item, special) for item in value]
    return next(special) if isinstance(value, int) and value >= SPECIAL_TOKENS else value


def _layer_lists(source: Any) -> dict[str, Any]:
    """Every list with one entry a layer, cut down to the layers that show all its values, and their number."""
    count = getattr(source, "num_hidden_layers", None)
    if not isinstance(count, int) or count <= 2:
        return {}
    lists = {}
    for field in fields(source):
        value = getattr(source, field.name, None)
        # A list of all layers' numbers is as long, but it says nothing about a layer.
        if isinstance(value, (list, tuple)) and len(value) == count and list(value) != list(range(count)):
            lists[field.name] = value
    if not lists:
        return {}
    picked: list[int] = []
    for index in range(count):
        if any(value[index] not in [value[i] for i in picked] for value in lists.values()):
            picked.append(index)
    picked = picked if len(picked) > 1 else [0, 1]
    own = {field.name for field in fields(source)}
    name = source.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    values: dict[str, Any] = {name: len(picked)} if name in own else {}
    heads = getattr(source, "num_attention_heads", None)
    for name, value in lists.items():
        values[name] = [small(name.removesuffix("_per_layer"), value[i], heads) for i in picked]
    return values


def _rope(source: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Rope parameters that fit the small heads, and heads that leave a partial rotary something to rotate."""
    given = getattr(source, "rope_parameters", None)
    if not given:
        return {}
    own = {field.name for field in fields(source)}
    parameters = deepcopy(given)
    each = [p for p in parameters.values() if isinstance(p, dict)] or [parameters]
    fraction = min(p.get("partial_rotary_factor") or 1.0 for p in each)
    result: dict[str, Any] = {}
    head_dim = values.get("head_dim", HEAD_DIM)
    if fraction < 0.5:
        head_dim = 2 * HEAD_DIM
        if "head_dim" in values:
            result["head_dim"] = head_dim
        elif hasattr(source, "num_attention_heads"):
            result |= {name: value for name, value in _two_heads(source).items() if name in own}
    changed = False
    for p in each:
        if "mrope_section" in p:
            p["mrope_section"] = _sections(p["mrope_section"], int(head_dim * fraction) // 2)
            changed = True
        if "original_max_position_embeddings" in p:
            p["original_max_position_embeddings"] = LENGTH
            result["max_position_embeddings"] = int(LENGTH * p.get("factor", 1))
            changed = True
    if changed:
        result["rope_parameters"] = parameters
    return result


def _two_heads(source: Any) -> dict[str, int]:
    heads = source.attribute_map.get("num_attention_heads", "num_attention_heads")
    groups = source.attribute_map.get("num_key_value_heads", "num_key_value_heads")
    many = getattr(source, groups, None) == getattr(source, heads)
    return {heads: HIDDEN // (2 * HEAD_DIM), groups: HIDDEN // (2 * HEAD_DIM) if many else 1}


def _sections(sections: list[int], planes: int) -> list[int]:
    """Sections in about the same proportions that sum to `planes`."""
    reduced = [max(1, size * planes // sum(sections)) for size in sections]
    reduced[0] += planes - sum(reduced)
    return reduced
