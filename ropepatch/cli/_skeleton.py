"""A model as its config describes it, without its weights: enough to see where it keeps positions."""

from __future__ import annotations

from typing import Any

from ropepatch.errors import ModelLoadError


def build_skeleton(name: str) -> Any:
    """Build the model that a folder or hub id describes, reading its config only.

    Parameters are allocated but never written, so even a model larger than memory is built in seconds: an operating
    system gives pages out when they are touched. Buffers, `inv_freq` among them, hold what they hold in the loaded
    model. Outputs of the model mean nothing.

    Args:
        name: a folder or a hub id, as `ropepatch.loading.model_source` gives it.

    Raises:
        ModelLoadError: there is no config, or transformers cannot build a model from it.
    """
    import transformers
    from transformers.initialization import no_init_weights

    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelLoadError(
            f"cannot read the config of {name!r} ({_first_line(error)})",
            hint="give a folder with a config.json of a model that transformers knows, a hub id, or demo:smollm2",
        ) from error
    model_class = class_of(config)
    try:
        with no_init_weights():
            model = model_class._from_config(config).eval()
        _write_computed_tables(model)
        return model
    except Exception as error:
        raise ModelLoadError(f"cannot build {name!r} from its config ({_first_line(error)})") from error


def _write_computed_tables(model: Any) -> None:
    """Give position tables values: what a table of sines and cosines holds is what tells it from a learned one."""
    from ropepatch.families import discover

    for site in discover(model):
        if site.kind == "table":
            model._init_weights(model.get_submodule(site.path))


def class_of(config: Any) -> Any:
    """The transformers class that a config describes: the one it names, else that of its kind.

    Raises:
        ModelLoadError: transformers has none.
    """
    import transformers

    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise ModelLoadError(
        f"transformers has no model class for the config of type {config.model_type!r}",
        given=config.architectures,
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
