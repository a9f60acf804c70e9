"""The run configuration: what may be written, of which type, and what contradicts what.

One section per stage; its keys are that stage's keyword arguments. A value's type is decided here,
not by YAML: ``1e-5`` is a number, ``true`` is not. :mod:`mlxpref.config_layers` reads files and
command lines into this schema.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from mlxpref.data.scale import MAX_DECIMALS
from mlxpref.data.shaping import Shaping
from mlxpref.errors import UsageError
from mlxpref.optimizer_options import option_problems

OPTIMIZER_OPTIONS: Mapping[str, frozenset[str]] = {
    "adam": frozenset({"betas", "eps", "bias_correction"}),
    "adamw": frozenset({"betas", "eps", "bias_correction"}),
    "sgd": frozenset({"momentum", "dampening", "nesterov"}),
    "muon": frozenset({"momentum", "nesterov", "ns_steps"}),
    "adafactor": frozenset({"eps", "clip_threshold", "decay_rate", "beta_1"}),
    "lion": frozenset({"betas"}),
}

BEST_METRICS: Mapping[str, int] = {
    "eval_loss": -1,
    "eval_rewards/accuracies": 1,
    "eval_rewards/margins": 1,
    "eval_rewards/chosen": 1,
    "eval_logps/chosen": 1,
    "eval_ranking_accuracy": 1,
    "eval_chosen_half/rewards/accuracies": 1,
    "eval_chosen_half/rewards/margins": 1,
    "eval_rejected_half/rewards/accuracies": 1,
    "eval_rejected_half/rewards/margins": 1,
}
"""Metrics a best checkpoint can be chosen by, and whether more (1) or less (-1) is better."""


def _number(value: Any) -> Any:
    """Text that is a number becomes one; a boolean is refused where a number is meant."""
    if isinstance(value, bool):
        raise ValueError(f"a number is needed, not {str(value).lower()}")
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"a number is needed, not {value!r}") from None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _number_or_dice(value: Any) -> Any:
    try:
        return value if value == "dice" else _number(value)
    except ValueError:
        raise ValueError(f'a number is needed, or "dice", not {value!r}') from None


def _whole_or_auto(value: Any) -> Any:
    if value == "auto":
        return value
    try:
        number = _number(value)
    except ValueError:
        raise ValueError(f'a number is needed, or "auto", not {value!r}') from None
    if not isinstance(number, int) or number < 1:
        raise ValueError(f'a whole number of at least 1 is needed, or "auto", not {value!r}')
    return number


def _option(value: Any) -> Any:
    """An option of an objective or optimiser: numeric text becomes a number, the rest stays."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    if isinstance(value, (list, tuple)):
        return [_option(item) for item in value]
    return value


def _options(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _option(item) for key, item in value.items()}
    return value


Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Whole = Annotated[int, BeforeValidator(_number)]
Count = Annotated[Whole, Field(ge=1)]
Share = Annotated[Real, Field(ge=0, le=1)]
Options = Annotated[dict[str, Any], BeforeValidator(_options)]


class Section(BaseModel):
    """Keys of one stage; a key that is not here is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    load_in_4bit: bool = False
    backend: str = "auto"


class _SourceKeys(Section):
    format: str | None = None
    columns: dict[str, str] | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    score: str | None = None
    streaming: bool = False
    limit: Count | None = None


class SourceSection(_SourceKeys):
    """One data source; the fields of :class:`mlxpref.data.sources.SourceSpec`."""

    path: str
    weight: Annotated[Real, Field(gt=0)] = 1.0


class DataSection(_SourceKeys):
    """``source`` is one path or hub id, described by the keys beside it, or a list of sources."""

    source: str | tuple[SourceSection, ...]
    valid: str | None = None
    valid_split: str | None = None
    valid_fraction: Annotated[Share, Field(lt=1)] | None = None
    strict: bool = False

    @model_validator(mode="before")
    @classmethod
    def _sources(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and isinstance(data.get("source"), (list, tuple, Mapping)):
            found = data["source"]
            sources = [found] if isinstance(found, Mapping) else list(found)
            return {**data, "source": [{"path": s} if isinstance(s, str) else s for s in sources]}
        return data


class RelabelSection(Section):
    """Arguments of ``fit_recipe`` and ``relabel_all``, and the fields of ``Scoring`` and ``Picking`` (the order of
    operations is in :mod:`mlxpref.data.shaping`); a template of None is the seed's wording."""

    template: str | None = None
    carrier: Literal["auto", "system", "first_user"] = "auto"
    score_range: tuple[Real, Real] | None = None
    goal_range: tuple[Real, Real] | None = None
    mapping: Literal["auto", "identity", "affine", "quantile"] = "auto"
    number_format: Annotated[Whole, Field(ge=0, le=MAX_DECIMALS)] | None = None
    top_goal: Real | dict[str, Real] | None = None
    attributes: tuple[str, ...] = ()
    halves: Literal["both", "chosen", "rejected"] = "both"
    ties: Literal["drop", "keep"] = "drop"
    min_gap: Annotated[Real, Field(ge=0)] = 0.0
    plain_share: Share = 0.0
    score_from: tuple[str, ...] = ()
    combine: str | None = None
    standardise: bool | None = None
    direction: str | None = None
    length_penalty: Annotated[float | Literal["dice"], BeforeValidator(_number_or_dice)] | None = None
    sample: Whole | None = None
    sample_beta: Real | None = None
    select: str | None = None
    drop_top: str | None = None
    strength_from: tuple[str, ...] = ()
    weakest: str | None = None

    @model_validator(mode="after")
    def _shape(self) -> RelabelSection:
        try:
            problems = list(Shaping.of(self.model_dump()).problems(ties=self.ties, attributes=self.attributes))
        except UsageError as error:
            problems = [line.strip() for line in str(error).splitlines()]
        if problems:  # ", not" in it: the reader of errors does not repeat the whole section behind it
            raise ValueError(f"refused, nothing was read: {' '.join(problems)}")
        return self


