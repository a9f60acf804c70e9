"""TRL's ``DPOTrainer`` on PyTorch, its own loop, stopped by a callback where a step begins.

Its new adapter is the reference when it is switched off, as is its default; or the reference's log-probs are made
beforehand. Its gradient is read where its optimiser is about to be called, in the first step.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from bench.model import ALPHA, MODULES, RANK, read_tokenizer, text_of
from bench.pairs import load_pairs
from bench.spine import save_gradients, start
from bench.torch_common import equip, prepare, resident
from bench.worker import Gate, Task

FACTORS = {"lora_a": "lora_A", "lora_b": "lora_B"}


def trl(task: Task, gate: Gate) -> None:
    _train(task, gate, precomputed=False)


def trl_precomputed(task: Task, gate: Gate) -> None:
    _train(task, gate, precomputed=True)


def _train(task: Task, gate: Gate, *, precomputed: bool) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOTrainer

    prepare(task)
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32)
    loaded = resident()
    pairs = load_pairs(task.pairs)[: task.batch_size]
    rows = [{key: text_of(ids) for key, ids in pair._asdict().items()} for pair in pairs]
    adapter = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
        target_modules=[name.rpartition(".")[2] for name in MODULES],
    )  # fmt: skip
    trainer = DPOTrainer(
        model=model, args=_settings(task, precomputed), train_dataset=Dataset.from_list(rows), peft_config=adapter,
        processing_class=read_tokenizer(task.model),
    )  # fmt: skip
    _check_lengths(trainer.train_dataset, task, pairs)
    for name, value in _factors(trainer.model).items():
        value.data.copy_(torch.from_numpy(start(task)[name].T.copy()))
    equip(gate, loaded)
    trainer.add_callback(_AtGate(gate, task))
    trainer.train()


def _settings(task: Task, precomputed: bool) -> Any:
    from trl import DPOConfig

    return DPOConfig(
        output_dir=tempfile.mkdtemp(prefix="bench-", dir=Path(task.pairs).parent),
        max_steps=10**6, per_device_train_batch_size=task.batch_size,
        train_sampling_strategy="sequential", beta=task.beta, loss_type=["sigmoid"], max_length=None,
        learning_rate=task.learning_rate, lr_scheduler_type="constant", optim="adamw_torch",
        weight_decay=task.weight_decay, max_grad_norm=0.0, logging_strategy="no", save_strategy="no",
        precompute_ref_log_probs=precomputed, gradient_checkpointing=task.grad_checkpoint, bf16=False, use_cpu=True,
        report_to="none", disable_tqdm=True,
    )  # fmt: skip


def _check_lengths(rows: Any, task: Task, pairs: list) -> None:
    """That the trainer reads as many tokens as everybody else."""
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    theirs = [[len(row[key]) for key in columns] for row in rows]
    ours = [[len(ids) for ids in pair] for pair in pairs]
    if theirs != ours:
        raise RuntimeError(f"TRL reads pairs of {theirs} tokens, which have {ours}")


def _factors(model: Any) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters under mlx-lm's names; PEFT keeps both factors transposed."""
    found = {}
    for ours, theirs in FACTORS.items():
        for name, value in model.named_parameters():
            if name.endswith(f".{theirs}.default.weight"):
                module = name.removeprefix("base_model.model.").removesuffix(f".{theirs}.default.weight")
                found[f"{module}.{ours}"] = value
    return found


class _AtGate(TrainerCallback):
    def __init__(self, gate: Gate, task: Task) -> None:
        self._gate, self._gradients = gate, task.gradients

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._gate()

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        if self._gradients:
            gradients = {name: value.grad.T.numpy() for name, value in _factors(model).items()}
            save_gradients(gradients, self._gradients)
            self._gradients = None
