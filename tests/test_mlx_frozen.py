"""Rows kept behind the frozen layers: the same gradients in whatever shape, and computed once."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import ARCHITECTURES, config_of, write_model

from mlxpref.data.batching import collate
from mlxpref.data.parts import PlannedPart, Splitter
from mlxpref.data.sizes import sizes_of
from mlxpref.errors import ConfigError, RunError
from mlxpref.objectives import resolve_objective
from mlxpref.records import Batch, Tokenized

pytestmark = pytest.mark.mlx

LORA = {"rank": 4, "scale": 2.0}


@pytest.fixture(scope="module")
def rows() -> list[Tokenized]:
    draw = np.random.default_rng(3)

    def ids(n: int) -> np.ndarray:
        return draw.integers(3, 300, n).astype(np.int32)

    return [
        Tokenized(ids(prompt), (ids(one), ids(other)), example_id=str(i))
        for i, (prompt, one, other) in enumerate([(40, 9, 17), (21, 30, 5), (33, 12, 12), (18, 3, 26)])
    ]


def load(folder: Path, *, num_layers: int = 1, **options: Any) -> Any:
    from mlxpref import mlx_backend

    policy = mlx_backend.load_policy(str(folder), num_layers=num_layers, lora_parameters=LORA, **options)
    draw = np.random.default_rng(1)  # a fresh adapter's second factor is 0, and with it half of the gradient
    policy.set_values({name: 0.1 * draw.standard_normal(value.shape) for name, value in policy.values().items()})
    return policy


def step_of(policy: Any, rows: list[Tokenized], *, kept: bool, **options: Any) -> Any:
    from mlxpref import mlx_backend

    n_tokens = int(sizes_of(rows).tokens.sum()) if kept else None
    return mlx_backend.make_step(policy, resolve_objective("simpo"), frozen_tokens=n_tokens, **options)


def batch_of(rows: list[Tokenized], *groups: list[int], share: bool, prompt: int | None = None) -> Batch:
    """One micro-batch for each group; ``prompt`` tokens of each prompt are shared, as many as can be by default."""
    splitter = Splitter(rows, share_prompts=share, budget=10**6)
    parts = []
    for group in groups:
        shape = splitter.shape(group)
        if prompt is not None and shape.prompt > prompt:
            more = shape.prompt - prompt
            shape = replace(shape, prompt=prompt, rows=tuple(length + more for length in shape.rows))
        parts.append(PlannedPart(tuple(group), shape))
    return Batch(tuple(collate(rows, part) for part in parts), tuple(part.rows for part in parts))


def apart(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    assert ours.keys() == theirs.keys()
    off = sum(float(((ours[name] - theirs[name]) ** 2).sum()) for name in theirs)
    return (off / sum(float((value**2).sum()) for value in theirs.values())) ** 0.5


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "rwkv7"])  # its layers hand on two arrays
def test_gradients_are_those_of_the_whole_model(
    name: str, rows: list[Tokenized], tiny_model_dir: Path, tmp_path: Path
) -> None:
    """In the shapes they were kept in, in others with more and with fewer shared tokens, and without any."""
    policy = load(write_model(tmp_path / name, config_of(name), tiny_model_dir))
    plain, kept = step_of(policy, rows, kept=False), step_of(policy, rows, kept=True)
    share = policy.share_prompts
    batches = [
        batch_of(rows, [0, 2], [1, 3], share=share, prompt=16),
        batch_of(rows, [3, 1, 0, 2], share=share, prompt=8),
        batch_of(rows, [0], [2], [1, 3], share=share),
        batch_of(rows, [2, 0, 3], [1], share=False),
    ]
    for batch in batches:
        assert apart(kept.gradients(batch), plain.gradients(batch)) < 2e-5


def test_each_row_is_computed_once(rows: list[Tokenized], tiny_model_dir: Path, monkeypatch: Any) -> None:
    """A cache that never hits gives the same gradients."""
    policy = load(tiny_model_dir)
    step, met = step_of(policy, rows, kept=True), []
    compute = step.frozen._rows

    def counting(part: Any) -> Any:
        met.append(len(part.weights))
        return compute(part)

    monkeypatch.setattr(step.frozen, "_rows", counting)
    for groups in ([[0, 1], [2, 3]], [[3], [0, 2, 1]], [[0, 1, 2, 3]]):
        step(batch_of(rows, *groups, share=True), 1e-3)
    assert met == [2, 2]


def test_kept_rows_are_what_is_read(rows: list[Tokenized], tiny_model_dir: Path) -> None:
    """The frozen layers are not computed beside: with rows of zeros the loss is another."""
    policy = load(tiny_model_dir)
    step, batch = step_of(policy, rows, kept=True), batch_of(rows, [0, 1, 2, 3], share=True)
    before = step(batch, 0.0).loss
    step.frozen._read = lambda kept: (
        np.zeros((kept.shared, step.frozen._width), np.float32),
        [np.zeros((n, step.frozen._width), np.float32) for n in kept.lengths],
    )
    assert abs(step(batch, 0.0).loss - before) > 1e-3


@pytest.mark.parametrize(
    "options",
    [{"grad_checkpoint": True}, {"dtype": "bfloat16"}, {"fine_tune_type": "full"}, {"fine_tune_type": "dora"}],
)
def test_whatever_trains_and_however(options: dict[str, Any], rows: list[Tokenized], tiny_model_dir: Path) -> None:
    policy = load(tiny_model_dir, **options)
    batch = batch_of(rows, [0, 2], [1, 3], share=True)
    theirs = step_of(policy, rows, kept=False).gradients(batch)
    ours = step_of(policy, rows, kept=True).gradients(batch)
    assert apart(ours, theirs) < (2e-2 if options.get("dtype") else 2e-5)


def test_several_updates_end_at_the_same_weights(rows: list[Tokenized], tiny_model_dir: Path) -> None:
    ends = []
    for kept in (False, True):
        policy = load(tiny_model_dir, num_layers=2)
        step = step_of(policy, rows, kept=kept, optimizer="sgd")
        for groups in ([[0, 1], [2, 3]], [[0, 3], [1, 2]], [[0, 1, 2, 3]]):
            step(batch_of(rows, *groups, share=True), 0.1)
        ends.append(policy.values())
    assert apart(*ends) < 1e-5


def test_layers_that_hand_on_more_than_hidden_rows_are_refused(
    rows: list[Tokenized], tiny_model_dir: Path, tmp_path: Path
) -> None:
    policy = load(write_model(tmp_path / "rwkv7", config_of("rwkv7"), tiny_model_dir))
    with pytest.raises(ConfigError, match=r"cache_frozen.*hand on a tuple"):
        step_of(policy, rows, kept=True)


def test_nothing_is_kept_where_nothing_is_frozen(rows: list[Tokenized], tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="every layer trains"):
        step_of(load(tiny_model_dir, num_layers=-1), rows, kept=True)


def test_a_folder_without_room(rows: list[Tokenized], tiny_model_dir: Path, monkeypatch: Any) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(ConfigError, match=r"take up to .* GB"):
        step_of(load(tiny_model_dir), rows, kept=True)


def test_a_folder_that_fills_up(rows: list[Tokenized], tiny_model_dir: Path, monkeypatch: Any) -> None:
    from mlxpref.mlx_backend import frozen

    step = step_of(load(tiny_model_dir), rows, kept=True)
    monkeypatch.setattr(frozen.os, "pwrite", lambda *_: 10)
    with pytest.raises(RunError, match="takes no more than"):
        step(batch_of(rows, [0, 1], share=True), 0.1)


def test_on_pytorch_it_is_refused(rows: list[Tokenized]) -> None:
    torch_step = pytest.importorskip("mlxpref.torch_backend.step", reason="torch is not installed")

    with pytest.raises(ConfigError, match=r"model\.backend: mlx alone"):
        torch_step.make_step(None, resolve_objective("dpo"), frozen_tokens=5)