class TokenizationSection(Section):
    max_length: Annotated[Whole, Field(ge=8)] = 1024
    max_prompt_length: Annotated[Whole, Field(ge=4)] | None = None
    truncation: Literal["cut", "drop"] = "cut"


class BatchingSection(Section):
    """One optimiser step sees ``batch_size`` x ``gradient_accumulation_steps`` examples.

    How they are split for the device is ``micro_batch_tokens``' alone and changes no result; "auto" is settled by
    the run, as :mod:`mlxpref.planning.budget` has it.
    """

    batch_size: Count = 4
    gradient_accumulation_steps: Count = 1
    micro_batch_tokens: Annotated[int | Literal["auto"], BeforeValidator(_whole_or_auto)] = 8192
    shuffle: bool = True
    keep_together: bool = True
    max_shapes: Annotated[Whole, Field(ge=2)] = 128

    @property
    def examples_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def budget(self) -> int:
        """``micro_batch_tokens`` as a number; the default's where nothing has settled "auto"."""
        given = self.micro_batch_tokens
        return int(BatchingSection.model_fields["micro_batch_tokens"].default) if given == "auto" else given


class LoraParameters(Section):
    rank: Count = 8
    scale: Real | None = None
    alpha: Real | None = None
    dropout: Annotated[Real, Field(ge=0, lt=1)] = 0.0
    keys: tuple[str, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _default_scale(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("scale") is None and data.get("alpha") is None:
            return {**data, "scale": 20.0}
        return data

    def arguments(self) -> dict[str, Any]:
        """mlx-lm's ``lora_parameters``: the scale itself, alpha / rank where alpha was given."""
        scale = self.scale if self.alpha is None else self.alpha / self.rank
        given: dict[str, Any] = {"rank": self.rank, "scale": scale, "dropout": self.dropout}
        return given if self.keys is None else {**given, "keys": list(self.keys)}


class AdapterSection(Section):
    """A new adapter, or with ``init_from`` one that brings its own type, layers and parameters."""

    fine_tune_type: Literal["lora", "dora", "full"] | None = None
    num_layers: Annotated[Whole, Field(ge=-1)] | None = None
    lora_parameters: LoraParameters | None = None
    init_from: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or data.get("init_from") is not None:
            return data
        found = {key: value for key, value in data.items() if value is not None}
        filled = {"fine_tune_type": "lora", "num_layers": 16, **found}
        return filled if filled["fine_tune_type"] == "full" else {"lora_parameters": {}, **filled}


class ScheduleSection(Section):
    name: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[Whole, Field(ge=0)] | None = None
    warmup_ratio: Share | None = None
    end: Annotated[Real, Field(ge=0)] | None = None


class OptimizerSection(Section):
    name: Literal["adam", "adamw", "sgd", "muon", "adafactor", "lion"] = "adamw"
    learning_rate: Annotated[Real, Field(gt=0)] = 1e-5
    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    options: Options = {}
    max_grad_norm: Annotated[Real, Field(gt=0)] | None = 1.0
    schedule: ScheduleSection = ScheduleSection()


class ReferenceSection(Section):
    """``momentum`` accelerates a further round: :func:`mlxpref.momentum.momentum_logps`. ``previous`` is the adapter
    that the round before started from; None: the base.

    With ``update`` the reference follows the policy (TR-DPO); the next two have TRL's meanings and defaults.
    """

    store: str | None = None
    update: Literal["soft", "hard"] | None = None
    mixup_alpha: Annotated[Real, Field(gt=0, le=1)] | None = None
    sync_steps: Count | None = None
    previous: str | None = None
    momentum: Annotated[Real, Field(ge=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or data.get("update") is None:
            return data
        own = {"sync_steps": 512} | ({"mixup_alpha": 0.6} if data["update"] == "soft" else {})
        return {**data, **{key: value for key, value in own.items() if data.get(key) is None}}

    def update_arguments(self) -> dict[str, Any] | None:
        """``reference_update`` of a backend's ``make_step``; None where the reference stays."""
        if self.update is None:
            return None
        share = {} if self.mixup_alpha is None else {"alpha": self.mixup_alpha}
        return {"kind": self.update, "every": self.sync_steps, **share}


class TrainingSection(Section):
    iters: Count | None = None
    epochs: Annotated[Real, Field(gt=0)] | None = None
    grad_checkpoint: bool = False
    cache_frozen: bool = False
    fsdp: bool = False
    steps_per_report: Count = 10
    steps_per_eval: Annotated[Whole, Field(ge=0)] | None = None
    val_batches: Annotated[Whole, Field(ge=-1)] = 25
    save_every: Count = 100
    keep_last: Count | None = 3
    best_metric: str | None = None
    early_stopping: Count | None = None
    seed: Annotated[Whole, Field(ge=0, lt=2**32)] = 0

    @model_validator(mode="before")
    @classmethod
    def _one_epoch(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("iters") is None and data.get("epochs") is None:
            return {**data, "epochs": 1.0}
        return data


class OutputSection(Section):
    adapter_path: str = "adapters"
    report_to: tuple[Literal["wandb", "swanlab", "tensorboard"], ...] = ()
    project: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_or_many(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and isinstance(data.get("report_to"), str):
            names = [name.strip() for name in data["report_to"].split(",") if name.strip()]
            return {**data, "report_to": names}
        return data


class Config(Section):
    """One training run, resolved: every default filled in.

    ``relabel`` None trains unconditioned; ``objective`` is one mapping or a weighted list of them.
    """

    model: ModelSection
    data: DataSection
    relabel: RelabelSection | None = None
    tokenization: TokenizationSection = TokenizationSection()
    batching: BatchingSection = BatchingSection()
    adapter: AdapterSection = AdapterSection()
    objective: Options | tuple[Options, ...] = {"name": "dpo"}
    reference: ReferenceSection = ReferenceSection()
    optimizer: OptimizerSection = OptimizerSection()
    training: TrainingSection = TrainingSection()
    output: OutputSection = OutputSection()

    @model_validator(mode="before")
    @classmethod
    def _objective_by_name(cls, data: Any) -> Any:
        """A name alone is an objective; options alone are those of the default."""
        given = data.get("objective") if isinstance(data, Mapping) else None
        if isinstance(given, str):
            return {**data, "objective": {"name": given}}
        if isinstance(given, Mapping) and "name" not in given:
            return {**data, "objective": {"name": "dpo", **given}}
        return data

    def as_dict(self) -> dict[str, Any]:
        """Every key with its value, safe for YAML and JSON; keys that do not apply are left out."""
        found: dict[str, Any] = self.model_dump(mode="json")
        if isinstance(found["data"]["source"], list):
            for key in _SourceKeys.model_fields:
                found["data"].pop(key)
        return found


def contradictions(config: Config) -> Iterator[str]:
    """Every pair of values that cannot both be meant, in words with the remedy."""
    yield from _data_contradictions(config.data)
    yield from _adapter_contradictions(config.adapter)
    yield from _reference_contradictions(config.reference, config.adapter)
    yield from _optimizer_contradictions(config.optimizer)
    yield from _training_contradictions(config.training, config.adapter, config.reference)
    if config.relabel is not None and config.relabel.halves != "both" and config.relabel.plain_share == 1:
        yield "relabel.plain_share 1 leaves no conditioned row for relabel.halves: leave out relabel"
    prompt, whole = config.tokenization.max_prompt_length, config.tokenization.max_length
    if prompt is not None and prompt >= whole:
        yield (
            f"tokenization.max_prompt_length {prompt} leaves no room for a response in max_length {whole}: "
            "lower the first or raise the second"
        )


def _data_contradictions(data: DataSection) -> Iterator[str]:
    if data.valid is not None and data.valid_fraction is not None:
        yield "data.valid and data.valid_fraction both say where validation rows come from: keep one"
    if data.valid_split is not None and data.valid is None:
        yield "data.valid_split names a split of data.valid: give that too (it may be data.source again)"
    if not isinstance(data.source, str):
        for key, field in _SourceKeys.model_fields.items():
            if getattr(data, key) != field.default:
                yield f"data.{key} beside a list of sources: write it inside each source"
        if not data.source:
            yield "data.source is an empty list: name at least one source"


def _adapter_contradictions(adapter: AdapterSection) -> Iterator[str]:
    lora = adapter.lora_parameters
    if adapter.init_from is not None:
        for key in ("fine_tune_type", "num_layers", "lora_parameters"):
            if getattr(adapter, key) is not None:
                yield f"adapter.{key} with init_from: an adapter brings its own; leave it out"
    if adapter.fine_tune_type == "full" and lora is not None:
        yield "adapter.lora_parameters with fine_tune_type full: full fine-tuning has no LoRA; leave them out"
    if adapter.num_layers == 0:
        yield "adapter.num_layers 0 trains nothing: give a number of layers from the last, or -1 for all"
    if lora is not None and lora.scale is not None and lora.alpha is not None:
        yield "adapter.lora_parameters.scale and alpha both set the scale (scale = alpha / rank): keep one"


def _reference_contradictions(reference: ReferenceSection, adapter: AdapterSection) -> Iterator[str]:
    if reference.update is None:
        for key in ("mixup_alpha", "sync_steps"):
            if getattr(reference, key) is not None:
                yield f"reference.{key} without reference.update: write update: soft or hard, or leave it out"
    if reference.update == "hard" and reference.mixup_alpha is not None:
        yield "reference.mixup_alpha with update: hard, which copies the policy whole: leave it out, or write soft"
    if reference.update is not None and reference.momentum is not None:
        yield "reference.update and momentum both make a reference other than the one trained from: keep one"
    if reference.previous is not None and reference.momentum is None:
        yield "reference.previous without reference.momentum: give that, too (0.3, say), or leave previous out"
    if reference.momentum is not None and adapter.init_from is None:
        yield (
            "reference.momentum without adapter.init_from: momentum goes from the previous round's adapter (of the "
            "first round: from the base) to the one this round starts from; name that one there"
        )


def _optimizer_contradictions(optimizer: OptimizerSection) -> Iterator[str]:
    known = OPTIMIZER_OPTIONS[optimizer.name]
    for key in sorted(set(optimizer.options) - known):
        yield f"optimizer.options.{key}: {optimizer.name} takes {', '.join(sorted(known))}"
    given = {key: value for key, value in optimizer.options.items() if key in known}
    yield from (f"optimizer.options: {text}" for text in option_problems(optimizer.name, given))
    if optimizer.name == "adam" and optimizer.weight_decay > 0:
        yield "optimizer.weight_decay with adam: adam applies none; use adamw"
    schedule = optimizer.schedule
    if schedule.warmup_steps is not None and schedule.warmup_ratio is not None:
        yield "optimizer.schedule.warmup_steps and warmup_ratio both set the warm-up: keep one"
    if schedule.name == "constant" and schedule.end is not None:
        yield "optimizer.schedule.end with a constant schedule: name it linear or cosine, or leave end out"
    if schedule.end is not None and schedule.end > optimizer.learning_rate:
        yield (
            f"optimizer.schedule.end {schedule.end:g} is above learning_rate "
            f"{optimizer.learning_rate:g}: it is the rate the schedule falls to"
        )


def _training_contradictions(
    training: TrainingSection, adapter: AdapterSection, reference: ReferenceSection
) -> Iterator[str]:
    if training.iters is not None and training.epochs is not None:
        yield "training.iters and training.epochs both set the length of the run: keep one"
    if training.fsdp and adapter.init_from is None and adapter.fine_tune_type != "full":
        yield "training.fsdp is for adapter.fine_tune_type: full; an adapter's base is in memory whole"
    for key in ("update", "momentum"):
        if training.fsdp and getattr(reference, key) is not None:
            yield f"reference.{key} with training.fsdp: it needs a second set of weights; leave one of them out"
    if training.cache_frozen and adapter.init_from is None and adapter.num_layers == -1:
        yield "training.cache_frozen with adapter.num_layers -1: every layer trains, none is the same in every epoch"
    if training.val_batches == 0:
        yield "training.val_batches 0: write steps_per_eval: 0 for no evaluation, or -1 for all batches"
    if training.best_metric is not None and training.best_metric not in BEST_METRICS:
        yield (
            f"training.best_metric {training.best_metric!r} is not one of {', '.join(BEST_METRICS)}"
        )
    if training.steps_per_eval == 0 and training.best_metric is not None:
        yield "training.best_metric needs evaluations, and steps_per_eval is 0"
    if training.early_stopping is not None and training.best_metric is None:
        yield "training.early_stopping needs training.best_metric, the metric that has to improve"
