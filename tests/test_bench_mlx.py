"""What MLX's room measures with: mlx-lm's own step, the plain step, time and memory of a call, the matmul rate.

Finds: a supervised step that is not mlx-lm's (loss, padding, update), a second copy of the weights, a policy that
is changed by being compared, a witness of gradients that agrees with a wrong step.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlxpref.bench.rows import made_rows
from mlxpref.data.batching import collate_step
from mlxpref.data.plan import plan_pass
from mlxpref.errors import ConfigError
from mlxpref.objectives import resolve_objective
from mlxpref.parity.models import config_of, write_model
from mlxpref.records import Tokenized

pytestmark = pytest.mark.mlx
mlx_backend = pytest.importorskip("mlxpref.mlx_backend")

import mlx.core as mx  # noqa: E402 - after the BLAS
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402 - after the BLAS

from mlxpref.mlx_backend import gauges, plain, rates, sft  # noqa: E402 - after the BLAS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("qwen3", tmp_path_factory.mktemp("models") / "qwen3")


def rows_of(n: int = 3) -> list[Tokenized]:
    rows = made_rows("hh", n, vocabulary=config_of("qwen3")["vocab_size"], longest=60)
    return [replace(row, prompt_ids=row.prompt_ids[: 20 + 3 * at]) for at, row in enumerate(rows)]


def loaded(folder: Path, **more: Any) -> Any:
    return mlx_backend.load_policy(str(folder), num_layers=2, lora_parameters={"rank": 4, "scale": 2.0}, **more)


# --- mlx-lm's step --------------------------------------------------------------------------------


def test_rows_are_padded_as_mlx_lm_does() -> None:
    from mlx_lm.tuner.trainer import iterate_batches

    rows = rows_of()
    batch, lengths = sft.padded(rows)
    whole = [(np.concatenate([row.prompt_ids, ids]), len(row.prompt_ids)) for row in rows for ids in row.response_ids]
    theirs, their_lengths = next(iterate_batches([(ids.tolist(), n) for ids, n in whole], len(whole), 2048))
    order = sorted(range(len(whole)), key=lambda at: len(whole[at][0]))
    assert np.array_equal(batch[order], np.array(theirs))
    assert np.array_equal(lengths[order], np.array(their_lengths))


def test_an_update_is_the_one_that_mlx_lms_trainer_makes(folder: Path, tmp_path: Path) -> None:
    """Its own ``train`` on a model it loaded itself, from the same adapter, for two updates on the same rows."""
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    from mlxpref.mlx_backend.optimizers import make_optimizer

    policy, rows = loaded(folder), rows_of(2)
    supervised = sft.SupervisedStep(policy, learning_rate=1e-2)
    theirs, _ = load_model(folder)
    theirs.freeze()
    linear_to_lora_layers(theirs, 2, policy.lora_parameters)
    start = dict(tree_flatten(supervised.model.trainable_parameters()))
    theirs.update(tree_unflatten(list(start.items())))
    for _ in range(2):
        supervised(rows)
    optimizer = make_optimizer("adamw", 0.0, None)
    optimizer.learning_rate = 1e-2
    whole = [(np.concatenate([row.prompt_ids, ids]).tolist(), len(row.prompt_ids)) for row in rows
             for ids in row.response_ids]  # fmt: skip
    args = TrainingArgs(batch_size=4, iters=2, adapter_file=str(tmp_path / "adapters.safetensors"))
    train(theirs, optimizer, whole, args=args)
    ours, other = (dict(tree_flatten(model.trainable_parameters())) for model in (supervised.model, theirs))
    assert ours.keys() == other.keys() == start.keys()
    assert max(mx.abs(ours[name] - start[name]).max().item() for name in ours) > 1e-3, "it moved"
    for name in ours:
        assert mx.abs(ours[name] - other[name]).max().item() < 1e-4, name


@pytest.mark.parametrize("four_bits", [False, True])
def test_the_base_is_in_memory_once_and_stays_the_policys(folder: Path, four_bits: bool) -> None:
    policy, rows = loaded(folder, load_in_4bit=four_bits), rows_of(2)
    plan = plan_pass(rows)
    batch = collate_step(rows, plan.steps[0])
    before = mlx_backend.token_logps(policy, batch.parts[0]).tokens
    base = gauges.weight_bytes(policy)
    held = mx.get_active_memory()
    supervised = sft.SupervisedStep(policy, learning_rate=1e-2)
    assert mx.get_active_memory() - held < supervised.state_bytes + 0.2 * base
    supervised(rows)
    assert np.array_equal(mlx_backend.token_logps(policy, batch.parts[0]).tokens, before)
    quantised = [name for name, module in supervised.model.named_modules() if "scales" in module]
    assert bool(quantised) == four_bits
    assert {name for name, _ in tree_flatten(supervised.model.trainable_parameters())} == set(policy.trainable())


def test_checkpointing_is_taken_out_again(folder: Path) -> None:
    """mlx-lm puts it into the layers' class, where our own step would meet it."""
    policy = loaded(folder, grad_checkpoint=True)
    kind = type(policy.model.layers[0])
    held = kind.__call__
    losses = [sft.SupervisedStep(one)(rows_of(1)) for one in (policy, loaded(folder))]
    assert kind.__call__ is held
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_full_fine_tuning_has_no_supervised_step(folder: Path) -> None:
    with pytest.raises(ConfigError, match="full"):
        sft.SupervisedStep(mlx_backend.load_policy(str(folder), fine_tune_type="full", num_layers=1))


