"""A config of the model's own: several models may have been built from one config object, and a patch is of one."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def own_config(host: nn.Module) -> None:
    """Give every module of `host` that holds a config a copy of it, equal in every entry.

    One copy stands for one config wherever it was held, also inside another config. It is not undone: what is set in
    the config while a model is patched stays when the patch goes.
    """
    from transformers import PreTrainedConfig

    copies: dict[int, Any] = {}
    for module in host.modules():
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig):
            # The memo also keeps the originals alive, so that no id is used twice.
            vars(module)["config"] = copy.deepcopy(config, copies)
