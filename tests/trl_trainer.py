"""One run by TRL's ``DPOTrainer`` and one by ``mlxpref.train``, from one set of settings, side by side.

Nothing of theirs is replaced, only their collator listened to: their trainer loads the model, renders and tokenizes the
texts, pads, schedules, clips and steps. Two things are taken from one side to the other: where the adapter starts, and
the prompts with the goals that we wrote into them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from mlxpref import backends
from mlxpref.config import Config
from mlxpref.config_layers import load_config
from mlxpref.data.tokenization import load_tokenizer
from mlxpref.prepare import prepare
from mlxpref.train import train

Values = Mapping[str, np.ndarray]
"""Factors of an adapter under our names: ``….q_proj.lora_a`` (in, r), ``….lora_b`` (r, out)."""

Row = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

N_STEPS = 30
KEYS = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
    "logps/rejected", "grad_norm", "learning_rate",
)  # fmt: skip
"""What both sides say of every step, under the same names."""

LAST_LAYERS = 2
"""Layers from the last that have an adapter."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MODULES = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Case:
    """What both sides are told.

    Attributes:
        start: ``zero``: a new adapter as PEFT begins one, lora_B = 0. ``moved``: a new adapter both of whose factors
            are random, while the reference has none. ``further``: an adapter to go on with, which is the reference.
        micro: pairs of one of TRL's micro-batches; a step has 4.
        modules: what has an adapter, by its last name.
    """

    start: str = "zero"
    micro: int = 4
    beta: float = 0.1
    rank: int = 8
    alpha: float = 16.0
    modules: Sequence[str] = MODULES
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup: int = 3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Ran:
    """A run: what it said of every step, and the adapter it left.

    Attributes:
        steps: by name, (30,) float64.
        adapter: at the end.
        began: the adapter's values before the first step.
        folder: what was saved.
        rows: of their run, (prompt, chosen, rejected) ids of every pair of every step.
    """

    steps: Mapping[str, np.ndarray]
    adapter: Values
    began: Values
    folder: Path
    rows: Sequence[Row] = ()


# --- factors, both ways ------------------------------------------------------------------------

_LETTERS = {"lora_a": "lora_A", "lora_b": "lora_B"}


def factors_of(model: Any) -> dict[str, np.ndarray]:
    """The trainable adapter of a PEFT model under our names; PEFT keeps the transposed factors."""
    found = {}
    for ours, theirs in _LETTERS.items():
        for name, value in model.named_parameters():
            if name.endswith(f".{theirs}.default.weight"):
                module = name.removeprefix("base_model.model.").removesuffix(f".{theirs}.default.weight")
                found[f"{module}.{ours}"] = value.detach().numpy().T.copy()
    return found


def set_factors(model: Any, values: Values) -> None:
    """Write an adapter of ours over that of a PEFT model; every factor of one has to be the other's."""
    import torch

    parameters = {name: value for name, value in model.named_parameters() if ".default." in name}
    for name, value in values.items():
        module, _, ours = name.rpartition(".")
        target = parameters.pop(f"base_model.model.{module}.{_LETTERS[ours]}.default.weight")
        target.data.copy_(torch.from_numpy(value.T.copy()))
    assert not parameters, f"not among ours: {sorted(parameters)}"


def random_factors(like: Values, seed: int = 7) -> dict[str, np.ndarray]:
    """Both factors random, and large enough to be seen in every log-prob."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(value.shape) * (0.3 if name.endswith("lora_a") else 0.02)).astype(np.float32)
        for name, value in sorted(like.items())
    }


# --- their run ---------------------------------------------------------------------------------


def theirs(case: Case, model_folder: Path, rows: Any, folder: Path) -> Ran:
    """Train with ``DPOTrainer``, the reference computed beside the policy in every step.

    Args:
        rows: a ``Dataset`` of pairs, messages or texts.
    """
    trainer = trainer_of(case, model_folder, rows, folder)
    assert trainer.ref_model is None and not trainer.precompute_ref_logps
    if case.start == "moved":
        set_factors(trainer.model, random_factors(factors_of(trainer.model)))
    began = factors_of(trainer.model)
    seen: list[Row] = []
    trainer.data_collator = _recorded(trainer.data_collator, seen)
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    steps = _columns([entry for entry in trainer.state.log_history if "loss" in entry])
    return Ran(steps, factors_of(trainer.model), began, folder / "saved", seen)


def trainer_of(case: Case, model_folder: Path, rows: Any, folder: Path) -> Any:
    """Their trainer as a user makes it, with a new adapter or with a model that has one."""
    from trl import DPOTrainer

    given: dict[str, Any] = {"model": str(model_folder), "peft_config": peft_config(case, model_folder)}
    if case.start == "further":
        given = {"model": _with_adapter(case, model_folder)}
    return DPOTrainer(
        **given, args=dpo_config(case, folder, load="peft_config" in given), train_dataset=rows,
        processing_class=load_tokenizer(str(model_folder)),
    )  # fmt: skip


def dpo_config(case: Case, folder: Path, *, load: bool) -> Any:
    from trl import DPOConfig

    return DPOConfig(
        output_dir=str(folder), max_steps=N_STEPS, seed=0,
        per_device_train_batch_size=case.micro, gradient_accumulation_steps=4 // case.micro,
        train_sampling_strategy="sequential", beta=case.beta, loss_type=["sigmoid"], max_length=None,
        learning_rate=case.learning_rate, lr_scheduler_type=case.schedule, warmup_steps=case.warmup,
        optim="adamw_torch", weight_decay=case.weight_decay, adam_epsilon=case.eps,
        adam_beta1=case.betas[0], adam_beta2=case.betas[1], max_grad_norm=case.max_grad_norm,
        logging_steps=1, precompute_ref_log_probs=False, gradient_checkpointing=False, bf16=False, use_cpu=True,
        save_strategy="no", report_to="none", disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"} if load else None,
    )  # fmt: skip


def peft_config(case: Case, model_folder: Path) -> Any:
    from peft import LoraConfig

    n_layers = json.loads((model_folder / "config.json").read_text())["num_hidden_layers"]
    return LoraConfig(
        r=case.rank, lora_alpha=case.alpha, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
        target_modules=list(case.modules), layers_to_transform=list(range(n_layers))[-LAST_LAYERS:],
    )  # fmt: skip


def _with_adapter(case: Case, model_folder: Path) -> Any:
    """A PEFT model: TRL keeps a copy of its adapter, which is the reference."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype="float32")
    model = get_peft_model(base, peft_config(case, model_folder))
    set_factors(model, random_factors(factors_of(model)))
    return model


def _recorded(collator: Callable[..., Any], seen: list[Row]) -> Callable[..., Any]:
    """The same collator; the ids of every pair it puts into a batch are read back from the batch."""

    def collate(examples: Any) -> Any:
        batch = collator(examples)
        n = len(batch["input_ids"]) // 2
        for pair in range(n):
            (prompt, chosen), (again, rejected) = (_parted(batch, row) for row in (pair, n + pair))
            assert prompt == again
            seen.append((prompt, chosen, rejected))
        return batch

    return collate


def _parted(batch: Any, row: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that are read, and ids that are scored, of one row of a batch."""
    ids, real, scored = (batch[key][row].bool() if key != "input_ids" else batch[key][row]
                         for key in ("input_ids", "attention_mask", "completion_mask"))  # fmt: skip
    return tuple(ids[real & ~scored].tolist()), tuple(ids[real & scored].tolist())


# --- our run -----------------------------------------------------------------------------------


def ours(
    case: Case, backend: str, model_folder: Path, source: Path, folder: Path, began: Values, *changes: tuple[str, Any]
) -> Ran:
    """Train with ``mlxpref.train`` from the same start.

    Args:
        source: the same rows as a file, or as a relabelled folder.
        began: where the adapter starts.
        changes: settings by dotted key that make this another run than theirs.
    """
    machine = backends.get(backend)
    config = config_of(case, model_folder, source, folder, *changes)
    if case.start == "further":
        policy = machine.load_policy(str(model_folder), dtype="float32", **_new_adapter(config))
        policy.set_values(began)
        machine.save_adapter(policy, folder / "began", extra={})
        further = config.adapter.model_validate({"init_from": str(folder / "began")})
        result = train(config.model_copy(update={"adapter": further}), backend=machine)
    else:
        result = train(config, backend=_starting(machine, began))
    lines = (result.folder / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    return Ran(_columns(logged), load_file(result.folder / "adapters.safetensors"), began, result.folder)


def our_rows(case: Case, model_folder: Path, source: Path, folder: Path) -> list[Row]:
    """(prompt, chosen, rejected) ids of every pair of the data, in order."""
    config = config_of(case, model_folder, source, folder)
    found = [(row.prompt_ids, *row.response_ids) for row in prepare(config).train]
    return [(tuple(a.tolist()), tuple(b.tolist()), tuple(c.tolist())) for a, b, c in found]


def _starting(machine: ModuleType, began: Values) -> ModuleType:
    """The same backend, whose new adapters begin with these values."""
    other = ModuleType(machine.__name__)
    other.__dict__.update(machine.__dict__)

    def load_policy(*args: Any, **kwargs: Any) -> Any:
        policy = machine.load_policy(*args, **kwargs)
        policy.set_values(began)
        return policy

    other.load_policy = load_policy
    return other


def _columns(logged: Sequence[Mapping[str, float]]) -> dict[str, np.ndarray]:
    return {key: np.array([entry[key] for entry in logged]) for key in KEYS}


def _new_adapter(config: Config) -> dict[str, Any]:
    adapter = config.adapter
    lora = adapter.lora_parameters.arguments()
    return {"fine_tune_type": "lora", "num_layers": adapter.num_layers, "lora_parameters": lora}


def config_of(case: Case, model_folder: Path, source: Path, folder: Path, *changes: tuple[str, Any]) -> Config:
    """The same settings as a configuration of ours."""
    keys = [f"{'self_attn' if name in ATTENTION else 'mlp'}.{name}" for name in case.modules]
    lora = {"rank": case.rank, "alpha": case.alpha, "dropout": 0.0, "keys": keys}
    base = {
        "model": {"path": str(model_folder), "dtype": "float32"},
        "data": {"source": str(source), "strict": True},
        "tokenization": {"max_length": 512, "max_prompt_length": 400, "truncation": "drop"},
        "batching": {"batch_size": case.micro, "gradient_accumulation_steps": 4 // case.micro, "shuffle": False,
                     "max_shapes": 4},
        "adapter": {"num_layers": LAST_LAYERS, "lora_parameters": lora},
        "objective": {"name": "dpo", "beta": case.beta},
        "reference": {"store": str(folder / "store")},
        "optimizer": {
            "name": "adamw", "learning_rate": case.learning_rate, "weight_decay": case.weight_decay,
            "options": {"betas": list(case.betas), "eps": case.eps}, "max_grad_norm": case.max_grad_norm,
            "schedule": {"name": case.schedule, "warmup_steps": case.warmup},
        },
        "training": {"iters": N_STEPS, "steps_per_eval": 0, "save_every": N_STEPS},
        "output": {"adapter_path": str(folder / "run")},
    }  # fmt: skip
    return load_config(base=base, overrides=changes)