# --- the plain step -------------------------------------------------------------------------------


def gradients_of(folder: Path, objective: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], Any]:
    """The step's and the plain step's, with an adapter that is not at its start."""
    policy, rows, formula = loaded(folder), rows_of(2), resolve_objective({"name": objective})
    draw = np.random.default_rng(0)
    values = {name: value + draw.normal(0, 0.05, value.shape) for name, value in policy.values().items()}
    policy.set_values(values)
    step = mlx_backend.make_step(policy, formula)
    plan = plan_pass(rows)
    known = mlx_backend.token_logps(policy, collate_step(rows, plan.steps[0]).parts[0], reference=True).tokens
    reference: list[list[np.ndarray]] = [[] for _ in rows]
    for index, of_row in zip(plan.steps[0][0].rows, known, strict=True):
        reference[index] = [of_row[s, : len(ids)] for s, ids in enumerate(rows[index].response_ids)]
    batch = collate_step(rows, plan.steps[0], reference if "reference" in formula.needs else None)
    after = policy.values()
    found = step.gradients(batch), plain.plain_gradients(policy, formula, rows, batch)
    assert all(np.array_equal(after[name], value) for name, value in policy.values().items())
    wrong = batch._replace(parts=tuple(_shifted(part) for part in batch.parts))
    return *found, step.gradients(wrong)


def _shifted(part: Any) -> Any:
    """One token scored that is not."""
    targets = np.array(part.targets)
    targets[0] += 1
    return part._replace(targets=targets)


@pytest.mark.parametrize("objective", ["dpo", "ipo", "simpo"])
def test_the_plain_step_agrees_with_the_step_and_with_no_wrong_one(folder: Path, objective: str) -> None:
    from mlxpref.bench.measuring import _apart

    ours, witness, wrong = gradients_of(folder, objective)
    assert _apart(ours, witness) < 2e-5
    assert _apart(wrong, witness) > 1e-3


# --- gauges ---------------------------------------------------------------------------------------


def test_memory_of_a_call_is_what_it_needs_beyond_what_was_held() -> None:
    kept = mx.ones((3_000_000,))
    mx.eval(kept)

    def call() -> None:
        mx.eval((kept + mx.arange(3_000_000)).sum())

    seconds, transient = gauges.measured(call)
    assert seconds > 0 and transient is not None
    assert 12e6 <= transient <= 40e6, "one or two arrays of 12 MB, and not the one held before"


def test_what_stays_in_memory_counted_by_hand(folder: Path) -> None:
    policy = loaded(folder)
    step = mlx_backend.make_step(policy, resolve_objective({"name": "dpo"}))
    assert gauges.weight_bytes(policy) == 4 * policy.n_parameters
    adapter = 4 * policy.n_trainable
    assert 3 * adapter <= gauges.state_bytes(policy, step) <= 4 * adapter + 64, "masters, their copy, two moments"
    assert gauges.dtype_of(policy) == "float32"


def test_each_product_counts_by_its_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of our own: the first product takes 1 s, the second 4, warm-up and all."""
    now = [0.0]
    seconds = chain.from_iterable((0.0, taken) for taken in [1.0, 4.0] * 4)

    def clock() -> float:
        now[0] += next(seconds)
        return now[0]

    monkeypatch.setattr(rates, "time", SimpleNamespace(perf_counter=clock))
    # Both directions of (4, 8) x (8, 16): 2 * 2 * 4 * 8 * 16 FLOPs in 1 s; of (2, 8) x (8, 4) in 4 s.
    first, second = 2 * 2 * 4 * 8 * 16 / 1.0, 2 * 2 * 2 * 8 * 4 / 4.0
    found = rates.matmul_rate([(4, 8, 16, 3000.0), (2, 8, 4, 1000.0)], repeats=3)
    assert found == pytest.approx(4000 / (3000 / first + 1000 / second))


def test_a_rate_needs_a_type_that_models_have() -> None:
    with pytest.raises(ValueError, match="float64"):
        rates.matmul_rate([(4, 8, 16, 1.0)], dtype="float64")
    assert rates.matmul_rate([(4, 8, 16, 1.0)], dtype="bfloat16", repeats=1) > 0
