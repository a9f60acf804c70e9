"""Trainers of other projects on MLX, their own loops and steps, stopped where they take a batch.

Their gradient is what they hand to the optimiser: one step of theirs with an optimiser that keeps it.
"""

from __future__ import annotations

import gc
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from bench.mlx_common import Keep, adamw, base_model, equip, mx, n_bytes, with_lora
from bench.model import END_TEXT, read_tokenizer, text_of
from bench.pairs import Pair, load_pairs
from bench.spine import save_gradients
from bench.worker import Finished, Gate, Task

ENDLESS = 10**9
LONGEST = 1 << 16


def _gated(batches: Callable[..., Iterator[Any]], gate: Callable[[], None]) -> Callable[..., Iterator[Any]]:
    """The same batches, each handed out when the gate lets the step begin."""

    def handed_out(*args: Any, **kwargs: Any) -> Iterator[Any]:
        theirs = batches(*args, **kwargs)
        while True:
            gate()
            batch = next(theirs, None)
            if batch is None:
                return
            yield batch

    return handed_out


class _Once:
    """A gate that lets one step through."""

    def __init__(self) -> None:
        self.passed = False

    def __call__(self) -> None:
        if self.passed:
            raise Finished
        self.passed = True


def _kept_gradients(run: Callable[[Any, Callable[[], None]], None], task: Task) -> None:
    """Write the gradients of one step of a trainer, ``run(optimizer, gate)``."""
    keep = Keep()
    with suppress(Finished):
        run(keep, _Once())
    save_gradients(keep.gradients(), task.gradients)
    gc.collect()
    mx.clear_cache()


def _offer_a_working_set() -> None:
    """``train_dpo`` sets MLX's wired limit to a number that only Metal has; elsewhere the limit does nothing."""
    info = dict(mx.device_info())
    if "max_recommended_working_set_size" not in info:
        mx.device_info = lambda *_: {**info, "max_recommended_working_set_size": 0}
        mx.set_wired_limit = lambda _: 0


def _quiet_place(task: Task) -> Path:
    """A file in a folder that goes when the comparison is over."""
    return Path(tempfile.mkdtemp(prefix="bench-", dir=Path(task.pairs).parent)) / "adapters.safetensors"


def mlx_lm_lora(task: Task, gate: Gate) -> None:
    """``train_dpo`` of mlx-lm-lora with its batches and, as its command has it, a second model for reference."""
    trainer = _mlx_lm_lora_trainer()
    batches = trainer.iterate_dpo_batches
    model, reference = with_lora(base_model(task)[0], task), base_model(task)[0]
    rows = _mlx_lm_lora_rows(load_pairs(task.pairs)[: task.batch_size])
    arguments = _mlx_lm_lora_arguments(trainer, task, ENDLESS)

    def run(optimizer: Any, gate: Callable[[], None]) -> None:
        trainer.iterate_dpo_batches = _gated(batches, gate)
        trainer.train_dpo(model, reference, optimizer, rows, args=arguments, loss_type="sigmoid")

    if task.gradients:
        _kept_gradients(run, task)
    equip(gate, n_bytes(model), n_bytes(reference))
    run(adamw(task), gate)


