"""lm-evaluation-harness on patched models: the harness's own Hugging Face wrapper, around a model of ours.

The harness (PyPI `lm-eval`) finds no models of other packages by itself, so its own command line is started through
this module, which registers the model type `ropepatch` first:

    python -m ropepatch.evaluation.harness run --model ropepatch --tasks arc_easy \
        --model_args '{"pretrained": "path/to/model", "patch": "yarn", "options": {"factor": 2}}'
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

import ropepatch
from ropepatch.errors import (
    DependencyError,
    OptionError,
    PromptError,
    RopepatchError,
    UnknownNameError,
    UsageError,
    did_you_mean,
)
from ropepatch.evaluation.limits import check_length
from ropepatch.loading import load_model

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise DependencyError(
        f"lm-evaluation-harness cannot be imported: {error}", hint="run: pip install 'ropepatch[harness]'"
    ) from error

# What `HFLM` does with a model that is loaded already. It takes any other name as well, and does nothing with it.
HARNESS_OPTIONS = (
    "add_bos_token",
    "batch_size",
    "chat_template_args",
    "enable_thinking",
    "logits_cache",
    "max_batch_size",
    "mixed_precision_dtype",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
)


@register_model("ropepatch")
class PatchedLM(HFLM):
    """A model, patched or not, for the tasks of lm-evaluation-harness.

    Nothing is cut: a request that is longer than `max_length` is an error, where `HFLM` drops its beginning with a
    warning. Only `loglikelihood_rolling` (perplexity tasks) splits texts, into windows of `max_length`, as it is meant
    to.

    Args:
        pretrained: a model's name as `ropepatch.load_model` takes it, or a loaded causal language model, which stays
            as it is (but is put into eval mode).
        patch: the method to patch a named model with.
        options: the method's options; a mapping, or the same as a JSON text.
        dtype: of a named model: "float32", "bfloat16" or "auto".
        tokenizer: of a loaded model; not changed.
        max_length: most tokens of a request, generated ones included; by default the patch's target length, and of an
            unpatched model the trained length.
        device: where a named model goes, if this machine has it.
        harness: further arguments of `HFLM`: those in `HARNESS_OPTIONS`.

    Raises:
        OptionError: an argument that nobody would read, or no length that `max_length` could have by default.
        UsageError: a patch for a model that is loaded already, no tokenizer for it, several processes.
        UnsupportedModelError: `max_length` exceeds the model's table of positions.
        RopepatchError: whatever loading and patching refuse.
    """

    def __init__(
        self,
        pretrained: Any,
        patch: str | None = None,
        *,
        options: Mapping[str, Any] | str | None = None,
        dtype: Any = "auto",
        tokenizer: Any = None,
        max_length: int | None = None,
        device: str | None = None,
        **harness: Any,
    ) -> None:
        _check_arguments(pretrained, patch, options, tokenizer, harness)
        chosen = _mapping(options)
        if isinstance(pretrained, (str, os.PathLike)):
            model, tokenizer = load_model(pretrained, dtype=dtype)
            _place(model, device)
            if patch is not None:
                ropepatch.patch(model, patch, **chosen)
            self.name = os.fspath(pretrained)
        else:
            model = pretrained
            self.name = str(model.config._name_or_path or type(model).__name__)
        length = _longest(model, max_length)
        check_length(model, length)
        # HFLM gives it a padding token.
        tokenizer = copy.deepcopy(tokenizer)
        super().__init__(pretrained=model, backend="causal", tokenizer=tokenizer, max_length=length, **harness)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask of prompts, [batch, longest], both; refused where `HFLM` would cut them."""
        ids, mask = super().tok_batch_encode(strings, padding_side=padding_side, truncation=truncation)
        if left_truncate_len is not None:
            self._refuse_longer(ids.shape[1] + self.max_length - left_truncate_len)
        return ids, mask

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **more: Any) -> list[Any]:
        # The last token is predicted, not read.
        self._refuse_longer(max((len(context) + len(answer) - 1 for _, context, answer in requests), default=0))
        return list(super()._loglikelihood_tokens(requests, **more))

    def _refuse_longer(self, tokens: int) -> None:
        if tokens > self.max_length:
            raise PromptError(
                f"a request has {tokens} tokens, generated ones included, and would be cut to {self.max_length}",
                hint="choose a larger max_length, or a task with shorter prompts",
            )

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results' `config`; ours is under `ropepatch`."""
        model = self.model
        inspection = ropepatch.inspect(model)
        names = ("ropepatch", "torch", "transformers", "lm_eval")
        ours = {
            "model": self.name,
            "patch": ropepatch.record_of(model),
            "trained_length": inspection.trained_length,
            "target_length": inspection.target_length,
            "max_length": self.max_length,
            "versions": {name: importlib.metadata.version(name) for name in names}
            | {"python": platform.python_version()},
        }
        return {**super().get_model_info(), "ropepatch": ours}


