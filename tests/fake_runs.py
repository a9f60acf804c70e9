"""Run folders as training leaves them, written by hand: what a run's record is read from, without a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxpref.config_layers import dump_config, load_config

DEVICE = {"backend": "mlx", "kind": "cpu", "device_name": "some processor"}


def healthy(step: int, n_steps: int) -> dict[str, float]:
    """Metrics of one step of a run that learns, goals obeyed."""
    done = (step - 1) / max(1, n_steps - 1)
    chosen, rejected, accuracy = 0.2 * done, -0.2 * done, 0.0 if step == 1 else 0.5 + 0.25 * done
    return {
        "loss": 1.4 - 0.2 * done, "rewards/chosen": chosen, "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected, "rewards/accuracies": accuracy, "logps/chosen": -20 + 2 * done,
        "logps/rejected": -20 - 2 * done, "lengths/chosen": 20.0, "lengths/rejected": 20.0, "grad_norm": 1.0,
        "learning_rate": 1e-3, "skipped_steps": 0, "trained_tokens": 100 * step, "tokens_per_second": 900.0,
        "step_seconds": 0.1, "chosen_half/rewards/accuracies": accuracy, "rejected_half/rewards/accuracies": accuracy,
        "peak_memory_gb": 1.5,
    }  # fmt: skip


def overview(**changes: Any) -> dict[str, Any]:
    """Of the training rows, nothing amiss."""
    usual = {"p5": 8.0, "p50": 20.0, "p95": 40.0, "max": 60.0}
    return {
        "rows": 1000, "examples": 500, "responses_each": 2.0, "contradicting": 0, "cut": {"prompts": 0, "responses": 0},
        "tokens": {name: dict(usual) for name in ("prompts", "chosen", "rejected", "responses")},
        "chosen_longer": 0.55, "equally_long": 0.05,
        "scores": {"edges": [0.5, 1.5, 2.5], "values": [1, 2], "chosen": [10, 490], "rejected": [480, 20]},
    } | changes  # fmt: skip


def write_run(
    folder: Path,
    *,
    n_steps: int = 40,
    done: int | None = None,
    every: int = 10,
    metrics: Any = None,
    evaluated: Any = None,
    settings: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    counts: Mapping[str, Any] | None = None,
    n_valid: int = 100,
) -> Path:
    """A run folder.

    Args:
        metrics, evaluated: (step, n_steps) → metrics over ``healthy``'s, of training and of the evaluation every
            ``every`` steps; by default nothing else.
        settings: dotted keys of the configuration. data: over ``overview``'s. counts: of stages.
        n_valid: validation rows.
    """
    folder.mkdir(parents=True)
    usual = {"model.path": "a-model", "data.source": "pairs.jsonl", "relabel.goal_range": [1, 10],
             "output.adapter_path": str(folder), "training.iters": n_steps,
             "optimizer.schedule.warmup_ratio": 0.1}  # fmt: skip
    config = load_config(None, list((usual | dict(settings or {})).items()))
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    facts = {
        "starts": [{"time": "2026-11-21T10:00:00+00:00", "step": 0, "versions": {"python": "3.11.7", "mlx": "0.32.4"},
                    "commit": "0" * 40, "device": DEVICE}],
        "objective": "dpo", "model": {"path": "a-model", "parameters": 1000, "trainable": 10},
        "data": {"fingerprint": "f" * 64, "train_rows": 1000, "valid_rows": n_valid, "counts": counts or {},
                 "recipe": {"goal_range": [1, 10]}, "train": overview(**(data or {}))},
        "plan": {"steps": n_steps, "epochs": 1.0, "shapes": 3, "tokens": 20000, "padding": 0.05},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    lines = []
    for step in range(1, (n_steps if done is None else done) + 1):
        own = healthy(step, n_steps) | (metrics(step, n_steps) if metrics else {})
        line = {"step": step, "epoch": step / n_steps, **own}
        if every and (step % every == 0 or step == n_steps):
            seen = healthy(step, n_steps) | (evaluated(step, n_steps) if evaluated else {})
            line |= {f"eval_{key}": seen[key] for key in seen if "/" in key or key == "loss"}
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder
