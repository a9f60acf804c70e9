"""Who is measured, what each needs, and how to get it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from typing import NamedTuple


class Contestant(NamedTuple):
    """One way to make a step.

    Attributes:
        title: for tables.
        runs: module and function, ``(task, gate)``.
        group: "mlx" or "torch"; figures are compared within one.
        needs: distributions, as pip knows them.
        install: the line that brings them.
        whole: module and function of a whole run, where it is measured, too.
    """

    title: str
    runs: str
    group: str = "mlx"
    needs: tuple[str, ...] = ("mlx", "mlx-lm")
    install: str = "pip install 'mlxpref[cpu]'"
    whole: str | None = None


_TORCH = "pip install 'mlxpref[trl]'"

TABLE = {
    "mlxpref": Contestant("mlxpref", "mlx_ours:ours", whole="mlx_ours:whole_run"),
    "plain": Contestant("plain four forwards", "mlx_plain:plain"),
    "mlx-lm-lora": Contestant(
        "mlx-lm-lora DPO", "mlx_peers:mlx_lm_lora", needs=("mlx-lm", "mlx-lm-lora"),
        install="pip install 'mlxpref[bench]'", whole="mlx_peers:mlx_lm_lora_run",
    ),
    "sft": Contestant("mlx-lm SFT, same rows", "mlx_peers:sft"),
    "mlx-tune": Contestant(
        "mlx-tune DPO", "mlx_peers:mlx_tune", needs=("mlx-lm", "mlx-tune"),
        install="pip install --no-deps 'mlx-tune>=0.6.0'  # it asks for datasets<4, mlxpref for >=4",
    ),
    "mlxpref-torch": Contestant("mlxpref on PyTorch", "torch_ours:ours", "torch", ("torch", "peft"), _TORCH),
    "trl": Contestant("TRL DPOTrainer", "torch_peers:trl", "torch", ("torch", "trl", "peft"), _TORCH),
    "trl-precomputed": Contestant(
        "TRL, reference precomputed", "torch_peers:trl_precomputed", "torch", ("torch", "trl", "peft"), _TORCH
    ),
}  # fmt: skip


def missing(name: str) -> str | None:
    """Why a contestant cannot run here, with the line that mends it; None if it can."""
    one = TABLE[name]
    absent = [need for need in one.needs if not _installed(need)]
    return f"{name} is skipped: {', '.join(absent)} not installed ({one.install})" if absent else None


def versions(names: Sequence[str]) -> dict[str, str]:
    """Of every distribution these contestants need."""
    needs = {need for name in names for need in TABLE[name].needs} | {"mlxpref", "numpy"}
    return {need: metadata.version(need) for need in sorted(needs) if _installed(need)}


def _installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