def find_tasks(
    names: Sequence[str],
    *,
    metadata: Mapping[str, Any] | None = None,
    include_path: str | os.PathLike[str] | None = None,
) -> Any:
    """The harness's `TaskManager`, after a look whether it knows these tasks. No data is loaded.

    Args:
        names: tasks, groups or tags of the harness, patterns of such names, or paths of YAML files.
        metadata: settings of tasks; RULER's read `max_seq_lengths` and `tokenizer` (a folder or a hub id).
        include_path: folder with further tasks.

    Raises:
        UnknownNameError: no such task.
        UsageError: no task is named, or the folder does not exist.
    """
    from lm_eval.tasks import TaskManager

    if not names:
        raise UsageError("no task is named")
    if include_path is not None and not Path(include_path).is_dir():
        raise UsageError("there is no such folder of tasks", given=os.fspath(include_path))
    manager = TaskManager(
        include_path=None if include_path is None else str(include_path), metadata=dict(metadata or {})
    )
    for name in names:
        if not manager.match_tasks([name]) and not Path(name).is_file():
            near = did_you_mean(name, manager.all_tasks)
            raise UnknownNameError(f"lm-eval has no task {name!r}", hint=near or "list them with: lm-eval ls tasks")
    return manager


def run_harness(
    lm: PatchedLM,
    tasks: Sequence[str],
    *,
    manager: Any = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    seed: int | None = None,
) -> dict[str, Any]:
    """Run tasks of the harness.

    Args:
        lm: the model.
        tasks: as for `find_tasks`.
        manager: what `find_tasks` returned for them, if they need metadata or further folders.
        limit: examples of each task: a number, or a share below 1.
        num_fewshot: solved examples in front of each prompt; None: as the task says.
        chat_template: put prompts into the tokenizer's chat template.
        seed: of Python, numpy, torch and the choice of solved examples; None: the harness's own.

    Returns:
        The harness's results as strict JSON data ("NaN" and "Infinity" are texts), with every example under `samples`
        and the patch record, versions and lengths under `config`, `ropepatch`.

    Raises:
        UnknownNameError: no such task.
        PromptError: a request is too long, or there is no chat template.
        RopepatchError: a task failed, for one because its data cannot be had; the error's cause says where.
    """
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable

    if limit is not None and not (math.isfinite(limit) and limit > 0):
        raise OptionError("limit must be a positive number", given=limit)
    if chat_template and not getattr(lm.tokenizer, "chat_template", None):
        raise PromptError("the tokenizer has no chat template", hint="turn the chat template off")
    manager = find_tasks(tasks) if manager is None else manager
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    try:
        # The harness and its tasks print as they like; stdout is for results.
        with redirect_stdout(sys.stderr):
            results = simple_evaluate(
                model=lm,
                tasks=_resolved(manager, tasks),
                task_manager=manager,
                limit=limit if limit is None or limit < 1 else int(limit),
                num_fewshot=num_fewshot,
                batch_size=lm.batch_size,
                apply_chat_template=chat_template,
                **({} if seed is None else dict.fromkeys(seeds, seed)),
            )
    except RopepatchError:
        raise
    except Exception as error:  # tasks are programs that load data: they raise what they like
        raise RopepatchError(f"lm-eval failed: {type(error).__name__}: {error}") from error
    text = json.dumps(results, default=handle_non_serializable, ensure_ascii=False)
    plain: dict[str, Any] = json.loads(text, parse_constant=str)
    return plain


def table(results: Mapping[str, Any]) -> str:
    """The harness's own tables of results, in Markdown."""
    from lm_eval.utils import make_table

    columns = ["results", *(["groups"] if results.get("groups") else [])]
    return "\n".join(str(make_table(results, column)) for column in columns)


def command() -> None:
    """The harness's own command line, which now knows the model type `ropepatch`."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


def _check_arguments(
    pretrained: Any, patch: str | None, options: Any, tokenizer: Any, harness: Mapping[str, Any]
) -> None:
    for name in harness:
        if name not in HARNESS_OPTIONS:
            raise OptionError(
                f"the model type ropepatch has no argument {name!r}",
                allowed=HARNESS_OPTIONS,
                hint="options of the method go into options",
            )
    if options and patch is None:
        raise UsageError("options need a patch", given=options, hint="name the method that takes them")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("the harness runs in one process here", given=f"WORLD_SIZE={os.environ['WORLD_SIZE']}")
    named = isinstance(pretrained, (str, os.PathLike))
    if named and tokenizer is not None:
        raise UsageError("a named model comes with its own tokenizer", given=str(tokenizer)[:80])
    if not named and patch is not None:
        raise UsageError("the model is loaded already", given=patch, hint="patch it with ropepatch.patch first")
    if not named and tokenizer is None:
        raise UsageError("a loaded model needs its tokenizer", hint="pass tokenizer=...")


def _mapping(options: Mapping[str, Any] | str | None) -> Mapping[str, Any]:
    try:
        found = json.loads(options) if isinstance(options, str) else options or {}
    except ValueError:
        found = options
    if not isinstance(found, Mapping):
        raise OptionError("options must be a JSON object", given=options, hint='for example {"factor": 2}')
    return found


def _place(model: Any, device: str | None) -> None:
    if device is None:
        return
    wanted = torch.device(device)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    # The harness's command asks for cuda:0 whatever the machine has.
    if wanted.type == "cpu" or (accelerator is not None and wanted.type == accelerator.type):
        model.to(wanted)


def _longest(model: Any, max_length: int | None) -> int:
    length = ropepatch.inspect(model).target_length if max_length is None else max_length
    if length is None:
        raise OptionError("the model's config states no length", hint="say max_length")
    if length < 1:
        raise OptionError("max_length must be positive", given=length)
    return length


def _resolved(manager: Any, tasks: Sequence[str]) -> list[str]:
    """Patterns spelled out; paths as they are."""
    return [name for task in tasks for name in manager.match_tasks([task]) or [task]]


if __name__ == "__main__":
    command()