def mlx_lm_lora_run(task: Task, gate: Gate) -> None:
    """All of ``train_dpo``, untouched: its loop draws one of its batches at random in each iteration."""
    trainer = _mlx_lm_lora_trainer()
    model, reference = with_lora(base_model(task)[0], task), base_model(task)[0]
    rows = _mlx_lm_lora_rows(load_pairs(task.pairs))
    arguments = _mlx_lm_lora_arguments(trainer, task, task.epochs * (len(rows) // task.batch_size))
    np.random.seed(task.seed)
    equip(gate, n_bytes(model), n_bytes(reference))
    gate()
    trainer.train_dpo(model, reference, adamw(task), rows, args=arguments, loss_type="sigmoid")
    gate()


def _mlx_lm_lora_trainer() -> Any:
    _offer_a_working_set()
    return importlib.import_module("mlx_lm_lora.trainer.dpo_trainer")


def _mlx_lm_lora_rows(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    return [
        {
            "chosen": [*pair.prompt.tolist(), *pair.chosen.tolist()],
            "rejected": [*pair.prompt.tolist(), *pair.rejected.tolist()],
            "chosen_prompt_length": len(pair.prompt), "rejected_prompt_length": len(pair.prompt),
        }
        for pair in pairs
    ]  # fmt: skip


def _mlx_lm_lora_arguments(trainer: Any, task: Task, iters: int) -> Any:
    return trainer.DPOTrainingArgs(
        batch_size=task.batch_size, iters=iters, beta=task.beta, max_seq_length=LONGEST,
        steps_per_report=iters, steps_per_eval=ENDLESS, steps_per_save=ENDLESS,
        adapter_file=_quiet_place(task), grad_checkpoint=task.grad_checkpoint,
    )  # fmt: skip


def sft(task: Task, gate: Gate) -> None:
    """mlx-lm's own LoRA training on the chosen and rejected rows: 2B of them in a batch, its loss, its padding."""
    trainer = importlib.import_module("mlx_lm.tuner.trainer")
    model = with_lora(base_model(task)[0], task)
    pairs = load_pairs(task.pairs)[: task.batch_size]
    rows = [([*one.prompt.tolist(), *ids.tolist()], len(one.prompt)) for one in pairs for ids in one[1:]]
    arguments = trainer.TrainingArgs(
        batch_size=2 * task.batch_size, iters=ENDLESS, max_seq_length=LONGEST, steps_per_report=ENDLESS,
        steps_per_eval=ENDLESS, steps_per_save=ENDLESS, adapter_file=str(_quiet_place(task)),
        grad_checkpoint=task.grad_checkpoint,
    )  # fmt: skip
    equip(gate, n_bytes(model))
    trainer.train(
        model, adamw(task), rows, args=arguments, loss=trainer.default_loss,
        iterate_batches=_gated(trainer.iterate_batches, gate),
    )  # fmt: skip


def _without_its_init(package: str) -> None:
    """Make a package's modules importable one by one: mlx-tune's ``__init__`` wants everything for sound and images."""
    spec = importlib.util.find_spec(package)
    bare = ModuleType(package)
    bare.__path__ = list(spec.submodule_search_locations)
    sys.modules.setdefault(package, bare)


class _Wrapped:
    """A model as mlx-tune's trainers want it: the LoRA comes after their reference pass."""

    lora_config = None

    def __init__(self, model: Any, tokenizer: Any, add_lora: Callable[[], Any]) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._apply_lora, self._lora_applied = add_lora, False


def mlx_tune(task: Task, gate: Gate) -> None:
    """``DPOTrainer`` of mlx-tune, reference log-probs precomputed, as is its default."""
    _without_its_init("mlx_tune")
    trainers = importlib.import_module("mlx_tune.rl_trainers")
    perf = importlib.import_module("mlx_tune._perf")
    bucket = perf.bucket_length
    pairs = load_pairs(task.pairs)[: task.batch_size]
    rows = [{key: text_of(ids) + ("" if key == "prompt" else END_TEXT) for key, ids in one._asdict().items()}
            for one in pairs]  # fmt: skip

    def run(optimizer: Any, gate: Callable[[], None], equipped: bool) -> None:
        model, tokenizer = base_model(task)[0], read_tokenizer(task.model)
        wrapped = _Wrapped(model, tokenizer, lambda: with_lora(model, task))
        settings = trainers.DPOConfig(
            beta=task.beta, learning_rate=task.learning_rate, per_device_train_batch_size=task.batch_size,
            max_steps=10**6, logging_steps=ENDLESS, save_steps=ENDLESS, max_seq_length=LONGEST,
            output_dir=str(_quiet_place(task).parent),
        )  # fmt: skip
        optimisers = type("Optimisers", (), {"AdamW": lambda learning_rate: optimizer, "cosine_decay": lambda *_: 0.0})
        first = [equipped]

        def length(longest: int, *args: int) -> int:
            if first[0]:
                equip(gate, n_bytes(model))
                first[0] = False
            gate()
            return bucket(longest, *args)

        trainers.optim, perf.bucket_length = optimisers, length
        trainers.DPOTrainer(wrapped, rows, tokenizer=tokenizer, args=settings).train()

    if task.gradients:
        _kept_gradients(lambda optimizer, gate: run(optimizer, gate, False), task)
    run(adamw(task), gate, True)

